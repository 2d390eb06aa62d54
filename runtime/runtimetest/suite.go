package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// Fixture is one machine with a runtime under test.
type Fixture struct {
	// Runtime is closed.
	Runtime runtime.Runtime
	// Spec returns a complete spec with an ID of its own, whose guest does what
	// args say; see [Script].
	Spec func(t *testing.T, args ...string) runtime.Spec
	// Again returns another closed runtime on the same machine, as the next
	// server would have it.
	Again func(t *testing.T) runtime.Runtime
	// Crash ends the supervision of the guests the hard way.
	Crash func(t *testing.T)
	// Leftovers lists what instances have on the host. It is asked when none is
	// left.
	Leftovers func(t *testing.T) []string
}

// Script is what guests of the suite do, for a [Fake]. The arguments after the
// program's name are one of
//
//	run                   live until killed
//	exit CODE             end at once
//	later MILLIS CODE     end after a time
//	print WORDS…          write a line, then live
//	flood BYTES           write so much, then "after flood" for ever
//	tick                  write "tick N", N counting up
//	memory BYTES          use so much memory, then live
func Script(g *Guest) {
	verb, args := g.Spec.Args[1], g.Spec.Args[2:]
	number := func(i int) int {
		n, err := strconv.Atoi(args[i])
		if err != nil {
			g.Print(err.Error())
		}
		return n
	}
	every := func(d time.Duration, f func(n int)) {
		t := time.NewTicker(d)
		defer t.Stop()
		for n := 0; ; n++ {
			f(n)
			select {
			case <-t.C:
			case <-g.Done:
				return
			}
		}
	}
	switch verb {
	case "exit":
		g.Exit(number(0))
	case "later":
		select {
		case <-time.After(time.Duration(number(0)) * time.Millisecond):
			g.Exit(number(1))
		case <-g.Done:
		}
	case "print":
		g.Print(strings.Join(args, " "))
	case "flood":
		line := strings.Repeat("x", 1023)
		for range number(0) / 1024 {
			g.Print(line)
		}
		every(10*time.Millisecond, func(int) { g.Print("after flood") })
	case "tick":
		begin, _ := strconv.Atoi(g.Memory()) // of a checkpoint; else 0
		every(10*time.Millisecond, func(n int) {
			g.SetMemory(strconv.Itoa(begin + n + 1))
			g.Print(fmt.Sprint("tick ", begin+n))
		})
	case "memory":
		if int64(number(0)) > g.Spec.Limits.MemoryBytes {
			g.End(runtime.Exit{Reason: cay.EndOOM, Code: 137, Message: "out of memory"})
		}
	}
}

// patience bounds every wait of the suite; nothing takes long on a healthy
// machine.
const patience = 60 * time.Second

// Run proves that a runtime keeps the contract. newFixture is called for each
// case; what it makes it cleans up with t.Cleanup.
func Run(t *testing.T, newFixture func(t *testing.T) *Fixture) {
	cases := []struct {
		name string
		f    func(t *testing.T, c *check)
	}{
		{"OpenClose", testOpenClose},
		{"ExitCode", testExitCode},
		{"States", testStates},
		{"UnknownIDs", testUnknownIDs},
		{"BadSpecs", testBadSpecs},
		{"KillBeforeStart", testKillBeforeStart},
		{"KillTwice", testKillTwice},
		{"WaitThenKill", testWaitThenKill},
		{"FirstCauseCounts", testFirstCause},
		{"Console", testConsole},
		{"ConsoleBound", testConsoleBound},
		{"Stats", testStats},
		{"OutOfMemory", testOutOfMemory},
		{"CancelledCreate", testCancelledCreate},
		{"Freeze", testFreeze},
		{"Checkpoint", testCheckpoint},
		{"CheckpointRefusals", testCheckpointRefusals},
		{"FrozenOverCrash", testFrozenOverCrash},
		{"Parallel", testParallel},
		{"Adopt", testAdopt},
		{"WaitOverCrash", testWaitOverCrash},
		{"Shutdown", testShutdown},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			fx := newFixture(t)
			c := &check{T: t, Fixture: fx, ctx: ctx}
			if tc.name != "OpenClose" {
				c.no(fx.Runtime.Open(ctx))
			}
			tc.f(t, c)
			c.finish()
		})
	}
}

