package egress

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
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

	"github.com/cayhq/cay"
)

const canary = "canary-5e3c1a"

// outside is a TLS server of the world, trusted through pool.
func outside(t *testing.T, w *world, to string, h http.Handler, names ...string) (pool *x509.CertPool) {
	t.Helper()
	ca, err := openIssuer(t.TempDir(), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(h)
	srv.EnableHTTP2 = true
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	srv.TLS = &tls.Config{GetCertificate: func(chi *tls.ClientHelloInfo) (*tls.Certificate, error) {
		for _, n := range names {
			if chi.ServerName == n {
				return ca.leafFor(n)
			}
		}
		return ca.leafFor("wrong.example")
	}}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	w.at(to, srv.Listener.Addr().String())
	pool = x509.NewCertPool()
	pool.AddCert(ca.ca.Cert)
	return pool
}

// client is one in the guest, whose trust store has the node's authority. Its
// connections go to an address, whatever the URL.
func (in *island) client(t *testing.T, to string, http2 bool) *http.Client {
	bundle, err := in.server.Bundle()
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(bundle)) {
		t.Fatal("the bundle holds no certificate")
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: http2,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return in.connect(to), nil }}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func withRule(name string, headers map[string]string) cay.Egress {
	e := onlyNames(name)
	e.Rules = []cay.EgressRule{{Name: name, Headers: headers}}
	return e
}

func secrets(known map[string]cay.Secret) func(context.Context, cay.TeamID, string) (cay.Secret, error) {
	return func(_ context.Context, team cay.TeamID, name string) (cay.Secret, error) {
		if v, ok := known[name]; ok && team == "team" {
			return v, nil
		}
		return "", &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerStorage, Message: fmt.Sprintf("there is no secret %q", name), Fix: "create it"}
	}
}

