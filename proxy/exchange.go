package proxy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/rawconn"
)

// wireBuffer is the size of the buffers of a connection to a guest. A stream
// holds one of them, so it is small; what is larger goes past it.
const wireBuffer = 4 << 10

// shortBody bounds the bodies that are sent before the answer is looked for. A
// call has such a one, and it is there already, with its header.
const shortBody = 2 << 10

// longBody is from what size on a body is left to the kernel to move.
const longBody = 1 << 20

var (
	readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, wireBuffer) }}
	writers = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, wireBuffer) }}
)

var errLongHeader = errors.New("the header of the answer is too long")

// wire is one HTTP/1.1 connection to a guest, used by one exchange at a time
// and by the goroutine that makes it: no other one waits for answers.
type wire struct {
	conn  net.Conn
	in    *bufio.Reader
	left  int64       // how much more the header may take; negative: it is over
	later bool        // it is made with the first bytes that are sent
	quiet *time.Timer // closes it when it was kept for long
}

// Read reads for in, and bounds what a header takes.
func (w *wire) Read(p []byte) (int, error) {
	if w.left < 0 {
		return w.conn.Read(p)
	}
	if w.left == 0 {
		return 0, errLongHeader
	}
	if int64(len(p)) > w.left {
		p = p[:w.left]
	}
	n, err := w.conn.Read(p)
	w.left -= int64(n)
	return n, err
}

func newWire(conn net.Conn) *wire {
	w := &wire{conn: conn, in: readers.Get().(*bufio.Reader)}
	w.in.Reset(w)
	return w
}

// close ends the connection. Nobody reads from it any more.
func (w *wire) close() {
	_ = w.conn.Close()
	if w.in != nil {
		w.in.Reset(nil)
		readers.Put(w.in)
		w.in = nil
	}
}

// alive reports whether a connection that nobody used can carry a request: the
// guest has neither closed it nor said anything unasked.
func (w *wire) alive() bool {
	c := w.tcp()
	return c != nil && c.Quiet()
}

// reply is an answer under way. Its reader calls end.
type reply struct {
	*http.Response
	wire *wire // nil for HTTP/2, where the transport has its own
	sent chan struct{}
	stop func() bool // of watching the context
	keep func(*wire)
	told bool // the client has all of it
}

// rest returns the last n bytes of a long body as they come over TCP, so that
// the kernel can move them without our reading them; nil if that cannot be.
func (a *reply) rest(n int64) *io.LimitedReader {
	if a.wire == nil || n < longBody || a.wire.in.Buffered() > 0 {
		return nil
	}
	conn := a.wire.tcp()
	if conn == nil {
		return nil
	}
	return &io.LimitedReader{R: conn.TCPConn, N: n}
}

// end gives the connection back, or closes it. whole tells that the answer was
// read to its end.
func (a *reply) end(whole bool) {
	if a.wire == nil {
		_ = a.Body.Close() // of a response that was read or given up
		return
	}
	w := a.wire
	calm := a.stop() // else the connection is being broken off
	select {
	case <-a.sent:
	default: // the request is still being sent; its sender needs the connection
		_ = w.conn.Close()
		return
	}
	if whole && calm && a.keep != nil && !a.Close && w.in.Buffered() == 0 {
		a.keep(w)
		return
	}
	if a.told {
		w.close()
		return
	}
	go w.close() // a system call that the client need not wait for
}

// longAgo breaks off what waits for a connection.
var longAgo = time.Unix(1, 0)

// exchange sends a request over a connection and waits for the header of the
// answer; interim is called for what comes before it. The body goes on being
// sent after that.
func (w *wire) exchange(req *http.Request, interim func(code int, h http.Header)) (*reply, error) {
	a := &reply{wire: w, sent: make(chan struct{})}
	a.stop = context.AfterFunc(req.Context(), func() { _ = w.conn.SetDeadline(longAgo) })
	w.left = maxResponseHeader
	if w.later {
		late := time.AfterFunc(dialTimeout, w.giveUp)
		defer late.Stop()
	}
	if req.Body == nil || req.Body == http.NoBody || req.ContentLength > 0 && req.ContentLength <= shortBody {
		err := w.send(req)
		close(a.sent)
		var broken *bodyError
		if err != nil && (errors.As(err, &broken) || !w.said()) {
			a.stop()
			return nil, err
		}
	} else {
		go func() {
			defer close(a.sent)
			if err := w.send(req); err != nil {
				var broken *bodyError
				if errors.As(err, &broken) {
					_ = w.conn.SetReadDeadline(longAgo) // there will be no answer to half a request
				}
			}
		}()
	}
	for {
		res, err := http.ReadResponse(w.in, req) //nolint:bodyclose // reply.end does
		if err != nil {
			a.stop()
			return nil, err
		}
		if res.StatusCode/100 != 1 || res.StatusCode == http.StatusSwitchingProtocols {
			w.left = -1
			a.Response = res
			return a, nil
		}
		interim(res.StatusCode, res.Header)
	}
}

