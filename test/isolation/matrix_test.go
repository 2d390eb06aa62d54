package isolation

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/test/program"
)

// patience is for what happens in a moment, and later on a busy machine.
const patience = time.Minute

// canaryMark begins what every web server of the matrix says.
const canaryMark = "canary"

// specialRanges are those of the IANA special-purpose registries, and what is
// multicast or reserved: a list of its own, so that it judges the product's.
var specialRanges = []string{
	"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
	"192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24",
	"203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
	"::/128", "::1/128", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "2001::/23", "2001:db8::/32", "2002::/16",
	"2620:4f:8000::/48", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
}

// metadata are the addresses that clouds tell instances about themselves at,
// and other places that one would look at.
var metadata = []string{
	"169.254.169.254", "169.254.170.2", "169.254.169.253", "169.254.169.123", "169.254.0.23", "100.100.100.200", "168.63.129.16",
	"192.0.0.192", "192.0.0.170", "fd00:ec2::254", "fd20:ce::254", "172.17.0.1", "172.18.0.1", "10.96.0.1", "10.0.2.2", "10.0.2.3",
	"192.168.0.1", "192.168.1.1", "192.168.49.1", "192.168.122.1", "255.255.255.255", "198.18.0.2", "239.255.255.250",
	"::ffff:169.254.169.254", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b::a00:1", "2002:a9fe:a9fe::1", "2002:7f00:1::1",
}

