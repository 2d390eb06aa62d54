package isolation

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/test/program"
	"github.com/cayhq/cay/test/sdk"
)

// other is an address of the internet that policies tell from program.Public.
var other = netip.MustParseAddr("1.1.1.1")

// refusal is a line of `cay egress log -o json`.
type refusal struct {
	Count       int
	Protocol    string
	Destination string
	Name        string
	Rule        string
	Reason      string
}

func refusals(t *testing.T, server *program.Server, id string) []refusal {
	t.Helper()
	out, err := refusalLog(server, id)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func refusalLog(server *program.Server, id string) (out []refusal, err error) {
	r := server.Run("egress", "log", id, "-o", "json")
	if r.Code != 0 {
		return nil, fmt.Errorf("cay egress log: %s", r)
	}
	for line := range strings.Lines(r.Stdout) {
		var one refusal
		if err := json.Unmarshal([]byte(line), &one); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		out = append(out, one)
	}
	return out, nil
}

func setNetwork(t *testing.T, c *program.Client, id string, network map[string]any) {
	t.Helper()
	if err := c.Call(t.Context(), http.MethodPut, "/sandboxes/"+id+"/network", network, nil); err != nil {
		t.Fatal(err)
	}
}

// A policy by address is in force from the first moment on, wherever the
// sandbox came from, changes while it runs, and stays with it over restarts of
// the server, pauses and forks. What it refuses is in the log.
func TestEgressByAddress(t *testing.T) {
	listen(t, "this is the world", port, program.InWorld, program.Public, other)
	server := program.Start(t, program.Options{Pool: 1})
	c := server.Client()
	var ds []destination
	for _, a := range []netip.Addr{program.Public, other} {
		ds = append(ds, destination{a.String(), a.String(), port, false})
	}
	// A datagram that is refused is missed by its answer only, after seconds.
	datagrams := func() {
		for _, a := range []netip.Addr{program.Public, other} {
			ds = append(ds, destination{a.String() + "/udp", a.String(), port, true})
		}
	}
	reaches := func(when string, s *program.Sandbox, public, another bool) {
		t.Helper()
		for name, said := range try(t, s, ds) {
			want := public
			if strings.HasPrefix(name, other.String()) {
				want = another
			}
			if got := said == "open: this is the world"; got != want {
				t.Errorf("%s, %s: %s, want it reached: %v", when, name, said, want)
			}
		}
	}
	onlyPublic := map[string]any{"denyOut": []string{"0.0.0.0/0"}, "allowOut": []string{program.Public.String()}}
	notPublic := map[string]any{"denyOut": []string{program.Public.String() + "/24"}}

	open := c.Make(t, 10*time.Minute, nil)
	s := c.Make(t, 10*time.Minute, map[string]any{"network": onlyPublic})
	datagrams()
	reaches("created", s, true, false)
	ds = ds[:2]
	reaches("a sandbox beside it", open, true, true)
	want := refusal{Protocol: "tcp", Destination: netip.AddrPortFrom(other, port).String(), Rule: "0.0.0.0/0", Reason: "the sandbox's policy denies it"}
	program.Eventually(t, 30*time.Second, func() string {
		all := refusals(t, server, s.ID)
		if !slices.ContainsFunc(all, func(r refusal) bool { r.Count = 0; return r == want }) {
			return fmt.Sprintf("the log has %+v", all)
		}
		return ""
	})
	if all := refusals(t, server, open.ID); len(all) != 0 {
		t.Errorf("the log of the sandbox beside it has %+v", all)
	}

	setNetwork(t, c, s.ID, notPublic)
	reaches("changed", s, false, true)
	var d struct {
		Network             map[string]any
		AllowInternetAccess *bool
	}
	if err := c.Call(t.Context(), http.MethodGet, "/sandboxes/"+s.ID, nil, &d); err != nil || fmt.Sprint(d.Network["denyOut"]) != "["+program.Public.String()+"/24]" || d.Network["allowOut"] != nil {
		t.Errorf("the API tells %+v, %v", d, err)
	}
	server.Kill9(t)
	server.Up(t)
	c = server.Client()
	s = c.Own(s)
	reaches("after a restart of the server", s, false, true)

	var forks []struct{ Sandbox *program.Sandbox }
	if err := c.Call(t.Context(), http.MethodPost, "/sandboxes/"+s.ID+"/fork", map[string]any{"timeout": 600}, &forks); err != nil || len(forks) != 1 || forks[0].Sandbox == nil {
		t.Fatalf("forks: %+v, %v", forks, err)
	}
	reaches("its fork", c.Own(forks[0].Sandbox), false, true)
	if err := c.Call(t.Context(), http.MethodPost, "/sandboxes/"+s.ID+"/pause", nil, nil); err != nil {
		t.Fatal(err)
	}
	var refused *program.Refusal
	if err := c.Call(t.Context(), http.MethodPut, "/sandboxes/"+s.ID+"/network", map[string]any{}, nil); !errors.As(err, &refused) || refused.Status != http.StatusConflict {
		t.Errorf("changing a paused sandbox: %v", err)
	}
	if err := c.Call(t.Context(), http.MethodPost, "/v2/sandboxes/"+s.ID+"/connect", map[string]any{"timeout": 600}, nil); err != nil {
		t.Fatal(err)
	}
	reaches("resumed", s, false, true)
	setNetwork(t, c, s.ID, map[string]any{"allow_internet_access": false})
	reaches("shut", s, false, false)
	setNetwork(t, c, s.ID, map[string]any{})
	reaches("open again", s, true, true)
}

// A connection that is open ends when the policy no longer allows it.
func TestEgressCuts(t *testing.T) {
	listen(t, "x", port, program.InWorld)
	server := program.Start(t, program.Options{})
	c := server.Client()
	s := c.Make(t, 10*time.Minute, nil)
	var l net.Listener
	if err := program.InWorld(func() (err error) {
		l, err = net.Listen("tcp4", netip.AddrPortFrom(netip.IPv4Unspecified(), port+1).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan net.Conn, 1)
	go func() {
		if conn, err := l.Accept(); err == nil {
			got <- conn
		}
	}()
	const talk = `
import socket, sys, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
for n in range(600):
    try:
        s.sendall(b"x")
    except OSError as e:
        print("cut", flush=True)
        sys.exit()
    time.sleep(0.1)
print("never cut")
`
	if err := s.Write(t.Context(), "/tmp/talk.py", []byte(talk)); err != nil {
		t.Fatal(err)
	}
	p, err := s.Start(t.Context(), "", fmt.Sprintf("exec python3 /tmp/talk.py %s %d", program.Public, port+1))
	if err != nil {
		t.Fatal(err)
	}
	select {
	case conn := <-got:
		defer conn.Close()
		if _, err := io.ReadFull(conn, make([]byte, 3)); err != nil {
			t.Fatal(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the guest's connection does not come")
	}
	setNetwork(t, c, s.ID, map[string]any{"denyOut": []string{program.Public.String()}})
	if r, err := p.Wait(); err != nil || r.Stdout != "cut\n" {
		t.Errorf("%+v, %v", r, err)
	}
}

// fixed is a zone of names with one address each.
func fixed(names map[string]netip.Addr) func(string, dnsmessage.Type) ([]dnsmessage.Resource, bool) {
	return func(name string, typ dnsmessage.Type) ([]dnsmessage.Resource, bool) {
		a, ok := names[name]
		if !ok || typ != dnsmessage.TypeA {
			return nil, ok
		}
		h := dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name + "."), Type: typ, Class: dnsmessage.ClassINET, TTL: 5}
		return []dnsmessage.Resource{{Header: h, Body: &dnsmessage.AResource{A: a.As4()}}}, true
	}
}

// zone answers queries in the internet, at one address.
func zone(t *testing.T, at netip.Addr, answer func(string, dnsmessage.Type) ([]dnsmessage.Resource, bool)) (asked func() []string) {
	t.Helper()
	var u net.PacketConn
	if err := program.InWorld(func() (err error) {
		u, err = net.ListenPacket("udp4", netip.AddrPortFrom(at, 53).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	all := make(chan []string, 1)
	all <- nil
	go func() {
		for buf := make([]byte, 1500); ; {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			name := strings.TrimSuffix(strings.ToLower(q.Name.String()), ".")
			all <- append(<-all, name)
			out := dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, RecursionAvailable: true, RecursionDesired: true}, Questions: m.Questions}
			var known bool
			if out.Answers, known = answer(name, q.Type); !known {
				out.RCode = dnsmessage.RCodeNameError
			}
			if b, err := out.Pack(); err == nil {
				u.WriteTo(b, from)
			}
		}
	}()
	return func() []string {
		got := <-all
		defer func() { all <- got }()
		return slices.Clone(got)
	}
}

// resolver makes an address the machine's name server until the test ends.
func resolver(t *testing.T, a netip.Addr) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte("nameserver "+a.String()+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(path, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/etc/resolv.conf", unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// web serves every address of the internet with the Host it was asked for.
func web(t *testing.T) {
	t.Helper()
	serve(t, program.InWorld, ":80", nil, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s with %q", r.Host, r.Header.Get("X-Key"))
	}))
}

// A policy by name opens what the name stands for and nothing else, survives
// the server, and a rule changes requests outside of the guest.
func TestEgressByName(t *testing.T) {
	listen(t, "this is the world", port, program.InWorld, program.Public)
	web(t)
	dns := netip.MustParseAddr("9.9.9.9")
	resolver(t, dns)
	asked := zone(t, dns, fixed(map[string]netip.Addr{"good.example": program.Public, "a.wild.example": other, "evil.example": other,
		"inside.example": netip.MustParseAddr("10.0.0.1"), "meta.example": netip.MustParseAddr("169.254.169.254")}))
	server := program.Start(t, program.Options{Pool: 1})
	c := server.Client()
	network := map[string]any{"denyOut": []string{"0.0.0.0/0"}, "allowOut": []string{"Good.example", "*.wild.example", "inside.example", "meta.example"},
		"rules": map[string]any{"good.example": []any{map[string]any{"transform": map[string]any{"headers": map[string]any{"X-Key": "outside"}}}}}}
	s := c.Make(t, 10*time.Minute, map[string]any{"network": network})
	get := func(args string) string {
		return s.Out(t, `curl -s -m 20 `+args+` || echo "failed: $?"`)
	}
	check := func(when string) {
		t.Helper()
		for args, want := range map[string]string{
			"http://good.example/":                         `good.example with "outside"`,
			"http://a.wild.example/":                       `a.wild.example with ""`,
			"http://evil.example/":                         "failed",
			"http://wild.example/":                         "failed",
			"http://inside.example/":                       "failed",
			"http://meta.example/":                         "failed",
			"http://" + other.String() + "/":               "failed",
			"-H 'Host: evil.example' http://good.example/": "failed",
			"--resolve good.example:80:" + other.String() + " http://good.example/": "failed",
			"http://169.254.169.254/":                    "failed",
			fmt.Sprintf("http://good.example:%d/", port): "failed",
		} {
			if got := get(args); !strings.HasPrefix(got, want) {
				t.Errorf("%s, %s: %q, want %q", when, args, got, want)
			}
		}
	}
	check("created")
	if all := asked(); slices.Contains(all, "evil.example") || !slices.Contains(all, "good.example") {
		t.Errorf("the name server was asked for %q", all)
	}
	if all := refusals(t, server, s.ID); !slices.ContainsFunc(all, func(r refusal) bool { return r.Name == "evil.example" }) {
		t.Errorf("the log has %+v", all)
	}
	server.Kill9(t)
	server.Up(t)
	c = server.Client()
	s = c.Own(s)
	check("after a restart of the server")
	setNetwork(t, c, s.ID, map[string]any{"denyOut": []string{"0.0.0.0/0"}, "allowOut": []string{"evil.example"}})
	if got := get("http://evil.example/"); got != `evil.example with ""` {
		t.Errorf("allowed now: %q", got)
	}
	if got := get("http://good.example/"); !strings.HasPrefix(got, "failed") {
		t.Errorf("allowed no more: %q", got)
	}
	setNetwork(t, c, s.ID, map[string]any{})
	if got := try(t, s, []destination{{"TCP", program.Public.String(), port, false}})["TCP"]; got != "open: this is the world" {
		t.Errorf("open again: %s", got)
	}
}

// The official clients set and change what a sandbox may reach.
func TestEgressClients(t *testing.T) {
	listen(t, "this is the world", port, program.InWorld, program.Public, other)
	server := program.Start(t, program.Options{Pool: 1})
	for _, client := range sdk.Clients {
		if again := client.Name == "js-2.45" || client.Name == "python-async"; again && !program.Nightly() {
			continue
		}
		t.Run(client.Name, func(t *testing.T) {
			client.Exercise(t, server, []string{"create with a policy", "update", "no internet", "what is refused", "secrets"},
				"PUBLIC="+program.Public.String(), "OTHER="+other.String(), fmt.Sprintf("PORT=%d", port))
		})
	}
}
