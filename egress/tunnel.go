package egress

import (
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// pieceSize is what a tunnel moves at once.
const pieceSize = 32 << 10

var pieces = sync.Pool{New: func() any { return new([pieceSize]byte) }}

// tunnel moves bytes both ways until both directions have ended, one has
// failed, or nothing has moved for idle. The end of a direction is passed on.
// It closes neither connection.
func tunnel(a, b net.Conn, idle time.Duration) error {
	t := &idleTimer{a: a, b: b, idle: idle}
	t.touch()
	errs := make(chan error, 2)
	go func() { errs <- pump(a, b, t) }()
	go func() { errs <- pump(b, a, t) }()
	err := <-errs
	if err != nil {
		// The other direction waits for bytes: wake it.
		past := time.Unix(1, 0)
		_, _ = a.SetDeadline(past), b.SetDeadline(past) // they may be closed already
	}
	if other := <-errs; err == nil {
		err = other
	}
	return err
}

// pump copies from src to dst until the end, which it passes on.
func pump(dst, src net.Conn, t *idleTimer) error {
	for {
		piece, n, err := readPiece(src)
		if n > 0 {
			t.touch()
			if _, werr := dst.Write(piece[:n]); werr != nil {
				err = werr
			}
		}
		if piece != nil {
			pieces.Put(piece)
		}
		if err == io.EOF {
			return closeWrite(dst)
		}
		if err != nil {
			return err
		}
	}
}

// readPiece reads once. A connection of the kernel is waited for without
// holding a buffer: thousands of them may be idle.
func readPiece(c net.Conn) (*[pieceSize]byte, int, error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		piece := pieces.Get().(*[pieceSize]byte)
		n, err := c.Read(piece[:])
		return piece, n, err
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, 0, err
	}
	var piece *[pieceSize]byte
	var n int
	var rerr error
	err = raw.Read(func(fd uintptr) bool {
		piece = pieces.Get().(*[pieceSize]byte)
		for {
			if n, rerr = syscall.Read(int(fd), piece[:]); rerr != syscall.EINTR {
				break
			}
		}
		if rerr == syscall.EAGAIN {
			pieces.Put(piece)
			piece = nil
			return false
		}
		return true
	})
	switch {
	case err != nil:
		return piece, 0, err
	case rerr != nil:
		return piece, 0, os.NewSyscallError("read", rerr)
	case n == 0:
		return piece, 0, io.EOF
	}
	return piece, n, nil
}

// closeWrite ends one direction of a connection that can.
func closeWrite(c net.Conn) error {
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// idleTimer keeps the deadline of two connections ahead of now. It moves it
// when a sixteenth has gone by, not for each read.
type idleTimer struct {
	a, b net.Conn
	idle time.Duration
	last atomic.Int64 // nanoseconds since the epoch
}

func (t *idleTimer) touch() {
	now := time.Now()
	last := t.last.Load()
	if now.UnixNano()-last < int64(t.idle/16) || !t.last.CompareAndSwap(last, now.UnixNano()) {
		return
	}
	d := now.Add(t.idle)
	_, _ = t.a.SetDeadline(d), t.b.SetDeadline(d) // a closed connection says so at its next read
}

// reset closes a connection without a farewell: the peer gets a reset at once.
func reset(c net.Conn) {
	if l, ok := c.(interface{ SetLinger(int) error }); ok {
		_ = l.SetLinger(0) // if that fails, Close is the ordinary one
	}
	_ = c.Close()
}
