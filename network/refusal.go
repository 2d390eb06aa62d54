package network

import (
	"cmp"
	"container/list"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	mdnetlink "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

// maxRefusals is how many different refusals are remembered of a slot.
const maxRefusals = 1000

// refusalLog remembers what was refused. The same again is counted, so that a
// guest that tries for ever fills one line. It is safe for concurrent use.
type refusalLog struct {
	path string // of its file; empty for none

	saving sync.Mutex
	lines  int    // of the file
	saved  uint64 // the last one that the file has
	ended  bool   // nothing is written any more

	mu   sync.Mutex
	seq  uint64
	list list.List // of *cay.EgressRefusal, by Seq
	at   map[refusalKey]*list.Element
}

type refusalKey struct {
	protocol, name, rule string
	to                   netip.AddrPort
}

// add notes a refusal; its Seq, Last and Count are the log's to fill in.
func (l *refusalLog) add(r cay.EgressRefusal) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r.Seq, r.Last, r.Count = l.seq+1, r.First, 1
	if e := l.at[keyOf(r)]; e != nil {
		had := e.Value.(*cay.EgressRefusal)
		r.First, r.Count = had.First, had.Count+1
	}
	l.putLocked(r)
}

func keyOf(r cay.EgressRefusal) refusalKey {
	return refusalKey{r.Protocol, r.Name, r.Rule, r.Destination}
}

// putLocked makes a refusal, numbered already, the last one, instead of what
// there was of the same.
func (l *refusalLog) putLocked(r cay.EgressRefusal) {
	if l.at == nil {
		l.at = map[refusalKey]*list.Element{}
	}
	k := keyOf(r)
	if e := l.at[k]; e != nil {
		l.list.Remove(e)
	} else if l.list.Len() == maxRefusals {
		old := l.list.Remove(l.list.Front()).(*cay.EgressRefusal)
		delete(l.at, keyOf(*old))
	}
	l.seq = r.Seq
	l.at[k] = l.list.PushBack(&r)
}

// after returns what was refused after a moment of the log.
func (l *refusalLog) after(seq uint64) []cay.EgressRefusal {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []cay.EgressRefusal
	for e := l.list.Back(); e != nil; e = e.Prev() {
		r := e.Value.(*cay.EgressRefusal)
		if r.Seq <= seq {
			break
		}
		out = append(out, *r)
	}
	slices.Reverse(out)
	return out
}

// Refusals returns what was refused to the guest of a slot in use, after the
// refusal with the number seq; 0 is all that is remembered.
func (p *Pool) Refusals(_ context.Context, index int, seq uint64) ([]cay.EgressRefusal, error) {
	t, err := p.tenant(index)
	if err != nil {
		return nil, err
	}
	p.keep(index, t) // so that no number which somebody has seen is given again
	return t.log.after(seq), nil
}

// NoteRefusal adds to the refusals of a slot one that somebody else has made.
// Its Seq, Last and Count are filled in here. A slot that is not in use is
// ignored.
func (p *Pool) NoteRefusal(index int, r cay.EgressRefusal) {
	if t, err := p.tenant(index); err == nil {
		t.log.add(r)
		p.keepSoon()
	}
}

// routerGroup is the group of the kernel's log in each router. The host's is
// one that nobody has.
const (
	routerGroup    = 1
	firstHostGroup = 0xca00
	hostGroups     = 64
)

// The kernel's log over netlink: constants of linux/netfilter/nfnetlink_log.h.
const (
	ulogPacket    = unix.NFNL_SUBSYS_ULOG << 8
	ulogConfig    = unix.NFNL_SUBSYS_ULOG<<8 | 1
	configCommand = 1
	configMode    = 2
	configTimeout = 4
	configQueue   = 5
	commandBind   = 1
	modePacket    = 2
	packetPayload = 9
	packetPrefix  = 10
)

