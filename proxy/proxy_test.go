package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
	"github.com/cayhq/cay/catalog/catalogtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a proxy on a loopback port and the sandboxes behind it, each on a
// loopback address of its own.
type world struct {
	t     *testing.T
	cat   *catalogtest.Table
	proxy *Server
	addr  string // of the proxy
}

func newWorld(t *testing.T, set func(*Server)) *world {
	t.Helper()
	w := &world{t: t, cat: &catalogtest.Table{}}
	w.proxy = &Server{Catalog: w.cat, Domain: "sbx.example.com", Grace: time.Second}
	if set != nil {
		set(w.proxy)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr = l.Addr().String()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.proxy.Serve(ctx, l, nil) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return w
}

// sandbox puts a sandbox on a fresh loopback address into the catalog.
func (w *world) sandbox(set func(*catalog.Route)) catalog.Route {
	w.t.Helper()
	var b [3]byte
	rand.Read(b[:])
	r := catalog.Route{Sandbox: cay.NewSandboxID(), Execution: cay.NewExecutionID(), Node: "n1",
		Addr: netip.AddrFrom4([4]byte{127, 2 + b[0]%250, b[1], 1 + b[2]%250})}
	if set != nil {
		set(&r)
	}
	if err := w.cat.Put(w.t.Context(), r); err != nil {
		w.t.Fatal(err)
	}
	return r
}

// guest serves h on a port of a sandbox.
func (w *world) guest(r catalog.Route, port int, h http.Handler) *httptest.Server {
	w.t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(r.Addr, uint16(port)).String())
	if err != nil {
		w.t.Fatal(err)
	}
	p := new(http.Protocols)
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: h, Protocols: p}}
	s.Start()
	w.t.Cleanup(s.Close)
	return s
}

func (w *world) request(method, path string, r catalog.Route, port int, body io.Reader) *http.Request {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), method, "http://"+w.addr+path, body)
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set(headerSandbox, string(r.Sandbox))
	req.Header.Set(headerPort, strconv.Itoa(port))
	return req
}

// do sends a request on a connection of its own and reads the answer.
func (w *world) do(req *http.Request) (*http.Response, string) {
	w.t.Helper()
	tr := &http.Transport{DisableKeepAlives: true}
	res, err := tr.RoundTrip(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return res, string(b)
}

func (w *world) end(r catalog.Route) {
	w.t.Helper()
	if err := w.cat.Delete(w.t.Context(), r.Sandbox, r.Execution); err != nil {
		w.t.Fatal(err)
	}
	w.proxy.Cut(r.Sandbox, r.Execution)
}

func wantJSON(t *testing.T, res *http.Response, body string, status int, want map[string]any) {
	t.Helper()
	if res.StatusCode != status {
		t.Fatalf("status %d, want %d; body %s", res.StatusCode, status, body)
	}
	if ct := res.Header.Get("Content-Type"); !strings.HasPrefix(ct, "application/json") {
		t.Fatalf("Content-Type %q", ct)
	}
	if cc := res.Header.Get("Cache-Control"); cc != "no-store" {
		t.Errorf("Cache-Control %q: a cache would keep the answer", cc)
	}
	var got map[string]any
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatalf("%v in %s", err, body)
	}
	want["code"] = float64(status)
	if d := cmp.Diff(want, got); d != "" {
		t.Fatalf("body (-want +got):\n%s", d)
	}
}

// shortRetries makes closed ports answer at once; the retry itself has a test.
func shortRetries(t *testing.T) {
	u, e := userRetries, envdRetries
	userRetries, envdRetries = nil, nil
	t.Cleanup(func() { userRetries, envdRetries = u, e })
}

