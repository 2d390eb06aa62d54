package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/runtime"
)

var _ cay.Snapshots = (*Orchestrator)(nil)

// Save implements [cay.Snapshots].
//
// The guest stands still from the moment its memory is written until its disk
// is cloned; both belong to that same instant.
func (o *Orchestrator) Save(ctx context.Context, id cay.SandboxID, q cay.SaveRequest) (cay.Snapshot, error) {
	if err := o.snapshots.free(q.Snapshot); err != nil {
		return cay.Snapshot{}, err
	}
	// A save once begun is finished whether or not the caller waits: half of
	// one would have to be undone, which costs as much.
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), saveTimeout)
	defer stop()
	o.mu.Lock()
	g := o.bySbx[id]
	if g == nil || g.rec.Phase == ending {
		o.mu.Unlock()
		return cay.Snapshot{}, errNotFound(id)
	}
	if g.rec.Phase != running || !o.open {
		o.mu.Unlock()
		return cay.Snapshot{}, &cay.Error{Code: cay.CodeSandboxTransition, Layer: cay.LayerRuntime,
			Message: fmt.Sprintf("another operation on sandbox %s is under way", id), Fix: "try again when it is done"}
	}
	g.rec.Saving, g.rec.SavePauses = q.Snapshot, q.Pause
	g.op = killpoint.Snapshot
	if q.Pause {
		g.op = killpoint.Pause
	}
	op := g.op
	began := o.now()
	// Only the steps of the last save are kept.
	g.rec.Steps = slices.DeleteFunc(g.rec.Steps, func(s cay.StartStep) bool { return s.Op != "" })
	if err := o.moveLocked(g, saving); err != nil {
		g.rec.Saving, g.rec.SavePauses = "", false
		o.mu.Unlock()
		return cay.Snapshot{}, storageError("write the node's record of sandbox "+string(id), err)
	}
	o.wg.Add(1)
	o.mu.Unlock()
	defer o.wg.Done()

	o.stepOf(g, string(op), "record", cay.LayerStorage, began, nil)
	m, frozen, err := o.save(ctx, g, q, op)
	if err != nil {
		undo := o.now()
		uerr := o.unsave(ctx, g, op, q.Snapshot)
		o.stepOf(g, string(op), "undo", cay.LayerRuntime, undo, uerr)
		return m, errors.Join(err, uerr)
	}
	o.log().Info("sandbox saved", "sandbox", id, "execution", g.rec.Execution, "snapshot", q.Snapshot, "pause", q.Pause,
		"frozen", frozen, "took", o.now().Sub(began))
	if !q.Pause {
		o.Fault.Pass(op, "go-on.before")
		err := o.goOn(ctx, g)
		o.Fault.Pass(op, "go-on.after")
		return m, err
	}
	// The snapshot is what there is of the sandbox from now on. What is left of
	// the guest, which stands still, is on record and is removed by this run or
	// the next: nobody waits for that.
	o.end(g, cay.EndPaused, "")
	select {
	case <-g.left:
		return m, nil
	case <-o.life.Done():
		return m, errShuttingDown() // the pause is on record: the next run finishes it
	}
}

// saveTimeout bounds a save; a guest with much memory on a slow disk takes its
// time.
const saveTimeout = 10 * time.Minute

// healthTimeout is how long a guest that shall be healthy may take to answer.
const healthTimeout = 5 * time.Second

// thawPatience bounds the pauses between tries to thaw a guest.
const thawPatience = 3 * time.Second

