package api

import (
	"errors"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/idna"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
)

// access is what a sandbox's traffic may do.
type access struct {
	egress cay.Egress
	public bool // anyone may reach its ports
}

// everywhere is the range that stands for the whole internet.
const everywhere = "0.0.0.0/0"

// Limits of a network configuration (e2b.md 1.4); maxEntries is ours.
const (
	maxEntries     = 10_000 // of allowOut, and of denyOut
	maxRuleNames   = 10
	maxRuleName    = 128
	maxHeaders     = 20
	maxHeaderName  = 64
	maxHeaderValue = 2048
	maxRuleSecrets = 32
	maxCredential  = 255 // of a proxy (RFC 1929)
)

// egress checks a network configuration and makes of it what nodes enforce.
func egress(n *gen.SandboxNetworkConfig, allow *bool) (access, error) {
	a := access{public: true}
	if n == nil {
		n = &gen.SandboxNetworkConfig{}
	}
	if n.AllowPublicTraffic != nil {
		a.public = *n.AllowPublicTraffic
	}
	var err error
	if a.egress.Deny, err = denied(n.DenyOut, allow); err != nil {
		return a, err
	}
	if err := allowed(&a.egress, n.AllowOut); err != nil {
		return a, err
	}
	if a.egress.Rules, err = rules(n.Rules); err != nil {
		return a, err
	}
	a.egress.Proxy, err = socks(n.EgressProxy)
	return a, err
}

// denied checks a list of what may not be reached.
func denied(list []string, allow *bool) ([]netip.Prefix, error) {
	if len(list) > maxEntries {
		return nil, errEntries("denyOut", len(list))
	}
	var out []netip.Prefix
	if allow != nil && !*allow {
		out = append(out, netip.MustParsePrefix(everywhere))
	}
	for _, text := range list {
		p, ok := parseRange(text)
		if !ok {
			return nil, invalid("network.denyOut has %q: it takes IP addresses and ranges (CIDR), not names",
				"deny "+everywhere+" and allow the names that may be reached", text)
		}
		out = append(out, p)
	}
	return distinct(out), nil
}

// allowed checks a list of what may be reached although it is denied.
func allowed(e *cay.Egress, list []string) error {
	if len(list) > maxEntries {
		return errEntries("allowOut", len(list))
	}
	for _, text := range list {
		if p, ok := parseRange(text); ok {
			e.Allow = append(e.Allow, p)
			continue
		}
		name, err := parseName(text)
		if err != nil {
			return invalid("network.allowOut has %q, which is no IP address, range (CIDR) or domain name: %v",
				"send an address such as 8.8.8.8, a range such as 8.8.8.0/24, or a name such as example.com or *.example.com", text, err)
		}
		if !e.DeniesAll() {
			return invalid("network.allowOut has the name %q, which has no effect while everything is allowed",
				"add "+everywhere+" to network.denyOut", text)
		}
		e.AllowNames = append(e.AllowNames, name)
	}
	e.Allow = distinct(e.Allow)
	if len(e.Allow) > 0 && e.Allow[0].Bits() == 0 && e.Allow[0].Addr().Is4() {
		e.Deny, e.Allow, e.AllowNames = nil, nil, nil // what is allowed wins, and that is all
		return nil
	}
	slices.Sort(e.AllowNames)
	e.AllowNames = slices.Compact(e.AllowNames)
	return nil
}

func errEntries(list string, n int) error {
	return invalid("network.%s has %d entries, and may have %d", "join them to larger ranges", list, n, maxEntries)
}

// distinct sorts prefixes and leaves out those that another one holds.
func distinct(all []netip.Prefix) []netip.Prefix {
	slices.SortFunc(all, netip.Prefix.Compare) // a range comes before what it holds
	out := all[:0]
	for _, p := range all {
		if n := len(out); n == 0 || !(out[n-1].Bits() <= p.Bits() && out[n-1].Contains(p.Addr())) {
			out = append(out, p)
		}
	}
	return out
}

