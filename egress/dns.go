package egress

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/cayhq/cay"
)

const (
	maxQuery       = 4096             // bytes of a query
	queriesAtOnce  = 64               // of one sandbox
	dnsIdle        = 10 * time.Second // of a DNS connection
	edeFiltered    = 17               // RFC 8914
	optExtendedErr = 15
)

// serveDNS answers datagrams until the socket is closed.
func (g *guest) serveDNS(conn net.PacketConn) {
	buf := make([]byte, maxQuery)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			if g.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			if !g.pause(err, "reading DNS queries") {
				return
			}
			continue
		}
		query := slices.Clone(buf[:n])
		select {
		case g.asking <- struct{}{}:
		default:
			// The answer costs nothing but its bytes.
			if a := g.failure(query); a != nil {
				_, _ = conn.WriteTo(a, from) // a lost datagram is asked for again
			}
			continue
		}
		g.wg.Go(func() {
			defer func() { <-g.asking }()
			if a := g.answer(g.ctx, query, true); a != nil {
				_, _ = conn.WriteTo(a, from)
			}
		})
	}
}

// serveDNSConn answers the queries of one connection, one after the other.
func (g *guest) serveDNSConn(f *flow) {
	for {
		_ = f.conn.SetDeadline(time.Now().Add(dnsIdle)) // a closed connection says so at the read
		query, err := readFramed(f.conn)
		if err != nil || len(query) > maxQuery {
			return
		}
		a := g.answer(g.ctx, query, false)
		if a == nil {
			return
		}
		if _, err := f.conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...)); err != nil {
			return
		}
	}
}

// response is an answer under construction.
type response struct {
	msg      dnsmessage.Message
	edns     bool
	size     int    // of a datagram, 0 is any
	filtered string // why something was left out, for programs that show it
}

// failure answers a query for which there is no time.
func (g *guest) failure(query []byte) []byte {
	r, ok := parseQuery(query, true)
	if !ok {
		return nil
	}
	r.msg.RCode = dnsmessage.RCodeServerFailure
	return r.pack()
}

// answer returns the answer to a query, or nil for what is no query.
func (g *guest) answer(ctx context.Context, query []byte, datagram bool) []byte {
	r, ok := parseQuery(query, datagram)
	if !ok {
		return nil
	}
	if r.msg.RCode == dnsmessage.RCodeSuccess {
		if g.queries.Allow() {
			g.resolve(ctx, r)
		} else {
			r.msg.RCode = dnsmessage.RCodeServerFailure
			g.refuse(cay.EgressRefusal{Protocol: "dns", Rule: ruleLimit, Reason: "asks more often than the limit allows"})
		}
	}
	return r.pack()
}

// parseQuery prepares the response to a query; one that asks for what we do
// not do has its code set already.
func parseQuery(query []byte, datagram bool) (*response, bool) {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil || h.Response {
		return nil, false
	}
	r := &response{msg: dnsmessage.Message{Header: dnsmessage.Header{
		ID: h.ID, Response: true, OpCode: h.OpCode, RecursionDesired: h.RecursionDesired, RecursionAvailable: true}}}
	if datagram {
		r.size = 512
	}
	if h.OpCode != 0 {
		r.msg.RCode = dnsmessage.RCodeNotImplemented
		return r, true
	}
	qs, err := p.AllQuestions()
	if err != nil || len(qs) != 1 {
		r.msg.RCode = dnsmessage.RCodeFormatError
		return r, true
	}
	r.msg.Questions = qs
	if p.SkipAllAnswers() != nil || p.SkipAllAuthorities() != nil {
		r.msg.RCode = dnsmessage.RCodeFormatError
		return r, true
	}
	for {
		rh, err := p.AdditionalHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			break
		}
		if err != nil {
			r.msg.RCode = dnsmessage.RCodeFormatError
			return r, true
		}
		if rh.Type == dnsmessage.TypeOPT {
			r.edns = true
			if datagram {
				r.size = max(512, min(int(rh.Class), maxDatagram)) // the class of OPT is a size
			}
		}
		if p.SkipAdditional() != nil {
			r.msg.RCode = dnsmessage.RCodeFormatError
			return r, true
		}
	}
	if qs[0].Class != dnsmessage.ClassINET {
		r.msg.RCode = dnsmessage.RCodeRefused
	}
	return r, true
}

