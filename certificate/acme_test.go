package certificate

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"
	"github.com/miekg/dns"
)

const testDomain = "sbx.test"

// nameServer is the primary server of sbx.test: its records can be changed by
// RFC 2136, with a key, and by a file that a hook writes.
type nameServer struct {
	addr string
	key  TSIG
	file string // lines "NAME VALUE"

	mu      sync.Mutex
	records map[string][]string
	refused int // changes without the key
	changes []string
}

func newNameServer(t *testing.T) *nameServer {
	t.Helper()
	s := &nameServer{key: TSIG{Name: "cay.", Algorithm: dns.HmacSHA256, Secret: "c2VzYW1lLXNlc2FtZS1zZXNhbWU="},
		file: filepath.Join(t.TempDir(), "records"), records: map[string][]string{}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	pc, err := net.ListenPacket("udp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	for _, srv := range []*dns.Server{{Listener: l}, {PacketConn: pc}} {
		srv.Handler, srv.TsigSecret = s, map[string]string{s.key.Name: s.key.Secret}
		srv.MsgAcceptFunc = func(dh dns.Header) dns.MsgAcceptAction {
			if int(dh.Bits>>11)&0xF == dns.OpcodeUpdate {
				return dns.MsgAccept
			}
			return dns.DefaultMsgAcceptFunc(dh)
		}
		up := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(up) }
		go func() { _ = srv.ActivateAndServe() }()
		<-up
		t.Cleanup(func() { _ = srv.Shutdown() })
	}
	return s
}

// ServeDNS implements [dns.Handler].
func (s *nameServer) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := new(dns.Msg)
	m.SetReply(r)
	m.Authoritative = true
	if r.Opcode == dns.OpcodeUpdate {
		if r.IsTsig() == nil || w.TsigStatus() != nil || len(r.Question) != 1 || r.Question[0].Name != testDomain+"." {
			s.refused++
			m.Rcode = dns.RcodeRefused
			_ = w.WriteMsg(m)
			return
		}
		for _, rr := range r.Ns {
			txt, ok := rr.(*dns.TXT)
			if !ok {
				continue
			}
			name := rr.Header().Name
			if rr.Header().Class == dns.ClassNONE {
				s.records[name] = without(s.records[name], txt.Txt[0])
				s.changes = append(s.changes, "-"+name)
			} else {
				s.records[name] = append(s.records[name], txt.Txt[0])
				s.changes = append(s.changes, "+"+name)
			}
		}
		m.SetTsig(s.key.Name, s.key.Algorithm, 300, time.Now().Unix())
		_ = w.WriteMsg(m)
		return
	}
	q := r.Question[0]
	name := strings.ToLower(q.Name)
	soa := &dns.SOA{Hdr: dns.RR_Header{Name: testDomain + ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 1}, Ns: "ns." + testDomain + ".", Mbox: "a.b.", Serial: 1, Minttl: 1}
	hdr := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: 1}
	switch {
	case !dns.IsSubDomain(testDomain+".", name):
		m.Rcode = dns.RcodeRefused
	case q.Qtype == dns.TypeSOA && name == testDomain+".":
		m.Answer = append(m.Answer, soa)
	case q.Qtype == dns.TypeA:
		m.Answer = append(m.Answer, &dns.A{Hdr: hdr, A: net.IPv4(127, 0, 0, 1)})
	case q.Qtype == dns.TypeTXT:
		values := s.records[name]
		if b, err := os.ReadFile(s.file); err == nil {
			for line := range strings.Lines(string(b)) {
				if f := strings.Fields(line); len(f) == 2 && f[0] == name {
					values = append(values, f[1])
				}
			}
		}
		for _, v := range values {
			m.Answer = append(m.Answer, &dns.TXT{Hdr: hdr, Txt: []string{v}})
		}
		if len(values) == 0 {
			m.Ns = append(m.Ns, soa)
		}
	default:
		m.Ns = append(m.Ns, soa)
	}
	_ = w.WriteMsg(m)
}

func without(list []string, v string) (out []string) {
	for _, x := range list {
		if x != v {
			out = append(out, x)
		}
	}
	return out
}

