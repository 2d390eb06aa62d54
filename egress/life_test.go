package egress

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay"
)

// Bytes pass as they are, both ways at once, and each direction ends for
// itself.
func TestTunnel(t *testing.T) {
	w := newWorld(t, "api.example.com A 5.5.5.5")
	first := hello(t, "api.example.com")
	sums := make(chan [32]byte, 1)
	w.serve("5.5.5.5:443", func(c net.Conn) {
		h := sha256.New()
		n, err := io.Copy(h, c) // to the guest's end of its direction
		if err != nil || n != int64(len(first))+8<<20 {
			t.Errorf("outside: %d bytes, %v", n, err)
		}
		sums <- [32]byte(h.Sum(nil))
		_, _ = c.Write(bytes.Repeat([]byte("answer"), 1<<20))
	})
	in := attach(t, w, newServer(t, w), onlyNames("api.example.com"))
	c := in.connect("5.5.5.5:443")
	body := make([]byte, 8<<20)
	rand.Read(body)
	want := sha256.Sum256(append(bytes.Clone(first), body...))
	if _, err := c.Write(append(first, body...)); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got := <-sums; got != want {
		t.Error("other bytes have arrived outside than were sent")
	}
	if b, err := io.ReadAll(c); err != nil || len(b) != 6<<20 {
		t.Errorf("the guest got %d bytes back, %v", len(b), err)
	}
}

// An end that is none, on one side, is none on the other.
func TestTunnelReset(t *testing.T) {
	w := newWorld(t)
	in := attach(t, w, newServer(t, w), cay.Egress{Rules: []cay.EgressRule{{Name: "r.example"}}})
	w.serve("5.5.5.5:22", func(c net.Conn) {
		_, _ = io.ReadFull(c, make([]byte, 1))
		reset(c)
	})
	if got := in.try("5.5.5.5:22", []byte("x")); got != "reset" {
		t.Errorf("a reset from outside: %q", got)
	}
	ended := make(chan error, 1)
	w.serve("6.6.6.6:22", func(c net.Conn) {
		_, _ = c.Write([]byte("here"))
		_, err := io.Copy(io.Discard, c)
		ended <- err
	})
	c := in.connect("6.6.6.6:22")
	hear(c)
	reset(c)
	if err := <-ended; err == nil {
		t.Error("the guest's reset is an ordinary end outside")
	}
	if got := in.try("9.9.9.9:22", nil); got != "reset" {
		t.Errorf("a destination that refuses: %q", got)
	}
}

func TestTunnelIdle(t *testing.T) {
	// A machine that sleeps for longer than the limit gets a larger one.
	for limit := 300 * time.Millisecond; limit < time.Minute; limit *= 4 {
		if outlivesUse(t, limit) {
			return
		}
	}
	t.Error("a connection that was used all the time was ended as idle")
}

