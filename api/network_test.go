package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/operator"
)

func prefixes(texts ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range texts {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

var all4 = prefixes("0.0.0.0/0")

// What a creator asks for is what the node enforces.
func TestEgress(t *testing.T) {
	no, yes := false, true
	text := func(s string) *string { return &s }
	for _, tt := range []struct {
		name  string
		in    *gen.SandboxNetworkConfig
		allow *bool
		want  cay.Egress
	}{
		{"nothing said", nil, nil, cay.Egress{}},
		{"internet", &gen.SandboxNetworkConfig{}, &yes, cay.Egress{}},
		{"no internet", nil, &no, cay.Egress{Deny: all4}},
		{"internet, and all denied", &gen.SandboxNetworkConfig{DenyOut: []string{"0.0.0.0/0"}}, &yes, cay.Egress{Deny: all4}},
		{"no internet but for one", &gen.SandboxNetworkConfig{AllowOut: []string{"1.1.1.1"}}, &no, cay.Egress{Deny: all4, Allow: prefixes("1.1.1.1/32")}},
		{"no internet, a name", &gen.SandboxNetworkConfig{AllowOut: []string{"a.example"}}, &no, cay.Egress{Deny: all4, AllowNames: []string{"a.example"}}},
		{"all denied and all allowed", &gen.SandboxNetworkConfig{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"0.0.0.0/0", "a.example"}}, nil, cay.Egress{}},
		{"bits of the host, and IPv6", &gen.SandboxNetworkConfig{DenyOut: []string{"8.8.8.8/24", "2001:DB9::1/32", "::ffff:9.9.9.9", "::ffff:7.7.7.0/120"}}, nil,
			cay.Egress{Deny: prefixes("7.7.7.0/24", "8.8.8.0/24", "9.9.9.9/32", "2001:db9::/32")}},
		{"overlapping, twice, out of order", &gen.SandboxNetworkConfig{DenyOut: []string{"9.0.0.0/8", "8.8.8.0/24", "9.9.9.9", "8.8.8.0/25", "9.0.0.0/8"}}, nil,
			cay.Egress{Deny: prefixes("8.8.8.0/24", "9.0.0.0/8")}},
		{"names as people write them", &gen.SandboxNetworkConfig{DenyOut: []string{"0.0.0.0/0"},
			AllowOut: []string{"Bücher.Example.", "*.GitHub.com", "a.b", "A.B.", "xn--bcher-kva.example", "_dmarc.example.com", "8.8.8.8"}}, nil,
			cay.Egress{Deny: all4, Allow: prefixes("8.8.8.8/32"), AllowNames: []string{"*.github.com", "_dmarc.example.com", "a.b", "xn--bcher-kva.example"}}},
		{"rules", &gen.SandboxNetworkConfig{Rules: map[string][]gen.SandboxNetworkRule{
			"API.example.com": {{Transform: &gen.SandboxNetworkTransform{Headers: map[string]string{"Authorization": "Bearer ${e2b.secrets.KEY}"}}}},
			"*.b.example":     {{}}, "c.example": {},
		}}, nil, cay.Egress{Rules: []cay.EgressRule{{Name: "api.example.com", Headers: map[string]string{"Authorization": "Bearer ${e2b.secrets.KEY}"}}}}},
		{"proxy", &gen.SandboxNetworkConfig{EgressProxy: &gen.SandboxEgressProxyConfig{Address: "Proxy.Example.com:1080", Username: text("u"), Password: text("p")}}, nil,
			cay.Egress{Proxy: &cay.EgressProxy{Address: "proxy.example.com:1080", Username: "u", Password: "p"}}},
		{"proxy by address", &gen.SandboxNetworkConfig{EgressProxy: &gen.SandboxEgressProxyConfig{Address: "[2001:DB9::1]:1080"}}, nil,
			cay.Egress{Proxy: &cay.EgressProxy{Address: "[2001:db9::1]:1080"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := egress(tt.in, tt.allow)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, got.egress, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
				t.Error(d)
			}
		})
	}
}

// Whatever cannot be enforced is refused, with the field.
func TestEgressRefusals(t *testing.T) {
	f := newFixture(t)
	id := f.create("")
	rule := func(name, headers string) string {
		return fmt.Sprintf(`{"rules":{%q:[{"transform":{"headers":%s}}]}}`, name, headers)
	}
	many := func(n int, format string) string {
		var out []string
		for i := range n {
			out = append(out, fmt.Sprintf(format, i))
		}
		return strings.Join(out, ",")
	}
	for _, tt := range []struct {
		network string
		says    string
	}{
		{`{"denyOut":["example.com"]}`, `network.denyOut has "example.com"`},
		{`{"denyOut":["*.example.com"]}`, `not names`},
		{`{"denyOut":["10.0.0.0/33"]}`, `"10.0.0.0/33"`},
		{`{"denyOut":["10.0.0.0/-1"]}`, `network.denyOut`},
		{`{"denyOut":["10.0.0/8"]}`, `network.denyOut`},
		{`{"denyOut":["010.0.0.1"]}`, `network.denyOut`},
		{`{"denyOut":["1.2.3.4:80"]}`, `network.denyOut`},
		{`{"denyOut":["1.2.3.4-1.2.3.9"]}`, `network.denyOut`},
		{`{"denyOut":["fe80::1%eth0"]}`, `network.denyOut`},
		{`{"denyOut":["fe80::1/129"]}`, `network.denyOut`},
		{`{"denyOut":[""]}`, `network.denyOut`},
		{`{"denyOut":[" 1.2.3.4"]}`, `network.denyOut`},
		{`{"allowOut":["example.com"]}`, `Add 0.0.0.0/0 to network.denyOut`},
		{`{"allowOut":["example.com"],"denyOut":["::/0"]}`, `Add 0.0.0.0/0 to network.denyOut`},
		{`{"allowOut":["example.com"],"denyOut":["0.0.0.0/1","128.0.0.0/1"]}`, `Add 0.0.0.0/0 to network.denyOut`},
		{`{"allowOut":["1.2.3.4/33"],"denyOut":["0.0.0.0/0"]}`, `network.allowOut has "1.2.3.4/33"`},
		{`{"allowOut":["1.2.3"],"denyOut":["0.0.0.0/0"]}`, `ends in a number`},
		{`{"allowOut":["256.1.1.1"],"denyOut":["0.0.0.0/0"]}`, `ends in a number`},
		{`{"allowOut":["0x7f000001"],"denyOut":["0.0.0.0/0"]}`, `ends in a number`},
		{`{"allowOut":["*"],"denyOut":["0.0.0.0/0"]}`, `network.allowOut has "*"`},
		{`{"allowOut":["*.*.com"],"denyOut":["0.0.0.0/0"]}`, `network.allowOut`},
		{`{"allowOut":["a*.com"],"denyOut":["0.0.0.0/0"]}`, `network.allowOut`},
		{`{"allowOut":["https://example.com"],"denyOut":["0.0.0.0/0"]}`, `network.allowOut`},
		{`{"allowOut":["example.com:443"],"denyOut":["0.0.0.0/0"]}`, `network.allowOut`},
		{`{"allowOut":["exa mple.com"],"denyOut":["0.0.0.0/0"]}`, `network.allowOut`},
		{`{"allowOut":["a..b"],"denyOut":["0.0.0.0/0"]}`, `network.allowOut`},
		{`{"allowOut":["."],"denyOut":["0.0.0.0/0"]}`, `network.allowOut`},
		{`{"allowOut":[""],"denyOut":["0.0.0.0/0"]}`, `network.allowOut`},
		{`{"allowOut":["-a.com"],"denyOut":["0.0.0.0/0"]}`, `network.allowOut`},
		{`{"allowOut":["xn--a"],"denyOut":["0.0.0.0/0"]}`, `network.allowOut`},
		{`{"allowOut":["` + strings.Repeat("a", 64) + `.com"],"denyOut":["0.0.0.0/0"]}`, `network.allowOut`},
		{`{"allowOut":["` + strings.Repeat("a.", 127) + `com"],"denyOut":["0.0.0.0/0"]}`, `253`},
		{`{"denyOut":[` + many(10_001, `"1.%d.1.1"`) + `]}`, `network.denyOut`},
		{`{"rules":{"1.2.3.4":[]}}`, `network.rules has "1.2.3.4"`},
		{`{"rules":{"*":[]}}`, `network.rules has "*"`},
		{`{"rules":{"a.b":[],"A.B":[]}}`, `twice`},
		{`{"rules":{"a.b":[{},{}]}}`, `2 rules`},
		{`{"rules":{` + many(11, `"a%d.b":[]`) + `}}`, `11 domains`},
		{rule(strings.Repeat("abcdefg.", 16)+"com", `{"X":"y"}`), `128`},
		{rule("a.b", `{`+many(21, `"X-%d":"y"`)+`}`), `21 headers`},
		{rule("a.b", `{"X Y":"z"}`), `"X Y"`},
		{rule("a.b", `{"":"z"}`), `no header`},
		{rule("a.b", `{"`+strings.Repeat("x", 65)+`":"z"}`), `no header`},
		{rule("a.b", `{"X":"a\nb"}`), `control`},
		{rule("a.b", `{"X":"`+strings.Repeat("x", 2049)+`"}`), `2048`},
		{rule("a.b", `{"host":"evil.example"}`), `how a request is sent`},
		{rule("a.b", `{"Transfer-Encoding":"chunked"}`), `how a request is sent`},
		{rule("a.b", `{"X-A":"1","x-a":"2"}`), `twice`},
		{rule("a.b", `{"X":"${e2b.secrets.}"}`), `stands for nothing`},
		{rule("a.b", `{"X":"${e2b.secrets.A"}`), `stands for nothing`},
		{rule("a.b", `{"X":"${e2b.nonsense}"}`), `stands for nothing`},
		{rule("a.b", `{"X":"`+strings.ReplaceAll(many(33, `${e2b.secrets.N%d}`), ",", " ")+`"}`), `33 secrets`},
		{`{"egressProxy":{"address":""}}`, `network.egressProxy.address`},
		{`{"egressProxy":{"address":"proxy"}}`, `network.egressProxy.address`},
		{`{"egressProxy":{"address":"proxy:0"}}`, `network.egressProxy.address`},
		{`{"egressProxy":{"address":"proxy:65536"}}`, `network.egressProxy.address`},
		{`{"egressProxy":{"address":":1080"}}`, `network.egressProxy.address`},
		{`{"egressProxy":{"address":"socks5://proxy:1080"}}`, `network.egressProxy.address`},
		{`{"egressProxy":{"address":"2001:db8::1:1080"}}`, `network.egressProxy.address`},
		{`{"egressProxy":{"address":"[::1]x:1080"}}`, `network.egressProxy.address`},
		{`{"egressProxy":{"address":"*.b:1080"}}`, `network.egressProxy.address`},
		{`{"egressProxy":{"address":"a.b:1","password":"x"}}`, `no username`},
		{`{"egressProxy":{"address":"a.b:1","username":"` + strings.Repeat("x", 256) + `"}}`, ``},
	} {
		for _, how := range []answer{
			f.request("POST", "/v2/sandboxes", `{"templateID":"base","network":`+tt.network+`}`),
			f.request("PUT", "/sandboxes/"+string(id)+"/network", tt.network),
		} {
			if how.status != 400 || !strings.Contains(f.problem(how).Message, tt.says) {
				t.Errorf("%.120s: %d %.300s, want 400 with %q", tt.network, how.status, how.body, tt.says)
			}
		}
	}
	if e := f.node.configs[id].Egress; !e.Open() {
		t.Errorf("a refused update has changed the policy to %+v", e)
	}
	f.want(501, f.request("PUT", "/sandboxes/"+string(id)+"/network", rule("a.b", `{"X":"${e2b.identity.tokens.aws}"}`)))
}

// The largest lists work.
func TestEgressLarge(t *testing.T) {
	var n gen.SandboxNetworkConfig
	for i := range maxEntries {
		n.DenyOut = append(n.DenyOut, fmt.Sprintf("%d.%d.%d.0/25", 1+i>>16, i>>8&255, i&255))
		n.AllowOut = append(n.AllowOut, fmt.Sprintf("%d.%d.%d.7", 1+i>>16, i>>8&255, i&255))
	}
	got, err := egress(&n, nil)
	if err != nil || len(got.egress.Deny) != maxEntries || len(got.egress.Allow) != maxEntries {
		t.Errorf("%d denied, %d allowed, %v", len(got.egress.Deny), len(got.egress.Allow), err)
	}
}

// An update replaces all that a sandbox may reach, and nothing else of its
// network; what clients are told is what they asked for, but the password.
func TestNetworkUpdate(t *testing.T) {
	f := newFixture(t)
	id := f.create(`{"templateID":"base","allow_internet_access":false,"network":{"allowPublicTraffic":false,"maskRequestHost":"localhost:${PORT}","allowOut":["1.1.1.1"]}}`)
	put := func(body string) { f.want(204, f.request("PUT", "/sandboxes/"+string(id)+"/network", body)) }
	check := func(want cay.Egress, network string, internet *bool) {
		t.Helper()
		if got := f.node.configs[id].Egress; !reflect.DeepEqual(got, want) {
			t.Errorf("the node has %+v, want %+v", got, want)
		}
		d := f.info(id)
		b, err := json.Marshal(d.Network)
		if err != nil {
			t.Fatal(err)
		}
		if string(b) != network || !reflect.DeepEqual(d.AllowInternetAccess, internet) {
			t.Errorf("clients are told %s and %v, want %s", b, d.AllowInternetAccess, network)
		}
		cfg, err := f.s.config(f.record(id))
		if err != nil || !reflect.DeepEqual(cfg.Egress, want) || cfg.TrafficToken == "" || cfg.Ingress.MaskHost == "" {
			t.Errorf("a resume would have %+v, %v", cfg, err)
		}
	}
	no := false
	const kept = `"allowPublicTraffic":false,`
	const mask = `"maskRequestHost":"localhost:${PORT}"`
	check(cay.Egress{Deny: all4, Allow: prefixes("1.1.1.1/32")}, `{"allowOut":["1.1.1.1"],`+kept+mask+`}`, &no)
	put(`{"denyOut":["9.9.9.9/8"]}`)
	check(cay.Egress{Deny: prefixes("9.0.0.0/8")}, `{`+kept+`"denyOut":["9.9.9.9/8"],`+mask+`}`, nil)
	put(`{"allow_internet_access":false,"allowOut":["Example.com"],"egressProxy":{"address":"a.b:1","username":"u","password":"hunter2"},` +
		`"rules":{"API.b":[{"transform":{"headers":{"X":"y"}}}]}}`)
	check(cay.Egress{Deny: all4, AllowNames: []string{"example.com"}, Proxy: &cay.EgressProxy{Address: "a.b:1", Username: "u", Password: "hunter2"},
		Rules: []cay.EgressRule{{Name: "api.b", Headers: map[string]string{"X": "y"}}}},
		`{"allowOut":["Example.com"],`+kept+`"egressProxy":{"address":"a.b:1","username":"u"},`+mask+`,"rules":{"api.b":[{"transform":{"headers":{"X":"y"}}}]}}`, &no)
	if strings.Contains(f.request("GET", "/sandboxes/"+string(id), "").body, "hunter2") {
		t.Error("the password is told")
	}
	put(`{}`)
	check(cay.Egress{}, `{`+kept+mask+`}`, nil)

	url := "/sandboxes/" + string(id) + "/network"
	f.want(404, f.request("PUT", "/sandboxes/i00000000000000000000/network", `{}`))
	f.want(404, f.request("PUT", url, `{}`, "X-API-Key", f.foreign))
	f.want(401, f.request("PUT", url, `{}`, "X-API-Key", ""))
	f.want(400, f.request("PUT", url, `[]`))
	f.node.onEgress = func(cay.SandboxID) error { return errors.New("no") }
	f.want(500, f.request("PUT", url, `{"denyOut":["0.0.0.0/0"]}`))
	f.node.onEgress = nil
	check(cay.Egress{}, `{`+kept+mask+`}`, nil)
	f.want(204, f.request("POST", "/sandboxes/"+string(id)+"/pause", ""))
	f.want(409, f.request("PUT", url, `{"denyOut":["0.0.0.0/0"]}`))
	f.want(204, f.request("DELETE", "/sandboxes/"+string(id), ""))
	f.want(404, f.request("PUT", url, `{}`))
}

// A policy goes where the sandbox goes: over pauses, and to its forks.
func TestEgressInherited(t *testing.T) {
	f := newFixture(t)
	id := f.create(`{"templateID":"base"}`)
	f.want(204, f.request("PUT", "/sandboxes/"+string(id)+"/network", `{"denyOut":["0.0.0.0/0"],"allowOut":["8.8.8.8"]}`))
	want := cay.Egress{Deny: all4, Allow: prefixes("8.8.8.8/32")}
	var forks []gen.SandboxForkResult
	f.want(201, f.request("POST", "/sandboxes/"+string(id)+"/fork", `{"count":2}`)).decode(t, &forks)
	for _, k := range forks {
		if k.Sandbox == nil || !reflect.DeepEqual(f.node.configs[cay.SandboxID(k.Sandbox.SandboxID)].Egress, want) {
			t.Errorf("a fork: %+v", k)
		}
	}
	f.want(204, f.request("POST", "/sandboxes/"+string(id)+"/pause", ""))
	f.node.mu.Lock()
	delete(f.node.configs, id)
	f.node.mu.Unlock()
	f.want(201, f.request("POST", "/v2/sandboxes/"+string(id)+"/connect", ""))
	if got := f.node.configs[id].Egress; !reflect.DeepEqual(got, want) {
		t.Errorf("resumed with %+v", got)
	}
}

// A sandbox made from a snapshot has the policy that the sandbox had then,
// unless its creator says another.
func TestEgressFromSnapshot(t *testing.T) {
	f := newFixture(t)
	id := f.create(`{"templateID":"base","allow_internet_access":false,"network":{"allowOut":["8.8.8.8"],` +
		`"egressProxy":{"address":"a.b:1","username":"u","password":"hunter2"}}}`)
	var snap gen.SnapshotInfo
	f.want(201, f.request("POST", "/sandboxes/"+string(id)+"/snapshots", `{}`)).decode(t, &snap)
	f.want(204, f.request("PUT", "/sandboxes/"+string(id)+"/network", `{}`))
	from := func(more string) cay.Egress {
		t.Helper()
		made := f.create(`{"templateID":"` + snap.SnapshotID + `"` + more + `}`)
		cfg, err := f.s.config(f.record(made))
		if got := f.node.configs[made].Egress; err != nil || !reflect.DeepEqual(got, cfg.Egress) {
			t.Errorf("the node has %+v, a resume would have %+v, %v", got, cfg.Egress, err)
		}
		return cfg.Egress
	}
	want := cay.Egress{Deny: all4, Allow: prefixes("8.8.8.8/32"), Proxy: &cay.EgressProxy{Address: "a.b:1", Username: "u", Password: "hunter2"}}
	for more, e := range map[string]cay.Egress{
		"": want, `,"network":{}`: want, `,"network":{"maskRequestHost":"localhost"}`: want,
		`,"allow_internet_access":true`:      {},
		`,"network":{"denyOut":["9.9.9.9"]}`: {Deny: prefixes("9.9.9.9/32")},
		`,"allow_internet_access":false`:     {Deny: all4},
	} {
		if got := from(more); !reflect.DeepEqual(got, e) {
			t.Errorf("with %q: %+v, want %+v", more, got, e)
		}
	}
}

// What is on record is made so on the node, once the server runs again.
func TestEgressSettled(t *testing.T) {
	f := newFixture(t)
	a := f.create(`{"templateID":"base","network":{"denyOut":["8.8.8.8"]}}`)
	b := f.create(`{"templateID":"base"}`)
	want := f.node.configs[a].Egress
	f.node.mu.Lock()
	live := f.node.live[a]
	live.Egress = cay.Egress{}
	f.node.live[a] = live
	f.node.mu.Unlock()
	var told []cay.SandboxID
	f.node.onEgress = func(id cay.SandboxID) error { told = append(told, id); return nil }
	f.serve(nil)
	f.s.init()
	if err := f.s.life.reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := f.node.configs[a].Egress; !reflect.DeepEqual(got, want) || !slices.Equal(told, []cay.SandboxID{a}) {
		t.Errorf("the node has %+v, and was told of %v, not of %s alone (and not %s)", got, told, a, b)
	}
}

func FuzzNetwork(f *testing.F) {
	for _, s := range []string{"1.2.3.4", "10.0.0.0/8", "example.com", "*.Example.com.", "bücher.de", "::1", "fe80::1%x", "0x7f.1", "a_b.c", "xn--80ak6aa92e.com", "１.２.３.４"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, isRange := parseRange(s)
		if isRange && (p != p.Masked() || p.Addr().Is4In6() || p.Addr().Zone() != "") {
			t.Errorf("%q is the range %s", s, p)
		}
		name, err := parseName(s)
		if err != nil {
			return
		}
		if isRange {
			t.Errorf("%q is a range and a name", s)
		}
		again, err := parseName(name)
		if err != nil || again != name {
			t.Errorf("%q becomes %q, and that %q, %v", s, name, again, err)
		}
		if _, err := netip.ParseAddr(name); err == nil || strings.ToLower(name) != name || strings.Trim(name, "*.abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			t.Errorf("%q becomes %q", s, name)
		}
	})
}

