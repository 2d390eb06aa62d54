package main

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestKillpoints(t *testing.T) {
	t.Setenv(killpointEnv, "")
	if killpoints() != nil {
		t.Error("there is a hook without a file")
	}
	file := filepath.Join(t.TempDir(), "armed")
	t.Setenv(killpointEnv, file)
	hook := killpoints()
	if err := hook("a.b"); err != nil {
		t.Errorf("nothing is armed, and a point fails with %v", err)
	}
	if err := os.WriteFile(file, []byte("kill x.y\nfail a.c\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := hook("a.b"); err != nil {
		t.Errorf("another point is armed, and this one fails with %v", err)
	}
	if err := hook("a.c"); err != syscall.EIO { //nolint:errorlint // the very one
		t.Errorf("the armed point fails with %v", err)
	}
	b, err := os.ReadFile(file + ".passed")
	if err != nil || string(b) != "a.b\na.b\na.c\n" {
		t.Errorf("passed: %q, %v", b, err)
	}
}
