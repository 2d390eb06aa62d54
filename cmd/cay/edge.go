package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/certificate"
	"github.com/cayhq/cay/doctor"
	"github.com/cayhq/cay/internal/settings"
	"github.com/cayhq/cay/proxy"
	"github.com/cayhq/cay/store"
)

// The values of the setting "certificates".
const (
	certificatesOff   = "off"
	certificatesFiles = "files"
	certificatesLocal = "local"
	certificatesACME  = "acme"
)

// authority is the local authority of a domain, in a data directory.
func (d dataDir) authority(domain string) *certificate.Authority {
	return &certificate.Authority{Dir: d.path("certificates", "local", domain), Domain: domain, Now: time.Now}
}

// openEdge gives the proxy what it needs for HTTPS. The ports are open already.
func (s *server) openEdge(ctx context.Context) error {
	log := s.log.With("part", "certificate")
	switch s.cfg.Certificates {
	case certificatesOff:
		return nil
	case certificatesFiles:
		s.certificates = &certificate.Files{Cert: s.cfg.CertFile, Key: s.cfg.KeyFile, Domain: s.cfg.Domain, Now: time.Now, Log: log}
	case certificatesLocal:
		a := s.dir.authority(s.cfg.Domain)
		s.certificates, s.info.CAFile = a, a.File()
	case certificatesACME:
		way, err := proofByDNS(s.cfg)
		if err != nil {
			return err
		}
		a := &certificate.ACME{Domain: s.cfg.Domain, Email: s.cfg.ACMEEmail, Directory: s.cfg.ACMEDirectory, Roots: s.cfg.ACMERoots,
			Dir: s.dir.path("certificates", "acme"), DNS: way, Resolver: s.cfg.ACMEResolver, Allow: mayHaveCertificate(s.cfg.Domain, s.store),
			HTTPPort: port(s.proxyListener), TLSPort: port(s.tlsListener), Log: log}
		if a.Directory == "" {
			a.Directory = certificate.LetsEncrypt
		}
		s.certificates = a
		s.proxy.Challenge = a.Challenge
	}
	if err := s.certificates.Open(ctx); err != nil {
		return err
	}
	s.proxy.TLS = certificate.TLS(s.certificates)
	s.proxy.API = s.api.Handler()
	if s.cfg.RedirectHTTP == "on" {
		s.proxy.RedirectPort = port(s.tlsListener)
	}
	s.info.Domain, s.info.TLSAddr = s.publicDomain(), s.tlsListener.Addr().String()
	return nil
}

func port(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }

// publicDomain is the domain that clients are told: with the port of HTTPS,
// unless it is the one that is meant without. Where there is none, names below
// localhost lead to a proxy on the loopback, over plain HTTP.
func (s *server) publicDomain() string {
	if s.cfg.Domain == "" {
		if at := s.proxyListener.Addr().(*net.TCPAddr); at.IP.IsLoopback() {
			return "localhost:" + strconv.Itoa(at.Port)
		}
		return ""
	}
	if s.tlsListener == nil || port(s.tlsListener) == 443 {
		return s.cfg.Domain
	}
	return s.cfg.Domain + ":" + strconv.Itoa(port(s.tlsListener))
}

// domainOnly takes the port off.
func domainOnly(domain string) string {
	name, _, _ := strings.Cut(domain, ":")
	return name
}

// proofByDNS says how the records of a proof are set; nil: they are not.
func proofByDNS(cfg settings.Settings) (certificate.DNS, error) {
	how, what, _ := strings.Cut(cfg.ACMEDNS, ":")
	switch how {
	case "rfc2136":
		u := certificate.Update{Server: what}
		if cfg.ACMEDNSKey == "" {
			return u, nil
		}
		var err error
		u.Key, err = certificate.ReadTSIG(cfg.ACMEDNSKey)
		return u, err
	case "exec":
		return certificate.Hook{Path: what}, nil
	}
	return nil, nil
}

// mayHaveCertificate lets names have certificates on demand that lead to
// something: the API, and sandboxes that there are.
func mayHaveCertificate(domain string, record store.Sandboxes) func(ctx context.Context, name string) error {
	return func(ctx context.Context, name string) error {
		if name == "api."+domain || name == "sandbox."+domain {
			return nil
		}
		id, ok := proxy.SandboxOf(name)
		if !ok {
			return fmt.Errorf("%s names no sandbox", name)
		}
		rec, err := record.FindSandbox(ctx, "", id)
		if err != nil {
			return err
		}
		if rec.State == cay.StateEnded {
			return errors.New("the sandbox has ended")
		}
		return nil
	}
}

// handshake looks at what a running server shows to a client of a sandbox.
func handshake(info serverInfo) func(context.Context) (doctor.Certificate, error) {
	return func(ctx context.Context) (doctor.Certificate, error) {
		domain := domainOnly(info.Domain)
		addr := info.TLSAddr
		if host, port, err := net.SplitHostPort(addr); err == nil && net.ParseIP(host).IsUnspecified() {
			addr = net.JoinHostPort("127.0.0.1", port)
		}
		name := "api." + domain
		// What is wrong with the certificate is looked at below.
		d := tls.Dialer{Config: &tls.Config{ServerName: name, InsecureSkipVerify: true}} //nolint:gosec // nothing is sent
		conn, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return doctor.Certificate{}, err
		}
		defer conn.Close()
		chain := conn.(*tls.Conn).ConnectionState().PeerCertificates
		leaf, now := chain[0], time.Now()
		c := doctor.Certificate{Issuer: leaf.Issuer.String(), Left: leaf.NotAfter.Sub(now)}
		if err := leaf.VerifyHostname(name); err != nil {
			return c, err
		}
		if c.Left <= 0 {
			return c, fmt.Errorf("the certificate expired on %s", leaf.NotAfter.Format(time.RFC3339))
		}
		between := x509.NewCertPool()
		for _, i := range chain[1:] {
			between.AddCert(i)
		}
		_, err = leaf.Verify(x509.VerifyOptions{DNSName: name, Intermediates: between, CurrentTime: now})
		c.Untrusted = err != nil
		return c, nil
	}
}