// A rule's headers arrive outside, over each version of HTTP on each side.
func TestRuleHeaders(t *testing.T) {
	w := newWorld(t, "api.example.com A 5.5.5.5")
	var mu sync.Mutex
	var got []*http.Request
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		mu.Lock()
		got = append(got, r)
		mu.Unlock()
		rw.Header().Set("Trailer", "X-Sum")
		fmt.Fprintf(rw, "%s %s %d", r.Method, r.URL.RequestURI(), len(b))
		rw.Header().Set("X-Sum", "42")
	})
	s := newServer(t, w)
	s.Roots = outside(t, w, "5.5.5.5:443", h, "api.example.com")
	s.Secret = secrets(map[string]cay.Secret{"openai-key": canary, "b": "two"})
	plain := httptest.NewServer(h)
	defer plain.Close()
	w.at("5.5.5.5:80", plain.Listener.Addr().String())
	in := attach(t, w, s, withRule("api.example.com", map[string]string{
		"authorization": "Bearer ${e2b.secrets.OpenAI-key}", "X-Both": "<${e2b.secrets.b}|${e2b.secrets.b}>", "X-Plain": "$ {x} ${e2b.other}"}))

	for _, tc := range []struct {
		what, url, to string
		http2         bool
	}{
		{"HTTP/1 over TLS", "https://api.example.com/a%2Fb?q=1;2", "5.5.5.5:443", false},
		{"HTTP/2", "https://api.example.com/a%2Fb?q=1;2", "5.5.5.5:443", true},
		{"HTTP/1", "http://api.example.com/a%2Fb?q=1;2", "5.5.5.5:80", false},
	} {
		got = nil
		req, _ := http.NewRequest(http.MethodPost, tc.url, io.MultiReader(strings.NewReader("body"), strings.NewReader("more")))
		req.Header.Set("Authorization", "guest's own")
		req.Header.Set("X-Forwarded-For", "1.1.1.1")
		req.Header["User-Agent"] = nil
		req.Trailer = http.Header{"X-End": {"sent"}}
		resp, err := in.client(t, tc.to, tc.http2).Do(req)
		if err != nil {
			t.Fatalf("%s: %v", tc.what, err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if want := "POST /a%2Fb?q=1;2 8"; string(b) != want || resp.Trailer.Get("X-Sum") != "42" {
			t.Errorf("%s: the answer is %q with trailer %q, want %q", tc.what, b, resp.Trailer.Get("X-Sum"), want)
		}
		if (resp.ProtoMajor == 2) != tc.http2 {
			t.Errorf("%s: the guest was answered in HTTP/%d", tc.what, resp.ProtoMajor)
		}
		if len(got) != 1 {
			t.Fatalf("%s: %d requests have arrived", tc.what, len(got))
		}
		r := got[0]
		for name, want := range map[string]string{"Authorization": "Bearer " + canary, "X-Both": "<two|two>", "X-Plain": "$ {x} ${e2b.other}",
			"X-Forwarded-For": "1.1.1.1", "User-Agent": "", "Accept-Encoding": "gzip", "Via": ""} {
			if v := strings.Join(r.Header[name], ","); v != want {
				t.Errorf("%s: outside, %s is %q, want %q", tc.what, name, v, want)
			}
		}
		if r.Host != "api.example.com" || r.Trailer.Get("X-End") != "sent" {
			t.Errorf("%s: outside, Host is %q and the trailer %q", tc.what, r.Host, r.Trailer)
		}
		if r.ProtoMajor != 2 && r.TLS != nil {
			t.Errorf("%s: the destination was asked in %s", tc.what, r.Proto)
		}
	}
	if r := in.refused(); len(r) != 0 {
		t.Errorf("refused: %+v", r)
	}
}

// What cannot be resolved is not sent, and the guest is told what to do.
func TestRuleUnresolved(t *testing.T) {
	w := newWorld(t, "api.example.com A 5.5.5.5")
	s := newServer(t, w)
	s.Roots = outside(t, w, "5.5.5.5:443", http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a request has arrived") }), "api.example.com")
	s.Secret = func(ctx context.Context, team cay.TeamID, name string) (cay.Secret, error) {
		if name == "newline" {
			return canary + "\n", nil
		}
		if name == "broken" {
			return "", errors.New("sql: internal detail")
		}
		return secrets(nil)(ctx, team, name)
	}
	for value, want := range map[string]string{
		"${e2b.secrets.missing}":      `there is no secret "missing"; create it`,
		"${e2b.secrets.newline}":      "line break in its value",
		"${e2b.secrets.broken}":       "cannot be had now",
		"${e2b.identity.tokens.aws}":  `identity token "aws"`,
		"x${e2b.secrets.missing}tail": "missing",
	} {
		in := attach(t, w, s, withRule("api.example.com", map[string]string{"X": value}))
		resp, err := in.client(t, "5.5.5.5:443", true).Get("https://api.example.com/")
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadGateway || !strings.Contains(string(b), want) {
			t.Errorf("%s: %s %s; want %q", value, resp.Status, b, want)
		}
		if strings.Contains(string(b), canary) || strings.Contains(string(b), "sql") {
			t.Errorf("%s: the guest is told %s", value, b)
		}
		if r := in.refused(); len(r) != 1 || r[0].Rule != "api.example.com" {
			t.Errorf("%s: reported %+v", value, r)
		}
	}
}

// The names of a connection that ended here are compared, its destination is
// verified, and TRACE is refused.
func TestRuleDefences(t *testing.T) {
	w := newWorld(t, "api.example.com A 5.5.5.5", "www.example.com A 5.5.5.5", "bad.example.com A 6.6.6.6")
	seen := make(chan string, 10)
	h := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen <- r.Host })
	s := newServer(t, w)
	s.Roots = outside(t, w, "5.5.5.5:443", h, "api.example.com", "www.example.com")
	outside(t, w, "6.6.6.6:443", h, "bad.example.com") // by an authority nobody trusts
	in := attach(t, w, s, withRule("*.example.com", map[string]string{"X": canary}))

	do := func(to, method, url, host string) (int, string) {
		req, _ := http.NewRequest(method, url, nil)
		req.Host = host
		resp, err := in.client(t, to, true).Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	if code, b := do("5.5.5.5:443", "GET", "https://api.example.com/", "www.example.com"); code != http.StatusMisdirectedRequest {
		t.Errorf("another name's request on the connection: %d %s", code, b)
	}
	if code, b := do("5.5.5.5:443", "GET", "https://api.example.com/", "evil.example"); code != http.StatusMisdirectedRequest {
		t.Errorf("a foreign name's request on the connection: %d %s", code, b)
	}
	if code, b := do("5.5.5.5:443", "TRACE", "https://api.example.com/", ""); code != http.StatusMethodNotAllowed {
		t.Errorf("TRACE: %d %s", code, b)
	}
	if code, b := do("6.6.6.6:443", "GET", "https://bad.example.com/", ""); code != http.StatusBadGateway || !strings.Contains(b, "certificate") {
		t.Errorf("a destination that proves nothing: %d %s", code, b)
	}
	if code, b := do("9.9.9.9:443", "GET", "https://api.example.com/", ""); code != 0 {
		t.Errorf("an address that is not the name's: %d %s", code, b)
	}
	if len(seen) != 0 {
		t.Errorf("a request for %s has arrived", <-seen)
	}
	if code, b := do("5.5.5.5:443", "GET", "https://api.example.com/", "api.example.com:443"); code != http.StatusOK {
		t.Errorf("Host with a port: %d %s", code, b)
	}
}

// A stream's bytes pass as they come, in both directions, and an upgrade is
// passed on with the rule's header.
func TestRuleStreams(t *testing.T) {
	w := newWorld(t, "api.example.com A 5.5.5.5")
	s := newServer(t, w)
	s.Roots = outside(t, w, "5.5.5.5:443", http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X") != canary {
			t.Error("a request without the rule's header has arrived")
		}
		if r.Header.Get("Upgrade") == "echo" {
			c, rd, err := http.NewResponseController(rw).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
			_, _ = io.Copy(c, rd)
			return
		}
		if r.Header.Get("Upgrade") != "" {
			t.Errorf("an upgrade to %s has arrived", r.Header.Get("Upgrade"))
		}
		rc := http.NewResponseController(rw)
		_ = rc.EnableFullDuplex() // an error only in HTTP/2, which is always so
		sc := bufio.NewScanner(r.Body)
		for sc.Scan() {
			fmt.Fprintf(rw, "you said %s\n", sc.Text())
			if err := rc.Flush(); err != nil {
				return
			}
		}
	}), "api.example.com")
	in := attach(t, w, s, withRule("api.example.com", map[string]string{"X": canary}))

	body, say := io.Pipe()
	req, _ := http.NewRequest(http.MethodPost, "https://api.example.com/", body)
	answers := make(chan string)
	go func() {
		resp, err := in.client(t, "5.5.5.5:443", true).Do(req)
		if err != nil {
			answers <- err.Error()
			close(answers)
			return
		}
		defer resp.Body.Close()
		for sc := bufio.NewScanner(resp.Body); sc.Scan(); {
			answers <- sc.Text()
		}
		close(answers)
	}()
	for i := range 5 {
		fmt.Fprintf(say, "%d\n", i)
		if got, want := <-answers, fmt.Sprintf("you said %d", i); got != want {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
	say.Close()
	if got, more := <-answers; more {
		t.Errorf("after the end: %q", got)
	}

	req, _ = http.NewRequest(http.MethodGet, "https://api.example.com/", nil)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "echo")
	resp, err := in.client(t, "5.5.5.5:443", false).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	rw, ok := resp.Body.(io.ReadWriteCloser)
	if resp.StatusCode != http.StatusSwitchingProtocols || !ok {
		t.Fatalf("the upgrade: %s", resp.Status)
	}
	for _, said := range []string{"one", "two"} {
		_, _ = io.WriteString(rw, said)
		b := make([]byte, len(said))
		if _, err := io.ReadFull(rw, b); err != nil || string(b) != said {
			t.Errorf("over the upgraded connection: %q, %v", b, err)
		}
	}
	rw.Close()

	req, _ = http.NewRequest(http.MethodGet, "https://api.example.com/", nil)
	req.Header.Set("Connection", "Upgrade, HTTP2-Settings")
	req.Header.Set("Upgrade", "h2c")
	if resp, err = in.client(t, "5.5.5.5:443", false).Do(req); err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("with an upgrade to h2c: %s", resp.Status)
	}
}

