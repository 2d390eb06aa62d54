package envd

import (
	"errors"
	"io"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/process"
)

// Sizes of one piece of output, of the contract.
const (
	pipeChunk = 32 << 10
	ptyChunk  = 16 << 10
)

// An ended process may have left descendants that hold its output. Its own
// bytes are all in the pipe then; theirs are awaited while they come without a
// pause of quietTime, for drainTime and lateBytes at most. Time in which a
// client makes us wait does not count.
const (
	quietTime = 200 * time.Millisecond
	drainTime = 2 * time.Second
	lateBytes = 1 << 20
)

// drain is the state of that, guarded by the process's mu.
type drain struct {
	until time.Time // zero while the process lives
	last  time.Time // when output came last
	bytes int       // that came since the process ended
}

// subscriber is one reader of a process's events. Sending waits for it: a slow
// reader slows the process down, and nothing is dropped or hoarded.
type subscriber struct {
	ch   chan *pb.ProcessEvent
	over <-chan struct{} // closed when the request has ended
	gone chan struct{}   // closed when it does not read any more
}

// subscribe adds a reader whose request ends when over is closed. end is set
// if the process has ended already, and then there is nothing to read.
func (p *process) subscribe(over <-chan struct{}) (sub *subscriber, end *pb.ProcessEvent_EndEvent) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.end != nil {
		return nil, p.end
	}
	sub = &subscriber{ch: make(chan *pb.ProcessEvent), over: over, gone: make(chan struct{})}
	p.subs = append(p.subs, sub)
	if p.orphan != nil {
		p.orphan.join()
	}
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

// broadcast hands an event to every reader and returns when each has it, or
// when cut is closed. It reports whether one got it, or there was none.
func (p *process) broadcast(ev *pb.ProcessEvent, cut <-chan struct{}) (taken bool) {
	p.order.Lock()
	defer p.order.Unlock()
	p.mu.Lock()
	subs := p.subs
	p.mu.Unlock()
	taken = len(subs) == 0
	for _, s := range subs {
		select {
		case s.ch <- ev:
			taken = true
		case <-s.gone:
		case <-s.over:
			// Its time is over, though it may still hang in a write to a
			// client that does not read.
		case <-cut:
		}
	}
	return taken || !isClosed(cut)
}

// finish tells the end. Every event before it is in its readers' hands, so
// that closing done is enough, and no reader can hold it up.
func (p *process) finish(e *pb.ProcessEvent_EndEvent) {
	p.mu.Lock()
	p.end, p.subs = e, nil
	p.mu.Unlock()
	close(p.done)
}

// buffers are lent to a pipe only while there is something to read, so that
// hundreds of silent processes cost no buffers.
var buffers = sync.Pool{New: func() any { b := make([]byte, pipeChunk); return &b }}

// source reads one end of a pipe or terminal without blocking a thread.
type source struct {
	f    *os.File
	rc   syscall.RawConn
	size int // of a piece

	number int // among the process's files
	event  func([]byte) *pb.ProcessEvent_DataEvent
}

// take reads what is there: a piece, io.EOF at the end, or EAGAIN.
func (s source) take(fd uintptr) ([]byte, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := unix.Read(int(fd), (*buf)[:s.size])
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return nil, err
		case n <= 0:
			// EIO is how a terminal says that nobody holds its other end.
			return nil, io.EOF
		default:
			return append([]byte(nil), (*buf)[:n]...), nil
		}
	}
}

// next waits for a piece. The error is io.EOF at the end, and
// os.ErrDeadlineExceeded.
func (s source) next() (b []byte, err error) {
	werr := s.rc.Read(func(fd uintptr) bool {
		b, err = s.take(fd)
		return err != unix.EAGAIN
	})
	if werr != nil {
		return nil, werr
	}
	return b, err
}

// now is next without waiting.
func (s source) now() (b []byte, err error) {
	if cerr := s.rc.Control(func(fd uintptr) { b, err = s.take(fd) }); cerr != nil {
		return nil, cerr
	}
	return b, err
}

