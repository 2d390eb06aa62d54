package proxy

import (
	"net/http"
	"net/netip"
	"strconv"
	"strings"

	"github.com/cayhq/cay"
)

// The headers of the E2B contract (section 4) that name a target or open it.
const (
	headerSandbox = "E2b-Sandbox-Id"
	headerPort    = "E2b-Sandbox-Port"
	headerTraffic = "E2b-Traffic-Access-Token"
)

// target is what a request asks for: one port of one sandbox.
type target struct {
	sandbox cay.SandboxID
	port    uint16
}

// malformed is a request that names no target; its text is for the client.
type malformed string

func (m malformed) Error() string { return string(m) }

// parseTarget is the one place where a request becomes a target.
//
// A Host that names no sandbox (localhost, an IP address, sandbox.<domain>)
// is routed by the two headers; every other Host names the target in its
// left-most label, <port>-<id>[-<anything>]. A header that contradicts the
// Host is refused: the two would be read differently by others on the way.
func parseTarget(host string, h http.Header, domain string) (target, error) {
	name, err := hostname(host)
	if err != nil {
		return target{}, err
	}
	id, port, routed, err := routingHeaders(h)
	if err != nil {
		return target{}, err
	}
	if routed && sharedHost(name, domain) {
		return headerTarget(id, port)
	}
	t, err := hostTarget(name)
	if err != nil {
		return target{}, err
	}
	if id != "" {
		other, err := cay.ParseSandboxID(id)
		if err != nil || other != t.sandbox {
			return target{}, malformed("the header " + headerSandbox + " and the Host name different sandboxes")
		}
	}
	if port != "" && port != strconv.Itoa(int(t.port)) {
		return target{}, malformed("the header " + headerPort + " and the Host name different ports")
	}
	return t, nil
}

// SandboxOf returns the sandbox that a host name names.
func SandboxOf(host string) (cay.SandboxID, bool) {
	name, err := hostname(host)
	if err != nil {
		return "", false
	}
	t, err := hostTarget(name)
	return t.sandbox, err == nil
}

// hostname returns a Host without its port, its brackets and one final dot.
func hostname(host string) (string, error) {
	name, port := host, ""
	if strings.HasPrefix(host, "[") {
		end := strings.IndexByte(host, ']')
		if end < 0 {
			return "", malformed("the Host has an opening bracket and no closing one")
		}
		name, port = host[1:end], host[end+1:]
		if _, err := netip.ParseAddr(name); err != nil {
			return "", malformed("the Host has brackets around something that is no IP address")
		}
	} else if i := strings.IndexByte(host, ':'); i >= 0 {
		name, port = host[:i], host[i:]
	}
	if port != "" && (port[0] != ':' || !digits(port[1:])) {
		return "", malformed("the port of the Host is no number")
	}
	name = strings.TrimSuffix(name, ".")
	if name == "" {
		return "", malformed("the request has no Host")
	}
	if len(name) > maxName || strings.IndexFunc(name, notInName) >= 0 {
		return "", malformed("the Host is no name in ASCII of at most 253 letters")
	}
	return name, nil
}

// maxName is the length of a domain name.
const maxName = 253

// notInName reports what neither a name nor an address has. A name in other
// letters comes in its ASCII form (xn--…).
func notInName(c rune) bool {
	return (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-' && c != '.' && c != '_' && c != ':'
}

// digits reports whether s consists of digits; an empty s does.
func digits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return true
}

// sharedHost reports whether a Host names no sandbox itself.
func sharedHost(name, domain string) bool {
	if strings.EqualFold(name, "localhost") {
		return true
	}
	if domain != "" && strings.EqualFold(name, "sandbox."+domain) {
		return true
	}
	_, err := netip.ParseAddr(name)
	return err == nil
}

// routingHeaders returns the two headers; routed says that one is there.
func routingHeaders(h http.Header) (id, port string, routed bool, err error) {
	ids, ports := h[headerSandbox], h[headerPort]
	if len(ids) > 1 || len(ports) > 1 {
		return "", "", false, malformed("a routing header is there twice")
	}
	if len(ids) == 1 {
		id = ids[0]
	}
	if len(ports) == 1 {
		port = ports[0]
	}
	return id, port, id != "" || port != "", nil
}

func headerTarget(id, port string) (target, error) {
	if id == "" {
		return target{}, malformed("the header " + headerSandbox + " is missing; " + headerPort + " is there, and both are needed")
	}
	if port == "" {
		return target{}, malformed("the header " + headerPort + " is missing; " + headerSandbox + " is there, and both are needed")
	}
	sbx, err := cay.ParseSandboxID(id)
	if err != nil {
		return target{}, malformed("the sandbox ID is malformed: want lower-case letters and digits")
	}
	p, err := parsePort(port)
	if err != nil {
		return target{}, err
	}
	return target{sandbox: sbx, port: p}, nil
}

func hostTarget(name string) (target, error) {
	label, _, dotted := strings.Cut(name, ".")
	port, rest, dashed := strings.Cut(label, "-")
	if !dotted || !dashed {
		return target{}, malformed("the Host names no sandbox: want <port>-<sandbox ID>.<domain>, or the headers " +
			headerSandbox + " and " + headerPort + " on a Host that is localhost or an IP address")
	}
	id, _, _ := strings.Cut(rest, "-")
	p, err := parsePort(port)
	if err != nil {
		return target{}, err
	}
	sbx, err := cay.ParseSandboxID(id)
	if err != nil {
		return target{}, malformed("the sandbox ID in the Host is malformed: want lower-case letters and digits")
	}
	return target{sandbox: sbx, port: p}, nil
}

// parsePort takes 1 to 65535 in plain decimal: no sign, space or leading zero,
// so that one port has one spelling.
func parsePort(s string) (uint16, error) {
	if s == "" || len(s) > 5 || s[0] == '0' || !digits(s) {
		return 0, malformed("the port is malformed: want a number from 1 to 65535")
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, malformed("the port is malformed: want a number from 1 to 65535")
	}
	return uint16(n), nil
}
