package wholefile

import (
	"os"
	"path/filepath"
	"testing"
)

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, c := range []struct {
		content string
		mode    os.FileMode
	}{{"a secret", 0o600}, {"", 0o644}, {"for all", 0o755}} {
		if err := Write(path, []byte(c.content), c.mode); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil || string(b) != c.content {
			t.Errorf("it holds %q, %v, want %q", b, err, c.content)
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != c.mode {
			t.Errorf("its mode is %v, %v, want %v", fi.Mode(), err, c.mode)
		}
	}
	alone(t, dir, "f")
}

// What cannot be replaced stays, and nothing is left beside it.
func TestWriteRefused(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.MkdirAll(filepath.Join(path, "full"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Write(path, []byte("x"), 0o600); err == nil {
		t.Error("a directory was replaced")
	}
	alone(t, dir, "f")
	if err := Write(filepath.Join(dir, "no", "f"), []byte("x"), 0o600); !os.IsNotExist(err) {
		t.Errorf("without its directory: %v", err)
	}
}

func alone(t *testing.T, dir, name string) {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil || len(all) != 1 || all[0].Name() != name {
		t.Errorf("the directory holds %v, %v", all, err)
	}
}

func TestRemove(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it is absent
		if err := Remove(path); err != nil {
			t.Error(err)
		}
		if all, err := os.ReadDir(dir); err != nil || len(all) > 0 {
			t.Errorf("the directory holds %v, %v", all, err)
		}
	}
	if err := os.MkdirAll(filepath.Join(path, "full"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Remove(path); err == nil {
		t.Error("a directory that is not empty is said to be removed")
	}
}