// defaultCapacity is the size of a pipe nobody has changed, and of a
// terminal's buffer.
const defaultCapacity = 64 << 10

// capacity is how much can be on its way.
func (s source) capacity() int {
	n := 0
	_ = s.rc.Control(func(fd uintptr) { n, _ = unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0) })
	return max(n, defaultCapacity)
}

// discard reads until the end and drops everything, so that a descendant that
// goes on writing is neither stopped nor killed for it.
func (s source) discard() {
	defer s.f.Close()
	s.f.SetReadDeadline(time.Time{})
	for {
		if _, err := s.next(); err != nil {
			return
		}
	}
}

// pump forwards what comes out of a source until its end, or until the process
// has ended and what follows is not awaited any more, and reports which. It
// stops when envd leaves: the next one reads on where it stopped.
func (p *process) pump(ps *processes, s source) (eof bool) {
	forward := func(b []byte) (enough bool) {
		ps.stir()
		began := time.Now()
		if !p.broadcast(&pb.ProcessEvent{Event: &pb.ProcessEvent_Data{Data: s.event(b)}}, ps.leave.cut) {
			ps.keeper.tell(keepPiece, p.pid, append([]byte{byte(s.number)}, b...))
		}
		return p.came(len(b), began)
	}
	if p.orphan != nil {
		held := p.held[s.number]
		select {
		case <-p.orphan.joined:
			p.held[s.number] = nil
			if len(held) > 0 {
				forward(held)
			}
		case <-ps.leave.begun:
			if len(held) > 0 {
				ps.keeper.tell(keepPiece, p.pid, append([]byte{byte(s.number)}, held...))
			}
		}
	}
	for {
		if isClosed(ps.leave.begun) {
			return false
		}
		b, err := s.next()
		if err == nil {
			if forward(b) {
				break
			}
			continue
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return true
		}
		if isClosed(ps.leave.begun) {
			return false
		}
		at := p.patience()
		if time.Until(at) <= 0 {
			break
		}
		s.f.SetReadDeadline(at)
	}
	// What is on its way now was written before the end, or so soon after that
	// it may pass for it; but not more, or a busy writer would never let the
	// process end.
	for left := s.capacity(); left > 0; {
		if isClosed(ps.leave.begun) {
			return false
		}
		b, err := s.now()
		if err != nil {
			return errors.Is(err, io.EOF)
		}
		left -= len(b)
		forward(b)
	}
	return false
}

// came notes that output came, and that handing it on took until now. It
// reports whether that is enough of an ended process.
func (p *process) came(n int, began time.Time) (enough bool) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	d := &p.drain
	if d.until.IsZero() {
		return false
	}
	d.last, d.until, d.bytes = now, d.until.Add(now.Sub(began)), d.bytes+n
	return d.bytes >= lateBytes
}

// patience is until when more output of descendants is awaited.
func (p *process) patience() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := p.drain.last.Add(quietTime)
	if at.After(p.drain.until) {
		at = p.drain.until
	}
	return at
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

