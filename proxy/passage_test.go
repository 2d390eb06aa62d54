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
	"testing"
)

// pair returns the two ends of a TCP connection.
func pair(t *testing.T) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if far, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if near, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

// What the server has read ahead is in memory, what follows goes past us, and
// whoever else reads from the connection gets what it asks for.
func TestPassage(t *testing.T) {
	from, client := pair(t)
	to, guest := pair(t)
	gc := &guarded{Conn: from}
	g := newPassage(gc, &tracked{Conn: to})
	if g == nil {
		t.Fatal("no passage between TCP connections")
	}
	defer g.close()
	ahead := bufio.NewReaderSize(gc, 16)
	say := func(s string) {
		t.Helper()
		if _, err := io.WriteString(client, s); err != nil {
			t.Fatal(err)
		}
	}
	piece := make([]byte, 64)
	say("head:ahead")
	if b, err := ahead.Peek(10); err != nil || string(b) != "head:ahead" {
		t.Fatalf("%q, %v", b, err)
	}
	_, _ = ahead.Discard(5) // it is there
	if n, moved, err := g.read(ahead, piece); moved || err != nil || string(piece[:n]) != "ahead" {
		t.Errorf("read ahead: %q, moved %v, %v", piece[:n], moved, err)
	}
	say("past")
	clear(piece)
	if n, moved, err := g.read(ahead, piece); !moved || err != nil || n != 4 || g.err != nil {
		t.Errorf("past us: %d bytes, moved %v, %v, %v", n, moved, err, g.err)
	}
	if !bytes.Equal(piece, make([]byte, 64)) {
		t.Errorf("what went past us was copied: %q", piece)
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(guest, got); err != nil || string(got) != "past" {
		t.Errorf("the guest got %q, %v", got, err)
	}
	// A read of somebody else's while one of the passage is expected.
	gc.passage.Store(g)
	g.piece = piece
	say("other")
	other := make([]byte, 8)
	if n, err := gc.Read(other); err != nil || string(other[:n]) != "other" {
		t.Errorf("another read got %q, %v", other[:n], err)
	}
	gc.passage.Store(nil)

	_ = client.(*net.TCPConn).CloseWrite() // else the next read fails
	if n, moved, err := g.read(ahead, piece); n != 0 || moved || err != io.EOF {
		t.Errorf("at the end: %d bytes, moved %v, %v", n, moved, err)
	}
}

// A guest that is gone is not taken for a client that is.
func TestPassageWithoutGuest(t *testing.T) {
	from, client := pair(t)
	to, _ := pair(t)
	gc := &guarded{Conn: from}
	g := newPassage(gc, &tracked{Conn: to})
	defer g.close()
	to.Close()
	if _, err := io.WriteString(client, "lost"); err != nil {
		t.Fatal(err)
	}
	if n, moved, err := g.read(gc, make([]byte, 64)); n != 4 || !moved || err != nil || g.err == nil {
		t.Errorf("%d bytes, moved %v, the client's side %v, the guest's %v", n, moved, err, g.err)
	}
}

func TestNoPassage(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	tcp, _ := pair(t)
	if newPassage(&guarded{Conn: a}, &tracked{Conn: tcp}) != nil || newPassage(&guarded{Conn: tcp}, a) != nil ||
		newPassage(nil, &tracked{Conn: tcp}) != nil {
		t.Error("a passage for what the kernel cannot move")
	}
}

// Long bodies and the requests behind them stay apart, however they are cut.
func TestLongBodiesInARow(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	w.guest(r, envdPort, http.HandlerFunc(func(rw http.ResponseWriter, q *http.Request) {
		h := sha256.New()
		_, _ = io.Copy(h, q.Body)
		fmt.Fprintf(rw, "%x", h.Sum(nil))
	}))
	random := rand.New(rand.NewPCG(1, 2))
	var wire bytes.Buffer
	var want []string
	for _, n := range []int{longBody + 1, longBody + 4<<10, 10, 3*longBody + 4711, 2 * longBody} {
		data := make([]byte, n)
		for i := range data {
			data[i] = byte(random.Uint32())
		}
		want = append(want, fmt.Sprintf("%x", sha256.Sum256(data)))
		req := w.request("POST", "/files", r, envdPort, bytes.NewReader(data))
		if err := req.Write(&wire); err != nil {
			t.Fatal(err)
		}
	}
	conn, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		for wire.Len() > 0 {
			if _, err := conn.Write(wire.Next(1 + random.IntN(300<<10))); err != nil {
				return
			}
		}
	}()
	in := bufio.NewReader(conn)
	for i, want := range want {
		res, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || string(got) != want {
			t.Fatalf("body %d came as %s, want %s; %v", i, got, want, err)
		}
	}
}

// A long body that breaks off never looks whole to the guest.
func TestLongBodyThatEndsEarly(t *testing.T) {
	w := newWorld(t, nil)
	r := w.sandbox(nil)
	seen := make(chan error, 1)
	w.guest(r, envdPort, http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) {
		_, err := io.Copy(io.Discard, q.Body)
		seen <- err
	}))
	conn, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /files HTTP/1.1\r\nHost: localhost\r\n%s: %s\r\n%s: %d\r\nContent-Length: %d\r\n\r\n",
		headerSandbox, r.Sandbox, headerPort, envdPort, 4*longBody)
	if _, err := conn.Write(make([]byte, 2*longBody)); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if err := <-seen; err == nil {
		t.Error("half a body looked whole to the guest")
	}
}
