package gvisor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestInstallGofer(t *testing.T) {
	h := home(t.TempDir())
	files := func() (names []string) {
		ents, err := os.ReadDir(string(h))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range ents {
			names = append(names, e.Name())
		}
		return names
	}
	first, err := installGofer(h, []byte("one"))
	if err != nil {
		t.Fatal(err)
	}
	if again, err := installGofer(h, []byte("one")); err != nil || again != first {
		t.Errorf("the same program: %s, %v", again, err)
	}
	// One that was cut off, by whatever, is replaced.
	if err := os.Truncate(first, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := installGofer(h, []byte("one")); err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile(first); string(text) != "one" {
		t.Errorf("%q, %v", text, err)
	}
	second, err := installGofer(h, []byte("two"))
	if err != nil || second == first {
		t.Errorf("another program: %s, %v", second, err)
	}
	if got := files(); len(got) != 1 || got[0] != filepath.Base(second) {
		t.Errorf("there are %q; want the last one", got)
	}
	if none, err := installGofer(h, nil); err != nil || none != "" || len(files()) > 0 {
		t.Errorf("no program: %q, %v; left %q", none, err, files())
	}
	comma := home(filepath.Join(t.TempDir(), "a,b"))
	if path, err := installGofer(comma, []byte("one")); err == nil || path != "" || !strings.Contains(err.Error(), "comma") {
		t.Errorf("a path that cannot be named: %q, %v", path, err)
	}
}
