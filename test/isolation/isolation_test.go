// Package isolation tests from inside a guest what it may reach: the public
// internet, and nothing else.
package isolation

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/test/program"
	"github.com/cayhq/cay/test/sdk"
)

func TestMain(m *testing.M) {
	for env, main := range map[string]func(string) error{guestEnv: guestMain, pairsEnv: pairsMain, slowEnv: slowMain} {
		file := os.Getenv(env)
		if file == "" {
			continue
		}
		if err := main(file); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	program.Main(m, sdk.Install)
}

// destination is where a guest tries to go.
type destination struct {
	Name string `json:"name"`
	Host string `json:"host"` // as a program would write it
	Port int    `json:"port"`
	UDP  bool   `json:"udp"`
}

// probe tries each destination, all at once, and prints for each what came of
// it: "open" and what the other side said, or the error.
const probe = `
import concurrent.futures, json, socket, sys

def go(d):
    kind = socket.SOCK_DGRAM if d["udp"] else socket.SOCK_STREAM
    said = "no address"
    try:
        found = socket.getaddrinfo(d["host"], d["port"], 0, kind)
    except OSError as e:
        return "%s" % e
    for family, kind, proto, _, addr in found:
        s = socket.socket(family, kind, proto)
        s.settimeout(4)
        try:
            s.connect(addr)
            if d["udp"]:
                s.send(d["name"].encode())
            return "open: " + s.recv(100).decode(errors="replace")
        except OSError as e:
            said = "%s" % e
        finally:
            s.close()
    return said

all = json.load(open("/tmp/destinations"))
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    json.dump(dict(zip([d["name"] for d in all], pool.map(go, all))), sys.stdout)
`

func try(t *testing.T, s *program.Sandbox, ds []destination) map[string]string {
	t.Helper()
	b, err := json.Marshal(ds)
	if err != nil {
		t.Fatal(err)
	}
	for path, content := range map[string][]byte{"/tmp/destinations": b, "/tmp/probe.py": []byte(probe)} {
		if err := s.Write(t.Context(), path, content); err != nil {
			t.Fatal(err)
		}
	}
	var got map[string]string
	if err := json.Unmarshal([]byte(s.Out(t, "python3 /tmp/probe.py")), &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != len(ds) {
		t.Fatalf("the guest tried %d destinations of %d", len(got), len(ds))
	}
	return got
}

// ears hears what arrives at a port of every address of a network, over TCP
// and UDP, and answers with a greeting.
type ears struct {
	mu    sync.Mutex
	heard []string // what datagrams say; a connection is heard by its client
}

// all returns what was said in datagrams.
func (e *ears) all() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.heard)
}

// listen opens ears in the network that in leads to. An answer to a datagram
// comes from the address that it was sent to only if it is one of udp.
func listen(t *testing.T, greeting string, port int, in func(func() error) error, udp ...netip.Addr) *ears {
	t.Helper()
	var ls []net.Listener
	var us []net.PacketConn
	err := in(func() error {
		any := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
		for _, a := range any {
			l, err := net.ListenTCP(family("tcp", a), net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, uint16(port))))
			if err != nil {
				return err
			}
			ls = append(ls, l)
		}
		for _, a := range append(any, udp...) {
			u, err := reuse.ListenPacket(t.Context(), family("udp", a), netip.AddrPortFrom(a, uint16(port)).String())
			if err != nil {
				return err
			}
			us = append(us, u)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, l := range ls {
			l.Close()
		}
		for _, u := range us {
			u.Close()
		}
	})
	for _, l := range ls {
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, greeting)
				c.Close()
			}
		}()
	}
	e := &ears{}
	for _, u := range us {
		go func() {
			for buf := make([]byte, 100); ; {
				n, peer, err := u.ReadFrom(buf)
				if err != nil {
					return
				}
				e.mu.Lock()
				e.heard = append(e.heard, string(buf[:n]))
				e.mu.Unlock()
				u.WriteTo([]byte(greeting), peer)
			}
		}()
	}
	return e
}

// reuse lets a socket have an address beside one that has them all; it gets
// what is for that address.
var reuse = net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return errors.Join(cerr, err)
}}

// family is the name of a network over one of the IP versions only.
func family(network string, a netip.Addr) string {
	if a.Is4() {
		return network + "4"
	}
	return network + "6"
}

func here(f func() error) error { return f() }

// port is one that has an answer on the machine and everywhere behind it.
const port = 7777

// ends returns the addresses of the machine, and for the links to sandboxes
// those of the other side too.
func ends(t *testing.T) (out []netip.Addr) {
	t.Helper()
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		addrs, err := l.Addrs()
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, p.Addr())
			if p.Bits() == 31 {
				out = append(out, p.Addr().Next())
			}
		}
	}
	return out
}

