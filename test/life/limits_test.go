package life

import (
	"bytes"
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

// neighbour is a sandbox that works all the time while another one misbehaves.
type neighbour struct {
	box  *program.Sandbox
	stop context.CancelFunc
	done chan struct{}

	mu    sync.Mutex
	times []time.Duration
	err   error
}

func watchNeighbour(t *testing.T, c *program.Client) *neighbour {
	t.Helper()
	n := &neighbour{box: c.Make(t, 10*time.Minute, nil), done: make(chan struct{})}
	n.box.Out(t, "echo mine > ~/mine")
	ctx, stop := context.WithCancel(t.Context())
	n.stop = stop
	go func() {
		defer close(n.done)
		for ctx.Err() == nil {
			began := time.Now()
			r, err := n.box.Exec(ctx, "", "cat ~/mine && echo more >> ~/other && rm ~/other")
			if ctx.Err() != nil {
				return
			}
			if err == nil && (r.Code != 0 || r.Stdout != "mine\n") {
				err = errors.New(r.String())
			}
			n.mu.Lock()
			n.times = append(n.times, time.Since(began))
			n.err = errors.Join(n.err, err)
			n.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return n
}

// check ends the watch: the neighbour worked all the time, and never waited
// long.
func (n *neighbour) check(t *testing.T) {
	t.Helper()
	n.stop()
	<-n.done
	if n.err != nil {
		t.Errorf("the neighbour: %v", n.err)
	}
	var longest time.Duration
	for _, d := range n.times {
		longest = max(longest, d)
	}
	t.Logf("the neighbour ran %d commands meanwhile, the slowest in %s", len(n.times), longest.Round(time.Millisecond))
	if len(n.times) == 0 || longest > 10*time.Second {
		t.Error("the neighbour was kept from its work")
	}
	if out := n.box.Out(t, "cat ~/mine"); out != "mine\n" {
		t.Errorf("the neighbour's file has %q", out)
	}
}

// What a guest writes is on disk: 2 GiB fit into a sandbox with 512 MiB of
// memory. At its disk's limit the guest is told so, and nobody else notices.
func TestDiskLimit(t *testing.T) {
	server := program.Start(t, program.Options{})
	c := server.Client()
	n := watchNeighbour(t, c)
	s := c.Make(t, 10*time.Minute, nil)
	out := s.Out(t, `cd ~ && dd if=/dev/zero of=big bs=1M count=2047 status=none && printf 'the very end' >> big && stat -c %s big && tail -c 12 big`)
	if want := fmt.Sprintf("%d\nthe very end", 2047<<20+12); out != want {
		t.Errorf("a file of 2 GiB: %q, want %q", out, want)
	}
	// More than is left, in /tmp: the same disk.
	r, err := s.Exec(t.Context(), "", `dd if=/dev/zero of=/tmp/more bs=1M count=1024 status=none`)
	if err != nil || r.Code != 1 || !strings.Contains(r.Stderr, "No space left on device") {
		t.Errorf("beyond the disk's limit: %v, %s", err, r)
	}
	err = s.Write(t.Context(), "/tmp/upload", bytes.Repeat([]byte("x"), 8<<20))
	if r := refusal(t, err, http.StatusInsufficientStorage); r.Code != http.StatusInsufficientStorage {
		t.Errorf("an upload beyond the limit says %q", r.Body)
	}
	if out := s.Out(t, "rm ~/big /tmp/more && echo again > ~/small && cat ~/small"); out != "again\n" {
		t.Errorf("with room again, the guest reads %q", out)
	}
	n.check(t)
}

// Memory that programs eat costs them their lives, as on any Linux machine,
// and the sandbox goes on. Where there is no program to end, the sandbox ends,
// and the API says why. Either way it is alone.
func TestMemoryLimit(t *testing.T) {
	server := program.Start(t, program.Options{})
	c := server.Client()
	n := watchNeighbour(t, c)
	s := eatMemory(t, c)

	// A file in memory belongs to no program that could be ended for it.
	_, err := s.Exec(t.Context(), "", `python3 -c '
import os
f = os.memfd_create("eater")
while True:
    os.write(f, b"x" * (16 << 20))
'`)
	if err == nil {
		t.Error("a command in a sandbox that ended has a result")
	}
	t.Logf("the client of the eater sees: %v", err)
	endedByOOM(t, c, s)
	if said := gone(t.Context(), c, s); said != "" {
		t.Error(said)
	}
	n.check(t)
}

// eatMemory returns a sandbox in which a program was ended that ate all memory.
//
// The host's kernel ends the process of the engine that has the program's memory
// in it. The engine notices when it lets the program run again, and ends it by
// SIGKILL, or when it maps the next page for it: then it is a fault like any
// other that cannot be handled (kernel.runApp.execute of gVisor,
// platform/systrap), and a SIGSEGV. Both are final. If it was just making a
// thread of that process, which is a matter of microseconds, it ends itself
// (thread.unexpectedStubExit there), and so the sandbox: that is seldom, and
// must be on record.
func eatMemory(t *testing.T, c *program.Client) *program.Sandbox {
	t.Helper()
	const tries = 3
	for range tries {
		s := c.Make(t, 10*time.Minute, nil)
		r, err := s.Exec(t.Context(), "", `python3 -c '
blocks = []
while True:
    blocks.append(b"x" * (16 << 20))
'; echo "exit $?"`)
		killed := r.Stdout == "exit 137\n" && strings.Contains(r.Stderr, "Killed")
		faulted := r.Stdout == "exit 139\n" && strings.Contains(r.Stderr, "Segmentation fault")
		if err == nil && (killed || faulted) {
			if out := s.Out(t, "echo still here"); out != "still here\n" {
				t.Errorf("after that the sandbox says %q", out)
			}
			return s
		}
		t.Logf("a program that eats memory: %v, %s", err, r)
		endedByOOM(t, c, s)
	}
	t.Fatalf("a program that eats memory ended its sandbox %d times of %d", tries, tries)
	return nil
}

// endedByOOM waits for the end of a sandbox and looks at its reason.
func endedByOOM(t *testing.T, c *program.Client, s *program.Sandbox) {
	t.Helper()
	var rec program.Record
	program.Eventually(t, 20*time.Second, func() (said string) {
		var err error
		rec, err = c.Record(t.Context(), s.ID)
		if err != nil || rec.State != "ended" {
			return fmt.Sprintf("the eater's record is %+v, %v", rec, err)
		}
		return ""
	})
	if rec.EndReason != "oom" || !strings.Contains(rec.EndMessage, "used more memory than its limit") {
		t.Errorf("the API says of the eater: %+v", rec)
	}
}

// A guest that forks without end has no more processes than it may, and hurts
// nobody else. It goes on afterwards, or has been ended with that reason.
func TestProcessLimit(t *testing.T) {
	server := program.Start(t, program.Options{})
	c := server.Client()
	n := watchNeighbour(t, c)
	s := c.Make(t, 10*time.Minute, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := s.Exec(ctx, "", `bomb() { bomb | bomb & }; bomb; sleep 8`)
	t.Logf("the client of the bomb sees: %v", err)
	// What the bomb has begun is over within a moment.
	time.Sleep(2 * time.Second)
	rec, err := c.Record(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	switch {
	case rec.State == "running":
		// Its owner can end it.
		if err := s.Kill(t.Context()); err != nil {
			t.Errorf("killing the bomb: %v", err)
		}
	case rec.State == "ended" && (rec.EndReason == "pids" || rec.EndReason == "oom") && rec.EndMessage != "":
		t.Logf("it was ended: %s", rec.EndMessage)
	default:
		t.Errorf("the API says of the bomb: %+v", rec)
	}
	n.check(t)
}
