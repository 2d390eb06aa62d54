package orchestrator_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
	"github.com/cayhq/cay/disk"
	"github.com/cayhq/cay/network"
	"github.com/cayhq/cay/orchestrator"
	"github.com/cayhq/cay/runtime"
)

// world is a host made of maps: engine, slots, disks, builds, guests. It
// outlives an Orchestrator, so that a test can crash one and open another.
type world struct {
	mu        sync.Mutex
	instances map[runtime.InstanceID]*instance
	slots     map[int]bool
	policies  map[int]cay.Egress
	members   map[int]cay.TeamID // of slots, with limits
	limits    map[cay.TeamID]cay.NetworkLimits
	refusals  map[int][]cay.EgressRefusal
	disks     map[string]bool
	routes    map[cay.SandboxID]catalog.Route
	inits     []orchestrator.GuestConfig
	trusted   []string // given to guests that ran already
	cuts      []cay.ExecutionID

	savedDir string
	bulk     []byte // more of a guest's memory, and of its disk, if set
	cpu      int64  // grows by a second with every look

	written        atomic.Int64      // bytes more that every disk holds
	clones         map[string]string // of disks, by name, that were not kept yet
	flushes, looks atomic.Int64
	flushTime      atomic.Int64 // nanoseconds that the next one takes; then half

	fail     map[string]error // by step: create, start, identity, init, acquire, disk, kill, release, remove, …
	build    cay.BuildID      // what guests report; "" is the right one
	bootTime time.Duration

	brokenEnvd bool // another envd ends at once
}

type instance struct {
	spec   runtime.Spec
	state  runtime.State
	exit   *runtime.Exit
	ended  chan struct{}
	memory memory
}

// memory is what a guest's envd remembers, and a checkpoint keeps. Life counts
// the envds it has had; the first is oldEnvd.
type memory struct {
	Token, Instance string
	Envd            cay.Digest
	Life            int
}

// oldEnvd is the envd of the build, newEnvd the one of this version of Cay.
const oldEnvd, newEnvd = cay.Digest("sha256:e"), cay.Digest("sha256:f")

func newWorld() *world {
	return &world{instances: map[runtime.InstanceID]*instance{}, slots: map[int]bool{}, policies: map[int]cay.Egress{}, members: map[int]cay.TeamID{}, limits: map[cay.TeamID]cay.NetworkLimits{}, refusals: map[int][]cay.EgressRefusal{}, disks: map[string]bool{},
		routes: map[cay.SandboxID]catalog.Route{}, fail: map[string]error{}, bootTime: 50 * time.Millisecond}
}

func (w *world) err(step string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fail[step]
}

func (w *world) setFail(step string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail[step] = err
}

// ids lists the engine's instances.
func (w *world) ids() []runtime.InstanceID {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Collect(maps.Keys(w.instances))
}

// leftovers lists every host object.
func (w *world) leftovers() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for id := range w.instances {
		out = append(out, "instance "+string(id))
	}
	for i := range w.slots {
		out = append(out, fmt.Sprint("slot ", i))
	}
	for id := range w.disks {
		out = append(out, "disk "+id)
	}
	for name := range w.clones {
		out = append(out, "clone "+name)
	}
	for id := range w.routes {
		out = append(out, "route "+string(id))
	}
	slices.Sort(out)
	return out
}

// engine is the runtime of the world.
type engine struct{ *world }

func (e engine) Open(context.Context) error     { return nil }
func (e engine) Close() error                   { return nil }
func (e engine) Shutdown(context.Context) error { return nil }
func (e engine) Info(context.Context) (runtime.Info, error) {
	v := "1"
	if e.err("version") != nil {
		v = "2"
	}
	return runtime.Info{Name: "fake", Version: v, Program: "program-" + v}, nil
}
func (e engine) Create(ctx context.Context, s runtime.Spec) error {
	if err := e.err("create"); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	in := &instance{spec: s, state: runtime.Created, ended: make(chan struct{})}
	for _, kv := range s.Env {
		if v, ok := strings.CutPrefix(kv, "CAY_CONTROL_TOKEN="); ok {
			in.memory = memory{Token: v, Instance: string(s.ID), Envd: oldEnvd, Life: 1}
		}
	}
	e.instances[s.ID] = in
	return nil
}

