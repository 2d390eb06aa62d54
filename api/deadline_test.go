package api

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay"
)

// Five hundred sandboxes end, or are paused, over a minute; meanwhile the server
// is started anew and the wall clock is set an hour forward, back, and back
// again. None ends early; of a hundred, 99 end within half a second, and those
// whose time came while no server ran within two seconds of its start.
//
// In a bubble, where only what the server decides takes time; with CAY_NIGHTLY=1
// also on the machine's clock, where its work does too.
func TestManyDeadlines(t *testing.T) {
	t.Run("fake time", func(t *testing.T) { synctest.Test(t, manyDeadlines) })
	if os.Getenv("CAY_NIGHTLY") == "1" {
		t.Run("real time", manyDeadlines)
	}
}

func manyDeadlines(t *testing.T) {
	const boxes = 500
	f := newFixture(t)
	f.team.Limits.ConcurrentSandboxes = boxes
	if err := f.store.PutTeam(t.Context(), f.team); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var off time.Duration
	ended := map[cay.SandboxID]time.Time{}
	clock := func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		return time.Now().Add(off)
	}
	end := func(id cay.SandboxID) error {
		time.Sleep(150 * time.Millisecond) // what an engine takes
		mu.Lock()
		defer mu.Unlock()
		ended[id] = time.Now()
		return nil
	}
	f.node.onKill = func(_ context.Context, id cay.SandboxID, _ cay.EndReason) error { return end(id) }
	f.node.onSave = func(_ context.Context, id cay.SandboxID, _ cay.SaveRequest) error { return end(id) }
	f.serve(clock)
	stop := f.run()

	// Made over ten seconds, to end at odd instants from the twentieth to the
	// eightieth.
	begin := time.Now()
	at := func(d time.Duration) { time.Sleep(time.Until(begin.Add(d))) }
	type span struct{ first, last time.Time } // of the right end
	due := map[cay.SandboxID]span{}
	for i := range boxes {
		at(time.Duration(i) * 20 * time.Millisecond)
		left := 20 + i*7%51
		body := fmt.Sprintf(`{"templateID":"base","timeout":%d,"autoPause":%v}`, left, i%5 == 0)
		asked := time.Now()
		id := f.create(body)
		due[id] = span{asked.Add(time.Duration(left) * time.Second), time.Now().Add(time.Duration(left) * time.Second)}
	}
	step := func(d time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		off += d
	}
	at(25 * time.Second)
	step(time.Hour)
	at(40 * time.Second)
	stop()
	down := time.Now()
	at(42 * time.Second)
	f.serve(clock)
	up := time.Now()
	stop = f.run()
	defer func() { stop() }()
	at(50 * time.Second)
	step(-time.Hour)
	at(60 * time.Second)
	step(-time.Hour)
	at(85 * time.Second)

	mu.Lock()
	defer mu.Unlock()
	var late []time.Duration
	for id, want := range due {
		got, ok := ended[id]
		switch {
		case !ok:
			t.Errorf("%s did not end: %+v", id, f.record(id))
		case got.Before(want.first):
			t.Errorf("%s ended %v early", id, want.first.Sub(got))
		case want.last.After(down.Add(-500*time.Millisecond)) && want.first.Before(up):
			if d := got.Sub(up); d > 2*time.Second {
				t.Errorf("%s was due while no server ran, and ended %v after the start of the next", id, d)
			}
		default:
			late = append(late, got.Sub(want.last))
		}
	}
	slices.Sort(late)
	t.Logf("of %d deadlines, half were met within %v, 99 of 100 within %v, all within %v", len(late), late[len(late)/2], late[len(late)*99/100], late[len(late)-1])
	if p99 := late[len(late)*99/100]; p99 > 500*time.Millisecond {
		t.Errorf("of a hundred sandboxes, 99 ended within %v of their deadline, want within 500ms", p99)
	}
}