func TestAnswers(t *testing.T) {
	shortRetries(t)
	var broken atomic.Bool
	w := newWorld(t, nil)
	w.cat.Fail = func(op string) error {
		if op == "get" && broken.Load() {
			return errors.New("connection refused")
		}
		return nil
	}
	open := w.sandbox(nil)
	closed := w.sandbox(func(r *catalog.Route) { r.TrafficToken = "sesame" })
	ok := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, "hello from ", r.URL.Path) })
	w.guest(open, 49983, ok)
	w.guest(open, 49982, ok)
	w.guest(open, 8080, ok)
	w.guest(closed, 49983, ok)
	w.guest(closed, 8080, ok)
	gone := catalog.Route{Sandbox: "igone"}

	t.Run("served", func(t *testing.T) {
		for _, port := range []int{49983, 8080} {
			if res, body := w.do(w.request("GET", "/a", open, port, nil)); res.StatusCode != 200 || body != "hello from /a" {
				t.Fatalf("port %d: %d %s", port, res.StatusCode, body)
			}
		}
	})
	t.Run("by host", func(t *testing.T) {
		req := w.request("GET", "/a", open, 0, nil)
		req.Header = http.Header{}
		req.Host = "8080-" + string(open.Sandbox) + "-00000000.localhost:1234"
		if res, body := w.do(req); res.StatusCode != 200 || body != "hello from /a" {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
	})
	t.Run("unknown sandbox", func(t *testing.T) {
		res, body := w.do(w.request("GET", "/health", gone, 49983, nil))
		wantJSON(t, res, body, 502, map[string]any{"sandboxId": "igone", "message": "The sandbox was not found"})
	})
	t.Run("closed port", func(t *testing.T) {
		res, body := w.do(w.request("GET", "/", open, 8081, nil))
		wantJSON(t, res, body, 502, map[string]any{"sandboxId": string(open.Sandbox), "message": "The sandbox is running but port is not open", "port": 8081.0})
	})
	t.Run("control port", func(t *testing.T) {
		res, body := w.do(w.request("POST", "/init", open, 49982, nil))
		wantJSON(t, res, body, 502, map[string]any{"sandboxId": string(open.Sandbox), "message": "The sandbox is running but port is not open", "port": 49982.0})
	})
	t.Run("token missing", func(t *testing.T) {
		for _, port := range []int{8080, 8081, 49982} {
			res, body := w.do(w.request("GET", "/", closed, port, nil))
			wantJSON(t, res, body, 403, map[string]any{"sandboxId": string(closed.Sandbox),
				"message": "The traffic access token is missing: send it in the header 'e2b-traffic-access-token'"})
		}
	})
	t.Run("token wrong", func(t *testing.T) {
		req := w.request("GET", "/", closed, 8080, nil)
		req.Header.Set(headerTraffic, "open")
		res, body := w.do(req)
		wantJSON(t, res, body, 403, map[string]any{"sandboxId": string(closed.Sandbox),
			"message": "The traffic access token is wrong: the header 'e2b-traffic-access-token' holds another value than the one the sandbox was created with"})
	})
	t.Run("token right", func(t *testing.T) {
		req := w.request("GET", "/", closed, 8080, nil)
		req.Header.Set("e2b-traffic-access-token", "sesame")
		if res, body := w.do(req); res.StatusCode != 200 {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
	})
	t.Run("envd needs no traffic token", func(t *testing.T) {
		if res, body := w.do(w.request("GET", "/", closed, 49983, nil)); res.StatusCode != 200 {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
	})
	t.Run("control routes", func(t *testing.T) {
		for _, p := range []string{"/init", "//init", "/%69nit", "/files/../init", "/init/", "/freeze", "/upgrade?x=1", "/%2569nit"} {
			for _, method := range []string{"GET", "POST"} {
				got := w.raw(method + " " + p + " HTTP/1.1\r\nHost: 49983-" + string(open.Sandbox) + ".x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
				if !strings.HasPrefix(got, "HTTP/1.1 404 ") || !strings.Contains(got, "reserved for the E2B control plane") || !strings.Contains(got, `"path":`) {
					t.Errorf("%s %s: %s", method, p, got)
				}
			}
		}
	})
	t.Run("control names on a user's port", func(t *testing.T) {
		if res, body := w.do(w.request("POST", "/init", open, 8080, nil)); res.StatusCode != 200 || body != "hello from /init" {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
	})
	t.Run("catalog away", func(t *testing.T) {
		broken.Store(true)
		defer broken.Store(false)
		res, body := w.do(w.request("GET", "/health", open, 49983, nil))
		wantJSON(t, res, body, 503, map[string]any{"sandboxId": string(open.Sandbox), "message": "The proxy cannot tell now where the sandbox is; try again"})
		if res.Header.Get("Retry-After") != "1" {
			t.Errorf("Retry-After %q", res.Header.Get("Retry-After"))
		}
	})
	t.Run("no target", func(t *testing.T) {
		req := w.request("GET", "/", open, 0, nil)
		res, body := w.do(req)
		if res.StatusCode != 400 || !strings.Contains(body, "port") || !strings.HasPrefix(res.Header.Get("Content-Type"), "text/plain") {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
	})
}

func TestPages(t *testing.T) {
	shortRetries(t)
	w := newWorld(t, nil)
	r := w.sandbox(func(r *catalog.Route) { r.TrafficToken = "sesame" })
	gone := catalog.Route{Sandbox: "igone"}
	browse := map[string]string{"User-Agent": "Mozilla/5.0 (X11; Linux x86_64)", "Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
	with := func(kv ...string) map[string]string {
		m := map[string]string{}
		for k, v := range browse {
			m[k] = v
		}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	for _, c := range []struct {
		name   string
		route  catalog.Route
		port   int
		h      map[string]string
		status int
		want   []string // of the page; none is JSON
	}{
		{"not found", gone, 80, browse, 502, []string{"Sandbox Not Found", "igone"}},
		{"navigation", gone, 80, with("Sec-Fetch-Mode", "navigate"), 502, []string{"Sandbox Not Found"}},
		{"closed port", r, 81, with(headerTraffic, "sesame"), 502, []string{"no service running on port 81", string(r.Sandbox)}},
		{"token missing", r, 81, browse, 403, []string{"Missing Traffic Access Token", string(r.Sandbox)}},
		{"token wrong", r, 81, with(headerTraffic, "x"), 403, []string{"Invalid Traffic Access Token", string(r.Sandbox)}},
		{"accept missing", gone, 80, map[string]string{"User-Agent": "Opera/9"}, 502, []string{"Sandbox Not Found"}},
		{"json only", gone, 80, with("Accept", "application/json"), 502, nil},
		{"cors", gone, 80, with("Sec-Fetch-Mode", "cors"), 502, nil},
		{"no-cors", gone, 80, with("Sec-Fetch-Mode", "no-cors"), 502, nil},
		{"same-origin", gone, 80, with("Sec-Fetch-Mode", "same-origin"), 502, nil},
		{"websocket", gone, 80, with("Sec-Fetch-Mode", "websocket"), 502, nil},
		{"ajax", gone, 80, with("X-Requested-With", "XMLHttpRequest"), 502, nil},
		{"node", gone, 80, map[string]string{"User-Agent": "node", "Accept": "text/html"}, 502, nil},
		{"python", gone, 80, map[string]string{"User-Agent": "e2b-python-sdk/2.63.0"}, 502, nil},
		{"curl", gone, 80, map[string]string{"User-Agent": "curl/8", "Accept": "*/*"}, 502, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			req := w.request("GET", "/", c.route, c.port, nil)
			for k, v := range c.h {
				req.Header.Set(k, v)
			}
			res, body := w.do(req)
			if res.StatusCode != c.status {
				t.Fatalf("status %d, want %d", res.StatusCode, c.status)
			}
			if html := strings.HasPrefix(res.Header.Get("Content-Type"), "text/html"); html != (c.want != nil) {
				t.Fatalf("Content-Type %q", res.Header.Get("Content-Type"))
			}
			for _, s := range c.want {
				if !strings.Contains(body, s) {
					t.Errorf("the page lacks %q:\n%s", s, body)
				}
			}
		})
	}
}

func TestWhatTheSandboxSees(t *testing.T) {
	now := time.UnixMilli(1767225600123)
	w := newWorld(t, func(s *Server) { s.Now = func() time.Time { return now } })
	r := w.sandbox(func(r *catalog.Route) { r.TrafficToken = "sesame" })
	var got *http.Request
	record := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r })
	w.guest(r, 49983, record)
	w.guest(r, 8080, record)

	send := func(port int) *http.Request {
		req := w.request("GET", "/a%2Fb//c?x=1;y=%zz&x=2", r, port, nil)
		req.Host = strconv.Itoa(port) + "-" + string(r.Sandbox) + ".sbx.example.com"
		for k, v := range map[string]string{
			headerTraffic: "sesame", "X-Cay-Time": "1", "X-Cay-Control": "secret", "X-Access-Token": "envd-token",
			"X-Forwarded-For": "1.2.3.4", "Connection": "X-Cay-Time, keep-alive, X-Hop", "X-Hop": "1", "User-Agent": "t", "Authorization": "Basic dXNlcjo=",
			"Upgrade": "h2c", "Http2-Settings": "AAMAAABkAARAAAAAAAIAAAAA", "Accept-Encoding": "identity",
		} {
			req.Header.Set(k, v)
		}
		if res, body := w.do(req); res.StatusCode != 200 {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
		return got
	}
	common := http.Header{"X-Access-Token": {"envd-token"}, "User-Agent": {"t"}, "Authorization": {"Basic dXNlcjo="}, "Accept-Encoding": {"identity"}}

	for _, port := range []int{49983, 8080} {
		req := send(port)
		want := common.Clone()
		if port == 49983 {
			want.Set("X-Cay-Time", "1767225600123")
		} else {
			want.Set("Connection", "close")
		}
		if d := cmp.Diff(want, req.Header); d != "" {
			t.Errorf("port %d: headers (-want +got):\n%s", port, d)
		}
		if req.RequestURI != "/a%2Fb//c?x=1;y=%zz&x=2" {
			t.Errorf("port %d: RequestURI %q", port, req.RequestURI)
		}
		if req.Host != strconv.Itoa(port)+"-"+string(r.Sandbox)+".sbx.example.com" {
			t.Errorf("port %d: Host %q", port, req.Host)
		}
	}
}

func TestStreams(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	next := make(chan string)
	w.guest(r, 49983, http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Type", "text/event-stream")
		rw.(http.Flusher).Flush()
		for s := range next {
			fmt.Fprint(rw, s)
			rw.(http.Flusher).Flush()
		}
	}))
	res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(w.request("GET", "/", r, 49983, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b := make([]byte, 100)
	for i := range 5 {
		next <- fmt.Sprint("event ", i)
		if n, err := res.Body.Read(b); err != nil || string(b[:n]) != fmt.Sprint("event ", i) {
			t.Fatalf("event %d: %q, %v", i, b[:n], err)
		}
	}
	close(next)
	if _, err := res.Body.Read(b); err != io.EOF {
		t.Fatalf("end: %v", err)
	}
}

// h2 returns a client that speaks HTTP/2 without TLS.
func h2(t *testing.T) *http.Transport {
	tr := &http.Transport{Protocols: new(http.Protocols)}
	tr.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

func TestTwoWays(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	w.guest(r, 9000, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(rw).EnableFullDuplex()
		rw.Header().Set("X-Proto", r.Proto)
		rw.Header().Set("Trailer", "X-End")
		rw.WriteHeader(200)
		rw.(http.Flusher).Flush()
		b := make([]byte, 1)
		for {
			n, err := r.Body.Read(b)
			rw.Write(bytes.ToUpper(b[:n]))
			rw.(http.Flusher).Flush()
			if err != nil {
				break
			}
		}
		rw.Header().Set("X-End", "seen "+r.Trailer.Get("X-Sum"))
	}))
	for _, c := range []struct {
		name, contentType, proto string
		client                   http.RoundTripper
	}{
		{"http/1.1", "application/connect+json", "HTTP/1.1", &http.Transport{DisableKeepAlives: true}},
		{"h2c", "application/connect+json", "HTTP/1.1", h2(t)},
		{"grpc", "application/grpc", "HTTP/2.0", h2(t)},
	} {
		t.Run(c.name, func(t *testing.T) {
			pr, pw := io.Pipe()
			req := w.request("POST", "/svc/Method", r, 9000, pr)
			req.Header.Set("Content-Type", c.contentType)
			req.Header.Set("Te", "trailers")
			req.Trailer = http.Header{"X-Sum": nil}
			res, err := c.client.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if p := res.Header.Get("X-Proto"); p != c.proto {
				t.Fatalf("the guest was spoken to in %s, want %s", p, c.proto)
			}
			b := make([]byte, 1)
			for _, s := range "cay" {
				fmt.Fprint(pw, string(s))
				if _, err := io.ReadFull(res.Body, b); err != nil || string(b) != strings.ToUpper(string(s)) {
					t.Fatalf("%q: %q %v", s, b, err)
				}
			}
			req.Trailer["X-Sum"] = []string{"42"}
			pw.Close()
			if _, err := res.Body.Read(b); err != io.EOF {
				t.Fatal(err)
			}
			if got := res.Trailer.Get("X-End"); got != "seen 42" {
				t.Fatalf("trailer %q", got)
			}
		})
	}
}

// An answer that ends with its header ends there for an HTTP/2 client, too: gRPC
// takes what it finds there for the status only then.
func TestHeaderEndsAnswer(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	w.guest(r, 9000, http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Grpc-Status", "12")
		rw.Header().Set("Content-Type", "application/grpc")
	}))
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/svc/Method"}, {":authority", "9000-" + string(r.Sandbox) + ".localhost"}, {"content-type", "application/grpc"}} {
		_ = enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) // a bytes.Buffer takes everything
	}
	fr := http2.NewFramer(c, c)
	_, err = io.WriteString(c, http2.ClientPreface)
	if err := errors.Join(err, fr.WriteSettings(), fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})); err != nil {
		t.Fatal(err)
	}
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if h, ok := f.(*http2.HeadersFrame); ok {
			if !h.StreamEnded() {
				t.Error("the header does not end the answer")
			}
			return
		}
	}
}

