package network

import (
	"bufio"
	"errors"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// defaultMTU is Ethernet's.
const defaultMTU = 1500

// leastMTU6 is the least that IPv6 takes (RFC 8200, 5).
const leastMTU6 = 1280

// mtu is that of the narrowest link a default route leads through, at most
// Ethernet's: cloud and tunnel links carry less, and a guest that sends more
// depends on ICMP that many networks drop.
func mtu(h *netlink.Handle) int {
	out := defaultMTU
	routes, err := h.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return out
	}
	for _, r := range routes {
		ones := 0
		if r.Dst != nil {
			ones, _ = r.Dst.Mask.Size()
		}
		if ones != 0 {
			continue
		}
		if l, err := h.LinkByIndex(r.LinkIndex); err == nil && l.Attrs().MTU >= 576 {
			out = min(out, l.Attrs().MTU)
		}
	}
	return out
}

// HasIPv6 reports whether this machine reaches the internet by IPv6: a default
// route, and an address that the internet could answer to.
func HasIPv6() (bool, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return false, err
	}
	defer h.Close()
	return hasIPv6(h)
}

func hasIPv6(h *netlink.Handle) (bool, error) {
	routes, err := h.RouteList(nil, netlink.FAMILY_V6)
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	leads := slices.ContainsFunc(routes, func(r netlink.Route) bool {
		if r.Type != unix.RTN_UNICAST {
			return false
		}
		if r.Dst == nil {
			return true
		}
		ones, _ := r.Dst.Mask.Size()
		return ones == 0
	})
	if !leads {
		return false, nil
	}
	addrs, err := h.AddrList(nil, netlink.FAMILY_V6)
	return slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
		ip, ok := netip.AddrFromSlice(a.IP)
		return ok && ip.Is6() && !ip.Is4In6() && !IsRefused(ip)
	}), err
}

// makeNamespaceDir makes the directory of named namespaces the way ip-netns(8)
// does: a mount that passes changes on to other mount namespaces, so that a
// name removed here does not live on there and hold the namespace.
func makeNamespaceDir(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, "") == nil {
		return nil
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return &os.PathError{Op: "mount", Path: dir, Err: err}
	}
	return unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, "")
}

// tableNames returns the names of the host's nftables tables of our family.
func tableNames() (map[string]bool, error) {
	ts, err := (&nftables.Conn{}).ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, err
	}
	out := map[string]bool{}
	for _, t := range ts {
		out[t.Name] = true
	}
	return out, nil
}

// PublicResolvers answer when the host's own cannot: Google's and Cloudflare's.
var PublicResolvers = []netip.Addr{netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("1.1.1.1")}

// Resolvers returns the name servers a guest can use, given the host's
// resolv.conf: those of the host that are public IPv4 addresses, and
// [PublicResolvers] if there are none. A host's resolver on a private or
// loopback address (systemd-resolved, a cloud's 10.0.0.2) is out of a guest's
// reach like all such addresses.
func Resolvers(resolvConf io.Reader) []netip.Addr {
	var out []netip.Addr
	for s := bufio.NewScanner(resolvConf); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil && a.Is4() && !IsRefused(a) {
			out = append(out, a)
		}
	}
	if len(out) == 0 {
		return append(out, PublicResolvers...)
	}
	return out
}
