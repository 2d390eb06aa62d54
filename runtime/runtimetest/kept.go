package runtimetest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cayhq/cay/internal/wholefile"
	"github.com/cayhq/cay/runtime"
)

// kept is an instance in a machine's directory.
type kept struct {
	Spec   runtime.Spec     `json:"spec"`
	State  runtime.Instance `json:"state"`
	Memory string           `json:"memory"`
}

func (m *Machine) path(id runtime.InstanceID) string { return filepath.Join(m.Dir, string(id)+".json") }

// keep writes the guest to its machine's directory; the old file or the new one
// is there at every instant. g.mu is held. A test whose directory does not work
// is over.
func (g *Guest) keep() {
	if g.machine == nil || g.machine.Dir == "" {
		return
	}
	b, err := json.Marshal(kept{g.Spec, g.state, g.memory})
	path := g.machine.path(g.Spec.ID)
	if err == nil {
		err = errors.Join(os.WriteFile(path+".tmp", b, 0o600), os.Rename(path+".tmp", path))
	}
	if err != nil {
		panic(fmt.Sprintf("keeping an instance of the fake: %v", err))
	}
}

// forget removes an instance from the directory.
func (m *Machine) forget(id runtime.InstanceID) {
	if m.Dir == "" {
		return
	}
	if err := wholefile.Remove(m.path(id)); err != nil {
		panic(fmt.Sprintf("forgetting an instance of the fake: %v", err))
	}
}

// read takes up what an earlier process kept.
func (m *Machine) read(now func() time.Time) {
	if m.Dir == "" {
		return
	}
	files, err := filepath.Glob(filepath.Join(m.Dir, "*.json"))
	if err != nil {
		panic(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.instances = map[runtime.InstanceID]*Guest{}
	for _, f := range files {
		var k kept
		b, err := os.ReadFile(f)
		if err == nil {
			err = json.Unmarshal(b, &k)
		}
		if err != nil {
			panic(fmt.Sprintf("reading an instance of the fake: %v", err))
		}
		g := &Guest{Spec: k.Spec, Done: make(chan struct{}), machine: m, now: now, state: k.State, memory: k.Memory}
		if k.State.Exit != nil {
			close(g.Done)
		}
		if k.State.State == runtime.Frozen {
			g.thawed = make(chan struct{})
		}
		m.instances[k.Spec.ID] = g
		m.pid = max(m.pid, k.State.PID-1<<22)
	}
}
