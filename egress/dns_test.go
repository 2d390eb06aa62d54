package egress

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/cayhq/cay"
)

// TestDNS is N-3: what the resolver answers, and that no other name leaves the
// node.
func TestDNS(t *testing.T) {
	names := []string{"api.example.com A 5.5.5.5", "api.example.com A 5.5.5.6", "api.example.com AAAA 2a00::5", "api.example.com TXT hello",
		"alias.example.com CNAME one.other.example", "one.other.example CNAME two.other.example", "two.other.example A 7.7.7.7",
		"lazy.example.com CNAME two.other.example", "private.example.com A 192.168.1.1", "mixed.example.com A 10.1.1.1", "mixed.example.com A 8.8.8.8",
		"hidden.example.com CNAME inside.other.example", "inside.other.example A 169.254.169.254", "loop.example.com CNAME loop2.example.com",
		"loop2.example.com CNAME loop.example.com", "evil.example A 6.6.6.6", "only6.example.com AAAA 2a00::6"}
	for i := range 60 {
		names = append(names, fmt.Sprintf("many.example.com A 9.9.9.%d", i+1))
	}
	w := newWorld(t, names...)
	s := newServer(t, w)
	in := attach(t, w, s, onlyNames("*.example.com"))

	const (
		ok       = dnsmessage.RCodeSuccess
		none     = dnsmessage.RCodeNameError
		refused  = dnsmessage.RCodeRefused
		failed   = dnsmessage.RCodeServerFailure
		a, aaaa  = dnsmessage.TypeA, dnsmessage.TypeAAAA
		txt, any = dnsmessage.TypeTXT, dnsmessage.TypeALL
	)
	for _, tc := range []struct {
		name  string
		typ   dnsmessage.Type
		rcode dnsmessage.RCode
		want  []string
	}{
		{"api.example.com.", a, ok, []string{"5.5.5.5", "5.5.5.6"}},
		{"API.Example.com.", a, ok, []string{"5.5.5.5", "5.5.5.6"}},
		{"api.example.com.", aaaa, ok, nil}, // the guest has no IPv6
		{"only6.example.com.", aaaa, ok, nil},
		{"only6.example.com.", a, ok, nil},
		{"alias.example.com.", a, ok, []string{"7.7.7.7"}},
		{"lazy.example.com.", a, ok, []string{"7.7.7.7"}},
		{"loop.example.com.", a, failed, nil},
		{"none.example.com.", a, none, nil},
		{"private.example.com.", a, ok, nil},
		{"hidden.example.com.", a, ok, nil},
		{"mixed.example.com.", a, ok, []string{"8.8.8.8"}},
		{"evil.example.", a, none, nil},
		{"example.com.", a, none, nil},
		{".", a, none, nil},
		{"two.other.example.", a, none, nil}, // an alias's target is not allowed by it
		{"c2VjcmV0.evil.example.", txt, none, nil},
		{"api.example.com.", txt, refused, nil},
		{"api.example.com.", any, refused, nil},
		{"api.example.com.", dnsmessage.TypeMX, refused, nil},
		{"api.example.com.", dnsmessage.TypeNS, refused, nil},
		{"api.example.com.", dnsmessage.Type(10), refused, nil}, // NULL
		{"api.example.com.", dnsmessage.TypeHTTPS, ok, nil},
		{"api.example.com.", dnsmessage.TypeSVCB, ok, nil},
		{"5.5.5.5.in-addr.arpa.", dnsmessage.TypePTR, none, nil},
		{"a\\b.example.com.", a, none, nil},
	} {
		m := in.ask(tc.name, tc.typ, false)
		if m.RCode != tc.rcode || !slices.Equal(addressesIn(m), tc.want) {
			t.Errorf("%s %s: %s %v, want %s %v", tc.name, tc.typ, m.RCode, addressesIn(m), tc.rcode, tc.want)
		}
		if !m.Response || m.ID != 7 || !m.RecursionAvailable || len(m.Questions) != 1 || m.Questions[0].Name.String() != tc.name {
			t.Errorf("%s: the header or the question is wrong: %+v", tc.name, m.Header)
		}
	}
	for _, name := range w.queries() {
		if !strings.HasSuffix(name, ".example.com") && name != "two.other.example" { // that one is where an alias leads
			t.Errorf("the node asked for %s", name)
		}
	}

	// More than a datagram holds: cut, whole by TCP, and whole with EDNS as far
	// as 1,232 bytes go.
	m := in.ask("many.example.com.", a, false)
	if !m.Truncated {
		t.Error("60 addresses fit 512 bytes")
	}
	if m = in.ask("many.example.com.", a, true); m.Truncated || len(m.Answers) != 60 {
		t.Errorf("with EDNS: %d addresses, truncated %t", len(m.Answers), m.Truncated)
	}
	c, err := net.Dial("tcp4", in.dnsTCP)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 2 {
		q := query(t, "many.example.com.", a, false)
		_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...))
		b, err := readFramed(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Unpack(b); err != nil || len(m.Answers) != 60 {
			t.Errorf("by TCP: %d addresses, %v", len(m.Answers), err)
		}
	}

	// A refusal says why to whoever can read it, and is reported.
	in.refused()
	m = in.ask("evil.example.", a, true)
	opt, isOPT := m.Additionals[0].Body.(*dnsmessage.OPTResource)
	if !isOPT || len(opt.Options) != 1 || opt.Options[0].Code != optExtendedErr || !strings.Contains(string(opt.Options[0].Data), "policy") {
		t.Errorf("the answer explains nothing: %+v", m.Additionals)
	}
	if r := in.refused(); len(r) != 1 || r[0].Protocol != "dns" || r[0].Name != "evil.example." || r[0].Rule != ruleNames {
		t.Errorf("reported: %+v", r)
	}
	in.ask("private.example.com.", a, false)
	if r := in.refused(); len(r) != 1 || r[0].Rule != ruleAlways || r[0].Destination.Addr() != netip.MustParseAddr("192.168.1.1") {
		t.Errorf("reported: %+v", r)
	}
}

