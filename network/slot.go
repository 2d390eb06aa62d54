package network

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What every guest sees, and what therefore may be in a snapshot.
var (
	guestAddr   = netip.MustParseAddr("169.254.0.21")
	gatewayAddr = netip.MustParseAddr("169.254.0.22")
	// Of IPv6, unique local (RFC 4193): programs that may choose take IPv4 then
	// (RFC 6724, 2.1), and IPv6 for what has no other address.
	guestAddr6   = netip.MustParseAddr("fdca:1a7d:9c3e::169:21")
	gatewayAddr6 = netip.MustParseAddr("fdca:1a7d:9c3e::169:22")
)

// linkPrefix6 is that of the links between host and routers; the end is the
// IPv4 address.
var linkPrefix6 = netip.MustParsePrefix("fdca:1a7d:9c3e:1::/96")

// Names of links inside the namespaces of a slot.
const (
	upLink    = "up"    // router: towards the host
	guestLink = "guest" // router: towards the guest
	eth0      = "eth0"  // inner
	loopback  = "lo"
)

// Hardware addresses, locally administered. They may be the same in every
// slot, for no two slots share a link.
var (
	hostMAC    = net.HardwareAddr{0x02, 0xca, 0, 0, 0, 1}
	upMAC      = net.HardwareAddr{0x02, 0xca, 0, 0, 0, 2}
	gatewayMAC = net.HardwareAddr{0x02, 0xca, 0, 0, 0, 22}
	guestMAC   = net.HardwareAddr{0x02, 0xca, 0, 0, 0, 21}
)

// Slot is a network that a guest can have.
type Slot struct {
	Index int
	// Addr is where this machine reaches the guest, on every port. Nobody
	// else reaches it.
	Addr netip.Addr
	// NetNS is the path of the namespace whose link eth0 becomes the guest's.
	NetNS string
	// IPv6 says that the guest has an address of IPv6 and may use it.
	IPv6 bool
}

// addresses are the two ends of a slot's link to the host, in both families.
type addresses struct{ host, slot, host6, slot6 netip.Addr }

// in6 is the address of a link that has an IPv4 one.
func in6(a netip.Addr) netip.Addr {
	b, four := linkPrefix6.Addr().As16(), a.As4()
	copy(b[12:], four[:])
	return netip.AddrFrom16(b)
}

func (p *Pool) addresses(index int) addresses {
	base := p.block.Addr().As4()
	n := uint32(base[0])<<24 | uint32(base[1])<<16 | uint32(base[2])<<8 | uint32(base[3])
	at := func(n uint32) netip.Addr {
		return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
	}
	n += 2 * uint32(index)
	return addresses{host: at(n), slot: at(n + 1), host6: in6(at(n)), slot6: in6(at(n + 1))}
}

func tableName(tag string) string  { return "cay-" + tag }
func linkPrefix(tag string) string { return "cy" + tag + "-" }
func nsPrefix(tag string) string   { return "cay-" + tag + "-" }

func (p *Pool) tableName() string         { return tableName(p.Tag) }
func (p *Pool) linkPrefix() string        { return linkPrefix(p.Tag) }
func (p *Pool) link(index int) string     { return p.linkPrefix() + strconv.Itoa(index) }
func (p *Pool) routerNS(index int) string { return p.nsPath(index, "r") }
func (p *Pool) innerNS(index int) string  { return p.nsPath(index, "i") }
func (p *Pool) nsPath(index int, end string) string {
	return filepath.Join(p.NamespaceDir, nsPrefix(p.Tag)+strconv.Itoa(index)+end)
}

func (p *Pool) slot(index int) Slot {
	return Slot{Index: index, Addr: p.addresses(index).slot, NetNS: p.innerNS(index), IPv6: p.slotHas6(index)}
}

// slotHas6 reports whether a slot was made with IPv6: one of an earlier process
// may have been made without.
func (p *Pool) slotHas6(index int) bool {
	l, err := p.host.LinkByName(p.link(index))
	if err != nil {
		return false
	}
	addrs, err := p.host.AddrList(l, netlink.FAMILY_V6)
	return err == nil && slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
		ip, _ := netip.AddrFromSlice(a.IP)
		return ip == p.addresses(index).host6
	})
}