// alwaysRefused are destinations that no policy opens: the ends of every
// special range and an address within, metadata, and the given.
func alwaysRefused(t *testing.T, more ...netip.Addr) (out []netip.Addr) {
	t.Helper()
	add := func(a netip.Addr) {
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	for _, s := range specialRanges {
		p := netip.MustParsePrefix(s)
		first := p.Addr().AsSlice()
		last, within := slices.Clone(first), slices.Clone(first)
		for bit := p.Bits(); bit < len(last)*8; bit++ {
			last[bit/8] |= 0x80 >> (bit % 8)
			if bit%3 == 1 {
				within[bit/8] |= 0x80 >> (bit % 8)
			}
		}
		for _, b := range [][]byte{first, within, last} {
			a, _ := netip.AddrFromSlice(b) // as long as an address
			add(a)
		}
	}
	for _, s := range metadata {
		add(netip.MustParseAddr(s))
	}
	for _, a := range more {
		add(a.WithZone(""))
	}
	if len(out) < 140 {
		t.Fatalf("only %d destinations", len(out))
	}
	return out
}

// matrixPolicy is one row of policies. Addresses and names are its own, so that
// a packet to one tells whose guest has sent it.
type matrixPolicy struct {
	name    string
	network func(p *matrixPolicy) map[string]any
	// open says what of its public address is: everything, what HTTP and TLS
	// reach by a name, or nothing.
	open string
	// shut are public addresses that it does not open.
	shut func(p *matrixPolicy) []netip.Addr
	// filters: names outside of its own are not resolved.
	filters bool

	n int
}

const (
	openAll     = "all"
	openStreams = "streams" // no datagrams
	openByName  = "by name"
	openNothing = "nothing"
)

func (p *matrixPolicy) addr(third, fourth byte) netip.Addr {
	return netip.AddrFrom4([4]byte{62, byte(100 + p.n), third, fourth})
}

// public is the address that it opens, if it opens any.
func (p *matrixPolicy) public() netip.Addr { return p.addr(10, 10) }

// host returns a name of an address below the policy's domain.
func (p *matrixPolicy) host(kind string, a netip.Addr) string {
	return kind + "-" + hex.EncodeToString(a.AsSlice()) + ".p" + fmt.Sprint(p.n) + ".example"
}

func (p *matrixPolicy) domain() string { return "p" + fmt.Sprint(p.n) + ".example" }

// via is who redirects: who the policy opens.
func (p *matrixPolicy) via() string {
	if p.open == openByName {
		return "exact." + p.domain()
	}
	return p.public().String()
}

// outside are addresses that only the policy shuts.
func outside(p *matrixPolicy) []netip.Addr { return []netip.Addr{p.addr(20, 1), p.addr(20, 200)} }

func none(*matrixPolicy) []netip.Addr { return nil }

var everything = []string{"0.0.0.0/0"}

// allowed holds what could be thought to open the rest: every special range.
func allowed(more ...string) []string {
	out := slices.Clone(more)
	for _, r := range specialRanges {
		if p := netip.MustParsePrefix(r); p.Addr().Is4() {
			out = append(out, r)
		}
	}
	return append(out, program.Uplink.String(), program.Private.String())
}

func withRules(p *matrixPolicy) map[string]any {
	return map[string]any{"*." + p.domain(): []any{map[string]any{"transform": map[string]any{"headers": map[string]any{"X-Key": "of " + p.domain()}}}}}
}

func matrixPolicies() []*matrixPolicy {
	all := []*matrixPolicy{
		{name: "default", open: openAll, shut: none, network: func(*matrixPolicy) map[string]any { return map[string]any{} }},
		{name: "allowed by address", open: openAll, shut: outside, network: func(p *matrixPolicy) map[string]any {
			return map[string]any{"denyOut": everything, "allowOut": allowed(p.public().String(), resolvers[0].String(), resolvers[1].String())}
		}},
		{name: "allowed by range", open: openAll, network: func(p *matrixPolicy) map[string]any {
			return map[string]any{"denyOut": everything, "allowOut": allowed(p.addr(10, 0).String()+"/24", resolvers[0].String()+"/32", resolvers[1].String()+"/32")}
		}, shut: func(p *matrixPolicy) []netip.Addr {
			return append(outside(p), p.addr(9, 255), p.addr(11, 0)) // its neighbours
		}},
		{name: "allowed by name", open: openByName, shut: outside, filters: true, network: func(p *matrixPolicy) map[string]any {
			return map[string]any{"denyOut": everything, "allowOut": allowed("*."+p.domain(), p.domain())}
		}},
		{name: "denied", open: openAll, shut: outside, network: func(p *matrixPolicy) map[string]any {
			return map[string]any{"denyOut": []string{p.addr(20, 0).String() + "/25", p.addr(20, 200).String()}, "allowOut": allowed()}
		}},
		{name: "no internet", open: openNothing, shut: func(p *matrixPolicy) []netip.Addr { return append(outside(p), p.public()) },
			network: func(*matrixPolicy) map[string]any { return map[string]any{} }},
		{name: "rules", open: openAll, shut: none, network: func(p *matrixPolicy) map[string]any {
			return map[string]any{"rules": withRules(p), "allowOut": allowed()}
		}},
		{name: "rules alone", open: openByName, shut: outside, filters: true, network: func(p *matrixPolicy) map[string]any {
			return map[string]any{"denyOut": everything, "allowOut": allowed("*."+p.domain(), p.domain()), "rules": withRules(p)}
		}},
		{name: "SOCKS5", open: openStreams, shut: none, network: func(*matrixPolicy) map[string]any {
			return map[string]any{"egressProxy": map[string]any{"address": socksAddr.String()}, "allowOut": allowed()}
		}},
	}
	for i, p := range all {
		p.n = i
	}
	return all
}

// forbidden are the attempts of which none may arrive: each destination by each
// way and protocol. All of them are tried every night; in every other run, what
// is not direct goes to a sixth of the destinations, to others by each way.
func (p *matrixPolicy) forbidden(always []netip.Addr) (out []attempt) {
	for i, to := range slices.Concat(always, p.shut(p)) {
		tried := len(out)
		out = append(out, p.attempts(i, to, i >= len(always))...)
		n := -1
		out = append(out[:tried], slices.DeleteFunc(out[tried:], func(a attempt) bool {
			n++
			return !program.Nightly() && a.Way != direct && (i+n)%6 > 0
		})...)
	}
	return out
}

// attempts are all ways to the destination with the number i. That of a public
// one depends on the policy.
func (p *matrixPolicy) attempts(i int, to netip.Addr, public bool) (out []attempt) {
	kinds := map[string]string{byDNS: "d", byCNAME: fmt.Sprint("c", 1+i%4), rebinding: "r"}
	for _, proto := range []string{"tcp", "udp", "icmp"} {
		out = append(out, attempt{Way: direct, Protocol: proto, To: to, Port: port})
		for _, way := range []string{byDNS, byCNAME, rebinding} {
			a := attempt{Way: way, Protocol: proto, To: to, Port: port, Name: p.host(kinds[way], to)}
			if public && p.filters { // its own names may lead there: that is what they are for
				a.Name = strings.Replace(a.Name, ".p", ".outside", 1)
			}
			out = append(out, a)
		}
	}
	claimed := "exact." + p.domain()
	host := to.String()
	if to.Is6() {
		host = "[" + host + "]"
	}
	out = append(out,
		attempt{Way: sniSpoof, Protocol: "tcp", To: to, Name: claimed}, attempt{Way: hostSpoof, Protocol: "tcp", To: to, Name: claimed},
		attempt{Way: absolute, Protocol: "tcp", To: to, Via: p.public().String()}, attempt{Way: connect, Protocol: "tcp", To: to, Via: p.public().String()},
		attempt{Way: redirect, Protocol: "tcp", To: to, Via: p.via(), URL: []string{"http", "https"}[i%2] + "://" + host + "/"})
	if !public || !p.filters {
		out = append(out, attempt{Way: redirect, Protocol: "tcp", To: to, Via: p.via(), URL: "http://" + p.host("d", to) + "/"})
	}
	return out
}

// permitted are the attempts that must arrive.
func (p *matrixPolicy) permitted() (out []attempt) {
	to, via := p.public(), p.via()
	if p.open == openNothing {
		return nil
	}
	if p.open != openByName {
		out = append(out, attempt{Way: direct, Protocol: "tcp", To: to, Port: port})
	}
	if p.open == openAll {
		for _, proto := range []string{"udp", "icmp"} {
			out = append(out, attempt{Way: direct, Protocol: proto, To: to, Port: port},
				attempt{Way: byDNS, Protocol: proto, To: to, Port: port, Name: p.host("d", to)},
				attempt{Way: byCNAME, Protocol: proto, To: to, Port: port, Name: p.host("c3", to)})
		}
	}
	for way, kind := range map[string]string{byDNS: "d", byCNAME: "c2", rebinding: "r"} {
		out = append(out, attempt{Way: way, Protocol: "tcp", To: to, Name: p.host(kind, to)})
	}
	for _, name := range []string{"exact." + p.domain(), "any.depth." + p.domain()} {
		out = append(out, attempt{Way: sniSpoof, Protocol: "tcp", To: to, Name: name}, attempt{Way: hostSpoof, Protocol: "tcp", To: to, Name: name},
			attempt{Way: redirect, Protocol: "tcp", To: to, Via: via, URL: "http://" + name + "/"},
			attempt{Way: redirect, Protocol: "tcp", To: to, Via: via, URL: "https://" + name + "/"})
	}
	for i := range out {
		out[i].Answers = true
	}
	return out
}

var (
	// resolvers are those in the base template, which guests ask; the node asks
	// the first.
	resolvers = []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("8.8.8.8")}
	socksAddr = netip.MustParseAddrPort("5.5.5.5:1080")
)

