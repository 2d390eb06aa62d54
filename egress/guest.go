package egress

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"

	"github.com/cayhq/cay"
)

// The rules that a [cay.EgressRefusal] names when it is no entry of the policy.
const (
	ruleAlways = "always refused"
	ruleNames  = "names"
	ruleLimit  = "limit"
)

// guest is an attached [Guest].
type guest struct {
	Guest
	server *Server
	limits Limits
	policy atomic.Pointer[policy]
	pins   pins
	// lookups are those of pinned under way.
	lookups singleflight.Group

	arrivals, queries *rate.Limiter
	complaints        *rate.Limiter // of what is over a limit
	asking            chan struct{} // one token per DNS datagram under way

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // every goroutine

	mu    sync.Mutex
	done  bool
	flows map[*flow]struct{}
}

// flow is a connection of a guest.
type flow struct {
	conn net.Conn
	to   netip.AddrPort

	// Guarded by guest.mu.
	name string                // by which it is open, if by name
	out  map[net.Conn]struct{} // ways out, which end with it
	cut  bool
}

func newGuest(s *Server, in Guest, p *policy) *guest {
	l := s.Limits.withDefaults()
	g := &guest{Guest: in, server: s, limits: l, flows: map[*flow]struct{}{},
		arrivals:   rate.NewLimiter(rate.Limit(l.PerSecond), 2*l.PerSecond),
		queries:    rate.NewLimiter(rate.Limit(l.Queries), 4*l.Queries),
		complaints: rate.NewLimiter(1, 5),
		asking:     make(chan struct{}, queriesAtOnce)}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	g.policy.Store(p)
	return g
}

func (g *guest) start() {
	g.wg.Go(func() { g.accept(g.TCP, g.serve) })
	g.wg.Go(func() { g.accept(g.DNSTCP, g.serveDNSConn) })
	g.wg.Go(func() { g.serveDNS(g.DNS) })
}

// close ends everything of the guest and waits for it.
func (g *guest) close() error {
	g.cancel()
	err := errors.Join(g.TCP.Close(), g.DNS.Close(), g.DNSTCP.Close())
	g.mu.Lock()
	g.done = true
	for f := range g.flows {
		g.cutLocked(f)
	}
	g.mu.Unlock()
	g.wg.Wait()
	return err
}

// update puts a policy in force, for open connections too.
func (g *guest) update(p *policy) {
	old := g.policy.Swap(p)
	proxy := !reflect.DeepEqual(old.proxy, p.proxy)
	g.mu.Lock()
	defer g.mu.Unlock()
	for f := range g.flows {
		if proxy || !p.keeps(f.to, f.name) {
			g.cutLocked(f)
		}
	}
}

// keeps reports whether a connection that was open by a name, if any, still is.
func (p *policy) keeps(to netip.AddrPort, name string) bool {
	if open, _ := p.byAddress(to.Addr()); open {
		return true
	}
	_, ok := p.names.find(name)
	return ok
}

// accept hands each connection to serve, which must not close it.
func (g *guest) accept(l net.Listener, serve func(*flow)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			if g.ctx.Err() != nil || errors.Is(err, net.ErrClosed) || !g.pause(err, "accepting a connection") {
				return
			}
			continue
		}
		f := &flow{conn: conn}
		if why := g.enter(f); why != "" {
			reset(conn)
			if g.ctx.Err() == nil {
				g.refuse(cay.EgressRefusal{Protocol: "tcp", Rule: ruleLimit, Reason: why})
			}
			continue
		}
		g.wg.Go(func() {
			serve(f)
			g.leave(f)
		})
	}
}

// pause waits a little after an error that may pass, such as too many open
// files. It is false when the guest ends.
func (g *guest) pause(err error, what string) bool {
	g.server.log().Warn(what, "sandbox", g.Sandbox, "error", err)
	t := time.NewTimer(50 * time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-g.ctx.Done():
		return false
	}
}

// enter counts a connection, or says why it is one too many.
func (g *guest) enter(f *flow) (why string) {
	if !g.arrivals.Allow() {
		return "opens connections more often than the limit allows"
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.done:
		return "the sandbox ends"
	case len(g.flows) >= g.limits.Connections:
		return "has more connections open than the limit allows"
	}
	g.flows[f] = struct{}{}
	return ""
}

func (g *guest) leave(f *flow) {
	_ = f.conn.Close() // it may be closed already
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.flows, f)
}

// cutLocked resets a connection and its ways out. It may be called twice.
func (g *guest) cutLocked(f *flow) {
	f.cut = true
	reset(f.conn)
	for out := range f.out {
		reset(out)
	}
}

// own ties a connection outwards to a flow, so that it ends with it. It is
// false, and the connection closed, if the flow has been cut.
func (g *guest) own(f *flow, out net.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if f.cut {
		reset(out)
		return false
	}
	if f.out == nil {
		f.out = map[net.Conn]struct{}{}
	}
	f.out[out] = struct{}{}
	return true
}

func (g *guest) disown(f *flow, out net.Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(f.out, out)
}

// settle notes the name by which a flow is open, for later policies. It is
// false if the policy has changed since p and does not have it open any more.
func (g *guest) settle(f *flow, name string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	f.name = name
	return !f.cut && g.policy.Load().keeps(f.to, name)
}

