package network

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

const canaryPort = 8099

// refusedDestinations are the ends and the middle of every refused range of
// both families, the metadata services by name, the host by every spelling,
// and what the caller adds.
func refusedDestinations(more ...netip.Addr) []netip.Addr {
	out := append(more, uplinkAddr, secondAddr, netip.AddrFrom16(uplinkAddr.As16()))
	for _, p := range Refused() {
		first := p.Masked().Addr()
		if out = append(out, first); !p.IsSingleIP() {
			out = append(out, first.Next())
		}
		if p.Addr().Is4() {
			last := lastOf(p)
			a, b := first.As4(), last.As4()
			var m [4]byte
			for i := range m {
				m[i] = a[i] | (a[i]^b[i])&0x55
			}
			mid := netip.AddrFrom4(m)
			out = append(out, last, mid, netip.AddrFrom16(mid.As16())) // the last is ::ffff:mid
		}
	}
	for _, s := range []string{
		"169.254.169.254", "169.254.170.2", "169.254.169.253", "169.254.169.123", "100.100.100.200", "168.63.129.16", // AWS, ECS, DNS, NTP, Alibaba, Azure
		"192.0.0.192", "169.254.42.42", "::ffff:169.254.169.254", // Oracle, Scaleway
		"fd00:ec2::254", "fd20:ce::254", // AWS, GCP
		"127.0.0.1", "127.0.0.53", "127.1.2.3", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::127.0.0.1",
		"10.0.0.1", "172.17.0.1", "192.168.1.1", "192.168.49.2", "255.255.255.255", "224.0.0.251", "ff02::1",
		"64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "2001::1", "fe80::1", "169.254.0.22",
	} {
		out = append(out, netip.MustParseAddr(s))
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// canary listens on every address of the host, as a control port would.
func canary(t *testing.T) *atomic.Int64 {
	t.Helper()
	var hits atomic.Int64
	l, err := net.Listen("tcp", net.JoinHostPort("", "8099"))
	if err != nil {
		t.Fatal(err)
	}
	u, err := net.ListenPacket("udp", net.JoinHostPort("", "8099"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{}, 2)
	go func() {
		defer func() { done <- struct{}{} }()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			hits.Add(1)
			c.Close()
		}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		for b := make([]byte, 64); ; hits.Add(1) {
			if _, _, err := u.ReadFrom(b); err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { l.Close(); u.Close(); <-done; <-done })
	return &hits
}

func openFile(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestRefused sends to every refused destination, by four protocols, with both
// walls up and with each of them alone. Nothing may leave the host, arrive at
// the host's listeners, or arrive at another slot.
func TestRefused(t *testing.T) {
	walls := []struct {
		name string
		down func(t *testing.T, p *Pool, s Slot)
		// except are destinations that this wall cannot know.
		except []netip.Addr
	}{
		{"both walls", func(*testing.T, *Pool, Slot) {}, nil},
		{"the host's wall alone", func(t *testing.T, p *Pool, s Slot) {
			// Not the whole table: without translation nothing gets anywhere.
			c, err := nftIn(openFile(t, p.routerNS(s.Index)))
			if err != nil {
				t.Fatal(err)
			}
			for _, chain := range []string{"first", "forward", "input"} {
				c.FlushChain(&nftables.Chain{Name: chain, Table: &nftables.Table{Name: routerTable, Family: nftables.TableFamilyINet}})
			}
			if err := c.Flush(); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"the slot's wall alone", func(t *testing.T, p *Pool, _ Slot) {
			c := &nftables.Conn{}
			for _, chain := range []string{"first", "forward", "input"} {
				c.FlushChain(&nftables.Chain{Name: chain, Table: &nftables.Table{Name: p.tableName(), Family: nftables.TableFamilyINet}})
			}
			if err := c.Flush(); err != nil {
				t.Fatal(err)
			}
		}, []netip.Addr{uplinkAddr, netip.AddrFrom16(uplinkAddr.As16())}},
	}
	for _, w := range walls {
		t.Run(w.name, func(t *testing.T) {
			p := testPool(t, "deny", func(p *Pool) { p.Refuse = []netip.Prefix{netip.MustParsePrefix("44.0.0.0/8")} })
			a, b := acquire(t, p, true), acquire(t, p, true)
			w.down(t, p, a)
			hits := canary(t)
			wan := newTap(t, world, "wan0")
			victim := newTap(t, openFile(t, b.NetNS), eth0)
			all := refusedDestinations(a.Addr, b.Addr, p.addresses(a.Index).host, p.addresses(b.Index).host,
				netip.MustParseAddr("10.193.255.254"), netip.MustParseAddr("44.1.2.3"))
			t.Logf("%d destinations", len(all))
			if len(all) < 140 {
				t.Errorf("the list has shrunk to %d", len(all))
			}
			marker := netip.AddrPortFrom(publicAddr, 9)
			err := in(t, a.NetNS, func() error {
				for _, d := range all {
					if slices.Contains(w.except, d) {
						continue
					}
					shout(netip.AddrPortFrom(d, canaryPort))
				}
				shout(marker)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, seen := range wan.await(t, marker) {
				if seen.dst != publicAddr && !ownLink(seen) {
					t.Errorf("left the host: %s", seen)
				}
			}
			// The host's path to its own listeners and to the other slot is
			// shorter than the one to the marker, which has arrived.
			if n := hits.Load(); n != 0 {
				t.Errorf("%d connections and datagrams reached the host's listeners", n)
			}
			for _, seen := range victim.take() {
				t.Errorf("reached another slot: %s", seen)
			}
		})
	}
}

// TestRefusedWhateverPolicy sends to every refused destination under policies
// that allow them. Nothing may arrive anywhere.
func TestRefusedWhateverPolicy(t *testing.T) {
	p := testPool(t, "whate", func(p *Pool) {
		p.Refuse = []netip.Prefix{netip.MustParsePrefix("44.0.0.0/8")}
		p.Limits.PerSecond = 1 << 20
	})
	victim := acquire(t, p, true)
	guest := newTap(t, openFile(t, victim.NetNS), eth0)
	hits := canary(t)
	wan := newTap(t, world, "wan0")
	everything := append(Refused(), prefixes("0.0.0.0/0", "44.0.0.0/8", "10.193.0.0/16", uplinkAddr.String()+"/32")...)
	for i, e := range []cay.Egress{
		{Deny: prefixes("0.0.0.0/0"), Allow: everything},
		{Allow: everything},
		{Deny: prefixes("0.0.0.0/0"), Allow: everything, AllowNames: []string{"example.com"}},
		{Allow: everything, Rules: []cay.EgressRule{{Name: "example.com", Headers: map[string]string{"X": "y"}}}},
		{Allow: everything, Proxy: &cay.EgressProxy{Address: "proxy.example:1080"}},
	} {
		s, err := p.Acquire(t.Context(), e)
		if err != nil {
			t.Fatal(err)
		}
		d, err := p.Divert(t.Context(), s.Index)
		if err != nil {
			t.Fatal(err)
		}
		all := refusedDestinations(victim.Addr, s.Addr, p.addresses(victim.Index).host, p.addresses(s.Index).host, netip.MustParseAddr("44.1.2.3"))
		marker := netip.AddrPortFrom(publicAddr, uint16(100+i))
		in(t, s.NetNS, func() error {
			for _, to := range all {
				shout(netip.AddrPortFrom(to, canaryPort))
				shout(netip.AddrPortFrom(to, 53))
			}
			send(unix.IPPROTO_UDP, marker)
			return nil
		})
		for _, seen := range wan.await(t, marker) {
			if seen.dst != publicAddr && !ownLink(seen) {
				t.Errorf("policy %d: left the host: %s", i, seen)
			}
		}
		// What was diverted is not refused yet: its server asks.
		for _, l := range []net.Listener{d.TCP, d.DNSTCP} {
			l.(*net.TCPListener).SetDeadline(time.Now().Add(50 * time.Millisecond))
			for {
				c, err := l.Accept()
				if err != nil {
					break
				}
				if to, err := Destination(c); err != nil || !p.Refused(to.Addr()) || within(p.special, to.Addr()) {
					t.Errorf("policy %d: turned over: %s, %v", i, to, err)
				}
				c.Close()
			}
		}
		d.Close()
		if err := p.Release(t.Context(), s.Index); err != nil {
			t.Fatal(err)
		}
	}
	if n := hits.Load(); n != 0 {
		t.Errorf("%d connections and datagrams reached the host's listeners", n)
	}
	for _, seen := range guest.take() {
		t.Errorf("reached another slot: %s", seen)
	}
}

// TestHostAddressAddedLater proves that an address the host gets while guests
// run is refused from then on, and that one it loses is a destination again.
func TestHostAddressAddedLater(t *testing.T) {
	p := testPool(t, "later")
	s := acquire(t, p, true)
	serve(t, world, publicAddr.String()+":80")
	dial := func() error {
		return in(t, s.NetNS, func() error { _, err := ask(t.Context(), "tcp4", publicAddr.String()+":80"); return err })
	}
	wan, err := p.host.LinkByName("wan")
	if err != nil {
		t.Fatal(err)
	}
	hits := canary(t)
	later := &netlink.Addr{IPNet: netlink.NewIPNet(publicAddr.AsSlice())}
	for range 2 {
		if err := dial(); err != nil {
			t.Errorf("while it is the world's: %v", err)
		}
		if err := p.host.AddrAdd(wan, later); err != nil {
			t.Fatal(err)
		}
		if err := dial(); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("while it is the host's: got %v, want a refusal", err)
		}
		in(t, s.NetNS, func() error { shout(netip.AddrPortFrom(publicAddr, canaryPort)); return nil })
		if err := p.host.AddrDel(wan, later); err != nil {
			t.Fatal(err)
		}
	}
	if n := hits.Load(); n != 0 {
		t.Errorf("%d connections and datagrams reached the host's listeners", n)
	}
}

// TestCanariesSing proves that the previous test could fail: without both
// walls its packets arrive where they must not.
func TestCanariesSing(t *testing.T) {
	p := testPool(t, "sing")
	a := acquire(t, p, true)
	hits := canary(t)
	wan := newTap(t, world, "wan0")
	c, err := nftIn(openFile(t, p.routerNS(a.Index)))
	if err != nil {
		t.Fatal(err)
	}
	for _, half := range []struct {
		c    *nftables.Conn
		name string
	}{{c, routerTable}, {&nftables.Conn{}, p.tableName()}} {
		for _, chain := range []string{"first", "forward", "input"} {
			half.c.FlushChain(&nftables.Chain{Name: chain, Table: &nftables.Table{Name: half.name, Family: nftables.TableFamilyINet}})
		}
		if err := half.c.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	meta := netip.MustParseAddr("192.0.2.7")
	in(t, a.NetNS, func() error {
		shout(netip.AddrPortFrom(meta, canaryPort))
		shout(netip.AddrPortFrom(uplinkAddr, canaryPort))
		return nil
	})
	wan.await(t, netip.AddrPortFrom(meta, canaryPort))
	eventually(t, "a hit on the host's listeners", func() bool { return hits.Load() > 0 })
}

// TestRefusalAnswers proves that a program in the guest is told at once.
func TestRefusalAnswers(t *testing.T) {
	p := testPool(t, "tell")
	open, shut := acquire(t, p, true), acquire(t, p, false)
	for _, c := range []struct {
		s  Slot
		to string
	}{
		{open, "169.254.169.254:80"}, {open, "10.1.2.3:80"}, {open, uplinkAddr.String() + ":80"}, {open, shut.Addr.String() + ":80"},
		{shut, publicAddr.String() + ":80"}, {shut, "8.8.8.8:53"},
	} {
		began := time.Now()
		err := in(t, c.s.NetNS, func() error {
			conn, err := (&net.Dialer{Timeout: 5 * time.Second}).Dial("tcp4", c.to)
			if err == nil {
				conn.Close()
			}
			return err
		})
		if !errors.Is(err, unix.ECONNREFUSED) || time.Since(began) > 2*time.Second {
			t.Errorf("%s: got %v after %v, want a refusal at once", c.to, err, time.Since(began))
		}
	}
}

// serve answers every connection and datagram in a namespace with what it got,
// prefixed by the peer's address.
func serve(t testing.TB, ns *os.File, addr string) {
	t.Helper()
	var l net.Listener
	var u net.PacketConn
	err := inFile(ns, func() (err error) {
		if l, err = net.Listen("tcp", addr); err != nil {
			return err
		}
		u, err = net.ListenPacket("udp", addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// A connection whose peer is gone without a word, as all are when their
	// slot is removed, ends with the test.
	var done sync.WaitGroup
	over, end := context.WithCancel(context.Background())
	done.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(over, func() { c.Close() })
			done.Go(func() {
				defer stop()
				defer c.Close()
				host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
				io.WriteString(c, host+" ")
				io.Copy(c, c)
			})
		}
	})
	done.Go(func() {
		for b := make([]byte, 2048); ; {
			n, peer, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(peer.String())
			u.WriteTo(append([]byte(host+" "), b[:n]...), peer)
		}
	})
	t.Cleanup(func() { l.Close(); u.Close(); end(); done.Wait() })
}

// ask sends a word and returns the whole answer.
func ask(ctx context.Context, network, addr string) (string, error) {
	c, err := (&net.Dialer{Timeout: 3 * time.Second}).DialContext(ctx, network, addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := io.WriteString(c, "hello"); err != nil {
		return "", err
	}
	if t, ok := c.(*net.TCPConn); ok {
		t.CloseWrite()
		b, err := io.ReadAll(c)
		return string(b), err
	}
	b := make([]byte, 2048)
	n, err := c.Read(b)
	return string(b[:n]), err
}

// TestPublic proves the ways that are open: guest to the internet, seen there
// as the host, and host to guest, seen there as the gateway.
func TestPublic(t *testing.T) {
	p := testPool(t, "pub")
	s, shut := acquire(t, p, true), acquire(t, p, false)
	serve(t, world, publicAddr.String()+":80")
	for _, slot := range []Slot{s, shut} {
		serve(t, openFile(t, slot.NetNS), "0.0.0.0:49983")
	}
	for _, network := range []string{"tcp4", "udp4"} {
		t.Run(network, func(t *testing.T) {
			var got string
			err := in(t, s.NetNS, func() (err error) {
				got, err = ask(t.Context(), network, publicAddr.String()+":80")
				return err
			})
			if want := uplinkAddr.String() + " hello"; err != nil || got != want {
				t.Errorf("guest to internet: got %q, %v, want %q", got, err, want)
			}
			if err := in(t, shut.NetNS, func() error { _, err := ask(t.Context(), network, publicAddr.String()+":80"); return err }); err == nil {
				t.Error("a guest without internet reaches it")
			}
			for _, slot := range []Slot{s, shut} {
				got, err := ask(t.Context(), network, slot.Addr.String()+":49983")
				if want := gatewayAddr.String() + " hello"; err != nil || got != want {
					t.Errorf("host to guest: got %q, %v, want %q", got, err, want)
				}
			}
		})
	}
}

// TestNobodyElseEnters proves that only the host opens connections to a guest.
func TestNobodyElseEnters(t *testing.T) {
	p := testPool(t, "enter")
	s := acquire(t, p, true)
	guest := newTap(t, openFile(t, s.NetNS), eth0)
	inFile(world, func() error {
		for _, d := range []netip.Addr{s.Addr, p.addresses(s.Index).host} {
			shout(netip.AddrPortFrom(d, 49983)) // routed to the host, as from its LAN
			forge(p.addresses(s.Index).host, netip.AddrPortFrom(s.Addr, 49983))
		}
		return nil
	})
	// A datagram of the host comes later, and alone.
	c, err := net.Dial("udp4", s.Addr.String()+":9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("marker"))
	for _, seen := range guest.await(t, netip.AddrPortFrom(guestAddr, 9)) {
		t.Errorf("entered the guest: %s", seen)
	}
}

// TestSpoofed proves that a guest, and even a router taken over, cannot send
// with another's address.
func TestSpoofed(t *testing.T) {
	p := testPool(t, "spoof")
	a, b := acquire(t, p, true), acquire(t, p, true)
	wan := newTap(t, world, "wan0")
	other := newTap(t, openFile(t, b.NetNS), eth0)
	sources := []netip.Addr{b.Addr, p.addresses(b.Index).host, p.addresses(a.Index).host, uplinkAddr, secondAddr,
		netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("127.0.0.1"), gatewayAddr, netip.MustParseAddr("169.254.0.20")}
	c, err := nftIn(openFile(t, p.routerNS(a.Index)))
	if err != nil {
		t.Fatal(err)
	}
	for i, ns := range []string{a.NetNS, p.routerNS(a.Index)} {
		if i == 1 { // a router that does not translate
			c.FlushChain(&nftables.Chain{Name: "leave", Table: &nftables.Table{Name: routerTable, Family: nftables.TableFamilyINet}})
			if err := c.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		marker := netip.AddrPortFrom(publicAddr, uint16(90+i))
		err := in(t, ns, func() error {
			for _, src := range sources {
				for _, dst := range []netip.Addr{publicAddr, b.Addr, uplinkAddr} {
					forge(src, netip.AddrPortFrom(dst, 7777))
				}
			}
			shout(marker)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, seen := range wan.await(t, marker) {
			if seen.dport == 7777 {
				t.Errorf("from %s a forged packet left the host: %s", ns, seen)
			}
		}
		for _, seen := range other.take() {
			t.Errorf("from %s a forged packet reached another slot: %s", ns, seen)
		}
	}
}

// TestIPv6GuestBrings proves that a guest that gives itself IPv6 gets nowhere.
func TestIPv6GuestBrings(t *testing.T) {
	p := testPool(t, "six")
	s := acquire(t, p, true)
	wan := newTap(t, world, "wan0")
	marker := netip.AddrPortFrom(publicAddr, 9)
	err := in(t, s.NetNS, func() error {
		if err := sysctl("ipv6/conf/eth0/disable_ipv6", "0"); err != nil {
			return err
		}
		l, err := net.InterfaceByName(eth0)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, d := range []string{"ff02::1", "fe80::1"} {
			unix.Sendto(fd, []byte("x"), 0, &unix.SockaddrInet6{Port: 7777, Addr: netip.MustParseAddr(d).As16(), ZoneId: uint32(l.Index)})
		}
		shout(marker)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, seen := range wan.await(t, marker) {
		if seen.src.Is6() || seen.dst != publicAddr {
			t.Errorf("left the host: %s", seen)
		}
	}
}