// matrixZone answers for the names of the matrix: d is a name of the address
// that is in it, c1 to c4 are aliases over so many steps, r is the policy's
// public address the first time and then the one in it. All have a TTL of 0.
type matrixZone struct {
	mu      sync.Mutex
	rebound map[string]int
}

func (z *matrixZone) answer(name string, typ dnsmessage.Type) (out []dnsmessage.Resource, found bool) {
	first, domain, _ := strings.Cut(name, ".")
	kind, digits, _ := strings.Cut(first, "-")
	b, err := hex.DecodeString(digits)
	to, ok := netip.AddrFromSlice(b)
	var n byte
	_, _ = fmt.Sscanf(domain[max(0, strings.LastIndexByte(strings.TrimSuffix(domain, ".example"), '.')+1):], "p%d.example", &n) // else it is of no policy
	public := (&matrixPolicy{n: int(n)}).public()
	if err != nil || !ok {
		kind, to = "d", public
	}
	add := func(owner string, body dnsmessage.ResourceBody, typ dnsmessage.Type) {
		out = append(out, dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(owner + "."), Type: typ, Class: dnsmessage.ClassINET}, Body: body})
	}
	if kind[0] == 'c' {
		step := int(kind[1] - '0')
		next := "d-" + digits + "." + domain
		if step > 1 {
			next = fmt.Sprintf("c%d-%s.%s", step-1, digits, domain)
		}
		add(name, &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(next + ".")}, dnsmessage.TypeCNAME)
		if step%2 == 0 { // the rest of the chain, as a resolver would add it
			more, _ := z.answer(next, typ)
			out = append(out, more...)
		}
		return out, true
	}
	if kind == "r" {
		z.mu.Lock()
		key := name + typ.String()
		z.rebound[key]++
		if z.rebound[key] == 1 {
			to = public
		}
		z.mu.Unlock()
	}
	switch {
	case typ == dnsmessage.TypeA && to.Is4():
		add(name, &dnsmessage.AResource{A: to.As4()}, typ)
	case typ == dnsmessage.TypeAAAA && to.Is6():
		add(name, &dnsmessage.AAAAResource{AAAA: to.As16()}, typ)
	}
	return out, true
}

