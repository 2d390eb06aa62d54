package proxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
)

// raw writes bytes to the proxy and returns what comes back until the proxy
// closes or has been silent for a while.
func (w *world) raw(request string) string {
	w.t.Helper()
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetWriteDeadline(time.Now().Add(10 * time.Second))
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { _, _ = io.WriteString(c, request) }) // the proxy may close before it has read all
	var out []byte
	b := make([]byte, 32<<10)
	for {
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		n, err := c.Read(b)
		out = append(out, b[:n]...)
		if err != nil {
			return string(out)
		}
	}
}

func statuses(answer string) []string {
	var out []string
	br := bufio.NewReader(strings.NewReader(answer))
	for {
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			return out
		}
		_, _ = io.Copy(io.Discard, res.Body)
		out = append(out, fmt.Sprint(res.StatusCode))
	}
}

// Whatever a hostile client writes, the sandbox sees at most the one request
// that was named, and no status is a 500.
func TestHostileRequests(t *testing.T) {
	shortRetries(t)
	w := newWorld(t, nil)
	r, victim := w.sandbox(nil), w.sandbox(func(r *catalog.Route) { r.TrafficToken = "sesame" })
	var hits, stolen atomic.Int32
	w.guest(r, 80, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		hits.Add(1)
		_, _ = io.Copy(io.Discard, r.Body)
	}))
	w.guest(victim, 80, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { stolen.Add(1) }))
	w.guest(r, 49983, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "init") {
			stolen.Add(1)
		}
	}))
	host := "Host: 80-" + string(r.Sandbox) + ".x\r\n"
	envd := "Host: 49983-" + string(r.Sandbox) + ".x\r\n"
	inner := "GET /stolen HTTP/1.1\r\nHost: 80-" + string(victim.Sandbox) + ".x\r\n\r\n"
	for _, c := range []struct {
		name, request string
		hits          int32
		want          []string // statuses in order; nil is any but 5xx other than 502
	}{
		{"plain", "GET / HTTP/1.1\r\n" + host + "Connection: close\r\n\r\n", 1, []string{"200"}},
		{"CL and TE", "POST / HTTP/1.1\r\n" + host + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner, -1, nil},
		{"two CL", "POST / HTTP/1.1\r\n" + host + "Content-Length: 4\r\nContent-Length: 60\r\n\r\nabcd" + inner, 0, []string{"400"}},
		{"CL list", "POST / HTTP/1.1\r\n" + host + "Content-Length: 4, 60\r\n\r\nabcd" + inner, 0, []string{"400"}},
		{"CL with plus", "POST / HTTP/1.1\r\n" + host + "Content-Length: +4\r\n\r\nabcd" + inner, 0, []string{"400"}},
		{"TE twice", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + inner, 0, []string{"400", "501"}},
		{"TE obfuscated", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + inner, 0, []string{"501"}},
		{"TE with space", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + inner, 0, []string{"400"}},
		{"bad chunk", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\nzz\r\n" + inner, -1, nil},
		{"obs-fold", "GET / HTTP/1.1\r\n" + host + "X-A: b\r\n c\r\nConnection: close\r\n\r\n", -1, nil},
		{"two Hosts", "GET / HTTP/1.1\r\n" + host + "Host: 80-" + string(victim.Sandbox) + ".x\r\n\r\n", 0, []string{"400"}},
		{"no Host", "GET / HTTP/1.1\r\n\r\n", 0, []string{"400"}},
		{"absolute form wins", "GET http://80-" + string(r.Sandbox) + ".x/ HTTP/1.1\r\nHost: 80-" + string(victim.Sandbox) + ".x\r\nConnection: close\r\n\r\n", 1, []string{"200"}},
		{"connect", "CONNECT 80-" + string(r.Sandbox) + ".x:80 HTTP/1.1\r\n" + host + "\r\n", 0, []string{"400"}},
		{"opaque", "GET x:init HTTP/1.1\r\n" + envd + "\r\n", 0, []string{"400"}},
		{"asterisk", "OPTIONS * HTTP/1.1\r\n" + envd + "Connection: close\r\n\r\n", 0, []string{"200"}},
		{"init by absolute form", "POST http://49983-" + string(r.Sandbox) + ".x/init HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 0, []string{"404"}},
		{"init by h2c upgrade", "POST / HTTP/1.1\r\n" + envd + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nContent-Length: 0\r\n\r\n" + inner, 0, nil},
		{"header name with newline", "GET / HTTP/1.1\r\n" + host + "X-A\n: b\r\n\r\n", 0, []string{"400"}},
		{"NUL in header", "GET / HTTP/1.1\r\n" + host + "X-A: \x00\r\n\r\n", 0, []string{"400"}},
		{"NUL in Host", "GET / HTTP/1.1\r\nHost: 80-" + string(r.Sandbox) + "\x00.x\r\n\r\n", 0, []string{"400"}},
		{"HTTP/0.9", "GET /without/a/version\r\n\r\n", 0, []string{"400"}},
		{"HTTP/3.0", "GET / HTTP/3.0\r\n" + host + "\r\n", 0, []string{"505"}},
		{"header of 100 KiB", "GET / HTTP/1.1\r\n" + host + "X-Big: " + strings.Repeat("a", 100<<10) + "\r\n\r\n", 0, []string{"431"}},
		{"10,000 headers", "GET / HTTP/1.1\r\n" + host + strings.Repeat("X-Many: a\r\n", 10000) + "\r\n", 0, []string{"431"}},
		{"URL of 100 KiB", "GET /" + strings.Repeat("a", 100<<10) + " HTTP/1.1\r\n" + host + "\r\n", 0, []string{"431"}},
		{"body shorter than said", "POST / HTTP/1.1\r\n" + host + "Content-Length: 10\r\n\r\nabc", -1, nil},
		{"garbage", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 0, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			hits.Store(0)
			answer := w.raw(c.request)
			got := statuses(answer)
			for _, s := range got {
				if s[0] == '5' && s != "502" && s != "501" && s != "505" {
					t.Errorf("status %s: %s", s, answer)
				}
			}
			if c.want != nil && (len(got) == 0 || !strings.Contains(strings.Join(c.want, " "), got[0])) {
				t.Errorf("statuses %v, want first of %v: %q", got, c.want, answer)
			}
			if n := hits.Load(); c.hits >= 0 && n != c.hits {
				t.Errorf("%d requests reached the sandbox, want %d", n, c.hits)
			}
			if stolen.Load() != 0 {
				t.Fatalf("a request got where it must not: %s", answer)
			}
		})
	}
}

// Clients that never finish their headers are closed, hold no sandbox, and do
// not slow others (V-14).
func TestSlowHeaders(t *testing.T) {
	if testing.Short() {
		t.Skip("takes readHeaderTimeout")
	}
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	w.guest(r, 80, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	const n = 200
	closed := make(chan time.Duration, n)
	start := time.Now()
	for range n {
		c, err := net.Dial("tcp", w.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: ")
		go func() {
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
			_, _ = io.Copy(io.Discard, c)
			closed <- time.Since(start)
		}()
	}
	if res, _ := w.do(w.request("GET", "/", r, 80, nil)); res.StatusCode != 200 {
		t.Fatalf("a healthy request gets %d meanwhile", res.StatusCode)
	}
	for range n {
		if d := <-closed; d > readHeaderTimeout+2*time.Second {
			t.Fatalf("a silent connection was closed after %v", d)
		}
	}
}

func TestHostileSandbox(t *testing.T) {
	shortRetries(t)
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	l, err := net.Listen("tcp", r.Addr.String()+":80")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	answers := make(chan string, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = http.ReadRequest(bufio.NewReader(c))
			_, _ = io.WriteString(c, <-answers)
			c.Close()
		}
	}()
	for name, answer := range map[string]string{
		"nothing":         "",
		"not HTTP":        "SSH-2.0-OpenSSH_9.2\r\n",
		"endless header":  "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("a", 400<<10) + "\r\n\r\n",
		"CL and TE clash": "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
		"bad status":      "HTTP/1.1 20 OK\r\n\r\n",
		"101 unasked":     "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			answers <- answer
			res, body := w.do(w.request("GET", "/", r, 80, nil))
			wantJSON(t, res, body, 502, map[string]any{"sandboxId": string(r.Sandbox), "port": 80.0,
				"message": "The service in the sandbox closed the connection without a valid answer"})
		})
	}
	t.Run("cut short", func(t *testing.T) {
		answers <- "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello"
		res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(w.request("GET", "/", r, 80, nil))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if _, err := io.ReadAll(res.Body); err == nil {
			t.Fatal("a body that was cut short looks complete")
		}
	})
}