// upgrade opens a raw stream through the proxy.
func (w *world) upgrade(r catalog.Route, port int) (net.Conn, *bufio.Reader, *http.Response) {
	w.t.Helper()
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(c, "GET /ws HTTP/1.1\r\nHost: %d-%s.localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n", port, r.Sandbox)
	br := bufio.NewReader(c)
	res, err := http.ReadResponse(br, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return c, br, res
}

// echo takes any upgrade and echoes bytes.
var echo = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") == "" {
		http.Error(rw, "no upgrade", http.StatusUpgradeRequired)
		return
	}
	c, brw, err := rw.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer c.Close()
	fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n", r.Header.Get("Upgrade"))
	_, _ = io.Copy(c, brw)
})

func TestWebSocket(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	w.guest(r, 8080, echo)
	w.guest(r, 49983, echo)
	c, br, res := w.upgrade(r, 8080)
	if res.StatusCode != 101 || res.Header.Get("Sec-WebSocket-Accept") == "" {
		t.Fatalf("%d %v", res.StatusCode, res.Header)
	}
	for i := range 3 {
		fmt.Fprintf(c, "frame %d\n", i)
		if s, err := br.ReadString('\n'); err != nil || s != fmt.Sprintf("frame %d\n", i) {
			t.Fatalf("%q %v", s, err)
		}
	}
	w.end(r)
	if s, err := br.ReadString('\n'); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the stream of a killed sandbox stays open: %q %v", s, err)
	}
	t.Run("not to envd", func(t *testing.T) {
		r := w.sandbox(nil)
		w.guest(r, 49983, echo)
		if _, _, res := w.upgrade(r, 49983); res.StatusCode != http.StatusUpgradeRequired {
			t.Fatalf("envd's port took an upgrade: %d", res.StatusCode)
		}
	})
}

