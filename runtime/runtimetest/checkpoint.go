package runtimetest

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// fakeVersion is the version of the fake engine.
const fakeVersion = "fake-1"

// image is a checkpoint of the fake.
type image struct {
	Version string   `json:"version"`
	Args    []string `json:"args"`
	Memory  string   `json:"memory"`
}

// imageFile is its only file.
const imageFile = "memory.json"

func (g *Guest) wrongState(what string) error {
	return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerRuntime,
		Message: fmt.Sprintf("instance %s is %s and cannot be %s", g.Spec.ID, g.state.State, what)}
}

// Freeze implements [runtime.Runtime].
func (f *Fake) Freeze(ctx context.Context, id runtime.InstanceID) error {
	g, err := f.get(ctx, id)
	if err == nil && f.OnFreeze != nil {
		err = f.OnFreeze(ctx, id)
	}
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch g.state.State {
	case runtime.Frozen:
		return nil
	case runtime.Running:
		g.state.State, g.thawed = runtime.Frozen, make(chan struct{})
		g.keep()
		return nil
	}
	return g.wrongState("frozen")
}

// Thaw implements [runtime.Runtime].
func (f *Fake) Thaw(ctx context.Context, id runtime.InstanceID) error {
	g, err := f.get(ctx, id)
	if err == nil && f.OnThaw != nil {
		err = f.OnThaw(ctx, id)
	}
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch g.state.State {
	case runtime.Running:
		return nil
	case runtime.Frozen:
		g.state.State = runtime.Running
		g.keep()
		close(g.thawed)
		g.thawed = nil
		return nil
	}
	return g.wrongState("thawed")
}

// Checkpoint implements [runtime.Runtime].
func (f *Fake) Checkpoint(ctx context.Context, id runtime.InstanceID, dir string) error {
	g, err := f.get(ctx, id)
	if err == nil && f.OnCheckpoint != nil {
		err = f.OnCheckpoint(ctx, id, dir)
	}
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.state.State != runtime.Frozen {
		return g.wrongState("checkpointed")
	}
	if ents, err := os.ReadDir(dir); err != nil || len(ents) > 0 {
		return &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerRuntime,
			Message: fmt.Sprintf("%q is no empty directory for a checkpoint", dir), Err: err}
	}
	b, err := json.Marshal(image{Version: fakeVersion, Args: g.Spec.Args, Memory: g.memory})
	if err != nil {
		return fmt.Errorf("encoding the checkpoint: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, imageFile), b, 0o600); err != nil {
		return fmt.Errorf("writing the checkpoint: %w", err)
	}
	return nil
}

// Loaded implements [runtime.Runtime].
func (f *Fake) Loaded(ctx context.Context, id runtime.InstanceID) error {
	_, err := f.get(ctx, id)
	if err == nil && f.OnLoaded != nil {
		err = f.OnLoaded(ctx, id)
	}
	return err
}

// Restore implements [runtime.Runtime].
func (f *Fake) Restore(ctx context.Context, id runtime.InstanceID, dir string) error {
	g, err := f.get(ctx, id)
	if err == nil && f.OnRestore != nil {
		err = f.OnRestore(ctx, id, dir)
	}
	if err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(dir, imageFile))
	var im image
	if err == nil {
		err = json.Unmarshal(b, &im)
	}
	if err != nil {
		return &cay.Error{Code: cay.CodeSnapshotCorrupt, Layer: cay.LayerStorage,
			Message: "the snapshot's part " + imageFile + " cannot be read", Err: err}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.state.State != runtime.Created:
		return g.wrongState("restored")
	case im.Version != fakeVersion || !slices.Equal(im.Args, g.Spec.Args):
		return &cay.Error{Code: cay.CodeSnapshotIncompatible, Layer: cay.LayerRuntime, Message: "the snapshot does not fit the instance"}
	}
	g.memory = im.Memory
	g.state.State = runtime.Running
	g.keep()
	if f.Body != nil {
		g.body.Go(func() { f.Body(g) })
	}
	return nil
}
