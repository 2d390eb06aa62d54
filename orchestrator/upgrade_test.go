package orchestrator_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/orchestrator"
)

// guestRecord reads the record of the only guest there is.
func guestRecord(t *testing.T, dir string) (r struct{ Envd, EnvdOther cay.Digest }) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(names) != 1 {
		t.Fatalf("the records are %v, %v", names, err)
	}
	b, err := os.ReadFile(names[0])
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func save(t *testing.T, o *orchestrator.Orchestrator, q cay.SaveRequest) cay.Snapshot {
	t.Helper()
	q.Snapshot = cay.NewSnapshotID()
	m, err := o.Save(t.Context(), "i1", q)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func restart(t *testing.T, o *orchestrator.Orchestrator, m cay.Snapshot, mode cay.StartMode) cay.NodeSandbox {
	t.Helper()
	c := config("i1")
	c.From, c.Mode = m.ID, mode
	s, err := o.Create(t.Context(), c)
	if err != nil {
		t.Fatalf("starting from %+v: %v", m, err)
	}
	return s
}

// A sandbox gets the node's envd; what is saved of it comes back with the envd
// that it had then, with its memory and without.
func TestUpgradeEnvd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		if s := mustCreate(t, o, "i1"); s.Envd != oldEnvd || !s.EnvdOutdated {
			t.Errorf("a fresh sandbox has %+v", s)
		}
		before := save(t, o, cay.SaveRequest{Memory: true})
		u, err := o.UpgradeEnvd(t.Context(), "i1")
		if err != nil || !u.Changed || u.FromDigest != oldEnvd || u.Digest != newEnvd {
			t.Fatalf("%+v, %v", u, err)
		}
		if s, err := o.Get(t.Context(), "i1"); err != nil || s.Envd != newEnvd || s.EnvdOutdated {
			t.Errorf("it has %+v, %v", s, err)
		}
		// The one before could come back yet.
		if r := guestRecord(t, dir); r.Envd != newEnvd || r.EnvdOther != oldEnvd {
			t.Errorf("on record is %+v", r)
		}
		early := save(t, o, cay.SaveRequest{Memory: true})
		time.Sleep(time.Minute)
		if r := guestRecord(t, dir); r.Envd != newEnvd || r.EnvdOther != "" {
			t.Errorf("after a while on record is %+v", r)
		}
		if u, err := o.UpgradeEnvd(t.Context(), "i1"); err != nil || u.Changed || u.Digest != newEnvd {
			t.Errorf("once more: %+v, %v", u, err)
		}
		steps, err := o.Trace(t.Context(), "i1")
		if err != nil || len(steps) == 0 || steps[len(steps)-1].Op != string(killpoint.Upgrade) && steps[len(steps)-1].Op != string(killpoint.Snapshot) {
			t.Errorf("the steps are %+v, %v", steps, err)
		}
		after := save(t, o, cay.SaveRequest{Memory: true, Pause: true})
		if before.Envd != oldEnvd || before.EnvdOther != "" || early.Envd != newEnvd || early.EnvdOther != oldEnvd || after.Envd != newEnvd || after.EnvdOther != "" {
			t.Errorf("the snapshots say %+v, %+v, %+v", before, early, after)
		}
		for _, m := range []cay.Snapshot{after, early} {
			if s := restart(t, o, m, cay.StartRestore); s.Envd != newEnvd {
				t.Errorf("it comes back with %+v", s)
			}
			if err := o.Kill(t.Context(), "i1", cay.EndRequest); err != nil {
				t.Fatal(err)
			}
		}
		if s := restart(t, o, before, cay.StartRestore); s.Envd != oldEnvd || !s.EnvdOutdated {
			t.Errorf("what was saved before has %+v", s)
		}
		if err := o.Kill(t.Context(), "i1", cay.EndRequest); err != nil {
			t.Fatal(err)
		}
		// A memory with another envd than was saved is not its.
		after.Envd = "sha256:0"
		w.setFail("envd", nil)
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
		wantClean(t, w, dir)
	})
}

