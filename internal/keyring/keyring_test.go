package keyring

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay"
)

func open(t *testing.T, path string) *Ring {
	t.Helper()
	r, err := Open(path, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func seal(t *testing.T, r *Ring, context string, v cay.Secret) (string, []byte) {
	t.Helper()
	id, b, err := r.Seal(context, v)
	if err != nil {
		t.Fatal(err)
	}
	return id, b
}

func TestRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.json")
	r := open(t, path)
	if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o600 {
		t.Errorf("the file of keys: %v, %v", fi.Mode(), err)
	}
	id, a := seal(t, r, "here", "canary")
	_, b := seal(t, r, "here", "canary")
	if bytes.Equal(a, b) {
		t.Error("the same value is sealed to the same bytes")
	}
	if bytes.Contains(a, []byte("canary")) {
		t.Error("the value is in what was sealed")
	}
	if got, err := open(t, path).Open("here", id, a); err != nil || got != "canary" {
		t.Errorf("after a restart: %q, %v", got.Reveal(), err)
	}
	if got, err := r.Open("here", id, second(seal(t, r, "here", ""))); err != nil || got != "" {
		t.Errorf("an empty value: %q, %v", got.Reveal(), err)
	}
}

func second(_ string, b []byte) []byte { return b }

// What is not as it was sealed cannot be opened.
func TestRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.json")
	r := open(t, path)
	id, sealed := seal(t, r, "here", "canary")
	for i := range sealed {
		b := bytes.Clone(sealed)
		b[i] ^= 1
		if _, err := r.Open("here", id, b); cay.CodeOf(err) != cay.CodeObjectCorrupt {
			t.Fatalf("byte %d altered: %v", i, err)
		}
	}
	for what, try := range map[string]func() (cay.Secret, error){
		"another context": func() (cay.Secret, error) { return r.Open("there", id, sealed) },
		"another key":     func() (cay.Secret, error) { return r.Open("here", "k0", sealed) },
		"nothing":         func() (cay.Secret, error) { return r.Open("here", id, nil) },
		"less":            func() (cay.Secret, error) { return r.Open("here", id, sealed[:11]) },
	} {
		if got, err := try(); cay.CodeOf(err) != cay.CodeObjectCorrupt || got != "" || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %q, %v", what, got.Reveal(), err)
		}
	}
}

// A key is added while others use the file.
func TestRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.json")
	server, operator := open(t, path), open(t, path)
	old, before := seal(t, server, "x", "one")
	added, err := operator.Add()
	if err != nil {
		t.Fatal(err)
	}
	if now, err := server.Current(); err != nil || now != added {
		t.Errorf("the key that seals is %s, %v; want %s", now, err, added)
	}
	id, after := seal(t, server, "x", "two")
	if id != added {
		t.Errorf("a new value is sealed under %s, want %s", id, added)
	}
	for _, r := range []*Ring{server, operator, open(t, path)} {
		if got, err := r.Open("x", old, before); err != nil || got != "one" {
			t.Errorf("a value of the old key: %q, %v", got.Reveal(), err)
		}
		if got, err := r.Open("x", id, after); err != nil || got != "two" {
			t.Errorf("a value of the new key: %q, %v", got.Reveal(), err)
		}
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o600 {
		t.Errorf("the file of keys: %v, %v", fi.Mode(), err)
	}
	if all, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*")); len(all) != 1 {
		t.Errorf("left over: %v", all)
	}
}

func TestDamaged(t *testing.T) {
	for what, text := range map[string]string{
		"empty": "", "no JSON": "canary", "no keys": `{"format":1}`, "another format": `{"format":2,"keys":[{"id":"k1","key":"canary"}]}`,
		"a short key": `{"format":1,"keys":[{"id":"k1","key":"canary"}]}`, "wrong type": `{"format":1,"keys":"canary"}`,
	} {
		path := filepath.Join(t.TempDir(), "keys.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(path, time.Now)
		if cay.CodeOf(err) != cay.CodeDataDirInvalid || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v", what, err)
		}
		if b, _ := os.ReadFile(path); string(b) != text {
			t.Errorf("%s: the file was overwritten", what)
		}
	}
	if _, err := Open(filepath.Join(t.TempDir(), "none", "keys.json"), time.Now); cay.CodeOf(err) != cay.CodeDataDirInvalid {
		t.Errorf("without a directory: %v", err)
	}
}
