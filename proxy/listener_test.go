package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// ends waits for a connection to be closed by the other side, and returns when.
func ends(t *testing.T, c net.Conn) time.Duration {
	t.Helper()
	began := time.Now()
	_ = c.SetReadDeadline(began.Add(time.Minute))
	if _, err := io.Copy(io.Discard, c); err != nil {
		var ne net.Error
		if errors.As(err, &ne) && ne.Timeout() {
			t.Fatal("the connection was not closed")
		}
	}
	return time.Since(began)
}

func (w *world) dial() net.Conn {
	w.t.Helper()
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c
}

// When there is no more room, who says nothing makes room for who does; who has
// a request under way stays.
func TestMaxConns(t *testing.T) {
	w := newWorld(t, func(s *Server) { s.MaxConns = 2 })
	r := w.sandbox(nil)
	release := make(chan struct{})
	w.guest(r, 80, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	w.guest(r, 81, http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		rw.(http.Flusher).Flush()
		<-release
		fmt.Fprint(rw, "whole")
	}))
	silent := w.dial()
	busy, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(w.request("GET", "/", r, 81, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Body.Close()
	if res, _ := w.do(w.request("GET", "/", r, 80, nil)); res.StatusCode != 200 {
		t.Fatal(res.StatusCode)
	}
	ends(t, silent)

	busy2, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(w.request("GET", "/", r, 81, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer busy2.Body.Close()
	status := make(chan int)
	go func() {
		res, _ := w.do(w.request("GET", "/", r, 80, nil))
		status <- res.StatusCode
	}()
	select {
	case s := <-status:
		t.Fatalf("a third connection was served: %d", s)
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	for _, res := range []*http.Response{busy, busy2} {
		if b, err := io.ReadAll(res.Body); err != nil || string(b) != "whole" {
			t.Errorf("%q, %v", b, err)
		}
	}
	if s := <-status; s != 200 {
		t.Fatal(s)
	}
}

func TestMaxPerClient(t *testing.T) {
	w := newWorld(t, func(s *Server) { s.MaxPerClient = 2 })
	r := w.sandbox(nil)
	w.guest(r, 80, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	w.guest(r, 81, echo)
	first := w.dial()
	w.dial()
	// It is read to the end of its connection: the answer alone can come before
	// the server counts the request as over.
	third := w.dial()
	fmt.Fprintf(third, "GET / HTTP/1.1\r\nHost: 80-%s.x\r\nConnection: close\r\n\r\n", r.Sandbox)
	if b, err := io.ReadAll(third); err != nil || !bytes.HasPrefix(b, []byte("HTTP/1.1 200 ")) {
		t.Fatalf("%q, %v", b, err)
	}
	ends(t, first)
	for range 2 {
		if _, _, res := w.upgrade(r, 81); res.StatusCode != 101 {
			t.Fatal(res.StatusCode)
		}
	}
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		return // it was reset that early
	}
	defer c.Close()
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: 80-%s.x\r\n\r\n", r.Sandbox)
	if b, _ := io.ReadAll(c); len(b) != 0 {
		t.Fatalf("a third connection of a client with two streams was served: %s", b)
	}
}

func TestPeerOf(t *testing.T) {
	for text, want := range map[string]string{
		"192.0.2.7:80": "192.0.2.7", "[::ffff:192.0.2.7]:80": "192.0.2.7", "[2001:db8:1:2:3::4]:5": "2001:db8:1:2::", "[fe80::1%eth0]:5": "fe80::",
	} {
		ap := netip.MustParseAddrPort(text)
		if got := peerOf(net.TCPAddrFromAddrPort(ap)); got.String() != want {
			t.Errorf("peerOf(%s) = %s, want %s", text, got, want)
		}
	}
	if got := peerOf(&net.UnixAddr{Name: "x"}); got.IsValid() {
		t.Error(got)
	}
}

// selfSigned makes a certificate for *.sbx.example.com.
func selfSigned(t *testing.T) (*tls.Config, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"*.sbx.example.com"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(der)
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"h2", "http/1.1"}}, pool
}

// newTLSWorld is a world with both listeners; w.addr is that of TLS.
func newTLSWorld(t *testing.T, set func(*Server)) (w *world, plain string, roots *x509.CertPool) {
	t.Helper()
	first := newWorld(t, nil)
	s := &Server{Catalog: first.cat, Domain: "sbx.example.com", Grace: time.Second}
	s.TLS, roots = selfSigned(t)
	if set != nil {
		set(s)
	}
	var ls [2]net.Listener
	for i := range ls {
		var err error
		if ls[i], err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ls[0], ls[1]) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return &world{t: t, cat: first.cat, proxy: s, addr: ls[1].Addr().String()}, ls[0].Addr().String(), roots
}

// browse asks for https://<host>/ at w.addr.
func (w *world) browse(host, proto string, roots *x509.CertPool) (*http.Response, string, error) {
	w.t.Helper()
	tr := &http.Transport{Protocols: new(http.Protocols), DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", w.addr)
		}}
	tr.Protocols.SetHTTP1(proto == "HTTP/1.1")
	tr.Protocols.SetHTTP2(proto == "HTTP/2.0")
	defer tr.CloseIdleConnections()
	res, err := tr.RoundTrip(mustRequest(w.t, "https://"+host+"/a?b"))
	if err != nil {
		return nil, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res, string(b), err
}

func mustRequest(t *testing.T, url string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

func TestTLS(t *testing.T) {
	w, plain, roots := newTLSWorld(t, func(s *Server) {
		s.API = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, "api ", r.URL) })
		s.Challenge = func(rw http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, "/known") {
				return false
			}
			fmt.Fprint(rw, "proof")
			return true
		}
		s.RedirectPort = 8443
	})
	r := w.sandbox(nil)
	w.guest(r, 3000, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, r.Host, r.URL) }))
	host := "3000-" + string(r.Sandbox) + ".sbx.example.com"
	for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
		for name, want := range map[string]string{host: host + "/a?b", "api.sbx.example.com": "api /a?b"} {
			res, body, err := w.browse(name, proto, roots)
			if err != nil || res.Proto != proto || body != want {
				t.Errorf("%s by %s: %v %q %v", name, proto, res, body, err)
			}
		}
	}
	at := func(method, host, path string) (*http.Response, string) {
		req := mustRequest(t, "http://"+plain+path)
		req.Method, req.Host = method, host
		return w.do(req)
	}
	for _, c := range []struct {
		method, host, path string
		status             int
		location           string
	}{
		{"GET", host, "/a?b", 308, "https://" + host + ":8443/a?b"},
		{"POST", strings.ToUpper(host) + ":80", "//evil.example.com/", 308, "https://" + host + ":8443//evil.example.com/"},
		{"GET", "api.sbx.example.com", "/x", 308, "https://api.sbx.example.com:8443/x"},
		{"GET", "3000-" + string(r.Sandbox) + ".other.example.com", "/", 200, ""},
		{"GET", host, "/.well-known/acme-challenge/known", 200, ""},
		{"GET", "3000-" + string(r.Sandbox) + ".x", "/.well-known/acme-challenge/other", 200, ""},
	} {
		if res, body := at(c.method, c.host, c.path); res.StatusCode != c.status || res.Header.Get("Location") != c.location {
			t.Errorf("%s %s%s: %d %q %s", c.method, c.host, c.path, res.StatusCode, res.Header.Get("Location"), body)
		}
	}
	if res, _ := at("GET", "api.x", "/"); res.StatusCode != 400 {
		t.Errorf("the API is served in plain: %d", res.StatusCode)
	}
}

