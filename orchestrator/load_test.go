package orchestrator_test

import (
	"context"
	"testing"
	"testing/synctest"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/orchestrator"
	"github.com/cayhq/cay/runtime"
)

func (e engine) Loaded(context.Context, runtime.InstanceID) error { return nil }

// reader is an engine whose guests read their memory until they are told what
// came of it.
type reader struct {
	engine
	outcome chan error
}

func (r reader) Loaded(ctx context.Context, _ runtime.InstanceID) error {
	select {
	case err := <-r.outcome:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A snapshot stays until nobody reads from it, also over a restart of the server,
// and for as long as the server runs if one could not.
func TestSnapshotStaysWhileItIsRead(t *testing.T) {
	unreadable := &cay.Error{Code: cay.CodeEngineFailed, Layer: cay.LayerStorage, Message: "input/output error"}
	for name, tc := range map[string]struct {
		outcomes []error // of two guests
		restart  bool
		want     cay.Code
	}{
		"read":                  {[]error{nil, nil}, false, ""},
		"read, after a restart": {[]error{nil, nil}, true, ""},
		"not read":              {[]error{unreadable, nil}, false, cay.CodeConflict},
		"not read by the last":  {[]error{nil, unreadable}, true, cay.CodeConflict},
		"killed meanwhile":      {[]error{nil, &cay.Error{Code: cay.CodeNotFound}}, false, ""},
		"asked twice":           {[]error{&cay.Error{Code: cay.CodeEngineUnavailable}, nil, nil}, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, dir := newWorld(), t.TempDir()
				r := reader{engine{w}, make(chan error)}
				start := func() *orchestrator.Orchestrator {
					o := node(w, dir, 0)
					o.Runtime = r
					if err := o.Open(t.Context()); err != nil {
						t.Fatal(err)
					}
					return o
				}
				o := start()
				mustCreate(t, o, "i1")
				snap := cay.NewSnapshotID()
				if _, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: snap, Memory: true, Pause: true}); err != nil {
					t.Fatal(err)
				}
				for _, id := range []string{"i1", "i2"} {
					if _, err := o.Create(t.Context(), from(id, snap, cay.StartRestore)); err != nil {
						t.Fatal(err)
					}
				}
				if tc.restart {
					o.Close()
					o = start()
				}
				defer o.Close()
				deleted := make(chan error, 1)
				go func() { deleted <- o.DeleteSnapshot(t.Context(), snap) }()
				for _, err := range tc.outcomes {
					synctest.Wait()
					select {
					case err := <-deleted:
						t.Fatalf("deleted while it is read: %v", err)
					default:
						wantSnapshots(t, o, w, snap)
					}
					r.outcome <- err
				}
				if err := <-deleted; cay.CodeOf(err) != tc.want {
					t.Errorf("deleting it: %v; want %q", err, tc.want)
				}
				if tc.want == "" {
					wantSnapshots(t, o, w)
				} else {
					wantSnapshots(t, o, w, snap)
				}
			})
		})
	}
}
