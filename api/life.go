package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/store"
)

// life moves sandboxes through their states. The record in the store says which
// state a sandbox is in, and every move is one UpdateSandbox that checks the
// state it leaves; so two movers never both win. What a move entails on the
// node may be repeated, and is, until it works.
//
// DESIGN.md has the states and the rules.
//
// Lock order: one of turns, then clock.mu, then mu. None is held while a node
// is killed or created.
type life struct {
	store store.Store
	node  cay.Node
	snaps cay.Snapshots // may be nil
	log   *slog.Logger
	clock clock
	began time.Time // wall clock
	// config makes the node's configuration of a sandbox on record.
	config func(store.Sandbox) (cay.SandboxConfig, error)
	// onTimeout says whether a sandbox is paused at its deadline, and whether
	// with its memory.
	onTimeout func(store.Sandbox) (pause, memory bool)
	fault     killpoint.Hook

	reconcileEvery, quarantineFor time.Duration

	// turns keep the deadlines of one sandbox in the same order in the store,
	// in the schedule and on the node.
	turns [64]sync.Mutex
	// nets do so for what a sandbox may reach. None is taken with a turn held.
	nets [64]sync.Mutex

	mu     sync.Mutex
	ops    map[cay.SandboxID]*op // operations of this process
	making int                   // how many of them create
	due    schedule
	tries  map[cay.SandboxID]int // failed tries to end a sandbox
	kick   chan struct{}         // wakes whoever waits for the schedule
	// early are ends of runs that came before the record knew the run.
	early map[cay.ExecutionID]bool
	// pins keep the snapshots of operations from being taken for orphans;
	// orphans are since when those without an owner have been seen.
	pins    map[cay.SnapshotID]int
	orphans map[cay.SnapshotID]time.Time

	ends  endQueue
	trash chan cay.SnapshotID // to be deleted
}

// Bounds of what happens away from a request's own time.
const (
	recordTimeout = 15 * time.Second // one write to the store
	killTimeout   = 40 * time.Second // one try to end a sandbox
	tellTimeout   = 5 * time.Second  // telling the node a deadline
	// deadlineSlack is how far the node's copy of a deadline may be off.
	deadlineSlack = time.Second
)

func newLife(st store.Store, node cay.Node, now func() time.Time, log *slog.Logger) *life {
	l := &life{store: st, node: node, log: log, began: now().Round(0),
		ops: map[cay.SandboxID]*op{}, tries: map[cay.SandboxID]int{}, kick: make(chan struct{}, 1),
		early: map[cay.ExecutionID]bool{}, pins: map[cay.SnapshotID]int{}, orphans: map[cay.SnapshotID]time.Time{},
		trash: make(chan cay.SnapshotID, trashSize)}
	l.clock.init(now)
	l.clock.rebase = l.rebase
	l.due.init()
	l.ends.init()
	return l
}

func (l *life) now() time.Time { return l.clock.now() }

// turn returns the lock of a sandbox's deadline.
func (l *life) turn(id cay.SandboxID) *sync.Mutex { return &l.turns[shard(id)] }

// shard spreads sandboxes over 64 locks.
func shard(id cay.SandboxID) int {
	var h uint32 = 2166136261
	for i := range len(id) {
		h = (h ^ uint32(id[i])) * 16777619
	}
	return int(h % 64)
}

// Reasons why a change of a record is refused. They never leave the package.
var (
	errOver     = errors.New("the sandbox has ended")
	errNotDue   = errors.New("the deadline was moved")
	errNotMoved = errors.New("the sandbox is in another state")
)

var (
	errKilledInStart = &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerPlacement,
		Message: "it was killed while it started", Fix: "create a new one"}
	errClientGone = &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerAPI,
		Message: "the client closed the connection before it was ready", Fix: "create a new one, and wait up to 60 s for it"}
)

