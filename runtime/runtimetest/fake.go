// Package runtimetest proves that a runtime keeps the contract ([Run]), and has
// a runtime in memory for the tests of others ([Fake]).
package runtimetest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// Machine is a host in memory. Its instances outlive the [Fake] that made them,
// as real guests outlive the server. The zero value is ready to use.
type Machine struct {
	// Dir, if set, is a directory that keeps the instances, so that they outlive
	// the process, too: as they were when the last call that changed one
	// returned. What a Body does goes with the process. Two processes must not
	// use one at a time.
	Dir string

	load      sync.Once
	mu        sync.Mutex
	instances map[runtime.InstanceID]*Guest
	pid       int
}

// Fake is a runtime in memory. The zero value is ready to use; its fields must
// not change after the first call.
//
// The functions are called, when set, before the operation is carried out; an
// error of theirs is its result. They may block, to hold an operation up, and
// must heed ctx then.
type Fake struct {
	Machine *Machine // nil: one of its own
	// Now is the clock; nil is time.Now.
	Now func() time.Time
	// Body is what a guest does after its start, in a goroutine of its own; it
	// ends when the guest's Done is closed. Nil does nothing until the kill.
	Body func(*Guest)

	OnOpen       func(ctx context.Context) error
	OnCreate     func(ctx context.Context, s runtime.Spec) error
	OnStart      func(ctx context.Context, id runtime.InstanceID) error
	OnKill       func(ctx context.Context, id runtime.InstanceID) error
	OnInstances  func(ctx context.Context) error
	OnFreeze     func(ctx context.Context, id runtime.InstanceID) error
	OnThaw       func(ctx context.Context, id runtime.InstanceID) error
	OnCheckpoint func(ctx context.Context, id runtime.InstanceID, dir string) error
	OnRestore    func(ctx context.Context, id runtime.InstanceID, dir string) error
	OnLoaded     func(ctx context.Context, id runtime.InstanceID) error

	once sync.Once
	own  Machine
	mu   sync.Mutex
	open bool
}

var _ runtime.Runtime = (*Fake)(nil)

// Guest is one instance of a [Machine].
type Guest struct {
	Spec runtime.Spec
	// Done is closed when the instance ends or is killed.
	Done chan struct{}

	machine *Machine
	now     func() time.Time
	body    sync.WaitGroup
	mu      sync.Mutex
	state   runtime.Instance
	console []cay.ConsoleLine
	kept    int // bytes in console
	memory  string
	thawed  chan struct{} // closed on thaw; nil while not frozen
}

// Memory is what a checkpoint keeps of the guest.
func (g *Guest) Memory() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.memory
}

// SetMemory changes it. While the guest is frozen it waits, as everything a
// guest does.
func (g *Guest) SetMemory(text string) {
	g.run()
	defer g.mu.Unlock()
	g.memory = text
	g.keep()
}

// run waits until the guest may run, or has ended, and returns with g.mu held.
func (g *Guest) run() {
	for {
		g.mu.Lock()
		thawed := g.thawed
		if thawed == nil || g.state.Exit != nil {
			return
		}
		g.mu.Unlock()
		select {
		case <-thawed:
		case <-g.Done:
		}
	}
}

// consoleMax is what the contract lets a runtime keep of a console.
const consoleMax = 1 << 20

// Print writes a line to the guest's console.
func (g *Guest) Print(text string) {
	g.run()
	defer g.mu.Unlock()
	g.console = append(g.console, cay.ConsoleLine{At: g.now().UTC(), Text: text})
	for g.kept += len(text); g.kept > consoleMax; g.console = g.console[1:] {
		g.kept -= len(g.console[0].Text)
	}
}

// End ends the guest. Only the first end counts.
func (g *Guest) End(e runtime.Exit) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.state.Exit != nil {
		return
	}
	if e.At.IsZero() {
		e.At = g.now().UTC()
	}
	g.state.State, g.state.Exit = runtime.Exited, &e
	g.keep()
	close(g.Done)
}

// Exit ends the guest as its PID 1 would.
func (g *Guest) Exit(code int) {
	g.End(runtime.Exit{Reason: cay.EndGuestExit, Code: code, Message: fmt.Sprintf("PID 1 of the guest exited with code %d", code)})
}

func (g *Guest) snapshot() runtime.Instance {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.state
	s.Labels = maps.Clone(s.Labels)
	if s.Exit != nil {
		e := *s.Exit
		s.Exit = &e
	}
	return s
}

func (f *Fake) machine() *Machine {
	f.once.Do(func() {
		if f.Machine == nil {
			f.Machine = &f.own
		}
	})
	f.Machine.load.Do(func() { f.Machine.read(f.now) })
	return f.Machine
}

func (f *Fake) now() time.Time {
	if f.Now != nil {
		return f.Now()
	}
	return time.Now()
}

// Guest returns an instance, or nil. With it a test ends a guest (as a crash or
// an OOM would) or writes to its console.
func (f *Fake) Guest(id runtime.InstanceID) *Guest {
	m := f.machine()
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.instances[id]
}

// Len is the number of instances, ended ones that were not killed included.
func (f *Fake) Len() int {
	m := f.machine()
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.instances)
}

// Open implements [runtime.Runtime].
func (f *Fake) Open(ctx context.Context) error {
	if f.OnOpen != nil {
		if err := f.OnOpen(ctx); err != nil {
			return err
		}
	}
	f.machine()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open = true
	return nil
}