// No guest reaches the machine by any spelling, another guest, a control port,
// a metadata service or a private range, over either protocol and family; and
// every guest reaches the internet.
func TestDestinations(t *testing.T) {
	host := listen(t, "this is the host", port, here)
	world := listen(t, "this is the world", port, program.InWorld, program.Public)
	server := program.Start(t, program.Options{})
	c := server.Client()
	a, b := c.Make(t, 10*time.Minute, nil), c.Make(t, 10*time.Minute, nil)
	p, err := b.Start(t.Context(), "", fmt.Sprintf("exec python3 -m http.server %d --bind ::", port))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Leave()
	program.Eventually(t, 10*time.Second, func() string {
		resp, err := b.Request(t.Context(), http.MethodGet, port, "/", "", nil)
		if err != nil {
			return err.Error()
		}
		resp.Body.Close()
		return ""
	})

	hosts := []string{
		// the machine's loopback, which from inside is the guest's own
		"127.0.0.1", "127.1", "127.0.0.53", "127.255.255.254", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1",
		"0.0.0.0", "0", "localhost", "::1", "::", "::ffff:127.0.0.1", "::ffff:7f00:1", "::127.0.0.1", "ip6-localhost",
		// the machine
		"::ffff:" + program.Uplink.String(), "64:ff9b::5db8:d702", "2002:5db8:d702::1",
		// what the guest sees of its own way out
		"169.254.0.22", "169.254.0.1", "fe80::1", "fe80::ca:ff:fe00:16",
		// metadata services
		"169.254.169.254", "169.254.170.2", "169.254.169.253", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254",
		"0xa9fea9fe", "2852039166", "::ffff:169.254.169.254", "::ffff:a9fe:a9fe",
		// private and reserved ranges
		"10.0.0.1", "10.255.255.254", "172.16.0.1", "172.31.255.254", "192.168.0.1", "192.168.77.77", "100.64.0.1", "198.18.0.1",
		"192.0.2.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
		"fc00::1", "fd12:3456::1", "fec0::1", "ff02::1", "2001:db8::1",
	}
	for _, addr := range ends(t) {
		hosts = append(hosts, addr.WithZone("").String())
	}
	ports := []int{port, program.EnvdPort, program.EnvdPort - 1} // the last is the control port
	var ds []destination
	add := func(host string, port int, udp bool) {
		name := net.JoinHostPort(host, fmt.Sprint(port))
		if udp {
			name += "/udp"
		}
		if slices.ContainsFunc(ds, func(d destination) bool { return d.Name == name }) {
			return
		}
		ds = append(ds, destination{name, host, port, udp})
	}
	for _, h := range hosts {
		add(h, port, false)
		add(h, port, true)
	}
	for _, addr := range ends(t) {
		if addr.Is4() && !addr.IsLoopback() {
			for _, p := range ports[1:] {
				add(addr.String(), p, false)
			}
		}
	}
	for _, u := range []string{server.API, server.Proxy} {
		ap := netip.MustParseAddrPort(strings.TrimPrefix(u, "http://"))
		for _, h := range []string{"127.0.0.1", "169.254.0.22", program.Uplink.String(), program.Private.String()} {
			add(h, int(ap.Port()), false)
		}
	}
	if len(ds) < 30 {
		t.Fatalf("only %d destinations", len(ds))
	}

	// The machine itself gets answers: what the guest does not reach is there.
	for _, h := range []string{"127.0.0.1", "::1", program.Uplink.String(), program.Private.String(), program.Uplink6.String(),
		"10.0.0.1", "169.254.169.254", "100.100.100.200", "fd00:ec2::254", program.Public.String()} {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(h, fmt.Sprint(port)), 5*time.Second)
		if err != nil {
			t.Fatalf("from the machine, %s does not answer: %v", h, err)
		}
		conn.Close()
	}
	for _, h := range []string{"127.0.0.1", "169.254.169.254", "10.0.0.1", "fd00:ec2::254"} {
		conn, err := net.Dial("udp", net.JoinHostPort(h, fmt.Sprint(port)))
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, "the machine to "+h)
		conn.Close()
		program.Eventually(t, 5*time.Second, func() string {
			if !slices.Contains(append(host.all(), world.all()...), "the machine to "+h) {
				return "from the machine, a datagram to " + h + " is not heard"
			}
			return ""
		})
	}

	got := try(t, a, ds)
	for _, d := range ds {
		if said := got[d.Name]; strings.HasPrefix(said, "open") {
			t.Errorf("from inside, %s is %s", d.Name, said)
		}
	}
	unheard(t, ds, host, world)
	t.Logf("%d destinations are refused", len(ds))

	public := []destination{
		{"TCP", program.Public.String(), port, false}, {"UDP", program.Public.String(), port, true},
		{"another", "1.1.1.1", port, false}, {"IPv4 in IPv6", "::ffff:" + program.Public.String(), port, false}}
	for name, said := range try(t, a, public) {
		if said != "open: this is the world" {
			t.Errorf("from inside, the internet over %s: %s", name, said)
		}
	}
	// The same from the other guest, which has a service of its own.
	ds = slices.DeleteFunc(ds, func(d destination) bool { return d.Port == port && !d.UDP && ownService(d.Name) })
	for name, said := range try(t, b, ds) {
		if strings.HasPrefix(said, "open") {
			t.Errorf("from the other guest, %s is %s", name, said)
		}
	}
	unheard(t, ds, host, world)
}