// save does the work. It returns for how long the guest stood still, unless it
// still does.
func (o *Orchestrator) save(ctx context.Context, g *guest, q cay.SaveRequest, op killpoint.Op) (m cay.Snapshot, frozen time.Duration, err error) {
	at := func(step string) error { return o.Fault.At(op, step) }
	timed := func(name string, l cay.Layer, do func() error) error {
		began := o.now()
		err := do()
		o.stepOf(g, string(op), name, l, began, err)
		return err
	}
	// step is timed between two points at which the process may die.
	step := func(name string, l cay.Layer, do func() error) error {
		o.Fault.Pass(op, name+".before")
		err := timed(name, l, do)
		if err == nil {
			o.Fault.Pass(op, name+".after")
		}
		return err
	}
	exec := g.rec.Execution
	instance := runtime.InstanceID(exec)
	memory, err := o.snapshots.begin(q.Snapshot, at)
	if err != nil {
		return m, 0, err
	}
	o.Fault.Pass(op, "directory.after")
	o.mu.Lock()
	addr, rec := g.addr(), g.rec
	o.mu.Unlock()
	if q.Healthy {
		err := timed("health", cay.LayerEnvd, func() error {
			ask, stop := context.WithTimeout(ctx, healthTimeout)
			defer stop()
			_, err := o.Guest.Identity(ask, addr)
			return err
		})
		if err != nil {
			return m, 0, &cay.Error{Code: cay.CodeGuestUnresponsive, Layer: cay.LayerEnvd,
				Message: "the daemon in the guest does not answer: " + err.Error(), Fix: "try again, or save the guest as it is", Err: err}
		}
	}
	if !q.Memory {
		// Without its memory the guest will come back as after a power cut, so
		// its file systems are told to write everything first.
		err := step("sync", cay.LayerEnvd, func() error { return o.Guest.Sync(ctx, addr) })
		if err != nil {
			return m, 0, &cay.Error{Code: cay.CodeGuestUnresponsive, Layer: cay.LayerEnvd,
				Message: "the guest could not write back its files before the snapshot: " + err.Error(), Fix: "try again", Err: err}
		}
	}
	// What is written back now is not written while the guest stands still.
	if err := step("flush", cay.LayerStorage, func() error { return o.flushMost(exec) }); err != nil {
		return m, 0, err
	}
	if q.Pause {
		// Who comes from now on must not reach a guest that stands still, and
		// be cut off with it: the proxy holds him back until it is known
		// whether the sandbox sleeps or runs on.
		o.Fault.Pass(op, "hold-back.before")
		if err := o.Catalog.Delete(ctx, rec.Sandbox, rec.Execution); err != nil {
			return m, 0, err
		}
		o.Fault.Pass(op, "hold-back.after")
	}
	stopped := o.now()
	if err := step("freeze", cay.LayerRuntime, func() error { return o.Runtime.Freeze(ctx, instance) }); err != nil {
		return m, 0, o.savingDied(g, err)
	}
	if q.Memory {
		if err := step("checkpoint", cay.LayerRuntime, func() error { return o.Runtime.Checkpoint(ctx, instance, memory) }); err != nil {
			return m, 0, o.savingDied(g, err)
		}
	}
	if err := step("disk", cay.LayerStorage, func() error { return o.Disks.Clone(ctx, string(exec), string(q.Snapshot)) }); err != nil {
		return m, 0, err
	}
	if !q.Pause {
		if err := step("thaw", cay.LayerRuntime, func() error { return o.Runtime.Thaw(ctx, instance) }); err != nil {
			return m, 0, o.savingDied(g, err)
		}
		frozen = o.now().Sub(stopped)
	}
	m = cay.Snapshot{Format: cay.SnapshotFormat, ID: q.Snapshot, CreatedAt: stopped, Sandbox: rec.Sandbox, Execution: rec.Execution,
		Team: rec.Team, Template: rec.Template, Build: rec.Build, Resources: rec.Resources, EnvdVersion: rec.EnvdVersion, Envd: rec.Envd, EnvdOther: rec.EnvdOther,
		Parent: rec.From, Runtime: o.runtimeName, RuntimeVersion: rec.Engine.Version, Engine: rec.Engine.Program}
	err = timed("digest", cay.LayerStorage, func() error {
		var read errgroup.Group
		m.Transient = q.Transient
		if q.Memory && !q.Transient {
			read.Go(func() error { return o.snapshots.keepMemory(q.Snapshot, at) })
		}
		read.Go(func() error {
			o.Fault.Pass(op, "disk-kept.before")
			saved, err := o.Disks.Keep(ctx, string(q.Snapshot), !q.Transient)
			o.Fault.Pass(op, "disk-kept.after")
			if err != nil {
				return err
			}
			if m.Disk, err = stamp(saved.File); err != nil {
				return storageError("look at the saved disk of snapshot "+string(q.Snapshot), err)
			}
			if q.Transient {
				return nil
			}
			if m.Disk.Check, err = checkSmall(ctx, saved.File); err != nil {
				return storageError("read back the disk of snapshot "+string(q.Snapshot), err)
			}
			return nil
		})
		if q.Memory {
			read.Go(func() error {
				err := at("digest.before-read")
				if err == nil && q.Transient {
					m.Memory, err = sizesOf(memory)
				} else if err == nil {
					m.Memory, err = measure(ctx, memory)
				}
				if err != nil {
					return storageError("read back the memory of snapshot "+string(q.Snapshot), err)
				}
				return nil
			})
		}
		return read.Wait()
	})
	if err != nil {
		return m, frozen, err
	}
	return m, frozen, timed("manifest", cay.LayerStorage, func() error {
		return o.snapshots.commit(m, snapshotSecrets{ControlToken: rec.ControlToken}, at)
	})
}

