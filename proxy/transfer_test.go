package proxy

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
)

// A call reaches the guest in one piece: what it is woken for once, it answers
// at once.
func TestShortRequestIsOnePiece(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	l, err := net.Listen("tcp", netip.AddrPortFrom(r.Addr, envdPort).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	first := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 64<<10)
		n, _ := c.Read(b)
		first <- string(b[:n])
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	}()
	body := strings.Repeat("x", shortBody)
	if res, got := w.do(w.request("POST", "/process.Process/List", r, envdPort, strings.NewReader(body))); res.StatusCode != 200 || got != "ok" {
		t.Errorf("%d %q", res.StatusCode, got)
	}
	if got := <-first; !strings.HasSuffix(got, "\r\n\r\n"+body) {
		t.Errorf("the first read brought %d bytes, without all of the body", len(got))
	}
}

// Long bodies pass unchanged in both directions, and after one that came down the
// connection is good for the next request.
func TestLongBodies(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	data := make([]byte, 3*longBody+4711)
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(data) // never fails
	var last string          // who asked for the last download
	w.guest(r, envdPort, http.HandlerFunc(func(rw http.ResponseWriter, q *http.Request) {
		if q.Method == http.MethodPost {
			h := sha256.New()
			_, _ = io.Copy(h, q.Body)
			fmt.Fprintf(rw, "%x", h.Sum(nil))
			return
		}
		last = q.RemoteAddr
		var n int
		_, _ = fmt.Sscan(q.URL.Query().Get("n"), &n)
		rw.Header().Set("Content-Length", fmt.Sprint(n))
		_, _ = rw.Write(data[:n])
	}))
	for _, n := range []int{longBody - 1, longBody, longBody + 1, len(data)} {
		want := fmt.Sprintf("%x", sha256.Sum256(data[:n]))
		if _, got := w.do(w.request("POST", "/files", r, envdPort, bytes.NewReader(data[:n]))); got != want {
			t.Errorf("%d bytes went up as %q, want %s", n, got, want)
		}
		before := ""
		// On one connection the second request follows when the first is over.
		tr := &http.Transport{}
		for range 2 {
			res, err := tr.RoundTrip(w.request("GET", fmt.Sprint("/files?n=", n), r, envdPort, nil))
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(res.Body)
			res.Body.Close()
			if err != nil || res.ContentLength != int64(n) || !bytes.Equal(got, data[:n]) {
				t.Errorf("%d bytes of %d came down, or others than went up: %v", len(got), n, err)
			}
			if before != "" && last != before {
				t.Errorf("after %d bytes the connection was not used again", n)
			}
			before = last
		}
		tr.CloseIdleConnections()
	}
}

// An answer that breaks off is not taken for a whole one by the client.
func TestLongBodyBreaksOff(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	l, err := net.Listen("tcp", netip.AddrPortFrom(r.Addr, envdPort).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const said, sent = 4 * longBody, 2 * longBody
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = http.ReadRequest(bufio.NewReader(c))
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", said)
		_, _ = c.Write(make([]byte, sent))
	}()
	tr := &http.Transport{DisableKeepAlives: true}
	res, err := tr.RoundTrip(w.request("GET", "/files", r, envdPort, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if n, err := io.Copy(io.Discard, res.Body); err == nil || n > sent {
		t.Errorf("%d bytes came, and the end: %v", n, err)
	}
}

// Buffers grow while reads fill them, shrink when one brings little, and the
// largest are counted.
func TestBuffer(t *testing.T) {
	var b buffer
	for i, want := range sizes {
		if got := len(b.bytes()); got != want {
			t.Fatalf("after %d full reads: %d bytes, want %d", i, got, want)
		}
		b.grow(len(b.bytes()))
	}
	if len(b.bytes()) != sizes[largest] {
		t.Error("the largest one has grown")
	}
	b.grow(sizes[smallest])
	if len(b.bytes()) != sizes[largest] {
		t.Error("a read that filled the smallest one gave the largest one back")
	}
	var others [maxLargest]buffer
	for i := range others {
		for range len(sizes) {
			others[i].grow(len(others[i].bytes()))
		}
	}
	if len(others[maxLargest-2].bytes()) != sizes[largest] || len(others[maxLargest-1].bytes()) != sizes[largest-1] {
		t.Errorf("the last two of %d have %d and %d bytes", maxLargest, len(others[maxLargest-2].bytes()), len(others[maxLargest-1].bytes()))
	}
	b.grow(1)
	if len(b.bytes()) != sizes[smallest] {
		t.Error("a short read left it large")
	}
	b.free()
	for i := range others {
		others[i].free()
	}
	if n := len(largestUse); n != 0 {
		t.Errorf("%d are counted that nobody uses", n)
	}
}
