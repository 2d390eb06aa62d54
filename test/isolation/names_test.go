package isolation

import (
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/test/program"
)

// secureWeb serves every address of the internet over TLS, for each name with
// a certificate of its own authority. It says what name and protocol it was
// asked by, and keeps what it was told in Authorization.
type secureWeb struct {
	bundle string // a file with its authority, in PEM

	mu   sync.Mutex
	told []string
}

func (s *secureWeb) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.told)
}

func newSecureWeb(t *testing.T) *secureWeb {
	t.Helper()
	s := &secureWeb{}
	var config *tls.Config
	config, s.bundle = worldTLS(t)
	serve(t, program.InWorld, ":443", config, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.told = append(s.told, r.Header.Get("Authorization"))
		s.mu.Unlock()
		fmt.Fprintf(w, "%s by %s", r.Host, r.Proto)
	}))
	return s
}

// worldTLS has a certificate for each name, of an authority whose own is in the
// file bundle, in PEM.
func worldTLS(t *testing.T) (config *tls.Config, bundle string) {
	t.Helper()
	bundle = filepath.Join(t.TempDir(), "roots.pem")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "The world's own"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, root, root, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		t.Fatal(err)
	}
	return &tls.Config{GetCertificate: func(chi *tls.ClientHelloInfo) (*tls.Certificate, error) {
		leaf := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: chi.ServerName}, DNSNames: []string{chi.ServerName},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
		b, err := x509.CreateCertificate(rand.Reader, leaf, root, &key.PublicKey, key)
		return &tls.Certificate{Certificate: [][]byte{b}, PrivateKey: key}, err
	}}, bundle
}

