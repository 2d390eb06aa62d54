package api

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/store"
)

// resumeTimeout bounds a resume; the node gives up earlier.
const resumeTimeout = 60 * time.Second

// patience bounds how long a call waits for another one on the same sandbox.
// The clients give up after 60 s.
const patience = 45 * time.Second

func errPaused(id cay.SandboxID) error {
	return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerAPI,
		Message: fmt.Sprintf("sandbox '%s' is paused", id), Fix: "connect to it first, which resumes it"}
}

// errOf says why a sandbox in a state cannot do what only a running one can.
func errOf(s *store.Sandbox) error {
	switch s.State {
	case cay.StateEnded:
		return errOver
	case cay.StatePaused:
		return errPaused(s.ID)
	}
	return errTransition(s.ID, s.State)
}

// gone turns what the store or a change says of an absent sandbox into the one
// answer for it.
func gone(id cay.SandboxID, err error) error {
	if errors.Is(err, errOver) || cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return errNoSandbox(id)
	}
	return err
}

// busy says what else is done with a sandbox of a team.
func (l *life) busy(ctx context.Context, team cay.TeamID, id cay.SandboxID) error {
	rec, err := l.store.FindSandbox(ctx, team, id)
	if err != nil {
		return gone(id, err)
	}
	if rec.State.Runs() {
		return errTransition(id, cay.StateSnapshotting)
	}
	return gone(id, errOf(&rec))
}

// pause saves a running sandbox of a team (of any, if team is empty) and ends
// its run. When it returns nil, the snapshot is whole and on record and no
// request reaches the sandbox. After an error it runs on, or the record says
// what is left to do. q says how; the ID of the snapshot is made here. due, if
// set, is asked together with the move.
func (l *life) pause(ctx context.Context, team cay.TeamID, id cay.SandboxID, q cay.SaveRequest, due func(*store.Sandbox) error) error {
	if l.snaps == nil {
		return absent("pausing a sandbox", "let it run, or kill it")
	}
	o, ok := l.begin(id, nil)
	if !ok {
		return l.busy(ctx, team, id)
	}
	defer l.done(o)
	keep, stop := detached(ctx, recordTimeout)
	defer stop()
	q.Snapshot, q.Pause = cay.NewSnapshotID(), true
	now := l.now()
	turn := l.turn(id)
	turn.Lock()
	l.fault.Pass(killpoint.Pause, "api.intent.before")
	rec, err := l.update(keep, id, func(s *store.Sandbox) error {
		if team != "" && s.Team != team {
			return errOver
		}
		if s.State != cay.StateRunning {
			return errOf(s)
		}
		if due != nil {
			if err := due(s); err != nil {
				return err
			}
		}
		s.State, s.Snapshot, s.SnapshotMemory, s.PausedAt = cay.StatePausing, q.Snapshot, q.Memory, now
		return nil
	})
	if err == nil {
		l.unplan(id)
	}
	turn.Unlock()
	l.fault.Pass(killpoint.Pause, "api.intent.after")
	if err != nil {
		return gone(id, err)
	}
	// A save that began is finished, whether its caller waits or not.
	_, err = l.snaps.Save(context.WithoutCancel(ctx), id, q)
	switch {
	case err == nil:
		l.fault.Pass(killpoint.Pause, "api.outcome.before")
		err := l.markPaused(ctx, rec)
		l.fault.Pass(killpoint.Pause, "api.outcome.after")
		return err
	case cay.CodeOf(err) == cay.CodeShuttingDown:
		return err // open which way it went; the next run finds out
	}
	l.fault.Pass(killpoint.Pause, "undo.api.before")
	l.undoPause(ctx, rec, err)
	l.fault.Pass(killpoint.Pause, "undo.api.after")
	return fmt.Errorf("pausing sandbox %s: %w", id, err)
}

