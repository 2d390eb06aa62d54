package orchestrator_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay"
)

// A pause is done when its snapshot is: the guest that it leaves is removed
// behind it, by the next server if need be, and is in nobody's way.
func TestPauseLeavesTheRest(t *testing.T) {
	for _, restart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			o, dir := open(t, w, 0)
			defer func() { o.Close() }()
			first := mustCreate(t, o, "i1")
			w.setFail("kill", errors.New("the engine does not answer"))
			q := cay.SaveRequest{Snapshot: cay.NewSnapshotID(), Memory: true, Pause: true}
			if _, err := o.Save(t.Context(), "i1", q); err != nil {
				t.Fatal(err)
			}
			if n := len(w.ids()); n != 1 {
				t.Fatalf("%d instances are left; the test needs the paused one", n)
			}
			if _, err := (table{w}).Get(t.Context(), "i1"); err == nil {
				t.Error("it is still reached")
			}
			if got, want := stepsOf(t, o, "i1"), "record flush freeze checkpoint disk digest manifest"; got != want {
				t.Errorf("the pause has the steps %q; want %q", got, want)
			}
			if restart {
				if err := o.Close(); err != nil {
					t.Fatal(err)
				}
				o = reopen(t, w, dir, 0)
			}
			if _, err := o.Get(t.Context(), "i1"); cay.CodeOf(err) != cay.CodeSandboxNotFound {
				t.Errorf("a paused sandbox is still there: %v", err)
			}
			again, err := o.Create(t.Context(), from("i1", q.Snapshot, cay.StartRestore))
			if err != nil {
				t.Fatal(err)
			}
			if again.ExecutionID == first.ExecutionID {
				t.Error("it is the same guest")
			}
			// A server that finds both is not confused either.
			if err := o.Close(); err != nil {
				t.Fatal(err)
			}
			o = reopen(t, w, dir, 0)
			w.setFail("kill", nil)
			time.Sleep(time.Minute)
			synctest.Wait()
			if s, err := o.Get(t.Context(), "i1"); err != nil || s.ExecutionID != again.ExecutionID {
				t.Errorf("after the removal of the first guest: %+v, %v", s, err)
			}
			if ids := w.ids(); len(ids) != 1 || string(ids[0]) != string(again.ExecutionID) {
				t.Errorf("the instances %v are left", ids)
			}
			if r, err := (table{w}).Get(t.Context(), "i1"); err != nil || r.Execution != again.ExecutionID {
				t.Errorf("its route is %+v, %v", r, err)
			}
			if err := o.Kill(t.Context(), "i1", cay.EndRequest); err != nil {
				t.Error(err)
			}
			wantClean(t, w, dir)
			wantSnapshots(t, o, w, q.Snapshot)
		})
	}
}

// The memory of a guest that is being removed is as good as free.
func TestRoomOfThePaused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		defer o.Close()
		mustCreate(t, o, "i1")
		o.MemoryAvailable = func() (int64, error) {
			if len(w.ids()) > 0 {
				return 0, nil
			}
			return 1 << 40, nil
		}
		if _, err := o.Create(t.Context(), config("i2")); cay.CodeOf(err) != cay.CodeCapacity {
			t.Errorf("beside one that runs: %v", err)
		}
		w.setFail("kill", errors.New("the engine does not answer"))
		q := cay.SaveRequest{Snapshot: cay.NewSnapshotID(), Memory: true, Pause: true}
		if _, err := o.Save(t.Context(), "i1", q); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Second, func() { w.setFail("kill", nil) })
		if _, err := o.Create(t.Context(), config("i2")); err != nil {
			t.Errorf("after the pause: %v", err)
		}
		if err := o.Kill(t.Context(), "i2", cay.EndRequest); err != nil {
			t.Error(err)
		}
		wantClean(t, w, dir)
	})
}