// move changes an instance's state, from one of those given.
func (e engine) move(step string, id runtime.InstanceID, to runtime.State, from ...runtime.State) (*instance, error) {
	if err := e.err(step); err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	in := e.instances[id]
	if in == nil || !slices.Contains(from, in.state) {
		return nil, &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerRuntime, Message: "wrong state"}
	}
	in.state = to
	return in, nil
}
func (e engine) Freeze(_ context.Context, id runtime.InstanceID) error {
	_, err := e.move("freeze", id, runtime.Frozen, runtime.Running, runtime.Frozen)
	return err
}
func (e engine) Thaw(_ context.Context, id runtime.InstanceID) error {
	_, err := e.move("thaw", id, runtime.Running, runtime.Running, runtime.Frozen)
	return err
}
func (e engine) Checkpoint(_ context.Context, id runtime.InstanceID, dir string) error {
	in, err := e.move("checkpoint", id, runtime.Frozen, runtime.Frozen)
	if err != nil {
		return err
	}
	b, err := json.Marshal(in.memory)
	err = errors.Join(err, os.WriteFile(filepath.Join(dir, "pages"), b, 0o600))
	if e.bulk != nil {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, "bulk"), e.bulk, 0o600))
	}
	return err
}
func (e engine) Restore(_ context.Context, id runtime.InstanceID, dir string) error {
	in, err := e.move("restore", id, runtime.Running, runtime.Created)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(dir, "pages"))
	e.mu.Lock()
	defer e.mu.Unlock()
	return errors.Join(err, json.Unmarshal(b, &in.memory))
}
func (e engine) Start(_ context.Context, id runtime.InstanceID) error {
	if err := e.err("start"); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.instances[id].state = runtime.Running
	return nil
}
func (e engine) Kill(_ context.Context, id runtime.InstanceID) error {
	if err := e.err("kill"); err != nil {
		return err
	}
	e.die(id, runtime.Exit{Reason: cay.EndRequest, Message: "killed"})
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.instances, id)
	return nil
}

