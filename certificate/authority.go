package certificate

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/authority"
	"github.com/cayhq/cay/internal/wholefile"
)

const (
	authorityLife = 10 * 365 * 24 * time.Hour
	leafLife      = 90 * 24 * time.Hour
	// leafRenew is the age at which a leaf is replaced.
	leafRenew = leafLife / 3
	// backdate lets clients with a slow clock accept what is new.
	backdate = time.Hour
)

// Authority is a certificate authority of this machine's own, good for one
// domain and nothing else: who trusts it trusts it with no other name. Its key
// does not leave Dir, and leaves are kept in memory alone.
type Authority struct {
	Dir    string // kept across restarts; mode 0700
	Domain string
	Now    func() time.Time

	mu   sync.Mutex
	ca   authority.Authority
	leaf *tls.Certificate
}

// File is the authority's certificate in PEM.
func (a *Authority) File() string { return filepath.Join(a.Dir, "ca.pem") }

func (a *Authority) keyFile() string { return filepath.Join(a.Dir, "ca.key") }

// Open implements [Source]: it loads the authority, or makes one if there is
// none or it has expired.
func (a *Authority) Open(context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.load()
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && !a.Now().Before(a.ca.Cert.NotAfter):
		if err := a.make(); err != nil {
			return fmt.Errorf("making a certificate authority in %s: %w", a.Dir, err)
		}
	case err != nil:
		return invalid(err, "remove "+a.Dir+" to have a new authority made, which then has to be trusted anew with `cay trust`",
			"the local certificate authority cannot be used: %v", err)
	}
	return a.issue()
}

func (a *Authority) load() error {
	cert, err := os.ReadFile(a.File())
	if err != nil {
		return err
	}
	key, err := os.ReadFile(a.keyFile())
	if err != nil {
		return err
	}
	ca, err := authority.Parse(cert, key)
	if err != nil {
		return fmt.Errorf("%s with %s: %w", a.File(), a.keyFile(), err)
	}
	if names := ca.Cert.PermittedDNSDomains; len(names) != 1 || names[0] != a.Domain {
		return fmt.Errorf("%s is for %q and not for %s", a.File(), names, a.Domain)
	}
	a.ca = ca
	return nil
}

// make writes the key before the certificate: a certificate says that both are
// there.
func (a *Authority) make() error {
	now := a.Now()
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	_, all4, _ := net.ParseCIDR("0.0.0.0/0") // both parse
	_, all6, _ := net.ParseCIDR("::/0")
	a.ca, err = authority.New(x509.Certificate{
		Subject:                     pkix.Name{Organization: []string{"Cay local authority"}, CommonName: "Cay local authority for " + a.Domain + " on " + host},
		NotBefore:                   now.Add(-backdate),
		NotAfter:                    now.Add(authorityLife),
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         []string{a.Domain},
		ExcludedIPRanges:            []*net.IPNet{all4, all6},
	})
	if err != nil {
		return err
	}
	private, err := a.ca.KeyPEM()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(a.Dir, 0o700); err != nil {
		return err
	}
	if err := wholefile.Remove(a.File()); err != nil {
		return err
	}
	if err := wholefile.Write(a.keyFile(), private, 0o600); err != nil {
		return err
	}
	return wholefile.Write(a.File(), a.ca.CertPEM(), 0o644)
}

// issue makes a leaf for the domain and every name one below it.
func (a *Authority) issue() error {
	key, err := authority.NewKey()
	if err != nil {
		return err
	}
	now := a.Now()
	tmpl := x509.Certificate{
		Subject:     pkix.Name{CommonName: "*." + a.Domain},
		NotBefore:   now.Add(-backdate),
		NotAfter:    now.Add(leafLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    []string{a.Domain, "*." + a.Domain},
	}
	if end := a.ca.Cert.NotAfter; tmpl.NotAfter.After(end) {
		tmpl.NotAfter = end
	}
	leaf, err := a.ca.Issue(tmpl, &key.PublicKey)
	if err != nil {
		return fmt.Errorf("making a certificate for *.%s: %w", a.Domain, err)
	}
	a.leaf = &tls.Certificate{Certificate: [][]byte{leaf.Raw, a.ca.Cert.Raw}, PrivateKey: key, Leaf: leaf}
	return nil
}

// Certificate implements [Source].
func (a *Authority) Certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.Now().Sub(a.leaf.Leaf.NotBefore) >= leafRenew {
		if err := a.issue(); err != nil {
			return nil, err
		}
	}
	return a.leaf, nil
}

// Close implements [Source].
func (a *Authority) Close() error { return nil }

// fingerprint names a certificate in file names.
func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:4])
}
