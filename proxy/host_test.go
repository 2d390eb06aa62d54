package proxy

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
)

// hostileHosts are Hosts that name no sandbox, or name one in a way that others
// may read otherwise.
func hostileHosts(id string) []string {
	var out []string
	for _, port := range []string{"0", "65536", "99999", "100000", "00080", "080", "-1", "+80", "0x50", "8e1", "80.0", "８０", "", " 80", "80 ", "1000000000000000000000"} {
		out = append(out, port+"-"+id+".x")
	}
	for _, bad := range []string{"", "I1", "i_1", "..", "%69", "i\x001", "i\x7f1", "i 1", "ï", "i/1", `i\1`, "i?1", "i#1", "i@1", "i:1", "i[1", "i]1", "i,1", "i;1", "i'1", `i"1`, "i<1", "i{1",
		strings.Repeat("i", 65), strings.Repeat("a", 64<<9)} {
		out = append(out, "80-"+bad+".x", "80-"+bad)
	}
	good := "80-" + id + ".x"
	for _, c := range " \t!\"#$%&'()*+,/;<=>?@[\\]^`{|}~\x01\x1f\x7fäß中😀\u200b\u3002\uff0e\uff61" {
		out = append(out, string(c)+good, good+string(c), strings.Replace(good, ".", string(c)+".", 1), strings.Replace(good, ".", "."+string(c), 1))
	}
	return append(out, ".", "..", ".x", "-", "-.", "a", "80", "80-", "80."+id, id+"-80.x", "80--"+id+".x", "80_"+id+".x",
		"http://"+good, good+"/", good+"/init", "user@"+good, "user:pass@"+good, good+":http", good+":80:80", good+": 80", good+":-1",
		"[", "]", "[]", "[::1", "::1]", "[::1]]", "[::1]x", "[:::]", "[::1%eth0]", "[fe80::1%25eth0]:80", "[127.0.0.1x]", "["+good+"]",
		"localhost", "localhost:80", "127.0.0.1", "127.1", "0x7f000001", "[::1]", "sandbox.sbx.example.com", "api.sbx.example.com", "sbx.example.com",
		strings.Repeat("a.", 300)+"x", good+strings.Repeat(".a", 200), "xn--"+good)
}

// Whatever the Host, and even if a sandbox could be guessed in it, the answer is
// 400 or the sandbox's own: never a 500, and never another sandbox.
func TestHostileHosts(t *testing.T) {
	shortRetries(t)
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	var hits atomic.Int32
	w.guest(r, 80, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits.Add(1) }))
	hosts := hostileHosts(string(r.Sandbox))
	if len(hosts) < 200 {
		t.Fatalf("only %d hosts", len(hosts))
	}
	check := func(how, host, status string) {
		if status != "400" {
			t.Errorf("%s: Host %q is answered with %s", how, host, status)
		}
	}
	for _, host := range hosts {
		if strings.Trim(host, " \t") != host {
			continue // a field's value has no space around it
		}
		answer := w.raw("GET / HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n")
		got := statuses(answer)
		if len(got) == 0 {
			t.Errorf("Host %q is not answered", host)
			continue
		}
		check("HTTP/1.1", host, got[0])
	}
	c := w.h2Conn()
	for _, host := range hosts {
		if len(host) > 10_000 {
			continue // one frame each
		}
		status := c.ask(map[string]string{":method": "GET", ":scheme": "http", ":path": "/", ":authority": host})
		if status == "reset" && strings.ContainsAny(host, "@\x00\x01\x1f\x7f") {
			continue // no authority of HTTP/2 has these
		}
		check("HTTP/2", host, status)
	}
	if hits.Load() != 0 {
		t.Errorf("%d requests reached the sandbox", hits.Load())
	}
}

// HTTP/2 lets pass what would be another request on a line of HTTP/1.
func TestNoSplitting(t *testing.T) {
	shortRetries(t)
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	var seen sync.Map
	w.guest(r, 80, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { seen.Store(r.Method+" "+r.RequestURI, true) }))
	host := "80-" + string(r.Sandbox) + ".x"
	c := w.h2Conn()
	for _, f := range []map[string]string{
		{":method": "GET /a HTTP/1.1", ":path": "/"},
		{":method": "GET\t/a", ":path": "/"},
		{":method": "GE(T)", ":path": "/"},
		{":method": "GET", ":path": "/?q HTTP/1.1"},
		{":method": "GET", ":path": "/?q\tx"},
		{":method": "GET", ":path": "*x"},
		{":method": "GET", ":path": "x:/init"},
		{":method": "GET", ":path": "/", "transfer-encoding": "chunked"},
		{":method": "GET", ":path": "/", "connection": "x"},
		{":method": "GET", ":path": "/", "x-a": "b\r\nx-evil: 1"},
		{":method": "GET", ":path": "/", "x-a\r\nx-evil": "1"},
		{":method": "GET", ":path": "/", "x a": "1"},
		{":method": "CONNECT", ":authority": host},
	} {
		f[":scheme"] = "http"
		if f[":authority"] == "" {
			f[":authority"] = host
		} else {
			delete(f, ":scheme")
		}
		if got := c.ask(f); got != "400" && got != "reset" {
			t.Errorf("%q is answered with %s", f, got)
		}
	}
	seen.Range(func(k, _ any) bool {
		t.Errorf("the sandbox saw %v", k)
		return true
	})
	if got := c.ask(map[string]string{":method": "GET", ":scheme": "http", ":path": "/a%20b?c=d%20e", ":authority": host}); got != "200" {
		t.Errorf("an honest request is answered with %s", got)
	}
}

