package egress

import (
	"bytes"
	"context"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// said is a connection that says b and then ends.
type said struct {
	sink
	rest *bytes.Reader
}

func (s *said) Read(p []byte) (int, error) { return s.rest.Read(p) }

func says(b []byte) *said { return &said{rest: bytes.NewReader(b)} }

// FuzzHello: a name is canonical and never an address; what was read is kept
// in order, so that it can be passed on; nothing is answered; a name stays the
// same when more follows, and cannot come from less than the whole.
func FuzzHello(f *testing.F) {
	for _, n := range []string{"api.example.com", "a.b", "", "xn--mnchen-3ya.example"} {
		f.Add(hello(f, n))
	}
	f.Add(withExtension(hello(f, "api.example.com"), extensionECH, []byte{0, 0, 1}))
	f.Add([]byte{0x16, 3, 1, 0, 0})
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := says(b)
		s := readHello(c)
		checkSniffed(t, b, s)
		if c.Len() > 0 {
			t.Errorf("%q was answered", c.Bytes())
		}
		if s.name != "" && len(b) < maxSniff/2 {
			if more := readHello(says(append(bytes.Clone(b), 0, 1, 2))); more.name != s.name {
				t.Errorf("with more after it the name is %q, not %q", more.name, s.name)
			}
		}
	})
}

// FuzzHead: as FuzzHello, for HTTP.
func FuzzHead(f *testing.F) {
	for _, h := range []string{"api.example.com", "a:80", "[::1]:80", "1.2.3.4", "a@b", "a\tb"} {
		f.Add(get(h))
	}
	f.Add([]byte("GET http://evil.example/ HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n"))
	f.Add([]byte("CONNECT a:1 HTTP/1.1\r\n\r\n"))
	f.Add([]byte("PRI * HTTP/2.0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) { checkSniffed(t, b, readHead(says(b))) })
}

func checkSniffed(t *testing.T, b []byte, s sniffed) {
	t.Helper()
	if !bytes.HasPrefix(b, s.head) || len(s.head) > maxSniff {
		t.Errorf("%d bytes were kept that were not said in this order", len(s.head))
	}
	if (s.name == "") == (s.why == "") {
		t.Errorf("name %q, why not: %q", s.name, s.why)
	}
	if s.name != "" {
		checkName(t, s.name)
	}
}

func checkName(t *testing.T, name string) {
	t.Helper()
	if again, ok := canonical(name); !ok || again != name {
		t.Errorf("%q is not canonical", name)
	}
	if _, err := netip.ParseAddr(name); err == nil {
		t.Errorf("%q is an address", name)
	}
	if strings.ContainsAny(name, " \t\r\n/\\:@*%") || name != strings.ToLower(name) || len(name) > maxName {
		t.Errorf("%q is no name", name)
	}
}

// FuzzNames: matching is equal to the rule as one would say it.
func FuzzNames(f *testing.F) {
	f.Add("*.example.com", "a.example.com")
	f.Add("example.com", "EXAMPLE.com.")
	f.Add("*.a", ".a")
	f.Add("*.a.a", "a.a.a.a")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		name, ok := canonical(s)
		if !ok {
			return
		}
		checkName(t, name)
		var ns names[struct{}]
		if ns.add(pattern, struct{}{}) != nil {
			return
		}
		want := name == pattern
		if suffix, wild := strings.CutPrefix(pattern, "*"); wild {
			want = strings.HasSuffix(name, suffix) && len(name) > len(suffix)
		}
		if _, got := ns.find(name); got != want {
			t.Errorf("%q fits %q: %t, want %t", name, pattern, got, want)
		}
	})
}

// FuzzDNS: every query has an answer that can be read, is no longer than may
// be, and asks nothing of the network that the policy does not have. Half of
// the bytes are what a name server answers.
func FuzzDNS(f *testing.F) {
	q := query(f, "api.example.com.", dnsmessage.TypeA, true)
	a := bytes.Clone(q)
	a[2] |= 0x80
	f.Add(q, a)
	f.Add(query(f, "evil.example.", dnsmessage.TypeTXT, false), []byte{})
	f.Add(query(f, "api.example.com.", dnsmessage.TypeHTTPS, false), a)
	f.Add([]byte{0, 1, 2}, a)
	p, err := compile(onlyNames("*.example.com"))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b, answer []byte) {
		s := &Server{Refused: special}
		g := newGuest(s, Guest{}, p)
		defer g.cancel()
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // whatever would leave the node ends here
		out := g.answer(ctx, b, true)
		if out != nil {
			var m dnsmessage.Message
			if err := m.Unpack(out); err != nil {
				t.Fatalf("an answer that cannot be read: %v", err)
			}
			if len(out) > maxDatagram || !m.Response || m.ID != uint16(b[0])<<8|uint16(b[1]) {
				t.Errorf("%d bytes, %+v", len(out), m.Header)
			}
		}
		var m dnsmessage.Message
		if m.Unpack(answer) != nil {
			return
		}
		var found addresses
		if next, _ := follow(m, "api.example.com", dnsmessage.TypeA, &found); next != "" {
			checkName(t, next)
		}
		for _, a := range found.list {
			if !a.Is4() {
				t.Errorf("an answer to A holds %s", a)
			}
		}
		if len(found.list) > maxAddresses {
			t.Errorf("%d addresses of a name", len(found.list))
		}
	})
}

// FuzzFramed: DNS over TCP reads no more than it is told.
func FuzzFramed(f *testing.F) {
	f.Add([]byte{0, 3, 1, 2, 3, 4})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		got, err := readFramed(r)
		if err == nil && (len(got) != int(b[0])<<8|int(b[1]) || r.Len() != len(b)-2-len(got)) {
			t.Errorf("%d bytes were read of %d", len(got), len(b))
		}
	})
}
