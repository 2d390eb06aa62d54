package network

import (
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

// sized is the size of a test: small always, large with CAY_NIGHTLY=1.
func sized(small, large int) int {
	if os.Getenv("CAY_NIGHTLY") == "1" {
		return large
	}
	return small
}

// frames opens a way to send bytes as they are over the guest's link, from the
// calling thread's namespace.
func frames() (send func(protocol uint16, dst net.HardwareAddr, payload []byte) error, end func(), err error) {
	l, err := net.InterfaceByName(eth0)
	if err != nil {
		return nil, nil, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return func(protocol uint16, dst net.HardwareAddr, payload []byte) error {
		sa := &unix.SockaddrLinklayer{Protocol: htons(protocol), Ifindex: l.Index, Halen: 6}
		copy(sa.Addr[:], dst)
		return unix.Sendto(fd, payload, 0, sa)
	}, func() { unix.Close(fd) }, nil
}

// arp asks who has an address, or says that another's is here.
func arp(operation byte, sender, target netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, operation}
	b = append(b, guestMAC...)
	b = append(b, sender.AsSlice()...)
	b = append(b, 0, 0, 0, 0, 0, 0)
	return append(b, target.AsSlice()...)
}

// TestAllPairs has every slot try every other one, by every address, protocol
// and forged source, and the links beside IP. Nothing may arrive at any of them,
// at the machine, or leave it with a forged source.
func TestAllPairs(t *testing.T) {
	const n = 20
	p := testPool(t, "pairs", func(p *Pool) { p.Limits.PerSecond = 1 << 20 })
	slots := make([]Slot, n)
	taps := make([]*tap, n)
	for i := range slots {
		slots[i] = acquire(t, p, i%2 == 0)
		taps[i] = newTap(t, openFile(t, slots[i].NetNS), eth0)
	}
	hits := canary(t)
	wan := newTap(t, world, "wan0")
	broadcast := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	for i, s := range slots {
		err := in(t, s.NetNS, func() error {
			frame, end, err := frames()
			if err != nil {
				return err
			}
			defer end()
			for j, victim := range slots {
				if i == j {
					continue
				}
				ends := []netip.Addr{victim.Addr, p.addresses(victim.Index).host}
				for _, a := range ends {
					shout(netip.AddrPortFrom(a, canaryPort))
					for _, src := range []netip.Addr{victim.Addr, ends[1], p.addresses(s.Index).host, s.Addr, uplinkAddr, gatewayAddr, netip.MustParseAddr("127.0.0.1")} {
						if err := forge(src, netip.AddrPortFrom(a, canaryPort)); err != nil {
							return err
						}
					}
				}
				// To the internet in the other's name, so that the answer goes there.
				for _, src := range ends {
					if err := forge(src, netip.AddrPortFrom(publicAddr, 7777)); err != nil {
						return err
					}
				}
				for _, b := range [][]byte{arp(1, victim.Addr, gatewayAddr), arp(2, gatewayAddr, guestAddr), arp(1, guestAddr, victim.Addr)} {
					if err := frame(unix.ETH_P_ARP, broadcast, b); err != nil {
						return err
					}
				}
			}
			for _, a := range []string{"255.255.255.255", "169.254.0.23", "224.0.0.1", "224.0.0.251", "10.193.255.255"} {
				shout(netip.AddrPortFrom(netip.MustParseAddr(a), canaryPort))
			}
			nd := append([]byte{0x60, 0, 0, 0, 0, 8, 58, 255}, netip.MustParseAddr("fe80::1").AsSlice()...)
			nd = append(append(nd, netip.MustParseAddr("ff02::1").AsSlice()...), 135, 0, 0, 0, 0, 0, 0, 0)
			return frame(unix.ETH_P_IPV6, broadcast, nd)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// The host's word comes last, at each of them.
	for i, s := range slots {
		c, err := net.Dial("udp4", netip.AddrPortFrom(s.Addr, 9).String())
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte("marker"))
		c.Close()
		for _, seen := range taps[i].await(t, netip.AddrPortFrom(guestAddr, 9)) {
			if seen.proto == unix.IPPROTO_TCP || seen.proto == unix.IPPROTO_ICMP && seen.src == gatewayAddr {
				continue // the refusals of what it sent itself
			}
			t.Errorf("slot %d got %s", s.Index, seen)
		}
	}
	in(t, slots[0].NetNS, func() error { shout(netip.AddrPortFrom(publicAddr, 9)); return nil })
	for _, seen := range wan.await(t, netip.AddrPortFrom(publicAddr, 9)) {
		if !ownLink(seen) {
			t.Errorf("left the host: %s", seen)
		}
	}
	if n := hits.Load(); n != 0 {
		t.Errorf("%d connections and datagrams reached the host's listeners", n)
	}
}

// TestManySlots makes as many slots as a node may need, several at a time, and
// uses each; nothing of them is left.
func TestManySlots(t *testing.T) {
	n := sized(24, 2000)
	p := testPool(t, "many", func(p *Pool) { p.Size, p.CIDR = n, netip.MustParsePrefix("10.192.0.0/12") })
	serve(t, world, publicAddr.String()+":80")
	began := time.Now()
	slots := make([]Slot, n)
	var all sync.WaitGroup
	next := make(chan int)
	for range 4 {
		all.Go(func() {
			for i := range next {
				s, err := p.Acquire(t.Context(), []cay.Egress{{}, closed, onlyOne, named}[i%4])
				if err != nil {
					t.Error(err)
					continue
				}
				slots[i] = s
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	all.Wait()
	took := time.Since(began)
	if t.Failed() {
		return
	}
	t.Logf("%d slots in %s, %.1f ms each", n, took.Round(time.Millisecond), float64(took.Milliseconds())/float64(n))
	seen := map[netip.Addr]bool{}
	for i := range slots {
		if seen[slots[i].Addr] {
			t.Fatalf("two slots have %s", slots[i].Addr)
		}
		seen[slots[i].Addr] = true
		if i%(n/20) > 3 {
			continue // a sample of each policy
		}
		if err := reach(t, slots[i], "tcp4", publicAddr); (err == nil) != (i%4 == 0 || i%4 == 2) {
			t.Errorf("slot %d with policy %d: %v", i, i%4, err)
		}
	}
	began = time.Now()
	for _, s := range slots {
		if err := p.Release(t.Context(), s.Index); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("released in %s, %.1f ms each", time.Since(began).Round(time.Millisecond), float64(time.Since(began).Milliseconds())/float64(n))
	if err := p.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := leftovers(t, p); len(left) != 0 {
		t.Errorf("%d things are left, as %s", len(left), left[0])
	}
}

// large is a policy of n ranges on each list, which neither touch nor overlap.
func large(n int) cay.Egress {
	var e cay.Egress
	for i := range n {
		e.Deny = append(e.Deny, netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(60 + i>>16), byte(i >> 8), byte(i), 0}), 25))
		e.Allow = append(e.Allow, netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(60 + i>>16), byte(i >> 8), byte(i), 7}), 32))
	}
	return e
}

// TestLargePolicy proves that ten thousand entries on each list count, first
// and last, and can be swapped under traffic.
func TestLargePolicy(t *testing.T) {
	p := testPool(t, "large")
	e := large(10_000)
	s, err := p.Acquire(t.Context(), e) // one that is made for it
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		began := time.Now()
		if err := p.SetPolicy(t.Context(), s.Index, e); err != nil {
			t.Fatal(err)
		}
		t.Logf("20,000 entries in %s", time.Since(began).Round(time.Millisecond))
	}
	first, last := e.Deny[0].Addr(), e.Deny[len(e.Deny)-1].Addr()
	for _, a := range []netip.Addr{first.Next(), last.Next(), publicAddr} {
		serve(t, world, a.String()+":80")
	}
	allowed := e.Allow[len(e.Allow)-1].Addr()
	serve(t, world, allowed.String()+":80")
	beside := lastOf(e.Deny[len(e.Deny)-1]).Next()
	serve(t, world, beside.String()+":80")
	for a, want := range map[netip.Addr]bool{first.Next(): false, last.Next(): false, publicAddr: true, allowed: true, beside: true} {
		if err := reach(t, s, "tcp4", a); (err == nil) != want {
			t.Errorf("%s: %v, want reached %v", a, err, want)
		}
	}
	if err := p.SetPolicy(t.Context(), s.Index, cay.Egress{}); err != nil {
		t.Fatal(err)
	}
	if err := reach(t, s, "tcp4", first.Next()); err != nil {
		t.Errorf("after all of it is gone: %v", err)
	}
}
