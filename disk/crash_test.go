package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

var errCrash = errors.New("crash")

// crash returns a fault that acts as a kill -9 at the n-th step: that step and
// all after it fail, so that no undoing runs either. count receives how many
// steps were passed.
func crash(n int, count *int) func(string) error {
	*count = 0
	return func(string) error {
		*count++
		if *count > n {
			return errCrash
		}
		return nil
	}
}

// A process killed at any step of Create leaves a disk that its successor
// lists and removes whole; images stay and are adopted.
func TestKilledWhileCreating(t *testing.T) {
	dir := newDir(t)
	lower := layer(t, map[string]string{"f": "1"})
	openDisks(t, &Disks{Dir: dir})
	for n := 0; ; n++ {
		first := &Disks{Dir: dir}
		if err := first.Open(t.Context()); err != nil {
			t.Fatal(err)
		}
		var steps int
		first.fault = crash(n, &steps)
		_, err := first.Create(t.Context(), Spec{ID: "a", Layers: []Layer{lower}, SizeMB: 64})
		if err == nil {
			if n < 5 {
				t.Fatalf("only %d steps were seen", n)
			}
			break
		}
		if !errors.Is(err, errCrash) {
			t.Fatalf("crash at %d: %v", n, err)
		}
		second := &Disks{Dir: dir}
		if err := second.Open(t.Context()); err != nil {
			t.Fatalf("crash at %d: Open: %v", n, err)
		}
		wantIDs(t, second, "a")
		if err := second.Remove(t.Context(), "a"); err != nil {
			t.Fatalf("crash at %d: Remove: %v", n, err)
		}
		wantIDs(t, second)
		wantNothingOf(t, second, "a")
	}
}

func wantNothingOf(t *testing.T, d *Disks, id string) {
	t.Helper()
	mounts, err := readMounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.Point, d.path(disksDir, id)+"/") {
			t.Errorf("still mounted: %s", m.Point)
		}
	}
	for _, p := range []string{d.path(disksDir, id), d.imageFile(id)} {
		if _, err := os.Lstat(p); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("still there: %s (%v)", p, err)
		}
	}
	held := gone(func() []string {
		return slices.DeleteFunc(loops(t, d.Dir), func(f string) bool { return !strings.HasPrefix(f, d.imageFile(id)) })
	})
	if held != nil {
		t.Errorf("loop devices still hold the image of %s", id)
	}
}

// The same for Remove: every interrupted removal is listed and can be ended.
func TestKilledWhileRemoving(t *testing.T) {
	dir := newDir(t)
	lower := layer(t, map[string]string{"f": "1"})
	d := openDisks(t, &Disks{Dir: dir})
	for n := 0; ; n++ {
		create(t, d, Spec{ID: "a", Layers: []Layer{lower}, SizeMB: 64})
		var steps int
		d.fault = crash(n, &steps)
		err := d.Remove(t.Context(), "a")
		d.fault = nil
		if err == nil {
			if n < 5 {
				t.Fatalf("only %d steps were seen", n)
			}
			return
		}
		second := &Disks{Dir: dir}
		if err := second.Open(t.Context()); err != nil {
			t.Fatalf("crash at %d: Open: %v", n, err)
		}
		wantIDs(t, second, "a")
		for range 2 {
			if err := second.Remove(t.Context(), "a"); err != nil {
				t.Fatalf("crash at %d: Remove: %v", n, err)
			}
		}
		wantNothingOf(t, second, "a")
	}
}

