package main

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestNewestBuild(t *testing.T) {
	dir := t.TempDir()
	if _, err := newestBuild(dir); err == nil {
		t.Error("a build was found in an empty directory")
	}
	write(t, dir, map[string]string{"old/manifest.json": "", "new/manifest.json": "", "unfinished/candidate.json": ""})
	if err := os.Chtimes(filepath.Join(dir, "old", "manifest.json"), time.Time{}, time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if got, err := newestBuild(dir); got != "new" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestAnswers(t *testing.T) {
	var asked atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/health" || asked.Add(1) < 3 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	}))
	defer srv.Close()
	at := netip.MustParseAddrPort(strings.TrimPrefix(srv.URL, "http://"))
	if err := answers(t.Context(), at); err != nil || asked.Load() != 3 {
		t.Errorf("asked %d times: %v", asked.Load(), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := answers(ctx, at); !errors.Is(err, context.Canceled) {
		t.Errorf("after its context's end: %v", err)
	}
}

func TestLargestFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := largestFile(dir); err == nil {
		t.Error("a file was found in an empty directory")
	}
	write(t, dir, map[string]string{"a/small": "1", "b/c/large": "12345", "d": "123"})
	if got, err := largestFile(dir); got != filepath.Join(dir, "b", "c", "large") || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestRemoveWork(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"w/a/b": "1"})
	if err := removeWork(filepath.Join(dir, "w")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "w")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	// /proc, which is mounted below /, stands for a mount that was left.
	if err := removeWork(""); err == nil || !strings.Contains(err.Error(), "is still mounted") {
		t.Errorf("a directory with mounts in it: %v", err)
	}
}
