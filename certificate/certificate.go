// Package certificate gives the edge the certificates of its domain: from files
// that somebody else renews, from a certificate authority of this machine's own,
// or from a public one by ACME.
package certificate

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay"
)

// Source has the certificates of one domain. Its methods may be called from
// many goroutines, after Open.
type Source interface {
	// Open makes it ready. It returns when a first handshake can succeed, or,
	// where a certificate has to be asked for, when that has begun.
	Open(ctx context.Context) error
	// Certificate answers a handshake; it fits tls.Config.GetCertificate.
	Certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error)
	// Close ends what Open began. It may be called twice.
	Close() error
}

// TLS returns the configuration of a listener for HTTPS, with HTTP/2.
func TLS(s Source) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"h2", "http/1.1", acmeProto},
		GetCertificate: s.Certificate,
	}
}

// acmeProto is what a CA speaks that asks for a proof (RFC 8737).
const acmeProto = "acme-tls/1"

// Validity is what a certificate promises.
type Validity struct {
	Names     []string
	NotBefore time.Time
	NotAfter  time.Time
	Issuer    string
}

// Covers reports whether a certificate is good for sandboxes of a domain, and
// for how long, or says why not.
func Covers(c *tls.Certificate, domain string, now time.Time) (Validity, error) {
	leaf, err := leafOf(c)
	if err != nil {
		return Validity{}, err
	}
	v := Validity{Names: leaf.DNSNames, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, Issuer: leaf.Issuer.String()}
	switch {
	case leaf.VerifyHostname("3000-i0."+domain) != nil:
		return v, fmt.Errorf("it is for %q and not for *.%s", leaf.DNSNames, domain)
	case now.Before(leaf.NotBefore):
		return v, fmt.Errorf("it is not valid before %s", leaf.NotBefore.Format(time.RFC3339))
	case !now.Before(leaf.NotAfter):
		return v, fmt.Errorf("it expired on %s", leaf.NotAfter.Format(time.RFC3339))
	}
	return v, nil
}

func leafOf(c *tls.Certificate) (*x509.Certificate, error) {
	if c == nil || len(c.Certificate) == 0 {
		return nil, errors.New("there is no certificate")
	}
	if c.Leaf != nil {
		return c.Leaf, nil
	}
	return x509.ParseCertificate(c.Certificate[0])
}

func invalid(err error, fix, format string, args ...any) error {
	return &cay.Error{Code: cay.CodeConfigInvalid, Layer: cay.LayerHost, Message: fmt.Sprintf(format, args...), Fix: fix, Err: err}
}