// h2Conn is HTTP/2 by hand: it sends what no client would.
type h2Conn struct {
	w      *world
	conn   net.Conn
	framer *http2.Framer
	next   uint32
}

func (w *world) h2Conn() *h2Conn {
	w.t.Helper()
	return &h2Conn{w: w}
}

func (c *h2Conn) open() error {
	c.conn = c.w.dial()
	_ = c.conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := fmt.Fprint(c.conn, http2.ClientPreface); err != nil {
		return err
	}
	c.framer, c.next = http2.NewFramer(c.conn, c.conn), 1
	c.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	return c.framer.WriteSettings()
}

// ask sends one request and returns its status, or "reset" when the stream or
// the connection ends instead.
func (c *h2Conn) ask(fields map[string]string) string {
	if c.conn == nil {
		if err := c.open(); err != nil {
			c.w.t.Fatal(err)
		}
	}
	var block strings.Builder
	enc := hpack.NewEncoder(&block)
	for _, pseudo := range []bool{true, false} {
		for k, v := range fields {
			if strings.HasPrefix(k, ":") == pseudo {
				if err := enc.WriteField(hpack.HeaderField{Name: k, Value: v}); err != nil {
					c.w.t.Fatal(err)
				}
			}
		}
	}
	id := c.next
	c.next += 2
	if err := c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: []byte(block.String()), EndStream: true, EndHeaders: true}); err != nil {
		c.conn = nil
		return "reset"
	}
	for {
		f, err := c.framer.ReadFrame()
		if err != nil {
			c.conn = nil // a new one for the next
			return "reset"
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			if f.StreamID == id {
				return f.PseudoValue("status")
			}
		case *http2.RSTStreamFrame:
			if f.StreamID == id {
				return "reset"
			}
		case *http2.GoAwayFrame:
			c.conn = nil
			return "reset"
		}
	}
}

// An address passes from sandbox to sandbox while clients ask for all of them:
// no answer is another one's.
func TestSwappedAddresses(t *testing.T) {
	shortRetries(t)
	w := newWorld(t, nil)
	base := w.sandbox(nil)
	w.end(base)
	var owner atomic.Pointer[cay.SandboxID]
	nobody := cay.SandboxID("nobody")
	owner.Store(&nobody)
	say := http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprint(rw, *owner.Load()) })
	w.guest(base, 49983, say)
	w.guest(base, 80, say)
	ids := make([]cay.SandboxID, 4)
	for i := range ids {
		ids[i] = cay.NewSandboxID()
	}
	ctx, stop := context.WithCancel(t.Context())
	var own, none atomic.Int32
	var wg sync.WaitGroup
	for _, id := range ids {
		for _, port := range []int{49983, 80} {
			wg.Go(func() {
				tr := &http.Transport{}
				defer tr.CloseIdleConnections()
				for ctx.Err() == nil {
					req, _ := http.NewRequest("GET", "http://"+w.addr+"/", nil)
					req.Host = strconv.Itoa(port) + "-" + string(id) + ".x"
					res, err := tr.RoundTrip(req)
					if err != nil {
						continue // cut off
					}
					b := make([]byte, 100)
					n, _ := res.Body.Read(b)
					res.Body.Close()
					switch {
					case res.StatusCode == 200 && n > 0 && string(b[:n]) != string(id):
						t.Errorf("a request for %s was answered by %s", id, b[:n])
						return
					case res.StatusCode == 200:
						own.Add(1)
					case res.StatusCode == 502:
						none.Add(1)
					default:
						t.Errorf("status %d", res.StatusCode)
						return
					}
				}
			})
		}
	}
	for i := range 150 {
		id := ids[i%len(ids)]
		r := catalog.Route{Sandbox: id, Execution: cay.NewExecutionID(), Node: "n1", Addr: base.Addr}
		owner.Store(&id)
		if err := w.cat.Put(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		for had := own.Load(); own.Load() == had && !t.Failed(); { // it was used
			time.Sleep(time.Duration(rand.IntN(int(time.Millisecond))))
		}
		w.end(r)
		owner.Store(&nobody)
	}
	stop()
	wg.Wait()
	if own.Load() == 0 || none.Load() == 0 {
		t.Errorf("%d answers, %d refusals: nothing was tried", own.Load(), none.Load())
	}
}