// listenLog receives what a group of the log tells, in the namespace of ns or,
// if that is nil, the process's.
func listenLog(ns *os.File, group uint16) (*mdnetlink.Conn, error) {
	var cfg mdnetlink.Config
	if ns != nil {
		cfg.NetNS = int(ns.Fd())
	}
	c, err := mdnetlink.Dial(unix.NETLINK_NETFILTER, &cfg)
	if err != nil {
		return nil, err
	}
	be32 := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	attrs, err := mdnetlink.MarshalAttributes([]mdnetlink.Attribute{
		{Type: configCommand, Data: []byte{commandBind}},
		{Type: configMode, Data: append(be32(toldBytes), modePacket, 0)},
		{Type: configTimeout, Data: be32(10)}, // hundredths of a second
		{Type: configQueue, Data: be32(20)},
	})
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	head := []byte{unix.AF_UNSPEC, 0, byte(group >> 8), byte(group)} // struct nfgenmsg
	_, err = c.Execute(mdnetlink.Message{
		Header: mdnetlink.Header{Type: ulogConfig, Flags: mdnetlink.Request | mdnetlink.Acknowledge},
		Data:   append(head, attrs...)})
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// listener reads one group of the kernel's log.
type listener struct {
	conn *mdnetlink.Conn
	done chan struct{}
}

func listen(c *mdnetlink.Conn, f func(told)) *listener {
	l := &listener{c, make(chan struct{})}
	go func() {
		defer close(l.done)
		readLog(c, f)
	}()
	return l
}

// close returns when f is called no more.
func (l *listener) close() {
	_ = l.conn.Close() // nothing is lost with it
	<-l.done
}

// told is a packet that the kernel's log tells about.
type told struct {
	from     netip.Addr
	to       netip.AddrPort
	protocol uint8
	why      string
}

// readLog calls f for every packet until the connection is closed.
func readLog(c *mdnetlink.Conn, f func(told)) {
	for {
		msgs, err := c.Receive()
		if errors.Is(err, unix.ENOBUFS) {
			continue // what did not fit is lost
		}
		if err != nil {
			return
		}
		for _, m := range msgs {
			if m.Header.Type == ulogPacket && len(m.Data) > 4 {
				if t, ok := parseTold(m.Data[4:]); ok {
					f(t)
				}
			}
		}
	}
}

// parseTold decodes a message of the log.
func parseTold(attrs []byte) (told, bool) {
	var t told
	d, err := mdnetlink.NewAttributeDecoder(attrs)
	if err != nil {
		return t, false
	}
	var packet []byte
	for d.Next() {
		switch d.Type() {
		case packetPayload:
			packet = d.Bytes()
		case packetPrefix:
			t.why = strings.TrimRight(d.String(), "\x00")
		}
	}
	if d.Err() != nil || len(packet) < 20 {
		return t, false
	}
	var to netip.Addr
	port, head, fragment := uint16(0), 40, false
	switch v := packet[0] >> 4; {
	case v == 4:
		t.protocol = packet[9]
		t.from, to = netip.AddrFrom4([4]byte(packet[12:16])), netip.AddrFrom4([4]byte(packet[16:20]))
		head = int(packet[0]&15) * 4
		fragment = binary.BigEndian.Uint16(packet[6:8])&0x1fff != 0
	case v == 6 && len(packet) >= head: // with a header in between it has no port
		t.protocol = packet[6]
		t.from, to = netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40]))
	default:
		return t, false
	}
	switch t.protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP:
		if !fragment && len(packet) >= head+4 {
			port = binary.BigEndian.Uint16(packet[head+2:])
		}
	}
	t.to = netip.AddrPortFrom(to, port)
	return t, true
}

