package egress

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	tryTimeout    = 2 * time.Second // for one name server
	lookupTimeout = 4 * time.Second // below the 5 s after which a guest's libc asks again
	maxDatagram   = 1232            // what crosses every network unfragmented (DNS flag day 2020)
	maxChain      = 16              // CNAMEs from a name to its addresses
	maxQueries    = 8               // that one question may cost
)

// resolver asks the node's name servers.
type resolver struct {
	servers []netip.AddrPort
}

var errNoAnswer = errors.New("no name server has answered")

// addresses are what a name resolved to.
type addresses struct {
	list  []netip.Addr
	ttl   time.Duration
	rcode dnsmessage.RCode // success or name error
}

// addresses returns the addresses of a name of one type, A or AAAA, over its
// chain of CNAMEs.
func (r *resolver) addresses(ctx context.Context, name string, typ dnsmessage.Type) (addresses, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	out := addresses{ttl: maxTTL}
	at := name
	steps := 0
	for range maxQueries {
		m, err := r.exchange(ctx, at, typ)
		if err != nil {
			return out, err
		}
		out.rcode = m.RCode
		if m.RCode != dnsmessage.RCodeSuccess {
			return out, nil
		}
		asked := at
		for { // walk as far as this answer leads
			next, found := follow(m, at, typ, &out)
			if found {
				return out, nil
			}
			if next == "" || next == at {
				break
			}
			if steps++; steps > maxChain {
				return out, fmt.Errorf("%s: more than %d CNAMEs", name, maxChain)
			}
			at = next
		}
		if at == asked {
			return out, nil // the name has no address of this type
		}
	}
	return out, fmt.Errorf("%s: its CNAMEs take more than %d queries", name, maxQueries)
}

// follow adds the addresses that a message has of a name, or returns the name
// it is an alias of.
func follow(m dnsmessage.Message, name string, typ dnsmessage.Type, out *addresses) (next string, found bool) {
	for _, rr := range m.Answers {
		owner, ok := canonical(rr.Header.Name.String())
		if !ok || owner != name || rr.Header.Class != dnsmessage.ClassINET {
			continue
		}
		ttl := time.Duration(rr.Header.TTL) * time.Second
		switch b := rr.Body.(type) {
		case *dnsmessage.AResource:
			if typ == dnsmessage.TypeA && len(out.list) < maxAddresses {
				out.list, found = append(out.list, netip.AddrFrom4(b.A)), true
				out.ttl = min(out.ttl, ttl)
			}
		case *dnsmessage.AAAAResource:
			if typ == dnsmessage.TypeAAAA && len(out.list) < maxAddresses {
				out.list, found = append(out.list, netip.AddrFrom16(b.AAAA)), true
				out.ttl = min(out.ttl, ttl)
			}
		case *dnsmessage.CNAMEResource:
			if next == "" {
				next, _ = canonical(b.CNAME.String())
				out.ttl = min(out.ttl, ttl)
			}
		}
	}
	return next, found
}

// exchange asks one question, each server in turn and all of them twice. An
// answer is success or a name error; a server's own failure makes it ask the
// next one.
func (r *resolver) exchange(ctx context.Context, name string, typ dnsmessage.Type) (dnsmessage.Message, error) {
	last := errNoAnswer
	for range 2 {
		for _, server := range r.servers {
			m, err := ask(ctx, server, name, typ)
			if err == nil && m.RCode != dnsmessage.RCodeSuccess && m.RCode != dnsmessage.RCodeNameError {
				err = fmt.Errorf("%s answers %s", server, m.RCode)
			}
			if err == nil {
				return m, nil
			}
			last = err
			if ctx.Err() != nil {
				return m, fmt.Errorf("resolving %s: %w", name, last)
			}
		}
	}
	return dnsmessage.Message{}, fmt.Errorf("resolving %s: %w", name, last)
}

// ask sends a question to a server by UDP, and by TCP if the answer is cut.
func ask(ctx context.Context, server netip.AddrPort, name string, typ dnsmessage.Type) (dnsmessage.Message, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	query, q, id, err := newQuery(name, typ)
	if err != nil {
		return dnsmessage.Message{}, err
	}
	m, err := askOver(ctx, "udp", server, query, q, id)
	if err == nil && m.Truncated {
		m, err = askOver(ctx, "tcp", server, query, q, id)
	}
	return m, err
}

func newQuery(name string, typ dnsmessage.Type) ([]byte, dnsmessage.Question, uint16, error) {
	n, err := dnsmessage.NewName(name + ".")
	if err != nil {
		return nil, dnsmessage.Question{}, 0, err
	}
	var id [2]byte
	rand.Read(id[:])
	q := dnsmessage.Question{Name: n, Type: typ, Class: dnsmessage.ClassINET}
	opt := dnsmessage.Resource{Body: &dnsmessage.OPTResource{}}
	if err := opt.Header.SetEDNS0(maxDatagram, dnsmessage.RCodeSuccess, false); err != nil {
		return nil, q, 0, err
	}
	m := dnsmessage.Message{
		Header:      dnsmessage.Header{ID: binary.BigEndian.Uint16(id[:]), RecursionDesired: true},
		Questions:   []dnsmessage.Question{q},
		Additionals: []dnsmessage.Resource{opt},
	}
	b, err := m.Pack()
	return b, q, m.ID, err
}

// askOver sends a query over a socket of its own, so that the port is as
// random as the ID, and waits for the answer to it.
func askOver(ctx context.Context, network string, server netip.AddrPort, query []byte, q dnsmessage.Question, id uint16) (dnsmessage.Message, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, server.String())
	if err != nil {
		return dnsmessage.Message{}, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if network == "tcp" {
		query = append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)
	}
	if _, err := conn.Write(query); err != nil {
		return dnsmessage.Message{}, err
	}
	buf := make([]byte, 4096)
	for {
		var n int
		if network == "tcp" {
			buf, err = readFramed(conn)
			n = len(buf)
		} else {
			n, err = conn.Read(buf)
		}
		if err != nil {
			return dnsmessage.Message{}, err
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:n]) == nil && answers(m, q, id) {
			return m, nil
		}
		// Not for us, or damaged: another may come until the deadline.
	}
}

func answers(m dnsmessage.Message, q dnsmessage.Question, id uint16) bool {
	return m.Response && m.ID == id && len(m.Questions) == 1 && m.Questions[0].Type == q.Type &&
		m.Questions[0].Class == q.Class && strings.EqualFold(m.Questions[0].Name.String(), q.Name.String())
}

// readFramed reads a message of DNS over TCP (RFC 1035, section 4.2.2).
func readFramed(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(r, b)
	return b, err
}
