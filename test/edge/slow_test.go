package edge

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay/test/program"
)

// The promises about slow clients (V-14).
const (
	headerDeadline    = 10 * time.Second
	handshakeDeadline = 3 * time.Second
	mostSlowdown      = 1.5
)

// slack is for a machine that does other things, too.
const slack = 20 * time.Second

// crowd are clients that take their time.
type crowd struct {
	conns   []net.Conn
	wg      sync.WaitGroup
	stop    chan struct{}
	closed  atomic.Int32
	latest  [2]atomic.Int64 // nanoseconds until the last one was closed: plain, TLS
	inBody  int
	letters atomic.Int64 // sent
}

// join opens n connections in five ways. Every fiftieth sends the body of a
// request to a sandbox of its own, which may take as long as it likes.
func (e *edge) join(t *testing.T, n int, other *program.Sandbox) *crowd {
	t.Helper()
	c := &crowd{stop: make(chan struct{})}
	plain, secure := strings.TrimPrefix(e.Proxy, "http://"), "127.0.0.1:443"
	var dripping []net.Conn
	for i := range n {
		addr, first, which := plain, "", 0
		switch {
		case i%50 == 0:
			first, which = fmt.Sprintf("POST /echo HTTP/1.1\r\nHost: 8080-%s.%s\r\nContent-Length: 100000\r\n\r\n", other.ID, domain), -1
			c.inBody++
		case i%5 == 1: // silent
		case i%5 == 2:
			addr, which = secure, 1
		case i%5 == 3 && i%2 == 0:
			addr, which, first = secure, 1, "\x16\x03\x01\x02\x00\x01"
		default:
			first = "GET / HTTP/1.1\r\nHost: " + e.host(8080) + "\r\nX-Slow: "
		}
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err := io.WriteString(conn, first); err != nil {
			t.Fatal(err)
		}
		c.conns = append(c.conns, conn)
		if first != "" && addr == plain {
			dripping = append(dripping, conn)
		}
		if which >= 0 {
			c.wg.Go(func() {
				_, _ = io.Copy(io.Discard, conn)
				c.closed.Add(1)
				took := int64(time.Since(began))
				for {
					last := c.latest[which].Load()
					if took <= last || c.latest[which].CompareAndSwap(last, took) {
						return
					}
				}
			})
		}
	}
	c.wg.Go(func() { c.drip(dripping) })
	return c
}

// drip sends a letter a second on each connection.
func (c *crowd) drip(conns []net.Conn) {
	const parts = 50
	tick := time.NewTicker(time.Second / parts)
	defer tick.Stop()
	for part := 0; ; part++ {
		select {
		case <-c.stop:
			return
		case <-tick.C:
		}
		for i := part % parts; i < len(conns); i += parts {
			if _, err := io.WriteString(conns[i], "a"); err == nil {
				c.letters.Add(1)
			}
		}
	}
}

// waitClosed waits until the server has closed n of them, and says when it is
// late.
func (c *crowd) waitClosed(t *testing.T, n int) {
	t.Helper()
	program.Eventually(t, headerDeadline+slack, func() string {
		if got := int(c.closed.Load()); got < n {
			return fmt.Sprintf("%d of %d slow connections are closed", got, n)
		}
		return ""
	})
	for which, limit := range []time.Duration{headerDeadline, handshakeDeadline} {
		if d := time.Duration(c.latest[which].Load()); d > limit+slack {
			t.Errorf("slow connections were closed after %s, promised are %s", d, limit)
		}
	}
	if c.letters.Load() == 0 {
		t.Error("no letter was sent")
	}
}

// leave ends those that are still there.
func (c *crowd) leave() {
	close(c.stop)
	for _, conn := range c.conns {
		_ = conn.Close()
	}
	c.wg.Wait()
}

