package egress

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/cayhq/cay"
)

// here answers whatever comes so that both TLS and HTTP rows understand it.
func here(c net.Conn) {
	b := make([]byte, 64<<10)
	for {
		n, err := c.Read(b)
		if err != nil {
			return
		}
		said := "here"
		if b[0] != 0x16 {
			said = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhere"
		}
		if _, err := c.Write([]byte(said)); err != nil || n == 0 {
			return
		}
	}
}

func get(host string) []byte { return []byte("GET / HTTP/1.1\r\nHost: " + host + "\r\n\r\n") }

// TestNames is N-2: what counts as a name, and what it opens.
func TestNames(t *testing.T) {
	const (
		api, api2 = "5.5.5.5", "5.5.5.6" // api.example.com
		deep      = "6.6.6.6"            // deep.sub.wild.example
		apex      = "6.6.6.7"            // wild.example
		mixed     = "6.6.6.8"            // mixed.wild.example, beside 10.0.0.1
		munich    = "7.7.7.7"            // xn--mnchen-3ya.example
		evil      = "8.8.4.4"            // evil.example, and what alias.wild.example is an alias of
		free      = "93.184.1.1"         // allowed by its address
		both      = "93.184.1.2"         // allowed by address and by name
	)
	w := newWorld(t,
		"api.example.com A "+api, "api.example.com A "+api2, "deep.sub.wild.example A "+deep, "a.wild.example A "+deep,
		"wild.example A "+apex, "mixed.wild.example A 10.0.0.1", "mixed.wild.example A "+mixed, "private.wild.example A 10.0.0.1",
		"xn--mnchen-3ya.example A "+munich, "evil.example A "+evil, "alias.wild.example CNAME evil.example",
		"free.example A "+free, "both.example A "+both, "under_score.example A "+api, "lazy.wild.example CNAME evil.example",
		"notapi.example.com A "+api, "api.example.com.evil.example A "+api, "loop.wild.example CNAME loop.wild.example")
	for _, a := range []string{api, api2, deep, apex, mixed, munich, evil, free, both} {
		for _, p := range []string{"80", "443", "22", "8080", "8443"} {
			w.serve(a+":"+p, here)
		}
	}
	s := newServer(t, w)
	names := onlyNames("api.example.com", "*.wild.example", "xn--mnchen-3ya.example", "both.example", "under_score.example")
	names.Allow = []netip.Prefix{netip.MustParsePrefix("93.184.0.0/16")}
	in := attach(t, w, s, names)

	ech := withExtension(hello(t, "api.example.com"), extensionECH, append([]byte{0, 0, 1, 0, 1, 9, 0, 32}, append(make([]byte, 32), append([]byte{0, 16}, make([]byte, 16)...)...)...))
	record := func(h []byte, at int) []byte { // a ClientHello in two records
		body := h[5:]
		out := append([]byte{0x16, 3, 1, byte(at >> 8), byte(at)}, body[:at]...)
		rest := body[at:]
		return append(append(out, 0x16, 3, 1, byte(len(rest)>>8), byte(len(rest))), rest...)
	}
	const open = ""
	for _, tc := range []struct {
		what string
		to   string
		say  []byte
		want string // part of the reason; "" is open
	}{
		// TLS
		{"exact", api + ":443", hello(t, "api.example.com"), open},
		{"second address", api2 + ":443", hello(t, "api.example.com"), open},
		{"upper case", api + ":443", hello(t, "API.Example.COM"), open},
		{"final dot is taken off by the client", api + ":443", hello(t, "api.example.com."), open},
		{"wildcard, deep", deep + ":443", hello(t, "deep.sub.wild.example"), open},
		{"wildcard, one label", deep + ":443", hello(t, "a.wild.example"), open},
		{"wildcard, apex", apex + ":443", hello(t, "wild.example"), "does not have the name"},
		{"wildcard, not a label's end", deep + ":443", hello(t, "notwild.example"), "does not have the name"},
		{"IDNA", munich + ":443", hello(t, "xn--mnchen-3ya.example"), open},
		{"IDNA upper case", munich + ":443", hello(t, "XN--MNCHEN-3YA.example"), open},
		{"underscore", api + ":443", hello(t, "under_score.example"), open},
		{"prefix of an allowed name", api + ":443", hello(t, "notapi.example.com"), "does not have the name"},
		{"allowed name as a prefix", api + ":443", hello(t, "api.example.com.evil.example"), "does not have the name"},
		{"other name", evil + ":443", hello(t, "evil.example"), "does not have the name"},
		{"allowed name, other address", evil + ":443", hello(t, "api.example.com"), "does not resolve to this address"},
		{"allowed name, address of another allowed name", deep + ":443", hello(t, "api.example.com"), "does not resolve to this address"},
		{"other name, allowed name's address", api + ":443", hello(t, "evil.example"), "does not have the name"},
		{"no SNI", api + ":443", hello(t, ""), "no SNI"},
		{"encrypted ClientHello", api + ":443", ech, "encrypted ClientHello"},
		{"ClientHello with a damaged ECH", api + ":443", withExtension(hello(t, "api.example.com"), extensionECH, []byte{9}), "ClientHello"},
		{"two records", api + ":443", record(hello(t, "api.example.com"), 50), open},
		{"two records, other name", api + ":443", record(hello(t, "evil.example"), 50), "does not have the name"},
		{"first record of one byte", api + ":443", record(hello(t, "api.example.com"), 1), open},
		{"alias of an allowed name", evil + ":443", hello(t, "alias.wild.example"), open},
		{"alias that the server does not follow", evil + ":443", hello(t, "lazy.wild.example"), open},
		{"target of an alias", evil + ":443", hello(t, "evil.example"), "does not have the name"},
		{"alias of itself", evil + ":443", hello(t, "loop.wild.example"), "does not resolve"},
		{"name that does not exist", evil + ":443", hello(t, "none.wild.example"), "does not resolve"},
		{"private address", "10.0.0.1:443", hello(t, "private.wild.example"), "always refused"},
		{"private address among others", "10.0.0.1:443", hello(t, "mixed.wild.example"), "always refused"},
		{"the other beside a private address", mixed + ":443", hello(t, "mixed.wild.example"), open},
		{"IPv4 in IPv6", "[::ffff:10.0.0.1]:443", hello(t, "mixed.wild.example"), "always refused"},
		{"IPv4 in IPv6, open", "[::ffff:" + api + "]:443", hello(t, "api.example.com"), open},
		{"metadata", "169.254.169.254:443", hello(t, "api.example.com"), "always refused"},
		{"loopback", "127.0.0.1:443", hello(t, "api.example.com"), "always refused"},
		{"HTTP on the TLS port", api + ":443", get("api.example.com"), "is not TLS"},
		{"SSH on the TLS port", api + ":443", []byte("SSH-2.0-x\r\n"), "is not TLS"},
		{"zeroes on the TLS port", api + ":443", make([]byte, 64), "is not TLS"},
		{"SSL 2 hello", api + ":443", []byte{0x80, 0x2e, 1, 0, 2, 0, 0x15, 0, 0, 0, 0x10, 1, 0, 0x80}, "is not TLS"},
		{"alert instead of hello", api + ":443", []byte{0x15, 3, 1, 0, 2, 1, 0}, "is not TLS"},
		{"record longer than any", api + ":443", []byte{0x16, 3, 1, 0xff, 0xff, 1}, "is not TLS"},
		// HTTP
		{"HTTP exact", api + ":80", get("api.example.com"), open},
		{"HTTP upper case", api + ":80", get("API.EXAMPLE.com"), open},
		{"HTTP final dot", api + ":80", get("api.example.com."), open},
		{"HTTP with port", api + ":80", get("api.example.com:80"), open},
		{"HTTP with another port", api + ":80", get("api.example.com:8080"), open},
		{"HTTP final dot and port", api + ":80", get("api.example.com.:80"), open},
		{"HTTP wildcard", deep + ":80", get("deep.sub.wild.example"), open},
		{"HTTP apex", apex + ":80", get("wild.example"), "does not have the name"},
		{"HTTP other", evil + ":80", get("evil.example"), "does not have the name"},
		{"HTTP other on an allowed address", api + ":80", get("evil.example"), "does not have the name"},
		{"HTTP allowed on another address", evil + ":80", get("api.example.com"), "does not resolve to this address"},
		{"HTTP address as Host", api + ":80", get(api), "no DNS name"},
		{"HTTP IPv6 address as Host", api + ":80", get("[::1]"), "Host"},
		{"HTTP empty Host", api + ":80", get(""), "no Host"},
		{"HTTP without Host", api + ":80", []byte("GET / HTTP/1.0\r\n\r\n"), "no Host"},
		{"HTTP/1.0 with Host", api + ":80", []byte("GET / HTTP/1.0\r\nHost: api.example.com\r\n\r\n"), open},
		{"HTTP Host with user", api + ":80", get("api.example.com@evil.example"), "no DNS name"},
		{"HTTP Host with path", api + ":80", get("api.example.com/evil.example"), "no DNS name"},
		{"HTTP Host with a space", api + ":80", get("api.example.com evil.example"), "no DNS name"},
		{"HTTP Host in UTF-8", munich + ":80", get("münchen.example"), "no DNS name"},
		{"HTTP Host in ASCII of IDNA", munich + ":80", get("xn--mnchen-3ya.example"), open},
		{"HTTP Host with a bad port", api + ":80", get("api.example.com:80a"), "malformed Host"},
		{"HTTP Host with two ports", api + ":80", get("api.example.com:80:80"), "malformed Host"},
		{"HTTP Host with empty labels", api + ":80", get("api..example.com"), "no DNS name"},
		{"absolute URI", api + ":80", []byte("GET http://api.example.com/ HTTP/1.1\r\nHost: api.example.com\r\n\r\n"), open},
		{"absolute URI, other name", api + ":80", []byte("GET http://evil.example/ HTTP/1.1\r\nHost: api.example.com\r\n\r\n"), "does not have the name"},
		{"absolute URI over other Host", api + ":80", []byte("GET http://api.example.com/ HTTP/1.1\r\nHost: evil.example\r\n\r\n"), open},
		{"CONNECT", api + ":80", []byte("CONNECT evil.example:443 HTTP/1.1\r\nHost: api.example.com\r\n\r\n"), "CONNECT"},
		{"HTTP/2 without TLS", api + ":80", []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), "HTTP/2 without TLS"},
		{"TLS on the HTTP port", api + ":80", hello(t, "api.example.com"), "is not HTTP/1"},
		{"SSH on the HTTP port", api + ":80", []byte("SSH-2.0-x\r\n\r\n"), "is not HTTP/1"},
		{"HTTP/0.9", api + ":80", []byte("GET /\r\n\r\n"), "is not HTTP/1"},
		{"header without end", api + ":80", []byte("GET / HTTP/1.1\r\nX: " + strings.Repeat("x", maxSniff)), "first 32 KiB"},
		// other ports and addresses
		{"name on port 8443", api + ":8443", hello(t, "api.example.com"), "the address is denied"},
		{"name on port 8080", api + ":8080", get("api.example.com"), "the address is denied"},
		{"SSH", api + ":22", []byte("SSH-2.0-x\r\n"), "the address is denied"},
		{"allowed address, other port", free + ":22", []byte("SSH-2.0-x\r\n"), open},
		{"allowed address, no name", free + ":443", hello(t, ""), open},
		{"allowed address, encrypted ClientHello", free + ":443", ech, open},
		{"allowed address, other name", free + ":443", hello(t, "evil.example"), open},
		{"allowed address, HTTP", free + ":80", get("whatever.example"), open},
		{"allowed address, not HTTP", free + ":80", []byte("SSH-2.0-x\r\n"), open},
		{"allowed address and name", both + ":443", hello(t, "both.example"), open},
		{"denied address, unknown protocol", "9.9.9.9:1234", []byte("x"), "the address is denied"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			in.refused()
			before := len(w.dials())
			got := in.try(tc.to, tc.say)
			if tc.want == open {
				if !strings.HasSuffix(got, "here") {
					t.Errorf("got %q (%v), want it open", got, in.refused())
				}
				return
			}
			if got != "reset" {
				t.Errorf("got %q, want a reset", got)
			}
			if why := in.reason(); !strings.Contains(why, tc.want) {
				t.Errorf("refused because it %s; want %q", why, tc.want)
			}
			if n := len(w.dials()) - before; n != 0 {
				t.Errorf("%d connections went out all the same", n)
			}
		})
	}
	for _, name := range w.queries() {
		if p := in.server.guests[in.id].policy.Load(); !p.resolves(name) && name != "evil.example" && name != "loop.wild.example" {
			t.Errorf("the node asked for %s, which the policy does not have", name)
		}
	}
}

