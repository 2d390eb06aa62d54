package network

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

var (
	uplink6 = netip.MustParseAddr("2606:2800:220::2")
	world6  = netip.MustParseAddr("2606:2800:220::1")
	public6 = netip.MustParseAddr("2606:2800:221::34")
	other6  = netip.MustParseAddr("2606:2800:222::34")
)

// withIPv6 gives the tests' host IPv6 until the test ends: an address, and a
// default route to the world.
func withIPv6(t *testing.T) {
	t.Helper()
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	address := func(h *netlink.Handle, link string, a netip.Addr) *netlink.Addr {
		l, err := h.LinkByName(link)
		if err != nil {
			t.Fatal(err)
		}
		out := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}
		if err := h.AddrAdd(l, out); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { netlink.AddrDel(l, out) })
		return out
	}
	if err := inFile(world, func() error {
		wh, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer wh.Close()
		l, err := wh.LinkByName("wan0")
		if err != nil {
			return err
		}
		err = wh.AddrReplace(l, &netlink.Addr{IPNet: &net.IPNet{IP: world6.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD})
		if err != nil {
			return err
		}
		// Before the one by which every address is the world's.
		return wh.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: netlink.NewIPNet(uplink6.AsSlice()), Table: unix.RT_TABLE_LOCAL})
	}); err != nil {
		t.Fatal(err)
	}
	address(h, "wan", uplink6)
	l, err := h.LinkByName("wan")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: world6.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: world6.AsSlice()}) })
}

// serve6 answers in the world on a port of every address of IPv6.
func serve6(t *testing.T) { serve(t, world, "[::]:80") }

func reach6(t *testing.T, s Slot, to netip.Addr) error {
	t.Helper()
	return reach(t, s, "tcp6", to)
}

// TestIPv6 proves that a guest of a machine with IPv6 reaches public addresses
// of it, in the machine's name, under each policy what that lets out, also for
// what is open already.
func TestIPv6(t *testing.T) {
	withIPv6(t)
	p := testPool(t, "six")
	serve6(t)
	wan := newTap(t, world, "wan0")
	allowed := cay.Egress{Deny: []netip.Prefix{everywhere4}, Allow: prefixes("2606:2800:221::/48")}
	denied := cay.Egress{Deny: prefixes("2606:2800:221::/48", "1.0.0.0/8")}
	s := acquire(t, p, true)
	if !s.IPv6 {
		t.Fatal("the slot has no IPv6")
	}
	for _, tt := range []struct {
		name          string
		e             cay.Egress
		public, other bool
	}{
		{"open", cay.Egress{}, true, true},
		{"closed", closed, false, false},
		{"all of IPv6 denied", cay.Egress{Deny: prefixes("::/0")}, false, false},
		{"one allowed", allowed, true, false},
		{"one denied", denied, false, true},
		{"IPv4 denied", cay.Egress{Deny: prefixes("0.0.0.0/1", "128.0.0.0/1")}, true, true},
		{"open again", cay.Egress{}, true, true},
	} {
		if err := p.SetPolicy(t.Context(), s.Index, tt.e); err != nil {
			t.Fatal(err)
		}
		made, err := p.Acquire(t.Context(), tt.e) // for it, and not changed
		if err != nil {
			t.Fatal(err)
		}
		for _, slot := range []Slot{s, made} {
			for a, want := range map[netip.Addr]bool{public6: tt.public, other6: tt.other} {
				if err := reach6(t, slot, a); (err == nil) != want {
					t.Errorf("%s: %s: %v, want reached %v", tt.name, a, err, want)
				}
			}
		}
		if err := p.Release(t.Context(), made.Index); err != nil {
			t.Fatal(err)
		}
	}
	for _, seen := range wan.take() {
		if seen.src.Is6() && seen.src != uplink6 && !ownLink(seen) && !seen.src.IsLinkLocalUnicast() {
			t.Errorf("left the host in another's name: %s", seen)
		}
	}

	// What is open when the policy changes.
	c := open(t, s, "tcp6", netip.AddrPortFrom(public6, 80))
	if err := p.SetPolicy(t.Context(), s.Index, denied); err != nil {
		t.Fatal(err)
	}
	if c.echo() == nil {
		t.Error("bytes go through a connection that the policy refuses")
	}
	refusals(t, p, s, func(all []cay.EgressRefusal) bool {
		return slices.ContainsFunc(all, func(r cay.EgressRefusal) bool {
			return r.Destination == netip.AddrPortFrom(public6, 80) && r.Rule == "2606:2800:221::/48" && r.Protocol == "tcp"
		})
	})
}

