package proxy

import (
	"errors"
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// passage lets the kernel move a long body from a client's connection to a
// guest's: the copy into this process and the one out of it are the larger part
// of what a transfer costs here.
//
// The body is read as ever, through the HTTP server, which counts it. But a read
// from the connection that is to fill the passage's own piece of memory, and no
// other, reports bytes that are with the guest already, and fills nothing.
type passage struct {
	from     *guarded
	src, dst syscall.RawConn
	out, in  int // the ends of a pipe
	piece    []byte
	moved    bool  // the last read was answered so
	err      error // of the guest's side
}

// pipeSize is how much the kernel is asked to move at once: what a pipe may hold
// without a privilege (pipe-max-size in proc(5)).
const pipeSize = 1 << 20

// newPassage returns a passage; nil if one of the connections is not TCP itself.
func newPassage(from *guarded, to net.Conn) *passage {
	t, ok := to.(*tracked)
	if !ok || from == nil {
		return nil
	}
	src, err1 := rawTCP(from.Conn)
	dst, err2 := rawTCP(t.Conn)
	var pipe [2]int
	if errors.Join(err1, err2) != nil || unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return nil
	}
	_, _ = unix.FcntlInt(uintptr(pipe[0]), unix.F_SETPIPE_SZ, pipeSize) // less is slower, no more
	return &passage{from: from, src: src, dst: dst, out: pipe[0], in: pipe[1]}
}

func rawTCP(c net.Conn) (syscall.RawConn, error) {
	tcp, ok := c.(syscall.Conn)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	return tcp.SyscallConn()
}

// read reads from a body that comes over the connection. If it reports moved,
// the bytes are with the guest, unless g.err is set, and not in p; otherwise they
// are in p, as those are that the server had read ahead. Without a passage they
// always are.
func (g *passage) read(body io.Reader, p []byte) (n int, moved bool, err error) {
	if g == nil {
		n, err = body.Read(p)
		return n, false, err
	}
	g.piece, g.moved = p, false
	g.from.passage.Store(g)
	n, err = body.Read(p)
	g.from.passage.CompareAndSwap(g, nil) // if the connection was not read from
	return n, g.moved, err
}

// offer is called by the connection with the memory that a read is to fill. It
// reports whether the passage answers that read.
func (g *passage) offer(p []byte) bool {
	return len(p) > 0 && &p[0] == &g.piece[0] && g.from.passage.CompareAndSwap(g, nil)
}

// move answers a read of up to n bytes.
func (g *passage) move(n int) (int, error) {
	got, err := splice(g.src.Read, func(fd int) (int64, error) { return unix.Splice(fd, nil, g.in, nil, n, spliceFlags) })
	if err == nil && got == 0 {
		err = io.EOF
	}
	g.moved = got > 0
	for left := got; left > 0 && g.err == nil; {
		var m int
		m, g.err = splice(g.dst.Write, func(fd int) (int64, error) { return unix.Splice(g.out, nil, fd, nil, left, spliceFlags) })
		left -= m
	}
	return got, err
}

const spliceFlags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK

// splice makes a system call once a connection is ready for it.
func splice(ready func(func(fd uintptr) bool) error, call func(fd int) (int64, error)) (int, error) {
	var n int64
	var err error
	rerr := ready(func(fd uintptr) bool {
		for {
			n, err = call(int(fd))
			if err != unix.EINTR {
				return err != unix.EAGAIN
			}
		}
	})
	if rerr != nil {
		return 0, rerr
	}
	return int(max(n, 0)), err
}

// close gives the pipe back. There may be no passage.
func (g *passage) close() {
	if g != nil {
		unix.Close(g.out)
		unix.Close(g.in)
	}
}