// Without a policy that denies everything, names only matter for rules.
func TestNamesOpen(t *testing.T) {
	w := newWorld(t, "rule.example A 5.5.5.5")
	for _, a := range []string{"5.5.5.5:443", "5.5.5.5:80", "6.6.6.6:443", "6.6.6.6:80", "6.6.6.6:22", "7.7.7.7:443"} {
		w.serve(a, here)
	}
	in := attach(t, w, newServer(t, w), cay.Egress{Deny: []netip.Prefix{netip.MustParsePrefix("7.7.0.0/16")},
		Rules: []cay.EgressRule{{Name: "rule.example", Headers: map[string]string{"X": "y"}}}})
	for _, tc := range []struct {
		what, to string
		say      []byte
		open     bool
	}{
		{"no name", "6.6.6.6:443", hello(t, ""), true},
		{"another name", "6.6.6.6:443", hello(t, "other.example"), true},
		{"the rule's name at another address", "6.6.6.6:443", hello(t, "rule.example"), true},
		{"the rule's name at another address in HTTP", "6.6.6.6:80", get("rule.example"), true},
		{"no HTTP", "6.6.6.6:80", []byte("SSH-2.0-x\r\n"), true},
		{"another port", "6.6.6.6:22", []byte("SSH-2.0-x\r\n"), true},
		{"denied", "7.7.7.7:443", hello(t, "other.example"), false},
		{"special", "192.168.0.1:443", hello(t, "rule.example"), false},
	} {
		if got := in.try(tc.to, tc.say); strings.HasSuffix(got, "here") != tc.open {
			t.Errorf("%s: got %q, want open %t", tc.what, got, tc.open)
		}
	}
}

