package proxy

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
)

// tlsGuest serves h over TLS on a port of a sandbox, with a certificate that
// nobody trusts.
func (w *world) tlsGuest(r catalog.Route, port int, h http.Handler) {
	w.t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(r.Addr, uint16(port)).String())
	if err != nil {
		w.t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, EnableHTTP2: true, Config: &http.Server{Handler: h}}
	s.StartTLS()
	w.t.Cleanup(s.Close)
}

func TestMaskedHost(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(func(r *catalog.Route) { r.Ingress.MaskHost = "app-${PORT}.localhost:${PORT}" })
	say := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(rw, "%s %q", r.Host, r.Header["X-Forwarded-Host"])
	})
	w.guest(r, 3000, say)
	w.guest(r, envdPort, say)
	for port, want := range map[int]string{
		3000:     `app-3000.localhost:3000 ["` + "3000-" + string(r.Sandbox) + `.x:8"]`,
		envdPort: "49983-" + string(r.Sandbox) + ".x:8 []",
	} {
		req := w.request("GET", "/", r, port, nil)
		req.Host = fmt.Sprintf("%d-%s.x:8", port, r.Sandbox)
		req.Header.Set("X-Forwarded-Host", "evil.example.com")
		if _, body := w.do(req); body != want {
			t.Errorf("port %d sees %s, want %s", port, body, want)
		}
	}
}

func TestHTTPSPorts(t *testing.T) {
	shortRetries(t)
	w := newWorld(t, nil)
	r := w.sandbox(func(r *catalog.Route) { r.Ingress.HTTPSPorts = []uint16{443, 8443, envdPort} })
	say := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.TLS == nil {
			fmt.Fprint(rw, "plain")
			return
		}
		fmt.Fprintf(rw, "%s %s %s", r.Proto, r.Host, r.TLS.ServerName)
	})
	w.tlsGuest(r, 443, say)
	w.tlsGuest(r, 444, say) // not said to be one
	w.guest(r, 80, say)
	w.guest(r, 8443, say) // said to be one and is none
	w.guest(r, envdPort, say)
	host := func(port int) string { return fmt.Sprintf("%d-%s.sbx.example.com", port, r.Sandbox) }
	for _, c := range []struct {
		port        int
		host, ctype string
		status      int
		want        string
	}{
		{443, "", "", 200, "HTTP/1.1 " + w.addr + " "},
		{443, host(443) + ":9", "", 200, "HTTP/1.1 " + host(443) + ":9 " + host(443)},
		{80, host(80), "", 200, "plain"},
		{envdPort, host(envdPort), "", 200, "plain"},
		{444, host(444), "", 400, "Client sent an HTTP request to an HTTPS server.\n"},
		{8443, host(8443), "", 502, ""},
	} {
		req := w.request("GET", "/", r, c.port, nil)
		if c.host != "" {
			req.Host = c.host
		}
		if res, body := w.do(req); res.StatusCode != c.status || c.want != "" && body != c.want {
			t.Errorf("port %d: %d %q, want %d %q", c.port, res.StatusCode, body, c.status, c.want)
		}
	}
	t.Run("masked", func(t *testing.T) {
		m := w.sandbox(func(r *catalog.Route) {
			r.Ingress = cay.Ingress{HTTPSPorts: []uint16{443}, MaskHost: "inner.example.com:${PORT}"}
		})
		w.tlsGuest(m, 443, say)
		if _, body := w.do(w.request("GET", "/", m, 443, nil)); body != "HTTP/1.1 inner.example.com:443 inner.example.com" {
			t.Error(body)
		}
	})
	t.Run("gRPC", func(t *testing.T) {
		req := w.request("POST", "/svc/Method", r, 443, nil)
		req.Host = host(443)
		req.Header.Set("Content-Type", "application/grpc")
		res, err := h2(t).RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if body, err := io.ReadAll(res.Body); err != nil || string(body) != "HTTP/2.0 "+host(443)+" "+host(443) {
			t.Errorf("%d %s %v", res.StatusCode, body, err)
		}
	})
	t.Run("gRPC with a header alone", func(t *testing.T) {
		only := w.sandbox(nil)
		w.guest(only, 50051, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { rw.Header().Set("Grpc-Status", "5") }))
		req := w.request("POST", "/svc/Method", only, 50051, nil)
		req.Header.Set("Content-Type", "application/grpc")
		res, err := h2(t).RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		// The transport knows a length without a body only where the stream
		// ended with its header.
		if n, err := res.Body.Read(make([]byte, 1)); n != 0 || err != io.EOF || res.ContentLength != 0 || res.Header.Get("Grpc-Status") != "5" {
			t.Errorf("%d, %v, %v", n, err, res)
		}
	})
	t.Run("WebSocket", func(t *testing.T) {
		wss := w.sandbox(func(r *catalog.Route) { r.Ingress.HTTPSPorts = []uint16{443} })
		w.tlsGuest(wss, 443, echo)
		conn, br, res := w.upgrade(wss, 443)
		if res.StatusCode != 101 {
			t.Fatal(res.StatusCode)
		}
		if _, err := io.WriteString(conn, "ping"); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4)
		if _, err := io.ReadFull(br, b); err != nil || string(b) != "ping" {
			t.Fatalf("%q %v", b, err)
		}
	})
	t.Run("ends", func(t *testing.T) {
		gone := w.sandbox(func(r *catalog.Route) { r.Ingress.HTTPSPorts = []uint16{443} })
		begun := make(chan struct{})
		w.tlsGuest(gone, 443, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			rw.(http.Flusher).Flush()
			close(begun)
			<-r.Context().Done()
		}))
		res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(w.request("GET", "/", gone, 443, nil))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		<-begun
		w.end(gone)
		if _, err := io.ReadAll(res.Body); err == nil {
			t.Error("a stream over TLS outlived its sandbox")
		}
	})
}

func TestServerName(t *testing.T) {
	for host, want := range map[string]string{
		"a.b:1": "a.b", "127.0.0.1:80": "", "[::1]": "", "localhost": "localhost", "": "", "[": "",
	} {
		if got := sni(host, cay.Ingress{}, 1); got != want {
			t.Errorf("sni(%q) = %q, want %q", host, got, want)
		}
	}
}
