package certificate

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/wholefile"
)

// Trust is what this machine trusts: the store that most programs read, and
// that of browsers in a home directory.
type Trust struct {
	Root string // the directory that "/" is; a test has its own
	Home string // whose browsers are told; empty: nobody's
	// Run runs a program and returns its output; nil is the real thing.
	Run func(ctx context.Context, name string, args ...string) ([]byte, error)
}

// anchors are the places where distributions take authorities from, and what
// puts them in force.
var anchors = []struct {
	dir, ext string
	update   []string
}{
	{"/usr/local/share/ca-certificates", ".crt", []string{"update-ca-certificates"}},           // Debian, Ubuntu, Alpine
	{"/etc/pki/ca-trust/source/anchors", ".pem", []string{"update-ca-trust", "extract"}},       // Fedora, RHEL
	{"/etc/ca-certificates/trust-source/anchors", ".crt", []string{"trust", "extract-compat"}}, // Arch
	{"/usr/share/pki/trust/anchors", ".pem", []string{"update-ca-certificates"}},               // SUSE
}

// browserDB is where Chromium looks, below a home directory.
const browserDB = ".pki/nssdb"

// Done says what was changed.
type Done struct {
	Store   string   // the file in the machine's store
	Browser string   // the browsers' database; empty if it was not changed
	Notes   []string // what was not done, and how to do it
}

// Install has the machine trust an authority. Doing it again is no error.
func (t *Trust) Install(ctx context.Context, caFile string) (Done, error) {
	ca, raw, err := readAuthority(caFile)
	if err != nil {
		return Done{}, err
	}
	at, err := t.anchor()
	if err != nil {
		return Done{}, err
	}
	var d Done
	d.Store = filepath.Join(anchors[at].dir, fileName(ca)+anchors[at].ext)
	if err := wholefile.Write(filepath.Join(t.Root, d.Store), raw, 0o644); err != nil {
		return d, storeError(err)
	}
	if err := t.update(ctx, at); err != nil {
		return d, err
	}
	db, note := t.browser()
	if note != "" {
		d.Notes = append(d.Notes, note)
	}
	if db != "" {
		if _, err := os.Stat(strings.TrimPrefix(db, "sql:")); errors.Is(err, fs.ErrNotExist) {
			if err := os.MkdirAll(strings.TrimPrefix(db, "sql:"), 0o700); err != nil {
				return d, storeError(err)
			}
			if out, err := t.run(ctx, "certutil", "-N", "-d", db, "--empty-password"); err != nil {
				return d, fmt.Errorf("making the browsers' database %s: %w: %s", db, err, out)
			}
		}
		if out, err := t.run(ctx, "certutil", "-A", "-d", db, "-t", "C,,", "-n", nickname(ca), "-i", caFile); err != nil {
			return d, fmt.Errorf("telling the browsers' database %s: %w: %s", db, err, out)
		}
		d.Browser = db
	}
	return d, nil
}

// Remove takes back what Install did, also when the authority's own file is
// gone: then every authority of Cay for the domain goes.
func (t *Trust) Remove(ctx context.Context, caFile, domain string) (Done, error) {
	at, err := t.anchor()
	if err != nil {
		return Done{}, err
	}
	var d Done
	dir := filepath.Join(t.Root, anchors[at].dir)
	found, err := filepath.Glob(filepath.Join(dir, filePrefix(domain)+strings.Repeat("[0-9a-f]", 8)+anchors[at].ext))
	if err != nil {
		return d, err
	}
	for _, path := range found {
		if err := wholefile.Remove(path); err != nil {
			return d, storeError(err)
		}
		d.Store = filepath.Join(anchors[at].dir, filepath.Base(path))
	}
	if len(found) > 0 {
		if err := t.update(ctx, at); err != nil {
			return d, err
		}
	}
	ca, _, err := readAuthority(caFile)
	if err != nil {
		return d, nil // its name in the browsers' database is in it; a database without it is as good
	}
	if db, _ := t.browser(); db != "" {
		if _, err := t.run(ctx, "certutil", "-D", "-d", db, "-n", nickname(ca)); err == nil {
			d.Browser = db
		}
	}
	return d, nil
}

// Installed reports whether the machine's store has an authority.
func (t *Trust) Installed(caFile string) bool {
	ca, _, err := readAuthority(caFile)
	if err != nil {
		return false
	}
	at, err := t.anchor()
	if err != nil {
		return false
	}
	_, err = os.Stat(filepath.Join(t.Root, anchors[at].dir, fileName(ca)+anchors[at].ext))
	return err == nil
}

func (t *Trust) anchor() (int, error) {
	for i, a := range anchors {
		if st, err := os.Stat(filepath.Join(t.Root, a.dir)); err == nil && st.IsDir() {
			return i, nil
		}
	}
	return 0, &cay.Error{Code: cay.CodeHostUnsupported, Layer: cay.LayerHost,
		Message: "this machine has no store of authorities that Cay knows",
		Fix:     "install ca-certificates, or give clients the file: NODE_EXTRA_CA_CERTS for Node, SSL_CERT_FILE for Python"}
}

func (t *Trust) update(ctx context.Context, at int) error {
	argv := anchors[at].update
	if out, err := t.run(ctx, argv[0], argv[1:]...); err != nil {
		return &cay.Error{Code: cay.CodeHostUnsupported, Layer: cay.LayerHost,
			Message: fmt.Sprintf("%s ended with %v: %s", strings.Join(argv, " "), err, strings.TrimSpace(string(out))),
			Fix:     "run it by hand; the file is in " + anchors[at].dir, Err: err}
	}
	return nil
}

// browser returns the database to change; a note says why there is none.
func (t *Trust) browser() (db, note string) {
	if t.Home == "" {
		return "", ""
	}
	if t.Run == nil {
		if _, err := exec.LookPath("certutil"); err != nil {
			return "", "Chromium and Firefox have stores of their own: install certutil (libnss3-tools, nss-tools) and run this again"
		}
	}
	return "sql:" + filepath.Join(t.Root, t.Home, browserDB), ""
}

func (t *Trust) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	if t.Run != nil {
		return t.Run(ctx, name, args...)
	}
	return exec.CommandContext(ctx, name, args...).CombinedOutput()
}

func readAuthority(path string) (*x509.Certificate, []byte, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, invalid(err, "start the server once with --certificates local, which makes it", "there is no local authority: %v", err)
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, nil, invalid(nil, "remove it, and have the server make it anew", "%s is no certificate", path)
	}
	ca, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, nil, invalid(err, "remove it, and have the server make it anew", "%s is no certificate: %v", path, err)
	}
	return ca, raw, nil
}

func filePrefix(domain string) string { return "cay-" + domain + "-" }

func fileName(ca *x509.Certificate) string {
	domain := "any"
	if len(ca.PermittedDNSDomains) == 1 {
		domain = ca.PermittedDNSDomains[0]
	}
	return filePrefix(domain) + fingerprint(ca)
}

func nickname(ca *x509.Certificate) string { return ca.Subject.CommonName + " " + fingerprint(ca) }

func storeError(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return &cay.Error{Code: cay.CodePrivilege, Layer: cay.LayerHost,
			Message: "the machine's store of authorities cannot be written: " + err.Error(), Fix: "run it as root, for example with sudo", Err: err}
	}
	return fmt.Errorf("changing the machine's store of authorities: %w", err)
}