func TestSignedWithoutTarget(t *testing.T) {
	r := catalog.Route{Sandbox: cay.NewSandboxID()}
	var asked []Signature
	w := newWorld(t, func(s *Server) {
		s.ResolveSignature = func(_ context.Context, sig Signature) (cay.SandboxID, bool) {
			asked = append(asked, sig)
			return r.Sandbox, sig.Value == "v1_good"
		}
	})
	r = w.sandbox(func(n *catalog.Route) { n.Sandbox = r.Sandbox })
	w.guest(r, 49983, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, r.Method, " ", r.RequestURI) }))
	for _, c := range []struct {
		name, method, host, path string
		h                        http.Header
		status                   int
		want                     Signature
	}{
		{"read", "GET", "", "/files?path=x.txt&signature=v1_good", nil, 200, Signature{"x.txt", "read", "", "", "v1_good"}},
		{"write", "POST", "localhost:3002", "/files?path=%2Fa%20b&username=root&signature=v1_good&signature_expiration=99", nil, 200, Signature{"/a b", "write", "root", "99", "v1_good"}},
		{"wrong", "GET", "", "/files?path=x.txt&signature=v1_bad", nil, 400, Signature{"x.txt", "read", "", "", "v1_bad"}},
		{"no signature", "GET", "", "/files?path=x.txt", nil, 400, Signature{}},
		{"other path", "GET", "", "/files/compose?signature=v1_good", nil, 400, Signature{}},
		{"other spelling", "GET", "", "//files?signature=v1_good", nil, 400, Signature{}},
		{"other method", "DELETE", "", "/files?signature=v1_good", nil, 400, Signature{}},
		{"foreign host", "GET", "files.example.com", "/files?signature=v1_good", nil, 400, Signature{}},
		{"not loopback", "GET", "10.0.0.1", "/files?signature=v1_good", nil, 400, Signature{}},
		{"half routed", "GET", "", "/files?signature=v1_good", headers(headerPort, "49983"), 400, Signature{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			asked = nil
			req := w.request(c.method, "/", r, 0, nil)
			req.URL.Opaque, req.Host, req.Header = c.path, c.host, c.h
			if req.Header == nil {
				req.Header = http.Header{}
			}
			res, body := w.do(req)
			if res.StatusCode != c.status || c.status == 200 && body != c.method+" "+c.path {
				t.Fatalf("%d %s", res.StatusCode, body)
			}
			if c.want != (Signature{}) && (len(asked) != 1 || asked[0] != c.want) || c.want == (Signature{}) && len(asked) != 0 {
				t.Fatalf("asked %+v, want %+v", asked, c.want)
			}
		})
	}
}