// parseRange reads an address or a range. Bits below the prefix don't count,
// and an IPv4 range in IPv6 clothing is one of IPv4.
func parseRange(text string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" {
			return p, false
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	return p.Masked(), true
}

// names turns what people write into what is looked up: lower case, and ASCII
// for every alphabet (UTS 46, non-transitional, as browsers have it).
var names = idna.New(idna.MapForLookup(), idna.BidiRule(), idna.Transitional(false), idna.StrictDomainName(false))

// parseName reads a domain name, or "*." and one for all below it.
func parseName(text string) (string, error) {
	wild := false
	rest := strings.TrimSuffix(text, ".")
	if after, ok := strings.CutPrefix(rest, "*."); ok {
		rest, wild = after, true
	}
	name, err := names.ToASCII(rest)
	if err != nil {
		return "", errors.New("it is no name in any alphabet")
	}
	name = strings.TrimSuffix(name, ".")
	if len(name) > 253 {
		return "", errors.New("it is longer than 253 characters")
	}
	labels := strings.Split(name, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' ||
			strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return "", errors.New("its parts are 1 to 63 letters, digits, - and _")
		}
	}
	// What ends in a number is an address to every client, or was meant as one.
	last := labels[len(labels)-1]
	if _, err := strconv.ParseUint(last, 0, 64); err == nil || strings.Trim(last, "0123456789") == "" {
		return "", errors.New("it ends in a number and is no address")
	}
	if wild {
		name = "*." + name
	}
	return name, nil
}

// A placeholder in a header's value stands for what the guest must not have.
var (
	placeholder = regexp.MustCompile(`\$\{e2b\.[^}]*\}?`)
	secretHole  = regexp.MustCompile(`^\$\{e2b\.secrets\.([A-Za-z0-9_.-]{1,255})\}$`)
	tokenHole   = regexp.MustCompile(`^\$\{e2b\.identity\.tokens\.[^}]+\}$`)
)

// ownHeaders say how a request is sent, which a rule must not change.
var ownHeaders = []string{"Connection", "Content-Length", "Host", "Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade"}

// rules checks the changes to requests by name.
func rules(all map[string][]gen.SandboxNetworkRule) ([]cay.EgressRule, error) {
	if len(all) > maxRuleNames {
		return nil, invalid("network.rules has %d domains, and may have %d", "send fewer", len(all), maxRuleNames)
	}
	var out []cay.EgressRule
	seen := map[string]bool{}
	for _, key := range slices.Sorted(maps.Keys(all)) {
		name, err := parseName(key)
		if err == nil && len(key) > maxRuleName {
			err = errors.New("it is longer than " + strconv.Itoa(maxRuleName) + " characters")
		}
		if err != nil {
			return nil, invalid("network.rules has %q, which is no domain name: %v", "send a name such as api.example.com or *.example.com", key, err)
		}
		if seen[name] {
			return nil, invalid("network.rules has %q twice", "send one entry for a name", name)
		}
		seen[name] = true
		if len(all[key]) > 1 {
			return nil, invalid("network.rules.%s has %d rules, and may have one", "put all headers into one transform", key, len(all[key]))
		}
		r := cay.EgressRule{Name: name}
		for _, one := range all[key] {
			if one.Transform != nil {
				r.Headers, err = headers(key, one.Transform.Headers)
			}
		}
		if err != nil {
			return nil, err
		}
		if len(r.Headers) > 0 {
			out = append(out, r)
		}
	}
	return out, nil
}

