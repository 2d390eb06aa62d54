package proxy

import (
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cayhq/cay"
)

const sbx = "i1a2b3c4d5e6f7g8h9j0k"

func headers(kv ...string) http.Header {
	h := http.Header{}
	for i := 0; i < len(kv); i += 2 {
		h.Add(kv[i], kv[i+1])
	}
	return h
}

func TestParseTarget(t *testing.T) {
	both := headers(headerSandbox, sbx, headerPort, "3000")
	for _, c := range []struct {
		name, host string
		h          http.Header
		want       string // "port id", or the start of the refusal
	}{
		{"host", "3000-" + sbx + ".sbx.example.com", nil, "3000 " + sbx},
		{"host with port", "3000-" + sbx + ".sbx.localhost:3343", nil, "3000 " + sbx},
		{"host with empty port", "3000-" + sbx + ".localhost:", nil, "3000 " + sbx},
		{"old form", "49983-" + sbx + "-00000000.localhost", nil, "49983 " + sbx},
		{"many dashes", "1-" + sbx + "-a-b-c.x", nil, "1 " + sbx},
		{"empty tail", "1-" + sbx + "-.x", nil, "1 " + sbx},
		{"final dot", "3000-" + sbx + ".example.com.", nil, "3000 " + sbx},
		{"agreeing headers", "3000-" + sbx + ".example.com", both, "3000 " + sbx},
		{"header with client id", "127.0.0.1:3002", headers(headerSandbox, sbx+"-6532622b", headerPort, "80"), "80 " + sbx},
		{"localhost", "localhost:3002", both, "3000 " + sbx},
		{"LOCALHOST", "LocalHost", both, "3000 " + sbx},
		{"localhost.", "localhost.", both, "3000 " + sbx},
		{"v4", "127.0.0.1", both, "3000 " + sbx},
		{"v6", "[::1]:3002", both, "3000 " + sbx},
		{"v6 without port", "[fd00::7]", both, "3000 " + sbx},
		{"v4 in v6", "[::ffff:10.0.0.1]:80", both, "3000 " + sbx},
		{"shared host", "sandbox.example.com", both, "3000 " + sbx},
		{"shared host in capitals", "Sandbox.EXAMPLE.com:443", both, "3000 " + sbx},

		{"no host", "", nil, "the request has no Host"},
		{"only a dot", ".", nil, "the request has no Host"},
		{"only a port", ":3002", both, "the request has no Host"},
		{"id missing", "localhost", headers(headerPort, "80"), "the header E2b-Sandbox-Id is missing"},
		{"port missing", "localhost", headers(headerSandbox, sbx), "the header E2b-Sandbox-Port is missing"},
		{"port empty", "localhost", headers(headerSandbox, sbx, headerPort, ""), "the header E2b-Sandbox-Port is missing"},
		{"no headers", "localhost:3002", nil, "the Host names no sandbox"},
		{"ip without headers", "127.0.0.1:3002", nil, "the Host names no sandbox"},
		{"other shared host", "sandbox.example.org", both, "the Host names no sandbox"},
		{"no dot", "3000-" + sbx, both, "the Host names no sandbox"},
		{"no dash", "3000.example.com", both, "the Host names no sandbox"},
		{"port is a word", "http-" + sbx + ".x", nil, "the port is malformed"},
		{"port 0", "0-" + sbx + ".x", nil, "the port is malformed"},
		{"port 65536", "65536-" + sbx + ".x", nil, "the port is malformed"},
		{"port with a zero", "080-" + sbx + ".x", nil, "the port is malformed"},
		{"port with a sign", "+80-" + sbx + ".x", nil, "the Host is no name"},
		{"port empty in host", "-" + sbx + ".x", nil, "the port is malformed"},
		{"header port 65536", "localhost", headers(headerSandbox, sbx, headerPort, "65536"), "the port is malformed"},
		{"header port hex", "localhost", headers(headerSandbox, sbx, headerPort, "0x50"), "the port is malformed"},
		{"header port spaced", "localhost", headers(headerSandbox, sbx, headerPort, " 80"), "the port is malformed"},
		{"capitals in id", "80-I1A2.x", nil, "the sandbox ID in the Host is malformed"},
		{"empty id", "80-.x", nil, "the sandbox ID in the Host is malformed"},
		{"userinfo", "a@80-" + sbx + ".x", nil, "the Host is no name"},
		{"percent", "80-%69.x", nil, "the Host is no name"},
		{"NUL", "80-" + sbx + "\x00.x", nil, "the Host is no name"},
		{"space in domain", "80-" + sbx + ".x y", nil, "the Host is no name"},
		{"slash in domain", "80-" + sbx + ".x/init", nil, "the Host is no name"},
		{"IDNA", "80-" + sbx + ".bücher.de", nil, "the Host is no name"},
		{"IDNA in ASCII", "80-" + sbx + ".xn--bcher-kva.de", nil, "80 " + sbx},
		{"full-width digits", "８０-" + sbx + ".x", nil, "the Host is no name"},
		{"ideographic stop", "80-" + sbx + "。x", nil, "the Host is no name"},
		{"zone of an address", "[fe80::1%25eth0]:80", both, "the Host is no name"},
		{"capitals in domain", "80-" + sbx + ".SBX.Example.COM", nil, "80 " + sbx},
		{"path in id", "localhost", headers(headerSandbox, "../../x", headerPort, "80"), "the sandbox ID is malformed"},
		{"three parts in header", "localhost", headers(headerSandbox, sbx+"-a-b", headerPort, "80"), "the sandbox ID is malformed"},
		{"contradicting id", "3000-" + sbx + ".x", headers(headerSandbox, "iother", headerPort, "3000"), "the header E2b-Sandbox-Id and the Host"},
		{"contradicting port", "3000-" + sbx + ".x", headers(headerSandbox, sbx, headerPort, "49983"), "the header E2b-Sandbox-Port and the Host"},
		{"id twice", "localhost", headers(headerSandbox, sbx, headerSandbox, "iother", headerPort, "80"), "a routing header is there twice"},
		{"port twice", "localhost", headers(headerSandbox, sbx, headerPort, "80", headerPort, "81"), "a routing header is there twice"},
		{"open bracket", "[::1", both, "the Host has an opening bracket"},
		{"name in brackets", "[localhost]:80", both, "the Host has brackets"},
		{"text after bracket", "[::1]x", both, "the port of the Host"},
		{"v6 bare", "::1", both, "the port of the Host"},
		{"port of host a word", "localhost:http", both, "the port of the Host"},
		{"300 labels", strings.Repeat("a.", 300) + "x", nil, "the Host is no name"},
		{"100 labels", strings.Repeat("a.", 100) + "x", nil, "the Host names no sandbox"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseTarget(c.host, c.h, "example.com")
			text := strconv.Itoa(int(got.port)) + " " + string(got.sandbox)
			if err != nil {
				text = err.Error()
			}
			if err == nil && text != c.want || err != nil && !strings.HasPrefix(text, c.want) {
				t.Fatalf("parseTarget(%q, %v) = %q, want %q", c.host, c.h, text, c.want)
			}
		})
	}
}

