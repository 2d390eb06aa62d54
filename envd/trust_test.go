package envd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const aBundle = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"

func TestTrust(t *testing.T) {
	for what, had := range map[string]string{"a store": "# Debian's\n", "a store without an end of line": "# Debian's", "no store": ""} {
		t.Run(what, func(t *testing.T) {
			root := t.TempDir()
			system := filepath.Join(root, systemBundle)
			if had != "" {
				must(t, os.MkdirAll(filepath.Dir(system), 0o755))
				must(t, os.WriteFile(system, []byte(had), 0o644))
			}
			for range 2 {
				must(t, trust(root, aBundle))
			}
			want := strings.TrimSuffix(had, "\n")
			if had != "" {
				want += "\n"
			}
			if b, err := os.ReadFile(system); err != nil || string(b) != want+aBundle {
				t.Errorf("the system trusts %q (%v)", b, err)
			}
			if b, err := os.ReadFile(filepath.Join(root, extraBundle)); err != nil || string(b) != aBundle {
				t.Errorf("beside it is %q (%v)", b, err)
			}
		})
	}
	for _, bad := range []string{"", "x", "-----BEGIN PRIVATE KEY-----\n", strings.TrimSuffix(aBundle, "\n")} {
		root := t.TempDir()
		if err := trust(root, bad); err == nil {
			t.Errorf("%q is trusted", bad)
		}
		if left, _ := os.ReadDir(root); len(left) > 0 {
			t.Errorf("%q leaves %v", bad, left)
		}
	}
}

// The sandbox's own choice stays, and nothing is changed in place.
func TestTrustEnv(t *testing.T) {
	had := map[string]string{"SSL_CERT_FILE": "/mine", "A": "b"}
	got := withTrust(had)
	if got["SSL_CERT_FILE"] != "/mine" || got["A"] != "b" || got["NODE_EXTRA_CA_CERTS"] != extraBundle || got["REQUESTS_CA_BUNDLE"] != systemBundle {
		t.Errorf("the environment is %v", got)
	}
	if len(had) != 2 {
		t.Errorf("the old environment became %v", had)
	}
}
