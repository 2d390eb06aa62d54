package orchestrator_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay"
)

// What a guest writes much of is written back while it runs, once; a save then
// has little left to wait for.
func TestFlushAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, _ := open(t, w, 0)
		defer o.Close()
		mustCreate(t, o, "i1")
		// after lets two looks pass and returns how often a disk was written back.
		after := func() int64 {
			time.Sleep(2 * time.Second)
			synctest.Wait()
			return w.flushes.Load()
		}
		for _, step := range []struct {
			name    string
			written int64 // MiB in all
			fail    error
			want    int64 // flushes in all
		}{
			{"an idle guest", 0, nil, 0},
			{"a little", 4, nil, 0},
			{"much", 100, nil, 1},
			{"no more than that", 101, nil, 1},
			{"removed", 0, nil, 1},
			{"written again", 50, nil, 2},
			{"a disk that fails is tried every second", 90, errors.New("input/output error"), 4},
			{"until it works", 90, nil, 5},
		} {
			w.written.Store(step.written << 20)
			w.setFail("flush", step.fail)
			if got := after(); got != step.want {
				t.Fatalf("%s: written back %d times, want %d", step.name, got, step.want)
			}
		}
	})
}

// A save stops a guest only when little is left to be written back: a guest
// writes on while that is done.
func TestFlushBeforeFreeze(t *testing.T) {
	for _, tc := range []struct {
		first time.Duration // then each takes half of the one before
		want  int64
	}{{0, 1}, {20 * time.Millisecond, 1}, {60 * time.Millisecond, 3}, {time.Hour / 100, 4}} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			o, _ := open(t, w, 0)
			defer o.Close()
			mustCreate(t, o, "i1")
			w.flushTime.Store(int64(tc.first))
			q := cay.SaveRequest{Snapshot: cay.NewSnapshotID(), Memory: true}
			if _, err := o.Save(t.Context(), "i1", q); err != nil {
				t.Fatal(err)
			}
			if got := w.flushes.Load(); got != tc.want {
				t.Errorf("the first takes %v: written back %d times, want %d", tc.first, got, tc.want)
			}
		})
	}
}

// Many disks are looked at less often than few.
func TestLooksAreBounded(t *testing.T) {
	for n, want := range map[int][2]int64{1: {9, 11}, 100: {400, 610}} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			o, _ := open(t, w, 0)
			defer o.Close()
			o.MaxSandboxes = n
			for i := range n {
				mustCreate(t, o, fmt.Sprint("i", i))
			}
			synctest.Wait()
			before := w.looks.Load()
			time.Sleep(time.Second)
			synctest.Wait()
			if got := w.looks.Load() - before; got < want[0] || got > want[1] {
				t.Errorf("%d disks: looked at %d times in a second, want %v", n, got, want)
			}
		})
	}
}
