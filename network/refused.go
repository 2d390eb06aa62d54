package network

import (
	"net/netip"
	"slices"
)

// special is a block that is no public destination.
type special struct {
	Prefix string
	Name   string
}

// specialPurpose holds the IANA special-purpose address registries in full,
// entries marked "globally reachable" included: a sandbox has no business with
// an anycast relay either. Sources, as of 2026-11:
//
//	https://www.iana.org/assignments/iana-ipv4-special-registry
//	https://www.iana.org/assignments/iana-ipv6-special-registry
//	https://www.iana.org/assignments/ipv4-address-space (multicast, reserved)
//	https://www.iana.org/assignments/ipv6-address-space
//
// and, after them, addresses that cloud providers answer metadata on and that
// are not in the registries.
var specialPurpose = []special{
	{"0.0.0.0/8", "this network (RFC 791)"},
	{"10.0.0.0/8", "private use (RFC 1918)"},
	{"100.64.0.0/10", "shared address space (RFC 6598); holds Alibaba's metadata 100.100.100.200"},
	{"127.0.0.0/8", "loopback (RFC 1122)"},
	{"169.254.0.0/16", "link local (RFC 3927); holds the metadata service 169.254.169.254"},
	{"172.16.0.0/12", "private use (RFC 1918)"},
	{"192.0.0.0/24", "IETF protocol assignments (RFC 6890)"},
	{"192.0.2.0/24", "TEST-NET-1 (RFC 5737)"},
	{"192.31.196.0/24", "AS112-v4 (RFC 7535)"},
	{"192.52.193.0/24", "AMT (RFC 7450)"},
	{"192.88.99.0/24", "6to4 relay anycast, deprecated (RFC 7526)"},
	{"192.168.0.0/16", "private use (RFC 1918)"},
	{"192.175.48.0/24", "direct delegation AS112 service (RFC 7534)"},
	{"198.18.0.0/15", "benchmarking (RFC 2544)"},
	{"198.51.100.0/24", "TEST-NET-2 (RFC 5737)"},
	{"203.0.113.0/24", "TEST-NET-3 (RFC 5737)"},
	{"224.0.0.0/4", "multicast (RFC 5771)"},
	{"240.0.0.0/4", "reserved, with limited broadcast (RFC 1112, RFC 919)"},

	{"::/8", "unspecified, loopback, IPv4-compatible and IPv4-mapped (RFC 4291)"},
	{"64:ff9b::/96", "IPv4/IPv6 translation (RFC 6052)"},
	{"64:ff9b:1::/48", "IPv4/IPv6 translation, local use (RFC 8215)"},
	{"100::/64", "discard only (RFC 6666)"},
	{"100:0:0:1::/64", "dummy IPv6 prefix (RFC 9780)"},
	{"2001::/23", "IETF protocol assignments, Teredo, ORCHID (RFC 2928)"},
	{"2001:db8::/32", "documentation (RFC 3849)"},
	{"2002::/16", "6to4 (RFC 3056)"},
	{"2620:4f:8000::/48", "direct delegation AS112 service (RFC 7534)"},
	{"3fff::/20", "documentation (RFC 9637)"},
	{"5f00::/16", "segment routing SIDs (RFC 9602)"},
	{"fc00::/7", "unique local (RFC 4193); holds the metadata service fd00:ec2::254"},
	{"fe80::/10", "link local (RFC 4291)"},
	{"fec0::/10", "site local, deprecated (RFC 3879)"},
	{"ff00::/8", "multicast (RFC 4291)"},

	{"168.63.129.16/32", "Azure's platform service"},
}

// Refused are the destinations that no sandbox reaches, whatever its policy,
// for both address families. The node's own addresses and those of sandboxes
// come on top.
func Refused() []netip.Prefix {
	out := make([]netip.Prefix, len(specialPurpose))
	for i, s := range specialPurpose {
		out[i] = netip.MustParsePrefix(s.Prefix)
	}
	return out
}

// IsRefused reports whether a is in [Refused]. An IPv4 address in IPv6
// clothing (::ffff:10.0.0.1) counts as what it is; an invalid one is refused.
func IsRefused(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	return !a.IsValid() || slices.ContainsFunc(Refused(), func(p netip.Prefix) bool { return p.Contains(a) })
}

// span is a range of addresses, both ends included.
type span struct{ first, last netip.Addr }

// spans turns prefixes into sorted ranges, IPv4 first, that neither overlap nor
// touch, which is what an nftables interval set takes.
func spans(ps []netip.Prefix) []span {
	var in []span
	for _, p := range ps {
		in = append(in, span{p.Masked().Addr(), lastOf(p)})
	}
	slices.SortFunc(in, func(a, b span) int { return a.first.Compare(b.first) })
	var out []span
	for _, s := range in {
		if n := len(out); n > 0 && (s.first.Compare(out[n-1].last) <= 0 || out[n-1].last.Next() == s.first) {
			if s.last.Compare(out[n-1].last) > 0 {
				out[n-1].last = s.last
			}
			continue
		}
		out = append(out, s)
	}
	return out
}

// lastOf returns the highest address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < 8*len(a); i++ {
		a[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(a) // of that length
	return last
}
