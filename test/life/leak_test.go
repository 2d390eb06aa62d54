package life

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/test/invariant"
	"github.com/cayhq/cay/test/program"
)

// life is how long a sandbox of a cycle lives if nobody ends it.
const life = 5 * time.Second

// cycles exercises a server, with luck as its source of chance.
type cycles struct {
	t      *testing.T
	server *program.Server
	luck   *rand.Rand
}

// whole makes a sandbox, uses it and kills it.
func whole(ctx context.Context, c *program.Client) error {
	s, err := c.Create(ctx, life, nil)
	if err != nil {
		return fmt.Errorf("creating: %w", err)
	}
	r, err := s.Exec(ctx, "", "echo $((6*7))")
	if err != nil || r.Stdout != "42\n" {
		return fmt.Errorf("running a command: %w, %s", err, r)
	}
	if err := s.Kill(ctx); err != nil {
		return fmt.Errorf("killing: %w", err)
	}
	return nil
}

// vanish has a client go away in the middle: of a create, of a command, of an
// upload, or with a sandbox that nobody knows of any more.
func (y *cycles) vanish() {
	c := y.server.Client()
	defer c.Vanish()
	when := time.Duration(y.luck.Int64N(int64(150 * time.Millisecond)))
	kind := y.luck.IntN(4)
	if kind == 0 {
		ctx, cancel := context.WithTimeout(y.t.Context(), when)
		defer cancel()
		_, _ = c.Create(ctx, life, nil) // it fails, or it was quick
		return
	}
	s, err := c.Create(y.t.Context(), life, nil)
	if err != nil {
		y.t.Errorf("creating: %v", err)
		return
	}
	ctx, cancel := context.WithTimeout(y.t.Context(), when)
	defer cancel()
	switch kind {
	case 1:
		_, _ = s.Exec(ctx, "", "yes | head -c 100M; sleep 600")
	case 2:
		endless, stop := io.Pipe()
		go func() {
			<-ctx.Done()
			stop.CloseWithError(ctx.Err())
		}()
		go func() { // stops when the pipe does
			for block := make([]byte, 1<<16); ; {
				if _, err := stop.Write(block); err != nil {
					return
				}
			}
		}()
		resp, err := s.Request(ctx, http.MethodPost, program.EnvdPort, "/files?path=/tmp/half", "application/octet-stream", endless)
		if err == nil {
			resp.Body.Close()
		}
	}
}

// kill kills the server at some instant of two others' cycles, and starts it
// again.
func (y *cycles) kill() {
	ctx, cancel := context.WithCancel(y.t.Context())
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			c := y.server.Client()
			defer c.Vanish()
			for ctx.Err() == nil {
				if err := whole(ctx, c); err != nil && !y.server.Running() {
					return // as it should be
				}
			}
		})
	}
	time.Sleep(time.Duration(y.luck.Int64N(int64(600 * time.Millisecond)))) // the instant under test
	y.server.Kill9(y.t)
	cancel()
	wg.Wait()
	y.server.Up(y.t)
}

// After many lives, a fifth of them with a client that vanishes and a tenth
// with a server that is killed, nothing is left over 10 s later; and after
// `cay down` nothing at all.
func TestNothingIsLeft(t *testing.T) {
	n := program.Sized(100, 1000)
	luck := random(t)
	pristine, err := invariant.Take(program.Scope(""))
	if err != nil {
		t.Fatal(err)
	}
	server := program.Start(t, program.Options{})
	scope := program.Scope(server.Dir)
	y := &cycles{t: t, server: server, luck: luck}
	c := server.Client()
	if err := whole(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	// With a sandbox there, every kind of thing must be in sight: what this
	// cannot see, it cannot miss.
	s := c.Make(t, time.Minute, nil)
	busy, err := invariant.Take(scope)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range invariant.Kinds {
		if k != invariant.Zombie && busy.Count(k) == 0 {
			t.Errorf("with a running sandbox, the check sees no %s", k)
		}
	}
	if err := s.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Vanish()
	before := invariant.Steady(t, 20*time.Second, scope)
	if left := invariant.Diff(before, busy); len(left) == 0 {
		t.Error("the check does not see a running sandbox")
	}

	kinds := make([]func(), n)
	for i := range kinds {
		switch {
		case i < n/5:
			kinds[i] = y.vanish
		case i < n/5+n/10:
			kinds[i] = y.kill
		default:
			kinds[i] = func() {
				c := server.Client()
				defer c.Vanish()
				if err := whole(t.Context(), c); err != nil {
					t.Errorf("a cycle: %v", err)
				}
			}
		}
	}
	luck.Shuffle(n, func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
	began := time.Now()
	for _, do := range kinds {
		if do(); t.Failed() {
			t.FailNow()
		}
	}
	t.Logf("%d cycles in %s", n, time.Since(began).Round(time.Millisecond))
	c.Vanish()
	invariant.Settle(t, 10*time.Second, scope, before)

	server.Down(t)
	after, err := invariant.Take(scope)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range invariant.Diff(pristine, after) {
		if !keeps(line) {
			t.Errorf("after `cay down`: %s", line)
		}
	}
}

// kept are the files and directories that `cay down` leaves on purpose: keys,
// history, logs, templates, the engine's program, and the places for what comes and goes.
var kept = []string{"cay.db", "cay.lock", "credentials.json", "secrets.keys", "log", "blobs", "work", "snapshots",
	"engine", "disk", "disk/disks", "disk/images", "disk/pool", "disk/pool.xfs", "disk/pool/blank", "disk/pool/disk", "disk/pool/saved",
	"run", "run/orchestrator", "run/past", "run/refused", "run/gvisor", "run/gvisor/i", "run/gvisor/shared", "run/gvisor/supervisor.lock", "run/gvisor/supervisor.log"}

// keeps reports whether a line of a difference is about one of these, or about
// the lock that all servers of a machine share.
func keeps(line string) bool {
	if strings.Contains(line, " more of file /run/cay/network-N.json.lock: ") {
		return true
	}
	_, what, _ := strings.Cut(line, " more of file <data>/")
	path, _, ok := strings.Cut(what, ": ")
	return ok && (slices.Contains(kept, path) || strings.HasPrefix(path, "blobs/") || strings.HasPrefix(path, "engine/") || strings.HasPrefix(path, "log/"))
}

// `cay down` works without a server, too, and the next `cay up` after it.
func TestDownLeavesNoMount(t *testing.T) {
	server := program.Start(t, program.Options{})
	c := server.Client()
	c.Make(t, time.Minute, nil)
	server.Kill9(t)
	server.Down(t) // without a server
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), server.Dir) {
		t.Errorf("`cay down` left mounts:\n%s", mounts)
	}
	for _, dir := range []string{"disk/disks", "run/gvisor/i", "run/orchestrator"} {
		entries, err := os.ReadDir(filepath.Join(server.Dir, dir))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		if len(entries) > 0 {
			t.Errorf("`cay down` left %v in %s", entries, dir)
		}
	}
	server.Up(t)
	if err := whole(t.Context(), server.Client()); err != nil {
		t.Errorf("a server started after that: %v", err)
	}
}
