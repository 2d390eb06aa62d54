package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
	"github.com/cayhq/cay/internal/rawconn"
)

// A service that is bound to the guest's localhost is re-exported by envd
// within about a second (contract, section 4), so a refused connection is
// tried again: five tries in all. envd itself is only away while PID 1
// restarts it.
var (
	userRetries = []time.Duration{100 * time.Millisecond, 200 * time.Millisecond, 300 * time.Millisecond, 400 * time.Millisecond}
	envdRetries = []time.Duration{25 * time.Millisecond, 75 * time.Millisecond, 150 * time.Millisecond, 250 * time.Millisecond}
)

// dialTimeout bounds one try; a healthy guest on this machine takes a
// millisecond. Tests shorten it.
var dialTimeout = 10 * time.Second

const (
	// envdIdle is how long a connection to envd is kept for the next request.
	// Far below the 640 s after which envd closes it, so that no request
	// meets a connection that is being closed.
	envdIdle = 90 * time.Second
	// maxResponseHeader bounds what a guest may make us hold.
	maxResponseHeader = 256 << 10
)

var (
	errFull = errors.New("the sandbox has too many open connections")
	errCut  = errors.New("the sandbox has ended")
)

// upstreams holds the connections to sandboxes, apart for each execution.
type upstreams struct {
	limit int
	h2    *http.Transport // gRPC: HTTP/2, with prior knowledge or by ALPN

	mu   sync.Mutex
	cuts uint64 // how often cut was called
	open map[cay.ExecutionID]*connections
}

// connections are those of one execution. It exists while a request or a
// connection of it does.
type connections struct {
	execution cay.ExecutionID
	addr      netip.Addr

	// Guarded by upstreams.mu.
	requests int
	ended    bool
	hooks    map[*func()]struct{} // what to call when the sandbox ends
	idle     []*wire              // kept for envd, the one used last at the end
}

// hostport is the name under which a transport keeps connections. It holds the
// execution and not the address, so that a connection made for one execution
// is never found for another that got the same address later.
func (c *connections) hostport(port uint16) string {
	return string(c.execution) + ":" + strconv.Itoa(int(port))
}

func (u *upstreams) init(limit int) {
	u.limit = limit
	u.open = make(map[cay.ExecutionID]*connections)
	u.h2 = &http.Transport{
		// Proxy stays nil: an operator's HTTP_PROXY must not get guest traffic.
		DialContext:            u.dial,
		DialTLSContext:         u.dialTLS("h2"),
		DisableCompression:     true, // bodies pass as they are
		MaxResponseHeaderBytes: maxResponseHeader,
		ReadBufferSize:         4 << 10,
		WriteBufferSize:        4 << 10,
		IdleConnTimeout:        5 * time.Second,
	}
	u.h2.Protocols = new(http.Protocols)
	u.h2.Protocols.SetUnencryptedHTTP2(true)
	u.h2.Protocols.SetHTTP2(true)
}

// enter looks up a sandbox and counts a request to it. After a nil error the
// caller calls leave.
func (u *upstreams) enter(ctx context.Context, cat catalog.Catalog, id cay.SandboxID) (catalog.Route, *connections, error) {
	for {
		u.mu.Lock()
		cuts := u.cuts
		u.mu.Unlock()
		route, err := cat.Get(ctx, id)
		if err != nil {
			return catalog.Route{}, nil, err
		}
		u.mu.Lock()
		if u.cuts != cuts {
			// A sandbox ended since we asked, perhaps this one: its route may
			// be stale and its address somebody else's. Ask again.
			u.mu.Unlock()
			continue
		}
		c := u.open[route.Execution]
		if c == nil {
			c = &connections{execution: route.Execution, addr: route.Addr, hooks: make(map[*func()]struct{})}
			u.open[route.Execution] = c
		}
		if c.requests >= u.limit {
			u.mu.Unlock()
			return catalog.Route{}, nil, errFull
		}
		c.requests++
		u.mu.Unlock()
		return route, c, nil
	}
}

// hold counts a request twice, for a stream that outlives it.
func (u *upstreams) hold(c *connections) {
	u.mu.Lock()
	defer u.mu.Unlock()
	c.requests++
}

func (u *upstreams) leave(c *connections) {
	u.mu.Lock()
	defer u.mu.Unlock()
	c.requests--
	u.forget(c)
}

// forget drops the entry of an execution that has nothing open. u.mu is held.
func (u *upstreams) forget(c *connections) {
	if c.requests == 0 && len(c.hooks) == 0 && u.open[c.execution] == c {
		delete(u.open, c.execution)
	}
}

func (u *upstreams) dead(c *connections) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return c.ended
}

// cut ends everything of one execution.
func (u *upstreams) cut(e cay.ExecutionID) {
	u.mu.Lock()
	u.cuts++
	hooks := u.end(u.open[e])
	u.mu.Unlock()
	for _, f := range hooks {
		f()
	}
}

// close ends everything.
func (u *upstreams) close() {
	u.mu.Lock()
	u.cuts++
	var hooks []func()
	for _, c := range u.open {
		hooks = append(hooks, u.end(c)...)
	}
	u.mu.Unlock()
	for _, f := range hooks {
		f()
	}
	u.h2.CloseIdleConnections()
}

