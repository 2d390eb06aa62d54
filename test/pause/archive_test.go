package pause

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/test/program"
)

// A snapshot leaves the server in a file, comes back after it was deleted, and
// is what it was: its guest goes on where it stood. A file that is damaged or
// cut is refused, and leaves nothing.
func TestExportAndImport(t *testing.T) {
	server := program.Start(t, program.Options{})
	c := server.Client()
	s := c.Make(t, 10*time.Minute, nil)
	p, err := s.Start(t.Context(), "", counted)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Leave(); err != nil {
		t.Fatal(err)
	}
	s.Out(t, "head -c 40000000 /dev/urandom > big && sha256sum big > big.sum")
	_, pid := count(t, s)
	must := func(args ...string) string {
		t.Helper()
		r := server.Run(args...)
		if r.Code != 0 {
			t.Fatalf("cay %s: %s", strings.Join(args, " "), r)
		}
		return strings.TrimSpace(r.Stdout)
	}
	id := must("sandbox", "snapshot", s.ID)
	n, _ := count(t, s)
	file := filepath.Join(t.TempDir(), "warm.cay")
	began := time.Now()
	must("snapshot", "export", id, file)
	fi, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("exported %d MiB in %v", fi.Size()>>20, time.Since(began).Round(time.Millisecond))
	if fi.Mode().Perm() != 0o600 {
		t.Errorf("the file has mode %v: what was in the sandbox is nobody else's to read", fi.Mode())
	}
	must("snapshot", "delete", id)
	began = time.Now()
	again := must("snapshot", "import", file, "--name", "warm:v2")
	t.Logf("imported in %v", time.Since(began).Round(time.Millisecond))
	if got := must("snapshot", "verify", again); got != again || again == id {
		t.Errorf("imported as %s, verified as %s", again, got)
	}
	made, err := c.Create(t.Context(), 5*time.Minute, map[string]any{"templateID": "warm:v2"})
	if err != nil {
		t.Fatal(err)
	}
	later, who := count(t, made)
	if who != pid || later > n+1000 {
		t.Errorf("process %d of the imported snapshot counts, at %d; it was %d, at %d", who, later, pid, n)
	}
	if got := made.Out(t, "sha256sum -c big.sum"); got != "big: OK\n" {
		t.Errorf("the file in the imported snapshot: %q", got)
	}
	if err := made.Kill(t.Context()); err != nil {
		t.Error(err)
	}

	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	damaged := filepath.Join(t.TempDir(), "damaged.cay")
	for _, at := range []int{len(whole) / 10, len(whole) / 2, len(whole) - 100} {
		for what, b := range map[string][]byte{"cut": whole[:at], "flipped": append(append(append([]byte{}, whole[:at]...), whole[at]^4), whole[at+1:]...)} {
			if err := os.WriteFile(damaged, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if r := server.Run("snapshot", "import", damaged); r.Code != 1 || r.Stdout != "" || !strings.Contains(r.Stderr, "nothing was imported") {
				t.Errorf("%s at %d of %d: %s", what, at, len(whole), r)
			}
		}
	}
	if got := must("snapshot", "list", "-q"); got != again {
		t.Errorf("snapshots after the damaged ones: %q, want %s alone", got, again)
	}
	must("snapshot", "delete", "warm:v2")
	program.Eventually(t, 30*time.Second, func() string {
		left, err := filepath.Glob(filepath.Join(server.Dir, "snapshots", "*"))
		if err != nil || len(left) > 0 {
			return fmt.Sprintf("%q is left: %v", left, err)
		}
		return ""
	})
}