// create records a sandbox, starts it on the node, and returns when it runs.
// timeout counts from then. After an error nothing of it is left, or will be
// within seconds. If ctx ends, the client can't learn the ID: it is rolled back.
func (l *life) create(ctx context.Context, team cay.Team, rec store.Sandbox, cfg cay.SandboxConfig, timeout time.Duration) (store.Sandbox, error) {
	run, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	o, ok := l.begin(rec.ID, cancel)
	if !ok { // IDs are random
		return rec, errTransition(rec.ID, cay.StateStarting)
	}
	l.count(1)
	defer func() {
		l.count(-1)
		l.done(o)
	}()

	// Not bound to the client: a record must not be left in doubt.
	keep, stop := detached(ctx, recordTimeout)
	defer stop()
	rec.State = cay.StateStarting
	rec.CreatedAt = l.now()
	rec.StartedAt = rec.CreatedAt
	l.limit(&rec, team, timeout)
	cfg.Deadline = rec.Deadline
	l.fault.Pass(killpoint.Create, "api.row.before")
	if err := l.store.AddSandbox(keep, rec, team.Limits.ConcurrentSandboxes); err != nil {
		return rec, err
	}
	l.fault.Pass(killpoint.Create, "api.row.after")
	made, err := l.node.Create(run, cfg)
	created := err == nil
	if err == nil {
		l.fault.Pass(killpoint.Create, "api.outcome.before")
		rec, err = l.markRunning(ctx, team, rec, made, timeout)
		l.fault.Pass(killpoint.Create, "api.outcome.after")
	}
	if err == nil && run.Err() != nil {
		err = context.Cause(run)
	}
	if err == nil {
		return rec, nil
	}
	return rec, l.rollBack(ctx, run, rec.ID, created, err)
}

// limit sets the deadlines of a sandbox that starts at rec.StartedAt.
func (l *life) limit(rec *store.Sandbox, team cay.Team, timeout time.Duration) {
	rec.MaxDeadline = rec.StartedAt.Add(maxLength(team))
	rec.Deadline = earlier(rec.StartedAt.Add(timeout), rec.MaxDeadline)
}

// markRunning records that a sandbox runs, and schedules its end.
func (l *life) markRunning(ctx context.Context, team cay.Team, rec store.Sandbox, made cay.NodeSandbox, timeout time.Duration) (store.Sandbox, error) {
	ctx, stop := detached(ctx, recordTimeout)
	defer stop()
	turn := l.turn(rec.ID)
	turn.Lock()
	defer turn.Unlock()
	began, told := l.now(), rec.Deadline
	rec, err := l.update(ctx, rec.ID, func(s *store.Sandbox) error {
		switch s.State {
		case cay.StateStarting:
		case cay.StateKilling:
			return errKilledInStart
		default:
			return &cay.Error{Code: cay.CodeGuestExited, Layer: cay.LayerGuest,
				Message: "it ended while it started: " + endText(s.EndReason, s.EndMessage), Fix: "try again"}
		}
		s.State, s.StartedAt, s.Execution = cay.StateRunning, began, made.ExecutionID
		noteDegraded(s, made, began)
		if made.EnvdVersion != "" {
			s.EnvdVersion = made.EnvdVersion
		}
		l.limit(s, team, timeout)
		return nil
	})
	if err != nil {
		return rec, err
	}
	l.plan(rec.ID, rec.Deadline)
	if d := rec.Deadline.Sub(told); d > deadlineSlack {
		l.tellNode(ctx, rec.ID, rec.Deadline)
	}
	return rec, nil
}

// rollBack removes a sandbox that could not be made, and returns why.
func (l *life) rollBack(ctx, run context.Context, id cay.SandboxID, created bool, err error) error {
	// Whoever ended the start says why; what the node makes of it is noise.
	if cause := context.Cause(run); run.Err() != nil && !errors.Is(cause, context.DeadlineExceeded) {
		err = cause
	}
	if errors.Is(err, context.Canceled) {
		err = errClientGone
	}
	message := err.Error()
	var e *cay.Error
	if errors.As(err, &e) {
		message = e.Message
	}
	ctx, stop := detached(ctx, killTimeout)
	defer stop()
	l.fault.Pass(killpoint.Create, "undo.api.before")
	defer l.fault.Pass(killpoint.Create, "undo.api.after")
	if created {
		if kerr := l.killOnNode(ctx, id, cay.EndStartFailed); kerr != nil {
			l.log.Error("removing a sandbox that could not be made; trying again", "sandbox", id, "error", kerr)
			l.mark(ctx, id, cay.StateKilling, cay.EndStartFailed, message)
			l.plan(id, l.now().Add(retryFirst))
			return err
		}
	}
	l.mark(ctx, id, cay.StateEnded, cay.EndStartFailed, message)
	return err
}