// Close implements [runtime.Runtime].
func (f *Fake) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open = false
	return nil
}

func (f *Fake) ready(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.open {
		return &cay.Error{Code: cay.CodeEngineUnavailable, Layer: cay.LayerRuntime, Message: "the runtime is closed"}
	}
	return ctx.Err()
}

// Info implements [runtime.Runtime].
func (f *Fake) Info(ctx context.Context) (runtime.Info, error) {
	return runtime.Info{Name: "fake", Version: "fake-1", Platform: "memory"}, f.ready(ctx)
}

// Create implements [runtime.Runtime].
func (f *Fake) Create(ctx context.Context, s runtime.Spec) error {
	if err := f.ready(ctx); err != nil {
		return err
	}
	if f.OnCreate != nil {
		if err := f.OnCreate(ctx, s); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.ID == "" || s.RootFS == "" || s.NetNS == "" || len(s.Args) == 0 || s.Limits.CPUs <= 0 || s.Limits.MemoryBytes <= 0 || s.Limits.PIDs <= 0 {
		return &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerRuntime, Message: fmt.Sprintf("the spec of instance %q is not complete", s.ID)}
	}
	m := f.machine()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.instances[s.ID] != nil {
		return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerRuntime, Message: fmt.Sprintf("instance %s exists already", s.ID)}
	}
	if m.instances == nil {
		m.instances = map[runtime.InstanceID]*Guest{}
	}
	m.pid++
	g := &Guest{Spec: s, Done: make(chan struct{}), machine: m, now: f.now, state: runtime.Instance{
		ID: s.ID, PID: 1<<22 + m.pid, State: runtime.Created, CreatedAt: f.now().UTC(), Labels: maps.Clone(s.Labels)}}
	m.instances[s.ID] = g
	g.keep()
	return nil
}

func (f *Fake) get(ctx context.Context, id runtime.InstanceID) (*Guest, error) {
	if err := f.ready(ctx); err != nil {
		return nil, err
	}
	if g := f.Guest(id); g != nil {
		return g, nil
	}
	return nil, &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerRuntime, Message: "no instance " + string(id) + " in this runtime"}
}

// Start implements [runtime.Runtime].
func (f *Fake) Start(ctx context.Context, id runtime.InstanceID) error {
	g, err := f.get(ctx, id)
	if err != nil {
		return err
	}
	if f.OnStart != nil {
		if err := f.OnStart(ctx, id); err != nil {
			return err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.Spec.Restore {
		return g.wrongState("started: it is for a guest that was saved")
	}
	if g.state.State != runtime.Created {
		return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerRuntime, Message: fmt.Sprintf("instance %s is %s; only a created one can be started", id, g.state.State)}
	}
	g.state.State = runtime.Running
	g.keep()
	if f.Body != nil {
		g.body.Go(func() { f.Body(g) })
	}
	return nil
}

// Kill implements [runtime.Runtime].
func (f *Fake) Kill(ctx context.Context, id runtime.InstanceID) error {
	g, err := f.get(ctx, id)
	if cay.CodeOf(err) == cay.CodeNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	if f.OnKill != nil {
		if err := f.OnKill(ctx, id); err != nil {
			return err
		}
	}
	g.End(runtime.Exit{Reason: cay.EndRequest, Code: 137, Message: "the instance was killed"})
	g.body.Wait()
	m := f.machine()
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.instances, id)
	m.forget(id)
	return nil
}

// Wait implements [runtime.Runtime].
func (f *Fake) Wait(ctx context.Context, id runtime.InstanceID) (runtime.Exit, error) {
	g, err := f.get(ctx, id)
	if err != nil {
		return runtime.Exit{}, err
	}
	select {
	case <-g.Done:
		return *g.snapshot().Exit, nil
	case <-ctx.Done():
		return runtime.Exit{}, ctx.Err()
	}
}

// Instances implements [runtime.Runtime]; the order is that of the IDs.
func (f *Fake) Instances(ctx context.Context) ([]runtime.Instance, error) {
	if err := f.ready(ctx); err != nil {
		return nil, err
	}
	if f.OnInstances != nil {
		if err := f.OnInstances(ctx); err != nil {
			return nil, err
		}
	}
	m := f.machine()
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []runtime.Instance
	for _, g := range m.instances {
		out = append(out, g.snapshot())
	}
	slices.SortFunc(out, func(a, b runtime.Instance) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return out, nil
}

// Console implements [runtime.Runtime].
func (f *Fake) Console(ctx context.Context, id runtime.InstanceID) ([]cay.ConsoleLine, error) {
	g, err := f.get(ctx, id)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.console), nil
}

// Stats implements [runtime.Runtime].
func (f *Fake) Stats(ctx context.Context, id runtime.InstanceID) (runtime.Stats, error) {
	if _, err := f.get(ctx, id); err != nil {
		return runtime.Stats{}, err
	}
	return runtime.Stats{CPUNanos: 1e6, MemoryBytes: 16 << 20, MemoryCached: 1 << 20, PIDs: 20}, nil
}

// Shutdown implements [runtime.Runtime].
func (f *Fake) Shutdown(ctx context.Context) error {
	all, err := f.Instances(ctx)
	if err != nil {
		return err
	}
	for _, i := range all {
		if err := f.Kill(ctx, i.ID); err != nil {
			return err
		}
	}
	return f.Close()
}
