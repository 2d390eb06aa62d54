package orchestrator_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
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
			{"a disk that fails is tried at each look", 90, errors.New("input/output error"), 4},
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