// die ends an instance as if by itself.
func (w *world) die(id runtime.InstanceID, x runtime.Exit) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if in := w.instances[id]; in != nil && in.exit == nil {
		in.exit, in.state = &x, runtime.Exited
		close(in.ended)
	}
}
func (e engine) Wait(ctx context.Context, id runtime.InstanceID) (runtime.Exit, error) {
	e.mu.Lock()
	in := e.instances[id]
	e.mu.Unlock()
	if in == nil {
		return runtime.Exit{}, &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerRuntime}
	}
	select {
	case <-in.ended:
		return *in.exit, nil
	case <-ctx.Done():
		return runtime.Exit{}, ctx.Err()
	}
}
func (e engine) Instances(context.Context) ([]runtime.Instance, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []runtime.Instance
	for id, in := range e.instances {
		out = append(out, runtime.Instance{ID: id, PID: 1000, State: in.state, Exit: in.exit})
	}
	return out, nil
}
func (e engine) Console(context.Context, runtime.InstanceID) ([]cay.ConsoleLine, error) {
	return []cay.ConsoleLine{{Text: "init: hello"}, {Text: "init: no such file: /usr/bin/envd"}}, nil
}
func (e engine) Stats(context.Context, runtime.InstanceID) (runtime.Stats, error) {
	if err := e.err("stats"); err != nil {
		return runtime.Stats{}, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.cpu += int64(time.Second)
	return runtime.Stats{CPUNanos: e.cpu, MemoryBytes: 5 << 20, MemoryCached: 1 << 20}, nil
}

// slots is the network of the world.
type slots struct{ *world }

func (s slots) Acquire(_ context.Context, e cay.Egress) (network.Slot, error) {
	if err := s.err("acquire"); err != nil {
		return network.Slot{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := 0; ; i++ {
		if !s.slots[i] {
			s.slots[i] = true
			s.policies[i] = e
			return slot(i), nil
		}
	}
}
func slot(i int) network.Slot {
	return network.Slot{Index: i, Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), NetNS: fmt.Sprint("ns", i)}
}
func (s slots) Adopt(_ context.Context, i int) (network.Slot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.slots[i] {
		return network.Slot{}, errors.New("no such slot")
	}
	return slot(i), nil
}
func (s slots) Release(_ context.Context, i int) error {
	if err := s.err("release"); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.slots, i)
	delete(s.policies, i)
	delete(s.members, i)
	delete(s.refusals, i)
	return nil
}
func (s slots) Sweep(context.Context) error { return nil }

// disks are the disks of the world.
type disks struct{ *world }

func (d disks) Create(_ context.Context, r disk.Spec) (disk.Root, error) {
	if err := d.err("disk"); err != nil {
		return disk.Root{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.disks[r.ID] = true
	return disk.Root{Path: "root/" + r.ID, Image: r.ID + ".img"}, nil
}
func (d disks) Remove(_ context.Context, id string) error {
	if err := d.err("remove"); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.disks, id)
	return nil
}
func (d disks) List(context.Context) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []string
	for id := range d.disks {
		out = append(out, id)
	}
	return out, nil
}

func (d disks) saved(name string) string { return filepath.Join(d.savedDir, name+".img") }
func (d disks) Flush(string) error {
	d.flushes.Add(1)
	time.Sleep(time.Duration(d.flushTime.Swap(d.flushTime.Load() / 2)))
	return d.err("flush")
}
func (d disks) Usage(string) (used, total int64, err error) {
	d.looks.Add(1)
	return 3<<20 + d.written.Load(), 1 << 30, d.err("usage")
}
func (d disks) Save(ctx context.Context, id, name string) (disk.Saved, error) {
	if err := d.Clone(ctx, id, name); err != nil {
		return disk.Saved{}, err
	}
	return d.Keep(ctx, name, true)
}
func (d disks) Clone(_ context.Context, id, name string) error {
	if err := d.err("save"); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.clones == nil {
		d.clones = map[string]string{}
	}
	d.clones[name] = id
	return nil
}
func (d disks) Keep(_ context.Context, name string, _ bool) (disk.Saved, error) {
	if err := d.err("keep"); err != nil {
		return disk.Saved{}, err
	}
	d.mu.Lock()
	id := d.clones[name]
	delete(d.clones, name)
	d.mu.Unlock()
	if err := errors.Join(os.MkdirAll(d.savedDir, 0o700), os.WriteFile(d.saved(name), []byte("disk of "+id), 0o600)); err != nil {
		return disk.Saved{}, err
	}
	if d.bulk != nil { // after a hole
		f, err := os.OpenFile(d.saved(name), os.O_WRONLY, 0)
		if err != nil {
			return disk.Saved{}, err
		}
		_, err = f.WriteAt(d.bulk, 1<<20)
		if err := errors.Join(err, f.Truncate(int64(len(d.bulk))+4<<20), f.Close()); err != nil {
			return disk.Saved{}, err
		}
	}
	return d.FindSaved(name)
}
func (d disks) FindSaved(name string) (disk.Saved, error) {
	fi, err := os.Stat(d.saved(name))
	if err != nil {
		return disk.Saved{}, &cay.Error{Code: cay.CodeObjectMissing, Layer: cay.LayerStorage, Err: err}
	}
	return disk.Saved{File: d.saved(name), SizeBytes: fi.Size()}, nil
}
func (d disks) RemoveSaved(_ context.Context, name string) error {
	d.mu.Lock()
	delete(d.clones, name)
	d.mu.Unlock()
	if err := os.Remove(d.saved(name)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
func (d disks) ListSaved(context.Context) ([]string, error) {
	ents, err := os.ReadDir(d.savedDir)
	var out []string
	for _, e := range ents {
		out = append(out, strings.TrimSuffix(e.Name(), ".img"))
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return out, err
}

// table is the catalog of the world.
type table struct{ *world }

func (t table) Put(_ context.Context, r catalog.Route) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.routes[r.Sandbox] = r
	return nil
}
func (t table) Get(_ context.Context, id cay.SandboxID) (catalog.Route, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.routes[id]
	if !ok {
		return r, catalog.ErrNotFound
	}
	return r, nil
}
func (t table) Delete(_ context.Context, id cay.SandboxID, e cay.ExecutionID) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.routes[id].Execution == e {
		delete(t.routes, id)
	}
	return nil
}
func (t table) List(context.Context) ([]catalog.Route, error) { return nil, nil }

// inside is the guests' control channel.
type inside struct{ *world }

func (g inside) Identity(ctx context.Context, a orchestrator.GuestAddr) (orchestrator.GuestIdentity, error) {
	if err := g.err("identity"); err != nil {
		return orchestrator.GuestIdentity{}, err
	}
	select {
	case <-time.After(g.bootTime):
	case <-ctx.Done():
		return orchestrator.GuestIdentity{}, ctx.Err()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, in := range g.instances {
		if in.memory.Token != a.Token.Reveal() || in.state != runtime.Running {
			continue
		}
		b := g.build
		if b == "" {
			b = cay.BuildID(in.spec.Labels["build"])
		}
		return orchestrator.GuestIdentity{Build: b, Instance: in.memory.Instance, EnvdVersion: "0.6.13", EnvdDigest: in.memory.Envd, PID: 10 + in.memory.Life}, nil
	}
	return orchestrator.GuestIdentity{}, errors.New("no guest has this token")
}
func (g inside) Init(_ context.Context, a orchestrator.GuestAddr, c orchestrator.GuestConfig) error {
	if err := g.err("init"); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	in := g.instances[runtime.InstanceID(c.Instance)]
	if in == nil || in.memory.Token != a.Token.Reveal() {
		return errors.New("the control token is wrong")
	}
	in.memory.Token, in.memory.Instance = c.ControlToken, c.Instance
	g.inits = append(g.inits, c)
	return nil
}

func (g inside) Trust(_ context.Context, a orchestrator.GuestAddr, bundle string) error {
	if err := g.err("trust"); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.trusted = append(g.trusted, bundle)
	return nil
}

// Upgrade gives a guest another envd: at once, or as g.upgrading says.
func (g inside) Upgrade(_ context.Context, a orchestrator.GuestAddr, program []byte, digest cay.Digest) error {
	if err := g.err("upgrade"); err != nil {
		return err
	}
	if string(program) != "program of "+string(digest) {
		return fmt.Errorf("%s is not %q", digest, program)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, in := range g.instances {
		if in.memory.Token == a.Token.Reveal() && in.state == runtime.Running {
			in.memory.Life++
			if g.brokenEnvd {
				in.memory.Life++ // and the one before is back
				return nil
			}
			in.memory.Envd = digest
			return nil
		}
	}
	return errors.New("no guest has this token")
}

func (g inside) Sync(context.Context, orchestrator.GuestAddr) error { return g.err("sync") }

type streams struct{ *world }

func (s streams) Cut(_ cay.SandboxID, e cay.ExecutionID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cuts = append(s.cuts, e)
}

type builds struct{}

func (builds) Open(_ context.Context, b cay.BuildID) (cay.Manifest, []disk.Layer, error) {
	if b == "missing" {
		return cay.Manifest{}, nil, &cay.Error{Code: cay.CodeTemplateIncomplete, Layer: cay.LayerTemplate, Message: "layer 1 is missing"}
	}
	return cay.Manifest{Build: b, Init: "/init", Envd: "sha256:e", EnvdVersion: "0.6.13",
		Defaults: cay.Defaults{User: "user", Env: map[string]string{"LANG": "C.UTF-8", "A": "template"}}}, nil, nil
}

func node(w *world, dir string, pool int) *orchestrator.Orchestrator {
	w.mu.Lock()
	w.savedDir = dir + ".disks"
	w.mu.Unlock()
	return &orchestrator.Orchestrator{Node: "n1", Dir: dir, SnapshotDir: dir + ".snapshots", Runtime: engine{w}, Slots: slots{w}, Disks: disks{w},
		Builds: builds{}, Catalog: table{w}, Streams: streams{w}, Guest: inside{w}, PoolSize: pool, MaxSandboxes: 5,
		StartTimeout: 10 * time.Second, Envd: orchestrator.Agent{Version: "0.6.14", Digest: newEnvd,
			Program: func() ([]byte, error) { return []byte("program of " + newEnvd), nil }}}
}

func open(t *testing.T, w *world, pool int) (*orchestrator.Orchestrator, string) {
	t.Helper()
	dir := t.TempDir()
	return reopen(t, w, dir, pool), dir
}

func reopen(t *testing.T, w *world, dir string, pool int) *orchestrator.Orchestrator {
	t.Helper()
	o := node(w, dir, pool)
	if err := o.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	return o
}

func config(id string) cay.SandboxConfig {
	return cay.SandboxConfig{ID: cay.SandboxID(id), TeamID: "t", Template: "tpl", Build: "b1",
		Resources: cay.Resources{CPUs: 2, MemoryMB: 512, DiskMB: 1024}, AccessToken: "tok", EnvVars: map[string]string{"A": "client"}}
}

func mustCreate(t *testing.T, o *orchestrator.Orchestrator, id string) cay.NodeSandbox {
	t.Helper()
	s, err := o.Create(t.Context(), config(id))
	if err != nil {
		t.Fatalf("create %s: %v", id, err)
	}
	return s
}

// wantClean waits for the background removals and checks that nothing is left.
func wantClean(t *testing.T, w *world, dir string) {
	t.Helper()
	time.Sleep(time.Minute) // virtual: inside a synctest bubble
	synctest.Wait()
	if l := w.leftovers(); len(l) > 0 {
		t.Errorf("left on the host: %s", strings.Join(l, ", "))
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		t.Errorf("left in the record directory: %s", f.Name())
	}
}

func TestCreateAndKill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		defer o.Close()
		s := mustCreate(t, o, "i1")
		if s.State != cay.StateRunning || s.EnvdVersion != "0.6.13" || s.Host.Address != "10.0.0.0" {
			t.Errorf("got %+v", s)
		}
		r, err := table{w}.Get(t.Context(), "i1")
		if err != nil || r.Execution != s.ExecutionID {
			t.Errorf("route %+v, %v", r, err)
		}
		c := w.inits[0]
		want := map[string]string{"LANG": "C.UTF-8", "A": "client", "E2B_SANDBOX": "true", "E2B_SANDBOX_ID": "i1", "E2B_TEMPLATE_ID": "tpl"}
		if len(c.EnvVars) != len(want) {
			t.Errorf("environment %v", c.EnvVars)
		}
		for k, v := range want {
			if c.EnvVars[k] != v {
				t.Errorf("%s=%q, want %q", k, c.EnvVars[k], v)
			}
		}
		if c.AccessToken != "tok" || c.DefaultUser != "user" || c.Generation != string(s.ExecutionID) {
			t.Errorf("init got %+v", c)
		}
		if _, err := o.Create(t.Context(), config("i1")); cay.CodeOf(err) != cay.CodeConflict {
			t.Errorf("same ID again: %v", err)
		}
		if err := o.Kill(t.Context(), "i1", cay.EndRequest); err != nil {
			t.Fatal(err)
		}
		if _, err := (table{w}).Get(t.Context(), "i1"); !errors.Is(err, catalog.ErrNotFound) {
			t.Errorf("the killed sandbox still has a route: %v", err)
		}
		if err := o.Kill(t.Context(), "i1", cay.EndRequest); cay.CodeOf(err) != cay.CodeSandboxNotFound {
			t.Errorf("second kill: %v", err)
		}
		wantClean(t, w, dir)
		if len(w.cuts) != 1 || w.cuts[0] != s.ExecutionID {
			t.Errorf("cuts %v", w.cuts)
		}
		if tr, err := o.Trace(t.Context(), "i1"); err != nil || len(tr) < 5 {
			t.Errorf("the trace of an ended sandbox: %v, %v", tr, err)
		}
		if l, err := o.Console(t.Context(), "i1"); err != nil || len(l) != 2 {
			t.Errorf("the console of an ended sandbox: %v, %v", l, err)
		}
	})
}

func TestFailedStartLeavesNothing(t *testing.T) {
	boom := &cay.Error{Code: cay.CodeEngineFailed, Layer: cay.LayerRuntime, Message: "boom"}
	for step, want := range map[string]cay.Code{
		"create": cay.CodeEngineFailed, "start": cay.CodeEngineFailed, "acquire": cay.CodeEngineFailed, "disk": cay.CodeEngineFailed,
		"identity": cay.CodeEnvdUnreachable, "init": cay.CodeEnvdInit,
	} {
		t.Run(step, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				o, dir := open(t, w, 0)
				defer o.Close()
				w.setFail(step, boom)
				_, err := o.Create(t.Context(), config("i1"))
				if cay.CodeOf(err) != want {
					t.Fatalf("got %v, want code %s", err, want)
				}
				if _, err := o.Get(t.Context(), "i1"); cay.CodeOf(err) != cay.CodeSandboxNotFound {
					t.Error("a failed sandbox is still there")
				}
				wantClean(t, w, dir)
				w.setFail(step, nil)
				mustCreate(t, o, "i1") // the ID is free again
			})
		})
	}
}

func TestWrongRootFileSystemIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		defer o.Close()
		w.build = "another"
		_, err := o.Create(t.Context(), config("i1"))
		if cay.CodeOf(err) != cay.CodeRootfsMismatch || !strings.Contains(err.Error(), "another") {
			t.Errorf("got %v", err)
		}
		wantClean(t, w, dir)
	})
}

func TestIncompleteTemplate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		defer o.Close()
		c := config("i1")
		c.Build = "missing"
		if _, err := o.Create(t.Context(), c); cay.CodeOf(err) != cay.CodeTemplateIncomplete {
			t.Errorf("got %v", err)
		}
		wantClean(t, w, dir)
	})
}

func TestGuestDiesWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.bootTime = time.Hour
		o, dir := open(t, w, 0)
		defer o.Close()
		go func() {
			time.Sleep(100 * time.Millisecond)
			for _, id := range w.ids() {
				w.die(id, runtime.Exit{Reason: cay.EndOOM, Message: "out of memory at 512 MiB"})
			}
		}()
		_, err := o.Create(t.Context(), config("i1"))
		if cay.CodeOf(err) != cay.CodeGuestOOM || !strings.Contains(err.Error(), "/usr/bin/envd") {
			t.Errorf("want guest_oom with the console's tail, got %v", err)
		}
		wantClean(t, w, dir)
	})
}

