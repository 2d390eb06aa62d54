package orchestrator

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/wholefile"
	"github.com/cayhq/cay/runtime"
)

// recordFormat is the number of the record's format. A server that meets a
// number it does not know leaves that sandbox alone and says so.
const recordFormat = 1

// phase is what the node intends with a guest. It is written before the host
// is touched, so that after a crash the reconciler knows which way to roll.
type phase string

const (
	booting phase = "booting" // being made: roll back
	pooled  phase = "pooled"  // booted ahead, belongs to nobody: keep
	running phase = "running" // belongs to a sandbox: keep
	saving  phase = "saving"  // running, and a snapshot of it is being made
	ending  phase = "ending"  // being removed: roll forward
)

// legal lists the moves of a guest. Everything else is a defect.
var legal = map[phase][]phase{
	"":      {booting},
	booting: {pooled, running, ending},
	pooled:  {running, ending},
	running: {saving, ending},
	saving:  {running, ending},
	ending:  {},
}

// record is the node's own truth about one guest: enough to adopt it, or to
// remove every host object of it, without asking anybody. It is a file of mode
// 0600 named after the execution, because it holds the guest's tokens.
//
// It is not synced to disk: a record describes running processes, and what
// takes the page cache takes the processes too.
type record struct {
	Format    int             `json:"format"`
	Execution cay.ExecutionID `json:"execution"` // also the name of the engine's instance and of the disk
	Phase     phase           `json:"phase"`
	Build     cay.BuildID     `json:"build"`
	Resources cay.Resources   `json:"resources"`
	BootedAt  time.Time       `json:"bootedAt"`
	// Slot is the index of the network slot; -1 before one is held.
	Slot         int             `json:"slot"`
	Addr         string          `json:"addr,omitempty"`
	NetNS        string          `json:"netns,omitempty"`
	RootFS       string          `json:"rootfs,omitempty"`
	DiskImage    string          `json:"diskImage,omitempty"`
	ControlToken string          `json:"controlToken"`
	EnvdVersion  string          `json:"envdVersion,omitempty"`
	Steps        []cay.StartStep `json:"steps,omitempty"`
	// Envd is the envd that it has; empty in records of versions that did not
	// keep it. EnvdOther is one that it may have instead, while that is not
	// known.
	Envd      cay.Digest `json:"envd,omitempty"`
	EnvdOther cay.Digest `json:"envdOther,omitempty"`
	// Engine is the one that runs it.
	Engine runtime.Engine `json:"engine,omitzero"`
	// From is the snapshot it was made from, Restored that its memory came from
	// there, and Degraded why not, if that was wished for.
	From     cay.SnapshotID `json:"from,omitempty"`
	Restored bool           `json:"restored,omitempty"`
	Degraded string         `json:"degraded,omitempty"`

	// Untold: the guest has not been told yet which sandbox it is, nor its new
	// control token. It is given to nobody before that.
	Untold bool `json:"untold,omitempty"`

	// Set when the guest belongs to a sandbox.
	Sandbox      cay.SandboxID  `json:"sandbox,omitempty"`
	Team         cay.TeamID     `json:"team,omitempty"`
	Template     cay.TemplateID `json:"template,omitempty"`
	TrafficToken string         `json:"trafficToken,omitempty"`
	Ingress      cay.Ingress    `json:"ingress,omitzero"`
	StartedAt    time.Time      `json:"startedAt,omitzero"`
	Deadline     time.Time      `json:"deadline,omitzero"`

	// Egress is what it may reach; nil in records of versions that did not keep
	// it. The proxy's password has a field of its own, for a secret redacts
	// itself.
	Egress        *cay.Egress `json:"egress,omitempty"`
	ProxyPassword string      `json:"proxyPassword,omitempty"`

	// Set in phase saving: the snapshot in the making, and whether the sandbox
	// ends with it. They stay in phase ending, to tell what a pause made.
	Saving     cay.SnapshotID `json:"saving,omitempty"`
	SavePauses bool           `json:"savePauses,omitempty"`

	// Set in phase ending.
	EndReason  cay.EndReason `json:"endReason,omitempty"`
	EndMessage string        `json:"endMessage,omitempty"`
}

