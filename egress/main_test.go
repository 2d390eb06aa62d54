package egress

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/cayhq/cay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// special is what the tests' node always refuses.
func special(a netip.Addr) bool {
	return !a.IsValid() || a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsUnspecified() || a.IsMulticast()
}

// world is a stand-in for the internet: names, and servers at addresses that
// are none of this machine's.
type world struct {
	t *testing.T

	mu      sync.Mutex
	records map[string][]dnsmessage.ResourceBody // by canonical name
	ttl     uint32
	asked   []string                  // names that the node asked for
	servers map[netip.AddrPort]string // where an address's server really listens
	dialled []netip.AddrPort

	resolver netip.AddrPort
}

// newWorld starts a name server. Names are "name A 1.2.3.4", "name AAAA …" or
// "name CNAME other"; a name without records does not exist.
func newWorld(t *testing.T, names ...string) *world {
	w := &world{t: t, records: map[string][]dnsmessage.ResourceBody{}, ttl: 60, servers: map[netip.AddrPort]string{}}
	w.set(names...)
	var pc net.PacketConn
	var l net.Listener
	for try := 0; l == nil; try++ { // one port for both, which another may have
		var err error
		if pc, err = net.ListenPacket("udp4", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if l, err = net.Listen("tcp4", pc.LocalAddr().String()); err != nil {
			pc.Close()
			if try == 50 {
				t.Fatal(err)
			}
		}
	}
	w.resolver = pc.LocalAddr().(*net.UDPAddr).AddrPort()
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo(w.answer(buf[:n], true), from)
		}
	})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if q, err := readFramed(c); err == nil {
				a := w.answer(q, false)
				_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...))
			}
			_ = c.Close()
		}
	})
	t.Cleanup(func() { pc.Close(); l.Close(); wg.Wait() })
	return w
}

func (w *world) set(names ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range names {
		f := strings.Fields(n)
		var b dnsmessage.ResourceBody
		switch f[1] {
		case "A":
			b = &dnsmessage.AResource{A: netip.MustParseAddr(f[2]).As4()}
		case "AAAA":
			b = &dnsmessage.AAAAResource{AAAA: netip.MustParseAddr(f[2]).As16()}
		case "CNAME":
			b = &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(f[2] + ".")}
		case "TXT":
			b = &dnsmessage.TXTResource{TXT: f[2:]}
		}
		w.records[f[0]] = append(w.records[f[0]], b)
	}
}

func (w *world) answer(query []byte, datagram bool) []byte {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	q := m.Questions[0]
	name, _ := canonical(q.Name.String())
	w.asked = append(w.asked, name)
	m.Response, m.Additionals = true, nil
	at := name
	for range 20 {
		rs, ok := w.records[at]
		if !ok {
			m.RCode = dnsmessage.RCodeNameError
			break
		}
		next := ""
		for _, b := range rs {
			h := dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(at + "."), Class: dnsmessage.ClassINET, TTL: w.ttl}
			switch b := b.(type) {
			case *dnsmessage.AResource:
				h.Type = dnsmessage.TypeA
			case *dnsmessage.AAAAResource:
				h.Type = dnsmessage.TypeAAAA
			case *dnsmessage.TXTResource:
				h.Type = dnsmessage.TypeTXT
			case *dnsmessage.CNAMEResource:
				h.Type, next = dnsmessage.TypeCNAME, strings.TrimSuffix(b.CNAME.String(), ".")
			}
			if h.Type == q.Type || h.Type == dnsmessage.TypeCNAME {
				m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: b})
			}
		}
		// A name that begins with "lazy" does not follow its alias.
		if at = next; next == "" || strings.HasPrefix(name, "lazy") {
			break
		}
	}
	if datagram && len(m.Answers) > 20 {
		m.Answers, m.Truncated = nil, true
	}
	b, err := m.Pack()
	if err != nil {
		w.t.Error(err)
	}
	return b
}

func (w *world) queries() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.asked)
}

// serve has every connection to an address answered by serve.
func (w *world) serve(to string, serve func(net.Conn)) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	w.t.Cleanup(func() { l.Close(); wg.Wait() })
	w.at(to, l.Addr().String())
}

