package egress

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/cayhq/cay"
)

// socks is a SOCKS5 server (RFC 1928, RFC 1929) that answers itself, for every
// destination.
type socks struct {
	user, password string
	reply          byte // 0 is success

	mu    sync.Mutex
	asked []string
}

func (s *socks) start(t *testing.T) string {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
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
				if err := s.shake(c); err == nil {
					here(c)
				}
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

func (s *socks) shake(c net.Conn) error {
	b := make([]byte, 512)
	read := func(n int) error { _, err := io.ReadFull(c, b[:n]); return err }
	if err := read(2); err != nil {
		return err
	}
	if err := read(int(b[1])); err != nil {
		return err
	}
	method := byte(0)
	if s.user != "" {
		method = 2
	}
	if _, err := c.Write([]byte{5, method}); err != nil {
		return err
	}
	if method == 2 {
		if err := read(2); err != nil {
			return err
		}
		n := int(b[1])
		if err := read(n); err != nil {
			return err
		}
		user := string(b[:n])
		if err := read(1); err != nil {
			return err
		}
		n = int(b[0])
		if err := read(n); err != nil {
			return err
		}
		if user != s.user || string(b[:n]) != s.password {
			_, _ = c.Write([]byte{1, 1})
			return fmt.Errorf("wrong password")
		}
		if _, err := c.Write([]byte{1, 0}); err != nil {
			return err
		}
	}
	if err := read(4); err != nil {
		return err
	}
	var host string
	switch b[3] {
	case 1:
		if err := read(4); err != nil {
			return err
		}
		host = netip.AddrFrom4([4]byte(b[:4])).String()
	case 3:
		if err := read(1); err != nil {
			return err
		}
		n := int(b[0])
		if err := read(n); err != nil {
			return err
		}
		host = string(b[:n])
	}
	if err := read(2); err != nil {
		return err
	}
	s.mu.Lock()
	s.asked = append(s.asked, fmt.Sprintf("%s:%d", host, binary.BigEndian.Uint16(b)))
	s.mu.Unlock()
	if _, err := c.Write([]byte{5, s.reply, 0, 1, 0, 0, 0, 0, 0, 0}); err != nil {
		return err
	}
	if s.reply != 0 {
		return fmt.Errorf("refused")
	}
	return nil
}

func (s *socks) last() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.asked) == 0 {
		return ""
	}
	return s.asked[len(s.asked)-1]
}

// Everything that is allowed goes through the proxy, by name where a name is
// proven; what is refused does not; nothing goes beside it.
func TestProxy(t *testing.T) {
	w := newWorld(t, "api.example.com A 5.5.5.5", "free.example A 6.6.6.6")
	px := &socks{user: "u", password: canary}
	s := newServer(t, w)
	s.PermitProxy = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	e := onlyNames("api.example.com")
	e.Allow = []netip.Prefix{netip.MustParsePrefix("6.6.6.6/32")}
	e.Proxy = &cay.EgressProxy{Address: px.start(t), Username: "u", Password: canary}
	in := attach(t, w, s, e)
	for _, tc := range []struct {
		to   string
		say  []byte
		want string // what the proxy is asked for; "" is nothing
	}{
		{"5.5.5.5:443", hello(t, "api.example.com"), "api.example.com:443"},
		{"5.5.5.5:80", get("api.example.com"), "api.example.com:80"},
		{"6.6.6.6:22", []byte("SSH-2.0-x\r\n"), "6.6.6.6:22"},
		{"6.6.6.6:443", hello(t, "inside.corp.example"), "6.6.6.6:443"}, // a name that is not proven is not passed on
		{"6.6.6.6:80", get("inside.corp.example"), "6.6.6.6:80"},
		{"6.6.6.6:443", hello(t, ""), "6.6.6.6:443"},
		{"5.5.5.5:443", hello(t, "evil.example"), ""},
		{"10.0.0.1:443", hello(t, "api.example.com"), ""},
		{"9.9.9.9:22", []byte("x"), ""},
	} {
		px.mu.Lock()
		px.asked = nil
		px.mu.Unlock()
		got := in.try(tc.to, tc.say)
		if asked := px.last(); asked != tc.want || strings.HasSuffix(got, "here") != (tc.want != "") {
			t.Errorf("%s: the guest got %q and the proxy was asked for %q, want %q", tc.to, got, asked, tc.want)
		}
	}
	if d := w.dials(); len(d) != 0 {
		t.Errorf("beside the proxy: %v", d)
	}
}

// Without its proxy nothing goes out, and the guest does not learn where it is.
func TestProxyFails(t *testing.T) {
	w := newWorld(t, "api.example.com A 5.5.5.5")
	w.serve("5.5.5.5:443", here)
	w.serve("5.5.5.5:80", here)
	local := []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	refusing, picky := &socks{reply: 2}, &socks{user: "u", password: "other"}
	for _, tc := range []struct {
		what   string
		proxy  cay.EgressProxy
		permit []netip.Prefix
	}{
		{"that is not there", cay.EgressProxy{Address: "127.0.0.1:1"}, local},
		{"at a special address", cay.EgressProxy{Address: (&socks{}).start(t)}, nil},
		{"that resolves to a special address", cay.EgressProxy{Address: "localhost:1080"}, nil},
		{"that refuses", cay.EgressProxy{Address: refusing.start(t)}, local},
		{"with another password", cay.EgressProxy{Address: picky.start(t), Username: "u", Password: canary}, local},
	} {
		s := newServer(t, w)
		s.PermitProxy = tc.permit
		e := onlyNames("api.example.com")
		e.Proxy = &tc.proxy
		in := attach(t, w, s, e)
		if got := in.try("5.5.5.5:443", hello(t, "api.example.com")); got != "reset" {
			t.Errorf("with a proxy %s, TLS: %q", tc.what, got)
		}
		resp, err := in.client(t, "5.5.5.5:80", false).Get("http://api.example.com/")
		if err != nil {
			continue
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadGateway || strings.Contains(string(b), tc.proxy.Address) || strings.Contains(string(b), "127.0.0.1") {
			t.Errorf("with a proxy %s, HTTP: %s %s", tc.what, resp.Status, b)
		}
	}
	if d := w.dials(); len(d) != 0 {
		t.Errorf("beside the proxy: %v", d)
	}
}
