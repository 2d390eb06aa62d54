package egress

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cayhq/cay"
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

// authority issues the certificates of names with rules.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	leaf *ecdsa.PrivateKey // of every leaf; it is never on disk
	now  func() time.Time

	mu     sync.Mutex
	leaves map[string]*tls.Certificate
}

const authorityFile = "authority.pem"

// openAuthority reads the authority of a directory, making it if there is none
// or its time is up. The file holds the key, mode 0600.
func openAuthority(dir string, now func() time.Time) (*authority, error) {
	a, err := loadAuthority(filepath.Join(dir, authorityFile))
	if errors.Is(err, fs.ErrNotExist) || err == nil && now().Add(leafLife).After(a.cert.NotAfter) {
		a, err = makeAuthority(dir, now())
	}
	if err != nil {
		return nil, &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerNetwork,
			Message: "the certificate authority for egress rules cannot be used: " + err.Error(),
			Fix:     "restore " + filepath.Join(dir, authorityFile) + " from a backup; if you delete it, a new one is made and running sandboxes with rules must be made anew", Err: err}
	}
	a.now, a.leaves = now, map[string]*tls.Certificate{}
	a.leaf, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return a, err
}

func loadAuthority(path string) (*authority, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(b, b)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !pair.Leaf.IsCA {
		return nil, fmt.Errorf("%s does not hold an authority with an ECDSA key", path)
	}
	return &authority{cert: pair.Leaf, key: key}, nil
}

func makeAuthority(dir string, now time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	id := sha256.Sum256(public)
	t := &x509.Certificate{
		SerialNumber: serial(),
		// The name tells authorities of several nodes apart in a trust store.
		Subject:   pkix.Name{CommonName: "Cay egress rules " + hex.EncodeToString(id[:4])},
		NotBefore: now.Add(-backdated), NotAfter: now.Add(authorityLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, SubjectKeyId: id[:20],
		KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	b := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &authority{cert: cert, key: key}, wholefile.Write(filepath.Join(dir, authorityFile), b, 0o600)
}

// bundle is the authority's certificate, for a trust store.
func (a *authority) bundle() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

// leafFor returns a certificate for a name.
func (a *authority) leafFor(name string) (*tls.Certificate, error) {
	now := a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.leaves[name]; c != nil && now.Add(leafLife/4).Before(c.Leaf.NotAfter) {
		return c, nil
	}
	t := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: name[:min(len(name), 64)]}, DNSNames: []string{name},
		NotBefore: now.Add(-backdated), NotAfter: now.Add(leafLife), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, &a.leaf.PublicKey, a.key)
	if err != nil {
		return nil, fmt.Errorf("making a certificate for %s: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("making a certificate for %s: %w", name, err)
	}
	if len(a.leaves) >= maxLeaves {
		clear(a.leaves) // a wildcard's names are many; each costs 50 µs
	}
	c := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: a.leaf, Leaf: cert}
	a.leaves[name] = c
	return c, nil
}

func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	b[0] &= 0x7f // positive (RFC 5280, section 4.1.2.2)
	return new(big.Int).SetBytes(b)
}
