package orchestrator

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestOwned(t *testing.T) {
	rs := records{t.TempDir()}
	for _, r := range []record{
		{Format: recordFormat, Execution: "xa", Phase: running, Slot: 3},
		{Format: recordFormat, Execution: "xb", Phase: booting, Slot: -1},
		{Format: recordFormat + 1, Execution: "xc", Phase: running, Slot: 4},
	} {
		if err := rs.write(r); err != nil {
			t.Fatal(err)
		}
	}
	// What a writer has under way stays untouched.
	tmp := filepath.Join(rs.dir, "xd.json.tmp")
	if err := os.WriteFile(tmp, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	executions, slots, err := Owned(rs.dir)
	if err == nil || !strings.Contains(err.Error(), "xc.json") {
		t.Errorf("a record of another format: error %v, want one that names it", err)
	}
	if diff := cmp.Diff([]string{"xa", "xb"}, executions); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]int{3}, slots); diff != "" {
		t.Error(diff)
	}
	if _, err := os.Stat(tmp); err != nil {
		t.Error(err)
	}
	if _, _, err := Owned(filepath.Join(rs.dir, "xa.json")); err == nil {
		t.Error("records that cannot be read pass for none")
	}
	if e, s, err := Owned(filepath.Join(rs.dir, "absent")); e != nil || s != nil || err != nil {
		t.Errorf("no records: %v, %v, %v", e, s, err)
	}
}
