package pause

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/test/program"
)

// counted is a guest that counts into a file; the count lives in its memory.
const counted = `exec python3 -c '
import os, time
n = 0
while True:
    n += 1
    with open("/tmp/n.new", "w") as f: f.write("%d %d" % (n, os.getpid()))
    os.rename("/tmp/n.new", "/tmp/n")
    time.sleep(0.01)
'`

func count(t *testing.T, s *program.Sandbox) (n, pid int) {
	t.Helper()
	program.Eventually(t, 10*time.Second, func() string {
		b, err := s.Read(t.Context(), "/tmp/n")
		if err == nil {
			_, err = fmt.Sscan(string(b), &n, &pid)
		}
		if err != nil {
			return fmt.Sprintf("the guest does not count: %v", err)
		}
		return ""
	})
	return n, pid
}

func state(c *program.Client, id string) string {
	var s struct{ State string }
	if err := c.Call(context.Background(), "GET", "/sandboxes/"+id, nil, &s); err != nil {
		return err.Error()
	}
	return s.State
}

// The server is killed while sandboxes are paused, and while they are being
// paused, resumed and saved: each is either running or paused when the next
// server is there, and goes on where it was.
func TestKilledServer(t *testing.T) {
	server := program.Start(t, program.Options{})
	c := server.Client()
	const boxes = 4
	var all []*program.Sandbox
	var pids [boxes]int
	for i := range boxes {
		s := c.Make(t, 10*time.Minute, nil)
		p, err := s.Start(t.Context(), "", counted)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Leave(); err != nil {
			t.Fatal(err)
		}
		_, pids[i] = count(t, s)
		all = append(all, s)
	}
	call := func(s *program.Sandbox, what string, in any) error {
		return c.Call(context.Background(), "POST", "/sandboxes/"+s.ID+what, in, nil)
	}
	connect := map[string]any{"timeout": 600}
	for round, after := range []time.Duration{0, 30 * time.Millisecond, 120 * time.Millisecond, 250 * time.Millisecond} {
		// One is paused, one is being paused, one being resumed, one saved.
		for _, s := range all[:2] {
			if err := call(s, "/pause", nil); err != nil {
				t.Fatalf("round %d: pausing: %v", round, err)
			}
		}
		var wg sync.WaitGroup
		acknowledged := make([]error, boxes)
		for i, f := range []func() error{
			func() error { return nil },
			func() error { return call(all[1], "/connect", connect) },
			func() error { return call(all[2], "/pause", nil) },
			func() error { return call(all[3], "/snapshots", map[string]any{}) },
		} {
			wg.Go(func() { acknowledged[i] = f() })
		}
		time.Sleep(after)
		server.Kill9(t)
		wg.Wait()
		server.Up(t)
		c.Vanish()
		for i, s := range all {
			program.Eventually(t, 10*time.Second, func() string {
				if got := state(c, s.ID); got != "running" && got != "paused" {
					return fmt.Sprintf("round %d, sandbox %d: %s", round, i, got)
				}
				return ""
			})
			if i == 2 && acknowledged[i] == nil && state(c, s.ID) != "paused" {
				t.Errorf("round %d: a pause that was acknowledged is undone", round)
			}
			program.Eventually(t, 20*time.Second, func() string {
				if err := call(s, "/connect", connect); err != nil {
					return fmt.Sprintf("round %d, sandbox %d: connecting: %v", round, i, err)
				}
				return ""
			})
			n, pid := count(t, s)
			if pid != pids[i] {
				t.Errorf("round %d, sandbox %d: process %d counts, and it was %d", round, i, pid, pids[i])
			}
			program.Eventually(t, 5*time.Second, func() string {
				if later, _ := count(t, s); later <= n {
					return fmt.Sprintf("round %d, sandbox %d: it does not count", round, i)
				}
				return ""
			})
		}
	}
}

// Two hundred requests come for a paused sandbox: it is resumed once, and each
// is answered.
func TestTrafficWakes(t *testing.T) {
	server := program.Start(t, program.Options{})
	c := server.Client()
	s := c.Make(t, 10*time.Minute, map[string]any{"autoResume": map[string]any{"enabled": true}})
	p, err := s.Start(t.Context(), "", `mkdir -p /tmp/www && echo awake > /tmp/www/index.html && cd /tmp/www && exec python3 -c '
import http.server, socketserver
class S(socketserver.ThreadingMixIn, http.server.HTTPServer):
    request_queue_size = 512
S(("0.0.0.0", 8000), http.server.SimpleHTTPRequestHandler).serve_forever()'`)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Leave()
	page := func(ctx context.Context) error {
		resp, err := s.Request(ctx, http.MethodGet, 8000, "/", "", nil)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
	program.Eventually(t, 10*time.Second, func() string {
		if err := page(t.Context()); err != nil {
			return err.Error()
		}
		return ""
	})
	if err := c.Call(t.Context(), "POST", "/sandboxes/"+s.ID+"/pause", nil, nil); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	errs := make([]error, 200)
	for i := range errs {
		wg.Go(func() { errs[i] = page(t.Context()) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Errorf("requests for a paused sandbox: %v", err)
	}
	if n := strings.Count(server.Log(), `"msg":"sandbox runs"`); n != 2 {
		t.Errorf("the sandbox was started %d times, want once and one resume", n)
	}

	// Who may not wake it does not.
	if err := c.Call(t.Context(), "POST", "/sandboxes/"+s.ID+"/pause", nil, nil); err != nil {
		t.Fatal(err)
	}
	stranger := *s
	stranger.Token = ""
	resp, err := stranger.Request(t.Context(), http.MethodGet, program.EnvdPort, "/files?path=/tmp/www/index.html", "", nil)
	var r *program.Refusal
	if !errors.As(err, &r) || r.Status != http.StatusForbidden {
		t.Errorf("without the token: %v, %v; want 403", resp, err)
	}
	if got := state(c, s.ID); got != "paused" {
		t.Errorf("a stranger woke it: %s", got)
	}
}