// markPaused records that a sandbox consists of its snapshot.
func (l *life) markPaused(ctx context.Context, rec store.Sandbox) error {
	ctx, stop := detached(ctx, recordTimeout)
	defer stop()
	now := l.now()
	_, err := l.update(ctx, rec.ID, func(s *store.Sandbox) error {
		if s.State != cay.StatePausing || s.Snapshot != rec.Snapshot {
			return errNotMoved
		}
		toPaused(s, now)
		return nil
	})
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errNotMoved): // it was killed, or the node's report was faster
		fresh, err := l.store.FindSandbox(ctx, "", rec.ID)
		if err == nil && fresh.State == cay.StatePaused {
			return nil
		}
		return gone(rec.ID, errors.Join(errOver, err))
	}
	l.plan(rec.ID, l.now().Add(retryFirst))
	return err
}

// toPaused makes the move of a record whose snapshot is whole.
func toPaused(s *store.Sandbox, now time.Time) {
	what := "with its memory"
	if !s.SnapshotMemory {
		what = "its disk alone"
	}
	s.State, s.PausedAt = cay.StatePaused, now
	note(s, now, cay.EventPaused, "sandbox paused, "+what)
}

// undoPause records that a sandbox runs on.
func (l *life) undoPause(ctx context.Context, rec store.Sandbox, why error) {
	ctx, stop := detached(ctx, recordTimeout)
	defer stop()
	now := l.now()
	l.log.Error("a sandbox could not be paused; it runs on", "sandbox", rec.ID, "error", why)
	fresh, err := l.update(ctx, rec.ID, func(s *store.Sandbox) error {
		if s.State != cay.StatePausing || s.Snapshot != rec.Snapshot {
			return errNotMoved
		}
		toRunning(s)
		note(s, now, cay.EventPauseFailed, "sandbox could not be paused and runs on: "+reason(why))
		return nil
	})
	switch {
	case err == nil:
		l.plan(rec.ID, later(fresh.Deadline, now.Add(retryFirst)))
	case !errors.Is(err, errNotMoved):
		l.plan(rec.ID, now.Add(retryFirst))
	}
}

