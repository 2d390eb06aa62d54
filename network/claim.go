package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/wholefile"
)

// The host-wide settings that the pool needs; the second where guests have
// IPv6.
const (
	forwardSysctl  = "ipv4/ip_forward"
	forward6Sysctl = "ipv6/conf/all/forwarding"
)

// ledger is what the pools of one machine (one host namespace) agree on: who
// has which block of addresses, and what the host-wide setting was before the
// first of them came.
type ledger struct {
	Claims map[string]claim `json:"claims"` // by tag
	// Forward is the value of ip_forward to restore when the last claim goes;
	// empty when no pool changed it.
	Forward string `json:"forward,omitempty"`
	// Forward6 is the same of IPv6. Adverts are the links that took their routes
	// from router advertisements, which a machine that forwards does only when
	// it is told so.
	Forward6 string   `json:"forward6,omitempty"`
	Adverts  []string `json:"adverts,omitempty"`
}

type claim struct {
	Block netip.Prefix `json:"block"`
	At    time.Time    `json:"at"`
}

// withLedger calls f with the ledger, alone on this machine, and keeps what f
// made of it if f succeeds.
func (p *Pool) withLedger(f func(*ledger) error) error {
	var ns unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &ns); err != nil {
		return err
	}
	// A file per host namespace: pools in different ones share nothing.
	if err := os.MkdirAll(p.StateDir, 0o700); err != nil {
		return err
	}
	path := filepath.Join(p.StateDir, fmt.Sprintf("network-%d.json", ns.Ino))
	lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close() // releases the lock
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	var l ledger
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		// A ledger that cannot be read is one of a crash of the machine; what
		// the host shows replaces it.
		if json.Unmarshal(b, &l) != nil {
			l = ledger{}
		}
	}
	if l.Claims == nil {
		l.Claims = map[string]claim{}
	}
	if err := f(&l); err != nil {
		return err
	}
	if len(l.Claims) == 0 && l.Forward == "" && l.Forward6 == "" {
		// The lock file stays: one who waits for it would get the lock of a
		// file that has no name any more.
		return wholefile.Remove(path)
	}
	if b, err = json.Marshal(l); err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// take claims a block for the pool, or finds the one it has, switches
// forwarding on, and calls install before anybody else can look.
func (p *Pool) take(install func() error) error {
	return p.withLedger(func(l *ledger) error {
		if err := p.forgetStale(l); err != nil {
			return err
		}
		if c, ok := l.Claims[p.Tag]; ok && p.cidr().Contains(c.Block.Addr()) {
			p.block = c.Block
		} else {
			block, err := p.freeBlock(l)
			if err != nil {
				return err
			}
			p.block = block
			l.Claims[p.Tag] = claim{Block: block, At: p.now()}
		}
		was, err := readSysctl(forwardSysctl)
		if err != nil {
			return err
		}
		if was != "1" {
			if err := sysctl(forwardSysctl, "1"); err != nil {
				return fmt.Errorf("switching on IP forwarding: %w", err)
			}
			if l.Forward == "" {
				l.Forward = was
			}
		}
		if p.six {
			if err := l.forward6(); err != nil {
				return fmt.Errorf("switching on IPv6 forwarding: %w", err)
			}
		}
		return install()
	})
}

// giveBack ends the pool's claim, and restores the host's setting with the
// last one.
func (p *Pool) giveBack() error {
	return p.withLedger(func(l *ledger) error {
		delete(l.Claims, p.Tag)
		if err := p.forgetStale(l); err != nil {
			return err
		}
		if len(l.Claims) > 0 {
			return nil
		}
		var err error
		if l.Forward != "" {
			err = sysctl(forwardSysctl, l.Forward)
			l.Forward = ""
		}
		return errors.Join(err, l.restore6())
	})
}

// acceptAdverts is a link's setting: 1 takes router advertisements unless the
// machine forwards, 2 takes them all the same.
func acceptAdverts(link string) string { return "ipv6/conf/" + link + "/accept_ra" }

