package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/wholefile"
)

// verdict is what becomes of a packet that a guest sends to a destination.
type verdict int

const (
	passed   verdict = iota
	refused          // and answered
	streamed         // to the listener for connections in the router
	resolved         // to the listener for queries in the router
)

// Reasons of refusals: the words that the kernel's log carries.
const (
	bySpecial     = "special"     // whatever the policy
	bySelf        = "self"        // an address of the machine
	byDeny        = "deny"        // the policy's list
	byName        = "name"        // it hides its name
	byConnections = "connections" // too many open
	byRate        = "rate"        // too many new ones
	// The same of all slots of a team.
	byTeamConnections = "team-connections"
	byTeamRate        = "team-rate"
)

const (
	portDNS  = 53
	portQUIC = 443
)

// policy is a [cay.Egress] as packets are judged by it, in both families. It is
// the model of the rules that firewall.go loads; a test holds the two together.
// Whether a slot has IPv6 at all is not its matter.
type policy struct {
	of          cay.Egress
	allow, deny []span
	// named: connections go to whoever reads their names; hidden: what hides
	// its name from it is refused.
	named, hidden bool
}

func policyOf(e cay.Egress) policy {
	return policy{of: e, allow: spans(inBoth(e.Allow)), deny: spans(inBoth(e.Deny)), named: e.Named(),
		hidden: len(e.AllowNames) > 0 || len(e.Rules) > 0}
}

// inBoth takes all of IPv4 for all of both families, as [cay.Egress] says.
func inBoth(ps []netip.Prefix) []netip.Prefix {
	for _, p := range ps {
		if p.Addr().Is4() && p.Bits() == 0 {
			return append(slices.Clone(ps), netip.PrefixFrom(netip.IPv6Unspecified(), 0))
		}
	}
	return ps
}

// shut reports whether nothing leaves the slot, so that the host's wall can
// know it too.
func (p policy) shut() bool {
	return !p.named && len(p.allow) == 0 && slices.Equal(p.deny, everything)
}

// everything is the ranges of all addresses.
var everything = spans(inBoth([]netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0)}))

// judge says what becomes of a guest's packet that is no answer, and if it is
// refused, why. special are the ranges that are always refused.
func (p policy) judge(special []span, protocol uint8, to netip.AddrPort) (verdict, string) {
	a := to.Addr()
	tcp, udp := protocol == unix.IPPROTO_TCP, protocol == unix.IPPROTO_UDP
	switch {
	case !a.IsValid() || within(special, a):
		return refused, bySpecial
	case p.named && (tcp || udp) && to.Port() == portDNS:
		return resolved, ""
	case p.named && tcp:
		return streamed, ""
	case within(p.allow, a):
		return passed, ""
	case p.hidden && udp && to.Port() == portQUIC:
		return refused, byName
	case within(p.deny, a):
		return refused, byDeny
	}
	return passed, ""
}

// within reports whether sorted ranges hold an address.
func within(all []span, a netip.Addr) bool {
	i, exact := slices.BinarySearchFunc(all, a, func(s span, a netip.Addr) int { return s.first.Compare(a) })
	return exact || i > 0 && a.Compare(all[i-1].last) <= 0
}

// SetPolicy gives a slot in use another policy. It is in force at the return,
// all of it at one instant, also for what is open: connections that it refuses
// or that have to go another way are cut. After an error the slot has the old
// policy, or one that lets less through.
func (p *Pool) SetPolicy(_ context.Context, index int, e cay.Egress) error {
	leave, err := p.enter()
	if err != nil {
		return err
	}
	defer leave()
	t, err := p.tenant(index)
	if err != nil {
		return err
	}
	t.turn.Lock()
	defer t.turn.Unlock()
	err = p.enforce(index, policyOf(e))
	if err == nil {
		err = p.cut(index, policyOf(e))
	}
	if err != nil {
		return fail(fmt.Sprintf("setting the policy of slot %d", index), err)
	}
	p.mu.Lock()
	t.policy = policyOf(e)
	p.mu.Unlock()
	return nil
}

// enforce puts a policy in force in both walls. The wall that opens does so
// last.
func (p *Pool) enforce(index int, pol policy) error {
	f, err := os.Open(p.routerNS(index))
	if err != nil {
		return err
	}
	defer f.Close()
	c, err := nftIn(f)
	if err != nil {
		return err
	}
	if !pol.shut() {
		if err := p.allow(p.link(index)); err != nil {
			return fmt.Errorf("opening the host's rules: %w", err)
		}
	}
	if err := p.routerFirewall(insteadOf(c, routerTable), p.addresses(index), p.slotHas6(index), pol); err != nil {
		return fmt.Errorf("loading the router's rules: %w", err)
	}
	if pol.shut() {
		if err := p.deny(p.link(index)); err != nil {
			return fmt.Errorf("closing the host's rules: %w", err)
		}
	}
	return nil
}

