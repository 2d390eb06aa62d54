package pause

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/test/program"
)

//go:embed guest/guest.py
var guestPy []byte

//go:embed guest/guest.js
var guestJS []byte

// kinds are the guests that are paused over and over.
var kinds = []struct {
	name, run string
	file      []byte
	port      int
}{
	{"guest.py", "exec python3 guest.py 64 1", guestPy, 8000},
	{"guest.js", "exec node guest.js", guestJS, 3000},
	{"guest.py", "exec python3 guest.py 16 8", guestPy, 8000},
	{"guest.js", "exec node guest.js", guestJS, 3000},
}

// guestState is what a guest says of itself.
type guestState struct {
	Whole  bool
	PID    int
	Done   map[string]int
	Errors []string
}

// patient is a sandbox with a guest in it that is paused and resumed.
type patient struct {
	*program.Sandbox
	client *program.Client
	port   int
	last   guestState
	cycles int
	retry  func(what string, err error) bool
}

// look asks the guest how it is.
func (p *patient) look(ctx context.Context) (s guestState, err error) {
	resp, err := p.Request(ctx, http.MethodGet, p.port, "/state", "", nil)
	if err != nil {
		return s, err
	}
	defer resp.Body.Close()
	return s, json.NewDecoder(resp.Body).Decode(&s)
}

// well makes sure that nothing was lost since the last look.
func (p *patient) well(ctx context.Context) error {
	s, err := p.look(ctx)
	switch {
	case err != nil:
		return err
	case !s.Whole:
		return errors.New("its array is not whole")
	case len(s.Errors) > 0:
		return fmt.Errorf("it says: %s", strings.Join(s.Errors, "; "))
	case p.last.PID != 0 && s.PID != p.last.PID:
		return fmt.Errorf("process %d answers, and it was %d", s.PID, p.last.PID)
	}
	for what, n := range p.last.Done {
		if s.Done[what] < n {
			return fmt.Errorf("%d %s, and there were %d", s.Done[what], what, n)
		}
	}
	p.last = s
	return nil
}

// insist makes a call to the sandbox, again if a failure says that it may be
// made again and no other failure of the test came before.
func (p *patient) insist(ctx context.Context, what string, in any) error {
	for {
		err := p.client.Call(ctx, http.MethodPost, "/sandboxes/"+p.ID+what, in, nil)
		if err == nil || !p.retry(p.ID+what, err) {
			return err
		}
	}
}

// cycle pauses and resumes the guest. What it wrote after its fifth resume is
// looked at after the tenth, and so on.
func (p *patient) cycle(ctx context.Context) error {
	if err := p.insist(ctx, "/pause", nil); err != nil {
		return fmt.Errorf("pausing: %w", err)
	}
	if err := p.insist(ctx, "/connect", map[string]any{"timeout": 3600}); err != nil {
		return fmt.Errorf("resuming: %w", err)
	}
	p.cycles++
	if err := p.well(ctx); err != nil {
		return fmt.Errorf("after resume %d: %w", p.cycles, err)
	}
	name := func(n int) string { return fmt.Sprintf("/home/user/kept/%d", n) }
	if err := p.Write(ctx, name(p.cycles), []byte(name(p.cycles))); err != nil {
		return fmt.Errorf("writing a file after resume %d: %w", p.cycles, err)
	}
	if old := p.cycles - 5; old > 0 {
		if b, err := p.Read(ctx, name(old)); err != nil || string(b) != name(old) {
			return fmt.Errorf("the file written after resume %d is %q after resume %d: %w", old, b, p.cycles, err)
		}
	}
	return nil
}

// Guests of several kinds, with an array, a log, a database, files and
// connections inside, are paused and resumed while they write to their disks
// and others use their ports. Nothing is lost; at most one call fails, with an
// answer that says that it may be made again, and then works.
func TestCycles(t *testing.T) {
	server := program.Start(t, program.Options{Pool: 1})
	c := server.Client()
	total, guests := int64(program.Sized(12, 500)), program.Sized(2, len(kinds))
	var failures atomic.Int32
	retry := func(what string, err error) bool {
		var r *program.Refusal
		again := errors.As(err, &r) && r.ErrorCode != "" && cay.Code(r.ErrorCode) != cay.CodeInternal && failures.Add(1) == 1
		t.Logf("%s: %v (tried again: %v)", what, err, again)
		return again
	}
	var all []*patient
	for _, k := range kinds[:guests] {
		p := &patient{Sandbox: c.Make(t, time.Hour, nil), client: c, port: k.port, retry: retry}
		if err := p.Write(t.Context(), "/home/user/"+k.name, k.file); err != nil {
			t.Fatal(err)
		}
		proc, err := p.Start(t.Context(), "", k.run)
		if err != nil {
			t.Fatal(err)
		}
		if err := proc.Leave(); err != nil {
			t.Fatal(err)
		}
		program.Eventually(t, time.Minute, func() string {
			if err := p.well(t.Context()); err != nil {
				return err.Error()
			}
			return ""
		})
		all = append(all, p)
	}

	// The load on the network: somebody always asks, whether or not anybody is
	// there to answer.
	ctx, stop := context.WithCancel(t.Context())
	var load, work sync.WaitGroup
	var answers atomic.Int64
	for _, p := range all {
		load.Go(func() {
			for ctx.Err() == nil {
				if resp, err := p.Request(ctx, http.MethodGet, p.port, "/", "", nil); err == nil {
					answers.Add(1)
					resp.Body.Close()
				}
				time.Sleep(50 * time.Millisecond)
			}
		})
	}
	began := time.Now()
	var next atomic.Int64
	for i, p := range all {
		work.Go(func() {
			for next.Add(1) <= total {
				if err := p.cycle(ctx); err != nil {
					t.Errorf("guest %d, %s: %v", i, p.ID, err)
					return
				}
			}
		})
	}
	work.Wait()
	stop()
	load.Wait()
	t.Logf("%d cycles of %d guests took %v; meanwhile they answered %d requests; %d failures", total, guests, time.Since(began).Round(time.Millisecond), answers.Load(), failures.Load())
	for i, p := range all {
		before := p.last.Done
		if err := p.well(t.Context()); err != nil {
			t.Errorf("guest %d at the end: %v", i, err)
		}
		program.Eventually(t, 30*time.Second, func() string {
			s, err := p.look(t.Context())
			if err != nil {
				return err.Error()
			}
			for what, n := range before {
				if s.Done[what] <= n {
					return fmt.Sprintf("guest %d does not go on with its %s: %d", i, what, n)
				}
			}
			return ""
		})
		if n := strings.TrimSpace(p.Out(t, `for f in kept/*; do [ "$(cat $f)" = "/home/user/$f" ] && echo; done | wc -l`)); n != fmt.Sprint(p.cycles) {
			t.Errorf("guest %d has %s whole files of %d that were written to it", i, n, p.cycles)
		}
		if p.port == 8000 {
			const check = `python3 -c 'import sqlite3
db = sqlite3.connect("db", timeout=60)
print(db.execute("pragma integrity_check").fetchone()[0], db.execute("select count(*) = max(n) from t").fetchone()[0])'`
			if got := strings.TrimSpace(p.Out(t, check)); got != "ok 1" {
				t.Errorf("the database of guest %d: %q, want it whole and without gaps", i, got)
			}
		}
	}
}
