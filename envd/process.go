package envd

import (
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	pb "github.com/cayhq/cay/internal/gen/envd/process"
)

// retain is how long an ended process still answers Connect.
const retain = 30 * time.Second

// systemTag is the tag of processes that a freeze leaves running.
const systemTag = "_system"

// processes holds what envd started.
type processes struct {
	log *slog.Logger
	// active gets a token, without blocking, with every start, output and end.
	active chan struct{}

	// The cgroups of children; nil: they stay in envd's.
	cgroup, system *os.File

	keeper *keeperConn // nil: what processes are connected to ends with envd
	leave  leaving

	mu     sync.Mutex
	live   map[uint32]*process
	ended  map[uint32]*process
	order  []*process // live ones by start, for tags and List
	timers map[*process]*time.Timer
	closed bool
}

func newProcesses(log *slog.Logger) *processes {
	return &processes{log: log, active: make(chan struct{}, 1),
		leave: newLeaving(), live: map[uint32]*process{}, ended: map[uint32]*process{}, timers: map[*process]*time.Timer{}}
}

// openCgroup makes children start in a cgroup v2 directory, and those with the
// system's tag in its neighbour "system". What PID 1 could not make is missing,
// and then they stay where envd is.
func (ps *processes) openCgroup(dir string) {
	open := func(dir string) *os.File {
		f, err := os.Open(dir)
		if err != nil {
			ps.log.Debug("processes stay in the cgroup of envd", "err", err)
			return nil
		}
		return f
	}
	ps.cgroup, ps.system = open(dir), open(filepath.Join(filepath.Dir(dir), "system"))
}

// group is the cgroup that a process with this tag starts in.
func (ps *processes) group(tag *string) *os.File {
	if tag != nil && *tag == systemTag {
		return ps.system
	}
	return ps.cgroup
}

// stir tells whoever waits for activity that there is some.
func (ps *processes) stir() {
	select {
	case ps.active <- struct{}{}:
	default:
	}
}

func (ps *processes) close() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.closed = true
	for p, t := range ps.timers {
		t.Stop()
		delete(ps.timers, p)
	}
	for _, f := range []*os.File{ps.cgroup, ps.system} {
		if f != nil {
			f.Close()
		}
	}
}

// find returns the process that a selector names: a live one, or with ended
// also one whose end is still answerable.
func (ps *processes) find(sel *pb.ProcessSelector, ended bool) (*process, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	switch v := sel.GetSelector().(type) {
	case *pb.ProcessSelector_Pid:
		if p := ps.live[v.Pid]; p != nil {
			return p, nil
		}
		if p := ps.ended[v.Pid]; p != nil && ended {
			return p, nil
		}
		return nil, notFound("process with pid %d not found", v.Pid)
	case *pb.ProcessSelector_Tag:
		// The youngest of several with one tag: a client that starts a
		// replacement means the replacement.
		for i := len(ps.order) - 1; i >= 0; i-- {
			if p := ps.order[i]; p.tag != nil && *p.tag == v.Tag {
				return p, nil
			}
		}
		if ended {
			var best *process
			for _, p := range ps.ended {
				if p.tag != nil && *p.tag == v.Tag && (best == nil || p.startedAt.After(best.startedAt)) {
					best = p
				}
			}
			if best != nil {
				return best, nil
			}
		}
		return nil, notFound("process with tag %q not found", v.Tag)
	default:
		return nil, invalid("the process selector names neither a pid nor a tag")
	}
}

func (ps *processes) list() []*pb.ProcessInfo {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	infos := make([]*pb.ProcessInfo, 0, len(ps.order))
	for _, p := range ps.order {
		infos = append(infos, &pb.ProcessInfo{Config: p.config, Pid: p.pid, Tag: p.tag})
	}
	return infos
}

func (ps *processes) count() int {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return len(ps.live)
}

func (ps *processes) add(p *process) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.live[p.pid] = p
	ps.order = append(ps.order, p)
	delete(ps.ended, p.pid) // the kernel gave the number out again
	ps.stir()
}

// retire moves an ended process to those that still answer for a while.
func (ps *processes) retire(p *process) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.stir()
	if p.endedAt.IsZero() {
		p.endedAt = time.Now()
	}
	if ps.live[p.pid] == p {
		delete(ps.live, p.pid)
	}
	for i, o := range ps.order {
		if o == p {
			ps.order = append(ps.order[:i], ps.order[i+1:]...)
			break
		}
	}
	if ps.closed {
		return
	}
	if ps.live[p.pid] == nil {
		ps.ended[p.pid] = p
	}
	ps.timers[p] = time.AfterFunc(time.Until(p.endedAt.Add(retain)), func() {
		ps.mu.Lock()
		defer ps.mu.Unlock()
		delete(ps.timers, p)
		if ps.ended[p.pid] == p {
			delete(ps.ended, p.pid)
		}
	})
}

// process is one started program with all its descendants: it leads a session
// of its own, and signals go to the whole session.
type process struct {
	pid       uint32
	tag       *string
	config    *pb.ProcessConfig
	startedAt time.Time
	endedAt   time.Time // set when it is retired
	// deadlineAge is the guest's age at which it is killed; 0: never.
	deadlineAge time.Duration

	orphan *orphan           // of the envd before this one; nil: our child
	held   [fileCount][]byte // output that was read and that nobody got
	// dropping counts the outputs that are read and dropped after the end.
	dropping atomic.Int32

	exit     *os.File    // readable when the process has ended (a pidfd); nil: the kernel has none
	deadline *time.Timer // kills the process; nil: never

	stdout *os.File // nil with a terminal
	stderr *os.File
	pty    *os.File // the terminal's master, or nil

	inMu     chan struct{} // held while stdin is used; a channel, so that waiting can be given up
	stdin    *os.File      // nil if there is none
	inClosed bool          // guarded by inMu

	// order makes all subscribers see the same order.
	order  sync.Mutex
	mu     sync.Mutex
	reaped *syscall.WaitStatus // once it has ended
	subs   []*subscriber
	end    *pb.ProcessEvent_EndEvent
	drain  drain

	done chan struct{} // closed after the end, when every reader has all output
}
