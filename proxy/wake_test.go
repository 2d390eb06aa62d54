package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
	"github.com/cayhq/cay/catalog/catalogtest"
)

// Every outcome of a wake, as the contract has it (section 4).
func TestWakeAnswers(t *testing.T) {
	typed := func(c cay.Code) error { return &cay.Error{Code: c, Layer: cay.LayerAPI, Message: "m"} }
	for _, c := range []struct {
		name   string
		err    error
		port   string
		header string
		status int
		says   string
	}{
		{"sleeps on", typed(cay.CodeSandboxNotFound), "8000", "", 502, "The sandbox was not found"},
		{"no token", typed(cay.CodeForbidden), "8000", "", 403, "e2b-traffic-access-token"},
		{"a wrong token", typed(cay.CodeForbidden), "8000", "x", 403, "wrong"},
		{"no access token", typed(cay.CodeForbidden), "49983", "", 403, "X-Access-Token"},
		{"still pausing", typed(cay.CodeSandboxTransition), "8000", "", 409, "still changing"},
		{"no place", typed(cay.CodeTooManySandboxes), "8000", "", 429, "team"},
		{"a damaged snapshot", typed(cay.CodeSnapshotCorrupt), "8000", "", 502, "could not be resumed"},
		{"no database", typed(cay.CodeStoreUnavailable), "8000", "", 503, "try again"},
		{"a defect", errors.New("boom"), "8000", "", 503, "try again"},
	} {
		var asked WakeRequest
		s := &Server{Catalog: &catalogtest.Table{}, Wake: func(_ context.Context, q WakeRequest) error { asked = q; return c.err }}
		r := httptest.NewRequest("GET", "http://127.0.0.1/", nil)
		r.Header.Set(headerSandbox, "i1234")
		r.Header.Set(headerPort, c.port)
		if c.header != "" {
			r.Header.Set(headerTraffic, c.header)
		}
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		var a struct {
			SandboxID, Message string
			Code               int
		}
		if err := json.Unmarshal(w.Body.Bytes(), &a); err != nil {
			t.Fatalf("%s: %v in %s", c.name, err, w.Body)
		}
		if w.Code != c.status || a.Code != c.status || !strings.Contains(a.Message, c.says) || a.SandboxID != "i1234" {
			t.Errorf("%s: %d %s, want %d that says %q", c.name, w.Code, w.Body, c.status, c.says)
		}
		if asked.Sandbox != "i1234" || asked.Envd != (c.port == "49983") || asked.Token.Reveal() != c.header {
			t.Errorf("%s: asked for %+v", c.name, asked)
		}
		if s.lot.all != 0 || len(s.lot.bySbx) != 0 {
			t.Errorf("%s: requests are still parked", c.name)
		}
	}
}

// Two hundred requests come for a sandbox that sleeps; each goes on when it is
// awake, with its body.
func TestParkedRequestsAreForwarded(t *testing.T) {
	const many = 200
	var waiting sync.WaitGroup
	waiting.Add(many)
	var asked atomic.Int32
	var w *world
	var route catalog.Route
	wake := sync.OnceFunc(func() {
		waiting.Wait()
		if err := w.cat.Put(t.Context(), route); err != nil {
			t.Error(err)
		}
	})
	w = newWorld(t, func(s *Server) {
		s.Wake = func(context.Context, WakeRequest) error {
			asked.Add(1)
			waiting.Done()
			wake()
			return nil
		}
	})
	route = w.sandbox(nil)
	w.guest(route, 8000, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		_, _ = w.Write(b)
	}))
	w.end(route)
	var wg sync.WaitGroup
	for range many {
		wg.Go(func() {
			if res, body := w.do(w.request("POST", "/", route, 8000, strings.NewReader("hello"))); res.StatusCode != 200 || body != "hello" {
				t.Errorf("%d %q", res.StatusCode, body)
			}
		})
	}
	wg.Wait()
	if asked.Load() != many {
		t.Errorf("%d requests knocked, want %d", asked.Load(), many)
	}
}

func TestParkingIsBounded(t *testing.T) {
	hold := make(chan struct{})
	s := &Server{Catalog: &catalogtest.Table{}, MaxParked: 3, Wake: func(ctx context.Context, _ WakeRequest) error {
		select {
		case <-hold:
		case <-ctx.Done():
		}
		return &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerAPI, Message: "gone"}
	}}
	ask := func(ctx context.Context) int {
		r := httptest.NewRequestWithContext(ctx, "GET", "http://127.0.0.1/", nil)
		r.Header.Set(headerSandbox, "i1234")
		r.Header.Set(headerPort, "80")
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		return w.Code
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if got := ask(t.Context()); got != 502 {
				t.Errorf("a parked request: %d", got)
			}
		})
	}
	for {
		s.mu.Lock()
		n := s.lot.all
		s.mu.Unlock()
		if n == 3 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if got := ask(t.Context()); got != 429 {
		t.Errorf("one too many: %d, want 429", got)
	}
	close(hold)
	wg.Wait()

	// Closing the proxy lets go of those that wait.
	hold = make(chan struct{})
	wg.Go(func() {
		if got := ask(t.Context()); got != 503 {
			t.Errorf("at the proxy's end: %d, want 503", got)
		}
	})
	for {
		s.mu.Lock()
		n := s.lot.all
		s.mu.Unlock()
		if n == 1 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

// A sandbox is paused under a request: one that may be made again is, when the
// sandbox is awake.
func TestRequestOverAPause(t *testing.T) {
	var w *world
	var route catalog.Route
	next := cay.NewExecutionID()
	w = newWorld(t, func(s *Server) {
		s.Wake = func(context.Context, WakeRequest) error {
			r := route
			r.Execution = next
			return w.cat.Put(t.Context(), r)
		}
	})
	route = w.sandbox(nil)
	var served atomic.Int32
	w.guest(route, 8000, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // else the end of the connection is not seen
		if served.Add(1)%2 == 1 {
			first := route
			if served.Load() > 2 {
				first.Execution = next
				next = cay.NewExecutionID()
			}
			w.end(first)
			<-r.Context().Done() // it is cut off
			return
		}
		_, _ = io.WriteString(rw, "awake")
	}))
	if res, body := w.do(w.request("GET", "/", route, 8000, nil)); res.StatusCode != 200 || body != "awake" || served.Load() != 2 {
		t.Errorf("GET: %d %q after %d tries", res.StatusCode, body, served.Load())
	}
	if res, body := w.do(w.request("POST", "/", route, 8000, strings.NewReader("x"))); res.StatusCode != 502 || served.Load() != 3 {
		t.Errorf("POST: %d %q after %d tries", res.StatusCode, body, served.Load())
	}
}
