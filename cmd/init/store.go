package main

import (
	"encoding/binary"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Kinds of the messages between envd and PID 1 about processes of users; envd's
// handover.go says what each carries. A message is its kind, a process's number
// in four bytes, and what follows from that. PID 1 understands no more of it
// than it must: which descriptors are open, and how a process ended.
const (
	keepProcess   = 'k' // to and fro: a set of descriptors, a record, the descriptors
	closeFile     = 'c' // from envd: the number of a descriptor
	forgetProcess = 'f' // from envd
	tellStatus    = 's' // to and fro: a wait status
	keepPiece     = 'p' // to and fro: output that envd has read and nobody got
	gotPieces     = 'g' // from envd: that output is in its hands
	handOver      = 'x' // from envd: all is said, start the next
	isUp          = 'u' // from envd: it serves
	thatIsAll     = 'd' // to envd: these were the processes
)

const (
	messageHead = 5
	maxMessage  = 128 << 10
	maxFiles    = 4 // of one process
	maxPieces   = 8 // of one process: one of each stream, and as many again in case
)

// kept is what PID 1 holds for one process of a user.
type kept struct {
	record []byte
	files  [maxFiles]int // -1: none, or closed
	status []byte        // once it has ended
	pieces [][]byte
}

// store holds the descriptors of processes of users, so that the end of envd
// closes nothing: neither does a process die of writing to a pipe that nobody
// reads, nor does a terminal hang up. The next envd gets them. Under numbers that
// no process has, envd gives it watchers as well.
type store struct {
	mu    sync.Mutex
	procs map[uint32]*kept
	envd  int // our end of the socket to it, or -1
	done  bool
	up    bool
}

// open makes the socket of the next envd and begins to listen to it. It returns
// envd's end, and a channel that is closed once all that it said is stored.
func (s *store) open() (theirs int, over chan struct{}, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, nil, fmt.Errorf("making a socket: %w", err)
	}
	for _, fd := range fds {
		// Best effort: a message may wait for the one before it.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 2*maxMessage)
	}
	s.mu.Lock()
	s.envd, s.done, s.up = fds[0], false, false
	s.mu.Unlock()
	over = make(chan struct{})
	go func() {
		defer close(over)
		s.listen(fds[0])
	}()
	return fds[1], over, nil
}

// listen stores what envd says until it has ended.
func (s *store) listen(fd int) {
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxFiles))
	for {
		n, oobn, _, _, err := unix.Recvmsg(fd, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			break
		}
		s.take(buf[:n], received(oob[:oobn]))
	}
	s.mu.Lock()
	s.envd = -1
	s.mu.Unlock()
	_ = unix.Close(fd)
}

// hangUp lets listen end after what has been said, also if somebody else holds
// the other end of an envd that has ended.
func (s *store) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.envd >= 0 {
		_ = unix.Shutdown(s.envd, unix.SHUT_RD) // its end may have been seen already
	}
}

// received returns the descriptors that came with a message.
func received(oob []byte) (fds []int) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range msgs {
		more, err := unix.ParseUnixRights(&msgs[i])
		if err == nil {
			fds = append(fds, more...)
		}
	}
	return fds
}

// take stores one message.
func (s *store) take(m []byte, fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	if len(m) < messageHead {
		return
	}
	pid, body := binary.LittleEndian.Uint32(m[1:]), m[messageHead:]
	p := s.procs[pid]
	switch kind := m[0]; {
	case kind == handOver:
		s.done = true
	case kind == isUp:
		s.up = true
	case kind == keepProcess && len(body) > 0:
		s.forget(pid) // the kernel gave the number out again
		p = &kept{record: append([]byte(nil), body[1:]...)}
		for i := range p.files {
			p.files[i] = -1
			if body[0]&(1<<i) != 0 && len(fds) > 0 {
				p.files[i], fds = fds[0], fds[1:]
			}
		}
		s.procs[pid] = p
	case p == nil:
	case kind == closeFile && len(body) == 1 && int(body[0]) < maxFiles:
		p.close(int(body[0]))
	case kind == forgetProcess:
		s.forget(pid)
	case kind == tellStatus:
		p.status = append([]byte(nil), body...)
	case kind == gotPieces:
		p.pieces = nil // they are to reach a reader once
	case kind == keepPiece && len(p.pieces) < maxPieces:
		p.pieces = append(p.pieces, append([]byte(nil), body...))
	}
}

// forget closes what is held for a process. s.mu is held.
func (s *store) forget(pid uint32) {
	if p := s.procs[pid]; p != nil {
		for i := range p.files {
			p.close(i)
		}
		delete(s.procs, pid)
	}
}

func (p *kept) close(i int) {
	if p.files[i] >= 0 {
		_ = unix.Close(p.files[i])
		p.files[i] = -1
	}
}

// message is one about a process.
func message(kind byte, pid uint32, body ...byte) []byte {
	m := binary.LittleEndian.AppendUint32([]byte{kind}, pid)
	return append(m, body...)
}

// send gives a message to envd, which may have ended.
func send(fd int, m []byte, fds ...int) {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for {
		if err := unix.Sendmsg(fd, m, oob, nil, unix.MSG_NOSIGNAL); err != unix.EINTR {
			return
		}
	}
}

// handOut tells envd of every process.
func (s *store) handOut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for pid, p := range s.procs {
		var set byte
		var fds []int
		for i, fd := range p.files {
			if fd >= 0 {
				set |= 1 << i
				fds = append(fds, fd)
			}
		}
		send(s.envd, append(message(keepProcess, pid, set), p.record...), fds...)
		if p.status != nil {
			send(s.envd, message(tellStatus, pid, p.status...))
		}
		for _, piece := range p.pieces {
			send(s.envd, message(keepPiece, pid, piece...))
		}
	}
	send(s.envd, message(thatIsAll, 0))
}

// ended notes that a process ended whose parent was an envd before this one.
func (s *store) ended(pid int, st uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.procs[uint32(pid)]
	if p == nil {
		return
	}
	p.status = binary.LittleEndian.AppendUint32(nil, st)
	if s.envd >= 0 {
		send(s.envd, message(tellStatus, uint32(pid), p.status...))
	}
}

// serves reports whether the last envd has come to serve.
func (s *store) serves() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.up
}

// handedOver reports whether the envd that has ended wanted to be followed.
func (s *store) handedOver() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done
}
