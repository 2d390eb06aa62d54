package orchestrator

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/disk"
	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/network"
	"github.com/cayhq/cay/runtime"
)

// guestPIDs is the number of processes and threads a guest may have. It is the
// guest's own limit; the engine's limit on the host is wider, because the
// engine needs threads of its own.
const guestPIDs = 2048

// boot says what to boot.
type boot struct {
	manifest cay.Manifest
	layers   []disk.Layer
	res      cay.Resources
	confined confined
	from     *origin
}

// op is what the boot is for.
func (b boot) op() killpoint.Op {
	if b.from != nil {
		return killpoint.Resume
	}
	return killpoint.Create
}

// origin is the snapshot a guest is booted from.
type origin struct {
	cay.Snapshot
	secrets snapshotSecrets
	memory  bool // restore it
}

// bootsAtOnce bounds parallel boots: a boot is CPU work, and more of them at
// once only makes each slower.
func bootsAtOnce() int { return max(2, goruntime.NumCPU()) }

// newToken returns a fresh control token.
func newToken() string {
	b := make([]byte, 32)
	rand.Read(b)
	return hex.EncodeToString(b)
}

func (g *guest) addr() GuestAddr {
	a, _ := netip.ParseAddr(g.rec.Addr) // we wrote it
	return GuestAddr{Addr: a, Token: cay.Secret(g.rec.ControlToken)}
}

// moveLocked is the one place where a guest changes its phase. It writes the
// record first: the host follows the record, never the other way round.
func (o *Orchestrator) moveLocked(g *guest, to phase) error {
	if !slices.Contains(legal[g.rec.Phase], to) {
		return fmt.Errorf("guest %s cannot move from %q to %q", g.rec.Execution, g.rec.Phase, to)
	}
	next := g.rec
	next.Phase = to
	name := string(to)
	if to == running && g.op == killpoint.Pause {
		name = "undo"
	}
	if err := o.writeLocked(g.op, next, name); err != nil {
		return err
	}
	g.rec.Phase = to
	return nil
}

// writeLocked writes a guest's record, with a point of an operation before and
// after each step.
func (o *Orchestrator) writeLocked(op killpoint.Op, r record, name string) error {
	if o.Fault == nil || r.Phase == pooled {
		return o.records.write(r)
	}
	return o.records.writeAt(r, func(step string) error { return o.Fault.At(op, "record."+name+"."+step) })
}

// step records how long a part of the start took. With an error it also keeps
// its text, so that the trace shows where a start failed.
func (o *Orchestrator) step(g *guest, name string, l cay.Layer, began time.Time, err error) {
	o.stepOf(g, "", name, l, began, err)
}

// stepOf is step for another operation than the start.
func (o *Orchestrator) stepOf(g *guest, op, name string, l cay.Layer, began time.Time, err error) {
	s := cay.StartStep{Op: op, Name: name, Layer: l, Took: o.now().Sub(began)}
	if err != nil {
		s.Error = err.Error()
	}
	o.mu.Lock()
	g.rec.Steps = append(g.rec.Steps, s)
	o.mu.Unlock()
}

