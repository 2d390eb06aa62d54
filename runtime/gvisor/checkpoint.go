package gvisor

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/sentry/state/checkpointfiles"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// freezing and thawing are in records only: the engine was asked, and whether
// it did is not known yet.
const (
	freezing runtime.State = "freezing"
	thawing  runtime.State = "thawing"
)

func (i *instance) state() runtime.State {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.rec.State
}

// expectRestore notes that the guest is saved: who does that means to restore it.
func (i *instance) expectRestore() {
	i.mu.Lock()
	k, engine := i.rec.Kind, i.rec.Engine
	i.mu.Unlock()
	if k != (kind{}) && engine == i.sup.engine {
		i.sup.heat(k)
	}
}

func (i *instance) wrongState(what string, st runtime.State) error {
	return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerRuntime,
		Message: fmt.Sprintf("instance %s is %s and cannot be %s", i.rec.ID, st, what)}
}

// freeze stops the guest's tasks. i.op is held.
//
// The engine counts stops, and one too many in the other direction ends it. So
// the record says what was asked before it is asked, and whoever finds such a
// record asks the engine first what came of it.
func (i *instance) freeze() error {
	return i.turn(runtime.Running, freezing, runtime.Frozen, "frozen", toFreeze)
}

// thaw lets the guest's tasks go on. i.op is held.
func (i *instance) thaw() error {
	return i.turn(runtime.Frozen, thawing, runtime.Running, "thawed", toThaw)
}

// turn moves the guest from one state to another, through the one that stands
// for an answer not known yet. A guest that is there already stays.
func (i *instance) turn(from, via, to runtime.State, what string, how order) error {
	switch st := i.settled(); st {
	case to:
		return nil
	case from:
	default:
		return i.wrongState(what, st)
	}
	if err := i.setState(via); err != nil {
		return err
	}
	if _, err := i.tell(how, ""); err != nil {
		return errors.Join(fmt.Errorf("asking the engine for a guest that is %s: %w", what, err), i.settle())
	}
	return i.setState(to)
}

// settled is the state, found out first where it is not known.
func (i *instance) settled() runtime.State {
	if st := i.state(); st == freezing || st == thawing {
		if err := i.settle(); err != nil {
			i.log.Warn("whether the guest is frozen could not be found out", "err", err)
		}
	}
	return i.state()
}

// settle finds out whether the tasks of a guest are stopped, and records it.
func (i *instance) settle() error {
	stopped, err := i.tell(toTell, "")
	if err != nil {
		return err
	}
	if stopped {
		return i.setState(runtime.Frozen)
	}
	return i.setState(runtime.Running)
}

// tasksStopped reports whether a dump of the engine's goroutines shows every
// task of the guest waiting in a stop. Nothing but a freeze stops them all:
// PID 1 among them, which no signal can stop.
func tasksStopped(stacks string) bool {
	tasks := 0
	for g := range strings.SplitSeq(stacks, "\n\n") {
		if !strings.Contains(g, "kernel.(*Task).run(") {
			continue
		}
		tasks++
		if !strings.Contains(g, "kernel.(*Task).doStop(") {
			return false
		}
	}
	return tasks > 0
}

// checkpoint writes the guest's memory into dir. i.op is held.
//
// The engine goes on after it ("resume"), because one that is told to end after
// a checkpoint also ends when the checkpoint fails. The guest stays stopped all
// the same: the stops of freeze and of the checkpoint add up.
func (i *instance) checkpoint(dir string) error {
	if st := i.state(); st != runtime.Frozen {
		return i.wrongState("checkpointed", st)
	}
	ents, err := os.ReadDir(dir)
	if err != nil || !filepath.IsAbs(dir) || len(ents) > 0 {
		return &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerRuntime,
			Message: fmt.Sprintf("%q is no empty directory for a checkpoint", dir), Err: err}
	}
	i.expectRestore()
	if _, err = i.tell(toCheckpoint, dir); err == nil {
		return nil
	}
	for _, name := range checkpointNames {
		// Half of a checkpoint is none. The engine forgets to close its files
		// and holds them until it next collects garbage: their space is given
		// back now.
		_ = os.Truncate(filepath.Join(dir, name), 0)
		_ = os.Remove(filepath.Join(dir, name))
	}
	if st := i.state(); st == runtime.Exited {
		return i.wrongState("checkpointed", st)
	}
	e := &cay.Error{Code: cay.CodeCheckpointFailed, Layer: cay.LayerRuntime,
		Message: "the memory of instance " + string(i.rec.ID) + " could not be saved: " + firstLine(err.Error()),
		Fix:     "the sandbox runs on; end what the message names (an open /dev/net/tun, for example) and try again", Err: err}
	if errors.Is(err, unix.ENOSPC) || strings.Contains(err.Error(), unix.ENOSPC.Error()) {
		e.Code, e.Layer, e.Fix = cay.CodeDiskFull, cay.LayerStorage, "free space on the file system of the data directory; the sandbox runs on"
	}
	return e
}

// checkpointNames are the files of a checkpoint.
var checkpointNames = []string{checkpointfiles.StateFileName, checkpointfiles.PagesMetadataFileName, checkpointfiles.PagesFileName}

func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s[:min(len(s), 300)]
}

