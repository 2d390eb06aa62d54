package network

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
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
)

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
}

// addresses are the two ends of a slot's link to the host.
type addresses struct{ host, slot netip.Addr }

func (p *Pool) addresses(index int) addresses {
	base := p.block.Addr().As4()
	n := uint32(base[0])<<24 | uint32(base[1])<<16 | uint32(base[2])<<8 | uint32(base[3])
	at := func(n uint32) netip.Addr {
		return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
	}
	n += 2 * uint32(index)
	return addresses{host: at(n), slot: at(n + 1)}
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
	return Slot{Index: index, Addr: p.addresses(index).slot, NetNS: p.innerNS(index)}
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
	router, inner, err := newRooms(p.routerNS(index), p.innerNS(index))
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
	if err := p.routerFirewall(newTable(rules, routerTable), b.at, pol); err != nil {
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
func newRooms(routerPath, innerPath string) (router, inner *room, err error) {
	router, inner = &room{}, &room{}
	errs := make(chan error, 2)
	go func() { errs <- onThread(func() error { return router.furnish(routerPath, routerSettings) }) }()
	go func() {
		errs <- onThread(func() error {
			if err := inner.furnish(innerPath, innerSettings); err != nil {
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
	{"ipv6/conf/all/disable_ipv6", "1"}, // of links to come, too
	{"ipv4/ip_forward", "1"},
	{"ipv4/conf/all/rp_filter", "1"},
	{"ipv4/conf/all/send_redirects", "0"},
	{"ipv4/conf/default/send_redirects", "0"},
}

// innerSettings are of the guest's. Not "all": the guest's loopback keeps ::1.
var innerSettings = [][2]string{{"ipv6/conf/default/disable_ipv6", "1"}}

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
	if err := sysctl("ipv6/conf/"+name+"/disable_ipv6", "1"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := p.host.LinkByName(name)
	if err != nil {
		return err
	}
	if err := up(p.host, l, end{b.at.host, 31, b.at.slot, upMAC}); err != nil {
		return err
	}
	if err := bring(b.router, loopback); err != nil {
		return err
	}
	return upstream(b.router, upLink, end{b.at.slot, 31, b.at.host, hostMAC})
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
	if err := up(b.router, l, end{gatewayAddr, 30, guestAddr, guestMAC}); err != nil {
		return err
	}
	if err := bring(b.inner, loopback); err != nil {
		return err
	}
	return upstream(b.inner, eth0, end{guestAddr, 30, gatewayAddr, gatewayMAC})
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

// up gives a link its address, switches it on, and tells it for good where the
// other end is, so that no ARP is needed or believed.
func up(h *netlink.Handle, l netlink.Link, e end) error {
	mask := net.CIDRMask(e.bits, 32)
	if err := h.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: e.addr.AsSlice(), Mask: mask}, Scope: unix.RT_SCOPE_UNIVERSE}); err != nil {
		return err
	}
	if err := h.LinkSetUp(l); err != nil {
		return err
	}
	return h.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, Family: unix.AF_INET,
		State: netlink.NUD_PERMANENT, IP: e.peer.AsSlice(), HardwareAddr: e.peerMAC})
}

// upstream brings up a link of its name, and leads everything to the other end.
func upstream(h *netlink.Handle, name string, e end) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	if err := up(h, l, e); err != nil {
		return err
	}
	return h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: e.peer.AsSlice()})
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
