package isolation

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/cayhq/cay/test/program"
)

// The promises about slow guests (V-14).
const (
	sniffDeadline = 3 * time.Second
	mostSlowdown  = 1.5
)

// slack is for a machine that does other things, too.
const slack = 20 * time.Second

// slowEnv has this test binary be a guest's program that is slow, or one that
// is not. Its value is the job's file.
const slowEnv = "CAY_ISOLATION_SLOW"

// slowJob says what the program does, at the address and by the name given.
type slowJob struct {
	To       netip.Addr
	Name     string
	Requests int // one after the other, each on a connection of its own; their times in microseconds are printed
	// Without requests: connections that send a body a byte now and then, and such
	// that say nothing, or half of what they should, and come again some time
	// after they were closed. All is over when the file slowStop is there and as
	// many have been closed.
	Dripping, Silent int
	Pace             int // new connections a second, at most
}

const slowStop = "/tmp/stop"

// How slow they are: rest is between two silent connections, drip between two
// bytes of a body, in tenths of a second. Faster ones would cost the guest
// itself more than they cost the server.
const (
	rest = 10 * time.Second
	drip = 300
)

// slowResult is what a slow guest has seen.
type slowResult struct {
	Lost   int           // of those that drip
	Closed int           // of the silent
	Latest time.Duration // of these, from the accept to the end
}

func slowMain(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var job slowJob
	if err := json.Unmarshal(b, &job); err != nil {
		return err
	}
	if job.Requests == 0 {
		return job.crawl()
	}
	var took []int64
	for range job.Requests {
		began := time.Now()
		for said := ""; !strings.HasPrefix(said, "open"); { // a machine that is too busy to send a header within 3 s is slow, which shows
			c, err := net.DialTimeout("tcp", netip.AddrPortFrom(job.To, 80).String(), slack)
			if err != nil {
				return err
			}
			said = talk(c, plainGet(job.Name))
			if time.Since(began) > slack {
				return errors.New(said)
			}
		}
		took = append(took, time.Since(began).Microseconds())
	}
	return json.NewEncoder(os.Stdout).Encode(took)
}