// found returns the indexes of all slots of which the host holds anything.
func (p *Pool) found() (map[int]bool, error) {
	out := map[int]bool{}
	entries, err := os.ReadDir(p.NamespaceDir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), nsPrefix(p.Tag))
		if !ok || rest == "" {
			continue
		}
		if n, err := strconv.Atoi(rest[:len(rest)-1]); err == nil && (rest[len(rest)-1] == 'r' || rest[len(rest)-1] == 'i') {
			out[n] = true
		}
	}
	links, err := p.host.LinkList()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if rest, ok := strings.CutPrefix(l.Attrs().Name, p.linkPrefix()); ok {
			if n, err := strconv.Atoi(rest); err == nil {
				out[n] = true
			}
		}
	}
	return out, nil
}

// build makes a slot from nothing and proves that it carries packets. What it
// made before an error is for remove.
func (p *Pool) build(index int, pol policy) error {
	router, inner, err := p.newRooms(index)
	if err != nil {
		return err
	}
	defer router.close()
	defer inner.close()
	b := builder{pool: p, index: index, at: p.addresses(index), router: router.links, inner: inner.links}
	if err := b.outer(router.ns); err != nil {
		return fmt.Errorf("linking the router to the host: %w", err)
	}
	if err := b.innermost(inner.ns); err != nil {
		return fmt.Errorf("linking the guest to the router: %w", err)
	}
	if err := p.Limits.slow(router.links, upLink, guestLink); err != nil {
		return err
	}
	rules, err := nftIn(router.ns)
	if err != nil {
		return err
	}
	if err := p.routerFirewall(newTable(rules, routerTable), b.at, p.six, pol); err != nil {
		return fmt.Errorf("loading the router's rules: %w", err)
	}
	if !pol.shut() {
		if err := p.allow(p.link(index)); err != nil {
			return fmt.Errorf("opening the host's rules: %w", err)
		}
	}
	if err := b.prove(inner.echo); err != nil {
		return fmt.Errorf("testing the new slot: %w", err)
	}
	return nil
}

// room is a namespace in the making, with what only a thread in it can open.
type room struct {
	ns    *os.File
	links *netlink.Handle
	echo  *net.UDPConn // at any of its addresses
}

func (r *room) close() {
	if r.links != nil {
		r.links.Close()
	}
	if r.echo != nil {
		r.echo.Close()
	}
	if r.ns != nil {
		r.ns.Close()
	}
}

// newRooms makes the two namespaces of a slot, at the same time: the kernel
// takes a millisecond or two for each.
func (p *Pool) newRooms(index int) (router, inner *room, err error) {
	router, inner = &room{}, &room{}
	ofRouter, ofInner := [][2]string{{"ipv6/conf/all/disable_ipv6", "1"}}, noIPv6
	if p.six {
		ofRouter, ofInner = routerSettings6, innerSettings6
	}
	ofRouter = slices.Concat(routerSettings, ofRouter)
	errs := make(chan error, 2)
	go func() { errs <- onThread(func() error { return router.furnish(p.routerNS(index), ofRouter) }) }()
	go func() {
		errs <- onThread(func() error {
			if err := inner.furnish(p.innerNS(index), ofInner); err != nil {
				return err
			}
			var err error
			inner.echo, err = net.ListenUDP("udp4", nil)
			return err
		})
	}()
	if err := errors.Join(<-errs, <-errs); err != nil {
		router.close()
		inner.close()
		return nil, nil, err
	}
	return router, inner, nil
}

