package network

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

// naive is [policy.judge] as the words of [cay.Egress] say it, prefix by
// prefix.
func naive(e cay.Egress, protocol uint8, to netip.AddrPort) verdict {
	has := func(ps []netip.Prefix) bool {
		return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(to.Addr()) || p == everywhere4 })
	}
	tcp, udp := protocol == unix.IPPROTO_TCP, protocol == unix.IPPROTO_UDP
	hides := udp && to.Port() == 443 && (len(e.AllowNames) > 0 || len(e.Rules) > 0)
	switch {
	case IsRefused(to.Addr()) || DefaultCIDR.Contains(to.Addr()):
		return refused
	case e.Named() && to.Port() == 53 && (tcp || udp):
		return resolved
	case e.Named() && tcp:
		return streamed
	case has(e.Allow):
		return passed
	case hides || has(e.Deny):
		return refused
	}
	return passed
}

var testSpecial = spans(append(Refused(), DefaultCIDR))

// randomPolicy makes policies whose prefixes meet, overlap and touch.
func randomPolicy(r *rand.Rand) cay.Egress {
	var e cay.Egress
	list := func() (out []netip.Prefix) {
		for range r.IntN(12) {
			a := netip.AddrFrom4([4]byte{byte(92 + r.IntN(3)), byte(r.IntN(2) * 255), byte(r.IntN(4)), byte(r.IntN(256))})
			bits := 33 - 1 - r.IntN(26)
			switch r.IntN(12) {
			case 0:
				a, bits = netip.AddrFrom4([4]byte{byte(r.IntN(256)), byte(r.IntN(256)), 0, 0}), r.IntN(9)
			case 1:
				out = append(out, netip.MustParsePrefix([]string{"::/0", "2001:db8::/32", "::ffff:0:0/97"}[r.IntN(3)]))
			}
			out = append(out, netip.PrefixFrom(a, bits).Masked())
			if r.IntN(3) == 0 {
				out = append(out, netip.PrefixFrom(random6(r), 128-r.IntN(90)).Masked())
			}
		}
		return out
	}
	if r.IntN(4) > 0 {
		e.Deny = list()
	}
	if r.IntN(3) == 0 {
		e.Deny = append(e.Deny, everywhere4)
	}
	if r.IntN(3) > 0 {
		e.Allow = list()
	}
	if r.IntN(3) == 0 {
		e.AllowNames = []string{"example.com"}
	}
	if r.IntN(6) == 0 {
		e.Rules = []cay.EgressRule{{Name: "example.com", Headers: map[string]string{"X": "y"}}}
	}
	if r.IntN(8) == 0 {
		e.Proxy = &cay.EgressProxy{Address: "proxy.example:1080"}
	}
	return e
}

// random6 is an address whose neighbours are drawn as well.
func random6(r *rand.Rand) netip.Addr {
	b := public6.As16()
	b[5], b[6], b[15] = byte(r.IntN(2)*255), byte(r.IntN(2)*255), byte(r.IntN(4))
	return netip.AddrFrom16(b)
}

var everywhere4 = netip.MustParsePrefix("0.0.0.0/0")

// randomTargets are the edges of a policy's prefixes and some others.
func randomTargets(r *rand.Rand, e cay.Egress, n int) []netip.AddrPort {
	var at []netip.Addr
	for _, p := range append(slices.Clone(e.Deny), e.Allow...) {
		last := lastOf(p)
		at = append(at, p.Addr(), p.Addr().Prev(), last, last.Next())
	}
	for range 8 {
		at = append(at, random6(r), netip.AddrFrom4([4]byte{byte(92 + r.IntN(3)), byte(r.IntN(2) * 255), byte(r.IntN(4)), byte(r.IntN(256))}),
			netip.AddrFrom4([4]byte{byte(1 + r.IntN(222)), byte(r.IntN(256)), byte(r.IntN(256)), byte(r.IntN(256))}))
	}
	var out []netip.AddrPort
	for range n {
		a := at[r.IntN(len(at))]
		if !a.IsValid() || a.Is6() && !netip.MustParsePrefix("2000::/3").Contains(a) {
			a = publicAddr // of what a machine sends of its own there is enough already
		}
		out = append(out, netip.AddrPortFrom(a, []uint16{53, 80, 443, 22, uint16(2000 + r.IntN(60000))}[r.IntN(5)]))
	}
	return out
}

func FuzzJudge(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 1))
		e := randomPolicy(r)
		pol := policyOf(e)
		for _, to := range randomTargets(r, e, 64) {
			for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_SCTP} {
				got, why := pol.judge(testSpecial, protocol, to)
				if want := naive(e, protocol, to); got != want || (got == refused) != (why != "") {
					t.Fatalf("%+v: protocol %d to %s is %d (%s), want %d", e, protocol, to, got, why, want)
				}
			}
		}
	})
}

var markerAddr = netip.MustParseAddr("8.8.4.4")

// fate is where a packet of the guest came out.
type fate struct {
	protocol uint8
	to       netip.AddrPort
	verdict  verdict
}

// fates collects them.
type fates struct {
	mu  sync.Mutex
	all map[fate]bool
}

func (f *fates) add(x fate) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all[x] = true
}

func (f *fates) has(x fate) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.all[x]
}