// serve judges a connection and carries it.
func (g *guest) serve(f *flow) {
	// Before the first read: whoever says nothing is waited for no longer.
	_ = f.conn.SetDeadline(time.Now().Add(g.limits.Sniff)) // a closed connection says so at its read
	to, err := g.Destination(f.conn)
	if err != nil {
		g.server.log().Warn("a sandbox's connection has no destination", "sandbox", g.Sandbox, "error", err)
		reset(f.conn)
		return
	}
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	g.mu.Lock()
	f.to = to
	g.mu.Unlock()
	p := g.policy.Load()
	if g.server.Refused(to.Addr()) {
		g.deny(f, cay.EgressRefusal{Protocol: "tcp", Rule: ruleAlways, Reason: "the address is always refused"})
		return
	}
	open, entry := p.byAddress(to.Addr())
	if !p.asks(to.Port(), open) {
		if !open {
			g.deny(f, cay.EgressRefusal{Protocol: "tcp", Rule: entry, Reason: "the address is denied"})
			return
		}
		g.carry(f, p, nil, "", "tcp")
		return
	}

	protocol, read := "http", readHead
	if to.Port() == portTLS {
		protocol, read = "tls", readHello
	}
	s := read(f.conn)
	v := g.judge(p, to, s.name, s.why, false)
	if !v.open {
		g.deny(f, cay.EgressRefusal{Protocol: protocol, Name: s.name, Rule: v.rule, Reason: v.reason})
		return
	}
	switch {
	case protocol == "tls" && v.transform:
		g.serveTLS(f, s)
	case protocol == "http" && (v.transform || v.byName):
		g.serveHTTP(f, s)
	default:
		g.carry(f, p, s.head, v.name, protocol)
	}
}

// verdict is what judge says of a connection.
type verdict struct {
	open      bool
	byName    bool   // it would not be open by its address
	name      string // proven: the destination is one of its addresses
	transform bool   // a rule fits
	rule      string // what refuses it: an entry of the policy or a rule's name
	reason    string
}

// judge decides about a connection whose client has said a name, or none and
// why. Proven tells that the name is known to have resolved to the destination.
// DESIGN.md has the order.
func (g *guest) judge(p *policy, to netip.AddrPort, name, why string, proven bool) verdict {
	open, entry := p.byAddress(to.Addr())
	if name == "" {
		return verdict{open: open, rule: entry, reason: why}
	}
	_, allowed := p.names.find(name)
	_, rule := p.rules.find(name)
	switch {
	case !open && !allowed:
		return verdict{rule: entry, reason: "the policy does not have the name"}
	case open && !rule && p.proxy == nil:
		return verdict{open: true}
	case !proven && !g.pinned(g.ctx, p, name, to.Addr()):
		return verdict{open: open, rule: ruleNames, reason: "the name does not resolve to this address"}
	}
	return verdict{open: true, byName: !open, name: name, transform: rule}
}

// carry opens the way out and tunnels. Head has been read already.
func (g *guest) carry(f *flow, p *policy, head []byte, name, protocol string) {
	if !g.settle(f, name) {
		reset(f.conn)
		return
	}
	_ = f.conn.SetDeadline(time.Time{}) // the dial and the tunnel have their own
	out, err := g.dial(g.ctx, p, f.to, name)
	if err != nil {
		g.unreached(f, name, protocol, err)
		return
	}
	defer out.Close()
	if !g.own(f, out) {
		return
	}
	defer g.disown(f, out)
	if len(head) > 0 {
		_ = out.SetWriteDeadline(time.Now().Add(g.limits.Dial)) // a closed connection says so at the write
		if _, err := out.Write(head); err != nil {
			reset(f.conn)
			return
		}
	}
	if tunnel(f.conn, out, g.limits.Idle) != nil {
		// Not a byte more, and the peer learns that it was no good end.
		reset(f.conn)
		reset(out)
	}
}

// unreached ends a connection whose destination could not be dialled.
func (g *guest) unreached(f *flow, name, protocol string, err error) {
	if errors.Is(err, errRefused) {
		g.deny(f, cay.EgressRefusal{Protocol: protocol, Name: name, Rule: ruleAlways, Reason: "the address is always refused"})
		return
	}
	g.server.log().Debug("a sandbox's connection has no way out", "sandbox", g.Sandbox, "to", f.to, "name", name, "error", err)
	reset(f.conn)
}

// deny resets a connection and reports it.
func (g *guest) deny(f *flow, r cay.EgressRefusal) {
	reset(f.conn)
	r.Destination = f.to
	if g.ctx.Err() == nil { // what was cut with the guest was not refused
		g.refuse(r)
	}
}

func (g *guest) refuse(r cay.EgressRefusal) {
	if r.Rule == ruleLimit && !g.complaints.Allow() {
		return // a flood is reported, not each drop
	}
	r.First = g.server.now()
	g.server.log().Debug("egress refused", "sandbox", g.Sandbox, "protocol", r.Protocol, "to", r.Destination, "name", r.Name, "rule", r.Rule, "reason", r.Reason)
	if g.Report != nil {
		g.Report(r)
	}
}

// withDefaults fills in zero fields.
func (l Limits) withDefaults() Limits {
	set := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	wait := func(v *time.Duration, d time.Duration) {
		if *v == 0 {
			*v = d
		}
	}
	set(&l.Connections, 1024)
	set(&l.PerSecond, 200)
	set(&l.Queries, 50)
	wait(&l.Sniff, 3*time.Second)
	wait(&l.Dial, 30*time.Second)
	wait(&l.Idle, time.Hour)
	return l
}

var errNotAttached = &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerNetwork,
	Message: "the sandbox has no connections that are decided by name",
	Fix:     "it may have ended; see `cay sandbox list`"}
