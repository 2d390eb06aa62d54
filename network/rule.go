package network

import (
	"errors"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	mdnetlink "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The words of our nftables rules. A rule is a list of them; each returns the
// expressions that the kernel runs for it.

type words = []expr.Any

func rule(parts ...words) words {
	var out words
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func compare(op expr.CmpOp, data []byte) expr.Any {
	return &expr.Cmp{Op: op, Register: 1, Data: data}
}

func metaIs(key expr.MetaKey, op expr.CmpOp, data []byte) words {
	return words{&expr.Meta{Key: key, Register: 1}, compare(op, data)}
}

// A name without its final zero compares as a prefix.
func iifPrefix(p string) words    { return metaIs(expr.MetaKeyIIFNAME, expr.CmpOpEq, []byte(p)) }
func oifPrefix(p string) words    { return metaIs(expr.MetaKeyOIFNAME, expr.CmpOpEq, []byte(p)) }
func oifNotPrefix(p string) words { return metaIs(expr.MetaKeyOIFNAME, expr.CmpOpNeq, []byte(p)) }
func iif(name string) words       { return metaIs(expr.MetaKeyIIFNAME, expr.CmpOpEq, ifname(name)) }
func oif(name string) words       { return metaIs(expr.MetaKeyOIFNAME, expr.CmpOpEq, ifname(name)) }

// ifname is an interface name as the kernel keeps it: 16 bytes, zero-padded.
func ifname(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

func ipv4() words { return metaIs(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{unix.NFPROTO_IPV4}) }
func ipv6() words { return metaIs(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{unix.NFPROTO_IPV6}) }
func tcp() words  { return metaIs(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{unix.IPPROTO_TCP}) }
func notTCP() words {
	return metaIs(expr.MetaKeyL4PROTO, expr.CmpOpNeq, []byte{unix.IPPROTO_TCP})
}

// opening matches a TCP segment that asks for a connection: SYN without ACK.
func opening() words {
	return append(tcp(),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x12}, Xor: []byte{0}},
		compare(expr.CmpOpEq, []byte{0x02}))
}

// source and dest read an address of a packet of one family.
func source(six bool) words {
	if six {
		return append(ipv6(), &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 16})
	}
	return append(ipv4(), &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4})
}

func dest(six bool) words {
	if six {
		return append(ipv6(), &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 16})
	}
	return append(ipv4(), &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4})
}

func from(a netip.Addr) words {
	return append(source(a.Is6()), compare(expr.CmpOpEq, a.AsSlice()))
}
func notFrom(a netip.Addr) words {
	return append(source(a.Is6()), compare(expr.CmpOpNeq, a.AsSlice()))
}
func to(a netip.Addr) words { return append(dest(a.Is6()), compare(expr.CmpOpEq, a.AsSlice())) }

func fromPrefix(p netip.Prefix) words {
	n := p.Addr().BitLen() / 8
	mask := make([]byte, n)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return append(source(p.Addr().Is6()),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(n), Mask: mask, Xor: make([]byte, n)},
		compare(expr.CmpOpEq, p.Masked().Addr().AsSlice()))
}

// sets are ranges of destinations, a set for each family that has some.
type sets []*nftables.Set

// each adds a rule for what goes to one of the ranges.
func (all sets) each(chain func(...words), then words) {
	for _, s := range all {
		chain(dest(s.KeyType.Bytes == 16), words{&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID}}, then)
	}
}

func iifNotIn(s *nftables.Set) words {
	return words{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID, Invert: true}}
}

func udp() words { return metaIs(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{unix.IPPROTO_UDP}) }

// toPort matches the destination port of TCP and UDP, which the caller has
// asked for.
func toPort(n uint16) words {
	return words{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		compare(expr.CmpOpEq, binaryutil.BigEndian.PutUint16(n))}
}

// mark writes a number on the packet that later chains of the same namespace
// read. A packet comes in without one.
func mark(n uint32) words {
	return words{&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(n)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1}}
}

func marked(n uint32) words {
	return metaIs(expr.MetaKeyMARK, expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(n))
}

func anyMark() words { return metaIs(expr.MetaKeyMARK, expr.CmpOpNeq, make([]byte, 4)) }

// redirect turns a connection towards a port of this namespace.
func redirect(port uint16) words {
	return words{&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)}, &expr.Redir{RegisterProtoMin: 1}}
}

// faster matches what comes faster than n a second after a burst.
func faster(n uint64, burst uint32) words {
	return words{&expr.Limit{Type: expr.LimitTypePkts, Rate: n, Unit: expr.LimitTimeSecond, Burst: burst, Over: true}}
}

