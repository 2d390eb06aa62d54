package api

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

// endQueue holds the node's reports until they are on record. The node must not
// wait for the store.
type endQueue struct {
	mu   sync.Mutex
	list []cay.SandboxEnd
	more chan struct{}
}

func (q *endQueue) init() { q.more = make(chan struct{}, 1) }

func (q *endQueue) add(e cay.SandboxEnd) {
	q.mu.Lock()
	q.list = append(q.list, e)
	q.mu.Unlock()
	select {
	case q.more <- struct{}{}:
	default: // awake already
	}
}

func (q *endQueue) first() (cay.SandboxEnd, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.list) == 0 {
		return cay.SandboxEnd{}, false
	}
	return q.list[0], true
}

func (q *endQueue) drop() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.list = q.list[1:]
}

// watch takes the node's reports of sandboxes that ended.
func (l *life) watch(ctx context.Context) {
	for {
		err := l.node.Watch(ctx, l.ends.add)
		if ctx.Err() != nil {
			return
		}
		l.log.Error("watching the node; trying again", "error", err)
		if !sleep(ctx, retryFirst) {
			return
		}
	}
}

// recordEnds puts the node's reports on record, in order, each until it is.
func (l *life) recordEnds(ctx context.Context) {
	for {
		e, ok := l.ends.first()
		if !ok {
			select {
			case <-ctx.Done():
				return
			case <-l.ends.more:
			}
			continue
		}
		if err := l.recordEnd(ctx, e); err != nil {
			if ctx.Err() != nil {
				return // the reconciler of the next run finds the sandbox gone
			}
			l.log.Error("recording the end of a sandbox; trying again", "sandbox", e.ID, "error", err)
			if !sleep(ctx, retryFirst) {
				return
			}
			continue
		}
		l.ends.drop()
	}
}

// recordEnd puts one report on record.
func (l *life) recordEnd(ctx context.Context, e cay.SandboxEnd) error {
	at := e.At.UTC().Truncate(time.Microsecond)
	if at.IsZero() {
		at = l.now()
	}
	intent := false
	_, err := l.update(ctx, e.ID, func(s *store.Sandbox) error {
		switch {
		case s.State == cay.StateEnded, s.State == cay.StatePaused:
			return errNotMoved
		case s.State == cay.StateStarting && e.Reason == cay.EndStartFailed:
			return errNotMoved // recorded by whoever began it
		case s.State == cay.StateResuming:
			// Which run this is of cannot be told yet.
			if e.Reason != cay.EndPaused && e.Reason != cay.EndStartFailed {
				l.noteEarly(e.ExecutionID)
			}
			return errNotMoved
		case e.ExecutionID != "" && s.Execution != "" && e.ExecutionID != s.Execution:
			return errNotMoved // an earlier run
		case e.Reason == cay.EndPaused && s.State == cay.StatePausing && e.Snapshot == s.Snapshot:
			toPaused(s, at)
			return nil
		case e.Reason == cay.EndPaused && s.State == cay.StateRunning && e.Snapshot != "":
			// The intent is not on record, as after a restored backup; what
			// the node says is what there is.
			s.State, s.Snapshot, s.SnapshotMemory, s.PausedAt, intent = cay.StatePausing, e.Snapshot, true, at, true
			return nil
		case e.Reason == cay.EndPaused:
			return errNotMoved // a kill was faster
		}
		setEnd(s, cay.StateEnded, e.Reason, e.Message, at)
		return nil
	})
	switch {
	case err == nil && intent:
		return l.recordEnd(ctx, e)
	case err == nil:
		l.unplan(e.ID)
		return nil
	case errors.Is(err, errNotMoved), cay.CodeOf(err) == cay.CodeSandboxNotFound:
		return nil // a sandbox of a template's verification has no record
	}
	return err
}

// maxEarly bounds what is remembered of ends that came too early; a resume takes
// them up within a minute.
const maxEarly = 1000

func (l *life) noteEarly(e cay.ExecutionID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.early) >= maxEarly {
		clear(l.early)
	}
	l.early[e] = true
}

// endedEarly reports whether a run ended before it was on record.
func (l *life) endedEarly(e cay.ExecutionID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.early[e]
	delete(l.early, e)
	return was
}