// restore runs the guest from a checkpoint. i.op is held.
func (i *instance) restore(dir string) error {
	if st := i.state(); st != runtime.Created {
		return i.wrongState("restored", st)
	}
	for _, name := range checkpointNames {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return &cay.Error{Code: cay.CodeSnapshotCorrupt, Layer: cay.LayerStorage,
				Message: "the snapshot's part " + name + " cannot be read", Fix: "restore it from a backup, or start from the disk alone", Err: err}
		}
	}
	i.setBegun(true)
	if _, err := i.tell(toRestore, dir); err != nil {
		i.setBegun(false)
		return i.restoreError(err)
	}
	i.ask()
	i.mu.Lock()
	i.rec.Loading = true
	i.mu.Unlock()
	i.load()
	return i.setState(runtime.Running)
}

// load begins to follow how a guest reads its memory, which it does while it
// runs: what it wants to use comes first.
func (i *instance) load() {
	loaded := make(chan struct{})
	i.mu.Lock()
	i.loaded = loaded
	i.mu.Unlock()
	i.watching.Go(func() {
		defer close(loaded)
		_, err := i.tell(toLoad, "")
		if err != nil && strings.Contains(err.Error(), unknownOrder) {
			err = nil // an engine that reads everything first
		}
		i.mu.Lock()
		defer i.mu.Unlock()
		if err != nil && !i.killed {
			i.unread = err
			return
		}
		i.rec.Loading = false
		if i.rec.Exit != nil || i.removed {
			return
		}
		if err := i.rec.save(i.layout.record); err != nil {
			i.log.Warn("that a guest has its memory could not be recorded", "err", err) // the next supervisor asks again
		}
	})
}

// awaitLoad is the body of [runtime.Runtime.Loaded]. It answers false after some
// seconds.
func (i *instance) awaitLoad(ctx context.Context) (bool, error) {
	i.mu.Lock()
	loaded := i.loaded
	i.mu.Unlock()
	if loaded != nil {
		select {
		case <-loaded:
		case <-time.After(20 * time.Second):
			return false, nil
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.unread != nil {
		return true, &cay.Error{Code: cay.CodeEngineFailed, Layer: cay.LayerStorage,
			Message: "the memory of instance " + string(i.rec.ID) + " could not be read to the end: " + firstLine(i.unread.Error()), Err: i.unread}
	}
	return true, nil
}

// restoreError says which part of a restore failed.
func (i *instance) restoreError(err error) error {
	text := err.Error()
	switch {
	case strings.Contains(text, "version does not match"):
		return &cay.Error{Code: cay.CodeSnapshotIncompatible, Layer: cay.LayerRuntime,
			Message: "the memory snapshot was written by another version of the engine than " + i.rec.Engine,
			Fix:     "start from the disk alone, or with the version of Cay that wrote it", Err: err}
	case strings.Contains(text, "does not match across checkpoint restore"):
		return &cay.Error{Code: cay.CodeSnapshotIncompatible, Layer: cay.LayerRuntime,
			Message: "the memory snapshot does not fit the instance: " + firstLine(text),
			Fix:     "start from the disk alone", Err: err}
	case strings.Contains(text, "setting up network"):
		return i.startError(err)
	}
	return &cay.Error{Code: cay.CodeEngineFailed, Layer: cay.LayerRuntime,
		Message: "the engine could not restore the guest of instance " + string(i.rec.ID) + ": " + firstLine(text), Err: err}
}

// with runs f on an instance whose operations it keeps others from, and types
// what is not typed.
func (s *Supervisor) with(id runtime.InstanceID, what string, f func(i *instance) error) error {
	i, err := s.get(id)
	if err != nil {
		return err
	}
	defer s.busy()()
	i.op.Lock()
	defer i.op.Unlock()
	began := s.now()
	if err := f(i); err != nil {
		var typed *cay.Error
		if errors.As(err, &typed) {
			return err
		}
		return &cay.Error{Code: cay.CodeEngineFailed, Layer: cay.LayerRuntime,
			Message: fmt.Sprintf("the guest of instance %s could not be %s", id, what), Err: err}
	}
	i.log.Info("instance "+what, "took", s.now().Sub(began))
	return nil
}

// Freeze implements [runtime.Runtime].
func (r *Runtime) Freeze(ctx context.Context, id runtime.InstanceID) error {
	return r.post1(ctx, pathFreeze, id, "")
}

// Thaw implements [runtime.Runtime].
func (r *Runtime) Thaw(ctx context.Context, id runtime.InstanceID) error {
	return r.post1(ctx, pathThaw, id, "")
}

// Checkpoint implements [runtime.Runtime].
func (r *Runtime) Checkpoint(ctx context.Context, id runtime.InstanceID, dir string) error {
	return r.post1(ctx, pathCheckpoint, id, dir)
}

// Loaded implements [runtime.Runtime].
func (r *Runtime) Loaded(ctx context.Context, id runtime.InstanceID) error {
	for {
		var done bool
		if err := r.call(ctx, http.MethodGet, withID(pathLoaded, id), nil, &done); err != nil || done {
			return err
		}
	}
}

// Restore implements [runtime.Runtime].
func (r *Runtime) Restore(ctx context.Context, id runtime.InstanceID, dir string) error {
	return r.post1(ctx, pathRestore, id, dir)
}