// mark moves a record to killing or ended, unless it is there already. A record
// that is being killed keeps its reason. What the store refuses is done later.
func (l *life) mark(ctx context.Context, id cay.SandboxID, to cay.SandboxState, reason cay.EndReason, message string) {
	now := l.now()
	_, err := l.update(ctx, id, func(s *store.Sandbox) error {
		if s.State == cay.StateEnded || s.State == to {
			return errNotMoved
		}
		setEnd(s, to, reason, message, now)
		return nil
	})
	if err == nil || errors.Is(err, errNotMoved) || cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return
	}
	l.log.Error("recording the end of a sandbox; trying again", "sandbox", id, "error", err)
	l.plan(id, now.Add(retryFirst))
}

// setEnd moves a record towards its end. The first reason counts.
func setEnd(s *store.Sandbox, to cay.SandboxState, reason cay.EndReason, message string, now time.Time) {
	if s.State != cay.StateKilling {
		s.EndReason, s.EndMessage = reason, message
	}
	s.State = to
	if to == cay.StateEnded {
		s.EndedAt = now
	}
}

// kill ends a sandbox of a team (of any, if team is empty). When it returns nil
// nothing of the sandbox runs and its end is on record. After an error the kill
// goes on by itself. A sandbox that has ended is [cay.CodeSandboxNotFound].
func (l *life) kill(ctx context.Context, team cay.TeamID, id cay.SandboxID, reason cay.EndReason, message string) error {
	// The client may go: a kill that began is finished.
	ctx, stop := detached(ctx, killTimeout)
	defer stop()
	now := l.now()
	l.fault.Pass(killpoint.Kill, "api.intent.before")
	rec, err := l.update(ctx, id, func(s *store.Sandbox) error {
		if s.State == cay.StateEnded || team != "" && s.Team != team {
			return errOver
		}
		setEnd(s, cay.StateKilling, reason, message, now)
		return nil
	})
	l.fault.Pass(killpoint.Kill, "api.intent.after")
	if errors.Is(err, errOver) || cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return errNoSandbox(id)
	}
	if err != nil {
		return err
	}
	if err := l.finish(ctx, id, rec.EndReason); err != nil {
		l.plan(id, l.now().Add(retryFirst))
		return fmt.Errorf("ending sandbox %s: %w", id, err)
	}
	return nil
}

// finish ends a sandbox whose record says killing.
func (l *life) finish(ctx context.Context, id cay.SandboxID, reason cay.EndReason) error {
	o := l.underWay(id)
	if o != nil && o.cancel != nil {
		o.cancel(errKilledInStart)
		if err := wait(ctx, o); err != nil {
			return err
		}
	}
	if err := l.killOnNode(ctx, id, reason); err != nil {
		return err
	}
	// A save ends with its guest. Only then is it known whether it left a
	// snapshot.
	if o != nil {
		if err := wait(ctx, o); err != nil {
			return err
		}
	}
	l.fault.Pass(killpoint.Kill, "api.own.before")
	if err := l.dropOwn(ctx, id); err != nil {
		return err
	}
	l.fault.Pass(killpoint.Kill, "api.own.after")
	now := l.now()
	l.fault.Pass(killpoint.Kill, "api.outcome.before")
	_, err := l.update(ctx, id, func(s *store.Sandbox) error {
		if s.State == cay.StateEnded {
			return errNotMoved // the node's own report was faster
		}
		setEnd(s, cay.StateEnded, reason, "", now)
		return nil
	})
	l.fault.Pass(killpoint.Kill, "api.outcome.after")
	if err != nil && !errors.Is(err, errNotMoved) && cay.CodeOf(err) != cay.CodeSandboxNotFound {
		return err
	}
	l.unplan(id)
	return nil
}

