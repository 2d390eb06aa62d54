// Package settings is the one declared table of what an operator can set, and
// where each value came from: default < file < environment < flag.
package settings

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/cayhq/cay"
)

// Settings are the values a server runs with.
type Settings struct {
	DataDir       string
	APIAddr       string
	ProxyAddr     string
	Domain        string // of sandbox URLs; empty: none
	Certificates  string // where those of Domain come from: off, files, local, acme
	TLSAddr       string
	CertFile      string
	KeyFile       string
	RedirectHTTP  string // on, off
	ACMEEmail     string
	ACMEDirectory string // empty: Let's Encrypt's
	ACMERoots     string
	ACMEDNS       string // "", rfc2136:<host:port>, exec:<path>
	ACMEDNSKey    string
	ACMEResolver  string
	MaxConns      int // of clients of the proxy; 0: as many as the process can have
	MaxPerClient  int // of one address of them; 0: half
	PoolSize      int // guests booted ahead per hot build
	EnginesAhead  int // per kind of guest lately saved or resumed
	SandboxCIDR   netip.Prefix
	MaxSandboxes  int
	// What no sandbox reaches, and what each may have, beside its own policy.
	RefusedRanges  []netip.Prefix
	ProxyRanges    []netip.Prefix // where sandboxes' own proxies may be, special or not
	Connections    int
	NewConnections int // a second
	Mbit           int // a second, in and out; 0: no bound
	DiskReserveMB  int
	CPUs           int // of a sandbox whose template says nothing
	MemoryMB       int
	DiskMB         int
	LogLevel       string
	LogFormat      string

	origin map[string]Origin
}

// Origin says where a value came from.
type Origin string

// The origins; a file or variable is named after a colon.
const (
	OriginDefault Origin = "default"
	originFile    Origin = "file:"
	originEnv     Origin = "env:"
	originFlag    Origin = "flag:"
)

// Setting is one row of the table.
type Setting struct {
	Name    string // in the file and, with "--", as a flag
	Env     string
	Default string
	Doc     string
	set     func(*Settings, string) error
	get     func(*Settings) string
}

