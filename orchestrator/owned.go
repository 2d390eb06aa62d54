package orchestrator

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cayhq/cay"
)

// Owned returns what the records in dir name: executions, which are also the
// names of engine instances and disks, and network slots. It only reads, so it
// may run beside an orchestrator, and needs none. A record that cannot be read
// is in the error; the rest is returned with it.
func Owned(dir string) (executions []string, slots []int, err error) {
	recs, errs := readRecords(dir)
	for _, r := range recs {
		executions = append(executions, string(r.Execution))
		if r.Slot >= 0 {
			slots = append(slots, r.Slot)
		}
	}
	return executions, slots, errors.Join(errs...)
}

// EnvdHolders returns the sandboxes whose record is in dir by the envd that they
// have; those of whom that is not known are under "". It only reads, as Owned.
func EnvdHolders(dir string) (map[cay.Digest][]cay.SandboxID, error) {
	recs, errs := readRecords(dir)
	out := map[cay.Digest][]cay.SandboxID{}
	for _, r := range recs {
		if r.Sandbox != "" && r.Phase != ending {
			out[r.Envd] = append(out[r.Envd], r.Sandbox)
		}
	}
	return out, errors.Join(errs...)
}

// readRecords reads the records in a directory and changes nothing there.
func readRecords(dir string) (recs []record, errs []error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // absent: nothing was ever started
		return nil, []error{fmt.Errorf("reading the node's records: %w", err)}
	}
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".json" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // the sandbox has just ended
		}
		var r record
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err == nil && r.Format != recordFormat {
			err = fmt.Errorf("it has format %d, not %d", r.Format, recordFormat)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("reading the record %s: %w", e.Name(), err))
			continue
		}
		recs = append(recs, r)
	}
	return recs, errs
}
