package envd

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

func TestNewMachineID(t *testing.T) {
	path := filepath.Join(t.TempDir(), "machine-id")
	if err := os.WriteFile(path, []byte("uninitialized, and longer than an ID is\n"), 0o444); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "dbus")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	form := regexp.MustCompile(`^[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}\n$`)
	seen := map[string]bool{}
	for range 100 {
		if err := newMachineID(path); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(link)
		if err != nil || !form.Match(b) {
			t.Fatalf("%q, %v", b, err)
		}
		seen[string(b)] = true
	}
	if len(seen) != 100 {
		t.Errorf("%d different IDs of 100", len(seen))
	}
}
