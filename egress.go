package cay

import (
	"net/netip"
	"time"
)

// Egress says what a guest may open connections to. It has one meaning in every
// runtime; contract/e2b.md ("Network config") is its source. The zero value is
// the open internet.
//
// Whatever it says, a guest never reaches the machine itself, another guest, a
// special-purpose address or what the operator refuses.
type Egress struct {
	// Deny are destinations that are refused; 0.0.0.0/0 is all of them, in
	// both families. IPv4 and IPv6 prefixes, masked.
	Deny []netip.Prefix `json:"deny,omitempty"`
	// Allow are destinations that are open although Deny has them.
	Allow []netip.Prefix `json:"allow,omitempty"`
	// AllowNames are names whose addresses are open although Deny has them, on
	// the ports of HTTP and TLS only, where the client says which name it
	// means: lower-case ASCII without a final dot, "*.example.com" for every
	// name below example.com.
	AllowNames []string `json:"allowNames,omitempty"`
	// Rules change requests to names on their way. The most particular one
	// that fits a name counts: the name itself, then the longest suffix.
	Rules []EgressRule `json:"rules,omitempty"`
	// Proxy is a SOCKS5 server through which everything goes that is allowed.
	Proxy *EgressProxy `json:"proxy,omitempty"`
}

// EgressRule changes requests to one name, outside the guest.
type EgressRule struct {
	Name string `json:"name"` // as in AllowNames
	// Headers are set in every request. A value may hold ${e2b.secrets.NAME};
	// the node asks for the secret at each request, and the guest never sees
	// the result.
	Headers map[string]string `json:"headers,omitempty"`
}

// EgressProxy is a SOCKS5 server (RFC 1928), which resolves names itself.
type EgressProxy struct {
	Address  string `json:"address"` // host:port
	Username string `json:"username,omitempty"`
	Password Secret `json:"password,omitempty"`
}

// EgressRefusal is a destination that was refused to a guest, once or more
// often.
type EgressRefusal struct {
	// Seq numbers the refusals of a sandbox; it is that of the last one that
	// this tells of, so whoever has seen a number asks for what came after.
	Seq   uint64    `json:"seq"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
	Count int       `json:"count"` // at least; what comes too fast is not counted
	// Protocol is "tcp", "udp", "icmp", "dns" and the like.
	Protocol string `json:"protocol"`
	// Destination is invalid for a query; its port is 0 where there are none.
	Destination netip.AddrPort `json:"destination,omitzero"`
	Name        string         `json:"name,omitempty"` // that the guest said
	// Rule is the entry of the policy that refused, or "always refused",
	// "names" or "limit". Reason is for people.
	Rule   string `json:"rule"`
	Reason string `json:"reason"`
}

// Open reports whether nothing is refused and nothing changed, so that no more
// than the walls of the network is needed.
func (e Egress) Open() bool {
	return len(e.Deny) == 0 && len(e.Rules) == 0 && e.Proxy == nil
}

// DeniesAll reports whether what is not allowed is refused.
func (e Egress) DeniesAll() bool {
	for _, p := range e.Deny {
		if p.Bits() == 0 && p.Addr().Is4() {
			return true
		}
	}
	return false
}

// Named reports whether names decide about connections, so that they must be
// read on their way.
func (e Egress) Named() bool {
	return len(e.AllowNames) > 0 || len(e.Rules) > 0 || e.Proxy != nil
}
