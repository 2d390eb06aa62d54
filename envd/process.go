package envd

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/process"
)

// Sizes of one piece of output, and times, of the contract.
const (
	pipeChunk = 32 << 10
	ptyChunk  = 16 << 10
	// retain is how long an ended process still answers Connect.
	retain = 30 * time.Second
	// orphanTime is how long, after a kill, output is still awaited from
	// descendants that left the session with the pipes in their hands.
	orphanTime = 2 * time.Second
	// ptyGrace is how long, after a shell ended, its terminal is drained
	// while background jobs still hold it.
	ptyGrace = 100 * time.Millisecond
)

// processes holds what envd started.
type processes struct {
	log *slog.Logger
	// started gets a token, without blocking, with every start.
	started chan struct{}

	cgroup *os.File // nil: children stay in envd's cgroup

	mu     sync.Mutex
	live   map[uint32]*process
	ended  map[uint32]*process
	order  []*process // live ones by start, for tags and List
	timers map[*process]*time.Timer
	closed bool
}

func newProcesses(log *slog.Logger) *processes {
	return &processes{log: log, started: make(chan struct{}, 1),
		live: map[uint32]*process{}, ended: map[uint32]*process{}, timers: map[*process]*time.Timer{}}
}

// openCgroup makes children start in a cgroup v2 directory, if it is one.
func (ps *processes) openCgroup(dir string) {
	f, err := os.Open(dir)
	if err != nil {
		return // no such cgroup: PID 1 could not make one
	}
	ps.cgroup = f
}

func (ps *processes) close() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.closed = true
	for p, t := range ps.timers {
		t.Stop()
		delete(ps.timers, p)
	}
	if ps.cgroup != nil {
		ps.cgroup.Close()
		ps.cgroup = nil
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
	select {
	case ps.started <- struct{}{}:
	default:
	}
}

// retire moves an ended process to those that still answer for a while.
func (ps *processes) retire(p *process) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
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
	ps.timers[p] = time.AfterFunc(retain, func() {
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

	os     *os.Process
	stdout *os.File // nil with a terminal
	stderr *os.File
	pty    *os.File // the terminal's master, or nil

	inMu     chan struct{} // held while stdin is used; a channel, so that waiting can be given up
	stdin    *os.File      // nil if there is none
	inClosed bool          // guarded by inMu

	// order makes all subscribers see the same order.
	order sync.Mutex
	mu    sync.Mutex
	subs  []*subscriber
	end   *pb.ProcessEvent_EndEvent

	killed   chan struct{} // closed by the first SIGKILL
	killOnce sync.Once
	done     chan struct{} // closed after the end
}

// subscriber is one reader of a process's events. Sending waits for it: a slow
// reader slows the process down, and nothing is dropped or hoarded.
type subscriber struct {
	ch   chan *pb.ProcessEvent
	gone chan struct{}
}

// subscribe adds a reader; end is set if the process has ended already.
func (p *process) subscribe() (sub *subscriber, end *pb.ProcessEvent_EndEvent) {
	p.mu.Lock()
	defer p.mu.Unlock()
	sub = &subscriber{ch: make(chan *pb.ProcessEvent), gone: make(chan struct{})}
	if p.end != nil {
		return sub, p.end
	}
	p.subs = append(p.subs, sub)
	return sub, nil
}

func (p *process) unsubscribe(sub *subscriber) {
	close(sub.gone)
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, s := range p.subs {
		if s == sub {
			// A copy: a broadcast may be going through the old slice.
			p.subs = append(append([]*subscriber(nil), p.subs[:i]...), p.subs[i+1:]...)
			return
		}
	}
}

// broadcast hands an event to every reader and returns when each has it. An
// end is the last event: later readers get it from subscribe.
func (p *process) broadcast(ev *pb.ProcessEvent) {
	p.order.Lock()
	defer p.order.Unlock()
	p.mu.Lock()
	subs := p.subs
	if e := ev.GetEnd(); e != nil {
		p.end, p.subs = e, nil
	}
	p.mu.Unlock()
	for _, s := range subs {
		select {
		case s.ch <- ev:
		case <-s.gone:
		}
	}
}

// buffers are lent to a pipe only while there is something to read, so that
// hundreds of silent processes cost no buffers.
var buffers = sync.Pool{New: func() any { b := make([]byte, pipeChunk); return &b }}

// pump forwards what comes out of f until its end.
func (p *process) pump(f *os.File, size int, event func([]byte) *pb.ProcessEvent_DataEvent) {
	rc, err := f.SyscallConn()
	if err != nil {
		return
	}
	for {
		var chunk []byte
		end := false
		read := func(fd uintptr) bool {
			buf := buffers.Get().(*[]byte)
			defer buffers.Put(buf)
			for {
				n, err := unix.Read(int(fd), (*buf)[:size])
				if err == unix.EINTR {
					continue
				}
				if err == unix.EAGAIN {
					return false
				}
				// EIO is how a terminal says that nobody holds its other end.
				if n <= 0 {
					end = true
				} else {
					chunk = append([]byte(nil), (*buf)[:n]...)
				}
				return true
			}
		}
		err := rc.Read(read)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			// The session is over; what it wrote before is still ours.
			end = false
			if cerr := rc.Control(func(fd uintptr) { end = !read(fd) || end }); cerr != nil {
				return
			}
		} else if err != nil {
			return
		}
		if chunk != nil {
			p.broadcast(&pb.ProcessEvent{Event: &pb.ProcessEvent_Data{Data: event(chunk)}})
		}
		if end {
			return
		}
	}
}