func TestEnd(t *testing.T) {
	shortRetries(t)
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	hold := make(chan struct{})
	var begun sync.WaitGroup
	w.guest(r, 49983, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/stream":
			fmt.Fprint(rw, "begun")
			rw.(http.Flusher).Flush()
		case "/silent":
			begun.Done()
		default:
			return
		}
		select {
		case <-hold:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(func() { close(hold) }) // before the guest is closed
	begun.Add(1)
	w.do(w.request("GET", "/health", r, 49983, nil)) // leaves an idle connection

	stream, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(w.request("GET", "/stream", r, 49983, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Body.Close()
	if _, err := io.ReadFull(stream.Body, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	type answered struct {
		res  *http.Response
		body string
	}
	silent := make(chan answered, 1)
	go func() {
		res, body := w.do(w.request("POST", "/silent", r, 49983, strings.NewReader("x")))
		silent <- answered{res, body}
	}()
	begun.Wait()

	w.end(r)
	if _, err := io.ReadAll(stream.Body); err == nil {
		t.Error("a cut stream ended as if it were complete")
	}
	a := <-silent
	want := map[string]any{"sandboxId": string(r.Sandbox), "message": "The sandbox was not found"}
	wantJSON(t, a.res, a.body, 502, want)
	res, body := w.do(w.request("GET", "/health", r, 49983, nil))
	wantJSON(t, res, body, 502, want)

	w.proxy.up.mu.Lock()
	defer w.proxy.up.mu.Unlock()
	if n := len(w.proxy.up.open); n != 0 {
		t.Errorf("%d executions are still remembered", n)
	}
}

// A connection to a sandbox that ends is reset: the guest may be gone before
// it could answer a farewell.
func TestEndLeavesNoSocket(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	l, err := net.Listen("tcp", netip.AddrPortFrom(r.Addr, 49983).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	answered := make(chan int, 1)
	go func() {
		res, _ := w.do(w.request("GET", "/x", r, 49983, nil))
		answered <- res.StatusCode
	}()
	guest, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	if _, err := http.ReadRequest(bufio.NewReader(guest)); err != nil {
		t.Fatal(err)
	}
	w.end(r)
	if status := <-answered; status != 502 {
		t.Errorf("the client got %d, want 502", status)
	}
	if _, err := guest.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the guest read %v, want a reset connection", err)
	}
}

// A slot's address passes from one sandbox to the next, and so may a port that
// was kept open: neither a kept connection nor a stale route may lead there.
func TestReusedAddress(t *testing.T) {
	shortRetries(t)
	w := newWorld(t, nil)
	a := w.sandbox(nil)
	name := func(s string) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprint(rw, s) })
	}
	first := w.guest(a, 49983, name("first"))
	for range 3 {
		if _, body := w.do(w.request("GET", "/", a, 49983, nil)); body != "first" {
			t.Fatal(body)
		}
	}
	w.end(a)
	first.Listener.Close() // its connections would stay, as those of a paused guest
	b := w.sandbox(func(r *catalog.Route) { r.Addr = a.Addr })
	w.guest(b, 49983, name("second"))
	if _, body := w.do(w.request("GET", "/", b, 49983, nil)); body != "second" {
		t.Fatalf("the next sandbox of the address answers %q", body)
	}
	if res, body := w.do(w.request("GET", "/", a, 49983, nil)); res.StatusCode != 502 {
		t.Fatalf("the ended sandbox answers %d %q", res.StatusCode, body)
	}
	// The same sandbox again, as after a pause: another execution.
	c := b
	c.Execution = cay.NewExecutionID()
	w.end(b)
	if err := w.cat.Put(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if _, body := w.do(w.request("GET", "/", c, 49983, nil)); body != "second" {
		t.Fatalf("the resumed sandbox answers %q", body)
	}
}

// A request that learned the route just before the sandbox ended must not use
// it after Cut has returned.
func TestStaleRoute(t *testing.T) {
	shortRetries(t)
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	var hits atomic.Int32
	w.guest(r, 80, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits.Add(1) }))
	asked, gone := make(chan struct{}), make(chan struct{})
	slow := &slowCatalog{Catalog: w.cat, after: sync.OnceFunc(func() { close(asked); <-gone })}
	w.proxy.Catalog = slow
	status := make(chan int)
	go func() {
		res, _ := w.do(w.request("GET", "/", r, 80, nil))
		status <- res.StatusCode
	}()
	<-asked
	w.end(r)
	close(gone)
	if s := <-status; s != 502 || hits.Load() != 0 {
		t.Fatalf("status %d, %d requests reached the address", s, hits.Load())
	}
}

