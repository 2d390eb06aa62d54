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
	t := insteadOf(c, p.tableName())
	refused := t.addresses("refused", append(Refused(), append(p.Refuse, p.cidr())...))
	internet := t.interfaces(internetSet, open)
	ours := p.linkPrefix()

	refuse(t.chain(refuseChain))

	guest := t.chain("guest")
	guest(ipv6(), drop())
	guest(invalid(), drop())
	guest(spoofed(), drop())
	guest(answer(), accept())
	guest(toLocal(), jump(refuseChain))
	guest(toSet(refused), jump(refuseChain))
	guest(iifNotIn(internet), jump(refuseChain))

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

// allow lets a slot's interface leave the machine.
func (p *Pool) allow(link string) error {
	c, s := p.internetSet()
	if err := c.SetAddElements(s, []nftables.SetElement{{Key: ifname(link)}}); err != nil {
		return err
	}
	return c.Flush()
}

// deny lets interfaces leave the machine no more. Those that could not before
// are no error.
func (p *Pool) deny(links ...string) error {
	c, s := p.internetSet()
	var el []nftables.SetElement
	for _, l := range links {
		el = append(el, nftables.SetElement{Key: ifname(l)})
	}
	// Adding what is there is no error and deleting what is not is one: so
	// add, then delete, in one transaction.
	if err := c.SetAddElements(s, el); err != nil {
		return err
	}
	if err := c.SetDeleteElements(s, el); err != nil {
		return err
	}
	return c.Flush()
}

func (p *Pool) internetSet() (*nftables.Conn, *nftables.Set) {
	t := &nftables.Table{Name: p.tableName(), Family: nftables.TableFamilyINet}
	return &nftables.Conn{}, &nftables.Set{Table: t, Name: internetSet, KeyType: nftables.TypeIFName}
}

// refuse fills a chain that refuses with an answer, so that a program in the
// guest fails at once instead of waiting.
func refuse(chain func(...words)) {
	chain(count())
	chain(tcp(), reset())
	chain(prohibit())
}

// routerTable is the name of the table in each router namespace. Its chain
// egress is empty in a slot that reaches the internet.
const (
	routerTable = "cay"
	egressChain = "egress"
	refuseChain = "refuse"
)

// routerFirewall puts a slot's own half of the policy in force, in its router
// namespace.
func routerFirewall(c *nftables.Conn, a addresses, prefixes []netip.Prefix) error {
	t := newTable(c, routerTable)
	refused := t.addresses("refused", prefixes)

	refuse(t.chain(refuseChain))
	t.chain(egressChain)

	guest := t.chain("guest")
	guest(ipv6(), drop())
	guest(invalid(), drop()) // it would leave untranslated
	guest(notFrom(guestAddr), drop())
	guest(answer(), accept())
	guest(toSet(refused), jump(refuseChain))
	guest(toLocal(), jump(refuseChain))
	guest(jump(egressChain))

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
	forward(iif(guestLink), oif(upLink), isNew(), over(maxConnections), jump(refuseChain))
	forward(iif(guestLink), oif(upLink), accept())
	forward(iif(upLink), oif(guestLink), known(), accept())
	forward(iif(upLink), oif(guestLink), dnatted(), accept())
	forward(drop())

	leave := t.base("leave", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, 100)
	leave(oif(upLink), masquerade())
	leave(oif(guestLink), masquerade()) // the guest sees its gateway, nothing of the host
	return t.commit()
}

// closeRouter refuses everything a guest opens, in its router namespace.
func closeRouter(c *nftables.Conn) error {
	t := &nftables.Table{Name: routerTable, Family: nftables.TableFamilyINet}
	c.AddRule(&nftables.Rule{Table: t, Chain: &nftables.Chain{Name: egressChain, Table: t}, Exprs: jump(refuseChain)})
	return c.Flush()
}
