package orchestrator

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"slices"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// engineOf returns the engine that restores the memory of a snapshot: ours if
// it is of the version that wrote it, and else that very one.
func (o *Orchestrator) engineOf(m cay.Snapshot) runtime.Engine {
	if m.RuntimeVersion == o.engine.Version {
		return o.engine
	}
	return runtime.Engine{Version: m.RuntimeVersion, Program: m.Engine}
}

// hasEngine reports whether an engine is there.
func (o *Orchestrator) hasEngine(e runtime.Engine) bool {
	if e == o.engine {
		return true
	}
	if o.Engines == nil || e.Program == "" {
		return false
	}
	names, err := o.Engines.List()
	if err != nil {
		o.log().Error("the programs of engines cannot be listed", "error", err)
	}
	return slices.Contains(names, e.Program)
}

// lookAtEngines has the engines that nobody needs any more removed.
func (o *Orchestrator) lookAtEngines() {
	select {
	case o.engineKick <- struct{}{}:
	default:
	}
}

// keepEngines removes engines that nobody needs, whenever a guest or a snapshot
// is gone, until ctx ends.
func (o *Orchestrator) keepEngines(ctx context.Context) {
	if o.Engines == nil {
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-o.engineKick:
		}
		if err := o.dropEngines(); err != nil {
			o.log().Error("an engine that nobody needs could not be removed", "error", err)
		}
	}
}

// dropEngines removes the engines that neither a guest nor a snapshot needs.
// While something cannot be read, what it needs is not known, and all stay.
func (o *Orchestrator) dropEngines() error {
	names, err := o.Engines.List()
	if err != nil {
		return err
	}
	names = slices.DeleteFunc(names, func(n string) bool { return n == o.engine.Program })
	if len(names) == 0 || o.unread {
		return nil
	}
	// Guests before and after the snapshots: one may become the other meanwhile.
	needed := map[string]bool{}
	o.needOfGuests(needed)
	all, errs := o.snapshots.list()
	if len(errs) > 0 {
		return nil // they were told of where snapshots are listed
	}
	for _, m := range all {
		if len(m.Memory) > 0 {
			needed[o.engineOf(m).Program] = true
		}
	}
	o.needOfGuests(needed)
	var failed []error
	for _, n := range names {
		if needed[n] {
			continue
		}
		if err := o.Engines.Remove(n); err != nil {
			failed = append(failed, err)
			continue
		}
		o.log().Info("an engine that nobody needs any more was removed", "program", n)
	}
	return errors.Join(failed...)
}

func (o *Orchestrator) needOfGuests(needed map[string]bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, g := range o.guests {
		needed[g.rec.Engine.Program] = true
	}
}

// Holders are who needs an engine: guests by their executions, and snapshots.
type Holders struct {
	Version   string
	Guests    []cay.ExecutionID
	Snapshots []cay.SnapshotID
}

// EngineHolders returns who needs which engine, by the names of their programs,
// from a node's directory of records and the one of its snapshots. It only
// reads, so it may run beside an orchestrator. What cannot be read is in the
// error; the rest is returned with it.
func EngineHolders(dir, snapshotDir string) (map[string]Holders, error) {
	recs, errs := readRecords(dir)
	out := map[string]Holders{}
	for _, r := range recs {
		h := out[r.Engine.Program]
		h.Version, h.Guests = r.Engine.Version, append(h.Guests, r.Execution)
		out[r.Engine.Program] = h
	}
	var all []cay.Snapshot
	var more []error
	if _, err := os.Stat(snapshotDir); !errors.Is(err, fs.ErrNotExist) { // absent: none was ever made
		all, more = snapshots{snapshotDir}.list()
	}
	for _, m := range all {
		if len(m.Memory) == 0 {
			continue // it starts on any engine
		}
		h := out[m.Engine]
		h.Version, h.Snapshots = m.RuntimeVersion, append(h.Snapshots, m.ID)
		out[m.Engine] = h
	}
	for _, name := range slices.Collect(maps.Keys(out)) {
		slices.Sort(out[name].Guests)
		slices.Sort(out[name].Snapshots)
	}
	return out, errors.Join(append(errs, more...)...)
}
