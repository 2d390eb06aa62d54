package gvisor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/sentry/state/checkpointfiles"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// TestFreezeUnrecorded is a supervisor that died between asking the engine to
// freeze or thaw a guest and recording the answer. The next one must find out:
// one stop too few leaves a guest that hangs, one too many ends the engine.
func TestFreezeUnrecorded(t *testing.T) {
	for _, tc := range []struct {
		recorded runtime.State
		frozen   bool // what the engine did
	}{{freezing, true}, {freezing, false}, {thawing, true}, {thawing, false}} {
		t.Run(string(tc.recorded), func(t *testing.T) {
			m, r := open(t)
			s := m.spec(t, "tick")
			if err := r.Create(t.Context(), s); err != nil {
				t.Fatal(err)
			}
			if err := r.Start(t.Context(), s.ID); err != nil {
				t.Fatal(err)
			}
			says(t, r, s.ID, "tick 2")
			if tc.frozen {
				if err := r.Freeze(t.Context(), s.ID); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			m.crash(t)
			path := home(filepath.Join(m.dir, "d")).instance(s.ID).record
			rec, err := loadRecord(path)
			if err != nil {
				t.Fatal(err)
			}
			rec.State = tc.recorded
			if err := rec.save(path); err != nil {
				t.Fatal(err)
			}
			next := m.open(t)
			want := runtime.Running
			if tc.frozen {
				want = runtime.Frozen
			}
			if i := one(t, next, s.ID); i.State != want {
				t.Errorf("recorded as %s, the guest is %s; want %s", tc.recorded, i.State, want)
			}
			for range 2 { // it survives both, whichever it was
				if err := next.Freeze(t.Context(), s.ID); err != nil {
					t.Fatal(err)
				}
				if err := next.Thaw(t.Context(), s.ID); err != nil {
					t.Fatal(err)
				}
			}
			_, lines := says(t, next, s.ID, "tick")
			last := strings.TrimPrefix(lines[len(lines)-1], "tick ")
			until(t, "the guest counts on from "+last, func() bool {
				now, err := next.Console(t.Context(), s.ID)
				return err == nil && now[len(now)-1].Text != "tick "+last
			})
		})
	}
}

func TestTasksStopped(t *testing.T) {
	const (
		running = "goroutine 7 [select]:\ngvisor.dev/gvisor/pkg/sentry/kernel.(*Task).block(0x1)\n\tx.go:1\ngvisor.dev/gvisor/pkg/sentry/kernel.(*Task).run(0x1, 0x2)\n\tx.go:2"
		stopped = "goroutine 8 [sync.Cond.Wait]:\ngvisor.dev/gvisor/pkg/sentry/kernel.(*Task).doStop(0x1)\n\tx.go:1\ngvisor.dev/gvisor/pkg/sentry/kernel.(*Task).run(0x1, 0x2)\n\tx.go:2"
		other   = "goroutine 9 [running]:\nmain.main()\n\tx.go:1"
	)
	for _, tc := range []struct {
		stacks []string
		want   bool
	}{
		{nil, false},
		{[]string{other}, false},
		{[]string{other, stopped, stopped}, true},
		{[]string{stopped, running}, false},
		{[]string{running}, false},
	} {
		if got := tasksStopped(strings.Join(tc.stacks, "\n\n")); got != tc.want {
			t.Errorf("tasksStopped of %d goroutines is %v; want %v", len(tc.stacks), got, tc.want)
		}
	}
}

// TestCheckpointFullDisk is a checkpoint that does not fit: it says so, leaves
// nothing, and the guest runs on.
func TestCheckpointFullDisk(t *testing.T) {
	m, r := open(t)
	s := m.spec(t, "memory", "33554432")
	if err := r.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	says(t, r, s.ID, "memory held")
	small := filepath.Join(m.dir, "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small)
	t.Cleanup(func() {
		if err := r.Kill(context.Background(), s.ID); err != nil { // it may hold the files
			t.Error(err)
		}
		run(t, "umount", small)
	})
	if err := r.Freeze(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	if err := r.Checkpoint(t.Context(), s.ID, small); cay.CodeOf(err) != cay.CodeDiskFull {
		t.Errorf("a checkpoint on a full disk: %v", err)
	}
	if ents, err := os.ReadDir(small); err != nil || len(ents) > 0 {
		t.Errorf("it left %v, %v", ents, err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(small, &fs); err != nil || fs.Blocks-fs.Bfree > 1 {
		t.Errorf("it left %d of %d blocks used, %v", fs.Blocks-fs.Bfree, fs.Blocks, err)
	}
	if err := r.Checkpoint(t.Context(), s.ID, t.TempDir()); err != nil {
		t.Errorf("the next checkpoint: %v", err)
	}
	if err := r.Thaw(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	if i := one(t, r, s.ID); i.State != runtime.Running {
		t.Errorf("the guest is %s", i.State)
	}
}

// TestMemoryUnreadable is a memory whose end cannot be read any more when the
// guest is restored: either the restore fails, or the guest ends with that as the
// reason, having seen nothing wrong.
func TestMemoryUnreadable(t *testing.T) {
	m, r := open(t)
	const size = 64 << 20
	s := m.spec(t, "check", strconv.Itoa(size))
	begin(t, r, s)
	says(t, r, s.ID, "checked")
	memory := save(t, r, s.ID)
	good := m.spec(t, "check", strconv.Itoa(size))
	if err := errors.Join(r.Create(t.Context(), good), r.Restore(t.Context(), good.ID, memory), r.Loaded(t.Context(), good.ID)); err != nil {
		t.Fatal(err)
	}
	says(t, r, good.ID, "checked")

	pages := filepath.Join(memory, checkpointfiles.PagesFileName)
	st, err := os.Stat(pages)
	if err != nil || st.Size() < size {
		t.Fatalf("the memory has %v, %v", st, err)
	}
	if err := os.Truncate(pages, st.Size()/2); err != nil {
		t.Fatal(err)
	}
	bad := m.spec(t, "check", strconv.Itoa(size))
	if err := r.Create(t.Context(), bad); err != nil {
		t.Fatal(err)
	}
	if err := r.Restore(t.Context(), bad.ID, memory); err == nil {
		if err := r.Loaded(t.Context(), bad.ID); err == nil || t.Context().Err() != nil {
			t.Errorf("half of the memory was read: %v", err)
		}
		e, err := r.Wait(t.Context(), bad.ID)
		if err != nil || e.Reason != cay.EndEngineCrash || !strings.Contains(e.Message, "memory") {
			t.Errorf("the guest ended by %+v, %v", e, err)
		}
	} else {
		t.Logf("the restore fails: %v", err)
	}
	lines, err := r.Console(t.Context(), bad.ID)
	for _, l := range lines {
		if l.Text != "checked" || err != nil {
			t.Errorf("the guest said %q, %v", l.Text, err)
		}
	}
	for _, id := range []runtime.InstanceID{s.ID, good.ID, bad.ID} {
		if err := r.Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}
