package isolation

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/time/rate"
)

// guestEnv has this test binary be the program that tries destinations, in a
// sandbox. Its value is the job's file.
const guestEnv = "CAY_ISOLATION_GUEST"

// The ways to a destination.
const (
	direct    = "direct"
	byDNS     = "DNS"       // a name of it
	byCNAME   = "CNAME"     // a name that is an alias of a name of it
	rebinding = "rebinding" // a name that was another one's a moment ago
	redirect  = "redirect"  // a server that sends there, followed by curl
	sniSpoof  = "SNI"       // TLS to it, saying another name
	hostSpoof = "Host"      // HTTP to it, saying another name
	absolute  = "absolute URI"
	connect   = "CONNECT"
)

// attempt is a destination and a way there.
type attempt struct {
	Way      string
	Protocol string     // tcp, udp, icmp
	To       netip.Addr // the destination; of names, what they stand for in the end
	Name     string     // to resolve, or to claim
	Via      string     // who redirects, or is asked to connect: address or name
	URL      string     // to be redirected to
	Port     uint16     // of a direct TCP connection, and of datagrams
	Answers  bool       // an answer is expected, and is waited for
}

// String names the attempt in messages, and in datagrams.
func (a attempt) String() string {
	return fmt.Sprintf("%s %s %s:%d %s%s%s", a.Way, a.Protocol, a.To, a.Port, a.Name, a.Via, a.URL)
}

// pingData is what our echo requests carry.
const pingData = "cay's matrix"

const (
	guestPatience = 5 * time.Second // for what answers at once, or never
	guestRetries  = 8
)

// Below the limits of egress for one sandbox: what a limit refuses is no
// judgement of the destination.
var (
	questions   = rate.NewLimiter(40, 120)
	connections = rate.NewLimiter(120, 120)
)

// guestMain goes through the attempts of a job, many at a time, and prints what
// came of each: "open" with what the other side said, or the error.
func guestMain(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var all []attempt
	if err := json.Unmarshal(b, &all); err != nil {
		return err
	}
	g := guest{names: map[string]*sync.Once{}, found: map[string][]netip.Addr{}}
	if g.resolver, err = nameServerOf("/etc/resolv.conf"); err != nil {
		return err
	}
	if _, err := g.ask("probe.example.", dnsmessage.TypeA); err != nil {
		g.mute = true
	}
	results := make([]string, len(all))
	var wg sync.WaitGroup
	places := make(chan struct{}, 64)
	for i, a := range all {
		if a.Way == redirect {
			continue
		}
		places <- struct{}{}
		wg.Go(func() {
			results[i] = g.try(a)
			<-places
		})
	}
	wg.Wait()
	if err := followRedirects(all, results); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(results)
}

type guest struct {
	resolver string
	mute     bool // nobody answers there

	mu    sync.Mutex
	names map[string]*sync.Once
	found map[string][]netip.Addr
}

func nameServerOf(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "nameserver" {
			return net.JoinHostPort(f[1], "53"), nil
		}
	}
	return "", fmt.Errorf("%s has no name server", file)
}

// try goes one way.
func (g *guest) try(a attempt) string {
	switch a.Way {
	case direct:
		return send(a, a.To)
	case byDNS, byCNAME, rebinding:
		found := g.addresses(a)
		if a.Way == rebinding && !a.Answers {
			found = append(found, a.To) // as one knows it who has asked elsewhere
		}
		said := "no address"
		for _, to := range found {
			if said = send(a, to); strings.HasPrefix(said, "open") {
				return said + " at " + to.String()
			}
		}
		return said
	case sniSpoof:
		return hello(a)
	case hostSpoof:
		return request(a.To.String(), plainGet(a.Name))
	case absolute:
		to := net.JoinHostPort(a.To.String(), "80")
		return elsewhere(a, request(a.Via, fmt.Sprintf("GET http://%s/ HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", to, to)))
	case connect:
		to := net.JoinHostPort(a.To.String(), "80")
		return elsewhere(a, request(a.Via, fmt.Sprintf("CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n%s", to, to, plainGet(to))))
	}
	return "no such way"
}

// elsewhere tells an answer of the destination from one of who was asked to get it.
func elsewhere(a attempt, said string) string {
	if strings.HasPrefix(said, "open") && !strings.Contains(said, " at "+net.JoinHostPort(a.To.String(), "")) {
		return "answered itself: " + said
	}
	return said
}