// The authority is made once, is nobody's to read, and outlives the server.
func TestAuthority(t *testing.T) {
	dir := t.TempDir()
	now := time.Now()
	clock := func() time.Time { return now }
	a, err := openIssuer(dir, clock)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(filepath.Join(dir, authorityFile)); err != nil || fi.Mode() != 0o600 {
		t.Errorf("the authority's file: %v %v", fi.Mode(), err)
	}
	again, err := openIssuer(dir, clock)
	if err != nil || again.bundle() != a.bundle() {
		t.Errorf("after a restart there is another authority (%v)", err)
	}
	if strings.Contains(a.bundle(), "PRIVATE") {
		t.Error("the bundle holds the key")
	}
	leaf, err := again.leafFor("api.example.com")
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.ca.Cert)
	if _, err := leaf.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: "api.example.com", CurrentTime: now}); err != nil {
		t.Error(err)
	}
	if same, _ := again.leafFor("api.example.com"); same != leaf {
		t.Error("a certificate is made for every connection")
	}
	now = now.Add(leafLife * 4 / 5)
	if same, _ := again.leafFor("api.example.com"); same == leaf {
		t.Error("a certificate is used to its end")
	}
	if err := os.WriteFile(filepath.Join(dir, authorityFile), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openIssuer(dir, clock); cay.CodeOf(err) != cay.CodeDataDirInvalid {
		t.Errorf("a damaged authority: %v", err)
	}
}
