// Package egress decides by name about a guest's connections outwards, changes
// requests on their way, and sends them through a proxy: what of a
// [cay.Egress] the addresses of packets cannot say. DESIGN.md has the whole.
//
// Package network redirects a guest's connections and queries to listeners in
// the sandbox's router namespace; a [Guest] carries them here.
package egress

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/cayhq/cay"
)

// Server serves the guests of one node. Set the fields, then Open. The methods
// are safe for concurrent use.
type Server struct {
	// Refused reports whether an address is never a destination, whatever the
	// policy: special purpose, the node's own, other sandboxes', the
	// operator's. It is asked for every connection. Required.
	Refused func(netip.Addr) bool
	// Resolvers are the name servers of the node, in order of preference. They
	// may be private: only the node speaks to them.
	Resolvers []netip.AddrPort
	// Dir keeps the key of the authority that ends TLS for rules, made there
	// when first needed.
	Dir string
	// Secret returns the value of a team's secret. It is asked at each request
	// that needs one.
	Secret func(context.Context, cay.TeamID, string) (cay.Secret, error)
	// PermitProxy are addresses that a SOCKS5 proxy may have although Refused
	// has them.
	PermitProxy []netip.Prefix
	// Roots verify destinations whose requests are changed; nil is the
	// system's.
	Roots *x509.CertPool
	// Limits bound what one guest may hold open; zero fields have defaults.
	Limits Limits

	Now func() time.Time // nil is time.Now
	Log *slog.Logger     // nil discards

	resolver resolver

	mu     sync.Mutex
	open   bool
	guests map[cay.ExecutionID]*guest
	issuer *issuer
}

// Open makes the server ready for guests. It starts nothing.
func (s *Server) Open(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Refused == nil {
		return &cay.Error{Code: cay.CodeConfigInvalid, Layer: cay.LayerNetwork,
			Message: "egress by name does not know which addresses are always refused", Fix: "set Refused"}
	}
	s.resolver = resolver{servers: s.Resolvers}
	if s.guests == nil {
		s.guests = map[cay.ExecutionID]*guest{}
	}
	s.open = true
	return nil
}

// Close ends every guest's connections and waits for them. The server may be
// opened again.
func (s *Server) Close() error {
	s.mu.Lock()
	s.open = false
	all := s.guests
	s.guests = nil
	s.mu.Unlock()
	var wg sync.WaitGroup
	errs := make(chan error, len(all))
	for _, g := range all {
		wg.Go(func() { errs <- g.close() })
	}
	wg.Wait()
	close(errs)
	var err error
	for e := range errs {
		err = errors.Join(err, e)
	}
	return err
}

// Attach begins to serve a guest. On an error its listeners are closed.
func (s *Server) Attach(in Guest) error {
	refuse := func(err error) error {
		return errors.Join(err, in.TCP.Close(), in.DNS.Close(), in.DNSTCP.Close())
	}
	p, err := compile(in.Policy)
	if err != nil {
		return refuse(err)
	}
	if len(in.Policy.Rules) > 0 {
		if _, err := s.issuerOf(); err != nil {
			return refuse(err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !s.open:
		return refuse(&cay.Error{Code: cay.CodeShuttingDown, Layer: cay.LayerNetwork,
			Message: "egress by name is not open", Fix: "try again when the server is up"})
	case s.guests[in.Execution] != nil:
		return refuse(&cay.Error{Code: cay.CodeConflict, Layer: cay.LayerNetwork,
			Message: fmt.Sprintf("the connections of sandbox %s are decided by name already", in.Sandbox), Fix: "update its policy instead"})
	}
	g := newGuest(s, in, p)
	s.guests[in.Execution] = g
	g.start()
	return nil
}

// Update puts a policy in force. Open connections that it refuses are reset.
// On an error the old one stays.
func (s *Server) Update(id cay.ExecutionID, e cay.Egress) error {
	p, err := compile(e)
	if err != nil {
		return err
	}
	if len(e.Rules) > 0 {
		if _, err := s.issuerOf(); err != nil {
			return err
		}
	}
	s.mu.Lock()
	g := s.guests[id]
	s.mu.Unlock()
	if g == nil {
		return errNotAttached
	}
	g.update(p)
	return nil
}

// Detach ends a guest's connections and waits for them. Nobody attached is no
// error.
func (s *Server) Detach(id cay.ExecutionID) error {
	s.mu.Lock()
	g := s.guests[id]
	delete(s.guests, id)
	s.mu.Unlock()
	if g == nil {
		return nil
	}
	return g.close()
}

// Bundle returns, in PEM, the certificate of the authority that a guest whose
// policy has rules must trust.
func (s *Server) Bundle() (string, error) {
	a, err := s.issuerOf()
	if err != nil {
		return "", err
	}
	return a.bundle(), nil
}

func (s *Server) issuerOf() (*issuer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.issuer == nil {
		a, err := openIssuer(s.Dir, s.now)
		if err != nil {
			return nil, err
		}
		s.issuer = a
	}
	return s.issuer, nil
}

func (s *Server) now() time.Time {
	if s.Now == nil {
		return time.Now()
	}
	return s.Now()
}

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}

// Limits are per guest.
type Limits struct {
	Connections int           // open at once; 0 is 1,024
	PerSecond   int           // new connections; 0 is 200, with bursts of twice that
	Queries     int           // DNS queries per second; 0 is 50, with bursts of four times that
	Sniff       time.Duration // from the accept to the name; 0 is 3 s
	Dial        time.Duration // to the destination; 0 is 30 s
	Idle        time.Duration // without a byte in either direction; 0 is an hour
}

// Guest is a sandbox whose policy is [cay.Egress.Named]. Attach takes
// possession of the listeners.
type Guest struct {
	Execution cay.ExecutionID // names it here
	Sandbox   cay.SandboxID
	Team      cay.TeamID
	Policy    cay.Egress
	// IPv6 tells that the guest can use IPv6 addresses.
	IPv6 bool

	TCP    net.Listener   // the guest's connections, all ports but 53
	DNS    net.PacketConn // its datagrams to port 53 of any address
	DNSTCP net.Listener   // its connections to port 53 of any address
	// Destination tells where the guest sent a connection that TCP accepted.
	Destination func(net.Conn) (netip.AddrPort, error)
	// Dial opens a connection outwards; nil dials from the namespace of the
	// process. It gets addresses only, which Refused has been asked about.
	Dial func(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	// Report is told of every refusal; of those over a limit, once a second.
	// It must not block. Nil ignores.
	Report func(cay.EgressRefusal)
}
