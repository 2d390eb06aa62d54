package disk

import (
	"errors"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// waitReady waits until n disks are held ready, by yielding to the filler.
func waitReady(t *testing.T, d *Disks, n int) {
	t.Helper()
	for range 10_000_000 {
		if len(ready(t, d)) == n && countReady(d) == n {
			return
		}
		runtime.Gosched()
		if t.Context().Err() != nil {
			break
		}
	}
	t.Fatalf("%d disks are ready, want %d", countReady(d), n)
}

func countReady(d *Disks) int {
	d.ahead.mu.Lock()
	defer d.ahead.mu.Unlock()
	n := 0
	for _, k := range d.ahead.kinds {
		n += len(k.ready)
	}
	return n
}

// ready returns the IDs of the disks held ready that the host has.
func ready(t *testing.T, d *Disks) []string {
	t.Helper()
	ids, err := d.list()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, id := range ids {
		if strings.HasPrefix(id, readyStart) {
			out = append(out, id)
		}
	}
	return out
}

func TestAhead(t *testing.T) {
	dir := newDir(t)
	d := openDisks(t, &Disks{Dir: dir, Ahead: 2})
	lower := layer(t, map[string]string{"f": "1"})
	spec := Spec{Layers: []Layer{lower}, SizeMB: 64}
	if err := d.Prepare(spec); err != nil {
		t.Fatal(err)
	}
	waitReady(t, d, 2)
	wantIDs(t, d)
	seen := map[string]bool{}
	for _, id := range []string{"a", "b", "c"} {
		spec.ID = id
		r := create(t, d, spec)
		if want := d.path(disksDir, id, rootName); r.Path != want || r.Image != d.imageFile(id) {
			t.Fatalf("Create = %+v", r)
		}
		wantFile(t, filepath.Join(r.Path, "f"), "1")
		write(t, filepath.Join(r.Path, "mine"), id)
		if seen[r.Image] {
			t.Fatal("one image was given away twice")
		}
		seen[r.Image] = true
		waitReady(t, d, 2)
	}
	wantIDs(t, d, "a", "b", "c")
	for _, id := range []string{"a", "b", "c"} {
		wantFile(t, d.path(disksDir, id, rootName, "mine"), id)
		if err := d.Remove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		wantNothingOf(t, d, id)
	}
	if err := errors.Join(d.Close(), d.Close()); err != nil {
		t.Fatal(err)
	}
	if got := ready(t, d); len(got) != 0 {
		t.Fatalf("Close left %v", got)
	}
}

// A kind that is no longer used gives its room to those that are.
func TestAheadForgets(t *testing.T) {
	d := openDisks(t, &Disks{Dir: newDir(t), Ahead: 1})
	lower := layer(t, map[string]string{"f": "1"})
	for i := range aheadKinds + 2 {
		if err := d.Prepare(Spec{Layers: []Layer{lower}, SizeMB: 64 + i}); err != nil {
			t.Fatal(err)
		}
		waitReady(t, d, min(i+1, aheadKinds))
	}
}

// A process killed while it gives a ready disk away leaves halves that its
// successor finds.
func TestKilledWhileGiving(t *testing.T) {
	dir := newDir(t)
	lower := layer(t, map[string]string{"f": "1"})
	spec := Spec{ID: "a", Layers: []Layer{lower}, SizeMB: 64}
	openDisks(t, &Disks{Dir: dir})
	for n := range 3 {
		first := &Disks{Dir: dir, Ahead: 1}
		if err := first.Open(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := first.Prepare(spec); err != nil {
			t.Fatal(err)
		}
		waitReady(t, first, 1)
		// Stop the filler without removing anything: the crash.
		first.ahead.cancel()
		<-first.ahead.done
		var steps int
		first.fault = crash(n, &steps)
		_, err := first.Create(t.Context(), spec)
		if (err == nil) != (n == 2) {
			t.Fatalf("crash at %d: %v", n, err)
		}

		second := openDisks(t, &Disks{Dir: dir})
		if got := ready(t, second); len(got) != 0 {
			t.Fatalf("crash at %d: Open left %v", n, got)
		}
		if n == 2 {
			wantIDs(t, second, "a")
		}
		if err := second.Remove(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		wantIDs(t, second)
		wantNothingOf(t, second, "a")
	}
}

// The filler leaves the processors to a guest that boots, but not at the price
// of having nothing.
func TestAheadIsPatient(t *testing.T) {
	for name, c := range map[string]struct {
		ready []int // disks of each kind
		since time.Duration
		wait  bool
		kind  int // that is filled
	}{
		"one of two was taken just now": {ready: []int{1}, since: 0, wait: true},
		"and some time ago":             {ready: []int{1}, since: refillAfter},
		"both were taken":               {ready: []int{0}, since: 0},
		"another kind has none":         {ready: []int{1, 0}, since: 0, kind: 1},
		"nothing lacks":                 {ready: []int{2, 2}, since: 0, kind: -1},
	} {
		a := newAhead(&Disks{Ahead: 2})
		for _, n := range c.ready {
			a.kinds = append(a.kinds, &kind{ready: make([]string, n)})
		}
		a.last = time.Now().Add(-c.since)
		k, wait := a.lacking()
		if (wait > 0) != c.wait || slices.Index(a.kinds, k) != c.kind {
			t.Errorf("%s: kind %d after %s", name, slices.Index(a.kinds, k), wait)
		}
	}
}