// unheard checks that no datagram to the destinations has arrived anywhere.
func unheard(t *testing.T, ds []destination, es ...*ears) {
	t.Helper()
	for _, e := range es {
		for _, said := range e.all() {
			if slices.ContainsFunc(ds, func(d destination) bool { return d.Name == said }) {
				t.Errorf("a datagram to %s has arrived", said)
			}
		}
	}
}

// ownService reports whether a name is that of a loopback, where the guest
// that serves has its own service.
func ownService(name string) bool {
	host, _, err := net.SplitHostPort(strings.TrimSuffix(name, "/udp"))
	return err != nil || strings.HasPrefix(host, "127.") || strings.HasPrefix(host, "0") || strings.HasPrefix(host, "::") ||
		strings.Contains(host, "localhost") || host == "2130706433"
}

// A guest that was made without internet reaches none, and is still reached.
func TestNoInternet(t *testing.T) {
	world := listen(t, "this is the world", port, program.InWorld, program.Public)
	server := program.Start(t, program.Options{Pool: 1})
	s := server.Client().Make(t, 10*time.Minute, map[string]any{"allow_internet_access": false})
	ds := []destination{{"TCP", program.Public.String(), port, false}, {"UDP", program.Public.String(), port, true}, {"resolver", "8.8.8.8", port, true}}
	for name, said := range try(t, s, ds) {
		if strings.HasPrefix(said, "open") {
			t.Errorf("the internet over %s is %s", name, said)
		}
	}
	unheard(t, ds, world)
	// The next sandbox, which may have its slot, has the internet again.
	if err := s.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		next := server.Client().Make(t, 10*time.Minute, nil)
		if said := try(t, next, []destination{{"TCP", program.Public.String(), port, false}})["TCP"]; said != "open: this is the world" {
			t.Errorf("the next sandbox's way to the internet: %s", said)
		}
	}
}

// The control port of a guest is no public port, and its own control routes
// are not reached through the public one.
func TestControlPort(t *testing.T) {
	server := program.Start(t, program.Options{})
	s := server.Client().Make(t, 10*time.Minute, nil)
	for _, path := range []string{"/identity", "/health", "/init", "/freeze"} {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			resp, err := s.Request(t.Context(), method, program.EnvdPort-1, path, "application/json", strings.NewReader("{}"))
			if err == nil {
				b, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				t.Errorf("%s %s on the control port through the proxy answers %s: %s", method, path, resp.Status, b)
			}
		}
	}
	for _, path := range []string{"/init", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw", "/upgrade", "/%69nit", "//init", "/init/", "/./init"} {
		resp, err := s.Request(t.Context(), http.MethodPost, program.EnvdPort, path, "application/json", strings.NewReader("{}"))
		if err == nil {
			resp.Body.Close()
			t.Errorf("%s through the proxy answers %s", path, resp.Status)
		}
	}
	// From inside without the token, which is nowhere that the guest's user
	// can read.
	got := s.Out(t, `curl -s -m 5 -o /dev/null -w '%{http_code}' http://127.0.0.1:49982/identity || true`)
	if got != "401" && got != "000" {
		t.Errorf("from inside, the control port answers %s", got)
	}
	if out := s.Out(t, `cat /proc/*/environ 2>/dev/null | tr '\0' '\n' | grep -c CAY_CONTROL_TOKEN || true`); strings.TrimSpace(out) != "0" {
		t.Errorf("the control token is in the environment of %s processes that the user can read", strings.TrimSpace(out))
	}
	if err := s.Answers(context.WithoutCancel(t.Context())); err != nil {
		t.Errorf("after all that the sandbox does not answer: %v", err)
	}
}
