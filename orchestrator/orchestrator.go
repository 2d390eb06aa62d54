// Package orchestrator is one machine's agent: it owns its sandboxes from
// create to kill. It joins a runtime, network slots and disks into guests that
// answer, keeps some booted ahead, adopts them after a restart, and removes
// every host object of those that ended. DESIGN.md has the invariants.
package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	goruntime "runtime"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/internal/meminfo"
	"github.com/cayhq/cay/runtime"
)

// Orchestrator implements [cay.Node]. Set the fields, then Open.
type Orchestrator struct {
	Node cay.NodeID
	Dir  string // keeps the node's records
	// PastDir keeps what was refused to sandboxes that have ended, for an hour
	// and over a restart; empty keeps it in memory.
	PastDir string
	// SnapshotDir keeps the memory of snapshots; empty is "snapshots" in Dir.
	SnapshotDir string

	Runtime runtime.Runtime
	Slots   Slots
	Disks   Disks
	Builds  Builds
	Catalog catalog.Catalog
	Engines Engines // nil: there is the runtime's own engine only
	Streams Streams // may be nil
	Names   Names   // nil: policies with names are refused
	Guest   Guest   // nil is HTTP to the guest's control port
	Envd    Agent   // what [Orchestrator.UpgradeEnvd] gives to guests
	// TeamLimits returns the network limits of a team as they are now; nil is no
	// limits.
	TeamLimits func(context.Context, cay.TeamID) (cay.NetworkLimits, error)

	// PoolSize is how many guests are kept booted ahead per hot build.
	PoolSize int
	// MaxSandboxes bounds the sandboxes of this machine; 0 is 1,000.
	MaxSandboxes int
	// StartTimeout bounds a start, waiting for its turn included; 0 is 45 s,
	// inside the 60 s after which the SDKs give up.
	StartTimeout time.Duration
	// MemoryAvailable returns the bytes the host could still give; nil does
	// not check.
	MemoryAvailable func() (int64, error)

	Now func() time.Time
	Log *slog.Logger
	// Fault is called at the points of package killpoint; nil in production.
	Fault killpoint.Hook

	records   records
	snapshots snapshots
	// What the runtime is, which never changes under a server.
	runtimeName string
	engine      runtime.Engine
	engineKick  chan struct{} // wakes keepEngines
	unread      bool          // a record could not be read
	meter       meter
	ends        ends
	past        past
	loads       loads
	turn        chan struct{} // one token per boot under way
	teams       sync.Mutex    // one change of a team's limits at a time

	// life ends with Close; background work holds wg.
	life   context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex
	open     bool
	guests   map[cay.ExecutionID]*guest
	bySbx    map[cay.SandboxID]*guest
	starting map[cay.SandboxID]*start
	hot      map[poolKey]time.Time // builds that were asked for, and when last
	kick     chan struct{}         // wakes the pool
}

// start is a create under way, so that a kill can reach it.
type start struct {
	cancel context.CancelCauseFunc
	done   chan struct{}
}

// guest is a booted or booting guest. Its record is guarded by
// Orchestrator.mu; exit is readable after exited is closed.
type guest struct {
	rec     record
	op      killpoint.Op  // what is done with it
	net     sync.Mutex    // one change of its network at a time
	named   bool          // Names has it; guarded by net
	adopted bool          // survived a restart of the server
	exited  chan struct{} // closed when the engine says that it ended
	exit    runtime.Exit
	left    chan struct{} // closed when nobody reaches it any more
	gone    chan struct{} // closed when no process of it runs any more

	// Guarded by Orchestrator.mu: envd is being replaced; it is being found out
	// which envd there is.
	upgrading, settling bool
}

const (
	defaultStartTimeout = 45 * time.Second
	defaultMax          = 1000
	// memoryReserve is left to the host when memory gets short.
	memoryReserve = 256 << 20
	// idleGuest is about what an idle guest costs, for the capacity check.
	idleGuest = 32 << 20
)

func (o *Orchestrator) log() *slog.Logger {
	if o.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return o.Log
}

func (o *Orchestrator) now() time.Time {
	if o.Now == nil {
		return time.Now().UTC()
	}
	return o.Now().UTC()
}