// pebble is the ACME server that Let's Encrypt tests clients with.
type pebble struct {
	directory, roots string // of its own HTTPS
	issued           *x509.CertPool
	closed           func()
}

func newPebble(t *testing.T, resolver string, httpPort, tlsPort int) *pebble {
	t.Helper()
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")
	t.Setenv("PEBBLE_WFE_NONCEREJECT", "20")
	quiet := log.New(io.Discard, "", 0)
	store := db.NewMemoryStore()
	issuer := ca.New(quiet, store, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {Description: "the default"}})
	validator := va.New(quiet, httpPort, tlsPort, false, resolver, store)
	front := wfe.New(quiet, store, validator, issuer, []string{"pebble.letsencrypt.org"}, false, false, 1, 1)
	srv := httptest.NewTLSServer(front.Handler())
	t.Cleanup(srv.Close)
	a := &pebble{directory: srv.URL + wfe.DirectoryPath, roots: filepath.Join(t.TempDir(), "roots.pem"), issued: x509.NewCertPool(), closed: srv.Close}
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(a.roots, root, 0o600); err != nil {
		t.Fatal(err)
	}
	a.issued.AddCert(issuer.GetRootCert(0).Cert)
	return a
}

// serve gives a source a listener for handshakes and one for plain HTTP, and
// returns their ports.
func listenTwice(t *testing.T) (plain, secure net.Listener) {
	t.Helper()
	for _, l := range []*net.Listener{&plain, &secure} {
		var err error
		if *l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	return plain, secure
}

func portOf(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }

func serve(t *testing.T, plain, secure net.Listener, a *ACME) {
	t.Helper()
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !a.Challenge(w, r) {
			fmt.Fprint(w, "ours")
		}
	})
	for _, s := range []struct {
		l   net.Listener
		cfg *tls.Config
	}{{plain, nil}, {secure, TLS(a)}} {
		l := s.l
		if s.cfg != nil {
			l = tls.NewListener(l, s.cfg)
		}
		srv := &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0)}
		go func() { _ = srv.Serve(l) }()
		t.Cleanup(func() { _ = srv.Close() })
	}
}

// get asks for a name until a handshake succeeds, and returns the certificate.
func get(t *testing.T, addr, name string, roots *x509.CertPool, within time.Duration) (*x509.Certificate, error) {
	t.Helper()
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: &tls.Config{ServerName: name, RootCAs: roots, NextProtos: []string{"http/1.1"}}}
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	for {
		c, err := d.DialContext(ctx, "tcp", addr)
		if err == nil {
			leaf := c.(*tls.Conn).ConnectionState().PeerCertificates[0]
			c.Close()
			return leaf, nil
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// patience is what a busy machine may take for an order.
const patience = time.Minute

func testLog(t *testing.T) *slog.Logger {
	var b lockedBuffer
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(b.String())
		}
	})
	return slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A wildcard certificate is had from a real ACME server, by RFC 2136 and by a
