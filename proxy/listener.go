package proxy

import (
	"container/list"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cayhq/cay/internal/rawconn"
)

// handshakeDeadline bounds a TLS handshake of a client.
const handshakeDeadline = 3 * time.Second

// gate bounds the connections of clients, all of them and those of one address,
// before a byte of them is read. When it is full, the one goes that has had
// nothing under way for longest: a flood of connections that say nothing, or
// say it slowly, pushes out itself, and whoever has a request is not touched.
type gate struct {
	max, perPeer int
	// exempt has addresses that count for max alone.
	exempt func(netip.Addr) bool

	mu     sync.Mutex
	free   sync.Cond // a place became free, or the gate was closed
	n      int
	closed bool
	peers  map[netip.Addr]*peer
	quiet  list.List // of *guarded: those with nothing under way, longest first
}

// peer is who connects: an IPv4 address, or the /64 that one customer has.
type peer struct {
	addr  netip.Addr
	n     int
	quiet list.List // as gate.quiet
}

// guarded is a client's connection that the gate has let in.
type guarded struct {
	net.Conn
	gate *gate
	peer *peer
	// passage answers the next read that is to fill its memory.
	passage atomic.Pointer[passage]

	// Guarded by gate.mu.
	busy     int // requests under way
	out      bool
	all, own *list.Element // in the two lists while busy is 0
}

func newGate(limit, perPeer int, exempt func(netip.Addr) bool) *gate {
	g := &gate{max: limit, perPeer: perPeer, exempt: exempt, peers: map[netip.Addr]*peer{}}
	g.free.L = &g.mu
	return g
}

// peerOf says who an address is.
func peerOf(a net.Addr) netip.Addr {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Addr{}
	}
	ip := ap.Addr().Unmap().WithZone("")
	if ip.Is6() {
		p, _ := ip.Prefix(64) // 64 is in range
		return p.Addr()
	}
	return ip
}

// admit lets a connection in. It waits while the gate is full of connections
// that are in use; nil means that it was refused.
func (g *gate) admit(c net.Conn) *guarded {
	who := peerOf(c.RemoteAddr())
	var victims []*guarded
	defer func() {
		for _, v := range victims {
			hangUp(v.Conn)
		}
	}()
	g.mu.Lock()
	defer g.mu.Unlock()
	for !g.closed && g.n >= g.max {
		if v := g.oldest(&g.quiet); v != nil {
			victims = append(victims, v)
			continue
		}
		g.free.Wait()
	}
	if g.closed {
		return nil
	}
	p := g.peers[who]
	if p == nil {
		p = &peer{addr: who}
	}
	if p.n >= g.perPeer && !(g.exempt != nil && g.exempt(who)) {
		v := g.oldest(&p.quiet)
		if v == nil {
			return nil
		}
		victims = append(victims, v)
	}
	g.peers[who] = p // it may have been dropped with its last connection
	p.n++
	g.n++
	gc := &guarded{Conn: c, gate: g, peer: p}
	g.rest(gc)
	return gc
}

// oldest takes the first of a list out of the gate.
func (g *gate) oldest(l *list.List) *guarded {
	e := l.Front()
	if e == nil {
		return nil
	}
	gc := e.Value.(*guarded)
	g.drop(gc)
	return gc
}

// rest puts a connection among those with nothing under way.
func (g *gate) rest(gc *guarded) {
	gc.all, gc.own = g.quiet.PushBack(gc), gc.peer.quiet.PushBack(gc)
}

func (g *gate) stir(gc *guarded) {
	if gc.all != nil {
		g.quiet.Remove(gc.all)
		gc.peer.quiet.Remove(gc.own)
		gc.all, gc.own = nil, nil
	}
}

// drop gives a connection's place back, once.
func (g *gate) drop(gc *guarded) {
	if gc.out {
		return
	}
	gc.out = true
	g.stir(gc)
	g.n--
	if gc.peer.n--; gc.peer.n == 0 {
		delete(g.peers, gc.peer.addr)
	}
	g.free.Signal()
}

func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	g.free.Broadcast()
}

