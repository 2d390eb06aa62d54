package edge

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/test/program"
)

// separate gives the tests' machine directories of its own, with what is there.
func separate(t *testing.T, dirs ...string) {
	t.Helper()
	for _, dir := range dirs {
		copied := program.NewDir() + ".copy"
		if r := program.RunCmd(exec.Command("cp", "-a", dir, copied)); r.Code != 0 {
			t.Fatal(r)
		}
		if err := unix.Mount(copied, dir, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
}

// After `cay trust` a program that knows nothing of Cay accepts the sandbox's
// address; after --remove it does not.
func TestTrust(t *testing.T) {
	separate(t, "/usr/local/share/ca-certificates", "/etc/ssl/certs")
	e := startEdge(t)
	e.box = e.inhabit(t, nil)
	home := t.TempDir()
	trust := func(args ...string) program.Result {
		cmd := exec.CommandContext(t.Context(), program.Binary(), append([]string{"trust", "--data-dir", e.Dir}, args...)...)
		cmd.Env = append(e.Env(), "HOME="+home)
		return program.RunCmd(cmd)
	}
	visit := func() program.Result {
		return program.RunCmd(exec.CommandContext(t.Context(), "curl", "-sS", "https://"+e.host(8080)+"/hello"))
	}
	if r := visit(); r.Code != 60 {
		t.Fatalf("before: %s", r)
	}
	for range 2 { // a second time is no error
		if r := trust(); r.Code != 0 || !strings.Contains(r.Stdout, "export NODE_EXTRA_CA_CERTS="+e.caFile) {
			t.Fatal(r)
		}
	}
	if r := visit(); r.Code != 0 || !strings.HasPrefix(r.Stdout, "hello ") {
		t.Errorf("trusted: %s", r)
	}
	var rep struct {
		Checks []struct{ ID, Verdict, Evidence string }
	}
	if err := json.Unmarshal([]byte(e.Run("doctor", "--json").Stdout), &rep); err != nil {
		t.Fatal(err)
	}
	for _, c := range rep.Checks {
		if c.ID == "network.certificate" && c.Verdict != "ok" {
			t.Errorf("%+v", c)
		}
	}
	if _, err := exec.LookPath("certutil"); err == nil {
		if _, err := os.Stat(filepath.Join(home, ".pki", "nssdb", "cert9.db")); err != nil {
			t.Error(err)
		}
	}
	// It is the same authority after a restart, and vouches for nothing else.
	e.Restart(t)
	if r := visit(); r.Code != 0 {
		t.Errorf("after a restart: %s", r)
	}
	if r := trust("--remove"); r.Code != 0 {
		t.Fatal(r)
	}
	if r := visit(); r.Code != 60 {
		t.Errorf("after --remove: %s", r)
	}
	if r := trust("--remove"); r.Code != 0 || !strings.Contains(r.Stdout, "did not trust") {
		t.Errorf("--remove again: %s", r)
	}
}