// follow forwards output until the process has ended, and then says so. It
// does not wait for descendants that keep the output open: they go on, and
// what they write is dropped.
func (p *process) follow(ps *processes) {
	type stream struct {
		source
		eof bool
	}
	var streams []*stream
	open := func(number, size int, event func([]byte) *pb.ProcessEvent_DataEvent) {
		f := p.files()[number]
		if rc, err := f.SyscallConn(); err == nil {
			streams = append(streams, &stream{source: source{f, rc, size, number, event}})
		}
	}
	if p.pty != nil {
		open(filePTY, ptyChunk, ptyData)
	} else {
		open(fileStdout, pipeChunk, stdoutData)
		open(fileStderr, pipeChunk, stderrData)
	}
	if !ps.enter(len(streams)) {
		return // the next envd begins with it
	}
	var pumps sync.WaitGroup
	for _, s := range streams {
		pumps.Go(func() {
			defer ps.leave.pumps.Done()
			s.eof = p.pump(ps, s.source)
		})
	}

	st, err := p.wait(ps)
	if p.deadline != nil {
		p.deadline.Stop()
	}
	if p.pty != nil {
		// gVisor sends no hang-up when a terminal loses its shell.
		_ = signalSession(p.pid, unix.SIGHUP)
		_ = signalSession(p.pid, unix.SIGCONT)
	}
	now := time.Now()
	p.mu.Lock()
	p.drain = drain{until: now.Add(drainTime), last: now}
	p.mu.Unlock()
	for _, s := range streams {
		s.f.SetReadDeadline(now.Add(quietTime))
	}
	pumps.Wait()
	if isClosed(ps.leave.begun) {
		return // the next envd reads what is left, and tells the end
	}

	for _, s := range streams {
		if !s.eof && p.pty == nil {
			p.dropping.Add(1)
		}
	}
	ps.retire(p)
	p.finish(endEvent(st, err))
	if p.stdin != nil {
		p.stdin.Close() // wakes an input that still waits; twice is harmless
	}
	if p.dropping.Load() == 0 {
		ps.keeper.tell(forgetProcess, p.pid, nil)
	} else {
		// The next envd is to know that it has ended, and drop what comes, too.
		ps.keeper.tellStatus(p.pid, st)
		ps.keeper.tell(closeFile, p.pid, []byte{fileStdin})
	}
	for _, s := range streams {
		if s.eof || p.pty != nil {
			s.f.Close() // a terminal's last users are hung up, as when a window closes
			continue
		}
		go func() {
			s.discard()
			if p.dropping.Add(-1) == 0 {
				ps.keeper.tell(forgetProcess, p.pid, nil)
			}
		}()
	}
}

// wait returns how the process ended, and reaps it.
func (p *process) wait(ps *processes) (st syscall.WaitStatus, err error) {
	if p.orphan != nil {
		<-p.orphan.ended
		if p.orphan.status == lostStatus {
			err = errLostStatus
		}
		return p.orphan.status, err
	}
	reap := func(options int) bool {
		var pid int
		for {
			if options == unix.WNOHANG {
				// What is reaped while envd leaves is to be told.
				p.mu.Lock()
				if isClosed(ps.leave.begun) {
					p.mu.Unlock()
					return false // PID 1 will
				}
			}
			pid, err = syscall.Wait4(int(p.pid), &st, options, nil)
			if options != unix.WNOHANG {
				p.mu.Lock()
			}
			if pid > 0 {
				p.reaped = &st
			}
			p.mu.Unlock()
			if err != unix.EINTR {
				return pid != 0
			}
		}
	}
	if p.exit != nil {
		// By the poller: a thread for each of hundreds of processes would
		// cost more than all else that is kept of them.
		defer p.exit.Close()
		if rc, rerr := p.exit.SyscallConn(); rerr == nil {
			if rerr = rc.Read(func(uintptr) bool { return reap(unix.WNOHANG) }); rerr == nil {
				return st, err
			}
		}
	}
	reap(0)
	return st, err
}

// endEvent says how a process ended, in the words of os.ProcessState, which
// the clients know.
func endEvent(st syscall.WaitStatus, err error) *pb.ProcessEvent_EndEvent {
	e := &pb.ProcessEvent_EndEvent{ExitCode: -1}
	switch {
	case err != nil:
		e.Status = err.Error()
	case st.Exited():
		e.ExitCode, e.Exited = int32(st.ExitStatus()), true
		e.Status = "exit status " + strconv.Itoa(st.ExitStatus())
	default:
		e.Status = "signal: " + st.Signal().String()
		if st.CoreDump() {
			e.Status += " (core dumped)"
		}
	}
	if e.ExitCode != 0 {
		e.Error = &e.Status
	}
	return e
}

// kill ends the whole session.
func (p *process) kill() { _ = signalSession(p.pid, unix.SIGKILL) }

// closeFiles gives up a process that did not start.
func (p *process) closeFiles() {
	for _, f := range []*os.File{p.stdin, p.stdout, p.stderr, p.pty} {
		if f != nil {
			f.Close()
		}
	}
}