// furnish moves the calling thread, which must be one of onThread, into a new
// namespace.
func (r *room) furnish(path string, settings [][2]string) (err error) {
	if r.ns, err = newNamespace(path); err != nil {
		return fmt.Errorf("making a namespace: %w", err)
	}
	for _, s := range settings {
		if err := sysctl(s[0], s[1]); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	r.links, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	return err
}

// routerSettings are of the router's namespace, before it has links. To forward
// is to believe no redirect.
var routerSettings = [][2]string{
	{"ipv4/ip_forward", "1"},
	{"ipv4/conf/all/rp_filter", "1"},
	{"ipv4/conf/all/send_redirects", "0"},
	{"ipv4/conf/default/send_redirects", "0"},
}

// noIPv6 is of links to come. Not "all": the guest's loopback keeps ::1.
var noIPv6 = [][2]string{{"ipv6/conf/default/disable_ipv6", "1"}}

// With IPv6, links have the address that they are given and no other, and
// believe no router.
var (
	innerSettings6 = [][2]string{
		{"ipv6/conf/default/accept_ra", "0"},
		{"ipv6/conf/default/addr_gen_mode", "1"}, // none, of linux/if_link.h
	}
	routerSettings6 = append([][2]string{{"ipv6/conf/all/forwarding", "1"}}, innerSettings6...)
)

type builder struct {
	pool          *Pool
	index         int
	at            addresses
	router, inner *netlink.Handle
}

// outer makes the link between host and router.
func (b builder) outer(router *os.File) error {
	p, name := b.pool, b.pool.link(b.index)
	veth := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: upLink,
		PeerNamespace: netlink.NsFd(int(router.Fd())), PeerHardwareAddr: upMAC, PeerMTU: uint32(p.mtu)}
	veth.Name, veth.HardwareAddr, veth.MTU = name, hostMAC, p.mtu
	if err := p.host.LinkAdd(veth); err != nil {
		return fmt.Errorf("making %s: %w", name, err)
	}
	// The link is down yet, and has no address.
	setting := "disable_ipv6"
	if p.six {
		setting = "addr_gen_mode"
	}
	if err := sysctl("ipv6/conf/"+name+"/"+setting, "1"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := p.host.LinkByName(name)
	if err != nil {
		return err
	}
	if err := up(p.host, l, b.end(end{b.at.host, 31, b.at.slot, upMAC}, b.at.host6, b.at.slot6)); err != nil {
		return err
	}
	if err := bring(b.router, loopback); err != nil {
		return err
	}
	return upstream(b.router, upLink, b.end(end{b.at.slot, 31, b.at.host, hostMAC}, b.at.slot6, b.at.host6))
}

// innermost makes the link between router and guest.
func (b builder) innermost(inner *os.File) error {
	veth := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: eth0,
		PeerNamespace: netlink.NsFd(int(inner.Fd())), PeerHardwareAddr: guestMAC, PeerMTU: uint32(b.pool.mtu)}
	veth.Name, veth.HardwareAddr, veth.MTU = guestLink, gatewayMAC, b.pool.mtu
	if err := b.router.LinkAdd(veth); err != nil {
		return err
	}
	l, err := b.router.LinkByName(guestLink)
	if err != nil {
		return err
	}
	if err := up(b.router, l, b.end(end{gatewayAddr, 30, guestAddr, guestMAC}, gatewayAddr6, guestAddr6)); err != nil {
		return err
	}
	if err := bring(b.inner, loopback); err != nil {
		return err
	}
	return upstream(b.inner, eth0, b.end(end{guestAddr, 30, gatewayAddr, gatewayMAC}, guestAddr6, gatewayAddr6))
}

func bring(h *netlink.Handle, name string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	return h.LinkSetUp(l)
}

// end is one end of a link, and what it knows of the other.
type end struct {
	addr    netip.Addr
	bits    int
	peer    netip.Addr
	peerMAC net.HardwareAddr
}

// end returns the ends of both families, or of IPv4 alone.
func (b builder) end(e end, addr6, peer6 netip.Addr) []end {
	if !b.pool.six {
		return []end{e}
	}
	return []end{e, {addr6, e.bits + 96, peer6, e.peerMAC}}
}

// up gives a link its addresses, switches it on, and tells it for good where the
// other end is, so that no ARP and no neighbour discovery is needed or believed.
func up(h *netlink.Handle, l netlink.Link, ends []end) error {
	for _, e := range ends {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: e.addr.AsSlice(), Mask: net.CIDRMask(e.bits, e.addr.BitLen())}, Scope: unix.RT_SCOPE_UNIVERSE}
		if e.addr.Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrAdd(l, a); err != nil {
			return err
		}
	}
	if err := h.LinkSetUp(l); err != nil {
		return err
	}
	for _, e := range ends {
		if err := h.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, Family: family(e.addr),
			State: netlink.NUD_PERMANENT, IP: e.peer.AsSlice(), HardwareAddr: e.peerMAC}); err != nil {
			return err
		}
	}
	return nil
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// upstream brings up a link of its name, and leads everything to the other end.
func upstream(h *netlink.Handle, name string, ends []end) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	if err := up(h, l, ends); err != nil {
		return err
	}
	for _, e := range ends {
		if err := h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: e.peer.AsSlice()}); err != nil {
			return err
		}
	}
	return nil
}

