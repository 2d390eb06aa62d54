package api

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

const (
	retryFirst = time.Second
	retryMax   = 30 * time.Second
	// settleAtOnce is how many sandboxes are ended at the same time.
	settleAtOnce = 64
	// reconcileEvery is how often record and node are compared.
	reconcileEvery = 30 * time.Second
	// lostGrace is how long a sandbox that the node does not have may wait for
	// the node's own word on why, before it counts as lost.
	lostGrace = time.Second
	// Records of ended sandboxes are kept this long.
	keepEnded  = 7 * 24 * time.Hour
	pruneEvery = time.Hour
)

// run does the background work until ctx ends, and waits for it.
func (l *life) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { l.watch(ctx) })
	wg.Go(func() { l.recordEnds(ctx) })
	wg.Go(func() { l.every(ctx, l.reconcileEvery, "bringing record and node together", l.reconcile) })
	wg.Go(func() { l.empty(ctx) })
	wg.Go(func() { l.every(ctx, pruneEvery, "forgetting ended sandboxes", l.prune) })
	l.evict(ctx)
}

// every does something at once and then periodically; what fails is tried again
// sooner.
func (l *life) every(ctx context.Context, period time.Duration, what string, f func(context.Context) error) {
	pause := retryFirst
	for {
		wait := period
		if err := f(ctx); err == nil {
			pause = retryFirst
		} else if ctx.Err() == nil {
			l.log.Error(what+"; trying again", "error", err)
			wait = min(pause, period)
			pause = min(2*pause, retryMax)
		}
		if !sleep(ctx, wait) {
			return
		}
	}
}

// sleep reports false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// evict looks at each sandbox when it is due.
func (l *life) evict(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	room := make(chan struct{}, settleAtOnce)
	for ctx.Err() == nil {
		now := l.now()
		l.mu.Lock()
		id, ok := l.due.pop(now)
		next, some := l.due.next()
		l.mu.Unlock()
		if ok {
			wg.Go(func() {
				room <- struct{}{}
				defer func() { <-room }()
				l.settle(ctx, id)
			})
			continue
		}
		var timer <-chan time.Time
		if some {
			timer = time.After(min(next.Sub(now), watchClock))
		}
		select {
		case <-ctx.Done():
		case <-l.kick:
		case <-timer:
		}
	}
}

// settle does what a sandbox's record asks for at this time. What fails is
// scheduled again, later each time.
func (l *life) settle(ctx context.Context, id cay.SandboxID) {
	err := l.settleOnce(ctx, id)
	if ctx.Err() != nil {
		return // the record says what is left to do; the next run does it
	}
	l.mu.Lock()
	if err == nil {
		delete(l.tries, id)
	} else {
		l.tries[id]++
	}
	n := l.tries[id]
	l.mu.Unlock()
	if err != nil {
		pause := min(retryFirst<<min(n-1, 5), retryMax)
		l.log.Error("ending a sandbox; trying again", "sandbox", id, "try", n, "next", pause, "error", err)
		l.plan(id, l.now().Add(pause))
	}
}

func (l *life) settleOnce(ctx context.Context, id cay.SandboxID) error {
	ctx, stop := context.WithTimeout(ctx, killTimeout)
	defer stop()
	rec, err := l.store.FindSandbox(ctx, "", id)
	if cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	switch rec.State {
	case cay.StateStarting:
		return l.settleStart(ctx, id)
	case cay.StateRunning:
		return l.expire(ctx, id)
	case cay.StateKilling:
		return l.finish(ctx, id, rec.EndReason)
	case cay.StatePausing, cay.StatePaused, cay.StateResuming, cay.StateSnapshotting:
		return l.settleRun(ctx, id)
	}
	return nil
}

// settleStart ends a sandbox that nobody starts any more.
func (l *life) settleStart(ctx context.Context, id cay.SandboxID) error {
	if l.underWay(id) != nil {
		return nil // its creator knows better
	}
	now := l.now()
	rec, err := l.update(ctx, id, func(s *store.Sandbox) error {
		if s.State != cay.StateStarting || l.underWay(id) != nil {
			return errNotMoved
		}
		setEnd(s, cay.StateKilling, cay.EndStartFailed, "the server stopped while the sandbox started", now)
		return nil
	})
	if errors.Is(err, errNotMoved) || cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	return l.finish(ctx, id, rec.EndReason)
}