func stdoutData(b []byte) *pb.ProcessEvent_DataEvent {
	return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Stdout{Stdout: b}}
}

func stderrData(b []byte) *pb.ProcessEvent_DataEvent {
	return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Stderr{Stderr: b}}
}

func ptyData(b []byte) *pb.ProcessEvent_DataEvent {
	return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Pty{Pty: b}}
}

// follow forwards output until the process and everything that holds its
// pipes has ended, and then says so.
func (p *process) follow(ps *processes) {
	var pumps sync.WaitGroup
	if p.pty != nil {
		pumps.Go(func() { p.pump(p.pty, ptyChunk, ptyData) })
	} else {
		pumps.Go(func() { p.pump(p.stdout, pipeChunk, stdoutData) })
		pumps.Go(func() { p.pump(p.stderr, pipeChunk, stderrData) })
	}
	drained := make(chan struct{})
	go func() { pumps.Wait(); close(drained) }()

	state, err := p.os.Wait()
	if p.pty != nil {
		// gVisor sends no hang-up when a terminal loses its shell.
		signalSession(p.pid, unix.SIGHUP)
		signalSession(p.pid, unix.SIGCONT)
		p.pty.SetReadDeadline(time.Now().Add(ptyGrace))
	}
	select {
	case <-drained:
	case <-p.killed:
		t := time.NewTimer(orphanTime)
		select {
		case <-drained:
		case <-t.C:
			now := time.Now()
			for _, f := range []*os.File{p.stdout, p.stderr, p.pty} {
				if f != nil {
					f.SetReadDeadline(now)
				}
			}
			<-drained
		}
		t.Stop()
	}
	ps.retire(p)
	p.broadcast(&pb.ProcessEvent{Event: &pb.ProcessEvent_End{End: endEvent(state, err)}})
	close(p.done)
	p.closeFiles()
}

func (p *process) closeFiles() {
	// Closing wakes an input that still waits; twice is harmless.
	for _, f := range []*os.File{p.stdin, p.stdout, p.stderr, p.pty} {
		if f != nil {
			f.Close()
		}
	}
}

func endEvent(state *os.ProcessState, err error) *pb.ProcessEvent_EndEvent {
	if err != nil {
		text := err.Error()
		return &pb.ProcessEvent_EndEvent{ExitCode: -1, Status: text, Error: &text}
	}
	e := &pb.ProcessEvent_EndEvent{ExitCode: int32(state.ExitCode()), Exited: state.Exited(), Status: state.String()}
	if !state.Success() {
		text := state.String()
		e.Error = &text
	}
	return e
}