// Table lists every setting.
var Table = []Setting{
	text("data-dir", "/var/lib/cay", "directory that holds everything Cay keeps", func(s *Settings) *string { return &s.DataDir }, absPath),
	text("api-addr", "127.0.0.1:3000", "address of the API; port 0 picks a free one", func(s *Settings) *string { return &s.APIAddr }, hostPort),
	text("proxy-addr", "127.0.0.1:3002", "address of the sandbox proxy; port 0 picks a free one", func(s *Settings) *string { return &s.ProxyAddr }, hostPort),
	text("domain", "", "domain of sandbox URLs, as in 3000-<id>.<domain>; empty uses headers only", func(s *Settings) *string { return &s.Domain }, domain),
	text("certificates", "off", "where the domain's certificates come from: off (a proxy in front has them), files, local (an authority of this machine's own, see cay trust) or acme",
		func(s *Settings) *string { return &s.Certificates }, oneOf("off", "files", "local", "acme")),
	text("tls-addr", "127.0.0.1:443", "address for HTTPS, to sandboxes and to the API at api.<domain>, unless certificates is off; port 0 picks a free one", func(s *Settings) *string { return &s.TLSAddr }, hostPort),
	text("cert-file", "", "with certificates files: the certificate of *.<domain> and its chain, in PEM, read again when it changes", func(s *Settings) *string { return &s.CertFile }, optionalPath),
	text("key-file", "", "with certificates files: its key, in PEM", func(s *Settings) *string { return &s.KeyFile }, optionalPath),
	text("redirect-http", "off", "on sends plain requests for names below the domain to HTTPS", func(s *Settings) *string { return &s.RedirectHTTP }, oneOf("off", "on")),
	text("acme-email", "", "with certificates acme: where the authority writes to", func(s *Settings) *string { return &s.ACMEEmail }, anything),
	text("acme-directory", "", "with certificates acme: URL of the authority's directory; empty is Let's Encrypt's", func(s *Settings) *string { return &s.ACMEDirectory }, httpsURL),
	text("acme-roots", "", "with certificates acme: PEM file of what vouches for a private authority", func(s *Settings) *string { return &s.ACMERoots }, optionalPath),
	text("acme-dns", "", "with certificates acme: how the TXT record of a wildcard is set, rfc2136:<server:port> or exec:<program>; empty asks for one certificate for each name", func(s *Settings) *string { return &s.ACMEDNS }, dnsWay),
	text("acme-dns-key", "", "with acme-dns rfc2136: file with the key, as tsig-keygen writes it", func(s *Settings) *string { return &s.ACMEDNSKey }, optionalPath),
	text("acme-resolver", "", "with acme-dns: name server that is asked whether the record is there, host:port; empty is the machine's", func(s *Settings) *string { return &s.ACMEResolver }, optionalHostPort),
	number("max-connections", 0, 0, 1<<20, "connections of clients to the proxy at once; 0 is 16384, or a third of the process's files if that is less", func(s *Settings) *int { return &s.MaxConns }),
	number("max-connections-per-client", 0, 0, 1<<20, "those of one address; 0 is half of them, without a limit for this machine's own", func(s *Settings) *int { return &s.MaxPerClient }),
	number("pool-size", 2, 0, 100, "sandboxes booted ahead for each template in use; 0 turns the pool off", func(s *Settings) *int { return &s.PoolSize }),
	number("engines-ahead", 2, 0, 20, "engines started ahead for resumes and forks, of each size of sandbox that was paused, saved or resumed in the last ten minutes; 0 is none", func(s *Settings) *int { return &s.EnginesAhead }),
	{Name: "sandbox-cidr", Env: env("sandbox-cidr"), Default: "10.193.0.0/16", Doc: "IPv4 range for the links between this machine and its sandboxes",
		set: func(s *Settings, v string) (err error) {
			s.SandboxCIDR, err = netip.ParsePrefix(v)
			if err != nil || !s.SandboxCIDR.Addr().Is4() {
				return errors.New("want an IPv4 range such as 10.193.0.0/16")
			}
			return nil
		}, get: func(s *Settings) string { return s.SandboxCIDR.String() }},
	number("max-sandboxes", 1000, 1, 100_000, "how many sandboxes this machine runs at most", func(s *Settings) *int { return &s.MaxSandboxes }),
	{Name: "refused-ranges", Env: env("refused-ranges"), Default: "", Doc: "further addresses and ranges that no sandbox reaches, whatever its policy; comma-separated",
		set: func(s *Settings, v string) (err error) { s.RefusedRanges, err = ranges(v); return err },
		get: func(s *Settings) string { return listed(s.RefusedRanges) }},
	{Name: "proxy-ranges", Env: env("proxy-ranges"), Default: "", Doc: "private or special addresses and ranges at which a sandbox's egress proxy may be all the same; comma-separated",
		set: func(s *Settings, v string) (err error) { s.ProxyRanges, err = ranges(v); return err },
		get: func(s *Settings) string { return listed(s.ProxyRanges) }},
	number("sandbox-connections", 8192, 1, 1<<20, "connections that a sandbox has open outwards at most", func(s *Settings) *int { return &s.Connections }),
	number("sandbox-connections-per-second", 1000, 1, 1<<20, "new connections that a sandbox opens a second, after a burst of twice as many", func(s *Settings) *int { return &s.NewConnections }),
	number("sandbox-mbit", 0, 0, 1_000_000, "Mbit/s into a sandbox, and out of it, what the proxy carries included; 0 is no bound", func(s *Settings) *int { return &s.Mbit }),
	number("disk-reserve-mb", 1024, 0, 1<<30, "MiB of the data directory's disk that new sandboxes must leave free", func(s *Settings) *int { return &s.DiskReserveMB }),
	number("cpus", 2, 1, 1024, "CPUs of a sandbox of the base template", func(s *Settings) *int { return &s.CPUs }),
	number("memory-mb", 1024, 128, 1<<20, "MiB of memory of a sandbox of the base template", func(s *Settings) *int { return &s.MemoryMB }),
	number("disk-mb", 10240, 64, 1<<24, "MiB a sandbox of the base template may write", func(s *Settings) *int { return &s.DiskMB }),
	text("log-level", "info", "debug, info, warn or error", func(s *Settings) *string { return &s.LogLevel }, oneOf("debug", "info", "warn", "error")),
	text("log-format", "auto", "text, json, or auto: text on a terminal", func(s *Settings) *string { return &s.LogFormat }, oneOf("auto", "text", "json")),
}

