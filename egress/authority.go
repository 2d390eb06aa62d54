package egress

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/authority"
	"github.com/cayhq/cay/internal/wholefile"
)

// Lives of certificates. A leaf is made anew when a quarter of its life is
// left; it begins in the past, because a guest's clock may be behind.
const (
	authorityLife = 10 * 365 * 24 * time.Hour
	leafLife      = 24 * time.Hour
	backdated     = time.Hour
	maxLeaves     = 1024
)

// issuer issues the certificates of names with rules.
type issuer struct {
	ca   authority.Authority
	leaf *ecdsa.PrivateKey // of every leaf; it is never on disk
	now  func() time.Time

	mu     sync.Mutex
	leaves map[string]*tls.Certificate
}

const authorityFile = "authority.pem"

// openIssuer reads the authority of a directory, making it if there is none or
// its time is up. The file holds the key, mode 0600.
func openIssuer(dir string, now func() time.Time) (*issuer, error) {
	ca, err := loadAuthority(filepath.Join(dir, authorityFile))
	if errors.Is(err, fs.ErrNotExist) || err == nil && now().Add(leafLife).After(ca.Cert.NotAfter) {
		ca, err = makeAuthority(dir, now())
	}
	if err != nil {
		return nil, &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerNetwork,
			Message: "the certificate authority for egress rules cannot be used: " + err.Error(),
			Fix:     "restore " + filepath.Join(dir, authorityFile) + " from a backup; if you delete it, a new one is made and running sandboxes with rules must be made anew", Err: err}
	}
	leaf, err := authority.NewKey()
	return &issuer{ca: ca, leaf: leaf, now: now, leaves: map[string]*tls.Certificate{}}, err
}

func loadAuthority(path string) (authority.Authority, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return authority.Authority{}, err
	}
	ca, err := authority.Parse(b, b)
	if err != nil {
		return ca, fmt.Errorf("reading %s: %w", path, err)
	}
	return ca, nil
}

func makeAuthority(dir string, now time.Time) (authority.Authority, error) {
	// The name tells authorities of several nodes apart in a trust store.
	id := make([]byte, 4)
	rand.Read(id)
	ca, err := authority.New(x509.Certificate{
		Subject:   pkix.Name{CommonName: "Cay egress rules " + hex.EncodeToString(id)},
		NotBefore: now.Add(-backdated), NotAfter: now.Add(authorityLife), KeyUsage: x509.KeyUsageCertSign,
	})
	if err != nil {
		return ca, err
	}
	private, err := ca.KeyPEM()
	if err != nil {
		return ca, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return ca, err
	}
	return ca, wholefile.Write(filepath.Join(dir, authorityFile), append(ca.CertPEM(), private...), 0o600)
}

// bundle is the authority's certificate, for a trust store.
func (a *issuer) bundle() string { return string(a.ca.CertPEM()) }

// leafFor returns a certificate for a name.
func (a *issuer) leafFor(name string) (*tls.Certificate, error) {
	now := a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.leaves[name]; c != nil && now.Add(leafLife/4).Before(c.Leaf.NotAfter) {
		return c, nil
	}
	cert, err := a.ca.Issue(x509.Certificate{
		Subject: pkix.Name{CommonName: name[:min(len(name), 64)]}, DNSNames: []string{name},
		NotBefore: now.Add(-backdated), NotAfter: now.Add(leafLife), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, &a.leaf.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("making a certificate for %s: %w", name, err)
	}
	if len(a.leaves) >= maxLeaves {
		clear(a.leaves) // a wildcard's names are many; each costs 50 µs
	}
	c := &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: a.leaf, Leaf: cert}
	a.leaves[name] = c
	return c, nil
}
