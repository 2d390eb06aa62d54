package edge

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/cayhq/cay/test/program"
)

// mostPerStream is what an open stream may cost the server (V-13).
const mostPerStream = 40 << 10

// streamer holds streams to sandboxes open and notices when one ends.
type streamer struct {
	ctx    context.Context
	idle   []*websocket.Conn
	events []atomic.Int64 // that each active stream has got
	ended  chan error
	wg     sync.WaitGroup
}

// hold opens idle WebSockets and streams of events, so many a second each, to
// the given sandboxes in turn.
func (e *edge) hold(t *testing.T, ctx context.Context, boxes []*program.Sandbox, idle, active int) *streamer {
	t.Helper()
	s := &streamer{ctx: ctx, idle: make([]*websocket.Conn, idle), events: make([]atomic.Int64, active), ended: make(chan error, active)}
	hc := e.http(h1)
	hc.Transport.(*http.Transport).MaxConnsPerHost = 0
	var wg sync.WaitGroup
	places := make(chan struct{}, 32)
	open := func(i int, f func(at *edge) error) {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			at := *e
			at.box = boxes[i%len(boxes)]
			if err := f(&at); err != nil {
				t.Errorf("stream %d: %v", i, err)
			}
		})
	}
	for i := range idle {
		open(i, func(at *edge) error {
			c, resp, err := websocket.Dial(ctx, "http://"+at.host(8080)+at.proxyPort()+"/ws", &websocket.DialOptions{HTTPClient: hc})
			if resp != nil && resp.Body != nil {
				_ = resp.Body.Close() // the connection is the WebSocket's
			}
			s.idle[i] = c
			return err
		})
	}
	for i := range active {
		open(i, func(at *edge) error {
			req, err := http.NewRequestWithContext(ctx, "GET", "http://"+at.host(8080)+at.proxyPort()+"/sse?every=1s", nil)
			if err != nil {
				return err
			}
			res, err := hc.Do(req)
			if err != nil {
				return err
			}
			s.wg.Go(func() {
				defer res.Body.Close()
				sc := bufio.NewScanner(res.Body)
				for sc.Scan() {
					if strings.HasPrefix(sc.Text(), "data: ") {
						s.events[i].Add(1)
					}
				}
				if ctx.Err() == nil {
					s.ended <- fmt.Errorf("stream %d of events ended: %w", i, sc.Err())
				}
			})
			return nil
		})
	}
	wg.Wait()
	return s
}

// check asks every idle stream for an echo, and every active one for an event.
func (s *streamer) check(t *testing.T) {
	t.Helper()
	var dropped atomic.Int32
	var wg sync.WaitGroup
	places := make(chan struct{}, 32)
	for _, c := range s.idle {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			ctx, stop := context.WithTimeout(s.ctx, patience)
			defer stop()
			err := c.Write(ctx, websocket.MessageText, []byte("still"))
			if err == nil {
				var b []byte
				if _, b, err = c.Read(ctx); err == nil && string(b) != "echo still" {
					err = fmt.Errorf("it says %q", b)
				}
			}
			if err != nil && dropped.Add(1) <= 3 {
				t.Errorf("an idle stream: %v", err)
			}
		})
	}
	wg.Wait()
	if n := dropped.Load(); n > 0 {
		t.Errorf("%d of %d idle streams were dropped", n, len(s.idle))
	}
	before := make([]int64, len(s.events))
	for i := range s.events {
		before[i] = s.events[i].Load()
	}
	program.Eventually(t, patience, func() string {
		for i := range s.events {
			if s.events[i].Load() <= before[i] {
				return fmt.Sprintf("stream %d has no event after %d", i, before[i])
			}
		}
		return ""
	})
	for {
		select {
		case err := <-s.ended:
			t.Error(err)
			continue
		default:
		}
		return
	}
}

// pss is the memory of the server's process, its share of what it shares
// included, in bytes.
func (e *edge) pss(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", e.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "Pss:" {
			n, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal("smaps_rollup has no Pss")
	return 0
}

// Streams that say nothing and streams that say something every second are held,
// none is dropped, and each costs the server little. Nightly: 5,000 and 500, for
// ten minutes.
func TestStreamsAreHeld(t *testing.T) {
	idle, active := program.Sized(500, 5000), program.Sized(50, 500)
	length := time.Duration(program.Sized(1, 600)) * time.Second
	e := startEdge(t)
	var boxes []*program.Sandbox
	for range program.Sized(1, 4) { // one has at most 4,096 connections
		boxes = append(boxes, e.inhabit(t, nil))
	}
	ctx, stop := context.WithCancel(t.Context())
	e.hold(t, ctx, boxes, 20, 2) // warm
	before := e.pss(t)
	s := e.hold(t, ctx, boxes, idle, active)
	s.check(t)
	select {
	case <-time.After(length):
	case err := <-s.ended:
		t.Fatal(err)
	}
	grown := e.pss(t) - before
	s.check(t)
	t.Logf("%d idle and %d active streams for %s: %d KiB each", idle, active, length, grown/(idle+active)>>10)
	if most := mostPerStream * (idle + active); program.Nightly() && grown > most { // fewer are less than what the heap does by itself
		t.Errorf("%d streams cost %d KiB, more than %d", idle+active, grown>>10, most>>10)
	}
	stop()
	for _, c := range s.idle {
		if c != nil {
			_ = c.CloseNow()
		}
	}
	s.wg.Wait()
}
