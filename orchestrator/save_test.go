package orchestrator_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/orchestrator"
	"github.com/cayhq/cay/runtime"
)

// wantSnapshots checks which snapshots there are, in every place.
func wantSnapshots(t *testing.T, o *orchestrator.Orchestrator, w *world, want ...cay.SnapshotID) {
	t.Helper()
	all, err := o.Snapshots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	saved, err := disks{w}.ListSaved(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := os.ReadDir(o.SnapshotDir)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != len(want) || len(saved) != len(want) || len(dirs) != len(want) {
		t.Errorf("%d snapshots, %d saved disks, %d directories; want %d: %v %v", len(all), len(saved), len(dirs), len(want), saved, dirs)
	}
	for _, id := range want {
		if err := o.VerifySnapshot(t.Context(), id); err != nil {
			t.Errorf("VerifySnapshot(%s): %v", id, err)
		}
	}
}

// stepsOf names the steps of a sandbox's last save.
func stepsOf(t *testing.T, o *orchestrator.Orchestrator, id cay.SandboxID) string {
	t.Helper()
	trace, err := o.Trace(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range trace {
		if s.Op != "" {
			names = append(names, s.Name)
		}
	}
	return strings.Join(names, " ")
}

func from(id string, s cay.SnapshotID, mode cay.StartMode) cay.SandboxConfig {
	c := config(id)
	c.From, c.Mode = s, mode
	return c
}

func TestPauseAndResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		defer o.Close()
		first := mustCreate(t, o, "i1")
		snap := cay.NewSnapshotID()
		m, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: snap, Memory: true, Pause: true})
		if err != nil {
			t.Fatal(err)
		}
		if m.ID != snap || m.Sandbox != "i1" || m.Execution != first.ExecutionID || m.Team != "t" || m.Build != "b1" ||
			m.Resources != config("x").Resources || m.Runtime != "fake" || m.RuntimeVersion != "1" || len(m.Memory) != 1 || m.Disk.Stamp == "" {
			t.Errorf("manifest %+v", m)
		}
		wantClean(t, w, dir) // a paused sandbox costs no process, slot, disk or record
		if got, want := stepsOf(t, o, "i1"), "record flush freeze checkpoint disk digest manifest end"; got != want {
			t.Errorf("the pause has the steps %q; want %q", got, want)
		}
		wantSnapshots(t, o, w, snap)
		if _, err := o.Get(t.Context(), "i1"); cay.CodeOf(err) != cay.CodeSandboxNotFound {
			t.Errorf("a paused sandbox is still there: %v", err)
		}

		again, err := o.Create(t.Context(), from("i1", snap, cay.StartRestore))
		if err != nil {
			t.Fatal(err)
		}
		if !again.Restored || again.Degraded != "" || again.ExecutionID == first.ExecutionID {
			t.Errorf("resumed as %+v", again)
		}
		c := w.inits[len(w.inits)-1]
		if c.Instance != string(again.ExecutionID) || c.Generation != c.Instance || c.ControlToken == "" || c.ControlToken == w.inits[0].ControlToken {
			t.Errorf("the resumed guest was told %+v", c)
		}
		// The snapshot serves again, also beside the sandbox made from it.
		fork, err := o.Create(t.Context(), from("i2", snap, ""))
		if err != nil || !fork.Restored {
			t.Fatalf("fork: %+v, %v", fork, err)
		}
		for _, id := range []cay.SandboxID{"i1", "i2"} {
			if err := o.Kill(t.Context(), id, cay.EndRequest); err != nil {
				t.Error(err)
			}
		}
		if err := errors.Join(o.DeleteSnapshot(t.Context(), snap), o.DeleteSnapshot(t.Context(), snap)); err != nil {
			t.Error(err)
		}
		wantSnapshots(t, o, w)
		wantClean(t, w, dir)
	})
}

func TestSnapshotLeavesTheSandboxRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		defer o.Close()
		s := mustCreate(t, o, "i1")
		snap := cay.NewSnapshotID()
		if _, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: snap, Memory: true}); err != nil {
			t.Fatal(err)
		}
		wantSnapshots(t, o, w, snap)
		if got, want := stepsOf(t, o, "i1"), "record flush freeze checkpoint disk thaw digest manifest"; got != want {
			t.Errorf("the snapshot has the steps %q; want %q", got, want)
		}
		in := w.instances[runtime.InstanceID(s.ExecutionID)]
		if in == nil || in.state != runtime.Running {
			t.Fatalf("the sandbox does not run on: %+v", in)
		}
		if _, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: snap, Memory: true}); cay.CodeOf(err) != cay.CodeConflict {
			t.Errorf("the same snapshot ID again: %v", err)
		}
		wantSnapshots(t, o, w, snap) // the refusal did not touch the first
		if _, err := o.Save(t.Context(), "i9", cay.SaveRequest{Snapshot: cay.NewSnapshotID()}); cay.CodeOf(err) != cay.CodeSandboxNotFound {
			t.Errorf("an unknown sandbox: %v", err)
		}
		if _, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: "../x"}); cay.CodeOf(err) != cay.CodeInvalidRequest {
			t.Errorf("a malformed ID: %v", err)
		}
		if err := o.Kill(t.Context(), "i1", cay.EndRequest); err != nil {
			t.Error(err)
		}
		wantClean(t, w, dir)
		wantSnapshots(t, o, w, snap) // it outlives its sandbox
	})
}

// A save that fails at any step leaves a running sandbox and no snapshot.
func TestFailedSave(t *testing.T) {
	for _, step := range []string{"freeze", "checkpoint", "save", "keep", "sync", "identity"} {
		for _, pause := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				o, dir := open(t, w, 0)
				defer o.Close()
				s := mustCreate(t, o, "i1")
				broken := errors.New(step + " is broken")
				w.setFail(step, broken)
				q := cay.SaveRequest{Snapshot: cay.NewSnapshotID(), Memory: step != "sync", Pause: pause, Healthy: step == "identity"}
				_, err := o.Save(t.Context(), "i1", q)
				if !errors.Is(err, broken) {
					t.Fatalf("%s: %v", step, err)
				}
				if unresponsive := step == "sync" || step == "identity"; (cay.CodeOf(err) == cay.CodeGuestUnresponsive) != unresponsive {
					t.Errorf("%s: code %s", step, cay.CodeOf(err))
				}
				w.setFail(step, nil)
				wantSnapshots(t, o, w)
				if in := w.instances[runtime.InstanceID(s.ExecutionID)]; in == nil || in.state != runtime.Running {
					t.Fatalf("%s: the sandbox does not run on: %+v", step, in)
				}
				if _, err := (table{w}).Get(t.Context(), "i1"); err != nil {
					t.Errorf("%s: the sandbox has no route: %v", step, err)
				}
				if _, err := o.Save(t.Context(), "i1", q); err != nil { // it can be tried again
					t.Errorf("%s: the second try: %v", step, err)
				}
				if !pause {
					if err := o.Kill(t.Context(), "i1", cay.EndRequest); err != nil {
						t.Error(err)
					}
				}
				wantClean(t, w, dir)
				wantSnapshots(t, o, w, q.Snapshot)
			})
		}
	}
}