// Operators see what was refused, and only operators.
func TestEgressLog(t *testing.T) {
	f := newFixture(t)
	id := f.create("")
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	f.node.refusals = []cay.EgressRefusal{
		{Seq: 3, First: at, Last: at.Add(time.Second), Count: 3, Protocol: "tcp", Destination: netip.MustParseAddrPort("8.8.8.8:53"), Rule: "0.0.0.0/0", Reason: "denied"},
		{Seq: 4, First: at, Last: at, Count: 1, Protocol: "icmp", Destination: netip.MustParseAddrPort("8.8.4.4:0"), Rule: "0.0.0.0/0", Reason: "denied"},
		{Seq: 5, First: at, Last: at, Count: 1, Protocol: "dns", Name: "a\xff.example", Rule: "names", Reason: "not allowed"},
	}
	url := "/operator/v1/sandboxes/" + string(id) + "/egress"
	var got []operator.EgressRefusal
	f.want(200, f.request("GET", url, "", "X-Admin-Token", testAdmin)).decode(t, &got)
	want := []operator.EgressRefusal{
		{Seq: 3, First: at, Last: at.Add(time.Second), Count: 3, Protocol: "tcp", Destination: "8.8.8.8:53", Rule: "0.0.0.0/0", Reason: "denied"},
		{Seq: 4, First: at, Last: at, Count: 1, Protocol: "icmp", Destination: "8.8.4.4", Rule: "0.0.0.0/0", Reason: "denied"},
		{Seq: 5, First: at, Last: at, Count: 1, Protocol: "dns", Name: "a\uFFFD.example", Rule: "names", Reason: "not allowed"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	f.want(200, f.request("GET", url+"?after=4", "", "X-Admin-Token", testAdmin)).decode(t, &got)
	if d := cmp.Diff(want[2:], got); d != "" {
		t.Error(d)
	}
	f.want(401, f.request("GET", url, ""))
	f.want(404, f.request("GET", "/operator/v1/sandboxes/i00000000000000000000/egress", "", "X-Admin-Token", testAdmin))
	f.want(400, f.request("GET", url+"?after=x", "", "X-Admin-Token", testAdmin))
}