// savingDied says so when an operation failed because the guest ended.
func (o *Orchestrator) savingDied(g *guest, err error) error {
	select {
	case <-g.exited:
		return &cay.Error{Code: cay.CodeGuestExited, Layer: cay.LayerGuest,
			Message: "the sandbox ended while it was being saved: " + g.exit.Message, Fix: "create a new one", Err: err}
	default:
		return err
	}
}

// unsave rolls a failed save back: the guest runs on, and nothing of the
// snapshot is left, also not of one that became visible and may not be durable.
func (o *Orchestrator) unsave(ctx context.Context, g *guest, op killpoint.Op, id cay.SnapshotID) error {
	o.Fault.Pass(op, "undo.drop.before")
	err := o.forget(ctx, id, nil)
	o.Fault.Pass(op, "undo.drop.after")
	if op == killpoint.Snapshot {
		return errors.Join(err, o.goOn(ctx, g))
	}
	o.Fault.Pass(op, "undo.go-on.before")
	err = errors.Join(err, o.goOn(ctx, g))
	o.Fault.Pass(op, "undo.go-on.after")
	return err
}

// goOn lets a guest run after a save.
func (o *Orchestrator) goOn(ctx context.Context, g *guest) error {
	var err error
	for pause := 20 * time.Millisecond; pause < thawPatience; pause *= 2 {
		if err = o.Runtime.Thaw(ctx, runtime.InstanceID(g.rec.Execution)); err == nil {
			break
		}
		select {
		case <-time.After(pause): // the engine's supervisor may be starting again
		case <-g.exited:
			pause = thawPatience
		case <-ctx.Done():
			pause = thawPatience
		}
	}
	o.mu.Lock()
	if g.rec.Phase != saving { // it ended, or was killed
		o.mu.Unlock()
		return nil
	}
	paused := g.rec.SavePauses
	g.rec.Saving, g.rec.SavePauses = "", false
	if merr := o.moveLocked(g, running); merr != nil {
		// On record it is still being saved. Whoever reads that lets it run on,
		// too: of a pause there is no snapshot, and nothing else ends with one.
		g.rec.Phase = running
		o.log().Error("the record of a guest that runs on after a save cannot be written; trying again", "execution", g.rec.Execution, "error", merr)
		o.wg.Go(func() { o.rewrite(g) })
	}
	o.mu.Unlock()
	if paused { // it was taken out of the catalog
		o.again("routing a sandbox whose pause failed", g.rec.Execution, func() error {
			if err := o.publish(ctx, g); cay.CodeOf(err) == cay.CodeInternal {
				return err
			}
			return nil // or it has ended
		})
	}
	select {
	case <-g.exited: // it died before watch() could see it running
		o.end(g, g.exit.Reason, g.exit.Message)
		return nil
	default:
	}
	if err != nil {
		// A guest that cannot be thawed is of no use to anybody.
		o.log().Error("a guest does not go on after a save", "execution", g.rec.Execution, "error", err)
		o.end(g, cay.EndEngineCrash, "the guest could not be thawed after a snapshot: "+err.Error())
	}
	return err
}