func env(name string) string {
	return "CAY_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

func text(name, def, doc string, at func(*Settings) *string, check func(string) (string, error)) Setting {
	return Setting{Name: name, Env: env(name), Default: def, Doc: doc,
		set: func(s *Settings, v string) (err error) { *at(s), err = check(v); return err },
		get: func(s *Settings) string { return *at(s) }}
}

func number(name string, def, lo, hi int, doc string, at func(*Settings) *int) Setting {
	return Setting{Name: name, Env: env(name), Default: strconv.Itoa(def), Doc: doc,
		set: func(s *Settings, v string) error {
			n, err := strconv.Atoi(v)
			if err != nil || n < lo || n > hi {
				return fmt.Errorf("want a number from %d to %d", lo, hi)
			}
			*at(s) = n
			return nil
		},
		get: func(s *Settings) string { return strconv.Itoa(*at(s)) }}
}

// ranges reads addresses and ranges.
func ranges(v string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for part := range strings.SplitSeq(v, ",") {
		part = strings.TrimSpace(part)
		if part == "" {
			continue
		}
		p, err := netip.ParsePrefix(part)
		if a, aerr := netip.ParseAddr(part); aerr == nil && a.Zone() == "" {
			p, err = netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
		}
		if err != nil {
			return nil, fmt.Errorf("%q is no address and no range such as 192.0.2.0/24", part)
		}
		out = append(out, p.Masked())
	}
	return out, nil
}

func listed(ps []netip.Prefix) string {
	out := make([]string, len(ps))
	for i, p := range ps {
		out[i] = p.String()
	}
	return strings.Join(out, ",")
}

func absPath(v string) (string, error) {
	if v == "" || strings.ContainsRune(v, 0) {
		return "", errors.New("want a directory")
	}
	return filepath.Abs(v)
}

func hostPort(v string) (string, error) {
	_, port, err := net.SplitHostPort(v)
	if err != nil {
		return "", errors.New("want address:port, such as 127.0.0.1:3000")
	}
	if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
		return "", errors.New("want a port from 0 to 65535")
	}
	return v, nil
}

func anything(v string) (string, error) { return v, nil }

func optionalPath(v string) (string, error) {
	if v == "" {
		return "", nil
	}
	return absPath(v)
}

func optionalHostPort(v string) (string, error) {
	if v == "" {
		return "", nil
	}
	return hostPort(v)
}

func httpsURL(v string) (string, error) {
	if u, err := url.Parse(v); v != "" && (err != nil || u.Scheme != "https" || u.Host == "") {
		return "", errors.New("want a URL that begins with https://")
	}
	return v, nil
}

func dnsWay(v string) (string, error) {
	how, what, _ := strings.Cut(v, ":")
	switch how {
	case "":
		return "", nil
	case "rfc2136":
		if _, err := hostPort(what); err == nil {
			return v, nil
		}
	case "exec":
		if filepath.IsAbs(what) {
			return v, nil
		}
	}
	return "", errors.New("want rfc2136:<server:port>, such as rfc2136:192.0.2.1:53, or exec:</absolute/path>")
}

func domain(v string) (string, error) {
	for _, label := range strings.Split(strings.ToLower(v), ".") {
		if v == "" {
			break
		}
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || strings.HasPrefix(label, "-") || strings.HasSuffix(label, "-") {
			return "", errors.New("want a domain name such as sbx.example.com, without a port")
		}
	}
	return strings.ToLower(v), nil
}

func oneOf(words ...string) func(string) (string, error) {
	return func(v string) (string, error) {
		if !slices.Contains(words, v) {
			return "", fmt.Errorf("want one of %s", strings.Join(words, ", "))
		}
		return v, nil
	}
}

// Sources are where values come from, weakest first after the defaults.
type Sources struct {
	// File is the path of a file of "name: value" lines; "" looks for
	// <data-dir>/config.yaml. A missing file is no error unless File is set.
	File string
	Env  func(string) (string, bool) // nil is os.LookupEnv
	// Flags holds the flags that were given, by name without dashes.
	Flags map[string]string
}

// Load puts the sources together. A wrong value is cay.CodeConfigInvalid and
// names the setting and its origin.
func Load(src Sources) (Settings, error) {
	s := Settings{origin: map[string]Origin{}}
	lookup := src.Env
	if lookup == nil {
		lookup = os.LookupEnv
	}
	for _, t := range Table {
		if err := s.apply(t, t.Default, OriginDefault); err != nil {
			return s, err
		}
	}
	// The data directory decides which file is read, so it is settled first.
	dirs := slices.Clone(Table[:1])
	if err := s.overlay(dirs, lookup, src.Flags); err != nil {
		return s, err
	}
	path, must := src.File, src.File != ""
	if !must {
		path = filepath.Join(s.DataDir, "config.yaml")
	}
	if err := s.readFile(path, must); err != nil {
		return s, err
	}
	if err := s.overlay(Table, lookup, src.Flags); err != nil {
		return s, err
	}
	return s, s.check()
}