// thicker matches what comes faster than so many 10^6 bits a second, after a
// burst; the kernel adds a second's worth to it.
func thicker(mbit int) words {
	return words{&expr.Limit{Type: expr.LimitTypePktBytes, Rate: uint64(mbit) * 1_000_000 / 8, Unit: expr.LimitTimeSecond, Burst: leastBurst, Over: true}}
}

// slower matches at most n a second after a burst.
func slower(n uint64, burst uint32) words {
	return words{&expr.Limit{Type: expr.LimitTypePkts, Rate: n, Unit: expr.LimitTimeSecond, Burst: burst}}
}

// tell hands the head of the packet to whoever listens to a group of this
// namespace's log, with a word.
func tell(group uint16, word string) words {
	return words{&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX | 1<<unix.NFTA_LOG_SNAPLEN,
		Group: group, Snaplen: toldBytes, Data: []byte(word)}}
}

// toldBytes hold the longest IPv4 header, or IPv6's first, and the ports after it.
const toldBytes = 64

// toLocal matches what is addressed to this namespace itself, by any of its
// addresses as they are now.
func toLocal() words {
	return words{&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		compare(expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL))}
}

// spoofed matches a source address to which the way back does not lead through
// the interface the packet came in by.
func spoofed() words {
	return words{&expr.Fib{Register: 1, FlagSADDR: true, FlagIIF: true, ResultOIF: true, FlagPRESENT: true},
		compare(expr.CmpOpEq, []byte{0})}
}

func ctBits(key expr.CtKey, bits uint32) words {
	return words{&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		compare(expr.CmpOpNeq, make([]byte, 4))}
}

// known matches established and related packets.
func known() words {
	return ctBits(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}

// invalid matches packets that connection tracking makes no sense of, which
// address translation passes by.
func invalid() words { return ctBits(expr.CtKeySTATE, expr.CtStateBitINVALID) }

// isNew matches the first packet of a connection.
func isNew() words { return ctBits(expr.CtKeySTATE, expr.CtStateBitNEW) }

// answer matches packets that answer the side that opened the connection.
func answer() words {
	return append(known(), &expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, compare(expr.CmpOpEq, []byte{1}))
}

// ipsDstNAT is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const ipsDstNAT = 1 << 5

// dnatted matches connections whose destination was translated.
func dnatted() words { return ctBits(expr.CtKeySTATUS, ipsDstNAT) }

// over matches when the namespace tracks more than n connections opened
// through the rule.
func over(n uint32) words { return words{&expr.Connlimit{Count: n, Flags: 1}} }

func count() words { return words{&expr.Counter{}} }

func drop() words   { return words{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}} }
func back() words   { return words{&expr.Verdict{Kind: expr.VerdictReturn}} }
func accept() words { return words{&expr.Verdict{Kind: expr.VerdictAccept}} }
func jump(chain string) words {
	return words{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}

// From linux/netfilter/nf_tables.h.
const (
	rejectTCPReset    = 1
	rejectICMPX       = 2
	icmpxAdminRefused = 3
)

func reset() words { return words{&expr.Reject{Type: rejectTCPReset}} }
func prohibit() words {
	return words{&expr.Reject{Type: rejectICMPX, Code: icmpxAdminRefused}}
}

func masquerade() words { return words{&expr.Masq{}} }

func dnat(a netip.Addr) words {
	return words{&expr.Immediate{Register: 1, Data: a.AsSlice()},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegAddrMax: 1}}
}

// A table is a batch under construction: nothing of it is in force until
// commit, and then all of it is.
type table struct {
	conn  *nftables.Conn
	table *nftables.Table
	setID uint32
	err   error
	// reasons are those for which there is a chain.
	reasons map[string]bool
}

func newTable(c *nftables.Conn, name string) *table {
	t := &table{conn: c, table: &nftables.Table{Name: name, Family: nftables.TableFamilyINet}}
	c.AddTable(t.table)
	return t
}

// insteadOf starts a table whose commit also removes what it held before. Only
// where there may be such: a removal makes the kernel wait some milliseconds.
func insteadOf(c *nftables.Conn, name string) *table {
	t := newTable(c, name)
	c.DelTable(t.table)
	c.AddTable(t.table)
	return t
}

// base adds a chain that the kernel enters at a hook.
func (t *table) base(name string, kind nftables.ChainType, hook *nftables.ChainHook, prio nftables.ChainPriority) func(...words) {
	return t.add(&nftables.Chain{Name: name, Type: kind, Hooknum: hook, Priority: &prio})
}

// chain adds a chain that rules jump to.
func (t *table) chain(name string) func(...words) { return t.add(&nftables.Chain{Name: name}) }