// setEgress keeps a policy.
func (r *record) setEgress(e cay.Egress) {
	r.Egress, r.ProxyPassword = &e, ""
	if e.Proxy != nil {
		r.ProxyPassword = e.Proxy.Password.Reveal()
	}
}

// egress returns the policy that was kept.
func (r record) egress() cay.Egress {
	if r.Egress == nil {
		return cay.Egress{}
	}
	e := *r.Egress
	if e.Proxy != nil {
		p := *e.Proxy
		p.Password = cay.Secret(r.ProxyPassword)
		e.Proxy = &p
	}
	return e
}

// seenEgress is the policy for whoever looks.
func (r record) seenEgress() cay.Egress {
	e := r.egress()
	if e.Proxy != nil {
		e.Proxy.Password = "" // a copy of egress's
	}
	return e
}

// records keeps record files in one directory.
type records struct{ dir string }

func (rs records) path(e cay.ExecutionID) string {
	return filepath.Join(rs.dir, string(e)+".json")
}

// write replaces the record's file atomically.
func (rs records) write(r record) error {
	return rs.writeAt(r, func(string) error { return nil })
}

// writeAt is write with a function that is called before each step and after the
// last; its error is the step's.
func (rs records) writeAt(r record, at func(step string) error) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encoding the record of %s: %w", r.Execution, err)
	}
	tmp := rs.path(r.Execution) + ".tmp"
	if err := at("before-write"); err != nil {
		return fmt.Errorf("writing the record of %s: %w", r.Execution, err)
	}
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		_ = os.Remove(tmp) // half of it, on a full disk
		return fmt.Errorf("writing the record of %s: %w", r.Execution, err)
	}
	err = at("before-rename")
	if err == nil {
		err = os.Rename(tmp, rs.path(r.Execution))
	}
	if err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("publishing the record of %s: %w", r.Execution, err)
	}
	_ = at("after")
	return nil
}

func (rs records) remove(e cay.ExecutionID) error {
	if err := wholefile.Remove(rs.path(e)); err != nil {
		return fmt.Errorf("removing the record of %s: %w", e, err)
	}
	return nil
}

// readAll returns every record, and an error per file that is not one. A
// half-written temporary file is removed: its rename never happened, so the
// state it describes was never entered.
func (rs records) readAll() ([]record, []error) {
	entries, err := os.ReadDir(rs.dir)
	if err != nil {
		return nil, []error{fmt.Errorf("reading the node's records: %w", err)}
	}
	var out []record
	var errs []error
	for _, e := range entries {
		name := e.Name()
		if strings.HasSuffix(name, ".tmp") {
			errs = appendErr(errs, os.Remove(filepath.Join(rs.dir, name)))
			continue
		}
		id, ok := strings.CutSuffix(name, ".json")
		if !ok {
			continue
		}
		b, err := os.ReadFile(filepath.Join(rs.dir, name))
		if err != nil {
			errs = append(errs, fmt.Errorf("reading the record %s: %w", name, err))
			continue
		}
		var r record
		if err := json.Unmarshal(b, &r); err != nil {
			errs = append(errs, fmt.Errorf("decoding the record %s: %w", name, err))
			continue
		}
		if r.Format != recordFormat || string(r.Execution) != id {
			errs = append(errs, fmt.Errorf("the record %s has format %d and names %q: not ours to touch", name, r.Format, r.Execution))
			continue
		}
		out = append(out, r)
	}
	return out, errs
}

func appendErr(errs []error, err error) []error {
	if err != nil {
		return append(errs, err)
	}
	return errs
}