// at puts the server that listens at real at an address.
func (w *world) at(to, real string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.servers[netip.MustParseAddrPort(to)] = real
}

// dial is a guest's way out.
func (w *world) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	w.mu.Lock()
	w.dialled = append(w.dialled, to)
	real, ok := w.servers[to]
	w.mu.Unlock()
	if !ok {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", real)
}

func (w *world) dials() []netip.AddrPort {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.dialled)
}

// island is an attached guest, from its inside.
type island struct {
	t      *testing.T
	w      *world
	server *Server
	id     cay.ExecutionID

	tcp, dnsTCP, dns string

	mu       sync.Mutex
	known    *sync.Cond
	to       map[netip.AddrPort]netip.AddrPort // by the guest's end
	refusals []cay.EgressRefusal
}

func newServer(t *testing.T, w *world) *Server {
	s := &Server{Refused: special, Resolvers: []netip.AddrPort{w.resolver}, Dir: t.TempDir()}
	if err := s.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func attach(t *testing.T, w *world, s *Server, e cay.Egress) *island {
	t.Helper()
	in := &island{t: t, w: w, server: s, id: cay.NewExecutionID(), to: map[netip.AddrPort]netip.AddrPort{}}
	in.known = sync.NewCond(&in.mu)
	if err := s.Attach(in.guest(t, e)); err != nil {
		t.Fatal(err)
	}
	return in
}

// guest makes the sockets that package network would.
func (in *island) guest(t *testing.T, e cay.Egress) Guest {
	listen := func() net.Listener {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := Guest{Execution: in.id, Sandbox: "itest", Team: "team", Policy: e, TCP: listen(), DNSTCP: listen(), DNS: pc,
		Destination: in.destination, Dial: in.w.dial, Report: in.report}
	in.tcp, in.dnsTCP, in.dns = g.TCP.Addr().String(), g.DNSTCP.Addr().String(), pc.LocalAddr().String()
	return g
}

func (in *island) report(r cay.EgressRefusal) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.refusals = append(in.refusals, r)
}

// destination waits until connect has said where its connection goes.
func (in *island) destination(c net.Conn) (netip.AddrPort, error) {
	from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	in.mu.Lock()
	defer in.mu.Unlock()
	for !in.to[from].IsValid() {
		in.known.Wait()
	}
	return in.to[from], nil
}

// connect opens a connection as the guest does.
func (in *island) connect(to string) *net.TCPConn {
	in.t.Helper()
	c, err := in.tryConnect(to)
	if err != nil {
		in.t.Fatal(err)
	}
	return c
}

func (in *island) tryConnect(to string) (*net.TCPConn, error) {
	c, err := net.Dial("tcp4", in.tcp)
	if err != nil {
		return nil, err
	}
	in.mu.Lock()
	in.to[c.LocalAddr().(*net.TCPAddr).AddrPort()] = netip.MustParseAddrPort(to)
	in.known.Broadcast()
	in.mu.Unlock()
	in.t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn), nil
}

// try says something on a connection and returns what came back; "reset" is a
// reset, "closed" an end without a word.
func (in *island) try(to string, say []byte) string {
	in.t.Helper()
	c, err := in.tryConnect(to)
	if err == nil {
		_, err = c.Write(say)
	}
	switch {
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "reset" // it shows once only
	case err != nil:
		in.t.Fatal(err)
	}
	return hear(c)
}

func hear(c net.Conn) string {
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	b := make([]byte, 4096)
	n, err := 0, error(nil)
	for err == nil && !bytes.HasSuffix(b[:n], []byte("here")) { // what the tests' servers end with
		var more int
		more, err = c.Read(b[n:])
		n += more
	}
	switch {
	case n > 0:
		return string(b[:n])
	case errors.Is(err, syscall.ECONNRESET):
		return "reset"
	case errors.Is(err, io.EOF):
		return "closed"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "silent"
	}
	return err.Error()
}

// refused returns the refusals so far, and forgets them.
func (in *island) refused() []cay.EgressRefusal {
	in.mu.Lock()
	defer in.mu.Unlock()
	out := in.refusals
	in.refusals = nil
	return out
}

