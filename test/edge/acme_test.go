package edge

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"

	"github.com/cayhq/cay/test/program"
)

// The ports that the authority looks at.
const (
	acmePlain  = 3080
	acmeSecure = 3443
)

// A server with nothing but a domain and an ACME authority serves a sandbox's
// address with a certificate of that authority, made when it is first asked for.
func TestACME(t *testing.T) {
	if !program.Nightly() {
		t.Skip("nightly: package certificate has the same authority in every run")
	}
	resolver, err := nameServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")
	quiet, store := log.New(io.Discard, "", 0), db.NewMemoryStore()
	issuer := ca.New(quiet, store, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {Description: "the default"}})
	front := wfe.New(quiet, store, va.New(quiet, acmePlain, acmeSecure, false, resolver, store), issuer, []string{"pebble.letsencrypt.org"}, false, false, 1, 1)
	authority := httptest.NewTLSServer(front.Handler())
	defer authority.Close()
	roots := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := program.Start(t, program.Options{Args: []string{"--domain", "sbx.test", "--certificates", "acme", "--acme-directory", authority.URL + wfe.DirectoryPath, "--acme-roots", roots,
		"--proxy-addr", fmt.Sprint("127.0.0.1:", acmePlain), "--tls-addr", fmt.Sprint("127.0.0.1:", acmeSecure)}})
	issued := x509.NewCertPool()
	issued.AddCert(issuer.GetRootCert(0).Cert)
	shows := func(name string) (*x509.Certificate, error) {
		c, err := tls.Dial("tcp", fmt.Sprint("127.0.0.1:", acmeSecure), &tls.Config{ServerName: name, RootCAs: issued})
		if err != nil {
			return nil, err
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0], nil
	}
	box := s.Client().Make(t, 10*patience, nil)
	name := "3000-" + box.ID + ".sbx.test"
	var first *x509.Certificate
	for _, n := range []string{name, "api.sbx.test"} {
		program.Eventually(t, 2*patience, func() string {
			leaf, err := shows(n)
			if err != nil {
				return n + ": " + err.Error()
			}
			if first == nil {
				first = leaf
			}
			return ""
		})
	}
	if c, err := shows("3000-i0nobody.sbx.test"); err == nil {
		t.Errorf("a sandbox that is not there has a certificate for %v", c.DNSNames)
	}
	// It is kept: a restart asks nobody.
	authority.Close()
	s.Restart(t)
	program.Eventually(t, patience, func() string {
		again, err := shows(name)
		switch {
		case err != nil:
			return err.Error()
		case !again.Equal(first):
			return "another certificate"
		}
		return ""
	})
}