// check is one case's state.
type check struct {
	*testing.T
	*Fixture
	ctx context.Context
}

// no fails the test on an error.
func (c *check) no(err error) {
	c.Helper()
	if err != nil {
		c.Fatal(err)
	}
}

// code fails the test unless err has a code.
func (c *check) code(err error, want cay.Code) {
	c.Helper()
	var e *cay.Error
	if !errors.As(err, &e) || e.Code != want {
		c.Errorf("error %v; want code %s", err, want)
	}
	if e != nil && e.Layer == "" {
		c.Errorf("error %v has no layer", err)
	}
}

// finish kills what is left and looks for leaks.
func (c *check) finish() {
	c.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	rt := c.Again(c.T)
	c.no(rt.Open(ctx))
	all, err := rt.Instances(ctx)
	c.no(err)
	for _, i := range all {
		if err := rt.Kill(ctx, i.ID); err != nil {
			c.Errorf("killing %s at the end: %v", i.ID, err)
		}
	}
	if all, err := rt.Instances(ctx); err != nil || len(all) > 0 {
		c.Errorf("after all kills: %v, %v", all, err)
	}
	if left := c.Leftovers(c.T); len(left) > 0 {
		c.Errorf("left on the host: %s", strings.Join(left, ", "))
	}
	if err := c.Runtime.Close(); err != nil {
		c.Errorf("Close: %v", err)
	}
	c.no(rt.Shutdown(ctx))
}

// begin creates and starts a guest.
func (c *check) begin(args ...string) runtime.InstanceID {
	c.Helper()
	s := c.Spec(c.T, args...)
	c.no(c.Runtime.Create(c.ctx, s))
	c.no(c.Runtime.Start(c.ctx, s.ID))
	return s.ID
}

func (c *check) find(rt runtime.Runtime, id runtime.InstanceID) *runtime.Instance {
	c.Helper()
	all, err := rt.Instances(c.ctx)
	c.no(err)
	for _, i := range all {
		if i.ID == id {
			return &i
		}
	}
	return nil
}

// until polls a condition.
func (c *check) until(what string, f func() bool) {
	c.Helper()
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	for !f() {
		select {
		case <-t.C:
		case <-c.ctx.Done():
			c.Fatalf("waiting until %s", what)
		}
	}
}

// says polls the console for a line that begins with text, and returns all.
func (c *check) says(rt runtime.Runtime, id runtime.InstanceID, text string) []cay.ConsoleLine {
	c.Helper()
	var lines []cay.ConsoleLine
	c.until(fmt.Sprintf("the console of %s says %q", id, text), func() bool {
		var err error
		lines, err = rt.Console(c.ctx, id)
		c.no(err)
		for _, l := range lines {
			if strings.HasPrefix(l.Text, text) {
				return true
			}
		}
		return false
	})
	return lines
}

func testOpenClose(t *testing.T, c *check) {
	c.no(c.Runtime.Close())
	if _, err := c.Runtime.Instances(c.ctx); err == nil {
		t.Error("Instances of a closed runtime succeeded")
	}
	c.no(c.Runtime.Open(c.ctx))
	c.no(c.Runtime.Open(c.ctx))
	info, err := c.Runtime.Info(c.ctx)
	c.no(err)
	if info.Name == "" || info.Version == "" || info.Platform == "" {
		t.Errorf("Info is not complete: %+v", info)
	}
	c.no(c.Runtime.Close())
	c.no(c.Runtime.Close())
}

func testExitCode(t *testing.T, c *check) {
	for _, want := range []int{0, 3} {
		id := c.begin("exit", strconv.Itoa(want))
		e, err := c.Runtime.Wait(c.ctx, id)
		c.no(err)
		if e.Reason != cay.EndGuestExit || e.Code != want || e.At.IsZero() {
			t.Errorf("guest ended by exit %d: %+v", want, e)
		}
		again, err := c.Runtime.Wait(c.ctx, id)
		c.no(err)
		if d := cmp.Diff(e, again); d != "" {
			t.Errorf("the second Wait differs (-first +second):\n%s", d)
		}
		if i := c.find(c.Runtime, id); i == nil || i.State != runtime.Exited || i.Exit == nil || i.Exit.Code != want {
			t.Errorf("an exited instance is listed as %+v", i)
		}
		c.no(c.Runtime.Kill(c.ctx, id))
		_, err = c.Runtime.Wait(c.ctx, id)
		c.code(err, cay.CodeNotFound)
	}
}

