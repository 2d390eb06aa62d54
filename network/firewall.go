package network

import (
	"errors"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// internetSet holds the interfaces of slots that may leave the machine.
const internetSet = "internet"

// beforeDNAT is the priority of our first look at a packet: connection
// tracking (-200) knows it, nobody's DNAT (-100) has changed it.
const beforeDNAT = -150

// hostFirewall puts the host's half of the policy in force: one table for all
// slots, whose rules know a slot by the prefix of its interface's name, so
// that a slot costs no rule.
func hostFirewall(c *nftables.Conn, p *Pool, open []string) error {
	t := insteadOf(c, p.tableName())
	refused := t.ranges("refused", p.six, p.special)
	internet := t.interfaces(internetSet, open)
	ours := p.linkPrefix()

	refuse(t.chain(refuseChain))
	because := func(word string) words { return t.because(p.group, word) }

	guest := t.chain("guest")
	if !p.six {
		guest(ipv6(), drop())
	}
	guest(invalid(), drop())
	guest(spoofed(), drop())
	guest(answer(), accept())
	guest(toLocal(), because(bySelf))
	refused.each(guest, because(bySpecial))
	guest(iifNotIn(internet), because(byDeny))

	t.base("first", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, beforeDNAT)(iifPrefix(ours), jump("guest"))

	input := t.base("input", nftables.ChainTypeFilter, nftables.ChainHookInput, 0)
	input(iifPrefix(ours), answer(), accept())
	input(iifPrefix(ours), drop())

	forward := t.base("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, 0)
	forward(iifPrefix(ours), oifPrefix(ours), drop())
	refused.each(func(w ...words) { forward(append([]words{iifPrefix(ours)}, w...)...) }, drop()) // again: somebody's DNAT may have changed it
	forward(iifPrefix(ours), accept())
	forward(oifPrefix(ours), answer(), accept())
	forward(oifPrefix(ours), drop())

	leave := t.base("leave", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, 100)
	leave(fromPrefix(p.block), oifNotPrefix(ours), masquerade())
	if p.six {
		leave(fromPrefix(p.block6()), oifNotPrefix(ours), masquerade())
	}

	t.limitTeams(p)
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
	c, s, err := p.internetSet()
	if err != nil {
		return err
	}
	if err := c.SetAddElements(s, []nftables.SetElement{{Key: ifname(link)}}); err != nil {
		return err
	}
	return c.Flush()
}

// deny lets interfaces leave the machine no more. Those that could not before
// are no error.
func (p *Pool) deny(links ...string) error {
	c, s, err := p.internetSet()
	if err != nil {
		return err
	}
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

// internetSet returns the set of what may leave, and a connection to change it.
func (p *Pool) internetSet() (*nftables.Conn, *nftables.Set, error) {
	t := &nftables.Table{Name: p.tableName(), Family: nftables.TableFamilyINet}
	c, err := nftIn(nil)
	return c, &nftables.Set{Table: t, Name: internetSet, KeyType: nftables.TypeIFName}, err
}

// refuse fills a chain that refuses with an answer, so that a program in the
// guest fails at once instead of waiting.
func refuse(chain func(...words)) {
	chain(count())
	chain(tcp(), reset())
	chain(prohibit())
}

// toldPerSecond bounds, per slot and reason, the refusals that are handed out
// to be logged.
const toldPerSecond = 100

// because returns the verdict that refuses for a reason, after telling a group
// of the log; group 0 tells nobody.
func (t *table) because(group uint16, word string) words {
	name := refuseChain + "-" + word
	if !t.reasons[word] {
		chain := t.chain(name)
		if group != 0 {
			chain(slower(toldPerSecond, toldPerSecond), tell(group, word))
		}
		chain(jump(refuseChain))
		if t.reasons == nil {
			t.reasons = map[string]bool{}
		}
		t.reasons[word] = true
	}
	return jump(name)
}

// routerTable is the name of the table in each router namespace.
const (
	routerTable = "cay"
	refuseChain = "refuse"
)

// Marks of packets that go to a listener in the router instead of out.
const (
	streamMark   = 1
	resolverMark = 2
)

// routerFirewall puts a slot's own half of a policy in force, in its router
// namespace; six says that the slot has IPv6. The chain egress is
// [policy.judge] in the kernel's words.
func (p *Pool) routerFirewall(t *table, a addresses, six bool, pol policy) error {
	special := t.ranges("special", six, p.special)
	refuse(t.chain(refuseChain))
	group := uint16(0)
	if p.group != 0 {
		group = routerGroup
	}
	because := func(word string) words { return t.because(group, word) }

	egress := t.chain("egress")
	if pol.named {
		for _, protocol := range []words{tcp(), udp()} {
			egress(protocol, toPort(portDNS), mark(resolverMark), back())
		}
		egress(tcp(), mark(streamMark), back())
	}
	t.ranges("allow", six, pol.allow).each(egress, back())
	if pol.hidden {
		egress(udp(), toPort(portQUIC), because(byName))
	}
	t.ranges("deny", six, pol.deny).each(egress, because(byDeny))

	limits := t.chain("limits")
	limits(over(p.Limits.connections()), because(byConnections))
	limits(faster(p.Limits.perSecond(), uint32(2*p.Limits.perSecond())), because(byRate))

	guest := t.chain("guest")
	if six {
		guest(notFrom(guestAddr6), drop())
	} else {
		guest(ipv6(), drop())
	}
	guest(invalid(), drop()) // it would leave untranslated
	guest(notFrom(guestAddr), drop())
	guest(answer(), accept())
	special.each(guest, because(bySpecial))
	guest(toLocal(), because(bySelf))
	guest(jump("egress"))
	guest(isNew(), jump("limits"))

	t.base("first", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, beforeDNAT)(iif(guestLink), jump("guest"))

	// Only the host opens connections to the guest. A segment from the middle
	// of a connection is none: it belongs to the slot's former life.
	enter := t.base("enter", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, -100)
	enter(iif(upLink), from(a.host), to(a.slot), opening(), dnat(guestAddr))
	enter(iif(upLink), from(a.host), to(a.slot), notTCP(), dnat(guestAddr))
	enter(iif(guestLink), marked(streamMark), redirect(StreamPort))
	enter(iif(guestLink), marked(resolverMark), redirect(ResolverPort))

	input := t.base("input", nftables.ChainTypeFilter, nftables.ChainHookInput, 0)
	input(iif(guestLink), anyMark(), accept())
	input(iif(upLink), answer(), accept()) // of what a listener's server dialled
	input(iif(upLink), from(a.host), tcp(), reset())
	input(drop())

	// What a listener's server sends is judged by it; the wall stays.
	output := t.base("output", nftables.ChainTypeFilter, nftables.ChainHookOutput, 0)
	special.each(func(w ...words) { output(append([]words{oif(upLink), isNew()}, w...)...) }, drop())

	forward := t.base("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, 0)
	forward(iif(guestLink), anyMark(), because(byName)) // a connection from before the policy, which goes another way
	forward(iif(guestLink), oif(upLink), accept())
	forward(iif(upLink), oif(guestLink), known(), accept())
	forward(iif(upLink), oif(guestLink), dnatted(), accept())
	forward(drop())

	leave := t.base("leave", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, 100)
	leave(oif(upLink), masquerade())
	leave(oif(guestLink), masquerade()) // the guest sees its gateway, nothing of the host
	return t.commit()
}
