package life

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/test/program"
)

// counter counts every 20 ms, and keeps in a file the count, the longest pause
// between two counts in milliseconds, and who counts.
const counter = `exec python3 -c '
import os, time
f = os.open("/tmp/count", os.O_CREAT | os.O_WRONLY, 0o644)
n, longest, last = 0, 0.0, time.monotonic()
while True:
    time.sleep(0.02)
    t = time.monotonic()
    n, longest, last = n + 1, max(longest, t - last), t
    os.pwrite(f, b"%12d %8d %8d\n" % (n, longest * 1000, os.getpid()), 0)
'`

type count struct{ n, longest, pid int }

func readCount(ctx context.Context, s *program.Sandbox) (count, error) {
	b, err := s.Read(ctx, "/tmp/count")
	if err != nil {
		return count{}, err
	}
	var c count
	_, err = fmt.Sscan(string(b), &c.n, &c.longest, &c.pid)
	return c, err
}

// startCounters makes sandboxes that count.
func startCounters(t *testing.T, c *program.Client, n int) []*program.Sandbox {
	t.Helper()
	boxes := make([]*program.Sandbox, n)
	for i := range boxes {
		boxes[i] = c.Make(t, 10*time.Minute, map[string]any{"metadata": map[string]string{"n": fmt.Sprint(i)}})
		p, err := boxes[i].Start(t.Context(), "", counter)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Leave(); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range boxes {
		program.Eventually(t, 20*time.Second, func() string {
			if c, err := readCount(t.Context(), s); err != nil || c.n == 0 {
				return fmt.Sprintf("sandbox %s does not count: %v", s.ID, err)
			}
			return ""
		})
	}
	return boxes
}

// Sandboxes outlive the server. After `kill -9`, the next `cay up` has every
// one of them back within 5 s, with its processes, its open ports and its
// deadline; what should have ended meanwhile ends within 2 s.
func TestKilledServer(t *testing.T) {
	server := program.Start(t, program.Options{})
	c := server.Client()
	boxes := startCounters(t, c, 10)
	web := boxes[0]
	p, err := web.Start(t.Context(), "", `mkdir -p /tmp/www && echo still here > /tmp/www/index.html && cd /tmp/www && exec python3 -m http.server 8000`)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Leave()
	page := func() error {
		resp, err := web.Request(t.Context(), http.MethodGet, 8000, "/", "", nil)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if string(b) != "still here\n" {
			return fmt.Errorf("the page has %q: %w", b, err)
		}
		return nil
	}
	program.Eventually(t, 10*time.Second, func() string {
		if err := page(); err != nil {
			return err.Error()
		}
		return ""
	})
	before := map[string]count{}
	ends := map[string]time.Time{}
	for _, s := range boxes {
		n, err := readCount(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		before[s.ID] = n
		got, err := c.Get(t.Context(), s.ID)
		if err != nil {
			t.Fatal(err)
		}
		ends[s.ID] = got.EndAt
	}
	// One's time ends while no server runs, and one's soon after.
	down := c.Make(t, 2*time.Second, nil)
	soon := c.Make(t, 8*time.Second, nil)
	soonEnd, err := c.Get(t.Context(), soon.ID)
	if err != nil {
		t.Fatal(err)
	}

	server.Kill9(t)
	killed := time.Now()
	time.Sleep(3 * time.Second) // the down-time under test
	c.Vanish()
	began := time.Now()
	server.Up(t)
	ready := time.Now()
	t.Logf("down for %s, ready after %s", began.Sub(killed).Round(time.Millisecond), server.Ready.Round(time.Millisecond))

	var wg sync.WaitGroup
	for _, s := range boxes {
		wg.Go(func() {
			if err := s.Answers(t.Context()); err != nil {
				t.Errorf("sandbox %s does not answer after the restart: %v", s.ID, err)
			}
			r, err := s.Exec(t.Context(), "", "cat /tmp/count")
			if err != nil || r.Code != 0 {
				t.Errorf("sandbox %s after the restart: %v, %s", s.ID, err, r)
			}
		})
	}
	wg.Wait()
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("all sandboxes answered only after %s, want 5 s from the start of `cay up`", took)
	}
	program.Within(t, time.Until(ready.Add(2*time.Second)), func() string { return gone(t.Context(), c, down) })

	for _, s := range boxes {
		n, err := readCount(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		old := before[s.ID]
		// The counter runs at up to 50 a second, and at a few even on a machine
		// that is very busy.
		if n.pid != old.pid || n.n < old.n+10 {
			t.Errorf("sandbox %s counted from %d to %d, as process %d and %d", s.ID, old.n, n.n, old.pid, n.pid)
		}
		if n.longest > 2000 {
			t.Errorf("sandbox %s: the counter stood still for %d ms", s.ID, n.longest)
		}
		got, err := c.Get(t.Context(), s.ID)
		if err != nil {
			t.Fatal(err)
		}
		if !got.EndAt.Equal(ends[s.ID]) {
			t.Errorf("sandbox %s ended at %s before the restart, and at %s after it", s.ID, ends[s.ID], got.EndAt)
		}
	}
	if err := page(); err != nil {
		t.Errorf("the open port after the restart: %v", err)
	}
	list, err := c.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 11 && len(list) != 10 { // with soon, or after its end
		t.Errorf("the API lists %d sandboxes, want 11", len(list))
	}
	if time.Now().Before(soonEnd.EndAt.Add(-time.Second)) {
		if err := soon.Answers(t.Context()); err != nil {
			t.Errorf("the sandbox with a second left does not answer: %v", err)
		}
	}
	program.Within(t, time.Until(soonEnd.EndAt)+1500*time.Millisecond, func() string { return gone(t.Context(), c, soon) })
	if early := time.Until(soonEnd.EndAt); early > 100*time.Millisecond {
		t.Errorf("a sandbox ended %s before its time", early)
	}
	rec, err := c.Record(t.Context(), down.ID)
	if err != nil || rec.State != "ended" || rec.EndReason != "timeout" {
		t.Errorf("the sandbox whose time ended without a server has the record %+v, %v", rec, err)
	}
}

// SIGTERM stops the server and no sandbox, any number of times; and `cay down`
// after it ends them.
func TestStoppedServer(t *testing.T) {
	server := program.Start(t, program.Options{Pool: 1})
	c := server.Client()
	boxes := startCounters(t, c, 2)
	for round := range 3 {
		old, err := readCount(t.Context(), boxes[0])
		if err != nil {
			t.Fatal(err)
		}
		server.Restart(t)
		c.Vanish()
		if limit := 5 * time.Second; server.Ready > limit {
			t.Errorf("round %d: ready after %s, want %s", round, server.Ready, limit)
		}
		for _, s := range boxes {
			n, err := readCount(t.Context(), s)
			if err != nil {
				t.Fatalf("round %d: sandbox %s after the restart: %v", round, s.ID, err)
			}
			if s == boxes[0] && (n.pid != old.pid || n.n <= old.n) {
				t.Errorf("round %d: the counter went from %+v to %+v", round, old, n)
			}
		}
		// The restarted server is a whole one.
		s := c.Make(t, time.Minute, nil)
		if out := s.Out(t, "echo new"); out != "new\n" {
			t.Errorf("round %d: a new sandbox says %q", round, out)
		}
	}
	server.Term(t)
	r := server.Down(t)
	if !strings.Contains(r.Stderr+r.Stdout, "5 sandboxes ended") {
		t.Errorf("`cay down` of 5 sandboxes said: %s", r)
	}
	server.Up(t)
	for _, s := range boxes {
		rec, err := c.Record(t.Context(), s.ID)
		if err != nil || rec.EndReason != "shutdown" {
			t.Errorf("after `cay down` the record of %s is %+v, %v", s.ID, rec, err)
		}
	}
	if list, err := c.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("after `cay down` and `cay up` the API lists %v, %v", list, err)
	}
}