// The server dies at every point of a save; the next one finishes a pause whose
// snapshot is whole and undoes every other.
func TestCrashWhileSaving(t *testing.T) {
	for _, tc := range []struct {
		guest       runtime.State // as the crash leaves it
		pause, half bool          // half: parts of the snapshot are there, its manifest is not
	}{
		{runtime.Running, true, false}, {runtime.Frozen, true, false}, {runtime.Frozen, true, true},
		{runtime.Running, false, false}, {runtime.Frozen, false, true}, {runtime.Running, false, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			o, dir := open(t, w, 0)
			s := mustCreate(t, o, "i1")
			q := cay.SaveRequest{Snapshot: cay.NewSnapshotID(), Memory: true, Pause: tc.pause}
			rec := recordFile(dir, s.ExecutionID)
			b, err := os.ReadFile(rec)
			if err != nil {
				t.Fatal(err)
			}
			if err := o.Close(); err != nil {
				t.Fatal(err)
			}
			b = bytes.Replace(b, []byte(`"phase":"running"`), fmt.Appendf(nil, `"phase":"saving","saving":%q,"savePauses":%v`, q.Snapshot, q.Pause), 1)
			err = os.WriteFile(rec, b, 0o600)
			w.instances[runtime.InstanceID(s.ExecutionID)].state = tc.guest
			if tc.half {
				_, serr := disks{w}.Save(t.Context(), string(s.ExecutionID), string(q.Snapshot))
				err = errors.Join(err, serr, os.MkdirAll(filepath.Join(o.SnapshotDir, string(q.Snapshot)+".new", "memory"), 0o700))
			}
			if err != nil {
				t.Fatal(err)
			}
			next := reopen(t, w, dir, 0)
			defer next.Close()
			synctest.Wait()
			if _, err := next.Get(t.Context(), "i1"); err != nil {
				t.Fatalf("%+v: the sandbox is lost: %v", tc, err)
			}
			if in := w.instances[runtime.InstanceID(s.ExecutionID)]; in.state != runtime.Running {
				t.Errorf("%+v: the sandbox is %s", tc, in.state)
			}
			wantSnapshots(t, next, w)
			if _, err := next.Save(t.Context(), "i1", q); err != nil {
				t.Errorf("%+v: a later save: %v", tc, err)
			}
		})
	}
}

// The snapshot of a pause is whole and the server dies before the guest is
// gone, or the guest is gone and its record is not: the sandbox is paused.
func TestCrashAfterPause(t *testing.T) {
	for _, gone := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			o, dir := open(t, w, 0)
			s := mustCreate(t, o, "i1")
			q := cay.SaveRequest{Snapshot: cay.NewSnapshotID(), Memory: true}
			if _, err := o.Save(t.Context(), "i1", q); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(recordFile(dir, s.ExecutionID))
			if err := errors.Join(err, o.Close()); err != nil {
				t.Fatal(err)
			}
			b = bytes.Replace(b, []byte(`"phase":"running"`), fmt.Appendf(nil, `"phase":"saving","saving":%q,"savePauses":true`, q.Snapshot), 1)
			if err := os.WriteFile(recordFile(dir, s.ExecutionID), b, 0o600); err != nil {
				t.Fatal(err)
			}
			w.instances[runtime.InstanceID(s.ExecutionID)].state = runtime.Frozen
			if gone {
				delete(w.instances, runtime.InstanceID(s.ExecutionID))
			}
			next := reopen(t, w, dir, 0)
			defer next.Close()
			var got cay.SandboxEnd
			ctx, stop := context.WithTimeout(t.Context(), time.Second)
			defer stop()
			_ = next.Watch(ctx, func(e cay.SandboxEnd) { got = e })
			if got.ID != "i1" || got.Reason != cay.EndPaused || got.Snapshot != q.Snapshot {
				t.Errorf("gone %v: the end was told as %+v", gone, got)
			}
			wantClean(t, w, dir)
			wantSnapshots(t, next, w, q.Snapshot)
		})
	}
}

func recordFile(dir string, e cay.ExecutionID) string { return filepath.Join(dir, string(e)+".json") }

