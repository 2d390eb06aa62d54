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
	"log/slog"
	"net"
	"net/netip"
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
	// Report is told of every refusal. It must not block. Nil ignores.
	Report func(Refusal)
	// Roots verify destinations whose requests are changed; nil is the
	// system's.
	Roots *x509.CertPool
	// Limits bound what one guest may hold open; zero fields have defaults.
	Limits Limits

	Now func() time.Time // nil is time.Now
	Log *slog.Logger     // nil discards
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
}

// Refusal is a connection or a query that was not let out.
type Refusal struct {
	At          time.Time
	Execution   cay.ExecutionID
	Sandbox     cay.SandboxID
	Team        cay.TeamID
	Protocol    string         // "tcp", "tls", "http" or "dns"
	Destination netip.AddrPort // invalid for "dns"
	Name        string         // that the guest said; may be empty
	Rule        string         // the entry of the policy, or "always refused", "limit", "names"
	Reason      string         // a clause for people
}
