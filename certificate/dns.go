package certificate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/libdns/libdns"
	"github.com/miekg/dns"
)

// DNS changes the records of a zone, for proofs.
type DNS interface {
	// Set adds a TXT record; others of the name stay. zone and name are fully
	// qualified, with a final dot.
	Set(ctx context.Context, zone, name, value string) error
	// Unset removes it.
	Unset(ctx context.Context, zone, name, value string) error
}

// provider is a [DNS] as certmagic wants it.
type provider struct{ dns DNS }

func (p provider) each(ctx context.Context, zone string, recs []libdns.Record, do func(ctx context.Context, zone, name, value string) error) ([]libdns.Record, error) {
	for i, r := range recs {
		rr := r.RR()
		if err := do(ctx, dns.Fqdn(zone), dns.Fqdn(libdns.AbsoluteName(rr.Name, zone)), rr.Data); err != nil {
			return recs[:i], err
		}
	}
	return recs, nil
}

// AppendRecords implements [libdns.RecordAppender].
func (p provider) AppendRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	return p.each(ctx, zone, recs, p.dns.Set)
}

// DeleteRecords implements [libdns.RecordDeleter].
func (p provider) DeleteRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	return p.each(ctx, zone, recs, p.dns.Unset)
}

// hookTimeout bounds one run of a hook.
const hookTimeout = 2 * time.Minute

// Hook is a [DNS] that runs a program: `hook present NAME VALUE` and
// `hook cleanup NAME VALUE`, as lego's exec provider does.
type Hook struct{ Path string }

// Set implements [DNS].
func (h Hook) Set(ctx context.Context, _, name, value string) error {
	return h.run(ctx, "present", name, value)
}

// Unset implements [DNS].
func (h Hook) Unset(ctx context.Context, _, name, value string) error {
	return h.run(ctx, "cleanup", name, value)
}

func (h Hook) run(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, hookTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.Path, args...)
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("running %s %s: %w: %s", h.Path, strings.Join(args, " "), err, bytes.TrimSpace(out[:min(len(out), 1000)]))
	}
	return nil
}

// Update is a [DNS] that changes records by RFC 2136, signed by a key (TSIG).
type Update struct {
	Server string // host:port of the primary server
	Key    TSIG   // the zero value signs nothing
}

// TSIG is a key that a DNS server shares with those who may change its zones.
type TSIG struct {
	Name, Algorithm, Secret string // names with a final dot; the secret in base64
}

// String keeps the secret out of logs.
func (k TSIG) String() string { return "TSIG key " + k.Name }

// GoString does so for %#v.
func (k TSIG) GoString() string { return k.String() }

const (
	updateTimeout = 30 * time.Second
	updateTTL     = 60
)

// Set implements [DNS].
func (u Update) Set(ctx context.Context, zone, name, value string) error {
	return u.send(ctx, zone, name, value, (*dns.Msg).Insert)
}

// Unset implements [DNS].
func (u Update) Unset(ctx context.Context, zone, name, value string) error {
	return u.send(ctx, zone, name, value, (*dns.Msg).Remove)
}

func (u Update) send(ctx context.Context, zone, name, value string, change func(*dns.Msg, []dns.RR)) error {
	m := new(dns.Msg)
	m.SetUpdate(zone)
	change(m, []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: updateTTL}, Txt: []string{value}}})
	c := &dns.Client{Net: "tcp", Timeout: updateTimeout}
	if u.Key != (TSIG{}) {
		c.TsigSecret = map[string]string{u.Key.Name: u.Key.Secret}
		m.SetTsig(u.Key.Name, u.Key.Algorithm, 300, time.Now().Unix())
	}
	answer, _, err := c.ExchangeContext(ctx, m, u.Server)
	if err != nil {
		return fmt.Errorf("changing %s at %s: %w", name, u.Server, err)
	}
	if answer.Rcode != dns.RcodeSuccess {
		return fmt.Errorf("changing %s at %s: the server answers %s", name, u.Server, dns.RcodeToString[answer.Rcode])
	}
	return nil
}

var (
	keyBlock     = regexp.MustCompile(`(?s)\bkey\s+"?([^"\s{]+)"?\s*\{(.*?)\}`)
	keyAlgorithm = regexp.MustCompile(`\balgorithm\s+"?([^"\s;]+)"?\s*;`)
	keySecret    = regexp.MustCompile(`\bsecret\s+"?([^"\s;]+)"?\s*;`)
)

// maxKeyFile bounds what is read as a key.
const maxKeyFile = 64 << 10

// ReadTSIG reads a key as BIND's tsig-keygen writes it.
func ReadTSIG(path string) (TSIG, error) {
	bad := func(err error) (TSIG, error) {
		return TSIG{}, invalid(err, "write it with: tsig-keygen NAME > FILE", "the key in %s cannot be used: %v", path, err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return bad(err)
	}
	if len(b) > maxKeyFile {
		return bad(errors.New("it is too long"))
	}
	k, err := parseTSIG(string(b))
	if err != nil {
		return bad(err)
	}
	return k, nil
}

func parseTSIG(text string) (TSIG, error) {
	m := keyBlock.FindStringSubmatch(text)
	if m == nil {
		return TSIG{}, errors.New(`want: key "name" { algorithm hmac-sha256; secret "…"; };`)
	}
	k := TSIG{Name: dns.CanonicalName(m[1]), Algorithm: dns.HmacSHA256}
	if a := keyAlgorithm.FindStringSubmatch(m[2]); a != nil {
		k.Algorithm = dns.CanonicalName(a[1])
	}
	switch k.Algorithm {
	case dns.HmacSHA1, dns.HmacSHA224, dns.HmacSHA256, dns.HmacSHA384, dns.HmacSHA512:
	default:
		return TSIG{}, fmt.Errorf("the algorithm %s is none of hmac-sha1 to hmac-sha512", strings.TrimSuffix(k.Algorithm, "."))
	}
	s := keySecret.FindStringSubmatch(m[2])
	if s == nil {
		return TSIG{}, errors.New("it has no secret")
	}
	k.Secret = s[1]
	return k, nil
}