// A rule's header is not for whoever takes its name.
func TestRuleNeedsItsAddress(t *testing.T) {
	w := newWorld(t, "rule.example A 5.5.5.5")
	heard := make(chan string, 1)
	w.serve("6.6.6.6:80", func(c net.Conn) {
		b := make([]byte, 4096)
		n, _ := c.Read(b)
		heard <- string(b[:n])
		_, _ = c.Write([]byte("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"))
	})
	in := attach(t, w, newServer(t, w), cay.Egress{Rules: []cay.EgressRule{{Name: "rule.example", Headers: map[string]string{"X-Key": "canary"}}}})
	in.try("6.6.6.6:80", get("rule.example"))
	if got := <-heard; strings.Contains(got, "canary") {
		t.Errorf("the guest's own server got %q", got)
	}
}

// Every request of a connection is judged.
func TestKeepAlive(t *testing.T) {
	w := newWorld(t, "api.example.com A 5.5.5.5", "www.example.com A 5.5.5.5", "elsewhere.example.com A 6.6.6.6")
	w.serve("5.5.5.5:80", here)
	in := attach(t, w, newServer(t, w), onlyNames("*.example.com"))
	for _, tc := range []struct{ first, second, want string }{
		{"api.example.com", "api.example.com", "here"},
		{"api.example.com", "www.example.com", "here"},
		{"api.example.com", "evil.example", "reset"},
		{"api.example.com", "elsewhere.example.com", "reset"}, // another address's name
	} {
		c := in.connect("5.5.5.5:80")
		_, _ = c.Write(get(tc.first))
		if got := hear(c); !strings.HasSuffix(got, "here") {
			t.Fatalf("the first request: %q", got)
		}
		_, _ = c.Write(get(tc.second))
		if got := hear(c); !strings.HasSuffix(got, tc.want) {
			t.Errorf("%s after %s: got %q, want %q", tc.second, tc.first, got, tc.want)
		}
	}
	// Two at once, the second of them refused: the first may be answered.
	c := in.connect("5.5.5.5:80")
	_, _ = c.Write(append(get("api.example.com"), get("evil.example")...))
	all, _ := io.ReadAll(c)
	if n := strings.Count(string(all), "here"); n > 1 {
		t.Errorf("two requests at once: %d answers", n)
	}
}