// hook; the records are taken back; and a server that starts again needs no
// authority.
func TestWildcardByDNS(t *testing.T) {
	for _, how := range []string{"update", "hook"} {
		t.Run(how, func(t *testing.T) {
			ns := newNameServer(t)
			plain, secure := listenTwice(t)
			ca := newPebble(t, ns.addr, portOf(plain), portOf(secure))
			var by DNS = Update{Server: ns.addr, Key: ns.key}
			if how == "hook" {
				script := filepath.Join(t.TempDir(), "hook")
				text := "#!/bin/sh\nset -e\ncase $1 in\npresent) echo \"$2 $3\" >>" + ns.file +
					";;\ncleanup) grep -v -F \"$2 $3\" " + ns.file + " >" + ns.file + ".new || true; mv " + ns.file + ".new " + ns.file + ";;\nesac\n"
				if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
					t.Fatal(err)
				}
				by = Hook{script}
			}
			dir := t.TempDir()
			start := func() *ACME {
				a := &ACME{Domain: testDomain, Email: "a@sbx.test", Directory: ca.directory, Roots: ca.roots, Dir: dir, DNS: by, Resolver: ns.addr,
					HTTPPort: portOf(plain), TLSPort: portOf(secure), Log: testLog(t)}
				if err := a.Open(t.Context()); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = a.Close() })
				return a
			}
			a := start()
			serve(t, plain, secure, a)
			leaf, err := get(t, secure.Addr().String(), "3000-i1a2b3."+testDomain, ca.issued, patience)
			if err != nil {
				t.Fatal(err)
			}
			if len(leaf.DNSNames) != 1 || leaf.DNSNames[0] != "*."+testDomain {
				t.Errorf("it is for %v", leaf.DNSNames)
			}
			if left, err := os.ReadFile(ns.file); err == nil && len(left) > 0 {
				t.Errorf("the hook's record is left: %s", left)
			}
			ns.mu.Lock()
			if n := len(ns.records["_acme-challenge."+testDomain+"."]); n != 0 || how == "update" && len(ns.changes) != 2 {
				t.Errorf("%d records are left; changes: %v", n, ns.changes)
			}
			ns.mu.Unlock()

			_ = a.Close()
			ca.closed()
			plain, secure = listenTwice(t)
			serve(t, plain, secure, start())
			if got, err := get(t, secure.Addr().String(), "x."+testDomain, ca.issued, patience); err != nil || !got.Equal(leaf) {
				t.Errorf("after a restart: %v, or another certificate", err)
			}
		})
	}
}

// Without DNS each name gets a certificate when it is first asked for, if it
// may.
func TestOnDemand(t *testing.T) {
	ns := newNameServer(t)
	plain, secure := listenTwice(t)
	ca := newPebble(t, ns.addr, portOf(plain), portOf(secure))
	a := &ACME{Domain: testDomain, Directory: ca.directory, Roots: ca.roots, Dir: t.TempDir(),
		HTTPPort: portOf(plain), TLSPort: portOf(secure), Log: testLog(t),
		Allow: func(_ context.Context, name string) error {
			if name != "3000-i1."+testDomain && name != "api."+testDomain && name != "sandbox."+testDomain {
				return errors.New("no such sandbox")
			}
			return nil
		}}
	if err := a.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	serve(t, plain, secure, a)
	for _, name := range []string{"3000-i1." + testDomain, "api." + testDomain} {
		leaf, err := get(t, secure.Addr().String(), name, ca.issued, patience)
		if err != nil {
			t.Fatal(err)
		}
		if leaf.DNSNames[0] != name {
			t.Errorf("asked for %s, got %v", name, leaf.DNSNames)
		}
	}
	for _, name := range []string{"3000-i2." + testDomain, "a.3000-i1." + testDomain, "example.com", ""} {
		c, err := tls.Dial("tcp", secure.Addr().String(), &tls.Config{ServerName: name, InsecureSkipVerify: true})
		if err == nil {
			t.Errorf("%q has a certificate for %v", name, c.ConnectionState().PeerCertificates[0].DNSNames)
			c.Close()
		}
	}
}

func TestUpdateErrors(t *testing.T) {
	ns := newNameServer(t)
	other := ns.key
	other.Secret = "d3JvbmctDXdyb25nLXdyb25n"
	for name, u := range map[string]Update{
		"no key":    {Server: ns.addr},
		"wrong key": {Server: ns.addr, Key: other},
		"nobody":    {Server: "127.0.0.1:1", Key: ns.key},
	} {
		if err := u.Set(t.Context(), testDomain+".", "_acme-challenge."+testDomain+".", "v"); err == nil || !strings.Contains(err.Error(), "changing _acme-challenge") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if ns.refused != 2 || len(ns.records) != 0 {
		t.Errorf("refused %d, records %v", ns.refused, ns.records)
	}
}

func TestHookErrors(t *testing.T) {
	script := filepath.Join(t.TempDir(), "hook")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho $1 is not possible; exit 3\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	err := Hook{script}.Set(t.Context(), "z.", "n.", "v")
	if err == nil || !strings.Contains(err.Error(), "present is not possible") {
		t.Error(err)
	}
}
