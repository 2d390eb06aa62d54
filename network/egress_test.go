package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

func prefixes(texts ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range texts {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

var (
	otherAddr = netip.MustParseAddr("93.184.216.35")
	onlyOne   = cay.Egress{Deny: prefixes("0.0.0.0/0"), Allow: prefixes(publicAddr.String() + "/32")}
	named     = cay.Egress{Deny: prefixes("0.0.0.0/0"), Allow: prefixes(otherAddr.String() + "/32"), AllowNames: []string{"example.com"}}
)

// reach tries a destination from a slot.
func reach(t *testing.T, s Slot, network string, to netip.Addr) error {
	t.Helper()
	return in(t, s.NetNS, func() error {
		_, err := ask(t.Context(), network, netip.AddrPortFrom(to, 80).String())
		return err
	})
}

// TestPolicy proves what each policy lets out, and that a slot has the policy
// it was given last and nothing of another's.
func TestPolicy(t *testing.T) {
	p := testPool(t, "pol")
	for _, a := range []netip.Addr{publicAddr, otherAddr} {
		serve(t, world, a.String()+":80")
	}
	for _, tt := range []struct {
		name          string
		e             cay.Egress
		public, other bool
	}{
		{"open", cay.Egress{}, true, true},
		{"closed", closed, false, false},
		{"allow one", onlyOne, true, false},
		{"deny one", cay.Egress{Deny: prefixes(publicAddr.String() + "/32")}, false, true},
		{"deny a range but for one", cay.Egress{Deny: prefixes("93.184.216.0/24"), Allow: prefixes(otherAddr.String() + "/32")}, false, true},
		{"allow wins over deny", cay.Egress{Deny: prefixes("93.184.216.34/32"), Allow: prefixes("93.0.0.0/8")}, true, true},
		{"the other family", cay.Egress{Deny: prefixes("::/0")}, true, true},
		{"overlapping and twice", cay.Egress{Deny: prefixes("93.184.0.0/16", "93.184.216.0/24", "93.184.216.0/24", "93.184.217.0/24", "0.0.0.0/0"),
			Allow: prefixes("93.184.216.34/31", "93.184.216.34/32")}, true, true},
		{"halves that touch", cay.Egress{Deny: prefixes("0.0.0.0/1", "128.0.0.0/1")}, false, false},
		{"the end of the range", cay.Egress{Deny: prefixes("255.255.255.255/32", "0.0.0.0/32")}, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fresh, err := p.Acquire(t.Context(), tt.e)
			if err != nil {
				t.Fatal(err)
			}
			changed := acquire(t, p, true)
			for _, was := range []cay.Egress{closed, onlyOne, named, {}} {
				if err := p.SetPolicy(t.Context(), changed.Index, was); err != nil {
					t.Fatal(err)
				}
			}
			if err := p.SetPolicy(t.Context(), changed.Index, tt.e); err != nil {
				t.Fatal(err)
			}
			for _, s := range []Slot{fresh, changed} {
				for _, network := range []string{"tcp4", "udp4"} {
					for a, want := range map[netip.Addr]bool{publicAddr: tt.public, otherAddr: tt.other} {
						if err := reach(t, s, network, a); (err == nil) != want {
							t.Errorf("%s to %s: %v, want reached %v", network, a, err, want)
						}
					}
				}
				if err := p.Release(t.Context(), s.Index); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestPolicyOutlivesServer proves that a policy stays when the server goes,
// and can be changed by the next.
func TestPolicyOutlivesServer(t *testing.T) {
	first := testPool(t, "polb")
	serve(t, world, publicAddr.String()+":80")
	serve(t, world, otherAddr.String()+":80")
	s, err := first.Acquire(t.Context(), onlyOne)
	if err != nil {
		t.Fatal(err)
	}
	n, err := first.Acquire(t.Context(), named)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second := again(first)
	if err := second.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	check := func(when string) {
		t.Helper()
		if err := reach(t, s, "tcp4", publicAddr); err != nil {
			t.Errorf("%s, what is allowed: %v", when, err)
		}
		if err := reach(t, s, "tcp4", otherAddr); err == nil {
			t.Errorf("%s, what is denied is reached", when)
		}
		// Nobody serves names yet, so what needs them is refused.
		if err := reach(t, n, "tcp4", publicAddr); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s, by name: %v", when, err)
		}
	}
	check("without a server")
	for _, slot := range []Slot{s, n} {
		if err := second.SetPolicy(t.Context(), slot.Index, cay.Egress{}); err == nil {
			t.Error("the policy of a slot that is not adopted was changed")
		}
		if _, err := second.Adopt(t.Context(), slot.Index); err != nil {
			t.Fatal(err)
		}
	}
	check("adopted")
	if err := second.SetPolicy(t.Context(), s.Index, cay.Egress{}); err != nil {
		t.Fatal(err)
	}
	if err := reach(t, s, "tcp4", otherAddr); err != nil {
		t.Errorf("opened by the next server: %v", err)
	}
}

// stream is a connection from a slot to an echo, over which bytes have gone.
type stream struct{ net.Conn }

func open(t *testing.T, s Slot, network string, to netip.AddrPort) stream {
	t.Helper()
	var c net.Conn
	err := in(t, s.NetNS, func() (err error) {
		c, err = (&net.Dialer{Timeout: 3 * time.Second}).Dial(network, to.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	st := stream{c}
	if err := st.echo(); err != nil {
		t.Fatalf("to %s over %s: %v", to, network, err)
	}
	return st
}

func (s stream) echo() error {
	word := fmt.Sprint(time.Now().UnixNano())
	if err := s.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(s, word); err != nil {
		return err
	}
	b := make([]byte, 2048)
	for got := ""; !strings.HasSuffix(got, word); {
		n, err := s.Read(b)
		if err != nil {
			return err
		}
		got += string(b[:n])
	}
	return nil
}

// TestPolicyCutsConnections proves that a change counts for what is open: what
// is refused now, or has to go another way now, is cut; the rest runs on.
func TestPolicyCutsConnections(t *testing.T) {
	p := testPool(t, "cut")
	for _, a := range []netip.Addr{publicAddr, otherAddr} {
		serve(t, world, a.String()+":80")
	}
	for name, e := range map[string]cay.Egress{
		"by address": {Deny: prefixes("0.0.0.0/0"), Allow: prefixes(otherAddr.String() + "/32")},
		"by name":    named,
	} {
		t.Run(name, func(t *testing.T) {
			s := acquire(t, p, true)
			serve(t, openFile(t, s.NetNS), "0.0.0.0:49983")
			in, err := net.Dial("tcp4", s.Addr.String()+":49983")
			if err != nil {
				t.Fatal(err)
			}
			defer in.Close()
			type way struct {
				network string
				to      netip.Addr
			}
			all := map[way]stream{}
			for _, w := range []way{{"tcp4", publicAddr}, {"udp4", publicAddr}, {"tcp4", otherAddr}, {"udp4", otherAddr}} {
				all[w] = open(t, s, w.network, netip.AddrPortFrom(w.to, 80))
			}
			if err := p.SetPolicy(t.Context(), s.Index, e); err != nil {
				t.Fatal(err)
			}
			for w, c := range all {
				runs := w.to == otherAddr && (w.network == "udp4" || !e.Named())
				if err := c.echo(); (err == nil) != runs {
					t.Errorf("%s to %s after the change: %v, want it to run on: %v", w.network, w.to, err, runs)
				}
			}
			if err := (stream{in}).echo(); err != nil {
				t.Errorf("the host's connection to the guest: %v", err)
			}
		})
	}
}

// TestDivert proves that a policy with names turns connections and queries over
// to the listeners, with where they were to go, and nothing around them.
func TestDivert(t *testing.T) {
	p := testPool(t, "div")
	for _, a := range []netip.Addr{publicAddr, otherAddr} {
		serve(t, world, a.String()+":80")
		serve(t, world, a.String()+":443")
		serve(t, world, a.String()+":53")
	}
	s, err := p.Acquire(t.Context(), named)
	if err != nil {
		t.Fatal(err)
	}
	wan := newTap(t, world, "wan0")
	at := func(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }
	try := func(network, to string) (got string, err error) {
		err = in(t, s.NetNS, func() (err error) { got, err = ask(t.Context(), network, to); return err })
		return got, err
	}
	for _, to := range []string{at(publicAddr, 80), at(otherAddr, 80), at(publicAddr, 53)} {
		if _, err := try("tcp4", to); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("to %s while nobody listens: %v", to, err)
		}
	}
	d, err := p.Divert(t.Context(), s.Index)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, l := range []net.Listener{d.TCP, d.DNSTCP} {
		name := map[bool]string{true: "stream", false: "query"}[l == d.TCP]
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.Copy(io.Discard, c) // or the close is a reset
				to, err := Destination(c)
				fmt.Fprintf(c, "%s to %s from %s %v", name, to, c.RemoteAddr().(*net.TCPAddr).IP, err)
				c.Close()
			}
		}()
	}
	go func() {
		for b := make([]byte, 512); ; {
			n, from, err := d.DNS.ReadFrom(b)
			if err != nil {
				return
			}
			d.DNS.WriteTo(append([]byte("answer to "), b[:n]...), from)
		}
	}()
	for _, tt := range []struct{ network, to, want string }{
		{"tcp4", at(publicAddr, 80), "stream to 93.184.216.34:80 from 169.254.0.21 <nil>"},
		{"tcp4", at(publicAddr, 22), "stream to 93.184.216.34:22 from 169.254.0.21 <nil>"},
		{"tcp4", at(otherAddr, 443), "stream to 93.184.216.35:443 from 169.254.0.21 <nil>"},
		{"tcp4", at(publicAddr, 53), "query to 93.184.216.34:53 from 169.254.0.21 <nil>"},
		{"udp4", at(publicAddr, 53), "answer to hello"},
		{"udp4", at(otherAddr, 53), "answer to hello"},
		{"udp4", at(otherAddr, 443), uplinkAddr.String() + " hello"}, // by address
	} {
		if got, err := try(tt.network, tt.to); err != nil || got != tt.want {
			t.Errorf("%s to %s: %q, %v, want %q", tt.network, tt.to, got, err, tt.want)
		}
	}
	for _, tt := range []struct{ network, to string }{
		{"udp4", at(publicAddr, 443)}, {"udp4", at(publicAddr, 80)},
		{"tcp4", "169.254.169.254:80"}, {"tcp4", "10.0.0.1:80"}, {"udp4", "10.0.0.2:53"},
		{"tcp4", at(gatewayAddr, StreamPort)}, {"tcp4", at(gatewayAddr, ResolverPort)}, {"tcp4", at(s.Addr, StreamPort)},
	} {
		if got, err := try(tt.network, tt.to); err == nil {
			t.Errorf("%s to %s: %q", tt.network, tt.to, got)
		}
	}

	// Nobody else comes to the listeners.
	for _, port := range []uint16{StreamPort, ResolverPort} {
		if c, err := net.DialTimeout("tcp4", at(s.Addr, port), time.Second); err == nil {
			c.Close()
			t.Errorf("the host reaches port %d of the router", port)
		}
	}

	// The server's way out, past both walls.
	c, err := p.Dial(t.Context(), s.Index, netip.AddrPortFrom(publicAddr, 80))
	if err != nil {
		t.Fatal(err)
	}
	if err := (stream{c}).echo(); err != nil {
		t.Errorf("over the way out: %v", err)
	}
	c.Close()
	hits := canary(t)
	for _, a := range refusedDestinations(s.Addr, p.addresses(s.Index).host, gatewayAddr) {
		ctx, stop := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if c, err := p.Dial(ctx, s.Index, netip.AddrPortFrom(a, canaryPort)); err == nil {
			t.Errorf("the way out leads to %s", a)
			c.Close()
		}
		stop()
	}
	if n := hits.Load(); n != 0 {
		t.Errorf("%d connections reached the host's listeners", n)
	}
	marker := netip.AddrPortFrom(otherAddr, 9)
	in(t, s.NetNS, func() error { shout(marker); return nil })
	for _, seen := range wan.await(t, marker) {
		through := seen.dst == publicAddr && seen.proto == unix.IPPROTO_TCP && seen.dport == 80 // Dial
		stale := seen.src == publicAddr                                                         // the world's own, to a slot of an earlier test
		if seen.dst != otherAddr && !through && !stale && !ownLink(seen) {
			t.Errorf("left the host: %s", seen)
		}
	}
	// A destination that takes nothing costs no thread and ends with its context.
	ctx, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	if _, err := p.Dial(ctx, s.Index, netip.AddrPortFrom(publicAddr, 81)); err == nil {
		t.Error("a closed port is open")
	}
}

// refusals waits until a slot's log holds what want accepts.
func refusals(t *testing.T, p *Pool, s Slot, want func([]cay.EgressRefusal) bool) []cay.EgressRefusal {
	t.Helper()
	var got []cay.EgressRefusal
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		var err error
		if got, err = p.Refusals(t.Context(), s.Index, 0); err != nil {
			t.Fatal(err)
		}
		if want(got) {
			return got
		}
	}
	t.Fatalf("the log does not become what it should: %+v", got)
	return nil
}

// TestRefusals proves that every refusal is in the log of its own slot with
// destination, protocol and rule.
func TestRefusals(t *testing.T) {
	p := testPool(t, "log", func(p *Pool) { p.Refuse = prefixes("44.0.0.0/8") })
	s, err := p.Acquire(t.Context(), cay.Egress{Deny: prefixes("93.0.0.0/8", "93.184.216.0/24"), AllowNames: []string{"example.com"}})
	if err != nil {
		t.Fatal(err)
	}
	plain, err := p.Acquire(t.Context(), cay.Egress{Deny: prefixes("93.0.0.0/8", "93.184.216.0/24")})
	if err != nil {
		t.Fatal(err)
	}
	type line struct{ protocol, to, rule, reason string }
	for _, tt := range []struct {
		slot    Slot
		network string
		to      string
		want    line
	}{
		{plain, "tcp4", "93.184.216.34:80", line{"tcp", "93.184.216.34:80", "93.184.216.0/24", "the sandbox's policy denies it"}},
		{plain, "udp4", "93.1.1.1:5000", line{"udp", "93.1.1.1:5000", "93.0.0.0/8", "the sandbox's policy denies it"}},
		{plain, "tcp4", "169.254.169.254:80", line{"tcp", "169.254.169.254:80", "always refused", "link local (RFC 3927); holds the metadata service 169.254.169.254"}},
		{plain, "tcp4", "44.1.1.1:80", line{"tcp", "44.1.1.1:80", "always refused", "the operator refuses it"}},
		{plain, "tcp4", s.Addr.String() + ":80", line{"tcp", s.Addr.String() + ":80", "always refused", "an address of the sandboxes of this machine"}},
		{plain, "ip4:icmp", "93.1.1.2", line{"icmp", "93.1.1.2:0", "93.0.0.0/8", "the sandbox's policy denies it"}},
		{s, "udp4", "8.8.8.8:443", line{"udp", "8.8.8.8:443", "names", "the policy decides by names, and QUIC hides them"}},
	} {
		for range 3 {
			in(t, tt.slot.NetNS, func() error {
				c, err := net.DialTimeout(tt.network, tt.to, time.Second)
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write([]byte("\x08\x00\xf7\xff\x00\x00\x00\x00"))
				return err
			})
		}
		refusals(t, p, tt.slot, func(all []cay.EgressRefusal) bool {
			return slices.ContainsFunc(all, func(r cay.EgressRefusal) bool {
				return line{r.Protocol, r.Destination.String(), r.Rule, r.Reason} == tt.want && r.Count >= 3 && !r.First.After(r.Last)
			})
		})
	}
	for _, slot := range []Slot{s, plain} {
		all, err := p.Refusals(t.Context(), slot.Index, 0)
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range all {
			if i > 0 && r.Seq <= all[i-1].Seq {
				t.Errorf("out of order: %+v", all)
			}
			if slot == s && strings.HasPrefix(r.Destination.String(), "93.") {
				t.Errorf("another slot's refusal: %+v", r)
			}
		}
		last := all[len(all)-1].Seq
		if later, err := p.Refusals(t.Context(), slot.Index, last); err != nil || len(later) != 0 {
			t.Errorf("after the last: %+v, %v", later, err)
		}
		if most, err := p.Refusals(t.Context(), slot.Index, all[0].Seq); err != nil || len(most) != len(all)-1 {
			t.Errorf("after the first: %d of %d, %v", len(most), len(all), err)
		}
	}
}

// TestRefusalsByHost proves that what only the host's wall knows is in the log
// too: the machine's own addresses.
func TestRefusalsByHost(t *testing.T) {
	p := testPool(t, "logh")
	other := testPool(t, "logi", func(q *Pool) { q.StateDir = p.StateDir }) // with a group of its own
	for _, pool := range []*Pool{p, other} {
		s := acquire(t, pool, true)
		reach(t, s, "tcp4", uplinkAddr)
		refusals(t, pool, s, func(all []cay.EgressRefusal) bool {
			return len(all) == 1 && all[0].Destination == netip.AddrPortFrom(uplinkAddr, 80) && all[0].Rule == "always refused" &&
				strings.Contains(all[0].Reason, "the machine")
		})
	}
	if p.group == other.group {
		t.Errorf("both pools have group %d", p.group)
	}
}

func TestRefusalLog(t *testing.T) {
	var l refusalLog
	at := func(n int) cay.EgressRefusal {
		return cay.EgressRefusal{First: time.Unix(int64(n), 0), Protocol: "tcp", Rule: "r",
			Destination: netip.AddrPortFrom(netip.AddrFrom4([4]byte{1, 2, byte(n >> 8), byte(n)}), 80)}
	}
	if got := l.after(0); len(got) != 0 {
		t.Errorf("an empty log has %+v", got)
	}
	for n := range maxRefusals + 5 {
		l.add(at(n))
	}
	l.add(at(10))
	got := l.after(0)
	if len(got) != maxRefusals || len(l.at) != maxRefusals {
		t.Fatalf("%d lines, %d keys", len(got), len(l.at))
	}
	last := got[len(got)-1]
	if last.Count != 2 || last.Seq != maxRefusals+6 || last.Destination != at(10).Destination || !last.First.Equal(time.Unix(10, 0)) {
		t.Errorf("the last is %+v", last)
	}
	if got[0].Destination != at(5).Destination {
		t.Errorf("the first is %+v", got[0])
	}
	l.add(at(4)) // was forgotten: counts anew
	if got := l.after(last.Seq); len(got) != 1 || got[0].Count != 1 {
		t.Errorf("after the last: %+v", got)
	}
}