// check looks at settings that need each other.
func (s *Settings) check() error {
	needs := func(ok bool, message, fix string) error {
		if ok {
			return nil
		}
		return invalid(message, fix)
	}
	switch s.Certificates {
	case "off":
		return needs(s.RedirectHTTP == "off", "redirect-http is on, and there is no HTTPS to send requests to", "choose certificates, or leave redirect-http off")
	case "files":
		if err := needs(s.CertFile != "" && s.KeyFile != "", "certificates is files, and cert-file or key-file is missing", "set both"); err != nil {
			return err
		}
	case "acme":
		if err := needs(s.ACMEDNSKey == "" || strings.HasPrefix(s.ACMEDNS, "rfc2136:"), "acme-dns-key is set, and acme-dns is not rfc2136", "set acme-dns to rfc2136:<server:port>"); err != nil {
			return err
		}
	}
	return needs(s.Domain != "", "certificates is "+s.Certificates+", and there is no domain that they could be for", "set domain, as in --domain sbx.example.com")
}

func (s *Settings) overlay(table []Setting, lookup func(string) (string, bool), flags map[string]string) error {
	for _, t := range table {
		if v, ok := lookup(t.Env); ok && v != "" {
			if err := s.apply(t, v, originEnv+Origin(t.Env)); err != nil {
				return err
			}
		}
		if v, ok := flags[t.Name]; ok {
			if err := s.apply(t, v, originFlag+Origin("--"+t.Name)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Settings) apply(t Setting, v string, from Origin) error {
	if err := t.set(s, v); err != nil {
		return invalid(fmt.Sprintf("the setting %s has the wrong value %q (from %s): %v", t.Name, v, from, err),
			"correct it there; `cay config show --origin` lists every setting")
	}
	s.origin[t.Name] = from
	return nil
}

func invalid(message, fix string) error {
	return &cay.Error{Code: cay.CodeConfigInvalid, Layer: cay.LayerHost, Message: message, Fix: fix}
}

// readFile reads "name: value" lines, the part of YAML that a flat table
// needs; comments begin with #.
func (s *Settings) readFile(path string, must bool) error {
	f, err := os.Open(path)
	// What is wrong with the data directory itself is said by who uses it.
	if (errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)) && !must {
		return nil
	}
	if err != nil {
		return invalid("the configuration file cannot be read: "+err.Error(), "correct the path, or leave it out")
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		at := Origin(fmt.Sprintf("%s%s:%d", originFile, path, n))
		name, value, ok := strings.Cut(line, ":")
		i := slices.IndexFunc(Table, func(t Setting) bool { return t.Name == strings.TrimSpace(name) })
		switch {
		case !ok:
			return invalid(fmt.Sprintf("%s is no \"name: value\" line: %q", at, line), "correct the line")
		case i < 0:
			return invalid(fmt.Sprintf("%s names the unknown setting %q", at, strings.TrimSpace(name)), "`cay config show` lists every setting")
		case Table[i].Name == "data-dir":
			return invalid(fmt.Sprintf("%s sets data-dir, but the file is found through it", at), "use --data-dir or "+Table[i].Env)
		}
		if err := s.apply(Table[i], unquote(strings.TrimSpace(value)), at); err != nil {
			return err
		}
	}
	if err := sc.Err(); err != nil {
		return invalid(fmt.Sprintf("the configuration file %s cannot be read: %v", path, err), "correct the file")
	}
	return nil
}

func unquote(v string) string {
	for _, q := range []string{`"`, `'`} {
		if len(v) >= 2 && strings.HasPrefix(v, q) && strings.HasSuffix(v, q) {
			return v[1 : len(v)-1]
		}
	}
	v, _, _ = strings.Cut(v, " #")
	return strings.TrimSpace(v)
}

// Value is a setting as it is in force.
type Value struct {
	Name   string `json:"name"`
	Value  string `json:"value"`
	Origin Origin `json:"origin"`
	Doc    string `json:"doc"`
}

// Values lists what is in force, in the table's order.
func (s *Settings) Values() []Value {
	out := make([]Value, len(Table))
	for i, t := range Table {
		out[i] = Value{Name: t.Name, Value: t.get(s), Origin: s.origin[t.Name], Doc: t.Doc}
	}
	return out
}