func testStates(t *testing.T, c *check) {
	s := c.Spec(t, "run")
	s.Labels = map[string]string{"sandbox": "i1", "empty": ""}
	before := time.Now().Add(-time.Minute)
	c.no(c.Runtime.Create(c.ctx, s))
	i := c.find(c.Runtime, s.ID)
	if i == nil || i.State != runtime.Created || i.PID <= 0 || i.Exit != nil || i.CreatedAt.Before(before) {
		t.Fatalf("after Create: %+v", i)
	}
	if d := cmp.Diff(s.Labels, i.Labels); d != "" {
		t.Errorf("labels (-want +got):\n%s", d)
	}
	c.code(c.Runtime.Create(c.ctx, s), cay.CodeConflict)
	if i := c.find(c.Runtime, s.ID); i == nil || i.State != runtime.Created {
		t.Errorf("a refused Create touched the instance: %+v", i)
	}
	c.no(c.Runtime.Start(c.ctx, s.ID))
	if i := c.find(c.Runtime, s.ID); i == nil || i.State != runtime.Running {
		t.Errorf("after Start: %+v", i)
	}
	c.code(c.Runtime.Start(c.ctx, s.ID), cay.CodeConflict)
	c.no(c.Runtime.Kill(c.ctx, s.ID))
	if i := c.find(c.Runtime, s.ID); i != nil {
		t.Errorf("after Kill: %+v", i)
	}
}

func testUnknownIDs(_ *testing.T, c *check) {
	id := runtime.InstanceID("xunknown")
	c.code(c.Runtime.Start(c.ctx, id), cay.CodeNotFound)
	_, err := c.Runtime.Wait(c.ctx, id)
	c.code(err, cay.CodeNotFound)
	_, err = c.Runtime.Console(c.ctx, id)
	c.code(err, cay.CodeNotFound)
	_, err = c.Runtime.Stats(c.ctx, id)
	c.code(err, cay.CodeNotFound)
	c.no(c.Runtime.Kill(c.ctx, id))
}

func testBadSpecs(t *testing.T, c *check) {
	for name, spoil := range map[string]func(*runtime.Spec){
		"no ID":     func(s *runtime.Spec) { s.ID = "" },
		"no args":   func(s *runtime.Spec) { s.Args = nil },
		"no root":   func(s *runtime.Spec) { s.RootFS = "" },
		"no netns":  func(s *runtime.Spec) { s.NetNS = "" },
		"no memory": func(s *runtime.Spec) { s.Limits.MemoryBytes = 0 },
		"no CPU":    func(s *runtime.Spec) { s.Limits.CPUs = 0 },
		"no PIDs":   func(s *runtime.Spec) { s.Limits.PIDs = -1 },
	} {
		t.Run(name, func(t *testing.T) {
			s := c.Spec(t, "run")
			spoil(&s)
			c.code(c.Runtime.Create(c.ctx, s), cay.CodeInvalidRequest)
		})
	}
	if all, err := c.Runtime.Instances(c.ctx); err != nil || len(all) > 0 {
		t.Errorf("refused creates left %v, %v", all, err)
	}
}

func testKillBeforeStart(t *testing.T, c *check) {
	s := c.Spec(t, "run")
	c.no(c.Runtime.Create(c.ctx, s))
	c.no(c.Runtime.Kill(c.ctx, s.ID))
	c.code(c.Runtime.Start(c.ctx, s.ID), cay.CodeNotFound)
}

func testKillTwice(t *testing.T, c *check) {
	id := c.begin("run")
	var g sync.WaitGroup
	for range 8 {
		g.Go(func() {
			if err := c.Runtime.Kill(c.ctx, id); err != nil {
				t.Errorf("one of several kills: %v", err)
			}
		})
	}
	g.Wait()
	c.no(c.Runtime.Kill(c.ctx, id))
}