func wait(ctx context.Context, o *op) error {
	select {
	case <-o.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// dropOwn removes the snapshot that a sandbox consists of, or was being saved
// as.
func (l *life) dropOwn(ctx context.Context, id cay.SandboxID) error {
	rec, err := l.store.FindSandbox(ctx, "", id)
	if cay.CodeOf(err) == cay.CodeSandboxNotFound || err == nil && (rec.Snapshot == "" || l.pinned(rec.Snapshot)) || l.snaps == nil {
		return nil
	}
	if err != nil {
		return err
	}
	// The snapshot of a client outlives its sandbox.
	switch _, err := l.store.FindSnapshot(ctx, rec.Team, store.TemplateRef{Name: string(rec.Snapshot)}); cay.CodeOf(err) {
	case "":
		return nil
	case cay.CodeNotFound:
		return l.snaps.DeleteSnapshot(ctx, rec.Snapshot)
	default:
		return err
	}
}

// killOnNode ends a sandbox on the node; one that isn't there is no error.
func (l *life) killOnNode(ctx context.Context, id cay.SandboxID, reason cay.EndReason) error {
	err := l.node.Kill(ctx, id, reason)
	if cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return nil
	}
	return err
}

// setDeadline changes a running sandbox's deadline to what f makes of the
// record and the present, within the team's limit.
func (l *life) setDeadline(ctx context.Context, team cay.TeamID, id cay.SandboxID, f func(s *store.Sandbox, now time.Time) time.Time) (store.Sandbox, error) {
	ctx, stop := detached(ctx, recordTimeout)
	defer stop()
	turn := l.turn(id)
	turn.Lock()
	defer turn.Unlock()
	now := l.now()
	rec, err := l.update(ctx, id, func(s *store.Sandbox) error {
		if s.State == cay.StateEnded || s.Team != team {
			return errOver
		}
		if !s.State.Runs() {
			return errOf(s)
		}
		s.Deadline = earlier(f(s, now), s.MaxDeadline)
		return nil
	})
	if errors.Is(err, errOver) || cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return rec, errNoSandbox(id)
	}
	if err != nil {
		return rec, err
	}
	l.plan(id, rec.Deadline)
	if rec.Deadline.After(now) {
		l.tellNode(ctx, id, rec.Deadline)
	}
	return rec, nil
}

func errTransition(id cay.SandboxID, state cay.SandboxState) *cay.Error {
	return &cay.Error{Code: cay.CodeSandboxTransition, Layer: cay.LayerAPI,
		Message: fmt.Sprintf("sandbox '%s' is not running: it is %s", id, state), Fix: "try again in a moment"}
}

// tellNode keeps the node's copy of a deadline in step. The copy is for the
// operator's eyes, so a failure is no failure of the call; the reconciler
// tells the node again.
func (l *life) tellNode(ctx context.Context, id cay.SandboxID, t time.Time) {
	ctx, stop := context.WithTimeout(ctx, tellTimeout)
	defer stop()
	if err := l.node.SetDeadline(ctx, id, t); err != nil && cay.CodeOf(err) != cay.CodeSandboxNotFound {
		l.log.Warn("telling the node a deadline", "sandbox", id, "error", err)
	}
}

// count counts the creates of this process.
func (l *life) count(by int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.making += by
}

// startsUnderWay returns how many creates are under way in this process.
func (l *life) startsUnderWay() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.making
}

// detached returns a context that outlives the request, for a bounded time.
func detached(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), d)
}

func maxLength(t cay.Team) time.Duration { return time.Duration(t.Limits.MaxLengthHours) * time.Hour }

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// endText says in words why a sandbox ended.
func endText(reason cay.EndReason, message string) string {
	if message != "" {
		return message
	}
	switch reason {
	case cay.EndRequest:
		return "a client killed it"
	case cay.EndTimeout:
		return "its time was up"
	case cay.EndOOM:
		return "it used more memory than its limit"
	case cay.EndPIDs:
		return "its processes exhausted the limit"
	case cay.EndGuestExit:
		return "its first process ended"
	case cay.EndEngineCrash:
		return "its engine died"
	case cay.EndStartFailed:
		return "it never became ready"
	case cay.EndNodeLost:
		return "its machine restarted or lost it"
	case cay.EndShutdown:
		return "the operator stopped Cay"
	case cay.EndOrphan:
		return "no record owned it"
	}
	return string(reason)
}