// expire ends or pauses a running sandbox if its deadline has passed, and else
// schedules it. Check and move are one step, so an extension either counts or is
// refused.
func (l *life) expire(ctx context.Context, id cay.SandboxID) error {
	var pauses, memory bool
	err := l.ifDue(ctx, id, func(now time.Time, s *store.Sandbox) error {
		if pauses, memory = l.onTimeout(*s); pauses {
			return errPauseDue
		}
		setEnd(s, cay.StateKilling, cay.EndTimeout, "", now)
		return nil
	})
	switch {
	case errors.Is(err, errPauseDue):
		return l.expirePaused(ctx, id, memory)
	case errors.Is(err, errNotDue), errors.Is(err, errNotMoved), cay.CodeOf(err) == cay.CodeSandboxNotFound:
		return nil
	case err != nil:
		return err
	}
	return l.finish(ctx, id, cay.EndTimeout)
}

// ifDue changes the record of a running sandbox whose deadline has passed, and
// schedules one whose deadline has not.
func (l *life) ifDue(ctx context.Context, id cay.SandboxID, change func(time.Time, *store.Sandbox) error) error {
	turn := l.turn(id)
	turn.Lock()
	defer turn.Unlock()
	now := l.now()
	var deadline time.Time
	_, err := l.update(ctx, id, func(s *store.Sandbox) error {
		if s.State != cay.StateRunning {
			return errNotMoved
		}
		if deadline = s.Deadline; deadline.After(now) {
			return errNotDue
		}
		return change(now, s)
	})
	if errors.Is(err, errNotDue) {
		l.plan(id, deadline)
	}
	return err
}

// errPauseDue says that a deadline asks for a pause. It does not leave the
// package.
var errPauseDue = errors.New("the sandbox is to be paused")

// expirePaused pauses a sandbox whose deadline has passed, as its creator asked.
func (l *life) expirePaused(ctx context.Context, id cay.SandboxID, memory bool) error {
	var deadline time.Time
	err := l.pause(ctx, "", id, cay.SaveRequest{Memory: memory}, func(s *store.Sandbox) error {
		if deadline = s.Deadline; deadline.After(l.now()) {
			return errNotDue
		}
		return nil
	})
	switch code := cay.CodeOf(err); {
	case errors.Is(err, errNotDue):
		l.plan(id, deadline)
		return nil
	case code == cay.CodeSandboxNotFound, code == cay.CodeConflict, code == cay.CodeShuttingDown:
		return nil // it ended or was paused meanwhile
	default:
		return err // in transition: whoever moves it schedules it, and so do we
	}
}

// prune forgets sandboxes that ended long ago.
func (l *life) prune(ctx context.Context) error {
	n, err := l.store.PruneSandboxes(ctx, l.now().Add(-keepEnded))
	if n > 0 {
		l.log.Info("forgot ended sandboxes", "count", n)
	}
	return err
}

// reconcile brings record and node together: what is on record and not on the
// node has ended, what is on the node and not on record is removed, interrupted
// operations are rolled forward or back, and the deadlines on record count.
func (l *life) reconcile(ctx context.Context) error {
	// The node first: a sandbox, or a snapshot, is on record before it is there.
	there, err := l.node.List(ctx)
	if err != nil {
		return err
	}
	var snaps []cay.Snapshot
	if l.snaps != nil {
		if snaps, err = l.snaps.Snapshots(ctx); err != nil {
			return err
		}
	}
	rows, err := l.store.ListSandboxes(ctx, store.SandboxFilter{})
	if err != nil {
		return err
	}
	onNode := map[cay.SandboxID]cay.NodeSandbox{}
	for _, n := range there {
		onNode[n.ID] = n
	}
	onRecord := map[cay.SandboxID]bool{}
	var missing []cay.SandboxID
	for _, r := range rows {
		onRecord[r.ID] = true
		n, here := onNode[r.ID]
		switch {
		case r.State == cay.StateRunning && !here:
			missing = append(missing, r.ID)
		case r.State == cay.StateRunning:
			l.adopt(ctx, r, n)
			l.settleEgress(ctx, r, n)
		case r.State == cay.StatePaused && !here: // its snapshot is all there is to be
		case r.State != cay.StateKilling && l.underWay(r.ID) != nil: // in good hands
		default:
			l.planIfAbsent(r.ID)
		}
	}
	var errs []error
	for _, n := range there {
		if !onRecord[n.ID] {
			errs = append(errs, l.removeOrphan(ctx, n))
		}
	}
	errs = append(errs, l.quarantine(ctx, snaps, rows))
	return errors.Join(append(errs, l.endLost(ctx, missing))...)
}

