package api

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

const (
	// quarantineFor is how long a snapshot is seen without an owner before it
	// is deleted.
	quarantineFor = 10 * time.Minute
	// trashSize bounds how many snapshots wait to be deleted; what does not
	// find room goes by way of the quarantine.
	trashSize = 1024
)

// settleRun rolls an interrupted pause, resume or snapshot forward or back:
// what the node has counts.
func (l *life) settleRun(ctx context.Context, id cay.SandboxID) error {
	o, ok := l.begin(id, nil)
	if !ok {
		return nil // under way, and not interrupted
	}
	defer l.done(o)
	rec, err := l.store.FindSandbox(ctx, "", id)
	if cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	n, err := l.node.Get(ctx, id)
	here := err == nil
	if err != nil && cay.CodeOf(err) != cay.CodeSandboxNotFound {
		return err
	}
	switch {
	case rec.State == cay.StatePaused && here:
		l.log.Error("a run of a paused sandbox is removed; its snapshot counts", "sandbox", id, "execution", n.ExecutionID)
		return l.killOnNode(ctx, id, cay.EndOrphan)
	case rec.State == cay.StatePausing && !here:
		return l.settlePaused(ctx, rec)
	case rec.State == cay.StateResuming && !here:
		l.undoResume(ctx, rec, errShuttingDown)
		return nil
	case rec.State == cay.StateSnapshotting && !here:
		return l.rollBackRun(ctx, rec, "")
	case rec.State == cay.StatePausing, rec.State == cay.StateSnapshotting:
		return l.rollBackRun(ctx, rec, "sandbox was to be paused and runs on: the server stopped meanwhile")
	case rec.State == cay.StateResuming:
		return l.rollForward(ctx, rec, n)
	}
	return nil
}

// settlePaused decides about a sandbox that was to be paused and does not run.
func (l *life) settlePaused(ctx context.Context, rec store.Sandbox) error {
	all, err := l.snaps.Snapshots(ctx)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(all, func(s cay.Snapshot) bool { return s.ID == rec.Snapshot }) {
		return l.markPaused(ctx, rec)
	}
	return l.rollBackRun(ctx, rec, "")
}

// rollBackRun records that a sandbox runs. If it doesn't, the next look at the
// node finds that.
func (l *life) rollBackRun(ctx context.Context, rec store.Sandbox, message string) error {
	now := l.now()
	fresh, err := l.update(ctx, rec.ID, func(s *store.Sandbox) error {
		if s.State != rec.State || s.Snapshot != rec.Snapshot {
			return errNotMoved
		}
		if s.State == cay.StatePausing && message != "" {
			note(s, now, cay.EventPauseFailed, message)
		}
		toRunning(s)
		return nil
	})
	if errors.Is(err, errNotMoved) || cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	l.plan(rec.ID, later(fresh.Deadline, now.Add(retryFirst)))
	return nil
}

// rollForward takes up a sandbox whose resume the server did not see finished.
func (l *life) rollForward(ctx context.Context, rec store.Sandbox, n cay.NodeSandbox) error {
	now := l.now()
	fresh, err := l.update(ctx, rec.ID, func(s *store.Sandbox) error {
		if s.State != cay.StateResuming || s.Snapshot != rec.Snapshot {
			return errNotMoved
		}
		s.StartedAt = n.StartedAt.UTC().Truncate(time.Microsecond)
		toResumed(s, n, now)
		return nil
	})
	if errors.Is(err, errNotMoved) || cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	l.plan(rec.ID, fresh.Deadline)
	l.discard(rec.Snapshot)
	return nil
}

// pin keeps a snapshot that no record names from being taken for an orphan.
func (l *life) pin(id cay.SnapshotID) (unpin func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pins[id]++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.pins[id]--; l.pins[id] == 0 {
			delete(l.pins, id)
		}
	}
}

func (l *life) pinned(id cay.SnapshotID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pins[id] > 0
}

// discard has a snapshot deleted that nobody needs any more. Nobody waits for
// it.
func (l *life) discard(id cay.SnapshotID) {
	select {
	case l.trash <- id:
	default:
	}
}

// empty deletes what was discarded.
func (l *life) empty(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case id := <-l.trash:
			if err := l.snaps.DeleteSnapshot(ctx, id); err != nil && ctx.Err() == nil {
				l.log.Error("deleting a snapshot that nobody needs; the quarantine takes it", "snapshot", id, "error", err)
			}
		}
	}
}

// quarantine deletes snapshots of the node that nothing owns, once they have
// been without an owner for long. rows were read after the node was asked.
func (l *life) quarantine(ctx context.Context, there []cay.Snapshot, rows []store.Sandbox) error {
	if len(there) == 0 {
		clear(l.orphans)
		return nil
	}
	owned := map[cay.SnapshotID]bool{}
	for _, r := range rows {
		owned[r.Snapshot] = true
	}
	kept, err := l.store.ListSnapshots(ctx, store.SnapshotFilter{})
	if err != nil {
		return err
	}
	for _, k := range kept {
		owned[k.ID] = true
	}
	now := l.now()
	seen := map[cay.SnapshotID]time.Time{}
	var errs []error
	for _, s := range there {
		if owned[s.ID] || l.pinned(s.ID) {
			continue
		}
		since, known := l.orphans[s.ID]
		if !known {
			since = now
			l.log.Warn("a snapshot that no record owns is in quarantine", "snapshot", s.ID, "sandbox", s.Sandbox, "made", s.CreatedAt, "for", l.quarantineFor)
		}
		if now.Sub(since) >= l.quarantineFor {
			l.log.Warn("deleting a snapshot that no record owns", "snapshot", s.ID, "sandbox", s.Sandbox, "since", since)
			if err := l.snaps.DeleteSnapshot(ctx, s.ID); err != nil {
				errs = append(errs, err)
			} else {
				continue
			}
		}
		seen[s.ID] = since
	}
	l.orphans = seen
	return errors.Join(errs...)
}