// proofTime bounds the test of a new slot. The packets take microseconds.
const proofTime = 2 * time.Second

// prove sends a datagram from the host to the guest's side, where the socket
// guest is, and back. It closes the socket.
func (b builder) prove(guest *net.UDPConn) error {
	deadline := time.Now().Add(proofTime) // the kernel's clock, not the pool's
	if err := guest.SetDeadline(deadline); err != nil {
		return err
	}
	port := uint16(guest.LocalAddr().(*net.UDPAddr).Port)
	ask := []byte("cay slot " + strconv.Itoa(b.index))

	answered := make(chan error, 1)
	go func() {
		defer guest.Close()
		answered <- func() error {
			c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(b.at.slot, port)))
			if err != nil {
				return err
			}
			defer c.Close()
			got := make([]byte, 64)
			// A link just switched on loses packets until the kernel's worker
			// has seen its carrier, so ask again.
			for pause := time.Millisecond / 4; ; pause *= 2 {
				if _, err := c.Write(ask); err != nil {
					return err
				}
				if err := c.SetReadDeadline(time.Now().Add(pause)); err != nil {
					return err
				}
				n, err := c.Read(got)
				switch {
				case err == nil && bytes.Equal(got[:n], ask):
					return nil
				case err == nil:
					return errors.New("something else came back from the guest's side")
				case time.Now().After(deadline):
					return fmt.Errorf("nothing came back from the guest's side: %w", err)
				}
			}
		}()
	}()
	heard := false
	for buf := make([]byte, 64); ; heard = true {
		n, peer, err := guest.ReadFromUDPAddrPort(buf)
		if err != nil {
			break // the host's side is done and has closed the socket, or time is up
		}
		if _, err := guest.WriteToUDPAddrPort(buf[:n], peer); err != nil {
			break
		}
	}
	err := <-answered
	if err != nil && !heard {
		err = fmt.Errorf("nothing arrived at the guest's side (does a firewall of the host drop what goes to %s?): %w", b.at.slot, err)
	}
	return err
}

// whole reports what is missing of a slot that should be there.
func (p *Pool) whole(index int) error {
	for _, path := range []string{p.routerNS(index), p.innerNS(index)} {
		if inodeOf(path) == 0 {
			return fmt.Errorf("no namespace at %s", path)
		}
	}
	l, err := p.host.LinkByName(p.link(index))
	if err != nil {
		return fmt.Errorf("link %s: %w", p.link(index), err)
	}
	addrs, err := p.host.AddrList(l, netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if got, ok := netip.AddrFromSlice(a.IP.To4()); ok && got == p.addresses(index).host {
			return nil
		}
	}
	return fmt.Errorf("link %s lacks the address %s", p.link(index), p.addresses(index).host)
}

// remove takes a slot off the host. The link goes first, so that from then on
// nothing in the slot reaches anything; the namespaces' names go only when no
// process is in them. It may be called on any remnant, any number of times.
// What the host remembers of the slot is for forget.
func (p *Pool) remove(index int) error {
	name := p.link(index)
	if l, err := p.host.LinkByName(name); err == nil {
		if err := p.host.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("removing link %s: %w", name, err)
		}
	} else if !errors.As(err, new(netlink.LinkNotFoundError)) {
		return fmt.Errorf("looking for link %s: %w", name, err)
	}
	router, inner := p.routerNS(index), p.innerNS(index)
	pids, err := occupants(inodeOf(router), inodeOf(inner))
	if err != nil {
		return fmt.Errorf("looking for processes: %w", err)
	}
	if len(pids) > 0 {
		return errBusy(index, pids)
	}
	return errors.Join(unpin(inner), unpin(router))
}