// end marks an execution and returns what must be called without u.mu, which
// is held here.
func (u *upstreams) end(c *connections) []func() {
	if c == nil {
		return nil
	}
	c.ended = true
	delete(u.open, c.execution)
	out := make([]func(), 0, len(c.hooks))
	for f := range c.hooks {
		out = append(out, *f)
	}
	clear(c.hooks)
	for _, w := range c.idle {
		w.quiet.Stop()
	}
	c.idle = nil
	return out
}

// onEnd has f called when the sandbox ends. The returned function takes that
// back. It is nil if the sandbox has ended already.
func (u *upstreams) onEnd(c *connections, f func()) (undo func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if c.ended {
		return nil
	}
	c.hooks[&f] = struct{}{}
	u.open[c.execution] = c // a dial may outlive the request that began it
	return func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		delete(c.hooks, &f)
		u.forget(c)
	}
}

// dial connects to a port of an execution; addr is what hostport made.
func (u *upstreams) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	name, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	p, err := parsePort(port)
	if err != nil {
		return nil, err
	}
	u.mu.Lock()
	c := u.open[cay.ExecutionID(name)]
	u.mu.Unlock()
	if c == nil {
		return nil, errCut
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	undo := u.onEnd(c, cancel)
	if undo == nil {
		return nil, errCut
	}
	defer undo()
	var conn net.Conn
	err = untilOpen(ctx, p, func() (err error) {
		conn, err = dialGuest(ctx, c, p, nil)
		return err
	})
	if err != nil {
		return nil, err
	}
	return u.track(c, conn)
}

// dialLater returns a connection to a port of an execution that is made with
// the first bytes that are sent. So the kernel sends them as soon as the guest
// takes the connection, without us, and whether it does shows only then.
func (u *upstreams) dialLater(ctx context.Context, c *connections, port uint16) (net.Conn, error) {
	conn, err := dialGuest(ctx, c, port, rawconn.Later)
	if err != nil {
		return nil, err
	}
	return u.track(c, conn)
}

// track has a connection closed when its sandbox ends.
func (u *upstreams) track(c *connections, conn net.Conn) (net.Conn, error) {
	forget := u.onEnd(c, func() { hangUp(conn) })
	if forget == nil {
		_ = conn.Close()
		return nil, errCut
	}
	return &tracked{Conn: conn, forget: forget}, nil
}

// serverName is the context's key for the name that a service in a guest is
// asked for by TLS.
type serverName struct{}

// handshakeTimeout bounds a handshake with a guest.
const handshakeTimeout = 10 * time.Second

// dialTLS returns a dial for services that speak TLS. They are the creator's
// own, behind the network of the sandbox alone: certificates are not verified.
func (u *upstreams) dialTLS(proto string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := u.dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		name, _ := ctx.Value(serverName{}).(string)
		c := tls.Client(conn, &tls.Config{ServerName: name, NextProtos: []string{proto},
			InsecureSkipVerify: true, //nolint:gosec // the contract: not verified
			MinVersion:         tls.VersionTLS12})
		ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
		defer cancel()
		if err := c.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("speaking TLS to the service: %w", err)
		}
		return c, nil
	}
}

// hangUp ends a connection to a guest that is about to be killed. It says no
// farewell: a guest that cannot answer one any more would leave the kernel
// repeating it for a minute, and a socket for as long.
func hangUp(conn net.Conn) {
	if c, ok := conn.(interface{ SetLinger(sec int) error }); ok {
		_ = c.SetLinger(0) // if that fails, Close is the ordinary one
	}
	_ = conn.Close()
}

// dialGuest connects to a port of an execution, once.
func dialGuest(ctx context.Context, c *connections, port uint16, control func(network, address string, s syscall.RawConn) error) (net.Conn, error) {
	// A guest is on this machine and says goodbye, or is cut off: there is
	// nothing to keep alive, and each setting of a socket is a system call.
	d := net.Dialer{Timeout: dialTimeout, KeepAlive: -1, Control: control}
	conn, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(c.addr, port).String())
	if err != nil {
		return nil, err
	}
	return rawconn.New(conn), nil
}

// untilOpen tries again while a port refuses connections.
func untilOpen(ctx context.Context, port uint16, try func() error) error {
	retries := userRetries
	if port == envdPort {
		retries = envdRetries
	}
	for {
		err := try()
		if !errors.Is(err, syscall.ECONNREFUSED) || len(retries) == 0 {
			return err
		}
		again := time.NewTimer(retries[0])
		retries = retries[1:]
		select {
		case <-again.C:
		case <-ctx.Done():
			again.Stop()
			return context.Cause(ctx)
		}
	}
}

// tracked is a connection that cut can close.
type tracked struct {
	net.Conn
	once   sync.Once
	forget func()
}

func (t *tracked) Close() error {
	t.once.Do(t.forget)
	return t.Conn.Close()
}

// CloseWrite lets an upgraded stream end one direction.
func (t *tracked) CloseWrite() error {
	if c, ok := t.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}

func timedOut(err error) bool {
	var ne net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &ne) && ne.Timeout()
}

// notOpen reports that nothing took the connection.
func notOpen(err error) bool {
	for _, e := range []error{syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