func TestCallerVanishes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.bootTime = time.Hour
		o, dir := open(t, w, 0)
		defer o.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if _, err := o.Create(ctx, config("i1")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		wantClean(t, w, dir)
	})
}

func TestKillWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.bootTime = time.Hour
		o, dir := open(t, w, 0)
		defer o.Close()
		done := make(chan error)
		go func() { _, err := o.Create(t.Context(), config("i1")); done <- err }()
		time.Sleep(100 * time.Millisecond)
		if err := o.Kill(t.Context(), "i1", cay.EndRequest); err != nil {
			t.Fatal(err)
		}
		if err := <-done; cay.CodeOf(err) != cay.CodeConflict {
			t.Errorf("the create: %v", err)
		}
		wantClean(t, w, dir)
	})
}

func TestGuestEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		defer o.Close()
		s := mustCreate(t, o, "i1")
		w.die(runtime.InstanceID(s.ExecutionID), runtime.Exit{Reason: cay.EndOOM, Message: "the guest used more than 512 MiB"})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var got []cay.SandboxEnd
		_ = o.Watch(ctx, func(e cay.SandboxEnd) { got = append(got, e) })
		if len(got) != 1 || got[0].ID != "i1" || got[0].Reason != cay.EndOOM || got[0].Message == "" {
			t.Errorf("ends %+v", got)
		}
		wantClean(t, w, dir)
	})
}