// A successor finds running disks as they were, with their contents, and does
// not mount images twice.
func TestAdoption(t *testing.T) {
	dir := newDir(t)
	lower := layer(t, map[string]string{"f": "1"})
	first := openDisks(t, &Disks{Dir: dir})
	a := create(t, first, Spec{ID: "a", Layers: []Layer{lower}, SizeMB: 64})
	write(t, filepath.Join(a.Path, "mine"), "before")
	held, err := os.OpenFile(filepath.Join(a.Path, "held"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	mountsBefore, loopsBefore := len(mountsUnder(t, dir)), len(loops(t, dir))

	second := &Disks{Dir: dir}
	if err := second.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, second, "a")
	wantFile(t, filepath.Join(a.Path, "mine"), "before")
	if _, err := held.WriteString("still writable"); err != nil {
		t.Fatal(err)
	}
	// The file may be gone from the store: the mount is what counts.
	if p, err := second.MountImage(t.Context(), "/no/such/file", lower.Digest); err != nil || !strings.HasPrefix(p, dir) {
		t.Fatalf("MountImage of an adopted image = %q, %v", p, err)
	}
	if m, l := len(mountsUnder(t, dir)), len(loops(t, dir)); m != mountsBefore || l != loopsBefore {
		t.Errorf("mounts %d, loops %d; before the restart %d, %d", m, l, mountsBefore, loopsBefore)
	}
	if c := second.Capabilities(); c.Design != first.Capabilities().Design {
		t.Errorf("the design changed to %q", c.Design)
	}
}

func mountsUnder(t *testing.T, dir string) []string {
	t.Helper()
	mounts, err := readMounts()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, m := range mounts {
		if strings.HasPrefix(m.Point, dir+"/") {
			out = append(out, m.Point)
		}
	}
	return out
}

// A host that restarted has the files and no mounts.
func TestAfterReboot(t *testing.T) {
	dir := newDir(t)
	lower := layer(t, map[string]string{"f": "1"})
	first := openDisks(t, &Disks{Dir: dir})
	create(t, first, Spec{ID: "a", Layers: []Layer{lower}, SizeMB: 64})
	for _, p := range slices.Backward(mountsUnder(t, dir)) {
		if err := unix.Unmount(p, 0); err != nil {
			t.Fatalf("umount %s: %v", p, err)
		}
	}
	second := &Disks{Dir: dir}
	if err := second.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, second, "a")
	if err := second.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	wantNothingOf(t, second, "a")
	r, err := second.Create(t.Context(), Spec{ID: "a", Layers: []Layer{lower}, SizeMB: 64})
	if err != nil {
		t.Fatal(err)
	}
	wantFile(t, filepath.Join(r.Path, "f"), "1")
}

// A mount that somebody still uses is taken out of the tree all the same, and
// what it holds goes when its user does.
func TestRemoveInUse(t *testing.T) {
	dir := newDir(t)
	d := openDisks(t, &Disks{Dir: dir})
	r := create(t, d, Spec{ID: "a", Layers: []Layer{layer(t, map[string]string{"f": "1"})}, SizeMB: 64})
	held, err := os.Open(filepath.Join(r.Path, "f"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // do not wait for the user
	if err := d.Remove(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	held.Close()
	wantIDs(t, d)
	wantNothingOf(t, d, "a")
}

// Discarding a disk's unwritten data must never reach another file system,
// above all not the host's.
func TestDiscardOnlyItsOwn(t *testing.T) {
	dir := newDir(t)
	d := openDisks(t, &Disks{Dir: dir})
	create(t, d, Spec{ID: "a", Layers: []Layer{layer(t, map[string]string{"f": "1"})}, SizeMB: 64})
	for _, c := range []struct{ fsDir, img string }{
		{dir, d.imageFile("a")},                             // the host's file system
		{d.path(poolDir), d.imageFile("a")},                 // the pool
		{d.path(disksDir, "a", fsName), d.imageFile("b")},   // another disk's image
		{d.path(disksDir, "a", rootName), d.imageFile("a")}, // the overlay
		{d.path("none"), d.imageFile("a")},
	} {
		if err := d.discard(c.fsDir, c.img); err != nil {
			t.Errorf("discard(%s): %v", c.fsDir, err)
		}
	}
	write(t, filepath.Join(dir, "x"), "host")
	write(t, filepath.Join(d.path(poolDir), "x"), "pool")
	if err := os.Remove(filepath.Join(d.path(poolDir), "x")); err != nil {
		t.Fatal(err)
	}
	write(t, d.path(disksDir, "a", rootName, "x"), "disk")
}

func TestUnmountUnused(t *testing.T) {
	dir := newDir(t)
	d := openDisks(t, &Disks{Dir: dir})
	used, unused := layer(t, map[string]string{"f": "1"}), layer(t, map[string]string{"g": "1"})
	create(t, d, Spec{ID: "a", Layers: []Layer{used}, SizeMB: 64})
	p, err := d.MountImage(t.Context(), unused.File, unused.Digest)
	if err != nil {
		t.Fatal(err)
	}
	wantFile(t, filepath.Join(p, "g"), "1")
	if err := os.WriteFile(filepath.Join(p, "g"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing into an image: %v", err)
	}
	gone, err := d.UnmountUnused(t.Context())
	if err != nil || fmt.Sprint(gone) != fmt.Sprint([]cay.Digest{unused.Digest}) {
		t.Fatalf("UnmountUnused = %v, %v; want only %s", gone, err, unused.Digest)
	}
	if _, err := os.Stat(p); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the mount point is still there: %v", err)
	}
	if p, err := d.MountImage(t.Context(), unused.File, unused.Digest); err != nil {
		t.Errorf("mounting again: %v", err)
	} else {
		wantFile(t, filepath.Join(p, "g"), "1")
	}
}