// p99 is that of so many requests, one after the other.
func p99(t *testing.T, hc *http.Client, url string) time.Duration {
	t.Helper()
	took := make([]time.Duration, 300)
	for i := range took {
		began := time.Now()
		res, err := hc.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, res.Body)
		res.Body.Close()
		if err != nil || res.StatusCode != 200 {
			t.Fatal(res.StatusCode, err)
		}
		took[i] = time.Since(began)
	}
	slices.Sort(took)
	return took[len(took)*99/100]
}

// rounds are the p99s of healthy requests, measured in turn.
type rounds struct{ alone, with []time.Duration }

// fewest and most are how many rounds there are. A busy machine slows rounds of
// either kind: as long as the slow clients seem to be what slows, the number is
// doubled, and what counts is all that was measured.
const (
	fewest = 5
	most   = 40
)

// measure makes rounds and returns how many times as long a p99 is with slow
// clients, at the median.
func (r *rounds) measure(round func()) float64 {
	for n := fewest; ; n *= 2 {
		for len(r.with) < n {
			round()
		}
		slowdown := float64(middle(r.with)) / float64(middle(r.alone))
		if slowdown <= mostSlowdown || n >= most {
			return slowdown
		}
	}
}

func middle(d []time.Duration) time.Duration { return slices.Sorted(slices.Values(d))[len(d)/2] }

func (r *rounds) String() string {
	return fmt.Sprintf("%d rounds: %s alone, %s with slow clients", len(r.with), r.alone, r.with)
}

// One lucky round proves nothing, and one unlucky round neither.
func TestRounds(t *testing.T) {
	for _, c := range []struct {
		name string
		with []time.Duration // over and over; alone it is 10
		want float64
		n    int
	}{
		{"kept", []time.Duration{11, 12, 10, 11, 12}, 1.1, fewest},
		{"noise", []time.Duration{11, 90, 12, 80, 10}, 1.2, fewest},
		{"noise at first", []time.Duration{20, 20, 20, 11, 11, 11, 11, 11, 11, 11}, 1.1, 2 * fewest},
		{"luck", []time.Duration{10, 20, 20, 20, 20}, 2, most},
		{"slow", []time.Duration{16}, 1.6, most},
	} {
		var r rounds
		got := r.measure(func() {
			r.alone = append(r.alone, 10)
			r.with = append(r.with, c.with[len(r.with)%len(c.with)])
		})
		if got != c.want || len(r.with) != c.n {
			t.Errorf("%s: %.2f after %d rounds, want %.2f after %d", c.name, got, len(r.with), c.want, c.n)
		}
	}
}

// Clients that send their header, their hello or their body a letter a second,
// or nothing, are closed in time, cost a bounded number of files, and do not
// slow down who does not.
func TestSlowClients(t *testing.T) {
	n := program.Sized(500, 5000)
	e := startEdge(t)
	e.box = e.inhabit(t, nil)
	other := e.inhabit(t, nil)
	hc := e.http(h1)
	defer hc.CloseIdleConnections()
	url := "https://" + e.host(8080) + "/hello"
	p99(t, hc, url) // warm
	before := e.Descriptors(t)
	var r rounds
	round := func() {
		r.alone = append(r.alone, p99(t, hc, url))
		c := e.join(t, n, other)
		r.with = append(r.with, p99(t, hc, url))
		if most := before + n + c.inBody + 64; e.Descriptors(t) > most {
			t.Errorf("%d files with %d slow clients, %d before: more than %d", e.Descriptors(t), n, before, most)
		}
		if len(r.with) == 1 {
			c.waitClosed(t, n-c.inBody)
		}
		c.leave()
	}
	if slowdown := r.measure(round); slowdown > mostSlowdown {
		t.Errorf("%d slow clients make the p99 of others %.2f times as long, promised are %.1f", n, slowdown, mostSlowdown)
	}
	t.Log(&r)
	program.Eventually(t, patience, func() string {
		if got := e.Descriptors(t); got > before+16 {
			return fmt.Sprintf("%d files are open, %d were before", got, before)
		}
		return ""
	})
}