// A secret that a rule uses arrives outside, over TLS that the guest's programs
// trust, and is nowhere else: not in the guest's memory, files and environment,
// not in the data directory with its database, logs and snapshots, not in an
// exported snapshot, a process's environment or what commands and the API tell.
func TestEgressSecrets(t *testing.T) {
	secure := newSecureWeb(t)
	dns := netip.MustParseAddr("9.9.9.9")
	resolver(t, dns)
	zone(t, dns, fixed(map[string]netip.Addr{"api.example": program.Public, "plain.example": other, "evil.example": other}))
	server := program.Start(t, program.Options{Pool: 1, Env: []string{"SSL_CERT_FILE=" + secure.bundle}})
	c := server.Client()

	// Built here, so that the whole is in no file, this program's included.
	canary := strings.Join([]string{"canary", fmt.Sprint(time.Now().UnixNano()), "outside"}, "-")
	var made map[string]any
	if err := c.Call(t.Context(), http.MethodPost, "/secrets", map[string]any{"name": "Api-Key", "value": canary}, &made); err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprint(made); strings.Contains(text, canary) || !strings.Contains(text, "api-key") {
		t.Errorf("making a secret answers %s", text)
	}
	network := map[string]any{"denyOut": []string{"0.0.0.0/0"}, "allowOut": []string{"api.example", "plain.example"},
		"rules": map[string]any{"api.example": []any{map[string]any{"transform": map[string]any{"headers": map[string]any{"Authorization": "Bearer ${e2b.secrets.Api-Key}"}}}}}}
	s := c.Make(t, 10*time.Minute, map[string]any{"network": network})

	// Each way to speak to the world, with the guest's own trust.
	decoy := "decoy-" + fmt.Sprint(time.Now().UnixNano())
	if _, err := s.Start(t.Context(), "user", "export DECOY="+decoy+"; exec sleep 1000"); err != nil {
		t.Fatal(err)
	}
	ask := func(when string, s *program.Sandbox, key string) {
		t.Helper()
		for what, script := range map[string]string{
			"curl":        `curl -sS -m 20 https://api.example/`,
			"curl HTTP/1": `curl -sS -m 20 --http1.1 https://api.example/`,
			"Python":      `python3 -c 'import urllib.request as u; print(u.urlopen("https://api.example/", timeout=20).read().decode())'`,
			"Node":        `node -e 'fetch("https://api.example/").then(r => r.text()).then(console.log, e => console.log(e.cause || e))'`,
		} {
			before := len(secure.all())
			got := strings.TrimSpace(s.Out(t, script+" 2>&1 || true"))
			if !strings.HasPrefix(got, "api.example by HTTP/2.0") {
				t.Errorf("%s, %s: %q", when, what, got)
			}
			if told := secure.all()[before:]; len(told) != 1 || told[0] != "Bearer "+key {
				t.Errorf("%s, %s: the world was told %q", when, what, told)
			}
		}
	}
	ask("created", s, canary)

	// A name without a rule is the world's own, as it is; other names are shut.
	if got := s.Out(t, `curl -skv -m 20 https://plain.example/ 2>&1`); !strings.Contains(got, "The world's own") || !strings.Contains(got, "plain.example by") {
		t.Errorf("a name without a rule: %s", got)
	}
	for _, args := range []string{"-k https://evil.example/", "-k https://" + program.Public.String() + "/",
		"-k --connect-to evil.example:443:" + program.Public.String() + ":443 https://evil.example/",
		"-k --connect-to api.example:443:" + other.String() + ":443 https://api.example/"} {
		if got := s.Out(t, `curl -sS -m 20 `+args+` 2>&1 || echo "failed: $?"`); !strings.Contains(got, "failed") {
			t.Errorf("curl %s: %q", args, got)
		}
	}

	// The guest's memory, from outside, and its files and environment.
	memory := guestMemory(t, server, s.ID, canary, decoy)
	if memory[canary] != 0 || memory[decoy] == 0 {
		t.Errorf("in the guest's memory the secret is %d times, and what a process of it has %d times", memory[canary], memory[decoy])
	}
	look := `cat /proc/*/environ 2>/dev/null | tr '\0' '\n' | grep -c -e "$1" ; grep -rlsI -e "$1" / --exclude-dir=proc --exclude-dir=sys --exclude-dir=usr | head -3; true`
	find := func(what string) string {
		half := len(what) / 2 // so that the search does not find itself
		r, err := s.Exec(t.Context(), "root", fmt.Sprintf("set -- %s''%s; ", what[:half], what[half:])+look)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(r.Stdout)
	}
	if got := find(canary); got != "0" {
		t.Errorf("in the guest the secret is found: %s", got)
	}
	if got := find(decoy); got == "0" {
		t.Error("in the guest the search finds nothing")
	}

	// A sandbox without rules trusts nobody new, until it gets one.
	plain := c.Make(t, 10*time.Minute, map[string]any{"network": map[string]any{"denyOut": []string{"0.0.0.0/0"}, "allowOut": []string{"plain.example"}}})
	if got := plain.Out(t, `ls /usr/local/share/ca-certificates; env | grep -c NODE_EXTRA_CA_CERTS || true`); strings.TrimSpace(got) != "0" {
		t.Errorf("a sandbox without rules has %q", got)
	}
	setNetwork(t, c, plain.ID, network)
	ask("with a rule that came later", plain, canary)

	// The server's end, and a pause, change nothing; a new value counts at once.
	server.Kill9(t)
	server.Up(t)
	c = server.Client()
	s = c.Own(s)
	ask("after a restart of the server", s, canary)
	if err := c.Call(t.Context(), http.MethodPost, "/sandboxes/"+s.ID+"/pause", nil, nil); err != nil {
		t.Fatal(err)
	}
	if got := written(t, server, canary, decoy); got[canary] != 0 || got[decoy] == 0 {
		t.Errorf("the server has written the secret %d times, and what a process of the saved guest has %d times", got[canary], got[decoy])
	}
	if err := c.Call(t.Context(), http.MethodPost, "/sandboxes/"+s.ID+"/connect", map[string]any{"timeout": 600}, nil); err != nil {
		t.Fatal(err)
	}
	second := canary + "-2"
	if err := c.Call(t.Context(), http.MethodPost, "/secrets/api-key", map[string]any{"value": second}, nil); err != nil {
		t.Fatal(err)
	}
	ask("resumed, with a new value", s, second)
	for _, said := range told(t, server, c, s.ID) {
		if strings.Contains(said.text, canary) {
			t.Errorf("%s has the secret", said.by)
		}
	}
	if got := exported(t, server, s.ID, canary, decoy); got[canary] != 0 || got[decoy] == 0 {
		t.Errorf("an exported snapshot has the secret %d times, and what a process of the guest has %d times", got[canary], got[decoy])
	}
	if got := environments(t, canary, server.Dir); got[canary] != 0 || got[server.Dir] == 0 {
		t.Errorf("the environments and command lines of the machine's processes have the secret %d times, and the data directory %d times", got[canary], got[server.Dir])
	}
	if err := c.Call(t.Context(), http.MethodDelete, "/secrets/api-key", nil, nil); err != nil {
		t.Fatal(err)
	}
	if got := s.Out(t, `curl -sS -m 20 -w ' %{http_code}' https://api.example/ 2>&1`); !strings.Contains(got, `no secret "api-key"`) || !strings.HasSuffix(got, "502") {
		t.Errorf("without the secret: %q", got)
	}
	if got := written(t, server, canary); got[canary] != 0 {
		t.Errorf("at the end the server has written the secret %d times", got[canary])
	}
}