// boot makes a guest and returns when its envd has proved that it is the build
// asked for. On an error, everything made is being removed.
func (o *Orchestrator) boot(ctx context.Context, b boot) (*guest, error) {
	queued := o.now()
	select {
	case o.turn <- struct{}{}:
		defer func() { <-o.turn }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	g := &guest{exited: make(chan struct{}), left: make(chan struct{}), gone: make(chan struct{}), rec: record{
		Format: recordFormat, Execution: cay.NewExecutionID(), Build: b.manifest.Build,
		Resources: b.res, BootedAt: queued, Slot: -1, ControlToken: newToken(), Engine: o.engine}}
	g.rec.has(b.manifest, b.from)
	g.op = b.op()
	if b.from != nil {
		g.rec.From, g.rec.Restored = b.from.ID, b.from.memory
		if b.from.memory {
			g.rec.Engine = o.engineOf(b.from.Snapshot)
			g.rec.ControlToken = b.from.secrets.ControlToken // until it is told another
		}
	}
	o.mu.Lock()
	if err := o.moveLocked(g, booting); err != nil {
		o.mu.Unlock()
		return nil, storageError("write the node's record of the sandbox", err)
	}
	o.guests[g.rec.Execution] = g
	o.mu.Unlock()
	o.step(g, "queue", cay.LayerPlacement, queued, nil)

	if err := o.bootSteps(ctx, g, b); err != nil {
		var typed *cay.Error
		if ctx.Err() != nil && !errors.As(err, &typed) {
			err = context.Cause(ctx) // says who gave up; "context canceled" does not
		}
		o.end(g, cay.EndStartFailed, err.Error())
		return nil, err
	}
	return g, nil
}

func (o *Orchestrator) bootSteps(ctx context.Context, g *guest, b boot) error {
	op := b.op()
	var slot network.Slot
	var root disk.Root
	// The group's context is not used for the two: cancelling one half-way
	// because the other failed saves nothing and tests less.
	var eg errgroup.Group
	eg.Go(func() (err error) {
		began := o.now()
		o.Fault.Pass(op, "network.before")
		slot, err = o.Slots.Acquire(ctx, b.confined.egress)
		o.Fault.Pass(op, "network.after")
		o.step(g, "network", cay.LayerNetwork, began, err)
		if err == nil {
			o.mu.Lock()
			g.rec.Slot, g.rec.Addr, g.rec.NetNS = slot.Index, slot.Addr.String(), slot.NetNS
			g.rec.setEgress(b.confined.egress)
			o.mu.Unlock()
			g.net.Lock()
			err = o.attach(ctx, g, b.confined)
			g.net.Unlock()
		}
		return err
	})
	eg.Go(func() (err error) {
		began := o.now()
		spec := disk.Spec{ID: string(g.rec.Execution), Layers: b.layers, SizeMB: b.res.DiskMB}
		if b.from != nil {
			spec.From = string(b.from.ID)
			if err := o.checkSavedDisk(b.from.Snapshot); err != nil {
				o.step(g, "disk", cay.LayerStorage, began, err)
				return err
			}
		}
		o.Fault.Pass(op, "disk.before")
		root, err = o.Disks.Create(ctx, spec)
		o.Fault.Pass(op, "disk.after")
		o.step(g, "disk", cay.LayerStorage, began, err)
		return err
	})
	if b.from != nil {
		eg.Go(func() error {
			began := o.now()
			err := o.readSavedDisk(ctx, b.from.Snapshot, false)
			o.step(g, "verify disk", cay.LayerStorage, began, err)
			return err
		})
	}
	if b.from != nil && b.from.memory {
		eg.Go(func() error {
			began := o.now()
			o.Fault.Pass(op, "verify.before")
			err := o.snapshots.checkMemory(ctx, b.from.Snapshot)
			o.Fault.Pass(op, "verify.after")
			o.step(g, "verify", cay.LayerStorage, began, err)
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	o.mu.Lock()
	g.rec.RootFS, g.rec.DiskImage = root.Path, root.Image
	err := o.writeLocked(op, g.rec, "host")
	rec := g.rec
	o.mu.Unlock()
	if err != nil {
		return storageError("write the node's record of the sandbox", err)
	}

	began := o.now()
	o.Fault.Pass(op, "engine.before")
	err = o.Runtime.Create(ctx, runtime.Spec{
		ID: runtime.InstanceID(rec.Execution), Engine: rec.Engine, RootFS: root.Path, NetNS: slot.NetNS,
		Args: []string{b.manifest.Init},
		Env: []string{
			"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			"CAY_CONTROL_TOKEN=" + rec.ControlToken,
			"CAY_BUILD=" + string(rec.Build),
			"CAY_INSTANCE=" + string(rec.Execution),
			"CAY_PIDS=" + strconv.Itoa(guestPIDs),
			"GOMAXPROCS=1", // of PID 1 alone, which then needs fewer threads
		},
		Hostname: "sandbox",
		Restore:  b.from != nil && b.from.memory,
		Limits:   runtime.Limits{CPUs: b.res.CPUs, MemoryBytes: int64(b.res.MemoryMB) << 20, PIDs: guestPIDs},
		Labels:   map[string]string{"build": string(rec.Build)},
	})
	o.Fault.Pass(op, "engine.after")
	o.step(g, "engine", cay.LayerRuntime, began, err)
	if err != nil {
		return err
	}
	began = o.now()
	o.Fault.Pass(op, "start.before")
	want := GuestIdentity{Build: b.manifest.Build, Instance: string(rec.Execution)}
	if b.from != nil && b.from.memory {
		want.Instance = string(b.from.Execution) // what it was when it was saved
		err = o.Runtime.Restore(ctx, runtime.InstanceID(rec.Execution), o.snapshots.path(b.from.ID, memoryName))
		o.step(g, "restore", cay.LayerRuntime, began, err)
		if err == nil {
			o.followLoad(g)
		}
	} else {
		err = o.Runtime.Start(ctx, runtime.InstanceID(rec.Execution))
		o.step(g, "start", cay.LayerRuntime, began, err)
	}
	o.Fault.Pass(op, "start.after")
	if err != nil {
		return err
	}
	o.watch(g)
	began = o.now()
	o.Fault.Pass(op, "ready.before")
	err = o.ready(ctx, g, want)
	o.Fault.Pass(op, "ready.after")
	o.step(g, "ready", cay.LayerEnvd, began, err)
	return err
}

// watch follows the engine's process until it ends or the server lets go.
func (o *Orchestrator) watch(g *guest) {
	o.wg.Go(func() {
		exit, err := o.waitExit(runtime.InstanceID(g.rec.Execution))
		if err != nil {
			return // the server lets go; the next one watches
		}
		g.exit = exit
		close(g.exited)
		// A guest that ended on its own while it belonged to somebody, or
		// waited in the pool. During a start the starter finds out and tells
		// more; end() is then a repetition without effect.
		o.mu.Lock()
		ph := g.rec.Phase
		o.mu.Unlock()
		if ph == running || ph == pooled || ph == saving {
			o.end(g, exit.Reason, exit.Message)
		}
	})
}

// waitExit asks the runtime until it knows, over restarts of its supervisor.
func (o *Orchestrator) waitExit(id runtime.InstanceID) (runtime.Exit, error) {
	pause := 50 * time.Millisecond
	for {
		exit, err := o.Runtime.Wait(o.life, id)
		if err == nil {
			return exit, nil
		}
		if o.life.Err() != nil {
			return runtime.Exit{}, o.life.Err()
		}
		if cay.CodeOf(err) == cay.CodeNotFound {
			return runtime.Exit{Reason: cay.EndEngineCrash, Code: -1, At: o.now(),
				Message: "the engine has no trace of the guest any more"}, nil
		}
		o.log().Warn("the runtime does not answer, asking again", "instance", id, "error", err)
		select {
		case <-time.After(pause):
			pause = min(2*pause, 2*time.Second)
		case <-o.life.Done():
			return runtime.Exit{}, o.life.Err()
		}
	}
}

// stage is how far a booting guest got, for the error.
type stage string

const (
	stageLink stage = "the guest's address does not answer" // no route, no ARP, no TCP
	stageTCP  stage = "the guest's network is up but envd does not listen yet"
	stageHTTP stage = "the guest accepts connections but envd does not answer correctly"
)

// Pauses between two questions to a booting guest: short while most guests open
// their port, a question costing one SYN only; longer later.
const (
	firstPauses = 30
	firstPause  = time.Millisecond
	lastPause   = 25 * time.Millisecond
)

// ready asks the guest's control port who it is until it says so.
//
// PID 1 opens that port before it starts envd, so that the question that gets
// through waits there for envd's answer.
func (o *Orchestrator) ready(ctx context.Context, g *guest, want GuestIdentity) error {
	o.mu.Lock()
	addr := g.addr()
	o.mu.Unlock()
	at := stageLink
	var last error
	pause := firstPause
	for n := 0; ; n++ {
		try, cancel := context.WithTimeout(ctx, time.Second)
		id, err := o.Guest.Identity(try, addr)
		cancel()
		switch {
		case err == nil:
			return o.checkIdentity(g, id, want)
		case errors.Is(err, errNotListening):
			at = stageTCP
		case !isTimeout(err), !inDial(err):
			at = stageHTTP
		}
		last = err
		select {
		case <-g.exited:
			return o.diedDuring(ctx, g, "starting")
		case <-ctx.Done():
			return o.notReady(ctx, g, at, last)
		case <-time.After(pause):
			if n >= firstPauses {
				pause = min(pause+pause/4+time.Millisecond/2, lastPause)
			}
		}
	}
}

// inDial reports whether a connection was not even made.
func inDial(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || (errors.As(err, &t) && t.Timeout())
}

func (o *Orchestrator) notReady(ctx context.Context, g *guest, at stage, last error) error {
	cause := context.Cause(ctx)
	var why *cay.Error
	if !errors.As(cause, &why) || why.Code != cay.CodePlacementTimeout {
		return cause // the caller went away, or somebody killed it
	}
	return &cay.Error{Code: cay.CodeEnvdUnreachable, Layer: cay.LayerEnvd,
		Message: fmt.Sprintf("the guest did not become ready within %s: %s (%v)", o.StartTimeout, at, last),
		Fix:     "run `cay doctor --deep`; the console tail in `cay sandbox inspect` shows what the guest said",
		Detail:  o.consoleDetail(context.WithoutCancel(ctx), g), Err: last}
}

// checkIdentity compares what booted with what was asked for, and with the envd
// that it is to have.
func (o *Orchestrator) checkIdentity(g *guest, id, want GuestIdentity) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if id.Build != want.Build || id.Instance != want.Instance || !g.rec.may(id.EnvdDigest) {
		return &cay.Error{Code: cay.CodeRootfsMismatch, Layer: cay.LayerTemplate,
			Message: fmt.Sprintf("the guest that answered is not the one asked for: want build %s with envd %s, got build %s with envd %s",
				want.Build, g.rec.Envd, id.Build, id.EnvdDigest),
			Fix: "run `cay template refresh` to rebuild the template's agent layer"}
	}
	if id.EnvdDigest != "" && id.EnvdDigest == g.rec.EnvdOther {
		g.rec.Envd, g.rec.EnvdOther = g.rec.EnvdOther, g.rec.Envd
	}
	g.rec.EnvdVersion = id.EnvdVersion
	return nil
}

// diedDuring explains a guest that ended while something was done with it.
func (o *Orchestrator) diedDuring(ctx context.Context, g *guest, what string) error {
	select {
	case <-g.exited:
	default:
		if err := context.Cause(ctx); err != nil {
			return err
		}
		return &cay.Error{Code: cay.CodeGuestExited, Layer: cay.LayerGuest,
			Message: "the sandbox was ended while " + what, Fix: "create a new one"}
	}
	code, layer, fix := cay.CodeInitFailed, cay.LayerInit, "the console tail says why; `cay doctor --deep` tries a known good guest"
	switch g.exit.Reason {
	case cay.EndOOM:
		code, layer, fix = cay.CodeGuestOOM, cay.LayerGuest, "give the template more memory"
	case cay.EndEngineCrash:
		code, layer, fix = cay.CodeEngineFailed, cay.LayerRuntime, "run `cay doctor --deep`; the engine's log is beside the instance under the data directory"
	}
	detail := o.consoleDetail(context.WithoutCancel(ctx), g)
	msg := fmt.Sprintf("the guest ended while %s: %s", what, g.exit.Message)
	if tail := detail["console"]; tail != "" {
		msg += "; last console lines: " + strings.ReplaceAll(tail, "\n", " | ")
	}
	return &cay.Error{Code: code, Layer: layer, Message: msg, Fix: fix, Detail: detail}
}

// consoleDetail returns the last lines of the guest's console as evidence.
func (o *Orchestrator) consoleDetail(ctx context.Context, g *guest) map[string]string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	lines, err := o.Runtime.Console(ctx, runtime.InstanceID(g.rec.Execution))
	if err != nil || len(lines) == 0 {
		return map[string]string{}
	}
	lines = lines[max(0, len(lines)-5):]
	text := make([]string, len(lines))
	for i, l := range lines {
		text[i] = l.Text
	}
	return map[string]string{"console": strings.Join(text, "\n")}
}
