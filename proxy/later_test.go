package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/catalog"
	"github.com/cayhq/cay/internal/rawconn"
)

// A request without a body makes its connection with itself, and waits like all
// others for a port that is re-exported a moment later.
func TestPortOpensLateForGet(t *testing.T) {
	old := userRetries
	userRetries = []time.Duration{time.Millisecond, time.Millisecond, time.Millisecond, time.Second}
	t.Cleanup(func() { userRetries = old })
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	timer := time.AfterFunc(100*time.Millisecond, func() {
		w.guest(r, 8080, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, r.Method, r.URL) }))
	})
	defer timer.Stop()
	for _, method := range []string{"DELETE", "GET"} {
		if res, body := w.do(w.request(method, "/late", r, 8080, nil)); res.StatusCode != 200 || body != method+"/late" {
			t.Fatal(res.StatusCode, body)
		}
	}
}

// deaf has a port of a sandbox neither take connections nor refuse them.
func deaf(t *testing.T, r catalog.Route, port int) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: r.Addr.As4(), Port: port}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", netip.AddrPortFrom(r.Addr, uint16(port)).String()) // the queue has one place
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
}

func TestNotTaken(t *testing.T) {
	old := dialTimeout
	dialTimeout = 200 * time.Millisecond
	t.Cleanup(func() { dialTimeout = old })
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	deaf(t, r, 8080)
	for method, said := range map[string]io.Reader{"GET": nil, "POST": strings.NewReader("x")} { // with the request, and before it
		res, body := w.do(w.request(method, "/", r, 8080, said))
		wantJSON(t, res, body, 504, map[string]any{"sandboxId": string(r.Sandbox), "port": 8080.0,
			"message": "The sandbox did not accept the connection in time"})
	}
}

// Who has taken the connection may be as slow with the answer as he likes.
func TestTakenInTime(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := (&net.Dialer{Control: rawconn.Later}).Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	w := newWire(&tracked{Conn: rawconn.New(conn), forget: func() {}})
	defer w.close()
	if _, err := w.conn.Write([]byte("ask")); err != nil {
		t.Fatal(err)
	}
	other, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	w.giveUp()
	fmt.Fprint(other, "answer")
	b := make([]byte, 6)
	if _, err := io.ReadFull(w.conn, b); err != nil || string(b) != "answer" {
		t.Errorf("%q, %v", b, err)
	}
}

// A sandbox that ends while a connection to it is being made ends that, too.
func TestEndWhileOpening(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	deaf(t, r, 8080)
	w.proxy.init()
	status := make(chan int)
	go func() {
		res, _ := w.do(w.request("GET", "/", r, 8080, nil))
		status <- res.StatusCode
	}()
	for open := 0; open == 0; {
		w.proxy.up.mu.Lock()
		if c := w.proxy.up.open[r.Execution]; c != nil {
			open = len(c.hooks)
		}
		w.proxy.up.mu.Unlock()
		if t.Context().Err() != nil {
			t.Fatal("no connection was begun")
		}
	}
	w.end(r)
	if s := <-status; s != 502 {
		t.Errorf("status %d, want 502", s)
	}
}
