package program

import (
	"os"
	"path/filepath"
	"testing"
)

// OtherEnvd writes an envd that is the one of the program under test but for its
// digest, and returns what makes a server give it to sandboxes that run, for
// [Options.Env]. `make build` puts envd beside the program.
func OtherEnvd(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(filepath.Dir(Binary()), "envd"))
	if err != nil {
		t.Fatal(err)
	}
	return GiveEnvd(t, append(b, '\n'))
}

// GiveEnvd is OtherEnvd with any program.
func GiveEnvd(t testing.TB, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "envd")
	if err := os.WriteFile(path, content, 0o755); err != nil {
		t.Fatal(err)
	}
	return "CAY_ENVD=" + path
}
