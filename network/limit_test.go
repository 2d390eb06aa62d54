package network

import (
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay"
)

// TestRate proves that a guest opens no more than so many connections a second,
// and that what it is refused for that is in its log.
func TestRate(t *testing.T) {
	p := testPool(t, "rate", func(p *Pool) { p.Limits.PerSecond = 20 })
	s := acquire(t, p, true)
	wan := newTap(t, world, "wan0")
	began := time.Now()
	in(t, s.NetNS, func() error {
		for port := range uint16(500) {
			c, err := net.Dial("udp4", netip.AddrPortFrom(publicAddr, 10000+port).String())
			if err != nil {
				continue
			}
			c.Write([]byte("x"))
			c.Close()
		}
		return nil
	})
	refusals(t, p, s, func(all []cay.EgressRefusal) bool {
		return len(all) > 0 && all[0].Rule == "limit" && strings.Contains(all[0].Reason, "20 new connections a second")
	})
	serve(t, world, publicAddr.String()+":80")
	eventually(t, "a connection once the bucket refills", func() bool { return reach(t, s, "tcp4", publicAddr) == nil })
	arrived := 0
	for _, seen := range wan.await(t, netip.AddrPortFrom(publicAddr, 80)) {
		if seen.dport >= 10000 {
			arrived++
		}
	}
	most := 40 + int(20*time.Since(began).Seconds()) + 1
	if arrived < 40 || arrived > most {
		t.Errorf("%d of 500 arrived, want 40 to %d", arrived, most)
	}
}

// TestBandwidth proves that a slot carries no more than its limit, in either
// direction.
func TestBandwidth(t *testing.T) {
	const mbit, size = 8, 1 << 20
	p := testPool(t, "band", func(p *Pool) { p.Limits.Mbit = mbit })
	s := acquire(t, p, true)
	at := netip.AddrPortFrom(publicAddr, 81)
	var l net.Listener
	if err := inFile(world, func() (err error) { l, err = net.Listen("tcp4", at.String()); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, direction := range []string{"out", "in"} {
		t.Run(direction, func(t *testing.T) {
			done := make(chan error, 1)
			go func() {
				c, err := l.Accept()
				if err != nil {
					done <- err
					return
				}
				defer c.Close()
				if direction == "in" {
					_, err = c.Write(make([]byte, size))
				} else {
					_, err = io.Copy(io.Discard, c)
				}
				done <- err
			}()
			var c net.Conn
			if err := in(t, s.NetNS, func() (err error) { c, err = net.Dial("tcp4", at.String()); return err }); err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			began := time.Now()
			if direction == "in" {
				if n, err := io.Copy(io.Discard, c); err != nil || n != size {
					t.Fatalf("%d bytes, %v", n, err)
				}
			} else {
				if _, err := c.Write(make([]byte, size)); err != nil {
					t.Fatal(err)
				}
				c.Close()
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			least := time.Duration(float64(size-leastBurst) * 8 / (mbit * 1e6) * 0.9 * float64(time.Second))
			if took := time.Since(began); took < least {
				t.Errorf("1 MiB took %s over %d Mbit/s, want at least %s", took, mbit, least)
			}
		})
	}
}

// TestMachineAddressesRefused proves that the refusal for those who dial for a
// guest knows the machine as it is now.
func TestMachineAddressesRefused(t *testing.T) {
	p := testPool(t, "ask", func(p *Pool) { p.Refuse = prefixes("44.0.0.0/8") })
	s := acquire(t, p, true)
	for a, want := range map[string]bool{
		publicAddr.String(): false, "8.8.8.8": false, "::ffff:8.8.8.8": false,
		uplinkAddr.String(): true, "::ffff:" + uplinkAddr.String(): true, secondAddr.String(): true, s.Addr.String(): true,
		"44.1.2.3": true, "169.254.169.254": true, "127.0.0.1": true, "::1": true, "0.0.0.0": true, "::": true, "255.255.255.255": true,
		"10.193.200.1": true, "fd00:ec2::254": true, "64:ff9b::808:808": true, "224.0.0.1": true,
	} {
		if got := p.Refused(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s is refused: %v", a, got)
		}
	}
	if !p.Refused(netip.Addr{}) {
		t.Error("no address at all is a destination")
	}
}

// registries are the special-purpose registries of IANA as of 2026-11, typed
// from there and not from the table, and metadata services by address.
const registries = `
0.0.0.0/8 0.0.0.0/32 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.0.0/29
192.0.0.8/32 192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24
192.88.99.0/24 192.88.99.2/32 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24
240.0.0.0/4 255.255.255.255/32 224.0.0.0/4
::1/128 ::/128 ::ffff:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001::/32 2001:1::1/128
2001:1::2/128 2001:1::3/128 2001:2::/48 2001:3::/32 2001:4:112::/48 2001:10::/28 2001:20::/28 2001:30::/28
2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20 5f00::/16 fc00::/7 fe80::/10 ff00::/8
169.254.169.254/32 169.254.170.2/32 169.254.170.23/32 100.100.100.200/32 168.63.129.16/32 192.0.0.192/32 169.254.42.42/32
fd00:ec2::254/128 fd00:ec2::23/128 fd20:ce::254/128 fd00:42::42/128`

// TestRegistries proves that the table has every entry of the registries.
func TestRegistries(t *testing.T) {
	for _, text := range strings.Fields(registries) {
		want, held := netip.MustParsePrefix(text), false
		for _, p := range Refused() {
			held = held || p.Bits() <= want.Bits() && p.Contains(want.Addr())
		}
		if !held {
			t.Errorf("%s is a destination", want)
		}
		if !IsRefused(want.Addr()) {
			t.Errorf("%s is a destination", want.Addr())
		}
	}
	for _, s := range specialPurpose {
		if p := netip.MustParsePrefix(s.Prefix); p != p.Masked() || s.Name == "" {
			t.Errorf("%s (%s) is no row", s.Prefix, s.Name)
		}
	}
	for _, public := range []string{"1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "172.15.255.255", "172.32.0.0",
		"192.0.1.0", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255", "168.63.129.15",
		"2606:4700:4700::1111", "2001:200::1", "2001:4860:4860::8888", "2003::1", "3ffe:ffff::1"} {
		if IsRefused(netip.MustParseAddr(public)) {
			t.Errorf("%s is refused", public)
		}
	}
}