// When the server goes down, requests get a moment, streams are cut, and
// nothing stays behind (goleak in TestMain).
func TestServeEnds(t *testing.T) {
	cat := newWorld(t, nil) // for its sandbox helpers
	r := cat.sandbox(nil)
	begun := make(chan struct{}, 1)
	cat.guest(r, 80, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.(http.Flusher).Flush()
		begun <- struct{}{}
		<-r.Context().Done()
	}))
	cat.guest(r, 81, echo)
	s := &Server{Catalog: cat.cat, Grace: 50 * time.Millisecond}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, l, nil) }()
	w := &world{t: t, cat: cat.cat, proxy: s, addr: l.Addr().String()}
	res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(w.request("GET", "/", r, 80, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	<-begun
	_, br, up := w.upgrade(r, 81)
	if up.StatusCode != 101 {
		t.Fatal(up.StatusCode)
	}
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(res.Body); err == nil {
		t.Error("a cut stream looks complete")
	}
	if _, err := br.ReadByte(); err == nil {
		t.Error("a websocket outlived the server")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestCloseUnused(t *testing.T) {
	s := &Server{}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	s.Cut("i1", "x1")
}

// A client that ends its side before there is an answer gets none: an empty one
// would tell it that an upload that broke off has worked.
func TestNoAnswerToHalfARequest(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	came, left := make(chan struct{}, 1), make(chan struct{})
	w.guest(r, 8080, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		came <- struct{}{}
		<-left
	}))
	defer close(left)
	conn, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: localhost\r\n%s: %s\r\n%s: 8080\r\n\r\n", headerSandbox, r.Sandbox, headerPort)
	<-came
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(time.Minute))
	if got, err := io.ReadAll(conn); len(got) > 0 {
		t.Errorf("the answer is %q, %v", got, err)
	}
}
