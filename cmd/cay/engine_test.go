package main

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func packed(t *testing.T, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestUnpackEngine(t *testing.T) {
	dir := t.TempDir()
	first := packed(t, "#!/bin/sh\n")
	path, err := unpackEngine(first, dir)
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string) os.FileInfo {
		t.Helper()
		data, err := os.ReadFile(path)
		st, serr := os.Stat(path)
		if err != nil || serr != nil || string(data) != "#!/bin/sh\n" || st.Mode() != 0o755 {
			t.Fatalf("%s: %q, %v, %v", what, data, err, serr)
		}
		return st
	}
	made := check("unpacked")
	again := func(what string) {
		t.Helper()
		if p, err := unpackEngine(first, dir); p != path || err != nil {
			t.Fatalf("%s: %s, %v", what, p, err)
		}
	}
	again("found")
	if !os.SameFile(made, check("found")) {
		t.Error("what was there was written again")
	}
	if err := os.Truncate(path, 3); err != nil {
		t.Fatal(err)
	}
	again("cut off")
	check("replaced")

	other, err := unpackEngine(packed(t, "another"), dir)
	if err != nil || other == path {
		t.Fatalf("another version is %s, %v", other, err)
	}
	files := engineFiles{dir}
	half := filepath.Join(dir, newEngine+"1")
	if err := os.WriteFile(half, []byte("#!"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := []string{filepath.Base(path), filepath.Base(other)}
	slices.Sort(want)
	if got, err := files.List(); err != nil || !slices.Equal(got, want) {
		t.Errorf("the programs are %v, %v; want %v", got, err, want)
	}
	files.removeHalf(slog.New(slog.DiscardHandler))
	if _, err := os.Stat(half); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what a crash left of unpacking: %v", err)
	}
	if err := errors.Join(files.Remove(filepath.Base(path)), files.Remove(filepath.Base(path))); err != nil {
		t.Error(err)
	}
	if got, err := files.List(); err != nil || !slices.Equal(got, []string{filepath.Base(other)}) {
		t.Errorf("after the removal of one: %v, %v", got, err)
	}
	if got, err := (engineFiles{filepath.Join(dir, "absent")}).List(); err != nil || got != nil {
		t.Errorf("of a directory that is not there: %v, %v", got, err)
	}
}

func TestUnpackEngineDamaged(t *testing.T) {
	whole := packed(t, "content")
	for name, data := range map[string][]byte{"empty": nil, "cut off": whole[:len(whole)-1], "no gzip": []byte("0123456789")} {
		dir := t.TempDir()
		if path, err := unpackEngine(data, dir); err == nil {
			t.Errorf("%s: unpacked to %s", name, path)
		}
		if entries, _ := os.ReadDir(dir); len(entries) > 0 {
			t.Errorf("%s: left %v", name, entries)
		}
	}
}