type slowCatalog struct {
	catalog.Catalog
	after func()
}

func (s *slowCatalog) Get(ctx context.Context, id cay.SandboxID) (catalog.Route, error) {
	r, err := s.Catalog.Get(ctx, id)
	s.after()
	return r, err
}

func TestKeptConnections(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	var envd, user atomic.Int32
	count := func(n *atomic.Int32) func(net.Conn, http.ConnState) {
		return func(_ net.Conn, s http.ConnState) {
			if s == http.StateNew {
				n.Add(1)
			}
		}
	}
	h := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	serve := func(port int, n *atomic.Int32) {
		l, err := net.Listen("tcp", netip.AddrPortFrom(r.Addr, uint16(port)).String())
		if err != nil {
			t.Fatal(err)
		}
		s := &httptest.Server{Listener: l, Config: &http.Server{Handler: h, ConnState: count(n)}}
		s.Start()
		t.Cleanup(s.Close)
	}
	serve(49983, &envd)
	serve(8080, &user)
	for range 5 {
		w.do(w.request("GET", "/", r, 49983, nil))
		w.do(w.request("GET", "/", r, 8080, nil))
	}
	if e, u := envd.Load(), user.Load(); e != 1 || u != 5 {
		t.Fatalf("%d connections to envd, want 1; %d to the user's port, want 5", e, u)
	}
}