// Open adopts what an earlier run left and starts the background work. The
// runtime, the slots and the disks must be open. It returns when every adopted
// sandbox is in the catalog.
func (o *Orchestrator) Open(ctx context.Context) error {
	if o.SnapshotDir == "" {
		o.SnapshotDir = filepath.Join(o.Dir, "snapshots")
	}
	if err := errors.Join(os.MkdirAll(o.Dir, 0o700), os.MkdirAll(o.SnapshotDir, 0o700)); err != nil {
		return &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerStorage,
			Message: "the node's record directory cannot be made: " + err.Error(),
			Fix:     "check the owner, the mode and the free space of " + o.Dir, Err: err}
	}
	o.records = records{dir: o.Dir}
	o.guests = map[cay.ExecutionID]*guest{}
	o.bySbx = map[cay.SandboxID]*guest{}
	o.starting = map[cay.SandboxID]*start{}
	o.hot = map[poolKey]time.Time{}
	o.kick, o.engineKick = make(chan struct{}, 1), make(chan struct{}, 1)
	o.turn = make(chan struct{}, bootsAtOnce())
	o.ends.init()
	o.past.init(o.now)
	o.past.dir = o.PastDir
	if err := o.past.load(); err != nil {
		o.log().Warn("what was refused to ended sandboxes is not all known any more", "error", err)
	}
	o.snapshots = snapshots{o.SnapshotDir}
	if o.Guest == nil {
		o.Guest = newHTTPGuest()
	}
	if o.StartTimeout == 0 {
		o.StartTimeout = defaultStartTimeout
	}
	if o.MaxSandboxes == 0 {
		o.MaxSandboxes = defaultMax
	}
	o.life, o.cancel = context.WithCancel(context.WithoutCancel(ctx))
	info, err := o.Runtime.Info(ctx)
	if err == nil {
		o.runtimeName, o.engine = info.Name, runtime.Engine{Version: info.Version, Program: info.Program}
		err = o.reconcile(ctx)
	}
	if err != nil {
		o.cancel()
		o.wg.Wait()
		return err
	}
	o.mu.Lock()
	o.open = true
	o.mu.Unlock()
	o.wg.Go(func() { o.fill(o.life) })
	o.wg.Go(func() { o.measureAll(o.life) })
	o.wg.Go(func() { o.flushGrown(o.life) })
	o.wg.Go(func() { o.keepEngines(o.life) })
	o.wg.Go(func() { o.checkLarge(o.life) })
	o.lookAtEngines()
	return nil
}

// Close lets go of every guest without ending one. Starts under way are rolled
// back. It may be called twice and after a failed Open.
func (o *Orchestrator) Close() error {
	o.mu.Lock()
	o.open = false
	starts := make([]*start, 0, len(o.starting))
	for _, s := range o.starting {
		starts = append(starts, s)
	}
	cancel := o.cancel
	o.mu.Unlock()
	for _, s := range starts {
		s.cancel(errShuttingDown())
	}
	for _, s := range starts {
		<-s.done
	}
	if cancel != nil {
		cancel()
	}
	o.wg.Wait()
	return nil
}

// Shutdown ends every guest, for `cay down`. Call it before Close.
func (o *Orchestrator) Shutdown(ctx context.Context) error {
	o.mu.Lock()
	o.open = false
	o.hot = map[poolKey]time.Time{}
	all := make([]*guest, 0, len(o.guests))
	for _, g := range o.guests {
		all = append(all, g)
	}
	starts := make([]*start, 0, len(o.starting))
	for _, s := range o.starting {
		starts = append(starts, s)
	}
	o.mu.Unlock()
	for _, s := range starts {
		s.cancel(errShuttingDown())
		<-s.done
	}
	var wg sync.WaitGroup
	limit := make(chan struct{}, 8)
	for _, g := range all {
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			o.end(g, cay.EndShutdown, "the operator stopped Cay with `cay down`")
			select {
			case <-g.gone:
			case <-ctx.Done():
			}
		})
	}
	wg.Wait()
	return ctx.Err()
}

func errShuttingDown() error {
	return &cay.Error{Code: cay.CodeShuttingDown, Layer: cay.LayerPlacement,
		Message: "the server is going down", Fix: "try again when it is up"}
}

func errNotFound(id cay.SandboxID) error {
	return &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerRuntime,
		Message: fmt.Sprintf("sandbox %s does not run on this node", id),
		Fix:     "see `cay sandbox list` for those that run"}
}