// reason waits for a refusal.
func (in *island) reason() string {
	in.t.Helper()
	var out string
	eventually(in.t, func() bool {
		in.mu.Lock()
		defer in.mu.Unlock()
		if n := len(in.refusals); n > 0 {
			out = in.refusals[n-1].Reason
		}
		return out != ""
	}, "no refusal was reported")
	return out
}

func eventually(t *testing.T, ok func() bool, what string) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatal(what)
}

// hello returns the ClientHello of a client that means a name.
func hello(t testing.TB, name string) []byte {
	t.Helper()
	c := &sink{}
	_ = tls.Client(c, &tls.Config{ServerName: name, InsecureSkipVerify: name == ""}).Handshake() // it ends at the first read
	if c.Len() == 0 {
		t.Fatalf("no ClientHello for %q", name)
	}
	return c.Bytes()
}

// sink is a connection that keeps what is written and has nothing to read.
type sink struct {
	bytes.Buffer
	net.Conn
}

func (s *sink) Read([]byte) (int, error)         { return 0, io.EOF }
func (s *sink) Write(p []byte) (int, error)      { return s.Buffer.Write(p) }
func (s *sink) Close() error                     { return nil }
func (s *sink) SetDeadline(time.Time) error      { return nil }
func (s *sink) SetReadDeadline(time.Time) error  { return nil }
func (s *sink) SetWriteDeadline(time.Time) error { return nil }

// withExtension adds an extension to a ClientHello that is one record.
func withExtension(h []byte, id uint16, body []byte) []byte {
	h = slices.Clone(h)
	at := 5 + 4 + 2 + 32 // record, handshake, version, random
	at += 1 + int(h[at]) // session
	at += 2 + int(binary.BigEndian.Uint16(h[at:]))
	at += 1 + int(h[at]) // compression
	add := binary.BigEndian.AppendUint16(nil, id)
	add = append(binary.BigEndian.AppendUint16(add, uint16(len(body))), body...)
	n := uint16(len(add))
	binary.BigEndian.PutUint16(h[3:], binary.BigEndian.Uint16(h[3:])+n)
	binary.BigEndian.PutUint16(h[7:], binary.BigEndian.Uint16(h[7:])+n) // the low bytes of three
	binary.BigEndian.PutUint16(h[at:], binary.BigEndian.Uint16(h[at:])+n)
	return append(h, add...)
}

// ask sends a query as the guest does and returns the answer.
func (in *island) ask(name string, typ dnsmessage.Type, edns bool) dnsmessage.Message {
	in.t.Helper()
	c, err := net.Dial("udp4", in.dns)
	if err != nil {
		in.t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(query(in.t, name, typ, edns)); err != nil {
		in.t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	b := make([]byte, 4096)
	n, err := c.Read(b)
	if err != nil {
		in.t.Fatalf("asking for %s: %v", name, err)
	}
	var m dnsmessage.Message
	if err := m.Unpack(b[:n]); err != nil {
		in.t.Fatal(err)
	}
	return m
}

func query(t testing.TB, name string, typ dnsmessage.Type, edns bool) []byte {
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: 7, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: typ, Class: dnsmessage.ClassINET}}}
	if edns {
		opt := dnsmessage.Resource{Body: &dnsmessage.OPTResource{}}
		if err := opt.Header.SetEDNS0(4096, dnsmessage.RCodeSuccess, false); err != nil {
			t.Fatal(err)
		}
		m.Additionals = []dnsmessage.Resource{opt}
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// addressesIn returns the addresses of an answer.
func addressesIn(m dnsmessage.Message) (out []string) {
	for _, rr := range m.Answers {
		switch b := rr.Body.(type) {
		case *dnsmessage.AResource:
			out = append(out, netip.AddrFrom4(b.A).String())
		case *dnsmessage.AAAAResource:
			out = append(out, netip.AddrFrom16(b.AAAA).String())
		}
	}
	return out
}

// onlyNames is a policy that allows names and nothing else.
func onlyNames(names ...string) cay.Egress {
	return cay.Egress{Deny: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, AllowNames: names}
}