// oracle is a second parser of the same rules, written from the contract with
// regular expressions and without a look at the first.
func oracle(host, id, port string, ids, ports int, domain string) (cay.SandboxID, int, bool) {
	if ids > 1 || ports > 1 {
		return "", 0, false
	}
	var (
		authority = regexp.MustCompile(`\A(?:\[([^\]]*)\]|([^:\[][^:]*))(?::[0-9]*)?\z`)
		aName     = regexp.MustCompile(`\A[-._:A-Za-z0-9]{1,253}\z`)
		inHost    = regexp.MustCompile(`\A([1-9][0-9]{0,4})-([a-z0-9]{1,64})(?:-[^.]*)?\..*\z`)
		inHeader  = regexp.MustCompile(`\A([a-z0-9]{1,64})(?:-[^-]+)?\z`)
		number    = regexp.MustCompile(`\A[1-9][0-9]{0,4}\z`)
	)
	m := authority.FindStringSubmatch(strings.ReplaceAll(host, "\n", "\x00"))
	if m == nil {
		return "", 0, false
	}
	name := m[1] + m[2]
	_, ipErr := netip.ParseAddr(name)
	if m[1] != "" || strings.HasPrefix(host, "[") {
		if ipErr != nil {
			return "", 0, false
		}
	}
	name = strings.TrimSuffix(name, ".")
	if !aName.MatchString(name) {
		return "", 0, false
	}
	if _, err := netip.ParseAddr(name); id != "" || port != "" {
		shared := []string{"localhost"}
		if domain != "" {
			shared = append(shared, "sandbox."+domain)
		}
		if err == nil || slices.ContainsFunc(shared, func(s string) bool { return strings.EqualFold(s, name) }) {
			n, _ := strconv.Atoi(port)
			hm := inHeader.FindStringSubmatch(strings.ReplaceAll(id, "\n", "\x00"))
			if hm == nil || !number.MatchString(port) || n > 65535 {
				return "", 0, false
			}
			return cay.SandboxID(hm[1]), n, true
		}
	}
	hm := inHost.FindStringSubmatch(name)
	if hm == nil {
		return "", 0, false
	}
	n, _ := strconv.Atoi(hm[1])
	if n > 65535 || port != "" && port != hm[1] {
		return "", 0, false
	}
	if id != "" {
		if im := inHeader.FindStringSubmatch(strings.ReplaceAll(id, "\n", "\x00")); im == nil || im[1] != hm[2] {
			return "", 0, false
		}
	}
	return cay.SandboxID(hm[2]), n, true
}

func FuzzParseTarget(f *testing.F) {
	for _, host := range []string{"3000-" + sbx + ".x:1", "localhost", "[::1]:80", "127.0.0.1.", "sandbox.example.com", "49983-a-b-c.d", "::1", "[", "[]", "a@b", "80-a\n.x", "\n", ".", "..", "1-a..", "[::1%25x]"} {
		f.Add(host, sbx, "3000", uint8(0), "example.com")
		f.Add(host, "", "", uint8(0), "")
		f.Add(host, sbx+"-x", "65536", uint8(1), "")
		f.Add(host, sbx, "80", uint8(2), ".")
	}
	f.Fuzz(func(t *testing.T, host, id, port string, twice uint8, domain string) {
		h := headers(headerSandbox, id, headerPort, port)
		ids, ports := 1, 1
		if twice&1 != 0 {
			h.Add(headerSandbox, id)
			ids++
		}
		if twice&2 != 0 {
			h.Add(headerPort, port)
			ports++
		}
		got, err := parseTarget(host, h, domain)
		wantID, wantPort, ok := oracle(host, id, port, ids, ports, domain)
		if (err == nil) != ok || ok && (got.sandbox != wantID || int(got.port) != wantPort) {
			t.Fatalf("host %q id %q port %q domain %q: parser says %+v, %v; oracle says %q %d %v", host, id, port, domain, got, err, wantID, wantPort, ok)
		}
	})
}