// kill ends the whole session.
func (p *process) kill() {
	p.killOnce.Do(func() { close(p.killed) })
	signalSession(p.pid, unix.SIGKILL)
}

// expire ends the session at its deadline.
func (p *process) expire() {
	select {
	case <-p.done:
	default:
		p.kill()
	}
}

// signalSession signals the session that sid leads: its first group at once,
// and then those that job control made.
func signalSession(sid uint32, sig syscall.Signal) error {
	err := unix.Kill(-int(sid), sig)
	if errors.Is(err, unix.ESRCH) {
		err = unix.Kill(int(sid), sig)
	}
	d, derr := os.Open("/proc")
	if derr != nil {
		return err
	}
	defer d.Close()
	for {
		names, rerr := d.Readdirnames(256)
		for _, n := range names {
			pid, perr := strconv.Atoi(n)
			if perr != nil || pid == int(sid) {
				continue
			}
			b, ferr := os.ReadFile("/proc/" + n + "/stat")
			if ferr != nil {
				continue
			}
			if pgrp, session, ok := parseStat(string(b)); ok && session == int(sid) && pgrp != int(sid) {
				unix.Kill(pid, sig)
			}
		}
		if rerr != nil {
			return err
		}
	}
}

// parseStat reads process group and session from /proc/PID/stat (proc(5)). The
// name in it may hold anything, a parenthesis too; the last one ends it.
func parseStat(s string) (pgrp, session int, ok bool) {
	i := strings.LastIndexByte(s, ')')
	if i < 0 {
		return 0, 0, false
	}
	f := strings.Fields(s[i+1:])
	if len(f) < 4 {
		return 0, 0, false
	}
	pgrp, err1 := strconv.Atoi(f[2])
	session, err2 := strconv.Atoi(f[3])
	return pgrp, session, err1 == nil && err2 == nil
}

// input writes to the process. A full pipe makes it wait until done is closed.
func (p *process) input(done <-chan struct{}, in *pb.ProcessInput) error {
	select {
	case p.inMu <- struct{}{}:
		defer func() { <-p.inMu }()
	case <-done:
		return faultf(connect.CodeCanceled, "waiting for earlier input to be taken")
	}
	var f *os.File
	var data []byte
	switch v := in.GetInput().(type) {
	case *pb.ProcessInput_Pty:
		if p.pty == nil {
			return faultf(connect.CodeInternal, "error writing to tty: tty not assigned to process")
		}
		f, data = p.pty, v.Pty
	case *pb.ProcessInput_Stdin:
		switch {
		case p.pty != nil:
			return faultf(connect.CodeInternal, "error writing to stdin: tty assigned to process, use the pty input")
		case p.stdin == nil || p.inClosed:
			return faultf(connect.CodeInternal, "error writing to stdin: stdin not enabled or closed")
		}
		f, data = p.stdin, v.Stdin
	default:
		return faultf(connect.CodeUnimplemented, "invalid input type %T", in.GetInput())
	}
	over := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-done:
			f.SetWriteDeadline(time.Unix(1, 0))
		case <-over:
		}
	}()
	_, err := f.Write(data)
	close(over)
	<-stopped
	f.SetWriteDeadline(time.Time{})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return faultf(connect.CodeCanceled, "the process does not read its input")
	case errors.Is(err, os.ErrClosed), errors.Is(err, io.ErrClosedPipe):
		return notFound("process with pid %d has ended", p.pid)
	case err != nil:
		return faultf(connect.CodeInternal, "error writing to process: %v", err)
	}
	return nil
}

// closeStdin ends the standard input; twice is fine.
func (p *process) closeStdin(done <-chan struct{}) error {
	if p.pty != nil {
		return faultf(connect.CodeUnknown, "cannot close the stdin of a process with a terminal; send it Ctrl-D")
	}
	select {
	case p.inMu <- struct{}{}:
		defer func() { <-p.inMu }()
	case <-done:
		return faultf(connect.CodeCanceled, "waiting for earlier input to be taken")
	}
	if p.stdin == nil || p.inClosed {
		return nil
	}
	p.inClosed = true
	if err := p.stdin.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("closing stdin: %w", err)
	}
	return nil
}
