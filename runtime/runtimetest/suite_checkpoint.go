package runtimetest

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// lastTick is the last number a ticking guest wrote; -1 if none.
func (c *check) lastTick(rt runtime.Runtime, id runtime.InstanceID) int {
	c.Helper()
	lines, err := rt.Console(c.ctx, id)
	c.no(err)
	last := -1
	for _, l := range lines {
		if n, err := strconv.Atoi(strings.TrimPrefix(l.Text, "tick ")); err == nil {
			last = n
		}
	}
	return last
}

// ticksOn waits until a guest has counted on from a number.
func (c *check) ticksOn(rt runtime.Runtime, id runtime.InstanceID, from int) {
	c.Helper()
	c.until("the guest "+string(id)+" counts on", func() bool { return c.lastTick(rt, id) > from })
}

// silent fails the test when a frozen guest counts.
func (c *check) silent(rt runtime.Runtime, id runtime.InstanceID) int {
	c.Helper()
	time.Sleep(30 * time.Millisecond) // what was written before the freeze arrives
	at := c.lastTick(rt, id)
	time.Sleep(100 * time.Millisecond) // five ticks of a guest that runs
	if now := c.lastTick(rt, id); now != at {
		c.Errorf("a frozen guest counted from %d to %d", at, now)
	}
	return at
}

func testFreeze(t *testing.T, c *check) {
	id := c.begin("tick")
	c.ticksOn(c.Runtime, id, 2)
	c.no(c.Runtime.Thaw(c.ctx, id)) // of one that runs
	for range 2 {
		c.no(c.Runtime.Freeze(c.ctx, id))
		c.no(c.Runtime.Freeze(c.ctx, id))
		if i := c.find(c.Runtime, id); i == nil || i.State != runtime.Frozen {
			t.Errorf("after Freeze: %+v", i)
		}
		at := c.silent(c.Runtime, id)
		c.no(c.Runtime.Thaw(c.ctx, id))
		c.no(c.Runtime.Thaw(c.ctx, id))
		c.ticksOn(c.Runtime, id, at)
	}
	c.no(c.Runtime.Freeze(c.ctx, id))
	c.no(c.Runtime.Kill(c.ctx, id))
}

func testCheckpoint(t *testing.T, c *check) {
	id := c.begin("tick")
	c.ticksOn(c.Runtime, id, 2)
	c.no(c.Runtime.Freeze(c.ctx, id))
	at := c.silent(c.Runtime, id)
	first, second := t.TempDir(), t.TempDir()
	c.no(c.Runtime.Checkpoint(c.ctx, id, first))
	c.silent(c.Runtime, id)
	// A frozen guest can be saved again, and goes on after it.
	c.no(c.Runtime.Checkpoint(c.ctx, id, second))
	c.no(c.Runtime.Thaw(c.ctx, id))
	c.ticksOn(c.Runtime, id, at)

	// Two copies beside the original: each counts on from the checkpoint.
	var copies []runtime.InstanceID
	for n, dir := range []string{first, second} {
		s := c.Spec(t, "tick")
		s.Restore = n == 0 // a promise, which it is no fault not to make
		s.Env = append(s.Env, "ANOTHER=value")
		c.no(c.Runtime.Create(c.ctx, s))
		c.no(c.Runtime.Restore(c.ctx, s.ID, dir))
		copies = append(copies, s.ID)
	}
	c.no(c.Runtime.Loaded(c.ctx, id)) // it was not restored
	for n, dir := range []string{first, second} {
		c.no(c.Runtime.Loaded(c.ctx, copies[n]))
		c.no(os.RemoveAll(dir)) // nobody needs it any more
	}
	for _, cp := range copies {
		c.ticksOn(c.Runtime, cp, at)
		lines, err := c.Runtime.Console(c.ctx, cp)
		c.no(err)
		if n, _ := strconv.Atoi(strings.TrimPrefix(lines[0].Text, "tick ")); n <= at || n > at+3 {
			t.Errorf("the copy's first line is %q; the guest was saved after tick %d", lines[0].Text, at)
		}
		if i := c.find(c.Runtime, cp); i == nil || i.State != runtime.Running {
			t.Errorf("after Restore: %+v", i)
		}
	}
	// The end of a copy is seen as any guest's, and touches nobody else.
	c.no(c.Runtime.Kill(c.ctx, copies[0]))
	c.ticksOn(c.Runtime, copies[1], c.lastTick(c.Runtime, copies[1]))
	c.ticksOn(c.Runtime, id, c.lastTick(c.Runtime, id))
}

func testCheckpointRefusals(t *testing.T, c *check) {
	id := c.begin("tick")
	c.code(c.Runtime.Checkpoint(c.ctx, id, t.TempDir()), cay.CodeConflict) // it runs
	c.no(c.Runtime.Freeze(c.ctx, id))
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c.code(c.Runtime.Checkpoint(c.ctx, id, full), cay.CodeInvalidRequest)
	c.code(c.Runtime.Checkpoint(c.ctx, id, filepath.Join(full, "missing")), cay.CodeInvalidRequest)
	good := t.TempDir()
	c.no(c.Runtime.Checkpoint(c.ctx, id, good))
	c.no(c.Runtime.Thaw(c.ctx, id))

	s := c.Spec(t, "tick")
	c.no(c.Runtime.Create(c.ctx, s))
	c.code(c.Runtime.Freeze(c.ctx, s.ID), cay.CodeConflict)
	c.code(c.Runtime.Thaw(c.ctx, s.ID), cay.CodeConflict)
	c.code(c.Runtime.Restore(c.ctx, s.ID, t.TempDir()), cay.CodeSnapshotCorrupt)
	c.no(c.Runtime.Restore(c.ctx, s.ID, good)) // the refusal did no harm
	c.code(c.Runtime.Restore(c.ctx, s.ID, good), cay.CodeConflict)

	saved := c.Spec(t, "tick")
	saved.Restore = true
	c.no(c.Runtime.Create(c.ctx, saved))
	c.code(c.Runtime.Start(c.ctx, saved.ID), cay.CodeConflict)
	c.no(c.Runtime.Restore(c.ctx, saved.ID, good))

	other := c.Spec(t, "print", "another guest")
	other.Restore = true
	c.no(c.Runtime.Create(c.ctx, other))
	c.code(c.Runtime.Restore(c.ctx, other.ID, good), cay.CodeSnapshotIncompatible)
	for _, f := range []func() error{
		func() error { return c.Runtime.Freeze(c.ctx, "xunknown") },
		func() error { return c.Runtime.Thaw(c.ctx, "xunknown") },
		func() error { return c.Runtime.Checkpoint(c.ctx, "xunknown", t.TempDir()) },
		func() error { return c.Runtime.Restore(c.ctx, "xunknown", good) },
		func() error { return c.Runtime.Loaded(c.ctx, "xunknown") },
	} {
		c.code(f(), cay.CodeNotFound)
	}
}

func testFrozenOverCrash(t *testing.T, c *check) {
	id := c.begin("tick")
	c.ticksOn(c.Runtime, id, 2)
	c.no(c.Runtime.Freeze(c.ctx, id))
	c.Crash(t)
	rt := c.Again(t)
	c.no(rt.Open(c.ctx))
	defer rt.Close()
	if i := c.find(rt, id); i == nil || i.State != runtime.Frozen {
		t.Fatalf("after a crash a frozen guest is listed as %+v", i)
	}
	at := c.silent(rt, id)
	dir := t.TempDir()
	c.no(rt.Checkpoint(c.ctx, id, dir))
	c.no(rt.Thaw(c.ctx, id))
	c.ticksOn(rt, id, at)
}
