package envd

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

// Where Debian keeps what programs trust: systemBundle is what OpenSSL, Go and
// curl read, and update-ca-certificates(8) makes it anew of what is installed
// and of extraBundle.
const (
	systemBundle = "/etc/ssl/certs/ca-certificates.crt"
	extraBundle  = "/usr/local/share/ca-certificates/cay-egress.crt"
)

// trustEnv are for programs that bring certificates of their own and take the
// system's only when told. What the sandbox has set itself stays.
var trustEnv = map[string]string{
	"SSL_CERT_FILE":       systemBundle,
	"REQUESTS_CA_BUNDLE":  systemBundle,
	"NODE_EXTRA_CA_CERTS": extraBundle,
}

// trustAuthority has the guest's programs trust the authority of the node that
// ends their TLS where a rule changes their requests. Twice the same is no
// error.
func (s *Server) trustAuthority(bundle string) error {
	s.mu.Lock()
	st := s.state
	st.env = withTrust(st.env)
	s.state = st
	err := s.keep()
	s.mu.Unlock()
	if err != nil || !s.cfg.System {
		return err
	}
	return trust("/", bundle)
}

// withTrust returns an environment with trustEnv added.
func withTrust(env map[string]string) map[string]string {
	out := make(map[string]string, len(env)+len(trustEnv))
	for k, v := range trustEnv {
		out[k] = v
	}
	for k, v := range env {
		out[k] = v
	}
	return out
}

// trust adds certificates to the trust store of the root directory.
func trust(root, bundle string) error {
	if !strings.HasPrefix(bundle, "-----BEGIN CERTIFICATE-----\n") || !strings.HasSuffix(bundle, "\n") {
		return invalid("the bundle is not of certificates in PEM")
	}
	extra, system := filepath.Join(root, extraBundle), filepath.Join(root, systemBundle)
	for _, p := range []string{extra, system} {
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return fmt.Errorf("making the directory of trusted certificates: %w", err)
		}
	}
	if err := os.WriteFile(extra, []byte(bundle), 0o644); err != nil {
		return fmt.Errorf("trusting the node's authority: %w", err)
	}
	had, err := os.ReadFile(system)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading what the system trusts: %w", err)
	}
	if bytes.Contains(had, []byte(bundle)) {
		return nil
	}
	if len(had) > 0 && had[len(had)-1] != '\n' {
		bundle = "\n" + bundle
	}
	// Appended, so that a program that reads meanwhile sees what there was.
	f, err := os.OpenFile(system, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return fmt.Errorf("trusting the node's authority: %w", err)
	}
	_, err = f.WriteString(bundle)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("trusting the node's authority: %w", err)
	}
	return nil
}

// serveTrust is for a sandbox that got its first rule while it runs.
func (s *Server) serveTrust(w http.ResponseWriter, r *http.Request) {
	var q struct {
		CABundle string `json:"caBundle"`
	}
	if err := decodeInit(r, &q); err != nil {
		writeError(w, http.StatusBadRequest, "the body of /trust is not valid: "+err.Error())
		return
	}
	if err := s.trustAuthority(q.CABundle); err != nil {
		writeFault(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}