// giveUp ends the wait for a guest that does not take the connection.
func (w *wire) giveUp() {
	if c := w.tcp(); c != nil && c.Opening() {
		_ = w.conn.SetDeadline(longAgo)
	}
}

// tcp returns the connection without what is around it; nil if that is TLS.
func (w *wire) tcp() *rawconn.Conn {
	if t, ok := w.conn.(*tracked); ok {
		if c, ok := t.Conn.(*rawconn.Conn); ok {
			return c
		}
	}
	return nil
}

// said reports whether the guest has sent something: an answer to a request
// that it did not want to have all of.
func (w *wire) said() bool {
	_, err := w.in.Peek(1)
	return err == nil
}

// bodyError is what the client's side of a body ended with.
type bodyError struct{ error }

func (e *bodyError) Unwrap() error { return e.error }

// send writes a request and its body. What came over HTTP has been checked by
// the server that read it: no name or value holds a line's end.
func (w *wire) send(req *http.Request) error {
	out := writers.Get().(*bufio.Writer)
	out.Reset(w.conn)
	defer func() {
		out.Reset(nil)
		writers.Put(out)
	}()
	writeHeader(out, req)
	switch {
	case req.Body == nil || req.Body == http.NoBody:
		return out.Flush()
	case req.ContentLength > 0:
		return sendCounted(out, w.conn, req)
	default:
		return sendChunked(out, req)
	}
}

// writeHeader writes a request up to its body; errors stay in out.
func writeHeader(out *bufio.Writer, req *http.Request) {
	line := func(parts ...string) {
		for _, p := range parts {
			_, _ = out.WriteString(p) // the error comes again with Flush
		}
		_, _ = out.WriteString("\r\n")
	}
	line(req.Method, " ", req.URL.RequestURI(), " HTTP/1.1")
	line("Host: ", req.Host)
	for k, vv := range req.Header {
		switch k {
		case "Host", "Content-Length", "Transfer-Encoding", "Trailer":
			continue
		}
		for _, v := range vv {
			line(k, ": ", v)
		}
	}
	if req.Close {
		line("Connection: close")
	}
	switch {
	case req.ContentLength > 0:
		line("Content-Length: ", strconv.FormatInt(req.ContentLength, 10))
	case req.Body != nil && req.Body != http.NoBody:
		line("Transfer-Encoding: chunked")
		if len(req.Trailer) > 0 {
			line("Trailer: ", strings.Join(slices.Sorted(maps.Keys(req.Trailer)), ", "))
		}
	case req.Method == http.MethodPost || req.Method == http.MethodPut || req.Method == http.MethodPatch:
		line("Content-Length: 0")
	}
	line()
}

// sendCounted sends a body of known length; its first part goes with the header,
// and of a long one what follows goes past us, if it can.
func sendCounted(out *bufio.Writer, conn net.Conn, req *http.Request) error {
	var b buffer
	defer b.free()
	var past *passage
	defer func() { past.close() }()
	to := io.Writer(out)
	for left := req.ContentLength; left > 0; {
		p := b.bytes()
		p = p[:min(int64(len(p)), left)]
		n, moved, err := past.read(req.Body, p)
		switch {
		case moved && past.err != nil:
			return past.err
		case n > 0 && !moved:
			if _, err := to.Write(p[:n]); err != nil {
				return err
			}
			if err := out.Flush(); err != nil {
				return err
			}
		}
		left -= int64(n)
		b.grow(n)
		switch {
		case left == 0:
		case err == io.EOF:
			return &bodyError{io.ErrUnexpectedEOF}
		case err != nil:
			return &bodyError{err}
		}
		if to == io.Writer(out) && n > 0 {
			to = conn
			if body, ok := req.Body.(*clientBody); ok && left >= longBody {
				past = newPassage(body.conn, conn)
			}
		}
	}
	return nil
}

// sendChunked sends a body that ends when it ends, and its trailer.
func sendChunked(out *bufio.Writer, req *http.Request) error {
	var b buffer
	defer b.free()
	for {
		if err := out.Flush(); err != nil {
			return err
		}
		p := b.bytes()
		n, err := req.Body.Read(p)
		if n > 0 {
			_, _ = out.WriteString(strconv.FormatInt(int64(n), 16))
			_, _ = out.WriteString("\r\n")
			_, _ = out.Write(p[:n])
			_, _ = out.WriteString("\r\n")
		}
		b.grow(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return &bodyError{err}
		}
	}
	_, _ = out.WriteString("0\r\n")
	for k, vv := range req.Trailer {
		for _, v := range vv {
			_, _ = out.WriteString(k + ": " + v + "\r\n")
		}
	}
	_, _ = out.WriteString("\r\n")
	return out.Flush()
}

