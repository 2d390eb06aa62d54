package egress

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/cayhq/cay"
)

// The ports on which a client says which name it means.
const (
	portHTTP = 80
	portTLS  = 443
)

// policy is a [cay.Egress], compiled.
type policy struct {
	allow, deny prefixes
	names       names[struct{}]
	rules       names[*transform]
	proxy       *cay.EgressProxy
}

// compile prepares a policy. What package api has let through compiles; an
// entry that does not is an error, because to leave it out would be another
// policy.
func compile(e cay.Egress) (*policy, error) {
	p := &policy{allow: newPrefixes(e.Allow), deny: newPrefixes(e.Deny), proxy: e.Proxy}
	for _, n := range e.AllowNames {
		if err := p.names.add(n, struct{}{}); err != nil {
			return nil, err
		}
	}
	for _, r := range e.Rules {
		t, err := newTransform(r)
		if err != nil {
			return nil, err
		}
		if err := p.rules.add(r.Name, t); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// byAddress judges a destination by its address alone, and tells the entry
// that decided; none is "".
func (p *policy) byAddress(a netip.Addr) (open bool, entry string) {
	if e, ok := p.allow.find(a); ok {
		return true, e.String()
	}
	if e, ok := p.deny.find(a); ok {
		return false, e.String()
	}
	return true, ""
}

// resolves reports whether the guest may learn the addresses of a name.
func (p *policy) resolves(name string) bool {
	if !p.deny.all {
		return true
	}
	_, ok := p.names.find(name)
	return ok
}

// asks reports whether a connection to a port must say its name before it can
// be judged, or be sent on as it should.
func (p *policy) asks(port uint16, open bool) bool {
	if port != portHTTP && port != portTLS {
		return false
	}
	if open {
		return !p.rules.empty() || p.proxy != nil
	}
	return !p.names.empty()
}

// prefixes finds the longest of many prefixes that holds an address. 0.0.0.0/0
// holds every address, of both families.
type prefixes struct {
	all  bool
	bits []int // that occur, longest first
	set  map[netip.Prefix]struct{}
}

func newPrefixes(ps []netip.Prefix) prefixes {
	out := prefixes{set: map[netip.Prefix]struct{}{}}
	for _, p := range ps {
		if p.Bits() == 0 && p.Addr().Is4() {
			out.all = true
			continue
		}
		out.set[p.Masked()] = struct{}{}
		if !slices.Contains(out.bits, p.Bits()) {
			out.bits = append(out.bits, p.Bits())
		}
	}
	slices.Sort(out.bits)
	slices.Reverse(out.bits)
	return out
}

func (ps prefixes) find(a netip.Addr) (netip.Prefix, bool) {
	for _, b := range ps.bits {
		p, err := a.Prefix(b)
		if err != nil {
			continue // longer than an IPv4 address
		}
		if _, ok := ps.set[p]; ok {
			return p, true
		}
	}
	if ps.all {
		p, _ := a.Prefix(0) // no bits fit any address
		return p, true
	}
	return netip.Prefix{}, false
}

// names finds the most particular of many names that fits one: the name
// itself, then the longest suffix. A wildcard fits at any depth, not its apex.
type names[T any] struct {
	exact, below map[string]T
}

func (ns *names[T]) add(pattern string, v T) error {
	suffix, wild := strings.CutPrefix(pattern, "*.")
	name, ok := canonical(suffix)
	if !ok || name != suffix {
		return &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerNetwork,
			Message: fmt.Sprintf("%q is not a name in an egress policy", pattern),
			Fix:     `write a DNS name in lower-case ASCII, or "*." and one`}
	}
	m := &ns.exact
	if wild {
		m = &ns.below
	}
	if *m == nil {
		*m = map[string]T{}
	}
	(*m)[name] = v
	return nil
}

func (ns *names[T]) empty() bool { return len(ns.exact) == 0 && len(ns.below) == 0 }

// find takes a canonical name.
func (ns *names[T]) find(name string) (v T, ok bool) {
	if v, ok = ns.exact[name]; ok {
		return v, true
	}
	for {
		var more bool
		if _, name, more = strings.Cut(name, "."); !more {
			return v, false
		}
		if v, ok = ns.below[name]; ok {
			return v, true
		}
	}
}

const maxName = 253

// canonical returns a name as policies have it: lower case, without the final
// dot. It is false for what is no name: an address, an empty label, a byte
// other than letters, digits, hyphens and underscores. An international name
// is one in its ASCII form only, which is what clients send.
func canonical(s string) (string, bool) {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > maxName {
		return "", false
	}
	label, upper := 0, false
	for i := range len(s) {
		switch c := s[i]; {
		case c == '.':
			if label == 0 {
				return "", false
			}
			label = 0
			continue
		case c >= 'A' && c <= 'Z':
			upper = true
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '_':
		case c == '-':
		default:
			return "", false
		}
		if label++; label > 63 {
			return "", false
		}
	}
	if label == 0 {
		return "", false
	}
	if upper {
		s = strings.ToLower(s)
	}
	if _, err := netip.ParseAddr(s); err == nil {
		return "", false
	}
	return s, true
}
