package api

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

// update changes a record. With [life.admit] it is the only way to do so: a
// move that is not in the table is a defect, and changes nothing.
func (l *life) update(ctx context.Context, id cay.SandboxID, change func(*store.Sandbox) error) (store.Sandbox, error) {
	return l.store.UpdateSandbox(ctx, id, l.legally(id, change))
}

// admit is update for a move that takes a place of the team's limit.
func (l *life) admit(ctx context.Context, id cay.SandboxID, limit int, change func(*store.Sandbox) error) (store.Sandbox, error) {
	return l.store.AdmitSandbox(ctx, id, limit, l.legally(id, change))
}

func (l *life) legally(id cay.SandboxID, change func(*store.Sandbox) error) func(*store.Sandbox) error {
	return func(s *store.Sandbox) error {
		from := s.State
		if err := change(s); err != nil {
			return err
		}
		if !from.May(s.State) {
			l.log.Error("an illegal move of a sandbox was refused", "sandbox", id, "from", from, "to", s.State)
			return fmt.Errorf("sandbox %s may not move from %s to %s", id, from, s.State)
		}
		return nil
	}
}

// op is an operation on a sandbox that this process carries out. There is one
// at a time for each sandbox.
type op struct {
	id     cay.SandboxID
	cancel context.CancelCauseFunc // calls off a start; nil for the others
	done   chan struct{}           // closed when the outcome is on record, or due
}

// begin takes up an operation; false if there is one already.
func (l *life) begin(id cay.SandboxID, cancel context.CancelCauseFunc) (*op, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ops[id] != nil {
		return nil, false
	}
	o := &op{id: id, cancel: cancel, done: make(chan struct{})}
	l.ops[id] = o
	return o, true
}

// done ends an operation.
func (l *life) done(o *op) {
	l.mu.Lock()
	delete(l.ops, o.id)
	l.mu.Unlock()
	close(o.done)
}

// underWay returns the operation on a sandbox, if there is one.
func (l *life) underWay(id cay.SandboxID) *op {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ops[id]
}

// awaitPoll is how often a record is looked at that another process moves.
const awaitPoll = 100 * time.Millisecond

// await returns when the operation on a sandbox is over. If there is none here,
// it returns after a moment: a restart's reconciler, or another process, is
// about to do what the record says.
func (l *life) await(ctx context.Context, id cay.SandboxID) {
	if o := l.underWay(id); o != nil {
		select {
		case <-o.done:
		case <-ctx.Done():
		}
		return
	}
	sleep(ctx, awaitPoll)
}

// maxHistory is how much of a sandbox's history is kept.
const maxHistory = 100

// note adds to a sandbox's history.
func note(s *store.Sandbox, at time.Time, what cay.EventType, message string) {
	h := append(slices.Clone(s.History), store.Happening{At: at, Type: what, Message: message})
	s.History = h[max(0, len(h)-maxHistory):]
}

// reason is an error as the history tells it.
func reason(err error) string {
	var e *cay.Error
	if errors.As(err, &e) {
		return e.Message
	}
	return "something went wrong inside Cay; the log has it"
}