// resolve fills in the response to a question that is in order.
func (g *guest) resolve(ctx context.Context, r *response) {
	q := r.msg.Questions[0]
	p := g.policy.Load()
	name, ok := canonical(q.Name.String())
	if !ok || !p.resolves(name) {
		r.msg.RCode = dnsmessage.RCodeNameError
		r.filtered = "the sandbox's network policy does not have this name"
		g.refuse(cay.EgressRefusal{Protocol: "dns", Name: clip(q.Name.String()), Rule: ruleNames, Reason: "asks for a name the policy does not have"})
		return
	}
	switch q.Type {
	case dnsmessage.TypeA, dnsmessage.TypeAAAA:
		if q.Type == dnsmessage.TypeAAAA && !g.IPv6 {
			return // no such addresses
		}
		found, special, err := g.lookup(ctx, name, q.Type)
		if err != nil {
			g.server.log().Debug("a sandbox's name was not resolved", "sandbox", g.Sandbox, "name", name, "error", err)
			r.msg.RCode = dnsmessage.RCodeServerFailure
			return
		}
		r.msg.RCode = found.rcode
		if special.IsValid() {
			r.filtered = "an address of this name is one that sandboxes never reach"
			g.refuse(cay.EgressRefusal{Protocol: "dns", Name: name, Rule: ruleAlways, Destination: netip.AddrPortFrom(special, 0),
				Reason: "the name resolves to an address that is always refused"})
		}
		for _, a := range found.list {
			r.add(q.Name, a, found.ttl)
		}
	case dnsmessage.TypeSVCB, dnsmessage.TypeHTTPS:
		// They hold the keys that hide names. Without them clients ask for
		// addresses and say the name.
	default:
		if p.deny.all || q.Type == dnsmessage.TypeALL {
			r.msg.RCode = dnsmessage.RCodeRefused
			g.refuse(cay.EgressRefusal{Protocol: "dns", Name: name, Rule: ruleNames, Reason: "asks for records that are not addresses"})
			return
		}
		g.pass(ctx, r, name, q.Type)
	}
}

// lookup resolves a name for the guest and pins what it may use. Special is
// one of the addresses that were left out.
func (g *guest) lookup(ctx context.Context, name string, typ dnsmessage.Type) (found addresses, special netip.Addr, err error) {
	found, err = g.server.resolver.addresses(ctx, name, typ)
	if err != nil {
		return found, special, err
	}
	found.list = slices.DeleteFunc(found.list, func(a netip.Addr) bool {
		if g.server.Refused(a.Unmap()) {
			special = a
			return true
		}
		return false
	})
	if len(found.list) > 0 {
		g.pins.add(name, found.list, found.ttl, g.server.now())
	}
	return found, special, nil
}

// pinned reports whether a destination is an address of a name, for this
// sandbox. A name that is not known to be is resolved once more: the guest may
// remember for longer than we do.
func (g *guest) pinned(ctx context.Context, p *policy, name string, a netip.Addr) bool {
	if g.pins.has(name, a, g.server.now()) {
		return true
	}
	if !p.resolves(name) {
		return false
	}
	typ := dnsmessage.TypeA
	if a.Is6() {
		typ = dnsmessage.TypeAAAA
	}
	// Many connections that come at once wait for one answer.
	_, _, _ = g.lookups.Do(typ.String()+name, func() (any, error) {
		if g.pins.has(name, a, g.server.now()) || !g.queries.Allow() {
			return nil, nil
		}
		if _, _, err := g.lookup(ctx, name, typ); err != nil {
			g.server.log().Debug("a sandbox's name was not resolved", "sandbox", g.Sandbox, "name", name, "error", err)
		}
		return nil, nil
	})
	return g.pins.has(name, a, g.server.now())
}

// pass hands on the answer to a question about something else than addresses.
func (g *guest) pass(ctx context.Context, r *response, name string, typ dnsmessage.Type) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	m, err := g.server.resolver.exchange(ctx, name, typ)
	if err != nil {
		r.msg.RCode = dnsmessage.RCodeServerFailure
		return
	}
	r.msg.RCode = m.RCode
	for _, rr := range m.Answers {
		switch rr.Header.Type {
		case typ, dnsmessage.TypeCNAME:
			r.msg.Answers = append(r.msg.Answers, rr)
		}
	}
}

func (r *response) add(name dnsmessage.Name, a netip.Addr, ttl time.Duration) {
	h := dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET, TTL: uint32(ttl / time.Second)}
	var body dnsmessage.ResourceBody = &dnsmessage.AAAAResource{AAAA: a.As16()}
	if a.Is4() {
		body = &dnsmessage.AResource{A: a.As4()}
	}
	r.msg.Answers = append(r.msg.Answers, dnsmessage.Resource{Header: h, Body: body})
}

// pack returns the message; answers that do not fit a datagram are left out
// and the message marked, so that the guest asks by TCP.
func (r *response) pack() []byte {
	if r.edns {
		opt := dnsmessage.Resource{}
		body := &dnsmessage.OPTResource{}
		if r.filtered != "" {
			body.Options = []dnsmessage.Option{{Code: optExtendedErr, Data: append([]byte{0, edeFiltered}, r.filtered...)}}
		}
		opt.Body = body
		if opt.Header.SetEDNS0(maxDatagram, r.msg.RCode, false) == nil {
			r.msg.Additionals = []dnsmessage.Resource{opt}
		}
	}
	for {
		b, err := r.msg.Pack()
		if err != nil {
			return nil
		}
		if r.size == 0 || len(b) <= r.size {
			return b
		}
		r.msg.Truncated = true
		if len(r.msg.Answers) == 0 {
			r.msg.Additionals = nil // the explanation, then
			r.size = 0
			continue
		}
		r.msg.Answers = r.msg.Answers[:len(r.msg.Answers)/2]
	}
}

// clip bounds what a report holds of a guest's words.
func clip(s string) string { return s[:min(len(s), maxName+2)] }
