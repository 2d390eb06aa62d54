package certificate

import (
	"context"
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
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

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
	ca   *x509.Certificate
	key  *ecdsa.PrivateKey
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
	case errors.Is(err, fs.ErrNotExist), err == nil && !a.Now().Before(a.ca.NotAfter):
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
	pair, err := tls.LoadX509KeyPair(a.File(), a.keyFile())
	if err != nil {
		return err
	}
	ca, err := leafOf(&pair)
	if err != nil {
		return err
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !ca.IsCA {
		return fmt.Errorf("%s holds no authority with an ECDSA key", a.File())
	}
	if len(ca.PermittedDNSDomains) != 1 || ca.PermittedDNSDomains[0] != a.Domain {
		return fmt.Errorf("%s is for %q and not for %s", a.File(), ca.PermittedDNSDomains, a.Domain)
	}
	a.ca, a.key = ca, key
	return nil
}

// make writes the key before the certificate: a certificate says that both are
// there.
func (a *Authority) make() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	now := a.Now()
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	_, all4, _ := net.ParseCIDR("0.0.0.0/0") // both parse
	_, all6, _ := net.ParseCIDR("::/0")
	tmpl := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{Organization: []string{"Cay local authority"}, CommonName: "Cay local authority for " + a.Domain + " on " + host},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         []string{a.Domain},
		ExcludedIPRanges:            []*net.IPNet{all4, all6},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(a.Dir, 0o700); err != nil {
		return err
	}
	if err := os.Remove(a.File()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := wholefile.Write(a.keyFile(), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600); err != nil {
		return err
	}
	if err := wholefile.Write(a.File(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		return err
	}
	return a.load()
}

// issue makes a leaf for the domain and every name one below it.
func (a *Authority) issue() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	now := a.Now()
	tmpl := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{CommonName: "*." + a.Domain},
		NotBefore:    now.Add(-backdate),
		NotAfter:     now.Add(leafLife),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:     []string{a.Domain, "*." + a.Domain},
	}
	if tmpl.NotAfter.After(a.ca.NotAfter) {
		tmpl.NotAfter = a.ca.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.ca, &key.PublicKey, a.key)
	if err != nil {
		return fmt.Errorf("making a certificate for *.%s: %w", a.Domain, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	a.leaf = &tls.Certificate{Certificate: [][]byte{der, a.ca.Raw}, PrivateKey: key, Leaf: leaf}
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

func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	b[0] &= 0x7f // positive, in 16 bytes
	return new(big.Int).SetBytes(b)
}

// fingerprint names a certificate in file names.
func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:4])
}