// Without deny-all every name and type is answered, but what hides names or
// leads inside.
func TestDNSOpen(t *testing.T) {
	w := newWorld(t, "any.example A 5.5.5.5", "any.example TXT hello", "in.example A 10.0.0.1")
	in := attach(t, w, newServer(t, w), cay.Egress{Rules: []cay.EgressRule{{Name: "rule.example"}}})
	if got := addressesIn(in.ask("any.example.", dnsmessage.TypeA, false)); !slices.Equal(got, []string{"5.5.5.5"}) {
		t.Errorf("A: %v", got)
	}
	m := in.ask("any.example.", dnsmessage.TypeTXT, false)
	if len(m.Answers) != 1 || m.Answers[0].Body.(*dnsmessage.TXTResource).TXT[0] != "hello" {
		t.Errorf("TXT: %+v", m.Answers)
	}
	if m := in.ask("any.example.", dnsmessage.TypeHTTPS, false); m.RCode != dnsmessage.RCodeSuccess || len(m.Answers) != 0 {
		t.Errorf("HTTPS: %+v", m)
	}
	if got := addressesIn(in.ask("in.example.", dnsmessage.TypeA, false)); len(got) != 0 {
		t.Errorf("a private address is told: %v", got)
	}
}

func TestDNSWithIPv6(t *testing.T) {
	w := newWorld(t, "six.example AAAA 2a00::6", "six.example AAAA fe80::1")
	s := newServer(t, w)
	in := &island{t: t, w: w, server: s, id: cay.NewExecutionID()}
	g := in.guest(t, onlyNames("six.example"))
	g.IPv6 = true
	if err := s.Attach(g); err != nil {
		t.Fatal(err)
	}
	if got := addressesIn(in.ask("six.example.", dnsmessage.TypeAAAA, false)); !slices.Equal(got, []string{"2a00::6"}) {
		t.Errorf("AAAA: %v", got)
	}
}

// What is no query gets no answer, and what is not understood says so.
func TestDNSMalformed(t *testing.T) {
	two, _ := (&dnsmessage.Message{Questions: []dnsmessage.Question{
		{Name: dnsmessage.MustNewName("a."), Type: 1, Class: 1}, {Name: dnsmessage.MustNewName("b."), Type: 1, Class: 1}}}).Pack()
	good := query(t, "a.example.", dnsmessage.TypeA, true)
	response := slices.Clone(good)
	response[2] |= 0x80
	update := slices.Clone(good)
	update[2] |= 5 << 3
	chaos := slices.Clone(query(t, "a.example.", dnsmessage.TypeA, false))
	chaos[len(chaos)-1] = 3
	for _, tc := range []struct {
		what  string
		query []byte
		want  dnsmessage.RCode // 99 is no answer
	}{
		{"empty", nil, 99}, {"short", good[:11], 99}, {"a response", response, 99},
		{"no question", good[:12:12], dnsmessage.RCodeFormatError}, {"two questions", two, dnsmessage.RCodeFormatError},
		{"half a question", good[:16], dnsmessage.RCodeFormatError}, {"half an OPT", good[:len(good)-3], dnsmessage.RCodeFormatError},
		{"an update", update, dnsmessage.RCodeNotImplemented}, {"class CHAOS", chaos, dnsmessage.RCodeRefused},
	} {
		got := dnsmessage.RCode(99)
		if r, ok := parseQuery(tc.query, true); ok {
			got = r.msg.RCode
			if len(r.pack()) < 12 {
				t.Errorf("%s: the answer cannot be packed", tc.what)
			}
		}
		if got != tc.want {
			t.Errorf("%s: %d, want %d", tc.what, got, tc.want)
		}
	}
}