// crawl prints a line when every connection is open, and at the end what it has
// seen.
func (job slowJob) crawl() error {
	pace := rate.NewLimiter(rate.Limit(job.Pace), 1)
	var out slowResult
	var mu sync.Mutex
	open := func(port uint16, text string) (net.Conn, error) {
		_ = pace.Wait(context.Background()) // it has no end
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(job.To, port).String(), slack)
		if err == nil {
			_, err = io.WriteString(c, text)
		}
		return c, err
	}
	var dripping []net.Conn
	for range job.Dripping {
		c, err := begin(func() (net.Conn, error) {
			return open(80, "POST / HTTP/1.1\r\nHost: "+job.Name+"\r\nContent-Length: 100000\r\nExpect: 100-continue\r\n\r\n")
		})
		if err != nil {
			return fmt.Errorf("connection %d: %w", len(dripping), err)
		}
		dripping = append(dripping, c)
		go func() {
			_, _ = io.Copy(io.Discard, c) // its request is never whole: this is the end
			mu.Lock()
			out.Lost++
			mu.Unlock()
		}()
	}
	for i := range job.Silent {
		go func() {
			for {
				c, err := open([]uint16{80, 443, 80, 443}[i%4], []string{"", "", "GET / HT", "\x16\x03\x01\x02\x00\x01"}[i%4])
				began := time.Now()
				if err != nil {
					continue // closed by the time it spoke
				}
				_, _ = io.Copy(io.Discard, c) // until it is closed
				_ = c.Close()
				mu.Lock()
				out.Closed++
				out.Latest = max(out.Latest, time.Since(began))
				mu.Unlock()
				time.Sleep(rest)
			}
		}()
	}
	fmt.Println("open")
	for tick := 0; ; tick++ {
		mu.Lock()
		seen := out
		mu.Unlock()
		_, err := os.Stat(slowStop)
		if late := tick > int((sniffDeadline+slack)/(100*time.Millisecond)); !errors.Is(err, fs.ErrNotExist) && (seen.Closed >= job.Silent || late) {
			return json.NewEncoder(os.Stdout).Encode(seen)
		}
		for i := tick % drip; i < len(dripping); i += drip {
			_, _ = dripping[i].Write([]byte("a")) // one that is closed is counted
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// begin opens a connection whose request is let through, which the answer to its
// header tells. A machine may be too busy to send that in time.
func begin(open func() (net.Conn, error)) (c net.Conn, err error) {
	for began := time.Now(); time.Since(began) < slack; {
		if c, err = open(); err != nil {
			continue
		}
		var line string
		if line, err = bufio.NewReaderSize(c, 64).ReadString('\n'); err == nil && strings.HasPrefix(line, "HTTP/1.1 100 ") {
			return c, nil
		}
		_ = c.Close() // it is closed already, or says something else
		err = fmt.Errorf("%q, %w", line, err)
	}
	return nil, err
}

// runSlow gives a job to the program in a sandbox and returns its standard
// output as it comes.
func runSlow(ctx context.Context, s *program.Sandbox, job slowJob) (string, error) {
	b, err := json.Marshal(job)
	if err == nil {
		err = s.Write(ctx, "/tmp/job", b)
	}
	if err != nil {
		return "", err
	}
	r, err := s.Exec(ctx, "", "rm -f "+slowStop+" /tmp/said; ulimit -n 4096; "+slowEnv+"=/tmp/job ./guest | tee /tmp/said")
	if err == nil && (r.Code != 0 || r.Stderr != "") {
		err = fmt.Errorf("the guest's program: %s", r)
	}
	return r.Stdout, err
}

// Guests that hold connections open and say nothing on them, or a byte now and
// then, are closed in time where they owe a name, cost a bounded number of
// files, and do not slow down another guest's requests, which is judged at night
// only: then there are 5,000.
func TestSlowGuests(t *testing.T) {
	slow := make([]*program.Sandbox, program.Sized(1, 5))
	each := program.Sized(500, 1000)
	job := slowJob{To: (&matrixPolicy{}).public(), Name: "exact.p0.example", Dripping: each * 19 / 20, Silent: each / 20, Pace: 150 / len(slow)}
	var bytes atomic.Int64 // of slow bodies, as they arrive
	serve(t, program.InWorld, ":80", nil, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		buf := make([]byte, 512)
		for r.Method == http.MethodPost {
			n, err := r.Body.Read(buf)
			if bytes.Add(int64(n)); err != nil {
				return
			}
		}
		fmt.Fprint(w, canaryMark)
	}))
	resolver(t, resolvers[0])
	zone(t, resolvers[0], (&matrixZone{rebound: map[string]int{}}).answer)
	server := program.Start(t, program.Options{})
	c := server.Client()
	network := map[string]any{"denyOut": everything, "allowOut": []string{"*.p0.example"}}
	healthy := c.Make(t, 20*time.Minute, map[string]any{"network": network})
	for i := range slow {
		slow[i] = c.Make(t, 20*time.Minute, map[string]any{"network": network})
	}
	for _, s := range append(slow, healthy) {
		if err := settleIn(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, s := range []*program.Sandbox{healthy, slow[0]} {
			if log, err := refusalLog(server, s.ID); t.Failed() {
				t.Logf("refused to %s: %+v, %v", s.ID, log, err)
			}
		}
	})
	sample := func(n int) (took []int64) {
		said, err := runSlow(t.Context(), healthy, slowJob{To: job.To, Name: job.Name, Requests: n})
		if err == nil {
			err = json.Unmarshal([]byte(said), &took)
		}
		if err != nil {
			t.Fatalf("a healthy guest: %v, %q", err, said)
		}
		return took
	}
	crowd := func(f func()) {
		var wg sync.WaitGroup
		said := make([]string, len(slow))
		errs := make([]error, len(slow))
		for i, s := range slow {
			wg.Go(func() { said[i], errs[i] = runSlow(t.Context(), s, job) })
		}
		for _, s := range slow {
			program.Eventually(t, 2*patience, func() string {
				if b, err := s.Read(t.Context(), "/tmp/said"); err != nil || string(b) != "open\n" {
					return fmt.Sprintf("the slow connections are not open: %q, %v", b, err)
				}
				return ""
			})
		}
		f()
		for _, s := range slow {
			if err := s.Write(t.Context(), slowStop, nil); err != nil {
				t.Error(err)
			}
		}
		wg.Wait()
		for i := range slow {
			var got slowResult
			sc := bufio.NewScanner(strings.NewReader(strings.TrimPrefix(said[i], "open\n")))
			if errs[i] != nil || !sc.Scan() || json.Unmarshal(sc.Bytes(), &got) != nil {
				t.Fatalf("a slow guest: %v, %q", errs[i], said[i])
			}
			if got.Lost > 0 || got.Closed < job.Silent || got.Latest > sniffDeadline+slack {
				t.Errorf("a slow guest: %d of %d requests were cut; %d silent connections were closed, the latest after %s", got.Lost, job.Dripping, got.Closed, got.Latest)
			}
		}
	}

	sample(50) // warm
	before := server.Descriptors(t)
	var alone, with []int64
	p99 := func(took []int64) int64 { return slices.Sorted(slices.Values(took))[len(took)*99/100] }
	least := program.Sized(1, 3)
	for round := 1; ; round++ {
		alone = append(alone, sample(300)...)
		crowd(func() {
			with = append(with, sample(300)...)
			if got, most := server.Descriptors(t), before+len(slow)*(2*job.Dripping+job.Silent)+64; got > most {
				t.Errorf("%d files with %d slow connections, %d before: more than %d", got, len(slow)*each, before, most)
			}
		})
		program.Eventually(t, patience, func() string {
			if got := server.Descriptors(t); got > before+32 {
				return fmt.Sprintf("%d files are open, %d were before", got, before)
			}
			return ""
		})
		// Of all rounds together: a single one may be lucky, or meet a machine
		// that does other things.
		ratio := float64(p99(with)) / float64(p99(alone))
		t.Logf("after %d rounds: p99 is %d µs alone, %d µs beside %d slow connections", round, p99(alone), p99(with), len(slow)*each)
		if round >= least && (ratio <= mostSlowdown || !program.Nightly()) { // by day the machine has other work: it judges nothing then
			break
		}
		if round == 6 {
			t.Errorf("slow guests slow down another one: p99 %.2f ×", ratio)
			break
		}
	}
	if bytes.Load() == 0 {
		t.Error("no byte of a slow body has arrived")
	}
}