// Every byte of a snapshot is looked at before it is used, and the answer names
// the part.
func TestDamagedSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		defer o.Close()
		mustCreate(t, o, "i1")
		snap := cay.NewSnapshotID()
		if _, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: snap, Memory: true, Pause: true}); err != nil {
			t.Fatal(err)
		}
		parts := map[string]string{
			"pages":         filepath.Join(o.SnapshotDir, string(snap), "memory", "pages"),
			"manifest.json": filepath.Join(o.SnapshotDir, string(snap), "manifest.json"),
			"secrets.json":  filepath.Join(o.SnapshotDir, string(snap), "secrets.json"),
			string(snap):    disks{w}.saved(string(snap)),
		}
		for part, path := range parts {
			whole, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for name, damaged := range map[string][]byte{"flipped": flip(whole), "cut": whole[:len(whole)/2], "empty": nil} {
				time.Sleep(time.Second) // virtual; but file times are real ones
				if err := os.WriteFile(path, damaged, 0o600); err != nil {
					t.Fatal(err)
				}
				_, err := o.Create(t.Context(), from("i1", snap, cay.StartAuto))
				if cay.CodeOf(err) != cay.CodeSnapshotCorrupt || !strings.Contains(err.Error(), part) {
					t.Errorf("%s of %s: %v", name, part, err)
				}
				if err := o.VerifySnapshot(t.Context(), snap); cay.CodeOf(err) != cay.CodeSnapshotCorrupt {
					t.Errorf("%s of %s: VerifySnapshot: %v", name, part, err)
				}
			}
			if path != parts[string(snap)] { // its stamp would not come back
				if err := os.WriteFile(path, whole, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if part == string(snap) {
				break
			}
		}
		wantClean(t, w, dir)
	})
}

// flip changes one bit. In JSON it makes a text that does not parse.
func flip(b []byte) []byte {
	b = bytes.Clone(b)
	b[0] ^= 1
	return b
}

func TestColdStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		defer func() { o.Close() }()
		mustCreate(t, o, "i1")
		withMemory, diskOnly := cay.NewSnapshotID(), cay.NewSnapshotID()
		if _, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: withMemory, Memory: true}); err != nil {
			t.Fatal(err)
		}
		if _, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: diskOnly, Pause: true}); err != nil {
			t.Fatal(err)
		}
		wantSnapshots(t, o, w, withMemory, diskOnly)
		for _, tc := range []struct {
			snap     cay.SnapshotID
			mode     cay.StartMode
			upgraded bool // the node's engine is another by now
			restored bool
			degraded bool
			code     cay.Code
		}{
			{withMemory, cay.StartCold, false, false, false, ""},
			{diskOnly, cay.StartAuto, false, false, false, ""},
			{diskOnly, cay.StartRestore, false, false, false, cay.CodeSnapshotIncompatible},
			{withMemory, cay.StartAuto, false, true, false, ""},
			{withMemory, cay.StartAuto, true, false, true, ""},
			{withMemory, cay.StartRestore, true, false, false, cay.CodeSnapshotIncompatible},
			{cay.NewSnapshotID(), cay.StartAuto, false, false, false, cay.CodeNotFound},
		} {
			if tc.upgraded && w.err("version") == nil {
				w.setFail("version", errors.New("another"))
				if err := o.Close(); err != nil {
					t.Fatal(err)
				}
				o = reopen(t, w, dir, 0)
			}
			s, err := o.Create(t.Context(), from("i2", tc.snap, tc.mode))
			if cay.CodeOf(err) != tc.code || (err == nil && (s.Restored != tc.restored || (s.Degraded != "") != tc.degraded)) {
				t.Errorf("%+v: %+v, %v", tc, s, err)
			}
			if err == nil {
				if err := o.Kill(t.Context(), "i2", cay.EndRequest); err != nil {
					t.Error(err)
				}
			}
		}
		other := from("i3", withMemory, cay.StartAuto)
		other.Resources.MemoryMB *= 2
		if _, err := o.Create(t.Context(), other); cay.CodeOf(err) != cay.CodeSnapshotIncompatible {
			t.Errorf("other resources: %v", err)
		}
	})
}

// programs are the engine programs of the world.
type programs struct {
	*world
	names map[string]bool
}