func testWaitThenKill(t *testing.T, c *check) {
	id := c.begin("run")
	short, cancel := context.WithTimeout(c.ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := c.Runtime.Wait(short, id); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait with a short deadline: %v", err)
	}
	type result struct {
		e   runtime.Exit
		err error
	}
	got := make(chan result, 3)
	for range cap(got) {
		go func() {
			e, err := c.Runtime.Wait(c.ctx, id)
			got <- result{e, err}
		}()
	}
	// Nothing shows that a Wait has begun; whether it has must not matter for
	// one that does not find the instance any more.
	time.Sleep(50 * time.Millisecond)
	c.no(c.Runtime.Kill(c.ctx, id))
	for range cap(got) {
		r := <-got
		if r.err != nil {
			c.code(r.err, cay.CodeNotFound)
		} else if r.e.Reason != cay.EndRequest {
			t.Errorf("a killed instance ended by %+v", r.e)
		}
	}
}

func testFirstCause(t *testing.T, c *check) {
	id := c.begin("exit", "5")
	_, err := c.Runtime.Wait(c.ctx, id)
	c.no(err)
	c.code(c.Runtime.Start(c.ctx, id), cay.CodeConflict)
	if i := c.find(c.Runtime, id); i == nil || i.Exit == nil || i.Exit.Reason != cay.EndGuestExit || i.Exit.Code != 5 {
		t.Errorf("the end changed: %+v", i)
	}
}

func testConsole(t *testing.T, c *check) {
	began := time.Now().Add(-time.Minute)
	id := c.begin("print", "hello", "from", "the", "guest")
	for _, l := range c.says(c.Runtime, id, "hello from the guest") {
		if l.At.Before(began) || l.At.After(time.Now().Add(time.Minute)) {
			t.Errorf("line %q has the time %v", l.Text, l.At)
		}
	}
}

func testConsoleBound(t *testing.T, c *check) {
	id := c.begin("flood", strconv.Itoa(32<<20))
	lines := c.says(c.Runtime, id, "after flood")
	n := 0
	for _, l := range lines {
		n += len(l.Text)
	}
	if n > 1<<20 {
		t.Errorf("the console holds %d bytes; want at most 1 MiB", n)
	}
}

func testStats(t *testing.T, c *check) {
	id := c.begin("print", "up")
	c.says(c.Runtime, id, "up")
	s, err := c.Runtime.Stats(c.ctx, id)
	c.no(err)
	if s.CPUNanos <= 0 || s.MemoryBytes <= 0 || s.PIDs <= 0 {
		t.Errorf("stats of a running guest: %+v", s)
	}
}

func testOutOfMemory(t *testing.T, c *check) {
	s := c.Spec(t, "memory", strconv.Itoa(1<<30))
	s.Limits.MemoryBytes = 160 << 20
	c.no(c.Runtime.Create(c.ctx, s))
	c.no(c.Runtime.Start(c.ctx, s.ID))
	e, err := c.Runtime.Wait(c.ctx, s.ID)
	c.no(err)
	if e.Reason != cay.EndOOM {
		t.Errorf("a guest over its memory limit ended by %+v", e)
	}
}

func testCancelledCreate(t *testing.T, c *check) {
	s := c.Spec(t, "run")
	ctx, cancel := context.WithCancel(c.ctx)
	cancel()
	if err := c.Runtime.Create(ctx, s); err == nil {
		t.Error("Create with a cancelled context succeeded")
	}
	ctx, cancel = context.WithTimeout(c.ctx, 15*time.Millisecond)
	defer cancel()
	err := c.Runtime.Create(ctx, s)
	if err == nil {
		return // fast enough
	}
	c.until("the cancelled create is undone", func() bool { return c.find(c.Runtime, s.ID) == nil })
	c.no(c.Runtime.Create(c.ctx, s)) // nothing of it is in the way
}