// first is where a name leads before it has led elsewhere.
func (z *matrixZone) first(name string) netip.Addr {
	fresh := &matrixZone{rebound: map[string]int{}}
	for range 8 {
		rr, _ := fresh.answer(name, dnsmessage.TypeA)
		for _, r := range rr {
			switch b := r.Body.(type) {
			case *dnsmessage.AResource:
				return netip.AddrFrom4(b.A)
			case *dnsmessage.CNAMEResource:
				name = strings.TrimSuffix(b.CNAME.String(), ".")
			}
		}
	}
	return netip.Addr{}
}

// canaries answer at every address of the internet: web servers with and
// without TLS that redirect on demand, and greetings over TCP and UDP. leaks
// are the requests that had a rule's header and arrived elsewhere than where
// the rule's name leads.
func canaries(t *testing.T, secure *tls.Config, udp []netip.Addr) (leaks func() []string) {
	t.Helper()
	listen(t, canaryMark, port, program.InWorld, udp...)
	var mu sync.Mutex
	var leaked []string
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		at := r.Context().Value(http.LocalAddrContextKey).(net.Addr).String()
		if key := r.Header.Get("X-Key"); key != "" {
			var n int
			_, err := fmt.Sscanf(key, "of p%d.example", &n)
			if host, _, _ := net.SplitHostPort(at); err != nil || host != (&matrixPolicy{n: n}).public().String() {
				mu.Lock()
				leaked = append(leaked, key+" at "+at)
				mu.Unlock()
			}
		}
		if to := r.URL.Query().Get("to"); to != "" {
			http.Redirect(w, r, to, http.StatusFound)
			return
		}
		fmt.Fprint(w, canaryMark, " at ", at)
	})
	serve(t, program.InWorld, ":80", nil, handler)
	serve(t, program.InWorld, ":443", secure, handler)
	serve(t, here, ":80", nil, handler)
	serve(t, here, ":443", secure, handler)
	return func() []string { mu.Lock(); defer mu.Unlock(); return slices.Clone(leaked) }
}

// serve serves a port of every address of the network that in leads to.
func serve(t *testing.T, in func(func() error) error, at string, secure *tls.Config, h http.Handler) {
	t.Helper()
	var l net.Listener
	if err := in(func() (err error) { l, err = net.Listen("tcp", at); return err }); err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: h, ErrorLog: log.New(io.Discard, "", 0), TLSConfig: secure}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if secure != nil {
			_ = srv.ServeTLS(l, "", "")
			return
		}
		_ = srv.Serve(l)
	}()
	t.Cleanup(func() { _ = srv.Shutdown(context.Background()); <-done })
}

// echoes counts the machine's echo requests that have what the guest's do.
func echoes(t *testing.T) *atomic.Int32 {
	t.Helper()
	c, err := icmp.ListenPacket("ip4:icmp", "0.0.0.0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	var n atomic.Int32
	go func() {
		for buf := make([]byte, 1500); ; {
			size, _, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if m, err := icmp.ParseMessage(1, buf[:size]); err == nil && m.Type == ipv4.ICMPTypeEcho && strings.HasSuffix(string(buf[:size]), pingData) {
				n.Add(1)
			}
		}
	}()
	return &n
}

// perform gives attempts to the program in a sandbox.
func perform(ctx context.Context, s *program.Sandbox, all []attempt) ([]string, error) {
	b, err := json.Marshal(all)
	if err != nil {
		return nil, err
	}
	if err := s.Write(ctx, "/tmp/job", b); err != nil {
		return nil, err
	}
	r, err := s.Exec(ctx, "root", guestEnv+"=/tmp/job exec /home/user/guest")
	if err != nil || r.Code != 0 {
		return nil, fmt.Errorf("the guest's program: %w, %s", err, r)
	}
	var out []string
	if err := json.Unmarshal([]byte(r.Stdout), &out); err != nil || len(out) != len(all) {
		return nil, fmt.Errorf("the guest tried %d of %d: %w", len(out), len(all), err)
	}
	return out, nil
}

// settleIn gives a sandbox this program.
func settleIn(ctx context.Context, s *program.Sandbox) error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	if err := s.Write(ctx, "/home/user/guest", self); err != nil {
		return err
	}
	_, err = s.Exec(ctx, "", "chmod +x /home/user/guest")
	return err
}

