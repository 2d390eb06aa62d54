package file

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob"
	"github.com/cayhq/cay/blob/blobtest"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestContract(t *testing.T) {
	blobtest.Run(t, func(t *testing.T) blob.Store { return open(t, t.TempDir()) })
}

func TestMemoryKeepsTheContractToo(t *testing.T) {
	blobtest.Run(t, func(t *testing.T) blob.Store { return &blobtest.Memory{} })
}

// files lists every file under dir.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			out = append(out, strings.TrimPrefix(p, dir+"/"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// A Put that fails at any step leaves the old object, or none, and no litter.
func TestPutFailsAtEveryStep(t *testing.T) {
	for _, step := range []string{"create", "write", "sync", "rename"} {
		for _, old := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s old=%v", step, old), func(t *testing.T) {
				dir := t.TempDir()
				s := open(t, dir)
				if old {
					if _, err := s.Put(t.Context(), "a/b", strings.NewReader("old")); err != nil {
						t.Fatal(err)
					}
				}
				before := files(t, dir)
				s.fault = func(at string) error {
					if at == step {
						return syscall.ENOSPC
					}
					return nil
				}
				_, err := s.Put(t.Context(), "a/b", bytes.NewReader(make([]byte, 100_000)))
				var e *cay.Error
				if !errors.As(err, &e) || e.Code != cay.CodeDiskFull || e.Fix == "" || e.Detail["key"] != "a/b" {
					t.Fatalf("Put = %v, want a typed %s", err, cay.CodeDiskFull)
				}
				if got := files(t, dir); strings.Join(got, " ") != strings.Join(before, " ") {
					t.Fatalf("files after the failure: %q, before: %q", got, before)
				}
			})
		}
	}
}

// What a killed process leaves in tmp is invisible, and removed once it is old.
func TestOpenRemovesStaleWrites(t *testing.T) {
	dir := t.TempDir()
	open(t, dir).Close()
	stale, young := filepath.Join(dir, tmpDir, "stale"), filepath.Join(dir, tmpDir, "young")
	for _, p := range []string{stale, young} {
		if err := os.WriteFile(p, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	past := time.Now().Add(-2 * staleAfter)
	if err := os.Chtimes(stale, past, past); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	if got := files(t, dir); strings.Join(got, " ") != "tmp/young" {
		t.Fatalf("files = %q, want only tmp/young", got)
	}
	if objs, err := s.List(t.Context(), ""); err != nil || len(objs) != 0 {
		t.Fatalf("List = %v, %v", objs, err)
	}
}

// A symbolic link planted in the directory does not lead out of it.
func TestNoEscape(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := open(t, dir)
	if err := os.Symlink(outside, filepath.Join(dir, objectsDir, "link")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Open(t.Context(), "link/secret"); err == nil {
		t.Fatal("an object outside of the directory was opened")
	}
	if _, err := s.Put(t.Context(), "link/x", strings.NewReader("x")); err == nil {
		t.Fatal("an object was written outside of the directory")
	}
	if got := files(t, outside); len(got) != 1 {
		t.Fatalf("files outside: %q", got)
	}
}

func TestCloseTwice(t *testing.T) {
	s := open(t, t.TempDir())
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "a", strings.NewReader("x")); err == nil {
		t.Fatal("Put on a closed store succeeded")
	}
}

func TestObjectsAreReadOnly(t *testing.T) {
	s := open(t, t.TempDir())
	if _, err := s.Put(t.Context(), "a", strings.NewReader("x")); err != nil {
		t.Fatal(err)
	}
	p, err := s.Path(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(p)
	if err != nil || fi.Mode().Perm() != 0o400 {
		t.Fatalf("mode = %v, %v", fi.Mode(), err)
	}
}

func FuzzCheckKey(f *testing.F) {
	for _, k := range []string{"", "a", "a/b", "../a", "a/..", "a//b", "\xff", "layers/sha256/00"} {
		f.Add(k)
	}
	f.Fuzz(func(t *testing.T, k string) {
		if CheckKey(blob.Key(k)) != nil {
			return
		}
		if !fs.ValidPath(k) || filepath.Clean(k) != k || len(k) > maxKey {
			t.Fatalf("accepted %q", k)
		}
	})
}
