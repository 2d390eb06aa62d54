package api

import (
	"net/netip"
	"slices"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
)

// access is what a sandbox's traffic may do, as far as this build can make it.
type access struct {
	internet bool // the sandbox reaches the internet
	egress   cay.Egress
	public   bool // anyone may reach its ports
}

// everywhere is the range that stands for the whole internet.
const everywhere = "0.0.0.0/0"

// egress checks a network configuration and reduces it to what nodes can do:
// all of the internet or nothing of it. Finer rules are refused, never ignored.
func egress(n *gen.SandboxNetworkConfig, allow *bool) (access, error) {
	a := access{internet: true, public: true}
	if n == nil {
		n = &gen.SandboxNetworkConfig{}
	}
	if n.AllowPublicTraffic != nil {
		a.public = *n.AllowPublicTraffic
	}
	for _, refused := range []struct {
		given bool
		what  string
	}{
		{n.EgressProxy != nil, "a proxy for outbound traffic (network.egressProxy)"},
		{len(n.Rules) > 0, "header rules (network.rules)"},
	} {
		if refused.given {
			return a, absent(refused.what, "leave it out")
		}
	}
	var err error
	if a.internet, err = reach(n.AllowOut, n.DenyOut, allow); !a.internet {
		a.egress.Deny = []netip.Prefix{netip.MustParsePrefix(everywhere)}
	}
	return a, err
}

// reach says whether lists leave the internet open.
func reach(allowOut, denyOut []string, allow *bool) (bool, error) {
	deniesAll := allow != nil && !*allow || slices.Contains(denyOut, everywhere)
	for _, d := range denyOut {
		if !isRange(d) {
			return false, invalid("network.denyOut has %q: it takes addresses and ranges, not names",
				"deny "+everywhere+" and allow the names that may be reached", d)
		}
	}
	for _, a := range allowOut {
		if !isRange(a) && !slices.Contains(denyOut, everywhere) {
			return false, invalid("network.allowOut has the name %q, which has no effect while everything is allowed",
				"add "+everywhere+" to network.denyOut", a)
		}
	}
	switch {
	case slices.Contains(allowOut, everywhere):
		return true, nil // an allowed range wins over a denied one
	case len(allowOut) > 0 && deniesAll:
		return false, absent("allowing single destinations (network.allowOut)", "allow all of the internet, or nothing")
	case deniesAll:
		return false, nil
	case len(denyOut) > 0:
		return false, absent("denying single destinations (network.denyOut)", "deny "+everywhere+", or nothing")
	}
	return true, nil
}

// isRange reports whether text is an address or a range of addresses.
func isRange(text string) bool {
	if _, err := netip.ParseAddr(text); err == nil {
		return true
	}
	_, err := netip.ParsePrefix(text)
	return err == nil
}
