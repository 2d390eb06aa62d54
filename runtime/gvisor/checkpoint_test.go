package gvisor

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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