// A name that changes its address takes the new one along, not an address of
// the guest's choice (DNS rebinding).
func TestRebinding(t *testing.T) {
	w := newWorld(t, "flip.example A 5.5.5.5")
	w.ttl = 0
	w.serve("5.5.5.5:443", here)
	w.serve("6.6.6.6:443", here)
	in := attach(t, w, newServer(t, w), onlyNames("flip.example"))
	say := hello(t, "flip.example")
	if got := in.try("5.5.5.5:443", say); got != "here" {
		t.Fatalf("at first: %q", got)
	}
	w.mu.Lock()
	w.records["flip.example"] = nil
	w.mu.Unlock()
	w.set("flip.example A 169.254.169.254", "flip.example A 6.6.6.6")
	if got := addressesIn(in.ask("flip.example.", dnsmessage.TypeA, false)); !slices.Equal(got, []string{"6.6.6.6"}) {
		t.Errorf("after the change the guest is told %v", got)
	}
	if got := in.try("6.6.6.6:443", say); got != "here" {
		t.Errorf("the new address: %q", got)
	}
	if got := in.try("169.254.169.254:443", say); got != "reset" {
		t.Errorf("the special address: %q", got)
	}
	if got := in.try("7.7.7.7:443", say); got != "reset" {
		t.Errorf("an address of the guest's choice: %q", got)
	}
}