func (t *table) add(c *nftables.Chain) func(...words) {
	c.Table = t.table
	t.conn.AddChain(c)
	return func(parts ...words) {
		t.conn.AddRule(&nftables.Rule{Table: t.table, Chain: c, Exprs: rule(parts...)})
	}
}

// ranges adds sets of sorted ranges; those of IPv6 where there is any.
func (t *table) ranges(name string, six bool, all []span) (out sets) {
	var el [2][]nftables.SetElement
	for _, s := range all {
		i := 0
		if s.first.Is6() {
			i = 1
		}
		el[i] = append(el[i], nftables.SetElement{Key: s.first.AsSlice()})
		if next := s.last.Next(); next.IsValid() { // a range up to the last address has no end
			el[i] = append(el[i], nftables.SetElement{Key: next.AsSlice(), IntervalEnd: true})
		}
	}
	if len(el[0]) > 0 {
		out = append(out, t.set(&nftables.Set{Name: name, KeyType: nftables.TypeIPAddr, Interval: true}, el[0]))
	}
	if six && len(el[1]) > 0 {
		out = append(out, t.set(&nftables.Set{Name: name + "6", KeyType: nftables.TypeIP6Addr, Interval: true}, el[1]))
	}
	return out
}

// interfaces adds a set of interface names.
func (t *table) interfaces(name string, names []string) *nftables.Set {
	var el []nftables.SetElement
	for _, n := range names {
		el = append(el, nftables.SetElement{Key: ifname(n)})
	}
	return t.set(&nftables.Set{Name: name, KeyType: nftables.TypeIFName}, el)
}

func (t *table) set(s *nftables.Set, el []nftables.SetElement) *nftables.Set {
	t.setID++
	s.Table, s.ID = t.table, t.setID // own IDs: the library counts them in a variable without a lock
	err := t.conn.AddSet(s, nil)
	for part := range slices.Chunk(el, elementsAtOnce) {
		err = errors.Join(err, t.conn.SetAddElements(s, part))
	}
	t.err = errors.Join(t.err, err)
	return s
}

// elementsAtOnce keeps the list in one message below the 64 KiB that an
// attribute holds; an element takes about 24 bytes.
const elementsAtOnce = 1000

func (t *table) commit() error {
	if t.err != nil {
		return t.err
	}
	return t.conn.Flush()
}

// dropTable removes a table; an absent one is no error.
func dropTable(c *nftables.Conn, name string) error {
	t := &nftables.Table{Name: name, Family: nftables.TableFamilyINet}
	c.AddTable(t)
	c.DelTable(t)
	return c.Flush()
}

// nftIn opens nftables in the namespace of f, or the process's if that is nil,
// for changes and not for questions. A batch asks the kernel for one answer.
// The library asks for one to every message, and for every rule to be told
// back, which takes longer than the rules do; it offers this one way around.
func nftIn(f *os.File) (*nftables.Conn, error) {
	done := []mdnetlink.Message{{Header: mdnetlink.Header{Type: mdnetlink.Error}, Data: make([]byte, 4)}}
	return nftables.New(nftables.WithTestDial(func(batch []mdnetlink.Message) ([]mdnetlink.Message, error) {
		if len(batch) == 0 { // the answer to another message of it
			return done, nil
		}
		return done, sendBatch(f, batch)
	}))
}

// sendBatch has the kernel carry out a batch, whose first and last message only
// frame it.
func sendBatch(f *os.File, batch []mdnetlink.Message) error {
	var cfg mdnetlink.Config
	if f != nil {
		cfg.NetNS = int(f.Fd())
	}
	c, err := mdnetlink.Dial(unix.NETLINK_NETFILTER, &cfg)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := roomy(c); err != nil {
		return err
	}
	for i := range batch {
		h := &batch[i].Header
		h.Sequence, h.PID = 0, 0 // this socket's
		h.Flags &^= mdnetlink.Acknowledge | mdnetlink.Echo
	}
	last := len(batch) - 2
	batch[last].Header.Flags |= mdnetlink.Acknowledge
	sent, err := c.SendMessages(batch)
	if err != nil {
		return err
	}
	for {
		got, err := c.Receive() // an error of any message, too
		if err != nil {
			return err
		}
		for _, m := range got {
			if m.Header.Sequence == sent[last].Header.Sequence {
				return nil
			}
		}
	}
}

// roomy lets a batch be larger than what a socket takes by default: one with
// ten thousand prefixes has half a megabyte.
func roomy(c *mdnetlink.Conn) error {
	return errors.Join(c.SetWriteBuffer(batchBytes), c.SetReadBuffer(batchBytes))
}

const batchBytes = 8 << 20