// TestIPv6Refused proves that no special address of IPv6, none of the machine
// and none of another slot is reached, by either wall alone, and that no
// forged source leaves.
func TestIPv6Refused(t *testing.T) {
	withIPv6(t)
	p := testPool(t, "sixno", func(p *Pool) {
		p.Refuse, p.Limits.PerSecond = prefixes("2606:2800:999::/48"), 1<<20
	})
	s, other := acquire(t, p, true), acquire(t, p, true)
	hits := canary(t)
	wan := newTap(t, world, "wan0")
	var to []netip.Addr
	for _, q := range p.special {
		if q.first.Is6() {
			to = append(to, q.first, q.first.Next(), q.last)
		}
	}
	to = append(to, uplink6, guestAddr6, gatewayAddr6, p.addresses(s.Index).slot6, p.addresses(s.Index).host6,
		p.addresses(other.Index).slot6, p.addresses(other.Index).host6, netip.MustParseAddr("2606:2800:999::1"),
		netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("64:ff9b::a9fe:a9fe"), netip.MustParseAddr("::ffff:169.254.169.254"))
	tap := newTap(t, openFile(t, other.NetNS), eth0)
	try := func(forged []netip.Addr) {
		t.Helper()
		err := in(t, s.NetNS, func() error {
			for _, a := range to {
				shout(netip.AddrPortFrom(a, canaryPort))
			}
			for _, src := range forged {
				if err := forge6(src, netip.AddrPortFrom(public6, 7777)); err != nil {
					return err
				}
			}
			shout(netip.AddrPortFrom(publicAddr, 9))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, seen := range wan.await(t, netip.AddrPortFrom(publicAddr, 9)) {
			if seen.dst != publicAddr && !ownLink(seen) && !(seen.proto == unix.IPPROTO_ICMPV6 && (seen.src == uplink6 || seen.src.IsLinkLocalUnicast())) {
				t.Errorf("left the host: %s", seen)
			}
		}
		if n := hits.Load(); n != 0 {
			t.Errorf("%d connections and datagrams reached the host's listeners", n)
		}
		for _, seen := range tap.take() {
			t.Errorf("the other slot got %s", seen)
		}
	}
	try([]netip.Addr{p.addresses(s.Index).slot6, p.addresses(other.Index).slot6, uplink6, netip.MustParseAddr("fe80::7"), gatewayAddr6})
	// The host's wall alone: the router's refuses nothing any more.
	if err := inFile(openFile(t, p.routerNS(s.Index)), func() error {
		c, err := nftIn(nil)
		if err != nil {
			return err
		}
		rules := insteadOf(c, routerTable)
		rules.base("leave", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, 100)(oif(upLink), masquerade())
		return rules.commit()
	}); err != nil {
		t.Fatal(err)
	}
	try(nil) // it translates sources
}

// TestIPv6Diverted proves that what a policy with names turns to the listeners
// comes there from both families, with the destination that the guest meant,
// and that the way out from there leads to both.
func TestIPv6Diverted(t *testing.T) {
	withIPv6(t)
	p := testPool(t, "sixdiv")
	serve6(t)
	s, err := p.Acquire(t.Context(), named)
	if err != nil {
		t.Fatal(err)
	}
	if err := reach6(t, s, public6); err == nil {
		t.Error("with no listener a name's destination is reached")
	}
	d, err := p.Divert(t.Context(), s.Index)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if !d.IPv6 {
		t.Error("the listeners are of IPv4 alone")
	}
	for _, to := range []netip.AddrPort{netip.AddrPortFrom(public6, 443), netip.AddrPortFrom(publicAddr, 443)} {
		if err := in(t, s.NetNS, func() error {
			c, err := net.Dial("tcp", to.String())
			if err == nil {
				c.Close()
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		c, err := d.TCP.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Destination(c); err != nil || got != to {
			t.Errorf("the destination is %s, %v, want %s", got, err, to)
		}
		c.Close()
	}
	resolver := netip.AddrPortFrom(netip.MustParseAddr("2001:4860:4860::8888"), 53)
	if err := in(t, s.NetNS, func() error {
		c, err := net.Dial("udp6", resolver.String())
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("query")); err != nil {
			return err
		}
		b := make([]byte, 100)
		n, from, err := d.DNS.ReadFrom(b)
		if err != nil {
			return err
		}
		if string(b[:n]) != "query" {
			t.Errorf("the query is %q", b[:n])
		}
		if _, err := d.DNS.WriteTo([]byte("answer"), from); err != nil {
			return err
		}
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, err = c.Read(b)
		if string(b[:n]) != "answer" {
			t.Errorf("the answer is %q", b[:n])
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if c, err := p.Dial(t.Context(), s.Index, netip.AddrPortFrom(public6, 80)); err != nil {
		t.Errorf("the way out: %v", err)
	} else {
		c.Close()
	}
	for _, a := range []string{"fd00:ec2::254", "::1", uplink6.String()} {
		if c, err := p.Dial(t.Context(), s.Index, netip.AddrPortFrom(netip.MustParseAddr(a), canaryPort)); err == nil {
			c.Close()
			t.Errorf("the way out leads to %s", a)
		}
	}
	if !p.Refused(uplink6) || p.Refused(public6) {
		t.Error("who dials for a guest does not know the machine's own address of IPv6")
	}
}

// TestIPv6Settings proves that the host forwards IPv6 only where guests have
// it, goes on listening to its routers, and is afterwards as it was.
func TestIPv6Settings(t *testing.T) {
	read := func(name string) string {
		t.Helper()
		v, err := readSysctl(name)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if err := sysctl(acceptAdverts("wan"), "1"); err != nil {
		t.Fatal(err)
	}
	was := read(forward6Sysctl)
	t.Run("without", func(t *testing.T) {
		s := acquire(t, testPool(t, "sixoff"), true)
		if s.IPv6 || read(forward6Sysctl) != was {
			t.Errorf("the slot is %+v, forwarding %s", s, read(forward6Sysctl))
		}
		if err := in(t, s.NetNS, func() error {
			c, err := net.Dial("udp6", netip.AddrPortFrom(public6, 80).String())
			if err == nil {
				c.Close()
			}
			return err
		}); err == nil || !strings.Contains(err.Error(), "unreachable") && !strings.Contains(err.Error(), "cannot assign") {
			t.Errorf("a guest does not know at once that there is no IPv6: %v", err)
		}
	})
	t.Run("with", func(t *testing.T) {
		withIPv6(t)
		p := testPool(t, "sixon")
		if read(forward6Sysctl) != "1" || read(acceptAdverts("wan")) != "2" {
			t.Errorf("forwarding is %s, adverts %s", read(forward6Sysctl), read(acceptAdverts("wan")))
		}
		if err := p.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
		if read(forward6Sysctl) != was || read(acceptAdverts("wan")) != "1" {
			t.Errorf("afterwards forwarding is %s, was %s; adverts %s", read(forward6Sysctl), was, read(acceptAdverts("wan")))
		}
	})
}

// forge6 sends a datagram with a source that the guest does not have.
func forge6(src netip.Addr, dst netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	b := make([]byte, 56)
	b[0], b[5], b[6], b[7] = 0x60, 16, unix.IPPROTO_UDP, 64
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.Addr().AsSlice())
	b[40], b[42], b[43], b[45] = 0x11, byte(dst.Port()>>8), byte(dst.Port()), 16
	return os.NewSyscallError("sendto", unix.Sendto(fd, b, 0, &unix.SockaddrInet6{Addr: dst.Addr().As16()}))
}
