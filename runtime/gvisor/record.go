package gvisor

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/runtime"
)

// recordFormat is the number of the record's format.
const recordFormat = 1

// creating is the state of an instance whose Create has not returned. It is in
// records only.
const creating runtime.State = "creating"

// record is what is kept of an instance on disk, for the next supervisor.
// Secrets are not in it: the environment is in gVisor's spec, mode 0600.
type record struct {
	Format    int                `json:"format"`
	ID        runtime.InstanceID `json:"id"`
	Engine    string             `json:"engine"` // version that created it
	Boot      string             `json:"boot"`   // boot of the machine that it belongs to
	State     runtime.State      `json:"state"`
	CreatedAt time.Time          `json:"createdAt"`
	Labels    map[string]string  `json:"labels,omitempty"`
	Sentry    processID          `json:"sentry"`
	Gofer     processID          `json:"gofer"`
	Exit      *runtime.Exit      `json:"exit,omitempty"`
	// Kind is that of the guest; Restore is its spec's.
	Kind    kind `json:"kind,omitzero"`
	Restore bool `json:"restore,omitempty"`
	// Sandbox and NetNS are set where the engine was started before the guest
	// was known: gVisor's ID for it, and the guest's network namespace.
	Sandbox runtime.InstanceID `json:"sandbox,omitempty"`
	// Loading says that the guest may still read the memory it is restored from.
	Loading bool   `json:"loading,omitempty"`
	NetNS   string `json:"netNS,omitempty"`
}

// sandbox is the ID that gVisor knows the instance by.
func (r record) sandbox() runtime.InstanceID {
	if r.Sandbox != "" {
		return r.Sandbox
	}
	return r.ID
}

// bootID names the current boot of the machine (random(4)).
var bootID = sync.OnceValue(func() string {
	data, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data))
})

// save writes the record so that a reader sees the old or the new one. It is
// not synced: it has to outlive the supervisor, not the machine.
func (r record) save(path string) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encoding the record: %w", err)
	}
	if err := os.WriteFile(path+".tmp", data, 0o600); err != nil {
		return fmt.Errorf("writing the record: %w", err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return fmt.Errorf("publishing the record: %w", err)
	}
	return nil
}

func loadRecord(path string) (record, error) {
	var r record
	data, err := os.ReadFile(path)
	if err != nil {
		return r, fmt.Errorf("reading the record: %w", err)
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("decoding the record: %w", err)
	}
	if r.Format != recordFormat {
		return r, fmt.Errorf("the record has format %d, not %d", r.Format, recordFormat)
	}
	return r, nil
}
