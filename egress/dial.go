package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"

	"golang.org/x/net/proxy"

	"github.com/cayhq/cay"
)

// errRefused is in the chain of a dial to an address that is always refused.
var errRefused = errors.New("the address is always refused")

// dial opens a connection to a destination that judge opened, through the
// sandbox's proxy if it has one. Name is the destination's; without one the
// proxy gets the address.
func (g *guest) dial(ctx context.Context, p *policy, to netip.AddrPort, name string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, g.limits.Dial)
	defer cancel()
	if p.proxy != nil {
		return g.dialProxy(ctx, p.proxy, to, name)
	}
	// Asked again here, on what connect(2) gets.
	if g.server.Refused(to.Addr()) {
		return nil, errRefused
	}
	if g.Dial != nil {
		return g.Dial(ctx, to)
	}
	d := net.Dialer{Control: g.server.control(nil)}
	return d.DialContext(ctx, "tcp", to.String())
}

// control refuses, before connect(2), every address that is refused and not in
// permitted.
func (s *Server) control(permitted []netip.Prefix) func(network, address string, _ syscall.RawConn) error {
	return func(_, address string, _ syscall.RawConn) error {
		to, err := netip.ParseAddrPort(address)
		if err != nil {
			return fmt.Errorf("dialling something other than an address: %w", err)
		}
		a := to.Addr().Unmap()
		for _, p := range permitted {
			if p.Contains(a) {
				return nil
			}
		}
		if s.Refused(a) {
			return errRefused
		}
		return nil
	}
}

// dialProxy asks the sandbox's proxy for a connection. The proxy's own name is
// resolved at each dial and the very address that was judged is dialled.
func (g *guest) dialProxy(ctx context.Context, p *cay.EgressProxy, to netip.AddrPort, name string) (net.Conn, error) {
	d := net.Dialer{Control: g.server.control(g.server.PermitProxy)}
	conn, err := d.DialContext(ctx, "tcp", p.Address)
	if err != nil {
		return nil, fmt.Errorf("dialling the SOCKS5 proxy %s: %w", p.Address, err)
	}
	var auth *proxy.Auth
	if p.Username != "" {
		auth = &proxy.Auth{User: p.Username, Password: p.Password.Reveal()}
	}
	// The dialler is asked for its handshake only, so that conn stays the
	// kernel's and can end one direction.
	socks, err := proxy.SOCKS5("tcp", p.Address, auth, nil)
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("preparing SOCKS5: %w", err)
	}
	with, ok := socks.(interface {
		DialWithConn(context.Context, net.Conn, string, string) (net.Addr, error)
	})
	if !ok {
		_ = conn.Close()
		return nil, errors.New("the SOCKS5 library has lost its handshake")
	}
	host := to.Addr().String()
	if name != "" {
		host = name
	}
	if _, err := with.DialWithConn(ctx, conn, "tcp", net.JoinHostPort(host, strconv.Itoa(int(to.Port())))); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("the SOCKS5 proxy %s: %w", p.Address, err)
	}
	return conn, nil
}