// A server that was restarted knows no answer it gave before.
func TestPinsAreFoundAgain(t *testing.T) {
	w := newWorld(t, "api.example.com A 5.5.5.5")
	w.serve("5.5.5.5:443", here)
	s := newServer(t, w)
	in := attach(t, w, s, onlyNames("api.example.com"))
	in.ask("api.example.com.", dnsmessage.TypeA, false)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	in = attach(t, w, s, onlyNames("api.example.com"))
	if got := in.try("5.5.5.5:443", hello(t, "api.example.com")); got != "here" {
		t.Errorf("after the restart: %q", got)
	}
}

// Many connections by a name that is not known wait for one answer, and none is
// refused because the others have asked too often.
func TestPinsAreFoundOnce(t *testing.T) {
	const n = 500 // more than a sandbox may ask at once
	w := newWorld(t, "api.example.com A 5.5.5.5")
	s := newServer(t, w)
	in := attach(t, w, s, onlyNames("api.example.com"))
	s.mu.Lock()
	g := s.guests[in.id]
	s.mu.Unlock()
	w.mu.Lock() // the name server is slow
	var come, found atomic.Int32
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			come.Add(1)
			if g.pinned(t.Context(), g.policy.Load(), "api.example.com", netip.MustParseAddr("5.5.5.5")) {
				found.Add(1)
			}
		})
	}
	eventually(t, func() bool { return come.Load() == n }, "not all have come")
	w.mu.Unlock()
	wg.Wait()
	if found.Load() != n {
		t.Errorf("%d of %d found the name", found.Load(), n)
	}
	if asked := w.queries(); len(asked) != 1 {
		t.Errorf("the name server was asked %d times", len(asked))
	}
}

