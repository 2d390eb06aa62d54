package sqlite_test

import (
	"path/filepath"
	"testing"

	"github.com/cayhq/cay/store"
	"github.com/cayhq/cay/store/sqlite"
	"github.com/cayhq/cay/store/storetest"
)

func open(t testing.TB, path string) *sqlite.Store {
	t.Helper()
	s := sqlite.New(path)
	if err := s.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func file(t testing.TB) string { return filepath.Join(t.TempDir(), "cay.db") }

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store { return open(t, file(t)) })
}