func TestLimitPerSandbox(t *testing.T) {
	w := newWorld(t, func(s *Server) { s.MaxPerSandbox = 2 })
	r, other := w.sandbox(nil), w.sandbox(nil)
	hold := make(chan struct{})
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.(http.Flusher).Flush()
		if r.URL.Path == "/hold" {
			<-hold
		}
	})
	w.guest(r, 80, h)
	w.guest(other, 80, h)
	var held []*http.Response
	for range 2 {
		res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(w.request("GET", "/hold", r, 80, nil))
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, res)
	}
	res, body := w.do(w.request("GET", "/", r, 80, nil))
	wantJSON(t, res, body, 429, map[string]any{"sandboxId": string(r.Sandbox), "message": "The sandbox has too many open connections", "connectionLimit": 2.0})
	if res, _ := w.do(w.request("GET", "/", other, 80, nil)); res.StatusCode != 200 {
		t.Errorf("another sandbox is limited too: %d", res.StatusCode)
	}
	close(hold)
	for _, res := range held {
		_, _ = io.Copy(io.Discard, res.Body)
		res.Body.Close()
	}
	// The proxy forgets a request just after its answer is complete.
	for {
		if res, _ := w.do(w.request("GET", "/", r, 80, nil)); res.StatusCode == 200 {
			break
		}
		if t.Context().Err() != nil {
			t.Fatal("the limit does not let go")
		}
	}
}

// A service bound to the guest's localhost is re-exported a moment after it
// was asked for.
func TestPortOpensLate(t *testing.T) {
	old := userRetries
	userRetries = []time.Duration{time.Millisecond, time.Millisecond, time.Millisecond, time.Second}
	t.Cleanup(func() { userRetries = old })
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	done := make(chan string)
	go func() {
		_, body := w.do(w.request("POST", "/", r, 8080, strings.NewReader("late")))
		done <- body
	}()
	timer := time.AfterFunc(100*time.Millisecond, func() {
		w.guest(r, 8080, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { _, _ = io.Copy(rw, r.Body) }))
	})
	defer timer.Stop()
	if body := <-done; body != "late" {
		t.Fatal(body)
	}
}

func TestRetriesAreTheContracts(t *testing.T) {
	want := []time.Duration{100e6, 200e6, 300e6, 400e6} // five tries
	if d := cmp.Diff(want, userRetries); d != "" {
		t.Fatal(d)
	}
}