// hear notes what the router of a slot tells, as its tenant's. Without a log in
// the kernel it returns nil.
func (p *Pool) hear(index int, t *tenant) *listener {
	if p.group == 0 {
		return nil
	}
	ns, err := os.Open(p.routerNS(index))
	if err == nil {
		defer ns.Close()
		var c *mdnetlink.Conn
		if c, err = listenLog(ns, routerGroup); err == nil {
			return listen(c, func(x told) { p.note(t, x) })
		}
	}
	p.log().Warn("refusals of a sandbox are not logged", "slot", index, "err", err)
	return nil
}

// hearHost opens a group of the host's log that nobody has. 0 says that the
// kernel has no log.
func (p *Pool) hearHost() (uint16, *mdnetlink.Conn) {
	var err error
	for n := range hostGroups {
		group := uint16(firstHostGroup + n)
		var c *mdnetlink.Conn
		if c, err = listenLog(nil, group); err == nil {
			return group, c
		}
		if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EBUSY) { // what the kernel says when somebody has it
			break
		}
	}
	p.log().Warn("the kernel does not log what is refused to sandboxes (is nfnetlink_log there?)", "err", err)
	return 0, nil
}

func (p *Pool) noteHost(x told) {
	p.mu.Lock()
	var t *tenant
	from := x.from
	if linkPrefix6.Contains(from) {
		b := from.As16()
		from = netip.AddrFrom4([4]byte(b[12:]))
	}
	if p.block.Contains(from) {
		b, a := p.block.Addr().As4(), from.As4()
		t = p.tenants[int(binary.BigEndian.Uint32(a[:])-binary.BigEndian.Uint32(b[:]))/2]
	}
	p.mu.Unlock()
	if t != nil {
		p.note(t, x)
	}
}

func (p *Pool) note(t *tenant, x told) {
	p.mu.Lock()
	e := t.policy.of
	p.mu.Unlock()
	rule, reason := p.explain(e, x)
	t.log.add(cay.EgressRefusal{First: p.now().UTC(), Protocol: protocolName(x.protocol), Destination: x.to, Rule: rule, Reason: reason})
	p.keepSoon()
}

// explain says which rule refused a packet, and in words why.
func (p *Pool) explain(e cay.Egress, x told) (rule, reason string) {
	a := x.to.Addr()
	switch x.why {
	case bySelf:
		return "always refused", "an address of the machine that sandboxes run on"
	case bySpecial:
		return "always refused", p.specialName(a)
	case byDeny:
		for _, d := range e.Deny {
			if d.Contains(a) && (rule == "" || d.Bits() > netip.MustParsePrefix(rule).Bits()) {
				rule = d.String()
			}
		}
		return cmp.Or(rule, "deny"), "the sandbox's policy denies it"
	case byName:
		if x.protocol == unix.IPPROTO_UDP {
			return "names", "the policy decides by names, and QUIC hides them"
		}
		return "names", "the connection is from before the policy, which decides by names"
	case byConnections:
		return "limit", fmt.Sprintf("more than %d connections are open", p.Limits.connections())
	case byRate:
		return "limit", fmt.Sprintf("more than %d new connections a second", p.Limits.perSecond())
	case byTeamConnections:
		return "limit", "the sandboxes of the team have more connections open than it may have together"
	case byTeamRate:
		return "limit", "the sandboxes of the team open more connections a second than they may together"
	}
	return x.why, ""
}

// specialName says what an address is that no guest reaches.
func (p *Pool) specialName(a netip.Addr) string {
	name, bits := "", -1
	for _, s := range specialPurpose {
		if q := netip.MustParsePrefix(s.Prefix); q.Contains(a) && q.Bits() > bits {
			name, bits = s.Name, q.Bits()
		}
	}
	switch {
	case p.cidr().Contains(a):
		return "an address of the sandboxes of this machine"
	case name == "":
		return "the operator refuses it"
	}
	return name
}

func protocolName(n uint8) string {
	switch n {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return "icmp"
	case unix.IPPROTO_SCTP:
		return "sctp"
	}
	return fmt.Sprintf("protocol %d", n)
}