func TestCapacity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, _ := open(t, w, 0)
		defer o.Close()
		for i := range 5 {
			mustCreate(t, o, fmt.Sprint("i", i))
		}
		_, err := o.Create(t.Context(), config("i9"))
		if cay.CodeOf(err) != cay.CodeCapacity || !strings.Contains(err.Error(), "5 of 5") {
			t.Errorf("want the arithmetic of the refusal, got %v", err)
		}
		o.MemoryAvailable = func() (int64, error) { return 100 << 20, nil }
		if err := o.Kill(t.Context(), "i0", cay.EndRequest); err != nil {
			t.Fatal(err)
		}
		_, err = o.Create(t.Context(), config("i9"))
		if cay.CodeOf(err) != cay.CodeCapacity || !strings.Contains(err.Error(), "100 MiB") {
			t.Errorf("want the memory's arithmetic, got %v", err)
		}
	})
}

func TestPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 2)
		defer o.Close()
		o.Warm("b1", config("x").Resources)
		time.Sleep(time.Second)
		synctest.Wait()
		if n, err := o.Info(t.Context()); err != nil || n.PoolReady != 2 || n.Sandboxes != 0 {
			t.Fatalf("info %+v, %v", n, err)
		}
		began := time.Now()
		mustCreate(t, o, "i1")
		if took := time.Since(began); took != 0 {
			t.Errorf("a create from the pool waited %s for a boot", took)
		}
		off := config("i2")
		off.Egress = shut
		began = time.Now()
		if _, err := o.Create(t.Context(), off); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("a create without internet waited %s for a boot", took)
		}
		if got := w.policyOf(t, o, "i2"); !reflect.DeepEqual(got, shut) {
			t.Errorf("a guest of the pool has the policy %+v", got)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if n, _ := o.Info(t.Context()); n.PoolReady != 2 {
			t.Errorf("the pool was not filled again: %+v", n)
		}
		if err := o.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantClean(t, w, dir)
	})
}

func TestPooledGuestThatDiesIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, _ := open(t, w, 1)
		defer o.Close()
		o.Warm("b1", config("x").Resources)
		time.Sleep(time.Second)
		synctest.Wait()
		first := w.ids()[0]
		w.die(first, runtime.Exit{Reason: cay.EndEngineCrash})
		time.Sleep(time.Second)
		synctest.Wait()
		if slices.Contains(w.ids(), first) {
			t.Error("the dead guest is still there")
		}
		if n, _ := o.Info(t.Context()); n.PoolReady != 1 {
			t.Errorf("info %+v", n)
		}
	})
}

func TestRestartAdopts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 1)
		o.Warm("b1", config("x").Resources)
		a := mustCreate(t, o, "i1")
		b := mustCreate(t, o, "i2")
		deadline := time.Now().Add(time.Hour).UTC()
		if err := o.SetDeadline(t.Context(), "i1", deadline); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		o.Close()
		w.routes = map[cay.SandboxID]catalog.Route{} // the catalog was in the server's memory
		w.die(runtime.InstanceID(b.ExecutionID), runtime.Exit{Reason: cay.EndGuestExit, Message: "PID 1 ended"})

		o = reopen(t, w, dir, 1)
		defer o.Close()
		s, err := o.Get(t.Context(), "i1")
		if err != nil || !s.Adopted || s.ExecutionID != a.ExecutionID || !s.Deadline.Equal(deadline) {
			t.Errorf("adopted %+v, %v", s, err)
		}
		if r, err := (table{w}).Get(t.Context(), "i1"); err != nil || r.Execution != a.ExecutionID {
			t.Errorf("route %+v, %v", r, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var ends []cay.SandboxEnd
		_ = o.Watch(ctx, func(e cay.SandboxEnd) { ends = append(ends, e) })
		if len(ends) != 1 || ends[0].ID != "i2" || ends[0].Reason != cay.EndGuestExit {
			t.Errorf("what ended while no server ran: %+v", ends)
		}
		if n, _ := o.Info(t.Context()); n.PoolReady != 1 {
			t.Errorf("the pooled guest was not adopted: %+v", n)
		}
		w.die(runtime.InstanceID(a.ExecutionID), runtime.Exit{Reason: cay.EndEngineCrash})
		time.Sleep(time.Second)
		if _, err := o.Get(t.Context(), "i1"); cay.CodeOf(err) != cay.CodeSandboxNotFound {
			t.Error("an adopted guest is not watched")
		}
		if err := o.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantClean(t, w, dir)
	})
}