// outlivesUse reports whether a connection that is used within the limit lives,
// and sees that it ends when it is not.
func outlivesUse(t *testing.T, limit time.Duration) bool {
	w := newWorld(t)
	s := newServer(t, w)
	s.Limits.Idle = limit
	in := attach(t, w, s, cay.Egress{Rules: []cay.EgressRule{{Name: "r.example"}}})
	w.serve("5.5.5.5:22", func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	c := in.connect("5.5.5.5:22")
	for range 10 { // twice the limit in all
		time.Sleep(limit / 5)
		if _, err := c.Write([]byte("x")); err != nil {
			return false
		}
	}
	if got := hear(c); got != "reset" {
		t.Errorf("an idle connection: %q", got)
	}
	return true
}

// pipes is a listener of connections that synctest can see.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { p.once.Do(func() { close(p.done) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

// ReadFrom, WriteTo and the deadlines make it a packet connection on which
// nothing comes.
func (p *pipes) ReadFrom([]byte) (int, net.Addr, error)    { <-p.done; return 0, nil, net.ErrClosed }
func (p *pipes) WriteTo(b []byte, _ net.Addr) (int, error) { return len(b), nil }
func (p *pipes) LocalAddr() net.Addr                       { return &net.UDPAddr{} }
func (p *pipes) SetDeadline(time.Time) error               { return nil }
func (p *pipes) SetReadDeadline(time.Time) error           { return nil }
func (p *pipes) SetWriteDeadline(time.Time) error          { return nil }

// The time to say a name runs from the accept, whatever comes in between.
func TestSniffDeadline(t *testing.T) {
	for _, tc := range []struct {
		what  string
		to    string
		start []byte
		more  []byte // a byte of it each half second
	}{
		{"silence", "5.5.5.5:443", nil, nil},
		{"silence to HTTP", "5.5.5.5:80", nil, nil},
		{"a slow ClientHello", "5.5.5.5:443", nil, hello(t, "api.example.com")},
		{"half a ClientHello", "5.5.5.5:443", hello(t, "api.example.com")[:40], nil},
		{"a slow header", "5.5.5.5:80", []byte("GET / HTTP/1.1\r\nHost: "), []byte("api.example.com")},
	} {
		t.Run(tc.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var reason string
				l, dns, dnsTCP := newPipes(), newPipes(), newPipes()
				s := &Server{Refused: special}
				if err := s.Open(t.Context()); err != nil {
					t.Fatal(err)
				}
				err := s.Attach(Guest{Execution: "x", Policy: onlyNames("api.example.com"), TCP: l, DNS: dns, DNSTCP: dnsTCP,
					Destination: func(net.Conn) (netip.AddrPort, error) { return netip.MustParseAddrPort(tc.to), nil },
					Report:      func(r cay.EgressRefusal) { reason = r.Reason }})
				if err != nil {
					t.Fatal(err)
				}
				guest, node := net.Pipe()
				l.conns <- node
				began := time.Now()
				var wg sync.WaitGroup
				wg.Go(func() {
					_, _ = guest.Write(tc.start)
					for i := range tc.more {
						time.Sleep(500 * time.Millisecond)
						if _, err := guest.Write(tc.more[i : i+1]); err != nil {
							return
						}
					}
				})
				if _, err := guest.Read(make([]byte, 1)); err == nil {
					t.Error("the guest was told something")
				}
				if d := time.Since(began); d != 3*time.Second {
					t.Errorf("the connection ended after %s, want 3 s", d)
				}
				synctest.Wait()
				if !strings.Contains(reason, "in time") {
					t.Errorf("refused because it %s", reason)
				}
				guest.Close()
				wg.Wait()
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// A guest whose destination is open by its address may let the server speak
// first, also on the port of TLS.
func TestServerSpeaksFirst(t *testing.T) {
	w := newWorld(t)
	w.serve("5.5.5.5:443", func(c net.Conn) {
		_, _ = c.Write([]byte("here"))
		_, _ = io.Copy(io.Discard, c)
	})
	s := newServer(t, w)
	s.Limits.Sniff = 50 * time.Millisecond
	in := attach(t, w, s, cay.Egress{Rules: []cay.EgressRule{{Name: "r.example"}}})
	if got := hear(in.connect("5.5.5.5:443")); got != "here" {
		t.Errorf("got %q", got)
	}
}

func TestLimits(t *testing.T) {
	w := newWorld(t)
	w.serve("5.5.5.5:22", here)
	s := newServer(t, w)
	s.Limits.Connections = 3
	in := attach(t, w, s, cay.Egress{Rules: []cay.EgressRule{{Name: "r.example"}}})
	var open []*net.TCPConn
	for range 3 {
		c := in.connect("5.5.5.5:22")
		_, _ = c.Write([]byte("x"))
		if got := hear(c); !strings.HasSuffix(got, "here") {
			t.Fatalf("below the limit: %q", got)
		}
		open = append(open, c)
	}
	if got := in.try("5.5.5.5:22", []byte("x")); got != "reset" {
		t.Errorf("above the limit: %q", got)
	}
	in.reason()
	if r := in.refused(); len(r) != 1 || r[0].Rule != ruleLimit {
		t.Errorf("reported: %+v", r)
	}
	open[0].Close()
	eventually(t, func() bool { return strings.HasSuffix(in.try("5.5.5.5:22", []byte("x")), "here") }, "a place that was left stays taken")

	s = newServer(t, w)
	s.Limits.PerSecond = 1
	in = attach(t, w, s, cay.Egress{Rules: []cay.EgressRule{{Name: "r.example"}}})
	var resets int
	for range 20 {
		if in.try("5.5.5.5:22", []byte("x")) == "reset" {
			resets++
		}
	}
	if resets < 10 {
		t.Errorf("of 20 connections at once %d were over a limit of 1 per second", resets)
	}
}

// A new policy counts at once, for what is open too, and leaves alone what it
// allows.
func TestUpdate(t *testing.T) {
	w := newWorld(t, "a.example A 5.5.5.5", "b.example A 6.6.6.6")
	w.serve("5.5.5.5:443", here)
	w.serve("6.6.6.6:443", here)
	w.serve("6.6.6.6:80", here)
	s := newServer(t, w)
	in := attach(t, w, s, onlyNames("a.example", "b.example"))
	open := func(to string, say []byte) *net.TCPConn {
		c := in.connect(to)
		_, _ = c.Write(say)
		if got := hear(c); !strings.HasSuffix(got, "here") {
			t.Fatalf("%s: %q", to, got)
		}
		return c
	}
	a, b, bHTTP := open("5.5.5.5:443", hello(t, "a.example")), open("6.6.6.6:443", hello(t, "b.example")), open("6.6.6.6:80", get("b.example"))
	if err := s.Update(in.id, onlyNames("a.example", "c.example")); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]*net.TCPConn{"a tunnel": b, "an HTTP connection": bHTTP} {
		if got := hear(c); got != "reset" {
			t.Errorf("%s to a name that is allowed no more: %q", what, got)
		}
	}
	_, _ = a.Write(hello(t, "x"))
	if got := hear(a); got != "here" {
		t.Errorf("a tunnel to a name that is allowed still: %q", got)
	}
	if got := in.try("6.6.6.6:443", hello(t, "b.example")); got != "reset" {
		t.Errorf("a new connection to the name: %q", got)
	}
	if err := s.Update(in.id, onlyNames("*")); err == nil {
		t.Error("a policy that is none is accepted")
	}
	if got := in.try("5.5.5.5:443", hello(t, "a.example")); got != "here" {
		t.Errorf("after a refused update: %q", got)
	}
	if err := s.Update("xnobody", onlyNames("a.example")); cay.CodeOf(err) != cay.CodeNotFound {
		t.Errorf("an update of nobody: %v", err)
	}
	// A proxy is for everything: what goes another way ends.
	e := onlyNames("a.example")
	e.Proxy = &cay.EgressProxy{Address: "9.9.9.9:1080"}
	if err := s.Update(in.id, e); err != nil {
		t.Fatal(err)
	}
	if got := hear(a); got != "reset" {
		t.Errorf("a tunnel beside the new proxy: %q", got)
	}
}

// Detach and Close leave nothing running, whatever was under way. (TestMain
// looks for goroutines.)
func TestClose(t *testing.T) {
	w := newWorld(t, "api.example.com A 5.5.5.5", "slow.example.com A 6.6.6.6")
	s := newServer(t, w)
	hold := make(chan struct{})
	s.Roots = outside(t, w, "5.5.5.5:443", http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(rw).Flush()
		select {
		case <-r.Context().Done():
		case <-hold:
		}
	}), "api.example.com")
	defer close(hold)
	w.serve("7.7.7.7:22", func(c net.Conn) { _, _ = io.Copy(c, c) })
	e := cay.Egress{Rules: []cay.EgressRule{{Name: "api.example.com", Headers: map[string]string{"X": "y"}}}}
	var ins []*island
	for range 2 {
		in := attach(t, w, s, e)
		ins = append(ins, in)
		for _, http2 := range []bool{false, true} {
			resp, err := in.client(t, "5.5.5.5:443", http2).Get("https://api.example.com/") // its body stays open
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
		}
		c := in.connect("7.7.7.7:22")
		_, _ = c.Write([]byte("here"))
		hear(c)
		in.connect("5.5.5.5:443") // says nothing
	}
	if err := s.Detach(ins[0].id); err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp4", ins[0].tcp); err == nil {
		t.Error("the detached guest is still accepted")
	}
	if err := s.Detach(ins[0].id); err != nil {
		t.Errorf("detaching twice: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	in := &island{t: t, w: w, server: s, id: "x"}
	g := in.guest(t, e)
	if err := s.Attach(g); cay.CodeOf(err) != cay.CodeShuttingDown {
		t.Errorf("attaching to a closed server: %v", err)
	}
	if _, err := g.TCP.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener of a guest that was not attached: %v", err)
	}
}

// The last wall is asked about the very address that is dialled.
func TestDialRefuses(t *testing.T) {
	w := newWorld(t)
	s := newServer(t, w)
	g := newGuest(s, Guest{}, &policy{})
	for _, to := range []string{"10.0.0.1:80", "127.0.0.1:80", "169.254.169.254:80"} {
		if _, err := g.dial(t.Context(), &policy{}, netip.MustParseAddrPort(to), ""); !errors.Is(err, errRefused) {
			t.Errorf("%s: %v", to, err)
		}
	}
	if err := s.control(nil)("tcp", "[::ffff:10.0.0.1]:80", nil); !errors.Is(err, errRefused) {
		t.Errorf("IPv4 in IPv6: %v", err)
	}
}

// An idle tunnel costs no buffer. The figure is the promise: 40 KiB.
func TestIdleTunnelMemory(t *testing.T) {
	w := newWorld(t)
	w.serve("5.5.5.5:22", func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	s := newServer(t, w)
	s.Limits.PerSecond = 1000
	in := attach(t, w, s, cay.Egress{Rules: []cay.EgressRule{{Name: "r.example"}}})
	const n = 200
	before := memory()
	for range n {
		c := in.connect("5.5.5.5:22")
		_, _ = c.Write([]byte("x"))
	}
	eventually(t, func() bool { return len(w.dials()) == n }, "not all connections go out")
	// Each stream here also has both ends of the test: two connections and
	// a goroutine with io.Copy's 32 KiB, which count too.
	const testOwn = 32<<10 + 16<<10
	if each := (memory() - before) / n; each > 40<<10+testOwn {
		t.Errorf("an idle tunnel takes %d KiB", each>>10)
	} else {
		t.Logf("an idle tunnel takes %d KiB, the test's own ends included", each>>10)
	}
}

func memory() int {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapInuse + m.StackInuse)
}

func BenchmarkHello(b *testing.B) {
	h := hello(b, "api.example.com")
	for b.Loop() {
		if readHello(says(h)).name == "" {
			b.Fatal("no name")
		}
	}
}

// BenchmarkConnect measures what the judgement adds to a connection: from the
// guest's connect to the first byte of the answer, and the same without us.
func BenchmarkConnect(b *testing.B) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); here(c) }()
		}
	}()
	say, buf := hello(b, "api.example.com"), make([]byte, 16)
	once := func(b *testing.B, addr string) {
		c, err := net.Dial("tcp4", addr)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Write(say); err != nil {
			b.Fatal(err)
		}
		if _, err := c.Read(buf); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
	b.Run("direct", func(b *testing.B) {
		for b.Loop() {
			once(b, l.Addr().String())
		}
	})
	b.Run("judged", func(b *testing.B) {
		listen := func() net.Listener {
			l, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			return l
		}
		pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		s := &Server{Refused: special, Limits: Limits{PerSecond: 1 << 20}}
		if err := s.Open(b.Context()); err != nil {
			b.Fatal(err)
		}
		defer s.Close()
		to := netip.MustParseAddrPort("5.5.5.5:443")
		g := Guest{Execution: "x", Policy: onlyNames("api.example.com"), TCP: listen(), DNS: pc, DNSTCP: listen(),
			Destination: func(net.Conn) (netip.AddrPort, error) { return to, nil },
			Dial: func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "tcp4", l.Addr().String())
			}}
		if err := s.Attach(g); err != nil {
			b.Fatal(err)
		}
		s.guests["x"].pins.add("api.example.com", []netip.Addr{to.Addr()}, time.Hour, time.Now())
		for b.Loop() {
			once(b, g.TCP.Addr().String())
		}
	})
}
