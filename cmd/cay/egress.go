package main

import (
	"bufio"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strings"

	"github.com/cayhq/cay/egress"
	"github.com/cayhq/cay/internal/settings"
	"github.com/cayhq/cay/network"
)

// newNames makes the server that decides by name about connections of guests.
// It knows no secrets until it is told where they are.
func newNames(d dataDir, cfg settings.Settings, nets *network.Pool, log *slog.Logger) *egress.Server {
	return &egress.Server{Refused: nets.Refused, Resolvers: hostResolvers("/etc/resolv.conf"), Dir: d.path("egress"),
		PermitProxy: cfg.ProxyRanges, Log: log.With("part", "egress")}
}

// hostResolvers returns the machine's own name servers, which may be private,
// or public ones if it names none.
func hostResolvers(path string) []netip.AddrPort {
	f, err := os.Open(path)
	if err == nil {
		defer f.Close()
		if out := nameServers(f); len(out) > 0 {
			return out
		}
	}
	var out []netip.AddrPort
	for _, a := range network.PublicResolvers {
		out = append(out, netip.AddrPortFrom(a, 53))
	}
	return out
}

// nameServers reads resolv.conf(5).
func nameServers(r io.Reader) []netip.AddrPort {
	var out []netip.AddrPort
	for s := bufio.NewScanner(r); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			out = append(out, netip.AddrPortFrom(a, 53))
		}
	}
	return out
}