// TestKernelAgrees gives random policies to a slot, one after the other, and
// proves that the kernel does with packets what the model says.
func TestKernelAgrees(t *testing.T) {
	withIPv6(t)
	rounds := 40
	if os.Getenv("CAY_NIGHTLY") == "1" {
		rounds = 2000
	}
	p := testPool(t, "model", func(p *Pool) { p.Limits.PerSecond = 1 << 20 })
	s, other := acquire(t, p, true), acquire(t, p, true)
	wan := newTap(t, world, "wan0")
	d, err := p.Divert(t.Context(), s.Index)
	if err != nil {
		t.Fatal(err)
	}
	got := fates{all: map[fate]bool{}}
	var done sync.WaitGroup
	defer done.Wait()
	defer d.Close()
	for v, l := range map[verdict]net.Listener{streamed: d.TCP, resolved: d.DNSTCP} {
		done.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				if to, err := Destination(c); err == nil {
					got.add(fate{unix.IPPROTO_TCP, to, v})
				}
				c.(*net.TCPConn).SetLinger(0)
				c.Close()
			}
		})
	}
	done.Go(func() {
		for b := make([]byte, 100); ; {
			n, _, err := d.DNS.ReadFrom(b)
			if err != nil {
				return
			}
			if to, err := netip.ParseAddrPort(string(b[:n])); err == nil {
				got.add(fate{unix.IPPROTO_UDP, to, resolved})
			}
		}
	})
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("CAY_SEED"); text != "" {
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("CAY_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 2))
	late := map[fate]bool{} // what may still come of the round before
	for round := range rounds {
		e := randomPolicy(r)
		if err := p.SetPolicy(t.Context(), s.Index, e); err != nil {
			t.Fatalf("%+v: %v", e, err)
		}
		want := map[fate]bool{}
		targets := randomTargets(r, e, 24)
		err := in(t, s.NetNS, func() error {
			for _, to := range targets {
				icmp := uint8(unix.IPPROTO_ICMP)
				if to.Addr().Is6() {
					icmp = unix.IPPROTO_ICMPV6
				}
				for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, icmp} {
					at := to
					if protocol == icmp {
						at = netip.AddrPortFrom(to.Addr(), 0)
					}
					if v := naive(e, protocol, at); v != refused {
						want[fate{protocol, at, v}] = true
					}
					send(protocol, at)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		// What comes last, from a slot without a policy.
		marker := fate{unix.IPPROTO_UDP, netip.AddrPortFrom(markerAddr, uint16(1+round)), passed}
		want[marker] = true
		in(t, other.NetNS, func() error { send(marker.protocol, marker.to); return nil })
		collect := func() {
			for _, seen := range wan.take() {
				// Of a connection only what opens it: those of tests before may
				// still be ending. And no neighbour of the machine's.
				mine := seen.src == uplinkAddr || seen.src == uplink6 && seen.dst.IsGlobalUnicast() && seen.dst != world6
				if mine && (seen.proto != unix.IPPROTO_TCP || seen.opens) {
					got.add(fate{seen.proto, netip.AddrPortFrom(seen.dst, seen.dport), passed})
				}
			}
		}
		missing := func() (out []fate) {
			collect()
			for x := range want {
				if !got.has(x) {
					out = append(out, x)
				}
			}
			return out
		}
		for end := time.Now().Add(30 * time.Second); len(missing()) > 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("round %d, %s: these did not come: %+v", round, describe(e), missing())
			}
		}
		got.mu.Lock()
		for x := range got.all {
			if !want[x] && !late[x] {
				t.Errorf("round %d, %s: %+v, which the model does not say", round, describe(e), x)
			}
		}
		clear(got.all)
		got.mu.Unlock()
		late = maps.Clone(want)
		if t.Failed() {
			return
		}
	}
}

func describe(e cay.Egress) string {
	return fmt.Sprintf("deny %v allow %v names %v rules %d proxy %v", e.Deny, e.Allow, e.AllowNames, len(e.Rules), e.Proxy != nil)
}

// send sends one packet, from the calling thread's namespace, and waits for
// nothing. A datagram says where it goes.
func send(protocol uint8, to netip.AddrPort) {
	kind := map[uint8]int{unix.IPPROTO_TCP: unix.SOCK_STREAM, unix.IPPROTO_UDP: unix.SOCK_DGRAM, unix.IPPROTO_ICMP: unix.SOCK_RAW, unix.IPPROTO_ICMPV6: unix.SOCK_RAW}[protocol]
	fd, err := unix.Socket(family(to.Addr()), kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(protocol))
	if err != nil {
		return
	}
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	echo := []byte{128, 0, 0, 0, 0, 0, 0, 0} // the kernel sums it
	if to.Addr().Is4() {
		sa, echo = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}, []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0}
	}
	switch protocol {
	case unix.IPPROTO_TCP:
		// The close would take back a SYN that has not gone; on this path it has.
		_ = unix.Connect(fd, sa)
	case unix.IPPROTO_UDP:
		_ = unix.Sendto(fd, []byte(to.String()), 0, sa)
	default:
		if to.Addr().Is6() { // a raw socket takes no port
			sa = &unix.SockaddrInet6{Addr: to.Addr().As16()}
		}
		_ = unix.Sendto(fd, echo, 0, sa)
	}
	unix.Close(fd)
}