// rewrite writes the record of a guest that runs, until that works.
func (o *Orchestrator) rewrite(g *guest) {
	o.again("writing the record", g.rec.Execution, func() error {
		o.mu.Lock()
		defer o.mu.Unlock()
		if g.rec.Phase != running {
			return nil // another move has written it, or will
		}
		return o.records.write(g.rec)
	})
}

// recoverSave finishes or undoes the save that a crash interrupted: a whole
// snapshot of a pause is the sandbox from then on; everything else runs on.
func (o *Orchestrator) recoverSave(ctx context.Context, g *guest) error {
	_, _, err := o.snapshots.load(g.rec.Saving)
	if err == nil && g.rec.SavePauses {
		o.log().Info("finishing the pause that was interrupted", "sandbox", g.rec.Sandbox, "snapshot", g.rec.Saving)
		o.end(g, cay.EndPaused, "")
		return nil
	}
	if err == nil {
		return o.goOn(ctx, g)
	}
	o.log().Info("undoing the snapshot that was interrupted", "sandbox", g.rec.Sandbox, "snapshot", g.rec.Saving)
	return o.unsave(ctx, g, "", g.rec.Saving)
}

// dropUnsaved removes what a save left whose guest ended before the snapshot
// was whole.
func (o *Orchestrator) dropUnsaved(ctx context.Context, id cay.SnapshotID) error {
	if _, _, err := o.snapshots.load(id); cay.CodeOf(err) != cay.CodeNotFound {
		return nil // whole, or damaged later: not ours to remove
	}
	return errors.Join(o.snapshots.abandon(id), o.Disks.RemoveSaved(ctx, string(id)))
}

// bootFrom makes a guest of a snapshot, as the mode says.
func (o *Orchestrator) bootFrom(ctx context.Context, b boot, c cay.SandboxConfig) (*guest, error) {
	m, secrets, err := o.snapshots.load(c.From)
	if err != nil {
		return nil, err
	}
	if m.Build != c.Build || m.Resources != c.Resources {
		return nil, &cay.Error{Code: cay.CodeSnapshotIncompatible, Layer: cay.LayerStorage,
			Message: fmt.Sprintf("snapshot %s is of build %s with %+v, not of build %s with %+v", m.ID, m.Build, m.Resources, c.Build, c.Resources),
			Fix:     "start it with its own build and resources"}
	}
	b.from = &origin{Snapshot: m, secrets: secrets}
	if c.Mode == cay.StartCold || (len(m.Memory) == 0 && c.Mode != cay.StartRestore) {
		return o.boot(ctx, b)
	}
	unfit := o.memoryFits(m)
	if unfit == nil {
		b.from.memory = true
		return o.boot(ctx, b)
	}
	if c.Mode == cay.StartRestore {
		return nil, unfit
	}
	o.log().Warn("starting a sandbox cold, though its memory was saved", "sandbox", c.ID, "snapshot", m.ID, "error", unfit)
	g, err := o.boot(ctx, b)
	if err == nil {
		o.mu.Lock()
		g.rec.Degraded = unfit.Error()
		o.mu.Unlock()
	}
	return g, err
}

// memoryFits says why the memory of a snapshot cannot be restored here, if it
// cannot: it is not there, or of another engine. Damaged memory is not judged
// here: to go on without it, unasked, would hide that something was lost.
func (o *Orchestrator) memoryFits(m cay.Snapshot) error {
	if len(m.Memory) == 0 {
		return &cay.Error{Code: cay.CodeSnapshotIncompatible, Layer: cay.LayerStorage,
			Message: fmt.Sprintf("snapshot %s has no memory: only its disk was saved", m.ID), Fix: "start it cold"}
	}
	if m.Runtime != o.runtimeName || !o.hasEngine(o.engineOf(m)) {
		return &cay.Error{Code: cay.CodeSnapshotIncompatible, Layer: cay.LayerRuntime,
			Message: fmt.Sprintf("the memory of snapshot %s was written by %s %s; this node has %s %s", m.ID, m.Runtime, m.RuntimeVersion, o.runtimeName, o.engine.Version),
			Fix:     "start it cold (memory: false), or with the version of Cay that wrote it"}
	}
	for _, p := range m.Memory {
		if _, err := os.Stat(o.snapshots.path(m.ID, memoryName, p.Name)); errors.Is(err, fs.ErrNotExist) {
			return errCorrupt(m.ID, p.Name, "it is missing", err)
		}
	}
	return nil
}

