package api

import (
	"context"
	"maps"
	"slices"

	"github.com/cayhq/cay"
)

// fakeSnapshots is the part of the fake node that keeps sandboxes. What a guest
// has in its memory is a number.
type fakeSnapshots struct {
	// onSave, where set, runs first; saved runs when the snapshot is whole and
	// the guest still lives.
	onSave func(ctx context.Context, id cay.SandboxID, q cay.SaveRequest) error
	saved  func(id cay.SandboxID, q cay.SaveRequest) error
	// afterCreate, where set, runs before a create returns.
	afterCreate func()

	snaps  map[cay.SnapshotID]fakeSnapshot
	memory map[cay.SandboxID]int
	frozen map[cay.SandboxID]bool // being paused
	unfit  string                 // why no memory can be restored
}

type fakeSnapshot struct {
	cay.Snapshot
	memory int
}

func newFakeSnapshots() fakeSnapshots {
	return fakeSnapshots{snaps: map[cay.SnapshotID]fakeSnapshot{}, memory: map[cay.SandboxID]int{}, frozen: map[cay.SandboxID]bool{}}
}

type started struct {
	restored bool
	degraded string
}

// from says how a sandbox starts. n.mu is held.
func (n *fakeNode) from(c cay.SandboxConfig) (started, error) {
	if c.From == "" {
		n.memory[c.ID] = 0
		return started{}, nil
	}
	s, ok := n.snaps[c.From]
	if !ok {
		return started{}, &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerStorage, Message: "no such snapshot"}
	}
	if s.Build != c.Build || s.Resources != c.Resources {
		return started{}, &cay.Error{Code: cay.CodeSnapshotIncompatible, Layer: cay.LayerStorage, Message: "another build"}
	}
	n.memory[c.ID] = 0
	switch {
	case c.Mode == cay.StartCold, len(s.Memory) == 0 && c.Mode != cay.StartRestore:
		return started{}, nil
	case len(s.Memory) == 0, n.unfit != "" && c.Mode == cay.StartRestore:
		return started{}, &cay.Error{Code: cay.CodeSnapshotIncompatible, Layer: cay.LayerStorage, Message: "no memory that fits"}
	case n.unfit != "":
		return started{degraded: n.unfit}, nil
	}
	n.memory[c.ID] = s.memory
	return started{restored: true}, nil
}

// Save implements [cay.Snapshots].
func (n *fakeNode) Save(ctx context.Context, id cay.SandboxID, q cay.SaveRequest) (cay.Snapshot, error) {
	if n.onSave != nil {
		if err := n.onSave(ctx, id, q); err != nil {
			return cay.Snapshot{}, err
		}
	}
	n.mu.Lock()
	s, ok := n.live[id]
	if !ok {
		n.mu.Unlock()
		return cay.Snapshot{}, &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerRuntime, Message: "not here"}
	}
	c := n.configs[id]
	m := cay.Snapshot{Format: cay.SnapshotFormat, ID: q.Snapshot, CreatedAt: n.now(), Sandbox: id, Execution: s.ExecutionID, Team: c.TeamID,
		Template: c.Template, Build: c.Build, Resources: c.Resources, EnvdVersion: s.EnvdVersion, Runtime: "fake", RuntimeVersion: "1",
		Disk: cay.SnapshotPart{Name: "disk", SizeBytes: 7}}
	if q.Memory {
		m.Memory = []cay.SnapshotPart{{Name: "memory", SizeBytes: 5}}
	}
	n.snaps[q.Snapshot] = fakeSnapshot{m, n.memory[id]}
	n.frozen[id] = q.Pause
	n.mu.Unlock()
	if n.saved != nil {
		if err := n.saved(id, q); err != nil {
			n.mu.Lock()
			defer n.mu.Unlock()
			delete(n.frozen, id)
			return cay.Snapshot{}, err
		}
	}
	if !q.Pause {
		return m, nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.frozen, id)
	if n.live[id].ExecutionID != s.ExecutionID {
		return m, nil // killed meanwhile; the snapshot is whole
	}
	delete(n.live, id)
	n.ends <- cay.SandboxEnd{ID: id, ExecutionID: s.ExecutionID, Reason: cay.EndPaused, Snapshot: q.Snapshot, At: n.now()}
	return m, nil
}

// Snapshots implements [cay.Snapshots].
func (n *fakeNode) Snapshots(context.Context) ([]cay.Snapshot, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []cay.Snapshot
	for _, s := range n.snaps {
		out = append(out, s.Snapshot)
	}
	return out, nil
}

// DeleteSnapshot implements [cay.Snapshots].
func (n *fakeNode) DeleteSnapshot(_ context.Context, id cay.SnapshotID) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.snaps, id)
	return nil
}

// VerifySnapshot implements [cay.Snapshots].
func (n *fakeNode) VerifySnapshot(_ context.Context, id cay.SnapshotID) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.snaps[id]; !ok {
		return &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerStorage, Message: "no such snapshot"}
	}
	return nil
}

func (n *fakeNode) snapshotIDs() []cay.SnapshotID {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Sorted(maps.Keys(n.snaps))
}

// write changes what a guest has in its memory; false if it does not run.
func (n *fakeNode) write(id cay.SandboxID, v int) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.live[id]; ok && !n.frozen[id] {
		n.memory[id] = v
		return true
	}
	return false
}

func (n *fakeNode) read(id cay.SandboxID) (int, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, ok := n.live[id]
	return n.memory[id], ok && !n.frozen[id]
}