// What refuses another envd, or ends at once, keeps the one that it has, and
// the error says why.
func TestUpgradeEnvdFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		defer o.Close()
		if _, err := o.UpgradeEnvd(t.Context(), "i1"); cay.CodeOf(err) != cay.CodeSandboxNotFound {
			t.Errorf("no such sandbox: %v", err)
		}
		mustCreate(t, o, "i1")
		runsOld := func(what string, err error, code cay.Code, words string) {
			t.Helper()
			var e *cay.Error
			if !errors.As(err, &e) || e.Code != code || e.Layer != cay.LayerEnvd || !strings.Contains(e.Message, words) {
				t.Errorf("%s: %v", what, err)
			}
			if s, err := o.Get(t.Context(), "i1"); err != nil || s.Envd != oldEnvd || !s.EnvdOutdated {
				t.Errorf("%s: it has %+v, %v", what, s, err)
			}
			m := save(t, o, cay.SaveRequest{Memory: true, Pause: true})
			restart(t, o, m, cay.StartRestore)
			time.Sleep(time.Minute)
			if r := guestRecord(t, dir); r.Envd != oldEnvd || r.EnvdOther != "" {
				t.Errorf("%s: after a while on record is %+v", what, r)
			}
		}
		w.setFail("upgrade", errors.New("envd answered 507: no room"))
		_, err := o.UpgradeEnvd(t.Context(), "i1")
		runsOld("refused", err, cay.CodeEnvdUpgrade, "507: no room")
		w.setFail("upgrade", nil)
		w.mu.Lock()
		w.brokenEnvd = true
		w.mu.Unlock()
		_, err = o.UpgradeEnvd(t.Context(), "i1")
		runsOld("broken", err, cay.CodeEnvdUpgrade, "the one before it is back")
		w.setFail("identity", errors.New("no answer"))
		_, err = o.UpgradeEnvd(t.Context(), "i1")
		w.setFail("identity", nil)
		runsOld("silent", err, cay.CodeGuestUnresponsive, "does not answer: no answer")

		// One at a time.
		w.mu.Lock()
		w.brokenEnvd = false
		w.bootTime = 500 * time.Millisecond // of an answer
		w.mu.Unlock()
		errs := make(chan error, 2)
		for range 2 {
			go func() { _, err := o.UpgradeEnvd(t.Context(), "i1"); errs <- err }()
		}
		first, second := <-errs, <-errs
		if second != nil {
			first, second = second, first
		}
		if cay.CodeOf(first) != cay.CodeSandboxTransition || second != nil {
			t.Errorf("two at a time: %v, %v", first, second)
		}
		none := node(w, t.TempDir(), 0)
		none.Envd = orchestrator.Agent{}
		if _, err := none.UpgradeEnvd(t.Context(), "i1"); cay.CodeOf(err) != cay.CodeNotImplemented {
			t.Errorf("without an envd: %v", err)
		}
	})
}

// PID 1 puts the envd before back a moment after the other one had answered: the
// record learns it, also over a restart of the node in between.
func TestUpgradeEnvdIsTakenBack(t *testing.T) {
	for _, crash := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			o, dir := open(t, w, 0)
			mustCreate(t, o, "i1")
			if _, err := o.UpgradeEnvd(t.Context(), "i1"); err != nil {
				t.Fatal(err)
			}
			w.mu.Lock()
			for _, in := range w.instances {
				in.memory.Envd, in.memory.Life = oldEnvd, in.memory.Life+1
			}
			w.mu.Unlock()
			if crash {
				if err := o.Close(); err != nil {
					t.Fatal(err)
				}
				o = reopen(t, w, dir, 0)
			}
			defer o.Close()
			m := save(t, o, cay.SaveRequest{Memory: true, Pause: true}) // before it is known
			if s := restart(t, o, m, cay.StartRestore); s.Envd != oldEnvd || !s.EnvdOutdated {
				t.Errorf("it comes back with %+v", s)
			}
			time.Sleep(time.Minute)
			if r := guestRecord(t, dir); r.Envd != oldEnvd || r.EnvdOther != "" {
				t.Errorf("on record is %+v", r)
			}
		})
	}
}