// checkSavedDisk makes sure that the saved disk is the one of the manifest.
func (o *Orchestrator) checkSavedDisk(m cay.Snapshot) error {
	saved, err := o.Disks.FindSaved(string(m.ID))
	if err != nil {
		return errCorrupt(m.ID, m.Disk.Name, "it is missing", err)
	}
	return checkDisk(m, saved.File)
}

// readSavedDisk compares what the saved disk holds with its checksum, as far as
// there is one. Before a start, which may not wait for so long, a large disk is
// not read.
func (o *Orchestrator) readSavedDisk(ctx context.Context, m cay.Snapshot, large bool) error {
	if m.Disk.Check == "" && !large {
		return nil
	}
	want, err := o.snapshots.checkOfDisk(m)
	if err != nil || want == "" {
		return err
	}
	saved, err := o.Disks.FindSaved(string(m.ID))
	if err != nil {
		return errCorrupt(m.ID, m.Disk.Name, "it is missing", err)
	}
	return checkContent(ctx, m.ID, m.Disk.Name, saved.File, want)
}

// Snapshots implements [cay.Snapshots]. Those that cannot be read are logged and
// left out.
func (o *Orchestrator) Snapshots(context.Context) ([]cay.Snapshot, error) {
	out, errs := o.snapshots.list()
	for _, err := range errs {
		o.log().Error("a snapshot cannot be used", "error", err)
	}
	return out, nil
}

// DeleteSnapshot implements [cay.Snapshots].
func (o *Orchestrator) DeleteSnapshot(ctx context.Context, id cay.SnapshotID) error {
	if err := o.awaitLoads(ctx, id); err != nil {
		return err
	}
	err := o.forget(ctx, id, o.Fault)
	o.lookAtEngines()
	return err
}

// forget removes a snapshot, whole or half. When it is out of sight it is gone:
// what of it cannot be removed at once is tried again, and by the next start.
func (o *Orchestrator) forget(ctx context.Context, id cay.SnapshotID, h killpoint.Hook) error {
	if err := o.snapshots.hide(id, h); err != nil {
		return err
	}
	clean := func(ctx context.Context) error {
		err := h.At(killpoint.Drop, "snapshot.before-remove")
		if err == nil {
			err = o.snapshots.abandon(id)
		}
		h.Pass(killpoint.Drop, "snapshot.after")
		err = errors.Join(err, o.Disks.RemoveSaved(ctx, string(id)))
		h.Pass(killpoint.Drop, "disk.after")
		return err
	}
	err := clean(ctx)
	if err == nil {
		return nil
	}
	o.log().Error("a part of a snapshot that is gone cannot be removed; trying again", "snapshot", id, "error", err)
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open {
		o.wg.Go(func() {
			o.again("removing a part of snapshot "+string(id), "", func() error { return clean(context.WithoutCancel(o.life)) })
		})
	}
	return nil
}

// VerifySnapshot implements [cay.Snapshots]: it reads every byte of the memory
// and of the disk. A large disk that was saved a moment ago has no checksum yet;
// it is compared with its stamp.
func (o *Orchestrator) VerifySnapshot(ctx context.Context, id cay.SnapshotID) error {
	m, _, err := o.snapshots.load(id)
	if err != nil {
		return err
	}
	check := o.snapshots.digestMemory
	if m.Transient {
		check = o.snapshots.checkMemory
	}
	if len(m.Memory) > 0 {
		if err := check(ctx, m); err != nil {
			return err
		}
	}
	if err := o.checkSavedDisk(m); err != nil {
		return err
	}
	return o.readSavedDisk(ctx, m, true)
}