func TestHandshakeDeadline(t *testing.T) {
	if testing.Short() {
		t.Skip("takes handshakeDeadline")
	}
	w, _, roots := newTLSWorld(t, nil)
	r := w.sandbox(nil)
	w.guest(r, 80, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	var silent []net.Conn
	for i := range 50 {
		c := w.dial()
		if i%2 == 0 {
			fmt.Fprint(c, "\x16\x03\x01\x02\x00\x01") // the beginning of a hello
		}
		silent = append(silent, c)
	}
	if res, _, err := w.browse("80-"+string(r.Sandbox)+".sbx.example.com", "HTTP/2.0", roots); err != nil || res.StatusCode != 200 {
		t.Fatalf("meanwhile: %v %v", res, err)
	}
	began := time.Now()
	for _, c := range silent {
		ends(t, c)
	}
	if d := time.Since(began); d > handshakeDeadline+20*time.Second {
		t.Errorf("silent clients were closed after %v", d)
	}
}

// A body that nobody wants and that does not come holds its connection a short
// while alone.
func TestUnwantedBody(t *testing.T) {
	if testing.Short() {
		t.Skip("takes restTime")
	}
	w := newWorld(t, nil)
	for _, head := range []string{
		"POST / HTTP/1.1\r\nHost: 80-i0.x\r\nContent-Length: 1000\r\n\r\nslow",
		"POST / HTTP/1.1\r\nHost: nothing\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nslow\r\n",
	} {
		c := w.dial()
		_, _ = io.WriteString(c, head)
		br := bufio.NewReader(c)
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode != 502 && res.StatusCode != 400 {
			t.Error(res.StatusCode)
		}
		if d := ends(t, c); d > restTime+20*time.Second {
			t.Errorf("closed after %v", d)
		}
	}
}