// A server that stops at any step of a start leaves what the next one removes.
func TestCrashWhileStarting(t *testing.T) {
	for _, step := range []string{"create", "start", "identity", "init"} {
		t.Run(step, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				dir := t.TempDir()
				o := node(w, dir, 0)
				if err := o.Open(t.Context()); err != nil {
					t.Fatal(err)
				}
				// A crash is a step that fails and a removal that cannot work.
				w.setFail(step, errors.New("crash"))
				for _, s := range []string{"kill", "release", "remove"} {
					w.setFail(s, errors.New("crash"))
				}
				go o.Create(t.Context(), config("i1"))
				time.Sleep(30 * time.Second)
				o.Close()
				if len(w.leftovers()) == 0 {
					t.Fatal("the crash left nothing, so this test tests nothing")
				}
				w.mu.Lock()
				clear(w.fail)
				w.mu.Unlock()
				o = reopen(t, w, dir, 0)
				defer o.Close()
				wantClean(t, w, dir)
			})
		})
	}
}

func TestUnownedObjectsAreRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.disks["xstray"] = true
		w.instances["xstray"] = &instance{state: runtime.Running, ended: make(chan struct{})}
		o, dir := open(t, w, 0)
		defer o.Close()
		wantClean(t, w, dir)
	})
}

func TestUnreadableRecordStopsSweeping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		a := mustCreate(t, o, "i1")
		b := mustCreate(t, o, "i2")
		o.Close()
		if err := os.WriteFile(dir+"/"+string(a.ExecutionID)+".json", []byte(`{"format":99}`), 0o600); err != nil {
			t.Fatal(err)
		}
		o = reopen(t, w, dir, 0)
		defer o.Close()
		if !slices.Contains(w.ids(), runtime.InstanceID(a.ExecutionID)) {
			t.Error("a guest whose record this version cannot read was removed")
		}
		if s, err := o.Get(t.Context(), "i2"); err != nil || s.ExecutionID != b.ExecutionID {
			t.Errorf("the readable one was not adopted: %v", err)
		}
	})
}
