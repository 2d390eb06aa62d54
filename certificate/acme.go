package certificate

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
)

// ACME has certificates made by a public authority and keeps them fresh.
//
// With DNS it proves the domain by a TXT record and gets one wildcard
// certificate. Without, it gets a certificate for each name when a client asks
// for the first time, proved over HTTP (port 80, which must reach Challenge) or
// in the handshake (port 443, which must reach Certificate).
type ACME struct {
	Domain    string
	Email     string // for the authority's letters; may be empty
	Directory string // of the authority
	Roots     string // PEM file of what vouches for the authority; empty: the machine's
	Dir       string // account, keys and certificates
	DNS       DNS    // nil: prove each name by itself
	Resolver  string // asked whether the record is there, host:port; empty: the machine's
	// Allow says whether a name may have a certificate, when there is no DNS.
	// It bounds what strangers can have us ask the authority for.
	Allow func(ctx context.Context, name string) error
	// HTTPPort and TLSPort are those of the listeners that the proofs reach.
	HTTPPort, TLSPort int
	Log               *slog.Logger

	cache  *certmagic.Cache
	config *certmagic.Config
	issuer *certmagic.ACMEIssuer
	cancel context.CancelFunc
	close  sync.Once
}

// LetsEncrypt is the directory of the authority that is asked if none is named.
const LetsEncrypt = certmagic.LetsEncryptProductionCA

// Open implements [Source]. A first certificate takes seconds to minutes;
// handshakes fail until it is there.
func (a *ACME) Open(ctx context.Context) error {
	log := zap.New(slogCore{a.Log.Handler()})
	a.cache = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert: func(certmagic.Certificate) (*certmagic.Config, error) { return a.config, nil },
		Capacity:         10_000,
		Logger:           log,
	})
	a.config = certmagic.New(a.cache, certmagic.Config{
		Storage: &certmagic.FileStorage{Path: a.Dir},
		OCSP:    certmagic.OCSPConfig{},
		Logger:  log,
	})
	want := certmagic.ACMEIssuer{CA: a.Directory, Email: a.Email, Agreed: true, AltHTTPPort: a.HTTPPort, AltTLSALPNPort: a.TLSPort, Logger: log}
	if a.Roots != "" {
		pem, err := os.ReadFile(a.Roots)
		if err != nil {
			return invalid(err, "give --acme-roots a readable file", "the authority's roots cannot be read: %v", err)
		}
		want.TrustedRoots = x509.NewCertPool()
		if !want.TrustedRoots.AppendCertsFromPEM(pem) {
			return invalid(nil, "give --acme-roots certificates in PEM", "%s holds no certificate", a.Roots)
		}
	}
	if a.DNS != nil {
		solver := &certmagic.DNS01Solver{DNSManager: certmagic.DNSManager{DNSProvider: provider{a.DNS}, TTL: time.Minute,
			PropagationTimeout: propagation, Logger: log}}
		if a.Resolver != "" {
			solver.Resolvers = []string{a.Resolver}
		}
		want.DNS01Solver = solver
	} else {
		a.config.OnDemand = &certmagic.OnDemandConfig{DecisionFunc: a.allow}
	}
	a.issuer = certmagic.NewACMEIssuer(a.config, want)
	a.config.Issuers = []certmagic.Issuer{a.issuer}

	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	a.cancel = cancel
	names := []string{"*." + a.Domain}
	if a.DNS == nil {
		names = []string{"api." + a.Domain, "sandbox." + a.Domain}
	}
	if err := a.config.ManageAsync(run, names); err != nil {
		return fmt.Errorf("asking for certificates for %s: %w", strings.Join(names, ", "), err)
	}
	return nil
}

// propagation is how long a record may take to be seen.
const propagation = 5 * time.Minute

// allow is asked before a certificate is made for a name on demand.
func (a *ACME) allow(ctx context.Context, name string) error {
	if !strings.HasSuffix(name, "."+a.Domain) || strings.Contains(strings.TrimSuffix(name, "."+a.Domain), ".") {
		return fmt.Errorf("%s is no name of %s", name, a.Domain)
	}
	return a.Allow(ctx, name)
}

// Certificate implements [Source].
func (a *ACME) Certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	return a.config.GetCertificate(hello)
}

// Challenge answers an authority's question over HTTP, and reports whether r is
// one of ours.
func (a *ACME) Challenge(w http.ResponseWriter, r *http.Request) bool {
	return a.issuer.HandleHTTPChallenge(w, r)
}

// Close implements [Source].
func (a *ACME) Close() error {
	a.close.Do(func() {
		if a.cancel != nil {
			a.cancel()
		}
		if a.cache != nil {
			a.cache.Stop()
		}
	})
	return nil
}