func (p programs) List() ([]string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Sorted(maps.Keys(p.names)), p.fail["programs"]
}

func (p programs) Remove(name string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.names, name)
	return nil
}

// An engine is kept for as long as a snapshot with a memory, or a guest, is of
// it, and is the one that such a memory is restored by.
func TestEarlierEngine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		dir := t.TempDir()
		p := programs{w, map[string]bool{"program-1": true}}
		start := func() *orchestrator.Orchestrator {
			o := node(w, dir, 0)
			o.Engines = p
			if err := o.Open(t.Context()); err != nil {
				t.Fatal(err)
			}
			return o
		}
		has := func(want ...string) {
			t.Helper()
			time.Sleep(time.Minute)
			synctest.Wait()
			if got, err := p.List(); err != nil || !slices.Equal(got, want) {
				t.Errorf("the engines are %v, %v; want %v", got, err, want)
			}
		}
		o := start()
		mustCreate(t, o, "i1")
		mustCreate(t, o, "i2")
		paused, kept := cay.NewSnapshotID(), cay.NewSnapshotID()
		m, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: paused, Memory: true, Pause: true})
		if err != nil || m.RuntimeVersion != "1" || m.Engine != "program-1" {
			t.Fatalf("%+v, %v", m, err)
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}

		w.setFail("version", errors.New("another")) // the upgrade
		p.names["program-2"] = true
		o = start()
		defer func() { o.Close() }()
		has("program-1", "program-2")
		// What runs on the earlier engine is saved as of that one.
		m, err = o.Save(t.Context(), "i2", cay.SaveRequest{Snapshot: kept, Memory: true})
		if err != nil || m.RuntimeVersion != "1" || m.Engine != "program-1" {
			t.Fatalf("%+v, %v", m, err)
		}
		holders, err := orchestrator.EngineHolders(dir, o.SnapshotDir)
		if h := holders["program-1"]; err != nil || h.Version != "1" || len(h.Guests) != 1 || len(h.Snapshots) != 2 {
			t.Errorf("holders: %+v, %v", holders, err)
		}
		s, err := o.Create(t.Context(), from("i1", paused, cay.StartRestore))
		if err != nil || !s.Restored {
			t.Fatalf("%+v, %v", s, err)
		}
		if e := w.instances[runtime.InstanceID(s.ExecutionID)].spec.Engine; e != (runtime.Engine{Version: "1", Program: "program-1"}) {
			t.Errorf("it was resumed with %+v", e)
		}
		cold, err := o.Create(t.Context(), from("i3", paused, cay.StartCold))
		if err != nil || w.instances[runtime.InstanceID(cold.ExecutionID)].spec.Engine.Version != "2" {
			t.Errorf("a cold start: %+v, %v", cold, err)
		}
		if err := errors.Join(o.DeleteSnapshot(t.Context(), paused), o.DeleteSnapshot(t.Context(), kept), o.Kill(t.Context(), "i2", cay.EndRequest)); err != nil {
			t.Fatal(err)
		}
		has("program-1", "program-2") // i1 runs on it
		last := cay.NewSnapshotID()
		if _, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: last, Memory: true, Pause: true}); err != nil {
			t.Fatal(err)
		}
		has("program-1", "program-2") // and it is paused now
		// While something cannot be read, what it needs is not known.
		broken := filepath.Join(o.SnapshotDir, string(kept))
		if err := errors.Join(os.Mkdir(broken, 0o700), os.WriteFile(filepath.Join(broken, "manifest.json"), []byte("{"), 0o600)); err != nil {
			t.Fatal(err)
		}
		if err := o.DeleteSnapshot(t.Context(), last); err != nil {
			t.Fatal(err)
		}
		has("program-1", "program-2")
		if err := o.DeleteSnapshot(t.Context(), kept); err != nil {
			t.Fatal(err)
		}
		has("program-2")
	})
}