func testParallel(t *testing.T, c *check) {
	var g sync.WaitGroup
	for n := range 4 {
		s := c.Spec(t, "exit", strconv.Itoa(10+n))
		g.Go(func() {
			if err := errors.Join(c.Runtime.Create(c.ctx, s), c.Runtime.Start(c.ctx, s.ID)); err != nil {
				t.Errorf("guest %d: %v", n, err)
				return
			}
			e, err := c.Runtime.Wait(c.ctx, s.ID)
			if err != nil || e.Reason != cay.EndGuestExit || e.Code != 10+n {
				t.Errorf("guest %d ended by %+v, %v", n, e, err)
			}
			if err := c.Runtime.Kill(c.ctx, s.ID); err != nil {
				t.Errorf("guest %d: %v", n, err)
			}
		})
	}
	g.Wait()
}

func testAdopt(t *testing.T, c *check) {
	ticking := c.begin("tick")
	later := c.begin("later", "2500", "9")
	over := c.begin("exit", "4")
	fresh := c.Spec(t, "print", "started after the crash")
	c.no(c.Runtime.Create(c.ctx, fresh))
	c.says(c.Runtime, ticking, "tick 1")
	_, err := c.Runtime.Wait(c.ctx, over)
	c.no(err)
	pid := c.find(c.Runtime, ticking).PID

	c.Crash(t)
	c.no(c.Runtime.Close())
	rt := c.Again(t)
	c.no(rt.Open(c.ctx))
	defer rt.Close()
	want := map[runtime.InstanceID]runtime.State{ticking: runtime.Running, later: runtime.Running, over: runtime.Exited, fresh.ID: runtime.Created}
	all, err := rt.Instances(c.ctx)
	c.no(err)
	got := map[runtime.InstanceID]runtime.State{}
	for _, i := range all {
		got[i.ID] = i.State
	}
	if i := c.find(rt, later); i != nil && i.State == runtime.Exited {
		want[later] = runtime.Exited // a slow machine
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatalf("instances after a crash (-want +got):\n%s", d)
	}
	if i := c.find(rt, ticking); i.PID != pid {
		t.Errorf("the engine's PID changed from %d to %d", pid, i.PID)
	}
	lines, err := rt.Console(c.ctx, ticking)
	c.no(err)
	if len(lines) == 0 {
		t.Error("the console from before the crash is lost")
	}
	c.says(rt, ticking, fmt.Sprint("tick ", len(lines)+50))
	e, err := rt.Wait(c.ctx, later)
	c.no(err)
	if e.Reason != cay.EndGuestExit || e.Code != 9 {
		t.Errorf("an adopted guest ended by %+v; want exit 9", e)
	}
	if e, err := rt.Wait(c.ctx, over); err != nil || e.Code != 4 {
		t.Errorf("a guest that ended before the crash: %+v, %v", e, err)
	}
	c.no(rt.Start(c.ctx, fresh.ID))
	c.says(rt, fresh.ID, "started after the crash")
	for id := range want {
		c.no(rt.Kill(c.ctx, id))
	}
}

func testWaitOverCrash(t *testing.T, c *check) {
	id := c.begin("later", "2000", "6")
	got := make(chan error, 1)
	go func() {
		e, err := c.Runtime.Wait(c.ctx, id)
		if err == nil && (e.Reason != cay.EndGuestExit || e.Code != 6) {
			err = fmt.Errorf("ended by %+v", e)
		}
		got <- err
	}()
	c.Crash(t)
	if err := <-got; err != nil {
		t.Errorf("Wait over a crash: %v", err)
	}
}

func testShutdown(t *testing.T, c *check) {
	c.begin("run")
	c.begin("exit", "0")
	s := c.Spec(t, "run")
	c.no(c.Runtime.Create(c.ctx, s))
	c.no(c.Runtime.Shutdown(c.ctx))
	if left := c.Leftovers(t); len(left) > 0 {
		t.Errorf("after Shutdown: %s", strings.Join(left, ", "))
	}
	rt := c.Again(t)
	c.no(rt.Open(c.ctx))
	all, err := rt.Instances(c.ctx)
	if err != nil || len(all) > 0 {
		t.Errorf("after Shutdown: %v, %v", all, err)
	}
	c.no(rt.Close())
}