// written counts how often texts are in what a server has written: its log, and
// every file of the data directory's own file system, which holds those of
// guests in one image.
func written(t *testing.T, server *program.Server, texts ...string) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, text := range texts {
		out[text] += strings.Count(server.Log(), text)
	}
	var top unix.Stat_t
	if err := unix.Stat(server.Dir, &top); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(server.Dir, func(path string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if errors.Is(err, fs.ErrNotExist) || unix.Lstat(path, &st) != nil {
			return nil // the server is at work
		}
		switch {
		case err != nil:
			return err
		case st.Dev != top.Dev && d.IsDir(), path == filepath.Join(server.Dir, "blobs"): // mounted, or the template
			return fs.SkipDir
		case st.Dev != top.Dev || !d.Type().IsRegular():
			return nil
		}
		for _, text := range texts {
			f, err := os.Open(path)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			n, err := occurrences(f, []byte(text))
			f.Close()
			if err != nil {
				return fmt.Errorf("searching %s: %w", path, err)
			}
			if out[text] += n; n > 0 {
				t.Logf("%s has %q", path, text[:6])
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// guestMemory counts how often texts are in the memory of a sandbox's guest,
// all of which is in files without a name that its engine has open.
func guestMemory(t *testing.T, server *program.Server, id string, texts ...string) map[string]int {
	t.Helper()
	out := map[string]int{}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", enginePID(t, server, id)))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err != nil || !strings.Contains(to, "memfd:") {
			continue
		}
		for _, text := range texts {
			f, err := os.Open(fd)
			if err != nil {
				t.Fatal(err)
			}
			n, err := occurrences(f, []byte(text))
			f.Close()
			if err != nil {
				t.Fatal(err)
			}
			out[text] += n
		}
	}
	return out
}

// statement is what somebody was told, and by what.
type statement struct{ by, text string }

// told asks for everything that the command line and the API tell of a sandbox
// and of secrets.
func told(t *testing.T, server *program.Server, c *program.Client, id string) (out []statement) {
	t.Helper()
	for _, args := range [][]string{{"sandbox", "explain", id}, {"sandbox", "inspect", id, "-o", "json"}, {"sandbox", "info", id, "-o", "json"},
		{"sandbox", "network", "show", id}, {"sandbox", "logs", id}, {"egress", "log", id, "-o", "json"}, {"secret", "list", "-o", "json"}, {"status"}} {
		r := server.Run(args...)
		if r.Code != 0 || r.Stdout == "" && args[0] != "egress" {
			t.Errorf("cay %q: %s", args, r)
		}
		out = append(out, statement{fmt.Sprintf("cay %q", args), r.Stdout + r.Stderr})
	}
	for _, path := range []string{"/sandboxes/" + id, "/v2/sandboxes", "/secrets", "/secrets/api-key", "/sandboxes/" + id + "/metrics", "/v2/sandboxes/" + id + "/logs",
		"/operator/v1/sandboxes/" + id} {
		var answer any
		if err := c.Call(t.Context(), http.MethodGet, path, nil, &answer); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		out = append(out, statement{path, fmt.Sprint(answer)})
	}
	return out
}

// exported counts how often texts are in the archive of a snapshot of a sandbox,
// its memory and disk included.
func exported(t *testing.T, server *program.Server, id string, texts ...string) map[string]int {
	t.Helper()
	file := filepath.Join(t.TempDir(), "archive")
	for _, args := range [][]string{{"sandbox", "snapshot", id, "--name", "searched"}, {"snapshot", "export", "searched", file}, {"snapshot", "delete", "searched"}} {
		if r := server.Run(args...); r.Code != 0 {
			t.Fatalf("cay %q: %s", args, r)
		}
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	plain, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(plain) // some megabytes
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	for _, text := range texts {
		out[text] = bytes.Count(b, []byte(text))
	}
	return out
}

// environments counts how often texts are in the environments and command lines
// of the machine's processes.
func environments(t *testing.T, texts ...string) map[string]int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/*")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	for _, file := range files {
		if base := filepath.Base(file); base != "environ" && base != "cmdline" {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			continue // of a process that has ended
		}
		for _, text := range texts {
			out[text] += bytes.Count(b, []byte(text))
		}
	}
	return out
}

// enginePID is the process that a sandbox's guest runs in.
func enginePID(t *testing.T, server *program.Server, id string) int {
	t.Helper()
	r := server.Run("sandbox", "inspect", id, "-o", "json")
	var box struct {
		Node struct{ Host struct{ PID int } }
	}
	if err := json.Unmarshal([]byte(r.Stdout), &box); err != nil || box.Node.Host.PID == 0 {
		t.Fatalf("no process ID: %v: %s", err, r)
	}
	return box.Node.Host.PID
}

// occurrences counts a text in a file, whose holes it jumps over.
func occurrences(f *os.File, text []byte) (int, error) {
	n, at := 0, int64(0)
	buf := make([]byte, 1<<20)
	kept := 0
	for {
		next, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			return n, nil // nothing but a hole
		case err != nil:
			next = at // no such thing here: read on
		case next != at:
			kept = 0
		}
		m, err := f.ReadAt(buf[kept:], next)
		b := buf[:kept+m]
		n += bytes.Count(b, text)
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return n, err
		}
		at = next + int64(m)
		kept = copy(buf, b[max(0, len(b)-len(text)+1):])
	}
}

// socksWorld is a SOCKS5 server in the internet that carries connections to the
// addresses of names.
func socksWorld(t *testing.T, at string, addressOf func(name string) netip.Addr) (asked func() []string) {
	t.Helper()
	var l net.Listener
	if err := program.InWorld(func() (err error) { l, err = net.Listen("tcp4", at); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var mu sync.Mutex
	var all []string
	serve := func(c net.Conn) error {
		defer c.Close()
		b := make([]byte, 512)
		if _, err := io.ReadFull(c, b[:2]); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, b[:b[1]]); err != nil {
			return err
		}
		if _, err := c.Write([]byte{5, 0}); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, b[:5]); err != nil {
			return err
		}
		var host string
		var to netip.Addr
		if b[3] == 3 {
			n := int(b[4])
			if _, err := io.ReadFull(c, b[:n]); err != nil {
				return err
			}
			host = string(b[:n])
			to = addressOf(host)
		} else {
			first := b[4]
			if _, err := io.ReadFull(c, b[:3]); err != nil {
				return err
			}
			to = netip.AddrFrom4([4]byte{first, b[0], b[1], b[2]})
			host = to.String()
		}
		if _, err := io.ReadFull(c, b[:2]); err != nil {
			return err
		}
		port := binary.BigEndian.Uint16(b)
		mu.Lock()
		all = append(all, fmt.Sprintf("%s:%d", host, port))
		mu.Unlock()
		var out net.Conn
		if err := program.InWorld(func() (err error) {
			out, err = net.Dial("tcp4", netip.AddrPortFrom(to, port).String())
			return err
		}); err != nil {
			return err
		}
		defer out.Close()
		if _, err := c.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}); err != nil {
			return err
		}
		go func() { _, _ = io.Copy(out, c) }()
		_, err := io.Copy(c, out)
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _ = serve(c) }()
		}
	}()
	return func() []string { mu.Lock(); defer mu.Unlock(); return slices.Clone(all) }
}

// What a sandbox with a proxy opens goes through it, by name where there is
// one, and nothing goes beside it, not even when it is gone.
func TestEgressProxy(t *testing.T) {
	web(t)
	listen(t, "this is the world", port, program.InWorld, program.Public)
	dns := netip.MustParseAddr("9.9.9.9")
	resolver(t, dns)
	zone(t, dns, fixed(map[string]netip.Addr{"good.example": program.Public, "proxy.example": netip.MustParseAddr("5.5.5.5")}))
	// The proxy has another opinion of the name, which counts.
	asked := socksWorld(t, "5.5.5.5:1080", func(name string) netip.Addr {
		return map[string]netip.Addr{"good.example": other}[name]
	})
	server := program.Start(t, program.Options{Pool: 1})
	c := server.Client()
	s := c.Make(t, 10*time.Minute, map[string]any{"network": map[string]any{"egressProxy": map[string]any{"address": "proxy.example:1080"}}})
	if got := s.Out(t, `curl -sS -m 20 http://good.example/ 2>&1`); got != `good.example with ""` {
		t.Errorf("a name: %q", got)
	}
	ds := []destination{{"TCP", program.Public.String(), port, false}}
	if got := try(t, s, ds)["TCP"]; got != "open: this is the world" {
		t.Errorf("an address: %q", got)
	}
	if got, want := asked(), []string{"good.example:80", fmt.Sprintf("%s:%d", program.Public, port)}; !slices.Equal(got, want) {
		t.Errorf("the proxy was asked for %q, want %q", got, want)
	}
	setNetwork(t, c, s.ID, map[string]any{"egressProxy": map[string]any{"address": "5.5.5.5:9"}}) // nobody is there
	if got := try(t, s, ds)["TCP"]; strings.HasPrefix(got, "open") {
		t.Errorf("with a proxy that is gone: %q", got)
	}
	for _, address := range []string{"10.0.0.1:1080", "127.0.0.1:1080", program.Private.String() + ":1080"} {
		// Refused when it is set, or, where a name hides it, when it is dialled.
		if err := c.Call(t.Context(), http.MethodPut, "/sandboxes/"+s.ID+"/network", map[string]any{"egressProxy": map[string]any{"address": address}}, nil); err != nil {
			continue
		}
		if got := try(t, s, ds)["TCP"]; strings.HasPrefix(got, "open") {
			t.Errorf("with a proxy at %s: %q", address, got)
		}
	}
}
