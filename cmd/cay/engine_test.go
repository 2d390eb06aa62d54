package main

import (
	"bytes"
	"compress/gzip"
	"log/slog"
	"os"
	"path/filepath"
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
	removeOthers(dir, filepath.Base(other), slog.New(slog.DiscardHandler))
	entries, _ := os.ReadDir(dir)
	if len(entries) != 1 || entries[0].Name() != filepath.Base(other) {
		t.Errorf("the directory holds %v", entries)
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
