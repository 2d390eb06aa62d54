package certificate

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/wholefile"
)

func newLocal(t *testing.T, dir string, now func() time.Time) *Authority {
	t.Helper()
	a := &Authority{Dir: dir, Domain: "sbx.localhost", Now: now}
	if err := a.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAuthority(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "local")
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	clock := func() time.Time { return now }
	a := newLocal(t, dir, clock)
	c, err := a.Certificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	pemCA, err := os.ReadFile(a.File())
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pemCA) {
		t.Fatal("the authority's file is no PEM")
	}
	for name, good := range map[string]bool{"sbx.localhost": true, "3000-i1.sbx.localhost": true, "api.sbx.localhost": true,
		"a.b.sbx.localhost": false, "localhost": false, "example.com": false} {
		if _, err := c.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, CurrentTime: now}); (err == nil) != good {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Whoever trusts it trusts it with this domain alone, whatever it signs.
	evil := &Authority{Dir: dir, Domain: "example.com", Now: clock, ca: a.ca}
	if err := evil.issue(); err != nil {
		t.Fatal(err)
	}
	if _, err := evil.leaf.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: "www.example.com", CurrentTime: now}); err == nil {
		t.Error("it vouches for another domain")
	}
	for path, mode := range map[string]fs.FileMode{a.keyFile(): 0o600, a.File(): 0o644, dir: 0o700 | fs.ModeDir} {
		if st, err := os.Stat(path); err != nil || st.Mode() != mode {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
	again := newLocal(t, dir, clock)
	if !again.ca.Cert.Equal(a.ca.Cert) {
		t.Error("a restart makes another authority")
	}
	now = now.Add(leafRenew)
	if fresh, err := a.Certificate(nil); err != nil || fresh.Leaf.Equal(c.Leaf) || fresh.Leaf.NotAfter.Before(now.Add(leafLife/2)) {
		t.Errorf("an old leaf is not replaced: %v", err)
	}
	if err := (&Authority{Dir: dir, Domain: "other.localhost", Now: clock}).Open(t.Context()); cay.CodeOf(err) != cay.CodeConfigInvalid {
		t.Errorf("an authority for another domain: %v", err)
	}
	now = now.Add(authorityLife)
	if newLocal(t, dir, clock).ca.Cert.Equal(a.ca.Cert) {
		t.Error("an expired authority stays")
	}
	if err := os.WriteFile(a.File(), []byte("rubbish"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := a.Open(t.Context()); cay.CodeOf(err) != cay.CodeConfigInvalid {
		t.Errorf("a damaged authority: %v", err)
	}
}

// writePair writes a leaf for the domain and its key.
func writePair(t *testing.T, dir, domain string) (cert, key string) {
	t.Helper()
	a := &Authority{Dir: filepath.Join(dir, domain), Domain: domain, Now: time.Now}
	if err := a.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	return a.File(), a.keyFile()
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	cert1, key1 := writePair(t, dir, "one.test")
	cert2, key2 := writePair(t, dir, "two.test")
	cp := func(from, to string) {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := wholefile.Write(to, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	now := time.Now()
	f := &Files{Cert: cert, Key: key, Domain: "one.test", Now: func() time.Time { return now }, Log: testLog(t)}
	if err := f.Open(t.Context()); cay.CodeOf(err) != cay.CodeConfigInvalid {
		t.Fatalf("missing files: %v", err)
	}
	cp(cert1, cert)
	cp(key2, key)
	if err := f.Open(t.Context()); cay.CodeOf(err) != cay.CodeConfigInvalid {
		t.Fatalf("a key that does not fit: %v", err)
	}
	cp(key1, key)
	if err := f.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	serves := func(what, domain string) {
		t.Helper()
		now = now.Add(2 * lookEvery)
		c, err := f.Certificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		if leaf, err := leafOf(c); err != nil || leaf.PermittedDNSDomains[0] != domain {
			t.Errorf("%s: the certificate of %v is served, want %s", what, leaf.PermittedDNSDomains, domain)
		}
	}
	serves("at first", "one.test")
	cp(cert2, cert)
	serves("between two writes", "one.test")
	cp(key2, key)
	serves("after both", "two.test")
	if err := os.Remove(cert); err != nil {
		t.Fatal(err)
	}
	serves("without files", "two.test")
}

func TestCovers(t *testing.T) {
	a := newLocal(t, t.TempDir(), time.Now)
	c, _ := a.Certificate(nil)
	if v, err := Covers(c, "sbx.localhost", time.Now()); err != nil || v.NotAfter.Before(time.Now()) {
		t.Error(v, err)
	}
	for want, f := range map[string]func() (Validity, error){
		"not for *.other.test": func() (Validity, error) { return Covers(c, "other.test", time.Now()) },
		"expired on":           func() (Validity, error) { return Covers(c, "sbx.localhost", time.Now().Add(leafLife)) },
		"not valid before":     func() (Validity, error) { return Covers(c, "sbx.localhost", time.Now().Add(-leafLife)) },
		"no certificate":       func() (Validity, error) { return Covers(&tls.Certificate{}, "sbx.localhost", time.Now()) },
	} {
		if _, err := f(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestTrust(t *testing.T) {
	for i, at := range anchors {
		t.Run(at.dir, func(t *testing.T) {
			a := newLocal(t, t.TempDir(), time.Now)
			var ran []string
			tr := &Trust{Root: t.TempDir(), Home: "/home/u", Run: func(_ context.Context, name string, args ...string) ([]byte, error) {
				ran = append(ran, strings.TrimSpace(name+" "+strings.Join(args, " ")))
				return nil, nil
			}}
			if _, err := tr.Install(t.Context(), a.File()); cay.CodeOf(err) != cay.CodeHostUnsupported {
				t.Fatalf("a machine without a store: %v", err)
			}
			if err := os.MkdirAll(filepath.Join(tr.Root, at.dir), 0o755); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				d, err := tr.Install(t.Context(), a.File())
				if err != nil || !strings.HasPrefix(d.Store, at.dir+"/cay-sbx.localhost-") || d.Browser == "" {
					t.Fatalf("%+v, %v", d, err)
				}
				got, err := os.ReadFile(filepath.Join(tr.Root, d.Store))
				want, _ := os.ReadFile(a.File())
				if err != nil || string(got) != string(want) || !tr.Installed(a.File()) {
					t.Fatalf("%s: %v", d.Store, err)
				}
			}
			update := strings.Join(anchors[i].update, " ")
			if n := strings.Count(strings.Join(ran, "\n")+"\n", update+"\n"); n != 2 {
				t.Errorf("%s ran %d times: %q", update, n, ran)
			}
			other := &Authority{Dir: t.TempDir(), Domain: "sbx.localhost-x", Now: time.Now}
			if err := other.Open(t.Context()); err != nil {
				t.Fatal(err)
			}
			kept, err := tr.Install(t.Context(), other.File())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tr.Remove(t.Context(), a.File(), "sbx.localhost"); err != nil || tr.Installed(a.File()) {
				t.Errorf("it is still trusted: %v", err)
			}
			if _, err := os.Stat(filepath.Join(tr.Root, kept.Store)); err != nil {
				t.Errorf("another one is gone: %v", err)
			}
		})
	}
	t.Run("fails", func(t *testing.T) {
		a := newLocal(t, t.TempDir(), time.Now)
		tr := &Trust{Root: t.TempDir(), Run: func(context.Context, string, ...string) ([]byte, error) { return []byte("no"), errors.New("exit 1") }}
		if err := os.MkdirAll(filepath.Join(tr.Root, anchors[0].dir), 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := tr.Install(t.Context(), a.File()); cay.CodeOf(err) != cay.CodeHostUnsupported || !strings.Contains(err.Error(), "no") {
			t.Error(err)
		}
		if _, err := tr.Install(t.Context(), filepath.Join(t.TempDir(), "x")); cay.CodeOf(err) != cay.CodeConfigInvalid {
			t.Error(err)
		}
	})
}

// The real programs take what Install gives them.
func TestTrustBrowser(t *testing.T) {
	if _, err := exec.LookPath("certutil"); err != nil {
		t.Skip("needs certutil (libnss3-tools)")
	}
	a := newLocal(t, t.TempDir(), time.Now)
	tr := &Trust{Root: t.TempDir(), Home: "/home/u"}
	tr.Run = func(ctx context.Context, name string, args ...string) ([]byte, error) {
		if name != "certutil" {
			return nil, nil
		}
		return exec.CommandContext(ctx, name, args...).CombinedOutput()
	}
	if err := os.MkdirAll(filepath.Join(tr.Root, anchors[0].dir), 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := tr.Install(t.Context(), a.File()); err != nil {
			t.Fatal(err)
		}
	}
	list := func() string {
		out, err := exec.Command("certutil", "-L", "-d", "sql:"+filepath.Join(tr.Root, "home/u", browserDB)).CombinedOutput()
		if err != nil {
			t.Fatal(err, string(out))
		}
		return string(out)
	}
	if got := list(); strings.Count(got, "Cay local authority for sbx.localhost") != 1 || !strings.Contains(got, "C,,") {
		t.Error(got)
	}
	if _, err := tr.Remove(t.Context(), a.File(), "sbx.localhost"); err != nil {
		t.Fatal(err)
	}
	if got := list(); strings.Contains(got, "Cay local authority") {
		t.Error(got)
	}
}

func TestParseTSIG(t *testing.T) {
	for text, want := range map[string]TSIG{
		"key \"cay\" {\n\talgorithm hmac-sha256;\n\tsecret \"c2VjcmV0\";\n};\n": {"cay.", "hmac-sha256.", "c2VjcmV0"},
		"key Cay.Example. { secret c2VjcmV0; };":                                {"cay.example.", "hmac-sha256.", "c2VjcmV0"},
		"key k{algorithm HMAC-SHA512;secret \"x\";}":                            {"k.", "hmac-sha512.", "x"},
	} {
		if got, err := parseTSIG(text); err != nil || got != want {
			t.Errorf("parseTSIG(%q) = %#v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "key", "key x", "key x {}", "key x { algorithm hmac-md5; secret x; };", "key x { algorithm hmac-sha256; };", "secret x;"} {
		if got, err := parseTSIG(text); err == nil {
			t.Errorf("parseTSIG(%q) = %#v", text, got)
		}
	}
	k := TSIG{"cay.", "hmac-sha256.", "c2VjcmV0"}
	for _, f := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(f, k); strings.Contains(s, "c2VjcmV0") {
			t.Errorf("%s prints the secret: %s", f, s)
		}
	}
	path := filepath.Join(t.TempDir(), "key")
	if _, err := ReadTSIG(path); cay.CodeOf(err) != cay.CodeConfigInvalid {
		t.Error(err)
	}
	if err := os.WriteFile(path, []byte("key k { secret x; };"), 0o600); err != nil {
		t.Fatal(err)
	}
	if k, err := ReadTSIG(path); err != nil || k.Name != "k." {
		t.Error(k, err)
	}
}

func FuzzParseTSIG(f *testing.F) {
	f.Add("key \"cay\" {\n\talgorithm hmac-sha256;\n\tsecret \"c2VjcmV0\";\n};\n")
	f.Add("key k{secret x;")
	f.Fuzz(func(t *testing.T, text string) {
		k, err := parseTSIG(text)
		if err != nil {
			return
		}
		if !strings.HasSuffix(k.Name, ".") || k.Secret == "" || strings.ContainsAny(k.Secret, " \n;\"") {
			t.Fatalf("%#v of %q", k, text)
		}
	})
}