// adopt takes up a running sandbox at its deadline.
func (l *life) adopt(ctx context.Context, r store.Sandbox, n cay.NodeSandbox) {
	turn := l.turn(r.ID)
	turn.Lock()
	defer turn.Unlock()
	l.mu.Lock()
	known := l.due.byID[r.ID] != nil
	l.mu.Unlock()
	if !known {
		// The record may have changed since it was read; a look too early
		// only reads it again.
		l.plan(r.ID, r.Deadline)
	}
	if r.Execution != n.ExecutionID {
		l.learnRun(ctx, r.ID, n.ExecutionID)
	}
	if r.Deadline.Sub(n.Deadline).Abs() <= deadlineSlack {
		return
	}
	fresh, err := l.store.FindSandbox(ctx, "", r.ID)
	if err == nil && fresh.State == cay.StateRunning {
		l.tellNode(ctx, r.ID, fresh.Deadline)
	}
}

// learnRun records which run of a sandbox is under way, for a record of an
// earlier version of Cay.
func (l *life) learnRun(ctx context.Context, id cay.SandboxID, e cay.ExecutionID) {
	_, err := l.update(ctx, id, func(s *store.Sandbox) error {
		if s.State != cay.StateRunning || s.Execution != "" {
			return errNotMoved
		}
		s.Execution = e
		return nil
	})
	if err != nil && !errors.Is(err, errNotMoved) {
		l.log.Warn("recording which run of a sandbox is under way", "sandbox", id, "error", err)
	}
}

// planIfAbsent schedules a look at once, unless one is due anyway.
func (l *life) planIfAbsent(id cay.SandboxID) {
	now := l.now()
	l.mu.Lock()
	if l.due.byID[id] == nil {
		l.due.set(id, now)
	}
	l.mu.Unlock()
	l.wake()
}

// removeOrphan ends a sandbox that no live record owns. One that was started
// after this server belongs to someone in it, such as the verification of a
// template, and is left alone.
func (l *life) removeOrphan(ctx context.Context, n cay.NodeSandbox) error {
	if n.StartedAt.After(l.began) {
		return nil
	}
	rec, err := l.store.FindSandbox(ctx, "", n.ID)
	if err != nil && cay.CodeOf(err) != cay.CodeSandboxNotFound {
		return err
	}
	if err == nil && rec.State != cay.StateEnded {
		return nil
	}
	l.log.Warn("removing a sandbox that no record owns", "sandbox", n.ID, "execution", n.ExecutionID)
	return l.killOnNode(ctx, n.ID, cay.EndOrphan)
}

// endLost records the end of sandboxes that the node does not have, unless the
// node says meanwhile why.
func (l *life) endLost(ctx context.Context, missing []cay.SandboxID) error {
	if len(missing) == 0 || !sleep(ctx, lostGrace) {
		return nil
	}
	var errs []error
	for _, id := range missing {
		_, err := l.node.Get(ctx, id)
		switch cay.CodeOf(err) {
		case "":
			continue // it had just come
		case cay.CodeSandboxNotFound:
		default:
			errs = append(errs, err)
			continue
		}
		now := l.now()
		_, err = l.update(ctx, id, func(s *store.Sandbox) error {
			if s.State != cay.StateRunning {
				return errNotMoved
			}
			setEnd(s, cay.StateEnded, cay.EndNodeLost, "its machine restarted, or lost it", now)
			return nil
		})
		if err == nil {
			l.unplan(id)
			l.log.Error("a running sandbox was lost", "sandbox", id)
		} else if !errors.Is(err, errNotMoved) && cay.CodeOf(err) != cay.CodeSandboxNotFound {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
