// Package edge uses the edge of the whole program as browsers, command lines and
// programs do: by host name over HTTPS, by host name and by headers over plain
// HTTP.
package edge

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/test/program"
	"github.com/cayhq/cay/test/sdk"
)

// guestEnv has this test binary be a program in a sandbox.
const guestEnv = "CAY_EDGE_GUEST"

func TestMain(m *testing.M) {
	if os.Getenv(guestEnv) != "" {
		fmt.Fprintln(os.Stderr, serveGuest())
		os.Exit(1)
	}
	program.Main(m, sdk.Install)
}

const domain = "sbx.localhost"

// patience is for what happens in a moment, and later on a busy machine.
const patience = time.Minute

// nameServer has the machine resolve every name below localhost and test to the
// loopback, as a wildcard record would.
var nameServer = sync.OnceValues(func() (string, error) {
	const addr = "127.0.0.53:53"
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(r)
		q := r.Question[0]
		switch name := strings.TrimSuffix(q.Name, "."); {
		case !strings.HasSuffix(name, ".localhost") && !strings.HasSuffix(name, ".test"):
			m.Rcode = dns.RcodeNameError
		case q.Qtype == dns.TypeA:
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.IPv4(127, 0, 0, 1)})
		}
		_ = w.WriteMsg(m)
	})
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		return "", err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return "", err
	}
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: handler}, {Listener: l, Handler: handler}} {
		go func() { _ = s.ActivateAndServe() }()
	}
	file := filepath.Join(program.NewDir() + ".resolv.conf")
	if err := os.WriteFile(file, []byte("nameserver 127.0.0.53\n"), 0o644); err != nil {
		return "", err
	}
	return addr, unix.Mount(file, "/etc/resolv.conf", "", unix.MS_BIND, "")
})

// edge is a server with HTTPS, and a sandbox with the guest's services in it.
type edge struct {
	*program.Server
	client *program.Client
	box    *program.Sandbox
	roots  *x509.CertPool
	caFile string
	secure string // ":" and the port of HTTPS, if it is not 443
}

// localDomain are the arguments of a server with a local authority.
var localDomain = []string{"--domain", domain, "--certificates", "local"}

// startEdge starts such a server.
func startEdge(t *testing.T, args ...string) *edge {
	t.Helper()
	if _, err := nameServer(); err != nil {
		t.Fatal(err)
	}
	e := &edge{Server: program.Start(t, program.Options{Args: append(args, localDomain...)})}
	e.client = e.Client()
	e.caFile = filepath.Join(e.Dir, "certificates", "local", domain, "ca.pem")
	pem, err := os.ReadFile(e.caFile)
	if err != nil {
		t.Fatal(err)
	}
	e.roots = x509.NewCertPool()
	if !e.roots.AppendCertsFromPEM(pem) {
		t.Fatal("the authority's file holds no certificate")
	}
	return e
}

// inhabit makes a sandbox and runs the services in it.
func (e *edge) inhabit(t *testing.T, more map[string]any) *program.Sandbox {
	t.Helper()
	box := e.client.Make(t, 20*time.Minute, more)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := box.Write(t.Context(), "/home/user/guest", self); err != nil {
		t.Fatal(err)
	}
	p, err := box.Start(t.Context(), "", "chmod +x guest && "+guestEnv+"=1 exec ./guest >log 2>&1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			if log, err := box.Read(context.Background(), "/home/user/log"); err == nil {
				t.Logf("the services said: %s", log)
			}
		}
		_ = p.Leave() // it ends with the sandbox
	})
	program.Eventually(t, patience, func() string {
		r, err := box.Exec(t.Context(), "", "curl -fsS http://127.0.0.1:8080/hello >/dev/null && curl -fsSk https://127.0.0.1:8443/hello >/dev/null && (echo >/dev/tcp/127.0.0.1/9090)")
		if err != nil || r.Code != 0 {
			return fmt.Sprint("the services do not answer in the sandbox: ", err, r)
		}
		return ""
	})
	return box
}

func (e *edge) host(port int) string { return fmt.Sprintf("%d-%s.%s", port, e.box.ID, domain) }

// way is one of the ways to a port of a sandbox.
type way struct {
	name string
	base func(e *edge, port int) string // URL without a path
	head func(e *edge, port int) http.Header
}

func none(*edge, int) http.Header { return http.Header{} }

func routing(e *edge, port int) http.Header {
	return http.Header{"E2b-Sandbox-Id": {e.box.ID}, "E2b-Sandbox-Port": {fmt.Sprint(port)}}
}

var ways = []way{
	{"https", func(e *edge, port int) string { return "https://" + e.host(port) + e.secure }, none},
	{"https by headers", func(e *edge, _ int) string { return "https://sandbox." + domain + e.secure }, routing},
	{"plain", func(e *edge, port int) string { return "http://" + e.host(port) + e.proxyPort() }, none},
	{"plain by headers", func(e *edge, _ int) string { return e.Proxy }, routing},
}

func (e *edge) proxyPort() string { return e.Proxy[strings.LastIndexByte(e.Proxy, ':'):] }

// http is a client that trusts the authority.
func (e *edge) http(protocols func(*http.Protocols)) *http.Client {
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: e.roots}, Protocols: new(http.Protocols), DialContext: dialLocal}
	protocols(tr.Protocols)
	return &http.Client{Transport: tr}
}

// dialLocal connects to the loopback, whatever the name: the test's own
// resolver may have been read before the name server was there.
func dialLocal(ctx context.Context, network, addr string) (net.Conn, error) {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	return (&net.Dialer{}).DialContext(ctx, network, "127.0.0.1:"+port)
}