// forward6 switches on IPv6 forwarding, and lets the links that listen to
// routers go on with it.
func (l *ledger) forward6() error {
	was, err := readSysctl(forward6Sysctl)
	if err != nil || was == "1" {
		return err
	}
	links, err := os.ReadDir("/proc/sys/net/ipv6/conf")
	if err != nil {
		return err
	}
	for _, link := range links {
		if name := link.Name(); name != "all" && name != "default" {
			if v, err := readSysctl(acceptAdverts(name)); err == nil && v == "1" && sysctl(acceptAdverts(name), "2") == nil {
				l.Adverts = append(l.Adverts, name)
			}
		}
	}
	if err := sysctl(forward6Sysctl, "1"); err != nil {
		return err
	}
	if l.Forward6 == "" {
		l.Forward6 = was
	}
	return nil
}

// restore6 makes the host's settings of IPv6 what they were.
func (l *ledger) restore6() error {
	if l.Forward6 == "" {
		return nil
	}
	err := sysctl(forward6Sysctl, l.Forward6)
	for _, name := range l.Adverts {
		_ = sysctl(acceptAdverts(name), "1") // the link may be gone
	}
	l.Forward6, l.Adverts = "", nil
	return err
}

// forgetStale drops claims of pools of which the host holds nothing: their
// owner was removed without Destroy.
func (p *Pool) forgetStale(l *ledger) error {
	links, err := p.host.LinkList()
	if err != nil {
		return err
	}
	tables, err := tableNames()
	if err != nil {
		return err
	}
	for tag := range l.Claims {
		alive := tag == p.Tag || tables[tableName(tag)]
		for _, link := range links {
			alive = alive || strings.HasPrefix(link.Attrs().Name, linkPrefix(tag))
		}
		if !alive {
			delete(l.Claims, tag)
		}
	}
	return nil
}

// freeBlock finds a block that no other pool has and no address or route of
// the host is in. A wider route over the whole range (a company's 10.0.0.0/8)
// is accepted when nothing else is left: ours are more specific.
func (p *Pool) freeBlock(l *ledger) (netip.Prefix, error) {
	var narrow, wide []netip.Prefix
	for _, c := range l.Claims {
		narrow = append(narrow, c.Block)
	}
	addrs, err := p.host.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("reading the host's addresses: %w", err)
	}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok {
			narrow = append(narrow, netip.PrefixFrom(ip, 32))
		}
	}
	routes, err := p.host.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("reading the host's routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ones, _ := r.Dst.Mask.Size()
		ip, ok := netip.AddrFromSlice(r.Dst.IP.To4())
		switch {
		case !ok || ones == 0:
		case ones <= p.cidr().Bits():
			wide = append(wide, netip.PrefixFrom(ip, ones))
		default:
			narrow = append(narrow, netip.PrefixFrom(ip, ones))
		}
	}
	overlaps := func(b netip.Prefix, with []netip.Prefix) bool {
		for _, w := range with {
			if b.Overlaps(w) {
				return true
			}
		}
		return false
	}
	for _, avoid := range [][]netip.Prefix{append(wide, narrow...), narrow} {
		for b := netip.PrefixFrom(p.cidr().Addr(), p.blockBits()); p.cidr().Contains(b.Addr()); {
			if !overlaps(b, avoid) {
				return b, nil
			}
			next := lastOf(b).Next()
			if !next.IsValid() {
				break
			}
			b = netip.PrefixFrom(next, p.blockBits())
		}
	}
	return netip.Prefix{}, &cay.Error{Code: cay.CodeNetworkUnavailable, Layer: cay.LayerNetwork,
		Message: fmt.Sprintf("no free block of addresses for sandboxes in %s: all of it is used by the host or by other servers of this machine", p.cidr()),
		Fix:     "choose another range of private addresses for sandboxes"}
}