// addresses resolves a name once for the attempts that share it. A name for
// rebinding is asked for twice, and the first answer is used in between, as a
// browser would have done by then.
func (g *guest) addresses(a attempt) []netip.Addr {
	g.mu.Lock()
	once := g.names[a.Name]
	if once == nil {
		once = new(sync.Once)
		g.names[a.Name] = once
	}
	g.mu.Unlock()
	once.Do(func() {
		typ := dnsmessage.TypeA
		if a.To.Is6() {
			typ = dnsmessage.TypeAAAA
		}
		if a.Way == rebinding && !a.Answers {
			if first := g.resolve(a.Name, dnsmessage.TypeA); len(first) > 0 {
				_ = send(attempt{Protocol: "tcp", Name: a.Name}, first[0]) // whether it is open is another attempt's question
			}
			if typ == dnsmessage.TypeAAAA {
				_ = g.resolve(a.Name, typ) // it has no such address the first time
			}
		}
		found := g.resolve(a.Name, typ)
		g.mu.Lock()
		g.found[a.Name] = found
		g.mu.Unlock()
	})
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.found[a.Name]
}

// resolve walks from a name to its addresses, as a resolver does that trusts
// nobody to do it.
func (g *guest) resolve(name string, typ dnsmessage.Type) (out []netip.Addr) {
	if g.mute {
		return nil
	}
	at := name + "."
	for range 8 {
		m, err := g.ask(at, typ)
		if err != nil {
			return nil
		}
		next := ""
		for _, rr := range m.Answers {
			switch b := rr.Body.(type) {
			case *dnsmessage.AResource:
				out = append(out, netip.AddrFrom4(b.A))
			case *dnsmessage.AAAAResource:
				out = append(out, netip.AddrFrom16(b.AAAA))
			case *dnsmessage.CNAMEResource:
				next = b.CNAME.String()
			}
		}
		if len(out) > 0 || next == "" {
			return out
		}
		at = next
	}
	return nil
}

func (g *guest) ask(name string, typ dnsmessage.Type) (m dnsmessage.Message, err error) {
	q := dnsmessage.Message{Header: dnsmessage.Header{ID: 7, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: typ, Class: dnsmessage.ClassINET}}}
	query, err := q.Pack()
	if err != nil {
		return m, err
	}
	for range 3 {
		_ = questions.Wait(context.Background()) // it has no end
		var b []byte
		if b, err = exchange(g.resolver, query, guestPatience); err == nil {
			if err = m.Unpack(b); err == nil && m.RCode == dnsmessage.RCodeServerFailure {
				err = errors.New("the name server fails")
			}
		}
		if err == nil {
			return m, nil
		}
	}
	return m, err
}

// exchange sends a datagram and waits for one.
func exchange(to string, b []byte, wait time.Duration) ([]byte, error) {
	c, err := net.Dial("udp", to)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if _, err := c.Write(b); err != nil {
		return nil, err
	}
	_ = c.SetReadDeadline(time.Now().Add(wait)) // a closed connection says so at the read
	buf := make([]byte, 1500)
	n, err := c.Read(buf)
	return buf[:n], err
}

// send goes to an address.
func send(a attempt, to netip.Addr) string {
	port := netip.AddrPortFrom(to, a.Port).String()
	switch {
	case a.Protocol == "tcp" && a.Name != "":
		return request(to.String(), plainGet(a.Name))
	case a.Protocol == "tcp":
		return greeting(port)
	case a.Protocol == "udp" && a.Answers:
		for range guestRetries {
			if b, err := exchange(port, []byte(a.String()), guestPatience); err == nil {
				return "open: " + string(b)
			}
		}
		return "no answer"
	case a.Protocol == "udp":
		c, err := net.Dial("udp", port)
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		_, err = io.WriteString(c, a.String())
		return fmt.Sprint("sent: ", err)
	}
	return ping(a, to)
}