// toRunning makes the move of a record whose sandbox runs.
func toRunning(s *store.Sandbox) {
	s.State, s.Snapshot, s.SnapshotMemory, s.PausedAt = cay.StateRunning, "", false, time.Time{}
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// resume starts a paused sandbox of the team from its snapshot, and returns when
// it runs. timeout counts from then. After an error it is paused as before.
func (l *life) resume(ctx context.Context, team cay.Team, id cay.SandboxID, timeout time.Duration, mode cay.StartMode) (store.Sandbox, error) {
	if l.snaps == nil {
		return store.Sandbox{}, absent("resuming a sandbox", "create a new one")
	}
	// Not bound to its caller: others wait for it too.
	run, stop := detached(ctx, resumeTimeout)
	defer stop()
	run, cancel := context.WithCancelCause(run)
	defer cancel(nil)
	o, ok := l.begin(id, cancel)
	if !ok {
		return store.Sandbox{}, errBusy
	}
	defer l.done(o)
	keep, stopKeep := detached(ctx, recordTimeout)
	defer stopKeep()
	now := l.now()
	l.fault.Pass(killpoint.Resume, "api.intent.before")
	rec, err := l.admit(keep, id, team.Limits.ConcurrentSandboxes, func(s *store.Sandbox) error {
		if s.State == cay.StateEnded || s.Team != team.ID {
			return errOver
		}
		if s.State != cay.StatePaused {
			return errBusy
		}
		s.State, s.Execution = cay.StateResuming, ""
		s.MaxDeadline = now.Add(maxLength(team))
		s.Deadline = earlier(now.Add(timeout), s.MaxDeadline)
		return nil
	})
	l.fault.Pass(killpoint.Resume, "api.intent.after")
	if err != nil {
		return rec, gone(id, err)
	}
	cfg, err := l.config(rec)
	var made cay.NodeSandbox
	if err == nil {
		cfg.From, cfg.Mode, cfg.Deadline = rec.Snapshot, mode, rec.Deadline
		made, err = l.node.Create(run, cfg)
	}
	if err == nil {
		var fresh store.Sandbox
		l.fault.Pass(killpoint.Resume, "api.outcome.before")
		fresh, err = l.markResumed(ctx, team, rec, made, timeout)
		l.fault.Pass(killpoint.Resume, "api.outcome.after")
		if err == nil {
			l.discard(rec.Snapshot)
			return fresh, nil
		}
		if !errors.Is(err, errEarlyEnd) {
			return rec, gone(id, err)
		}
		err = errEarlyEnd
	}
	if cause := context.Cause(run); run.Err() != nil && !errors.Is(cause, context.DeadlineExceeded) {
		err = cause
	}
	l.fault.Pass(killpoint.Resume, "undo.api.before")
	l.undoResume(ctx, rec, err)
	l.fault.Pass(killpoint.Resume, "undo.api.after")
	return rec, fmt.Errorf("resuming sandbox %s: %w", id, err)
}

// errBusy is returned for a sandbox that somebody else moves. It does not leave
// the package.
var errBusy = errors.New("somebody else moves the sandbox")

var errEarlyEnd = &cay.Error{Code: cay.CodeGuestExited, Layer: cay.LayerGuest,
	Message: "it ended in the moment when it was resumed; its snapshot is as it was", Fix: "look at its logs, and resume it again"}

// markResumed records that a sandbox runs again, and schedules its end.
func (l *life) markResumed(ctx context.Context, team cay.Team, rec store.Sandbox, made cay.NodeSandbox, timeout time.Duration) (store.Sandbox, error) {
	ctx, stop := detached(ctx, recordTimeout)
	defer stop()
	turn := l.turn(rec.ID)
	turn.Lock()
	defer turn.Unlock()
	began, told := l.now(), rec.Deadline
	fresh, err := l.update(ctx, rec.ID, func(s *store.Sandbox) error {
		if l.endedEarly(made.ExecutionID) {
			return errEarlyEnd
		}
		switch s.State {
		case cay.StateResuming:
		case cay.StateRunning:
			if s.Execution == made.ExecutionID {
				return nil // the reconciler of another process was faster
			}
			return errTransition(s.ID, s.State)
		default:
			return errOver
		}
		s.StartedAt = began
		l.limit(s, team, timeout)
		toResumed(s, made, began)
		return nil
	})
	if err != nil {
		if !errors.Is(err, errOver) && !errors.Is(err, errEarlyEnd) {
			l.plan(rec.ID, l.now().Add(retryFirst)) // the reconciler rolls it forward
		}
		return fresh, err
	}
	l.plan(rec.ID, fresh.Deadline)
	if d := fresh.Deadline.Sub(told); d > deadlineSlack {
		l.tellNode(ctx, rec.ID, fresh.Deadline)
	}
	return fresh, nil
}

// toResumed makes the move of a record whose sandbox runs as made says.
func toResumed(s *store.Sandbox, made cay.NodeSandbox, now time.Time) {
	toRunning(s)
	s.Execution = made.ExecutionID
	if made.EnvdVersion != "" {
		s.EnvdVersion = made.EnvdVersion
	}
	how := "with its memory"
	if !made.Restored {
		how = "from its disk"
	}
	note(s, now, cay.EventResumed, "sandbox resumed, "+how)
	noteDegraded(s, made, now)
}

// noteDegraded keeps why memory that was wished for could not be restored.
func noteDegraded(s *store.Sandbox, made cay.NodeSandbox, now time.Time) {
	if made.Degraded != "" {
		note(s, now, cay.EventDegraded, "its memory could not be restored, so it was started from its disk: "+made.Degraded)
	}
}

// undoResume records that a sandbox is paused as before.
func (l *life) undoResume(ctx context.Context, rec store.Sandbox, why error) {
	ctx, stop := detached(ctx, recordTimeout)
	defer stop()
	now := l.now()
	_, err := l.update(ctx, rec.ID, func(s *store.Sandbox) error {
		if s.State != cay.StateResuming {
			return errNotMoved
		}
		s.State = cay.StatePaused
		note(s, now, cay.EventResumeFailed, "sandbox could not be resumed and stays paused: "+reason(why))
		return nil
	})
	if err != nil && !errors.Is(err, errNotMoved) && cay.CodeOf(err) != cay.CodeSandboxNotFound {
		l.log.Error("recording that a sandbox is still paused; trying again", "sandbox", rec.ID, "error", err)
		l.plan(rec.ID, now.Add(retryFirst))
	}
}

// snapshot makes the snapshot q of a running sandbox of the team and lets it run on.
// keep, if set, is called while the record still names the snapshot; its error
// undoes it.
func (l *life) snapshot(ctx context.Context, team cay.TeamID, id cay.SandboxID, q cay.SaveRequest,
	keep func(context.Context, store.Sandbox, cay.Snapshot) error) (store.Sandbox, error) {
	if l.snaps == nil {
		return store.Sandbox{}, absent("making a snapshot", "create sandboxes from templates")
	}
	o, ok := l.begin(id, nil)
	if !ok {
		return store.Sandbox{}, errBusy
	}
	defer l.done(o)
	short, stop := detached(ctx, recordTimeout)
	defer stop()
	l.fault.Pass(killpoint.Snapshot, "api.intent.before")
	rec, err := l.update(short, id, func(s *store.Sandbox) error {
		if s.Team != team {
			return errOver
		}
		if s.State != cay.StateRunning {
			return errOf(s)
		}
		s.State, s.Snapshot, s.SnapshotMemory = cay.StateSnapshotting, q.Snapshot, q.Memory
		return nil
	})
	if err != nil {
		return rec, gone(id, err)
	}
	l.fault.Pass(killpoint.Snapshot, "api.intent.after")
	m, err := l.snaps.Save(context.WithoutCancel(ctx), id, q)
	if err == nil && keep != nil {
		l.fault.Pass(killpoint.Snapshot, "api.row.before")
		if err = keep(context.WithoutCancel(ctx), rec, m); err != nil {
			l.discard(q.Snapshot)
		}
		l.fault.Pass(killpoint.Snapshot, "api.row.after")
	}
	l.fault.Pass(killpoint.Snapshot, "api.outcome.before")
	rec, uerr := l.endSnapshot(ctx, rec, err)
	l.fault.Pass(killpoint.Snapshot, "api.outcome.after")
	switch {
	case err != nil:
		return rec, fmt.Errorf("making a snapshot of sandbox %s: %w", id, err)
	case errors.Is(uerr, errOver):
		return rec, nil // the sandbox has ended since; the snapshot is whole
	}
	return rec, uerr
}

// endSnapshot records that a sandbox runs as before its snapshot.
func (l *life) endSnapshot(ctx context.Context, rec store.Sandbox, failed error) (store.Sandbox, error) {
	ctx, stop := detached(ctx, recordTimeout)
	defer stop()
	now := l.now()
	fresh, err := l.update(ctx, rec.ID, func(s *store.Sandbox) error {
		if s.State != cay.StateSnapshotting || s.Snapshot != rec.Snapshot {
			return errOver
		}
		toRunning(s)
		if failed == nil {
			note(s, now, cay.EventSnapshotted, "snapshot made")
		}
		return nil
	})
	switch {
	case err == nil:
		l.plan(rec.ID, fresh.Deadline)
		return fresh, nil
	case errors.Is(err, errOver) || cay.CodeOf(err) == cay.CodeSandboxNotFound:
		return rec, errOver
	}
	l.plan(rec.ID, now.Add(retryFirst))
	return rec, err
}
