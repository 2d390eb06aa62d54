package api

import (
	"container/heap"
	"context"
	"sync"
	"time"

	"github.com/cayhq/cay"
)

// maxStep is the greatest difference between wall clock and monotonic clock
// that is followed. A greater one is somebody setting the clock, or the machine
// having slept; it must not end every sandbox at once, or keep all for ever.
const maxStep = 60 * time.Second

// watchClock is how often the wall clock is looked at while anything is
// scheduled, so that a small step forward makes nothing late by more.
const watchClock = 400 * time.Millisecond

// clock is the wall clock, with a guard against steps.
type clock struct {
	wall   func() time.Time
	rebase func(step time.Duration) // called with mu held

	mu       sync.Mutex
	began    time.Time // for the monotonic clock
	lastWall time.Time
	lastMono time.Duration
}

func (c *clock) init(wall func() time.Time) {
	c.wall = wall
	c.began = time.Now()
	c.lastWall = wall().Round(0)
	c.lastMono = time.Since(c.began)
}

// now returns the instant in UTC, to the microsecond. If the wall clock has
// stepped by more than maxStep since the last call, every deadline is moved by
// the step before it returns: what a sandbox had left, it still has.
func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	wall, mono := c.wall().Round(0), time.Since(c.began)
	step := wall.Sub(c.lastWall) - (mono - c.lastMono)
	c.lastWall, c.lastMono = wall, mono
	if step > maxStep || step < -maxStep {
		c.rebase(step)
	}
	return wall.UTC().Truncate(time.Microsecond)
}

// counting are the states in which a deadline counts, or will in a moment.
var counting = []cay.SandboxState{cay.StateStarting, cay.StateRunning, cay.StatePausing, cay.StateResuming, cay.StateSnapshotting}

// rebase moves every deadline by a step of the wall clock: in one step, so that
// a crash leaves all of them moved or none, and while it is done nobody learns
// the new time.
func (l *life) rebase(step time.Duration) {
	step = step.Round(time.Microsecond)
	l.mu.Lock()
	l.due.shift(step)
	l.mu.Unlock()
	l.wake()
	ctx, stop := context.WithTimeout(context.Background(), recordTimeout)
	defer stop()
	n, err := l.store.MoveDeadlines(ctx, step, counting...)
	if err != nil {
		l.log.Error("the wall clock was set; moving the deadlines with it", "step", step, "error", err)
		return
	}
	l.log.Warn("the wall clock was set or the machine slept; every deadline moves with it", "step", step, "sandboxes", n)
}

// schedule says when each sandbox is to be looked at next: at its deadline, or
// when something about it is tried again. life.mu guards it.
type schedule struct {
	heap dueHeap
	byID map[cay.SandboxID]*due
}

// due is one entry of the schedule.
type due struct {
	id    cay.SandboxID
	at    time.Time
	index int
}

func (s *schedule) init() { s.byID = map[cay.SandboxID]*due{} }

// set makes at the time of the sandbox's only entry.
func (s *schedule) set(id cay.SandboxID, at time.Time) {
	if d := s.byID[id]; d != nil {
		d.at = at
		heap.Fix(&s.heap, d.index)
		return
	}
	d := &due{id: id, at: at}
	s.byID[id] = d
	heap.Push(&s.heap, d)
}

func (s *schedule) remove(id cay.SandboxID) {
	if d := s.byID[id]; d != nil {
		heap.Remove(&s.heap, d.index)
		delete(s.byID, id)
	}
}

// pop returns a sandbox that is due at now, if there is one.
func (s *schedule) pop(now time.Time) (cay.SandboxID, bool) {
	if len(s.heap) == 0 || s.heap[0].at.After(now) {
		return "", false
	}
	d := heap.Pop(&s.heap).(*due)
	delete(s.byID, d.id)
	return d.id, true
}

// next returns when the first entry is due.
func (s *schedule) next() (time.Time, bool) {
	if len(s.heap) == 0 {
		return time.Time{}, false
	}
	return s.heap[0].at, true
}

// shift moves every entry; their order stays.
func (s *schedule) shift(step time.Duration) {
	for _, d := range s.heap {
		d.at = d.at.Add(step)
	}
}

// dueHeap implements [heap.Interface], earliest first.
type dueHeap []*due

// Len implements [heap.Interface].
func (h dueHeap) Len() int { return len(h) }

// Less implements [heap.Interface].
func (h dueHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }

// Swap implements [heap.Interface].
func (h dueHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push implements [heap.Interface].
func (h *dueHeap) Push(x any) {
	d := x.(*due)
	d.index = len(*h)
	*h = append(*h, d)
}

// Pop implements [heap.Interface].
func (h *dueHeap) Pop() any {
	old := *h
	d := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return d
}

// plan schedules a look at a sandbox.
func (l *life) plan(id cay.SandboxID, at time.Time) {
	l.mu.Lock()
	l.due.set(id, at)
	l.mu.Unlock()
	l.wake()
}

// unplan forgets a sandbox that has ended.
func (l *life) unplan(id cay.SandboxID) {
	l.mu.Lock()
	l.due.remove(id)
	delete(l.tries, id)
	l.mu.Unlock()
}

func (l *life) wake() {
	select {
	case l.kick <- struct{}{}:
	default: // awake already
	}
}