// leavesGuest reports whether the guest's own network lets a packet to an
// address out, so that somebody has to refuse it.
func leavesGuest(a netip.Addr) bool {
	a = a.Unmap()
	link := netip.MustParsePrefix("169.254.0.20/30")
	this := netip.MustParsePrefix("0.0.0.0/8")
	return a.Is4() && a.IsGlobalUnicast() && !link.Contains(a) && !this.Contains(a) || a.Is4() && a.IsLinkLocalUnicast() && !link.Contains(a)
}

// judge has a guest try what its policy forbids and what it permits, and says
// what is not as it should be.
func judge(ctx context.Context, server *program.Server, s *program.Sandbox, bad, good []attempt) (wrong []string) {
	straight := slices.DeleteFunc(slices.Clone(bad), func(a attempt) bool { return a.Way != direct })
	all := append(good, slices.DeleteFunc(slices.Clone(bad), func(a attempt) bool { return a.Way == direct })...)
	for _, some := range [][]attempt{straight, all} {
		results, err := perform(ctx, s, some)
		if err != nil {
			return append(wrong, err.Error())
		}
		for i, a := range some {
			if open := strings.HasPrefix(results[i], "open"); open != a.Answers {
				wrong = append(wrong, fmt.Sprintf("%s: %s, want it open: %v", a, results[i], a.Answers))
			}
		}
		left, err := missing(server, s.ID, straight)
		for range 5 { // the kernel tells so many a second of what it refuses
			if err != nil || len(left) == 0 {
				break
			}
			if _, err = perform(ctx, s, left); err == nil {
				left, err = missing(server, s.ID, left)
			}
		}
		if err != nil || len(left) > 0 {
			return append(wrong, fmt.Sprintf("the log lacks %d refusals: %v, %v", len(left), left[:min(3, len(left))], err))
		}
		straight = nil // what comes now may push the first out of the log
	}
	return wrong
}

// missing returns those of the attempts by address that the log of refusals
// does not have.
func missing(server *program.Server, id string, all []attempt) (out []attempt, err error) {
	log, err := refusalLog(server, id)
	had := map[string]bool{}
	for _, r := range log {
		host := r.Destination
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		had[r.Protocol+" "+host] = r.Rule != "" && r.Reason != ""
	}
	for _, a := range all {
		if leavesGuest(a.To) && !had[a.Protocol+" "+a.To.Unmap().String()] {
			out = append(out, a)
		}
	}
	return out, err
}

