// Package rawconn reads and writes TCP connections by system calls that Go's
// scheduler is not told of. A socket that does not block answers at once, and
// what the scheduler does around a call that may take long costs more than the
// call: it wakes a thread that watches over such calls, which then looks at the
// clock every 20 µs. In a guest under gVisor, where each of its own calls and
// each waking of a thread costs tens of microseconds, a round trip is twice as
// long for that.
package rawconn

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// most is up to what size a call is made so. The scheduler cannot use the
// processor during one, and to copy this much takes some 20 µs.
const most = 64 << 10

// Listener accepts connections that are read and written so.
type Listener struct{ net.Listener }

// Accept implements [net.Listener].
func (l Listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return New(c), nil
}

// Conn is a TCP connection like any other, but for how it calls the system.
type Conn struct {
	*net.TCPConn
	raw syscall.RawConn
}

// New returns c as a [Conn], or c itself if it is no TCP connection.
func New(c net.Conn) net.Conn {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return c
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return c
	}
	return &Conn{t, raw}
}

// Read implements [net.Conn].
func (c *Conn) Read(p []byte) (int, error) {
	if seen || len(p) == 0 || len(p) > most {
		return c.TCPConn.Read(p)
	}
	var n uintptr
	var failed syscall.Errno
	err := c.raw.Read(func(fd uintptr) bool {
		n, failed = call(syscall.SYS_READ, fd, p)
		return failed != syscall.EAGAIN
	})
	if err = c.explain("read", err, failed); err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, io.EOF
	}
	return int(n), nil
}

// Write implements [net.Conn].
func (c *Conn) Write(p []byte) (int, error) {
	if seen || len(p) == 0 || len(p) > most {
		return c.TCPConn.Write(p)
	}
	sent := 0
	var failed syscall.Errno
	err := c.raw.Write(func(fd uintptr) bool {
		for {
			var n uintptr
			if n, failed = call(syscall.SYS_WRITE, fd, p[sent:]); failed != 0 {
				return failed != syscall.EAGAIN
			}
			if sent += int(n); sent == len(p) {
				return true
			}
		}
	})
	return sent, c.explain("write", err, failed)
}

// Later is a [net.Dialer.Control] that has the connection made with the first
// bytes that are written to it (tcp(7), TCP_FASTOPEN_CONNECT): Dial returns at
// once, and a read or write says what it would have said. The bytes come along
// with the SYN. A peer that does not take them from there, as all do that were
// not told to, gets them again with the acknowledgement. Where the kernel has
// that turned off, Dial is what it always is.
func Later(_, _ string, s syscall.RawConn) error {
	return s.Control(func(fd uintptr) {
		// No cookie: it would be asked for first, and guards other people's servers.
		if unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN_NO_COOKIE, 1) == nil {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1) // see above
		}
	})
}

// Opening reports that the connection is still being made.
func (c *Conn) Opening() bool {
	opening := false
	err := c.raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		opening = err == nil && info.State == unix.BPF_TCP_SYN_SENT
	})
	return err == nil && opening
}

// Quiet reports that the other side has neither closed the connection nor said
// anything that was not read.
func (c *Conn) Quiet() bool {
	quiet := false
	err := c.raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, failed := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b[0])), 1, syscall.MSG_PEEK|syscall.MSG_DONTWAIT, 0, 0)
		quiet = failed == syscall.EAGAIN
		return true
	})
	return err == nil && quiet
}

// call makes a system call with a buffer, and again when a signal came first.
func call(which, fd uintptr, p []byte) (uintptr, syscall.Errno) {
	for {
		n, _, err := syscall.RawSyscall(which, fd, uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		if err != syscall.EINTR {
			return n, err
		}
	}
}

// explain makes the error that the connection itself would have returned.
func (c *Conn) explain(op string, err error, failed syscall.Errno) error {
	var known *net.OpError
	switch {
	case errors.As(err, &known):
		err = known.Err
	case err == nil && failed != 0:
		err = os.NewSyscallError(op, failed)
	case err == nil:
		return nil
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}