// Create implements [cay.Node].
func (o *Orchestrator) Create(ctx context.Context, c cay.SandboxConfig) (cay.NodeSandbox, error) {
	ctx, stop := context.WithTimeoutCause(ctx, o.StartTimeout, &cay.Error{
		Code: cay.CodePlacementTimeout, Layer: cay.LayerPlacement,
		Message: fmt.Sprintf("the sandbox was not ready within %s", o.StartTimeout),
		Fix:     "look at the machine's load; `cay sandbox inspect` shows which step was slow"})
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	s := &start{cancel: cancel, done: make(chan struct{})}
	err := o.admit(c.ID, s)
	if cay.CodeOf(err) == cay.CodeCapacity && o.othersLeave(ctx) {
		err = o.admit(c.ID, s)
	}
	if err != nil {
		return cay.NodeSandbox{}, err
	}
	defer func() {
		o.mu.Lock()
		delete(o.starting, c.ID)
		o.mu.Unlock()
		close(s.done)
	}()

	g, err := o.place(ctx, c)
	if err != nil {
		return cay.NodeSandbox{}, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.view(g), nil
}

// admit reserves the ID, or says why not.
func (o *Orchestrator) admit(id cay.SandboxID, s *start) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.open {
		return errShuttingDown()
	}
	if o.bySbx[id] != nil || o.starting[id] != nil {
		return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerPlacement,
			Message: fmt.Sprintf("sandbox %s exists already", id), Fix: "create a sandbox under a new ID"}
	}
	if n := len(o.bySbx) + len(o.starting); n >= o.MaxSandboxes {
		return &cay.Error{Code: cay.CodeCapacity, Layer: cay.LayerPlacement,
			Message: fmt.Sprintf("no node can take this sandbox: 1 node checked, 1 full (%d of %d sandboxes run)", n, o.MaxSandboxes),
			Fix:     "kill sandboxes you no longer need (`cay sandbox list`), or raise --max-sandboxes"}
	}
	if o.MemoryAvailable != nil {
		if free, err := o.MemoryAvailable(); err == nil && free < memoryReserve+idleGuest {
			return &cay.Error{Code: cay.CodeCapacity, Layer: cay.LayerPlacement,
				Message: fmt.Sprintf("no node can take this sandbox: 1 node checked, 1 short of memory (%d MiB available, %d MiB are kept for the host, a sandbox starts with about %d MiB)",
					free>>20, memoryReserve>>20, idleGuest>>20),
				Fix: "kill sandboxes you no longer need, or add memory"}
		}
	}
	o.starting[id] = s
	return nil
}

// othersLeave waits until the guests that are ending are gone, with their memory,
// and reports whether there were any.
func (o *Orchestrator) othersLeave(ctx context.Context) bool {
	o.mu.Lock()
	var ends []*guest
	for _, g := range o.guests {
		if g.rec.Phase == ending {
			ends = append(ends, g)
		}
	}
	o.mu.Unlock()
	for _, g := range ends {
		select {
		case <-g.gone:
		case <-ctx.Done():
			return false
		}
	}
	return len(ends) > 0
}

// place finds or boots a guest and gives it to the sandbox.
func (o *Orchestrator) place(ctx context.Context, c cay.SandboxConfig) (*guest, error) {
	begin := o.now()
	m, layers, err := o.Builds.Open(ctx, c.Build)
	if err != nil {
		return nil, err
	}
	var g *guest
	b := boot{manifest: m, layers: layers, res: c.Resources, confined: confined{c.ID, c.TeamID, c.Egress}}
	if c.From != "" {
		g, err = o.bootFrom(ctx, b, c)
	} else if g = o.claim(poolKey{build: c.Build, res: c.Resources}, c); g == nil {
		g, err = o.boot(ctx, b)
	} else if !c.Egress.Open() {
		if err = o.confine(ctx, g, b.confined); err != nil {
			o.end(g, cay.EndStartFailed, err.Error())
		}
	}
	if err != nil {
		return nil, err
	}
	if err := o.assign(ctx, g, c, m); err != nil {
		o.end(g, cay.EndStartFailed, err.Error())
		return nil, err
	}
	o.settle(g)
	o.log().Info("sandbox runs", "sandbox", c.ID, "execution", g.rec.Execution, "took", o.now().Sub(begin))
	return g, nil
}

