package orchestrator_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/cayhq/cay"
)

// A snapshot of another format is refused by its number, and one whose number
// cannot be believed as damaged.
func TestFormatOfSnapshot(t *testing.T) {
	seal := func(b []byte) []byte { return fmt.Appendf(nil, "%ssha256:%x\n", b, sha256.Sum256(b)) }
	bare := func(b []byte) []byte { return b }
	for _, tc := range []struct {
		format int
		file   func([]byte) []byte
		want   cay.Code
	}{
		{1, bare, cay.CodeSnapshotIncompatible}, // as they were
		{1, seal, cay.CodeSnapshotIncompatible},
		{3, seal, cay.CodeSnapshotIncompatible},
		{2, seal, ""},
		{2, bare, cay.CodeSnapshotCorrupt}, // its end was cut off
		{3, bare, cay.CodeSnapshotCorrupt},
		{3, func(b []byte) []byte { return append(seal(b[1:]), b[0]) }, cay.CodeSnapshotCorrupt},
		{0, seal, cay.CodeSnapshotIncompatible},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			o, _ := open(t, w, 0)
			defer o.Close()
			mustCreate(t, o, "i1")
			q := cay.SaveRequest{Snapshot: cay.NewSnapshotID(), Memory: true, Pause: true}
			if _, err := o.Save(t.Context(), "i1", q); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(o.SnapshotDir, string(q.Snapshot), "manifest.json")
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b = b[:bytes.LastIndex(b, []byte("sha256:"))]
			other := bytes.Replace(b, []byte(`"format": 2`), fmt.Appendf(nil, `"format": %d`, tc.format), 1)
			if tc.format != cay.SnapshotFormat && bytes.Equal(b, other) {
				t.Fatalf("the manifest has no format:\n%s", b)
			}
			if err := os.WriteFile(path, tc.file(other), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err = o.Create(t.Context(), from("i1", q.Snapshot, cay.StartAuto))
			if cay.CodeOf(err) != tc.want || cay.CodeOf(o.VerifySnapshot(t.Context(), q.Snapshot)) != tc.want {
				t.Errorf("format %d: %v, want %q", tc.format, err, tc.want)
			}
			if tc.want == cay.CodeSnapshotIncompatible && !strings.Contains(err.Error(), fmt.Sprintf("has format %d; this build reads format 2", tc.format)) {
				t.Errorf("format %d: the answer does not say so: %v", tc.format, err)
			}
			if err := o.DeleteSnapshot(t.Context(), q.Snapshot); err != nil {
				t.Errorf("format %d: it cannot be deleted: %v", tc.format, err)
			}
		})
	}
}
