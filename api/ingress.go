package api

import (
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
)

// maxHost is the length of a domain name with a port.
const maxHost = 253 + len(":65535")

// envdPort is the one port that network.httpsPorts may not have: the daemon's.
const envdPort = 49983

// ingress checks how a sandbox's ports are reached.
func ingress(n *gen.SandboxNetworkConfig) (cay.Ingress, error) {
	var in cay.Ingress
	if n == nil {
		return in, nil
	}
	if n.MaskRequestHost != nil {
		in.MaskHost = *n.MaskRequestHost
	}
	if in.MaskHost != "" && !isMask(in.MaskHost) {
		return in, invalid("network.maskRequestHost is %q, which is no host[:port] in ASCII",
			"send a host such as localhost:${PORT}; a name in other letters in its ASCII form (xn--…)", in.MaskHost)
	}
	for _, p := range n.HttpsPorts {
		if p < 1 || p > 65535 {
			return in, invalid("network.httpsPorts has %d, which is no port", "send numbers from 1 to 65535", p)
		}
		if p == envdPort {
			return in, invalid("network.httpsPorts has %d, the port of the sandbox's daemon, which speaks plain HTTP", "leave that port out", p)
		}
		in.HTTPSPorts = append(in.HTTPSPorts, uint16(p))
	}
	slices.Sort(in.HTTPSPorts)
	in.HTTPSPorts = slices.Compact(in.HTTPSPorts)
	return in, nil
}

// isMask reports whether a text is host[:port] once ${PORT} is a port.
func isMask(mask string) bool {
	host, port := strings.ReplaceAll(mask, "${PORT}", "65535"), ""
	if len(host) > maxHost {
		return false
	}
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		var err error
		if host, port, err = net.SplitHostPort(host); err != nil {
			return false
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || port[0] == '0' {
			return false
		}
	} else if strings.HasPrefix(host, "[") {
		host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	}
	if strings.Contains(host, ":") || strings.HasPrefix(mask, "[") {
		ip, err := netip.ParseAddr(host)
		return err == nil && ip.Is6() && ip.Zone() == "" && strings.HasPrefix(mask, "[")
	}
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
	for label := range strings.SplitSeq(strings.TrimSuffix(host, "."), ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, letters) != "" {
			return false
		}
	}
	return true
}