// assign makes a booted guest the sandbox c.
func (o *Orchestrator) assign(ctx context.Context, g *guest, c cay.SandboxConfig, m cay.Manifest) error {
	began := o.now()
	bundle, err := o.bundle(c.Egress)
	if err != nil {
		return err
	}
	o.mu.Lock()
	if g.rec.Phase == booting || g.rec.Phase == pooled {
		g.rec.Sandbox, g.rec.Team, g.rec.Template = c.ID, c.TeamID, c.Template
		g.rec.TrafficToken, g.rec.Ingress = c.TrafficToken.Reveal(), c.Ingress
		g.rec.StartedAt, g.rec.Deadline = began, c.Deadline
	}
	op := g.op
	// The guest's memory may be that of another one, which knows its token.
	// Should the server end before the guest has the new one, and is who the
	// record says: its sandbox was told to nobody then, and the guest goes.
	addr, old := g.addr(), g.rec.ControlToken
	g.rec.ControlToken, g.rec.Untold = newToken(), true
	if err := o.moveLocked(g, running); err != nil {
		g.rec.ControlToken, g.rec.Untold = old, false
		alive := g.rec.Phase == booting || g.rec.Phase == pooled
		o.mu.Unlock()
		if alive {
			return storageError("write the node's record of the sandbox", err)
		}
		return o.diedDuring(ctx, g, "taking its configuration")
	}
	o.bySbx[c.ID] = g
	token := g.rec.ControlToken
	o.mu.Unlock()
	// After RefreshTeam can see it.
	if err := o.join(ctx, c.TeamID, g.rec.Slot); err != nil {
		return err
	}
	o.Fault.Pass(op, "init.before")
	config := guestConfig(g.rec.Execution, token, c, m, began)
	config.CABundle = bundle
	err = o.Guest.Init(ctx, addr, config)
	o.Fault.Pass(op, "init.after")
	o.step(g, "init", cay.LayerEnvd, began, err)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		select {
		case <-g.exited:
			return o.diedDuring(ctx, g, "taking its configuration")
		default:
		}
		return &cay.Error{Code: cay.CodeEnvdInit, Layer: cay.LayerEnvd,
			Message: "envd in the guest did not take its configuration: " + err.Error(),
			Fix:     "try again; if it stays, rebuild the template with `cay template refresh`",
			Detail:  o.consoleDetail(ctx, g), Err: err}
	}
	o.mu.Lock()
	if g.rec.Phase == running { // else it has ended, and publish says so
		next := g.rec
		next.Untold = false
		if err = o.writeLocked(op, next, "told"); err == nil {
			g.rec.Untold = false
		}
	}
	o.mu.Unlock()
	if err != nil {
		return storageError("write the node's record of the sandbox", err)
	}
	o.Fault.Pass(op, "route.before")
	err = o.publish(ctx, g)
	o.Fault.Pass(op, "route.after")
	return err
}

// publish puts the guest's sandbox into the catalog.
func (o *Orchestrator) publish(ctx context.Context, g *guest) error {
	o.mu.Lock()
	r := catalog.Route{Sandbox: g.rec.Sandbox, Execution: g.rec.Execution, Node: o.Node,
		Addr: g.addr().Addr, TrafficToken: cay.Secret(g.rec.TrafficToken), Ingress: g.rec.Ingress}
	alive := g.rec.Phase == running || g.rec.Phase == saving
	o.mu.Unlock()
	if !alive {
		return o.diedDuring(ctx, g, "starting")
	}
	if err := o.Catalog.Put(ctx, r); err != nil {
		return &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerPlacement,
			Message: "the sandbox runs but the proxy cannot be told where", Fix: "try again", Err: err}
	}
	// It may have ended between the check and the Put; end() deletes before or
	// after us, so look again.
	o.mu.Lock()
	alive = g.rec.Phase == running || g.rec.Phase == saving
	o.mu.Unlock()
	if !alive {
		_ = o.Catalog.Delete(ctx, r.Sandbox, r.Execution) // an entry of a dead execution answers 502 anyway
		return o.diedDuring(ctx, g, "starting")
	}
	return nil
}

func guestConfig(e cay.ExecutionID, token string, c cay.SandboxConfig, m cay.Manifest, now time.Time) GuestConfig {
	env := map[string]string{}
	for k, v := range m.Defaults.Env {
		env[k] = v
	}
	for k, v := range c.EnvVars {
		env[k] = v
	}
	env["E2B_SANDBOX"] = "true"
	env["E2B_SANDBOX_ID"] = string(c.ID)
	env["E2B_TEMPLATE_ID"] = string(c.Template)
	return GuestConfig{EnvVars: env, AccessToken: c.AccessToken.Reveal(), Timestamp: now,
		DefaultUser: m.Defaults.User, DefaultWorkdir: m.Defaults.Workdir,
		LifecycleID: string(e), Hostname: string(c.ID), Generation: string(e), Instance: string(e), ControlToken: token}
}