// No destination that is refused is reached, by any way and protocol, under any
// policy; all that a policy opens is. Canaries at every address of the internet
// and of the machine, and taps in front of their firewalls, see nothing; that
// they do see is proven with the firewalls taken away. Every refusal by address
// is in the sandbox's log, with its rule.
func TestMatrix(t *testing.T) {
	secure, bundle := worldTLS(t)
	policies := matrixPolicies()
	var udp []netip.Addr
	for _, p := range policies {
		udp = append(udp, p.public())
	}
	host := listen(t, "this is the host", port, here)
	pings := echoes(t)
	leaks := canaries(t, secure, udp)
	resolver(t, resolvers[0])
	names := &matrixZone{rebound: map[string]int{}}
	asked := zone(t, resolvers[0], names.answer)
	zone(t, resolvers[1], names.answer)
	proxied := socksWorld(t, socksAddr.String(), names.first)
	server := program.Start(t, program.Options{Env: []string{"SSL_CERT_FILE=" + bundle}})
	c := server.Client()
	victim := c.Make(t, 20*time.Minute, nil)
	always := alwaysRefused(t, ends(t)...)
	wan := newTap(t, program.InWorld, "wan0")
	inside := newTap(t, inNetOf(t, enginePID(t, server, victim.ID)), "eth0")

	boxes := make([]*program.Sandbox, len(policies))
	for i, p := range policies {
		more := map[string]any{"network": p.network(p)}
		if p.open == openNothing {
			more["allow_internet_access"] = false
		}
		boxes[i] = c.Make(t, 20*time.Minute, more)
	}
	var wg sync.WaitGroup
	var cells, reached atomic.Int32
	for i, p := range policies {
		wg.Go(func() { // all of them at once: they wait for their limits most of the time
			bad, good := p.forbidden(always), p.permitted()
			if err := settleIn(t.Context(), boxes[i]); err != nil {
				t.Errorf("%s: %v", p.name, err)
				return
			}
			for _, said := range judge(t.Context(), server, boxes[i], bad, good) {
				t.Errorf("%s: %s", p.name, said)
			}
			cells.Add(int32(len(bad)))
			reached.Add(int32(len(good)))
		})
	}
	wg.Wait()

	// Nothing has arrived that the policies do not open.
	shut := map[netip.Addr]string{}
	for _, p := range policies {
		for _, a := range p.shut(p) {
			shut[a] = p.name
		}
	}
	expected := func(p packet) bool {
		switch {
		case !p.to.IsValid(), p.protocol == unix.IPPROTO_IGMP, slices.Contains(resolvers, p.to), p.to == socksAddr.Addr():
			return true
		case p.to.Is6(): // what the machine says to its neighbours
			return !p.opens && p.protocol != unix.IPPROTO_TCP && p.protocol != unix.IPPROTO_UDP
		}
		return slices.Contains(udp, p.to) && shut[p.to] == ""
	}
	for _, p := range sorted(wan.take()) {
		if !expected(p) {
			t.Errorf("left the machine: %s %s", p, shut[p.to])
		}
	}
	for _, p := range sorted(inside.take()) {
		if p.opens && p.port != program.EnvdPort && p.port != program.EnvdPort-1 || p.protocol == unix.IPPROTO_UDP && p.port == port {
			t.Errorf("reached another sandbox: %s", p)
		}
	}
	for _, said := range host.all() {
		t.Errorf("a datagram reached the machine: %s", said)
	}
	if n := pings.Load(); n > 0 {
		t.Errorf("%d echo requests reached the machine", n)
	}
	for _, said := range leaks() {
		t.Errorf("a rule's header went elsewhere: %s", said)
	}
	for _, name := range asked() {
		if strings.Contains(name, ".outside") {
			t.Errorf("a name left the machine that no policy has: %s", name)
		}
	}
	for _, to := range proxied() {
		if h, _, _ := net.SplitHostPort(to); slices.ContainsFunc(always, func(a netip.Addr) bool { return a.Unmap().String() == h }) {
			t.Errorf("the sandbox's proxy was asked for %s", to)
		}
	}
	if !t.Failed() {
		t.Logf("%d destinations, %d attempts under %d policies, of which none has arrived; all %d others have", len(always), cells.Load(), len(policies), reached.Load())
	}

	// The same program, without firewalls.
	wallsDown(t, server)
	straight := slices.DeleteFunc(policies[0].forbidden(always), func(a attempt) bool { return a.Way != direct || !leavesGuest(a.To) })
	if _, err := perform(t.Context(), boxes[0], straight); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for p := range wan.take() {
		seen[fmt.Sprint(p.protocol, p.to)] = true
	}
	for _, said := range host.all() {
		seen["machine "+said] = true
	}
	alive := 0
	for _, a := range straight {
		n := map[string]int{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "icmp": unix.IPPROTO_ICMP}[a.Protocol]
		if seen[fmt.Sprint(n, a.To.Unmap())] || seen["machine "+a.String()] {
			alive++
		}
	}
	t.Logf("with the firewalls taken away, canaries hear %d of %d, and the machine %d echo requests", alive, len(straight), pings.Load())
	if pings.Load() == 0 {
		t.Error("the machine hears no echo request without firewalls")
	}
	if alive < len(straight)*8/10 {
		t.Errorf("canaries hear %d of %d attempts without firewalls: what they do not hear says little", alive, len(straight))
	}
}
