package program

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The addresses of the tests' machine, and one of the internet behind it.
var (
	Uplink  = netip.MustParseAddr("93.184.215.2")
	Private = netip.MustParseAddr("192.168.77.1")
	Uplink6 = netip.MustParseAddr("2606:2800:21f:cb07::2")
	Public  = netip.MustParseAddr("93.184.216.34")

	gateway  = netip.MustParseAddr("93.184.215.1")
	gateway6 = netip.MustParseAddr("2606:2800:21f:cb07::1")
)

// world is the network namespace that is the internet.
var world *os.File

const threadNS = "/proc/thread-self/ns/net"

// makeWorld gives the machine a loopback and an uplink. Behind that, every
// address is there: a destination that a sandbox does not reach is one that it
// may not reach.
func makeWorld() error {
	for _, which := range []string{"all", "default"} {
		// A kernel without IPv6 says so when the uplink gets its address.
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("0"), 0)
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := InWorld(func() error { return fillWorld(h) }); err != nil {
		return err
	}
	if err := bring(h, "lo"); err != nil {
		return err
	}
	if err := address(h, "wan", netip.PrefixFrom(Uplink, 32), netip.PrefixFrom(Private, 24), netip.PrefixFrom(Uplink6, 64)); err != nil {
		return err
	}
	for _, gw := range []netip.Addr{gateway, gateway6} {
		if err := route(h, "wan", &netlink.Route{Dst: alone(gw), Scope: netlink.SCOPE_LINK}); err != nil {
			return err
		}
		if err := route(h, "wan", &netlink.Route{Gw: gw.AsSlice()}); err != nil {
			return err
		}
	}
	return nil
}

func fillWorld(machine *netlink.Handle) error {
	// IPv6 looks for an address on a link, where IPv4 is content with a route.
	if err := os.WriteFile("/proc/sys/net/ipv6/ip_nonlocal_bind", []byte("1"), 0); err != nil {
		return err
	}
	w, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer w.Close()
	v := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: "wan0", PeerNamespace: netlink.NsFd(int(world.Fd()))}
	v.Name = "wan"
	if err := machine.LinkAdd(v); err != nil {
		return fmt.Errorf("making the uplink: %w", err)
	}
	if err := bring(w, "lo"); err != nil {
		return err
	}
	if err := address(w, "wan0", netip.PrefixFrom(gateway, 32), netip.PrefixFrom(gateway6, 64)); err != nil {
		return err
	}
	// The machine's addresses are behind the link; every other is the world's
	// own. The kernel asks the local table first, so both are in there.
	for _, a := range []netip.Addr{Uplink, Uplink6} {
		if err := route(w, "wan0", &netlink.Route{Dst: alone(a), Scope: netlink.SCOPE_LINK, Table: unix.RT_TABLE_LOCAL}); err != nil {
			return err
		}
	}
	for _, all := range []string{"0.0.0.0/0", "::/0"} {
		_, dst, err := net.ParseCIDR(all)
		if err != nil {
			return err
		}
		if err := route(w, "lo", &netlink.Route{Dst: dst, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}); err != nil {
			return err
		}
	}
	return nil
}

// address gives a link its addresses and switches it on.
func address(h *netlink.Handle, link string, ps ...netip.Prefix) error {
	l, err := h.LinkByName(link)
	if err != nil {
		return err
	}
	for _, p := range ps {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD // usable at once
		}
		if err := h.AddrAdd(l, a); err != nil {
			return fmt.Errorf("giving %s the address %s: %w", link, p, err)
		}
	}
	return h.LinkSetUp(l)
}

func route(h *netlink.Handle, link string, r *netlink.Route) error {
	l, err := h.LinkByName(link)
	if err != nil {
		return err
	}
	r.LinkIndex = l.Attrs().Index
	if err := h.RouteAdd(r); err != nil {
		return fmt.Errorf("adding the route %s: %w", r, err)
	}
	return nil
}

// alone is the prefix that holds one address.
func alone(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func bring(h *netlink.Handle, name string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	return h.LinkSetUp(l)
}

// InWorld calls f on a thread in the internet: a socket that f opens is there,
// and stays there.
func InWorld(f func() error) error {
	if world != nil {
		return InNamespace(world)(f)
	}
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		ns, err := os.Open(threadNS)
		if err != nil {
			return err
		}
		world = ns
		return f()
	})
}

// InNamespace returns what InWorld is, for a network namespace of the caller's.
func InNamespace(ns *os.File) func(func() error) error {
	return func(f func() error) error {
		return onThread(func() error {
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return os.NewSyscallError("setns", err)
			}
			return f()
		})
	}
}

// onThread calls f on a thread of its own, which ends with f.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- f()
	}()
	return <-done
}
