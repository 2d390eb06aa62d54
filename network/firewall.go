package network

import (
	"errors"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// internetSet holds the interfaces of slots that may leave the machine.
const internetSet = "internet"

// beforeDNAT is the priority of our first look at a packet: connection
// tracking (-200) knows it, nobody's DNAT (-100) has changed it.
const beforeDNAT = -150

// maxConnections bounds the connections one sandbox has open at once, because
// all sandboxes share the host's table of connections.
const maxConnections = 8192

// hostFirewall puts the host's half of the policy in force: one table for all
// slots, whose rules know a slot by the prefix of its interface's name, so
// that a slot costs no rule.
func hostFirewall(c *nftables.Conn, p *Pool, open []string) error {
	t := newTable(c, p.tableName())
	refused := t.addresses("refused", append(Refused(), append(p.Refuse, p.cidr())...))
	internet := t.interfaces(internetSet, open)
	ours := p.linkPrefix()

	guest := t.chain("guest")
	guest(ipv6(), drop())
	guest(spoofed(), drop())
	guest(answer(), accept())
	guest(toLocal(), drop())
	guest(toSet(refused), drop())
	guest(iifNotIn(internet), drop())

	t.base("first", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, beforeDNAT)(iifPrefix(ours), jump("guest"))

	input := t.base("input", nftables.ChainTypeFilter, nftables.ChainHookInput, 0)
	input(iifPrefix(ours), answer(), accept())
	input(iifPrefix(ours), drop())

	forward := t.base("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, 0)
	forward(iifPrefix(ours), oifPrefix(ours), drop())
	forward(iifPrefix(ours), toSet(refused), drop()) // again: somebody's DNAT may have changed it
	forward(iifPrefix(ours), accept())
	forward(oifPrefix(ours), answer(), accept())
	forward(oifPrefix(ours), drop())

	t.base("leave", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, 100)(
		fromPrefix(p.block), oifNotPrefix(ours), masquerade())
	return t.commit()
}

// openSlots returns the interfaces that the table in force lets out, so that a
// new table starts from the same state.
func openSlots(c *nftables.Conn, p *Pool) ([]string, error) {
	t := &nftables.Table{Name: p.tableName(), Family: nftables.TableFamilyINet}
	s, err := c.GetSetByName(t, internetSet)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil, nil
		}
		return nil, err
	}
	el, err := c.GetSetElements(s)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range el {
		out = append(out, strings.TrimRight(string(e.Key), "\x00"))
	}
	return out, nil
}

// allow lets a slot's interface leave the machine, or no more.
func (p *Pool) allow(link string, yes bool) error {
	t := &nftables.Table{Name: p.tableName(), Family: nftables.TableFamilyINet}
	s := &nftables.Set{Table: t, Name: internetSet, KeyType: nftables.TypeIFName}
	c := &nftables.Conn{}
	el := []nftables.SetElement{{Key: ifname(link)}}
	add := func() error { return c.SetAddElements(s, el) }
	if err := add(); err != nil { // adding one that is there is no error, so deleting after it never fails
		return err
	}
	if !yes {
		if err := c.SetDeleteElements(s, el); err != nil {
			return err
		}
	}
	return c.Flush()
}

// routerTable is the name of the table in each router namespace.
const routerTable = "cay"

// routerFirewall puts a slot's own half of the policy in force, in its router
// namespace. It refuses with an answer, so that a program in the guest fails
// at once; the host's half drops.
func routerFirewall(c *nftables.Conn, a addresses, refuse []netip.Prefix, policy Policy) error {
	t := newTable(c, routerTable)
	refused := t.addresses("refused", refuse)

	no := t.chain("refuse")
	no(count())
	no(tcp(), reset())
	no(prohibit())

	guest := t.chain("guest")
	guest(ipv6(), drop())
	guest(notFrom(guestAddr), drop())
	guest(answer(), accept())
	guest(toSet(refused), jump("refuse"))
	guest(toLocal(), jump("refuse"))
	if !policy.AllowInternet {
		guest(jump("refuse"))
	}

	t.base("first", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, beforeDNAT)(iif(guestLink), jump("guest"))

	// Only the host opens connections to the guest. A segment from the middle
	// of a connection is none: it belongs to the slot's former life.
	enter := t.base("enter", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, -100)
	enter(iif(upLink), from(a.host), to(a.slot), opening(), dnat(guestAddr))
	enter(iif(upLink), from(a.host), to(a.slot), notTCP(), dnat(guestAddr))

	input := t.base("input", nftables.ChainTypeFilter, nftables.ChainHookInput, 0)
	input(iif(upLink), from(a.host), tcp(), reset())
	input(drop())

	forward := t.base("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, 0)
	forward(iif(guestLink), oif(upLink), isNew(), over(maxConnections), jump("refuse"))
	forward(iif(guestLink), oif(upLink), accept())
	forward(iif(upLink), oif(guestLink), known(), accept())
	forward(iif(upLink), oif(guestLink), dnatted(), accept())
	forward(drop())

	leave := t.base("leave", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, 100)
	leave(oif(upLink), masquerade())
	leave(oif(guestLink), masquerade()) // the guest sees its gateway, nothing of the host
	return t.commit()
}