// Refused reports whether an address is no destination for any guest, whatever
// its policy: special, of sandboxes, of the operator's list, or the machine's
// own as it is now. What cannot be asked about is refused.
func (p *Pool) Refused(a netip.Addr) bool {
	a = a.Unmap()
	if p.always(a) {
		return true
	}
	leave, err := p.enter()
	if err != nil {
		return true
	}
	defer leave()
	routes, err := p.host.RouteGet(a.AsSlice())
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
		return false // nothing of ours, and nothing that can be reached
	}
	return err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST
}

// always reports whether an address is refused by what does not change.
func (p *Pool) always(a netip.Addr) bool {
	return IsRefused(a) || p.cidr().Contains(a) || slices.ContainsFunc(p.Refuse, func(q netip.Prefix) bool { return q.Contains(a) })
}

// cut ends the connections in a router that a policy has made wrong. Without
// its entry in the table of connections nothing that comes back reaches the
// guest, and what the guest sends is judged anew.
func (p *Pool) cut(index int, pol policy) error {
	router, err := os.Open(p.routerNS(index))
	if err != nil {
		return err
	}
	defer router.Close()
	var h *netlink.Handle
	err = inNamespace(router, func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_NETFILTER)
		return err
	})
	if err != nil {
		return fmt.Errorf("opening the router's table of connections: %w", err)
	}
	defer h.Close()
	families := []netlink.InetFamily{unix.AF_INET}
	if p.slotHas6(index) {
		families = append(families, unix.AF_INET6)
	}
	for _, family := range families {
		for try := 1; ; try++ {
			_, err := h.ConntrackDeleteFilters(netlink.ConntrackTable, family, wrongFilter{pol, p.special})
			if err == nil {
				break
			}
			if !errors.Is(err, netlink.ErrDumpInterrupted) || try == cutTries {
				return fmt.Errorf("ending connections: %w", err)
			}
		}
	}
	return nil
}

// cutTries is how often a table of connections is read that changes meanwhile.
const cutTries = 5

// wrongFilter matches connections of a guest that a policy would not let be as
// they are.
type wrongFilter struct {
	policy  policy
	special []span
}

// MatchConntrackFlow implements the library's filter.
func (f wrongFilter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	from, _ := netip.AddrFromSlice(flow.Forward.SrcIP)
	to, _ := netip.AddrFromSlice(flow.Forward.DstIP)
	back, _ := netip.AddrFromSlice(flow.Reverse.SrcIP)
	if f := from.Unmap(); f != guestAddr && f != guestAddr6 {
		return false // the host to the guest, or the router itself
	}
	v, _ := f.policy.judge(f.special, flow.Forward.Protocol, netip.AddrPortFrom(to.Unmap(), flow.Forward.DstPort))
	diverted := back.Unmap() == gatewayAddr || back == gatewayAddr6
	switch v {
	case passed:
		return false // also if it is diverted: who serves it there judges it
	case refused:
		return true
	}
	return !diverted || flow.Forward.DstPort == portDNS != (flow.Reverse.SrcPort == ResolverPort)
}

// tenant is what the pool holds of a slot in use.
type tenant struct {
	turn   sync.Mutex // one change of the policy at a time
	policy policy     // guarded by Pool.mu
	log    refusalLog
	ears   *listener // to the kernel's log; may be nil
	spare  spareSockets
}

// tenant returns what the pool holds of a slot.
func (p *Pool) tenant(index int) (*tenant, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t := p.tenants[index]; t != nil {
		return t, nil
	}
	return nil, fail(fmt.Sprintf("looking at slot %d", index), errors.New("it is not in use"))
}

// settle makes a tenant of a slot that somebody has now, or that an earlier
// process gave to somebody.
func (p *Pool) settle(index int, pol policy, adopted bool) {
	t := &tenant{policy: pol}
	t.log.path = p.refusalFile(index)
	var err error
	if adopted {
		err = t.log.load()
	} else {
		err = wholefile.Remove(t.log.path)
	}
	if err != nil {
		p.log().Warn("what was refused to a sandbox before is lost", "slot", index, "err", err)
	}
	t.ears = p.hear(index, t)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tenants[index] = t
}

// vacate forgets the tenant of a slot. Its file of refusals stays.
func (p *Pool) vacate(index int) {
	p.mu.Lock()
	t := p.tenants[index]
	delete(p.tenants, index)
	p.mu.Unlock()
	if t == nil {
		return
	}
	t.spare.end()
	if t.ears != nil {
		t.ears.close()
	}
}
