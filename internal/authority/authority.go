// Package authority makes certificate authorities of a machine's own, and what
// they issue. What an authority is for, and where it is kept, its owners say.
package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
)

// Authority signs certificates. The key is one of the curve P-256.
type Authority struct {
	Cert *x509.Certificate
	Key  *ecdsa.PrivateKey
}

// New makes an authority of a template, which it completes by a serial number
// and by what makes an authority of it that issues no others.
func New(tmpl x509.Certificate) (Authority, error) {
	key, err := NewKey()
	if err != nil {
		return Authority{}, err
	}
	tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.MaxPathLenZero = true, true, true
	cert, err := Authority{Cert: &tmpl, Key: key}.Issue(tmpl, &key.PublicKey)
	if err != nil {
		return Authority{}, err
	}
	return Authority{Cert: cert, Key: key}, nil
}

// NewKey makes a key of the curve P-256.
func NewKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// Parse reads an authority in PEM. The two may be the same text.
func Parse(cert, key []byte) (Authority, error) {
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return Authority{}, err
	}
	private, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !pair.Leaf.IsCA {
		return Authority{}, errors.New("it is no authority with an ECDSA key")
	}
	return Authority{Cert: pair.Leaf, Key: private}, nil
}

// Issue signs a certificate of a template, which it completes by a serial
// number, for a key.
func (a Authority) Issue(tmpl x509.Certificate, key crypto.PublicKey) (*x509.Certificate, error) {
	tmpl.SerialNumber = serial()
	der, err := x509.CreateCertificate(rand.Reader, &tmpl, a.Cert, key, a.Key)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	return x509.ParseCertificate(der)
}

// CertPEM is the certificate in PEM, for a trust store.
func (a Authority) CertPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Cert.Raw})
}

// KeyPEM is the key in PEM, as PKCS #8.
func (a Authority) KeyPEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(a.Key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// serial is a number that nobody has used: positive, of up to 16 bytes
// (RFC 5280, section 4.1.2.2).
func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b)
}