// A pin holds for the time the guest was told, and not for ever.
func TestPinsEnd(t *testing.T) {
	var p pins
	a, now := netip.MustParseAddr("5.5.5.5"), time.Unix(1e9, 0)
	p.add("n", []netip.Addr{a}, 0, now)
	for _, tc := range []struct {
		after time.Duration
		want  bool
	}{{0, true}, {minPin, true}, {minPin + grace, false}} {
		if got := p.has("n", a, now.Add(tc.after)); got != tc.want {
			t.Errorf("after %s: %t", tc.after, got)
		}
	}
	p.add("n", []netip.Addr{a}, 100*time.Hour, now)
	if p.has("n", a, now.Add(maxTTL+grace)) {
		t.Error("a TTL of days is kept")
	}
	for i := range 10_000 {
		p.add(fmt.Sprintf("n%d", i), []netip.Addr{a}, 0, now)
	}
	if len(p.m) > maxPinned || !p.has("n9999", a, now) {
		t.Errorf("%d names are kept, the last one: %t", len(p.m), p.has("n9999", a, now))
	}
	for i := range 1000 {
		p.add("n", []netip.Addr{netip.AddrFrom4([4]byte{5, 5, byte(i >> 8), byte(i)})}, time.Duration(i), now)
	}
	if len(p.m["n"]) > maxAddresses {
		t.Errorf("%d addresses of a name are kept", len(p.m["n"]))
	}
}

func TestCompileRefuses(t *testing.T) {
	for _, e := range []cay.Egress{
		onlyNames("*"), onlyNames("*."), onlyNames(""), onlyNames("A.example"), onlyNames("a.example."), onlyNames("a..b"),
		onlyNames("1.2.3.4"), onlyNames("*.*.example"), onlyNames("münchen.example"), onlyNames("a b"),
		{Rules: []cay.EgressRule{{Name: "*"}}},
		{Rules: []cay.EgressRule{{Name: "a.example", Headers: map[string]string{"A B": "x"}}}},
		{Rules: []cay.EgressRule{{Name: "a.example", Headers: map[string]string{"A": "x\r\nB: y"}}}},
	} {
		if _, err := compile(e); cay.CodeOf(err) != cay.CodeInvalidRequest {
			t.Errorf("%+v: %v", e, err)
		}
	}
}

// The most particular rule counts.
func TestRulePrecedence(t *testing.T) {
	var ns names[int]
	for i, n := range []string{"*.example.com", "a.example.com", "*.b.example.com", "*.com"} {
		if err := ns.add(n, i); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]int{"a.example.com": 1, "x.example.com": 0, "x.b.example.com": 2, "x.y.b.example.com": 2,
		"b.example.com": 0, "example.com": 3, "com": -1, "example.org": -1} {
		got, ok := ns.find(name)
		if !ok {
			got = -1
		}
		if got != want {
			t.Errorf("%s: rule %d, want %d", name, got, want)
		}
	}
}

func TestPrefixes(t *testing.T) {
	parse := netip.MustParsePrefix
	ps := newPrefixes([]netip.Prefix{parse("10.0.0.0/8"), parse("10.1.0.0/16"), parse("2001:db8::/32"), parse("1.2.3.4/32")})
	for a, want := range map[string]string{"10.1.2.3": "10.1.0.0/16", "10.2.0.1": "10.0.0.0/8", "1.2.3.4": "1.2.3.4/32", "1.2.3.5": "",
		"2001:db8::1": "2001:db8::/32", "::1": ""} {
		got, ok := ps.find(netip.MustParseAddr(a))
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("%s: %v %t, want %q", a, got, ok, want)
		}
	}
	all := newPrefixes([]netip.Prefix{parse("0.0.0.0/0")})
	for _, a := range []string{"1.2.3.4", "2001:db8::1"} {
		if _, ok := all.find(netip.MustParseAddr(a)); !ok {
			t.Errorf("0.0.0.0/0 does not have %s", a)
		}
	}
}
