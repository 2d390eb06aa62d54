package rawconn

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns both ends of a connection on the loopback, the first of them as
// a Listener gives it.
func pair(t *testing.T) (*Conn, *net.TCPConn) {
	t.Helper()
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := Listener{plain}
	defer l.Close()
	other, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); other.Close() })
	return c.(*Conn), other.(*net.TCPConn)
}

// What is written comes out, whatever the sizes of the pieces and however
// slowly it is taken.
func TestBytes(t *testing.T) {
	sent := make([]byte, 8<<20)
	for i := range sent {
		sent[i] = byte(i * 2654435761 >> 13)
	}
	for _, size := range []int{1, 100, 4096, most, most + 1, len(sent)} {
		c, other := pair(t)
		part := sent[:min(len(sent), size*1000)]
		got := make(chan []byte, 1)
		go func() {
			b, _ := io.ReadAll(other) // its error shows in what is missing
			got <- b
		}()
		for p := part; len(p) > 0; {
			n, err := c.Write(p[:min(size, len(p))])
			if err != nil || n != min(size, len(p)) {
				t.Fatalf("pieces of %d: wrote %d, %v", size, n, err)
			}
			p = p[n:]
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b := <-got; !bytes.Equal(b, part) {
			t.Fatalf("pieces of %d: %d bytes came of %d, or others", size, len(b), len(part))
		}
		go func() {
			_, _ = other.Write(part) // its error shows in what is missing
			_ = other.CloseWrite()
		}()
		b, err := io.ReadAll(struct{ io.Reader }{&pieces{c, size}})
		if err != nil || !bytes.Equal(b, part) {
			t.Fatalf("pieces of %d: read %d bytes of %d, or others: %v", size, len(b), len(part), err)
		}
	}
}

// pieces reads so many bytes at most.
type pieces struct {
	from io.Reader
	size int
}

func (r *pieces) Read(p []byte) (int, error) { return r.from.Read(p[:min(len(p), r.size)]) }

// Errors are those of the connection itself, for net/http tells them apart.
func TestErrors(t *testing.T) {
	c, other := pair(t)
	want := func(err error, op string, cause error) {
		t.Helper()
		var oe *net.OpError
		if !errors.As(err, &oe) || oe.Op != op || !errors.Is(err, cause) {
			t.Errorf("%s: %v (%T), want %v", op, err, err, cause)
		}
	}
	b := make([]byte, 10)
	_ = c.SetReadDeadline(time.Unix(1, 0))
	_, err := c.Read(b)
	want(err, "read", os.ErrDeadlineExceeded)
	var ne net.Error
	if !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("%v is no timeout", err)
	}
	_ = c.SetReadDeadline(time.Time{})
	if n, err := c.Read(nil); n != 0 || err != nil {
		t.Errorf("reading nothing: %d, %v", n, err)
	}
	_ = other.SetLinger(0)
	other.Close()
	_, err = c.Read(b)
	want(err, "read", syscall.ECONNRESET)
	_, err = c.Write(b)
	want(err, "write", syscall.EPIPE)
	c.Close()
	_, err = c.Read(b)
	want(err, "read", net.ErrClosed)
	_, err = c.Write(b)
	want(err, "write", net.ErrClosed)
}

// A deadline that is set while a read waits ends it, and so does Close.
func TestInterrupted(t *testing.T) {
	for name, end := range map[string]func(c *Conn){
		"deadline": func(c *Conn) { _ = c.SetReadDeadline(time.Unix(1, 0)) },
		"close":    func(c *Conn) { c.Close() },
	} {
		c, _ := pair(t)
		reading := make(chan struct{})
		done := make(chan error)
		go func() {
			close(reading)
			_, err := c.Read(make([]byte, 1))
			done <- err
		}()
		<-reading
		end(c)
		if err := <-done; err == nil {
			t.Errorf("%s: the read brought something", name)
		}
	}
}

func TestQuiet(t *testing.T) {
	c, other := pair(t)
	if !c.Quiet() {
		t.Error("a new connection is not quiet")
	}
	b := make([]byte, 1)
	_, _ = other.Write([]byte("ab"))
	if _, err := c.Read(b); err != nil { // so both are there
		t.Fatal(err)
	}
	if c.Quiet() {
		t.Error("a connection with a byte to read is quiet")
	}
	if _, err := c.Read(b); err != nil || b[0] != 'b' || !c.Quiet() {
		t.Errorf("read %q, %v: the byte was taken by looking", b, err)
	}
	other.Close()
	if _, err := c.Read(b); err != io.EOF || c.Quiet() {
		t.Errorf("%v: a closed connection is quiet", err)
	}
}

// A listener whose queue is full takes no further connection.
func full(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: at.(*unix.SockaddrInet4).Port}).String()
	c, err := net.Dial("tcp", addr) // a queue of 0 has one place
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return addr
}

func TestLater(t *testing.T) {
	later := func(addr string) *Conn {
		t.Helper()
		c, err := (&net.Dialer{Control: Later}).Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return New(c).(*Conn)
	}
	t.Run("taken", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		c := later(l.Addr().String())
		sent := bytes.Repeat([]byte("0123456789"), 20_000) // more than goes with a SYN
		go func() {
			_, _ = c.Write(sent) // its error shows in what is missing
			_ = c.CloseWrite()
		}()
		other, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if b, err := io.ReadAll(other); err != nil || !bytes.Equal(b, sent) {
			t.Errorf("%d bytes came of %d, or others: %v", len(b), len(sent), err)
		}
		if c.Opening() {
			t.Error("a connection that was taken is still being made")
		}
	})
	t.Run("refused", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		c := later(l.Addr().String()) // Dial did not ask
		_, err = c.Write([]byte("hello"))
		if err == nil {
			_, err = c.Read(make([]byte, 1))
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v, want a refused connection", err)
		}
	})
	t.Run("not taken", func(t *testing.T) {
		c := later(full(t))
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if !c.Opening() {
			t.Error("a connection that nobody took is made")
		}
	})
}