// A guest that asks too often is told so, and it is reported once.
func TestDNSLimit(t *testing.T) {
	w := newWorld(t, "a.example A 5.5.5.5")
	s := newServer(t, w)
	s.Limits.Queries = 1
	in := attach(t, w, s, onlyNames("a.example"))
	var failures int
	for range 20 {
		if in.ask("a.example.", dnsmessage.TypeA, false).RCode == dnsmessage.RCodeServerFailure {
			failures++
		}
	}
	if failures < 10 {
		t.Errorf("of 20 queries at once %d were over a limit of 1 per second", failures)
	}
	if n := len(w.queries()); n > 10 {
		t.Errorf("%d queries left the node", n)
	}
	if n := len(in.refused()); n == 0 || n > 8 {
		t.Errorf("%d reports of the limit", n)
	}
}

// A name server that does not answer is followed by the next one; none at all
// is a failure, not a wait for ever.
func TestResolverFailover(t *testing.T) {
	dead, err := net.ListenPacket("udp4", "127.0.0.1:0") // it never answers
	if err != nil {
		t.Fatal(err)
	}
	defer dead.Close()
	closed := netip.MustParseAddrPort("127.0.0.1:1")
	w := newWorld(t, "a.example A 5.5.5.5")
	r := resolver{servers: []netip.AddrPort{closed, w.resolver}}
	got, err := r.addresses(t.Context(), "a.example", dnsmessage.TypeA)
	if err != nil || len(got.list) != 1 {
		t.Errorf("after a closed port: %v, %v", got, err)
	}
	if _, err := (&resolver{servers: []netip.AddrPort{closed}}).addresses(t.Context(), "a.example", dnsmessage.TypeA); err == nil {
		t.Error("no server, no error")
	}
	if _, err := (&resolver{}).addresses(t.Context(), "a.example", dnsmessage.TypeA); err == nil {
		t.Error("no server at all, no error")
	}
	began := time.Now()
	if _, err := (&resolver{servers: []netip.AddrPort{dead.LocalAddr().(*net.UDPAddr).AddrPort()}}).addresses(t.Context(), "a.example", dnsmessage.TypeA); err == nil {
		t.Error("a silent server, no error")
	}
	if d := time.Since(began); d > 30*time.Second {
		t.Errorf("a silent server held the question for %s", d)
	}
}

// An answer to another question, or with another ID, is not taken.
func TestResolverForgedAnswer(t *testing.T) {
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	go func() {
		buf := make([]byte, 4096)
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:n]) != nil {
			return
		}
		q := m.Questions[0]
		send := func(id uint16, name, addr string) {
			n := dnsmessage.MustNewName(name)
			b, _ := (&dnsmessage.Message{Header: dnsmessage.Header{ID: id, Response: true},
				Questions: []dnsmessage.Question{{Name: n, Type: q.Type, Class: q.Class}},
				Answers: []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: n, Class: q.Class, TTL: 60},
					Body: &dnsmessage.AResource{A: netip.MustParseAddr(addr).As4()}}}}).Pack()
			_, _ = pc.WriteTo(b, from)
		}
		send(m.ID+1, q.Name.String(), "6.6.6.6")
		send(m.ID, "other.example.", "6.6.6.6")
		_, _ = pc.WriteTo([]byte("nonsense"), from)
		send(m.ID, q.Name.String(), "5.5.5.5")
	}()
	r := resolver{servers: []netip.AddrPort{pc.LocalAddr().(*net.UDPAddr).AddrPort()}}
	got, err := r.addresses(t.Context(), "a.example", dnsmessage.TypeA)
	if err != nil || len(got.list) != 1 || got.list[0] != netip.MustParseAddr("5.5.5.5") {
		t.Errorf("got %v, %v", got, err)
	}
}