// ping sends an echo request, and waits for the answer if one is expected.
func ping(a attempt, to netip.Addr) string {
	network, typ := "ip4:icmp", icmp.Type(ipv4.ICMPTypeEcho)
	if to = to.Unmap(); to.Is6() {
		return pingSix(to)
	}
	c, err := icmp.ListenPacket(network, "0.0.0.0")
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	b, err := (&icmp.Message{Type: typ, Body: &icmp.Echo{ID: os.Getpid() & 0xffff, Seq: 1, Data: []byte(pingData)}}).Marshal(nil)
	if err != nil {
		return err.Error()
	}
	for range guestRetries {
		if _, err := c.WriteTo(b, &net.IPAddr{IP: to.AsSlice()}); err != nil || !a.Answers {
			return fmt.Sprint("sent: ", err)
		}
		_ = c.SetReadDeadline(time.Now().Add(guestPatience)) // a closed connection says so at the read
		for buf := make([]byte, 1500); ; {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				break
			}
			if m, err := icmp.ParseMessage(1, buf[:n]); err == nil && m.Type == ipv4.ICMPTypeEchoReply && from.String() == to.String() {
				return "open: echo"
			}
		}
	}
	return "no answer"
}

func pingSix(to netip.Addr) string {
	c, err := net.Dial("ip6:ipv6-icmp", to.String())
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	_, err = c.Write([]byte{128, 0, 0, 0, 0, 7, 0, 1})
	return fmt.Sprint("sent: ", err)
}

func dialer() *net.Dialer {
	_ = connections.Wait(context.Background()) // it has no end
	return &net.Dialer{Timeout: guestPatience}
}

// greeting connects and reads.
func greeting(to string) string {
	c, err := dialer().Dial("tcp", to)
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(2 * guestPatience)) // a closed connection says so at the read
	b := make([]byte, 100)
	n, err := c.Read(b)
	if n == 0 {
		return fmt.Sprint("it accepts, and says nothing: ", err)
	}
	return "open: " + string(b[:n])
}

func plainGet(host string) string {
	return "GET / HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n"
}

// request sends one of HTTP to port 80, and gives the marker that canaries
// answer with.
func request(to, text string) string {
	c, err := dialer().Dial("tcp", net.JoinHostPort(to, "80"))
	if err != nil {
		return err.Error()
	}
	return talk(c, text)
}

func talk(c net.Conn, text string) string {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * guestPatience)) // a closed connection says so at the read
	if _, err := io.WriteString(c, text); err != nil {
		return err.Error()
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err.Error()
	}
	b, err := io.ReadAll(resp.Body)
	if s := string(b); err == nil && strings.HasPrefix(s, canaryMark) {
		return "open: " + s
	}
	return fmt.Sprintf("%s %q %v", resp.Status, b, err)
}

// hello begins TLS as another name.
func hello(a attempt) string {
	raw, err := dialer().Dial("tcp", netip.AddrPortFrom(a.To, 443).String())
	if err != nil {
		return err.Error()
	}
	return talk(tls.Client(raw, &tls.Config{ServerName: a.Name, InsecureSkipVerify: true}), plainGet(a.Name))
}

// followRedirects lets curl follow all of them, some at a time.
func followRedirects(all []attempt, results []string) error {
	var which []int
	for i, a := range all {
		if a.Way == redirect {
			which = append(which, i)
		}
	}
	for some := range slices.Chunk(which, 30) {
		// A name costs two questions, for either family.
		_ = questions.WaitN(context.Background(), 2*len(some)) // it has no end
		_ = connections.WaitN(context.Background(), 2*len(some))
		var config strings.Builder
		for _, i := range some {
			fmt.Fprintf(&config, "url = \"http://%s/?to=%s\"\noutput = \"/tmp/followed-%d\"\n", all[i].Via, all[i].URL, i)
		}
		if err := os.WriteFile("/tmp/curl", []byte(config.String()), 0o644); err != nil {
			return err
		}
		out, err := exec.Command("curl", "-SLkgZ", "--no-progress-meter", "--parallel-max", "20", "--connect-timeout", "5", "-m", "15", "-K", "/tmp/curl").CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) { // that not every one has ended well is what is looked at
			return err
		}
		for _, i := range some {
			b, err := os.ReadFile(fmt.Sprintf("/tmp/followed-%d", i))
			if results[i] = fmt.Sprintf("%q, %v; of this and others curl says %s", b, err, out); err == nil && strings.HasPrefix(string(b), canaryMark) {
				results[i] = "open: " + string(b)
			}
		}
	}
	return nil
}
