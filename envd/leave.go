package envd

import (
	"context"
	"net/http"
	"sync"
	"time"
)

// How long an envd that is being replaced waits, one after the other: for
// transfers to end, for readers to take what was read for them, for calls to be
// answered.
const (
	transferTime = 30 * time.Second
	readerTime   = 30 * time.Second
	answerTime   = 5 * time.Second
)

// leaving is the state of an envd that is making room for the next.
type leaving struct {
	begun   chan struct{}  // closed: no output is read any more
	cut     chan struct{}  // closed: slow readers are not waited for any more
	stopped chan struct{}  // closed: readers have all that was read
	pumps   sync.WaitGroup // who reads output
}

func newLeaving() leaving {
	return leaving{begun: make(chan struct{}), cut: make(chan struct{}), stopped: make(chan struct{})}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// enter counts readers of output, unless envd leaves.
func (ps *processes) enter(n int) bool {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if isClosed(ps.leave.begun) {
		return false
	}
	ps.leave.pumps.Add(n)
	return true
}

// handOver stops reading output, between two pieces of it, and tells PID 1 what
// the next envd has to know. What a process writes from now on waits in its pipe.
func (ps *processes) handOver() {
	ps.mu.Lock()
	close(ps.leave.begun)
	live := append([]*process(nil), ps.order...)
	ps.mu.Unlock()
	for _, p := range live {
		for _, f := range p.files() {
			if f != nil {
				f.SetReadDeadline(time.Unix(1, 0)) // wakes who waits; a closed file has nobody
			}
		}
	}
	still := make(chan struct{})
	go func() { ps.leave.pumps.Wait(); close(still) }()
	within := func(d time.Duration) bool {
		select {
		case <-still:
			return true
		case <-time.After(d):
			return false
		}
	}
	if !within(readerTime) {
		close(ps.leave.cut)
		within(answerTime) // there is nothing left to wait for; yet envd must go
	}
	close(ps.leave.stopped)
	for _, p := range live {
		p.mu.Lock()
		if p.reaped != nil {
			ps.keeper.tellStatus(p.pid, *p.reaped)
		}
		p.mu.Unlock()
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, p := range ps.ended {
		if p.dropping.Load() == 0 {
			ps.keeper.keep(p)
		}
	}
}

// leave makes room for the next envd, which PID 1 starts: it takes over the
// processes and their output, where this one stopped, the watchers that are
// polled, the configuration and the ports. Transfers under way are waited for,
// streams are told to come again.
func (s *Server) leave(servers []*http.Server) {
	s.await(transferTime, func() bool { return s.transfers.Load() == 0 })
	gone, stop := context.WithCancel(context.Background())
	stop()
	for _, h := range servers {
		h.SetKeepAlivesEnabled(false)
		_ = h.Shutdown(gone) // closes the listener: whoever comes waits for the next envd
	}
	s.procs.handOver()
	s.watchers.leave()
	s.await(answerTime, func() bool { return s.inFlight.Load() == 0 })
	for _, h := range servers {
		ctx, stop := context.WithTimeout(context.Background(), answerTime)
		if h.Shutdown(ctx) != nil {
			h.Close() // what is cut off now takes away what it has made
		}
		stop()
	}
	s.await(answerTime, func() bool { return s.inFlight.Load() == 0 })
	for _, err := range s.watchers.handOver(s.procs.keeper) {
		s.log.Error("a watcher ends with this envd", "err", err)
	}
	s.procs.keeper.tell(handOver, 0, nil)
}

// await waits until something is so, for a while at most.
func (s *Server) await(most time.Duration, f func() bool) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(most); !f() && time.Now().Before(end); {
		<-tick.C
	}
}