// maxIdle bounds the connections to one execution's envd that nobody uses.
const maxIdle = 64

// take returns a kept connection, or nil.
func (u *upstreams) take(c *connections) *wire {
	for {
		u.mu.Lock()
		if len(c.idle) == 0 {
			u.mu.Unlock()
			return nil
		}
		w := c.idle[len(c.idle)-1]
		c.idle = c.idle[:len(c.idle)-1]
		u.mu.Unlock()
		w.quiet.Stop()
		if w.alive() {
			return w
		}
		w.close()
	}
}

// put keeps a connection for the next request to an execution.
func (u *upstreams) put(c *connections, w *wire) {
	u.mu.Lock()
	ok := !c.ended && len(c.idle) < maxIdle
	if ok {
		if w.quiet == nil {
			w.quiet = time.AfterFunc(envdIdle, func() { u.expire(c, w) })
		} else {
			w.quiet.Reset(envdIdle)
		}
		c.idle = append(c.idle, w)
	}
	u.mu.Unlock()
	if !ok {
		w.close()
	}
}

// expire closes a connection that nobody has used for long.
func (u *upstreams) expire(c *connections, w *wire) {
	u.mu.Lock()
	found := false
	for i := range c.idle {
		if c.idle[i] == w {
			c.idle = append(c.idle[:i], c.idle[i+1:]...)
			found = true
			break
		}
	}
	u.mu.Unlock()
	if found {
		w.close()
	}
}

// do takes a request to a port of an execution.
func (u *upstreams) do(req *http.Request, c *connections, t target, interim func(code int, h http.Header)) (*reply, error) {
	if isGRPC(req) {
		res, err := u.h2.RoundTrip(interimOf(req, interim)) //nolint:bodyclose // reply.end does
		if err != nil {
			return nil, err
		}
		return &reply{Response: res}, nil
	}
	kept := t.port == envdPort
	if kept {
		if w := u.take(c); w != nil {
			a, err := w.exchange(req, interim)
			if err == nil {
				return u.keeping(a, c), nil
			}
			again := w.left == maxResponseHeader && repeatable(req) && req.Context().Err() == nil
			_ = w.conn.Close() // its buffer may be in use by who sends the body
			if !again {
				return nil, err
			}
			// The daemon closed the kept connection as it was used.
		}
	}
	if !kept && req.Body == nil && req.URL.Scheme == "http" {
		return u.doLater(req, c, t, interim)
	}
	conn, err := u.connect(req.Context(), c, t.port, req.URL.Scheme == "https")
	if err != nil {
		return nil, err
	}
	w := newWire(conn)
	a, err := w.exchange(req, interim)
	if err != nil {
		_ = w.conn.Close()
		return nil, err
	}
	if kept {
		return u.keeping(a, c), nil
	}
	return a, nil
}

// keeping has the connection of an answer kept for the next request.
func (u *upstreams) keeping(a *reply, c *connections) *reply {
	a.keep = func(w *wire) { u.put(c, w) }
	return a
}

// doLater is do for a request that can be written again, since it has no body:
// the connection is made with it.
func (u *upstreams) doLater(req *http.Request, c *connections, t target, interim func(code int, h http.Header)) (a *reply, err error) {
	err = untilOpen(req.Context(), t.port, func() error {
		conn, err := u.dialLater(req.Context(), c, t.port)
		if err != nil {
			return err
		}
		w := newWire(conn)
		w.later = true
		if a, err = w.exchange(req, interim); err != nil {
			w.close() // nobody sends a body
		}
		return err
	})
	return a, err
}

// connect opens a connection to a port of an execution.
func (u *upstreams) connect(ctx context.Context, c *connections, port uint16, secure bool) (net.Conn, error) {
	addr := c.hostport(port)
	if secure {
		return u.dialTLS("http/1.1")(ctx, "tcp", addr)
	}
	return u.dial(ctx, "tcp", addr)
}

// isGRPC reports whether a request needs HTTP/2 to the service.
func isGRPC(req *http.Request) bool {
	const grpc = "application/grpc"
	ct := req.Header.Get("Content-Type")
	return req.ProtoMajor == 2 && len(ct) >= len(grpc) && ct[:len(grpc)] == grpc && (len(ct) == len(grpc) || ct[len(grpc)] != '-')
}