// Kill implements [cay.Node].
func (o *Orchestrator) Kill(ctx context.Context, id cay.SandboxID, reason cay.EndReason) error {
	o.mu.Lock()
	s, g := o.starting[id], o.bySbx[id]
	o.mu.Unlock()
	if s != nil {
		s.cancel(&cay.Error{Code: cay.CodeConflict, Layer: cay.LayerPlacement,
			Message: fmt.Sprintf("sandbox %s was killed while it started", id), Fix: "create a new one"})
		select {
		case <-s.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		o.mu.Lock()
		g = o.bySbx[id] // it may have won the race
		o.mu.Unlock()
		if g == nil {
			return nil
		}
	}
	if g == nil {
		return errNotFound(id)
	}
	o.end(g, reason, "")
	select {
	case <-g.gone:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// SetDeadline implements [cay.Node].
func (o *Orchestrator) SetDeadline(_ context.Context, id cay.SandboxID, t time.Time) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	g := o.bySbx[id]
	if g == nil || (g.rec.Phase != running && g.rec.Phase != saving) {
		return errNotFound(id)
	}
	g.rec.Deadline = t
	if err := o.records.write(g.rec); err != nil {
		return storageError("write the node's record of sandbox "+string(id), err)
	}
	return nil
}

// Get implements [cay.Node].
func (o *Orchestrator) Get(_ context.Context, id cay.SandboxID) (cay.NodeSandbox, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	g := o.bySbx[id]
	if g == nil || g.rec.Phase == ending {
		return cay.NodeSandbox{}, errNotFound(id)
	}
	return o.view(g), nil
}

// List implements [cay.Node].
func (o *Orchestrator) List(context.Context) ([]cay.NodeSandbox, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := make([]cay.NodeSandbox, 0, len(o.bySbx))
	for _, g := range o.bySbx {
		if g.rec.Phase != ending {
			out = append(out, o.view(g))
		}
	}
	return out, nil
}

// view must be called with mu held.
func (o *Orchestrator) view(g *guest) cay.NodeSandbox {
	r := g.rec
	return cay.NodeSandbox{Envd: r.Envd, EnvdOutdated: o.Envd.Digest != "" && r.Envd != o.Envd.Digest, ID: r.Sandbox, ExecutionID: r.Execution, TeamID: r.Team, Template: r.Template,
		Build: r.Build, Resources: r.Resources, State: cay.StateRunning, StartedAt: r.StartedAt, Deadline: r.Deadline,
		EnvdVersion: r.EnvdVersion, Egress: r.seenEgress(), Adopted: g.adopted, Restored: r.Restored, Degraded: r.Degraded,
		Host: cay.SandboxOnHost{Runtime: o.runtimeName, RuntimeVersion: r.Engine.Version, Container: string(r.Execution), Address: r.Addr,
			NetNS: r.NetNS, RootFS: r.RootFS, DiskImage: r.DiskImage}}
}

// Inspect is Get with what only the engine knows.
func (o *Orchestrator) Inspect(ctx context.Context, id cay.SandboxID) (cay.NodeSandbox, error) {
	s, err := o.Get(ctx, id)
	if err != nil {
		return s, err
	}
	all, err := o.Runtime.Instances(ctx)
	if err != nil {
		return s, err
	}
	for _, in := range all {
		if string(in.ID) == s.Host.Container {
			s.Host.PID = in.PID
		}
	}
	return s, nil
}

// Console implements [cay.Node].
func (o *Orchestrator) Console(ctx context.Context, id cay.SandboxID) ([]cay.ConsoleLine, error) {
	o.mu.Lock()
	g := o.bySbx[id]
	o.mu.Unlock()
	if g == nil {
		if p, ok := o.past.get(id); ok {
			return p.console, nil
		}
		return nil, errNotFound(id)
	}
	return o.Runtime.Console(ctx, runtime.InstanceID(g.rec.Execution))
}

// Trace implements [cay.Node].
func (o *Orchestrator) Trace(_ context.Context, id cay.SandboxID) ([]cay.StartStep, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if g := o.bySbx[id]; g != nil {
		return append([]cay.StartStep(nil), g.rec.Steps...), nil
	}
	if p, ok := o.past.get(id); ok {
		return p.steps, nil
	}
	return nil, errNotFound(id)
}

// Watch implements [cay.Node].
func (o *Orchestrator) Watch(ctx context.Context, f func(cay.SandboxEnd)) error {
	return o.ends.watch(ctx, f)
}

// Info implements [cay.Node].
func (o *Orchestrator) Info(ctx context.Context) (cay.NodeInfo, error) {
	info, err := o.Runtime.Info(ctx)
	if err != nil {
		return cay.NodeInfo{}, err
	}
	mem, err := meminfo.Total()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return cay.NodeInfo{}, fmt.Errorf("reading the machine's memory: %w", err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	n := cay.NodeInfo{ID: o.Node, Version: cay.Version, Runtime: info.Name, RuntimeVersion: info.Version,
		CPUs: goruntime.NumCPU(), MemoryBytes: mem, Sandboxes: len(o.bySbx)}
	for _, g := range o.guests {
		if g.rec.Phase == pooled {
			n.PoolReady++
		}
	}
	return n, nil
}
