package orchestrator

import (
	"context"
	"errors"
	"fmt"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// reconcile makes the node's records and the host agree, after a crash as
// after a clean stop. It may itself be killed at any point and run again.
//
//   - running and the engine lives: adopt, route, watch.
//   - saving: finish the pause whose snapshot is whole, undo any other.
//   - pooled and the engine lives: adopt into the pool.
//   - booting, running but not told yet what it is, ending, or the engine is
//     gone: roll forward to removal; a sandbox's end is reported with its
//     reason.
//   - an engine instance, a disk or a slot that no record names: remove.
func (o *Orchestrator) reconcile(ctx context.Context) error {
	recs, errs := o.records.readAll()
	o.unread = len(errs) > 0
	for _, err := range errs {
		o.log().Error("a record of the node cannot be used; what it names is left alone", "error", err)
	}
	instances, err := o.Runtime.Instances(ctx)
	if err != nil {
		return err
	}
	live := map[cay.ExecutionID]runtime.Instance{}
	for _, in := range instances {
		live[cay.ExecutionID(in.ID)] = in
	}
	owned := map[cay.ExecutionID]bool{}
	var doomed, saves []*guest
	half := map[cay.SnapshotID]bool{} // in the making
	for _, r := range recs {
		owned[r.Execution] = true
		if r.Engine.Version == "" {
			r.Engine = o.engine
		}
		g := &guest{rec: r, adopted: true, exited: make(chan struct{}), left: make(chan struct{}), gone: make(chan struct{})}
		o.mu.Lock()
		o.guests[r.Execution] = g
		// One that was paused is its snapshot, or runs again as another guest.
		if r.Sandbox != "" && r.Phase != booting && (r.Phase != ending || r.EndReason != cay.EndPaused) {
			o.bySbx[r.Sandbox] = g
		}
		o.mu.Unlock()
		if r.Slot >= 0 {
			if _, err := o.Slots.Adopt(ctx, r.Slot); err != nil && (r.Phase == running || r.Phase == saving) {
				g.exit = runtime.Exit{Reason: cay.EndNodeLost, Code: -1, Message: "its network slot is gone"}
				o.log().Error("the network slot of a running sandbox is gone", "sandbox", r.Sandbox, "slot", r.Slot, "error", err)
				doomed = append(doomed, g)
				continue
			}
		}
		if r.Saving != "" {
			half[r.Saving] = true
		}
		in, known := live[r.Execution]
		lives := known && (in.State == runtime.Running || in.State == runtime.Frozen)
		keep := lives && !r.Untold && (r.Phase == running || r.Phase == saving || (r.Phase == pooled && r.Sandbox == "" && o.PoolSize > 0))
		if !keep {
			if known && in.Exit != nil {
				g.exit = *in.Exit
			} else {
				g.exit = runtime.Exit{Reason: cay.EndNodeLost, Code: -1, Message: "the machine or the engine went away while no server ran"}
			}
			doomed = append(doomed, g)
			continue
		}
		if r.Phase != pooled {
			o.reconfine(ctx, g)
		}
		if r.Phase == saving {
			saves = append(saves, g)
		}
		if r.Phase == running || r.Phase == saving {
			if err := o.publish(ctx, g); err != nil {
				return fmt.Errorf("routing the adopted sandbox %s: %w", r.Sandbox, err)
			}
			o.log().Info("sandbox adopted", "sandbox", r.Sandbox, "execution", r.Execution)
		}
		if r.Phase == pooled {
			// Stays hot, or the pool would throw it away at once.
			o.mu.Lock()
			o.hot[poolKey{r.Build, r.Resources}] = o.now()
			o.mu.Unlock()
		}
		if r.Restored {
			o.followLoad(g)
		}
		o.watch(g)
		o.settle(g)
	}
	for _, g := range saves {
		if err := o.recoverSave(ctx, g); err != nil {
			o.log().Error("an interrupted snapshot could not be undone", "sandbox", g.rec.Sandbox, "error", err)
		}
	}
	if len(errs) > 0 {
		// What an unreadable record names cannot be told from garbage, so
		// nothing unowned is removed in this run.
		return nil
	}
	for _, g := range doomed {
		o.endRecovered(g)
	}
	if err := o.snapshots.dropHalf(half); err != nil {
		return err
	}
	return o.sweep(ctx, live, owned, half)
}

// endRecovered removes what an earlier run left of a guest.
func (o *Orchestrator) endRecovered(g *guest) {
	reason, msg := g.exit.Reason, g.exit.Message
	switch {
	case g.rec.Phase == booting, g.rec.Phase == running && g.rec.Untold:
		reason, msg = cay.EndStartFailed, "the server stopped while the sandbox started"
	case g.rec.Phase == saving:
		if _, _, err := o.snapshots.load(g.rec.Saving); err == nil && g.rec.SavePauses {
			reason, msg = cay.EndPaused, "" // the snapshot is whole, so nothing is lost
		}
	case g.rec.Phase == ending:
		// The removal was under way: go on with it, with its own reason.
		o.wg.Go(func() { o.remove(context.WithoutCancel(o.life), g) })
		return
	}
	o.end(g, reason, msg)
}

// sweep removes what no record and no snapshot names. Those in half are being
// undone.
func (o *Orchestrator) sweep(ctx context.Context, live map[cay.ExecutionID]runtime.Instance, owned map[cay.ExecutionID]bool, half map[cay.SnapshotID]bool) error {
	var errs []error
	for id := range live {
		if !owned[id] {
			o.log().Warn("removing an instance that no record owns", "instance", id)
			errs = append(errs, o.Runtime.Kill(ctx, runtime.InstanceID(id)))
		}
	}
	disks, err := o.Disks.List(ctx)
	errs = append(errs, err)
	for _, id := range disks {
		if !owned[cay.ExecutionID(id)] {
			o.log().Warn("removing a disk that no record owns", "disk", id)
			errs = append(errs, o.Disks.Remove(ctx, id))
		}
	}
	// A snapshot is removed before its disk is.
	saved, err := o.Disks.ListSaved(ctx)
	errs = append(errs, err)
	for _, name := range saved {
		if id := cay.SnapshotID(name); !o.snapshots.there(id) && !half[id] {
			o.log().Warn("removing a saved disk that no snapshot owns", "snapshot", id)
			errs = append(errs, o.Disks.RemoveSaved(ctx, name))
		}
	}
	errs = append(errs, o.Slots.Sweep(ctx))
	return errors.Join(errs...)
}