// headers checks those that a rule sets.
func headers(rule string, all map[string]string) (map[string]string, error) {
	where := "network.rules." + rule + ".transform.headers"
	if len(all) > maxHeaders {
		return nil, invalid("%s has %d headers, and may have %d", "send fewer", where, len(all), maxHeaders)
	}
	out, secrets := map[string]string{}, map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		value := all[name]
		switch {
		case !httpguts.ValidHeaderFieldName(name) || len(name) > maxHeaderName:
			return nil, invalid("%s has the name %q, which is no header of 1 to %d characters", "send a name such as Authorization", where, name, maxHeaderName)
		case slices.ContainsFunc(ownHeaders, func(h string) bool { return strings.EqualFold(h, name) }):
			return nil, invalid("%s has %q, which says how a request is sent", "leave it out", where, name)
		case len(value) > maxHeaderValue || !httpguts.ValidHeaderFieldValue(value):
			return nil, invalid("%s has a value for %q that is longer than %d bytes or holds a control character", "shorten it, or take the character out", where, name, maxHeaderValue)
		}
		for _, hole := range placeholder.FindAllString(value, -1) {
			m := secretHole.FindStringSubmatch(hole)
			switch {
			case m != nil:
				secrets[m[1]] = true
			case tokenHole.MatchString(hole):
				return nil, absent("identity tokens in headers", "use a secret: ${e2b.secrets.NAME}")
			default:
				return nil, invalid("%s has a value for %q with the placeholder %q, which stands for nothing", "send ${e2b.secrets.NAME}", where, name, hole)
			}
		}
		for had := range out {
			if strings.EqualFold(had, name) {
				return nil, invalid("%s has %q twice", "send one value for a header", where, name)
			}
		}
		out[name] = value
	}
	if len(secrets) > maxRuleSecrets {
		return nil, invalid("%s has %d secrets, and may have %d", "use fewer", where, len(secrets), maxRuleSecrets)
	}
	return out, nil
}

// socks checks the proxy for what leaves a sandbox.
func socks(c *gen.SandboxEgressProxyConfig) (*cay.EgressProxy, error) {
	if c == nil {
		return nil, nil
	}
	p := &cay.EgressProxy{}
	if c.Username != nil {
		p.Username = *c.Username
	}
	if c.Password != nil {
		p.Password = cay.Secret(*c.Password)
	}
	switch {
	case len(p.Username) > maxCredential || len(p.Password) > maxCredential:
		return nil, invalid("network.egressProxy has a username or a password longer than %d bytes", "send shorter ones", maxCredential)
	case p.Username == "" && p.Password != "":
		return nil, invalid("network.egressProxy has a password and no username", "send both, or none")
	}
	host, port, ok := splitAddress(c.Address)
	if !ok {
		return nil, invalid("network.egressProxy.address is %q, which is no host:port", "send an address such as proxy.example.com:1080", c.Address)
	}
	p.Address = host + ":" + port
	return p, nil
}

// splitAddress reads host:port, the host in brackets if it is an IPv6 address.
func splitAddress(text string) (host, port string, ok bool) {
	i := strings.LastIndexByte(text, ':')
	if i < 0 {
		return "", "", false
	}
	host, port = text[:i], text[i+1:]
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || port[0] == '0' {
		return "", "", false
	}
	if inner, ok := strings.CutPrefix(host, "["); ok {
		a, err := netip.ParseAddr(strings.TrimSuffix(inner, "]"))
		return "[" + a.String() + "]", port, err == nil && a.Is6() && a.Zone() == "" && strings.HasSuffix(inner, "]")
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return a.String(), port, a.Is4()
	}
	name, err := parseName(host)
	return name, port, err == nil && !strings.HasPrefix(name, "*")
}

// shown is a network configuration as clients are told it: without the proxy's
// password, the names of rules in lower case.
func shown(n *gen.SandboxNetworkConfig) *gen.SandboxNetworkConfig {
	if n == nil {
		return nil
	}
	out := *n
	if out.EgressProxy != nil {
		p := *out.EgressProxy
		p.Password = nil
		out.EgressProxy = &p
	}
	if out.Rules != nil {
		out.Rules = map[string][]gen.SandboxNetworkRule{}
		for name, r := range n.Rules {
			out.Rules[strings.ToLower(name)] = r
		}
	}
	return &out
}