// begin notes a request on the connection, and end its end.
func (gc *guarded) begin() {
	gc.gate.mu.Lock()
	defer gc.gate.mu.Unlock()
	gc.busy++
	gc.gate.stir(gc)
}

func (gc *guarded) end() {
	gc.gate.mu.Lock()
	defer gc.gate.mu.Unlock()
	if gc.busy--; gc.busy == 0 && !gc.out {
		gc.gate.rest(gc)
	}
}

// Close implements [net.Conn].
func (gc *guarded) Close() error {
	gc.gate.mu.Lock()
	gc.gate.drop(gc)
	gc.gate.mu.Unlock()
	return gc.Conn.Close()
}

// Read implements [net.Conn].
func (gc *guarded) Read(p []byte) (int, error) {
	if g := gc.passage.Load(); g != nil && g.offer(p) {
		return g.move(len(p))
	}
	return gc.Conn.Read(p)
}

// ReadFrom lets the kernel move what comes from another connection.
func (gc *guarded) ReadFrom(r io.Reader) (int64, error) { return io.Copy(gc.Conn, r) }

// CloseWrite lets the server send the end of the stream before it closes.
func (gc *guarded) CloseWrite() error {
	if w, ok := gc.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// gateListener is a listener behind a gate.
type gateListener struct {
	net.Listener
	gate *gate
}

// Accept implements [net.Listener].
func (l *gateListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if gc := l.gate.admit(rawconn.New(c)); gc != nil {
			return gc, nil
		}
		hangUp(c)
	}
}

// Close implements [net.Listener]. The gate closes with its first listener:
// they end together.
func (l *gateListener) Close() error {
	l.gate.close()
	return l.Listener.Close()
}

// tlsListener makes handshakes before it gives connections to the server, so
// that a silent client has its own deadline and keeps nobody waiting.
type tlsListener struct {
	net.Listener
	cfg    *tls.Config
	ready  chan net.Conn
	failed chan error
	ctx    context.Context // ends with Close
	stop   context.CancelFunc
	wg     sync.WaitGroup
}

func newTLSListener(l net.Listener, cfg *tls.Config) *tlsListener {
	t := &tlsListener{Listener: l, cfg: cfg, ready: make(chan net.Conn), failed: make(chan error, 1)}
	t.ctx, t.stop = context.WithCancel(context.Background())
	t.wg.Go(t.run)
	return t
}

func (t *tlsListener) run() {
	for {
		c, err := t.Listener.Accept()
		if err != nil {
			t.failed <- err
			return
		}
		t.wg.Go(func() { t.shake(c) })
	}
}

func (t *tlsListener) shake(c net.Conn) {
	ctx, cancel := context.WithTimeout(t.ctx, handshakeDeadline)
	defer cancel()
	s := tls.Server(c, t.cfg)
	if err := s.HandshakeContext(ctx); err != nil {
		_ = c.Close()
		return
	}
	select {
	case t.ready <- s:
	case <-t.ctx.Done():
		_ = c.Close()
	}
}

// Accept implements [net.Listener].
func (t *tlsListener) Accept() (net.Conn, error) {
	select {
	case c := <-t.ready:
		return c, nil
	case err := <-t.failed:
		t.failed <- err // for the next call
		return nil, err
	}
}

// Close implements [net.Listener]. When it returns, no handshake is under way.
func (t *tlsListener) Close() error {
	t.stop()
	err := t.Listener.Close()
	t.wg.Wait()
	return err
}

type guardedKey struct{}

// connContext makes a connection known to the handlers of its requests.
func connContext(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if gc, ok := c.(*guarded); ok {
		return context.WithValue(ctx, guardedKey{}, gc)
	}
	return ctx
}

// guardedOf returns the connection of a request; nil behind a listener that is
// not ours.
func guardedOf(r *http.Request) *guarded {
	gc, _ := r.Context().Value(guardedKey{}).(*guarded)
	return gc
}

// descriptors is how many files this process may have open.
func descriptors() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil || l.Cur > 1<<30 {
		return 1 << 30
	}
	return int(l.Cur)
}
