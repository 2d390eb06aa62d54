package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
)

// saveAs saves a disk, in both steps.
func saveAs(t testing.TB, d *Disks, id, name string) (Saved, error) {
	t.Helper()
	if err := d.Clone(t.Context(), id, name); err != nil {
		return Saved{}, err
	}
	return d.Keep(t.Context(), name, true)
}

func save(t testing.TB, d *Disks, id, name string) Saved {
	t.Helper()
	s, err := saveAs(t, d, id, name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func wantSaved(t testing.TB, d *Disks, want ...string) {
	t.Helper()
	got, err := d.ListSaved(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" && len(want)+len(got) > 0 {
		t.Fatalf("ListSaved (-want +got):\n%s", diff)
	}
}

// A saved disk is what the disk held at that instant, and what is made from it
// shares nothing with anybody: over several generations, and after the
// original and the saved disk are gone.
func TestSave(t *testing.T) {
	d := openDisks(t, &Disks{Dir: newDir(t)})
	base := layer(t, map[string]string{"etc/name": "base", "etc/gone": "g", "dir/sub/file": "f"})
	spec := func(id, from string) Spec {
		return Spec{ID: id, Layers: []Layer{base}, SizeMB: 64, From: from}
	}
	a := create(t, d, spec("a", ""))
	write(t, filepath.Join(a.Path, "etc/name"), "written by a")
	write(t, filepath.Join(a.Path, "large"), strings.Repeat("0123456789abcdef", 1<<18))
	if err := errors.Join(
		os.Remove(filepath.Join(a.Path, "etc/gone")),
		os.Rename(filepath.Join(a.Path, "dir"), filepath.Join(a.Path, "moved")),
		os.Link(filepath.Join(a.Path, "large"), filepath.Join(a.Path, "linked")),
	); err != nil {
		t.Fatal(err)
	}
	s := save(t, d, "a", "s1")
	if fi, err := os.Stat(s.File); err != nil || fi.Size() != s.SizeBytes || s.SizeBytes == 0 {
		t.Fatalf("Save returned %+v; the file: %v, %v", s, fi, err)
	}
	write(t, filepath.Join(a.Path, "etc/name"), "later")
	wantIDs(t, d, "a")
	wantSaved(t, d, "s1")

	b, c := create(t, d, spec("b", "s1")), create(t, d, spec("c", "s1"))
	for _, r := range []Root{b, c} {
		wantFile(t, filepath.Join(r.Path, "etc/name"), "written by a")
		wantFile(t, filepath.Join(r.Path, "moved/sub/file"), "f")
		if _, err := os.Stat(filepath.Join(r.Path, "etc/gone")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a removed file of the layer is back: %v", err)
		}
		x, err1 := os.Stat(filepath.Join(r.Path, "large"))
		y, err2 := os.Stat(filepath.Join(r.Path, "linked"))
		if err1 != nil || err2 != nil || !os.SameFile(x, y) || x.Size() != 4<<20 {
			t.Errorf("the hard link is lost: %v, %v", err1, err2)
		}
	}
	write(t, filepath.Join(b.Path, "etc/name"), "written by b")
	wantFile(t, filepath.Join(c.Path, "etc/name"), "written by a")
	wantFile(t, filepath.Join(a.Path, "etc/name"), "later")

	// Ten generations, each from the one before.
	from, last := "s1", "c"
	for n := range 10 {
		id, name := fmt.Sprintf("g%d", n), fmt.Sprintf("gs%d", n)
		r := create(t, d, spec(id, from))
		write(t, filepath.Join(r.Path, id), id)
		save(t, d, id, name)
		if err := errors.Join(d.Remove(t.Context(), last), d.RemoveSaved(t.Context(), from)); err != nil {
			t.Fatal(err)
		}
		from, last = name, id
	}
	r := create(t, d, spec("end", from))
	for n := range 10 {
		wantFile(t, filepath.Join(r.Path, fmt.Sprintf("g%d", n)), fmt.Sprintf("g%d", n))
	}
	wantSaved(t, d, "gs9")
}

func TestSaveRefusals(t *testing.T) {
	d := openDisks(t, &Disks{Dir: newDir(t)})
	base := layer(t, map[string]string{"x": "x"})
	create(t, d, Spec{ID: "a", Layers: []Layer{base}, SizeMB: 64})
	for _, tc := range []struct {
		id, name string
		want     cay.Code
	}{
		{"unknown", "s", cay.CodeNotFound},
		{"a", "../s", cay.CodeInvalidRequest},
		{"a", "", cay.CodeInvalidRequest},
	} {
		if _, err := saveAs(t, d, tc.id, tc.name); cay.CodeOf(err) != tc.want {
			t.Errorf("saveAs(%q, %q): %v; want %s", tc.id, tc.name, err, tc.want)
		}
	}
	wantSaved(t, d)
	if _, err := d.Create(t.Context(), Spec{ID: "b", Layers: []Layer{base}, SizeMB: 64, From: "none"}); err == nil {
		t.Error("a disk was made from a saved disk that is not there")
	}
	wantIDs(t, d, "a")
	if _, err := d.FindSaved("none"); cay.CodeOf(err) != cay.CodeObjectMissing {
		t.Errorf("FindSaved of an unknown one: %v", err)
	}
	if err := d.RemoveSaved(t.Context(), "none"); err != nil {
		t.Error(err)
	}
}

// A save that stops at any step leaves the earlier saved disk, or none, and
// nothing else after the next Open.
func TestSaveStopped(t *testing.T) {
	dir := newDir(t)
	d := openDisks(t, &Disks{Dir: dir})
	base := layer(t, map[string]string{"x": "x"})
	a := create(t, d, Spec{ID: "a", Layers: []Layer{base}, SizeMB: 64})
	write(t, filepath.Join(a.Path, "f"), "first")
	save(t, d, "a", "s")
	write(t, filepath.Join(a.Path, "f"), "second")
	stopped := errors.New("stopped")
	for _, at := range []string{"save: write back", "save: clone the image", "save: publish"} {
		d.fault = func(step string) error {
			if step == at {
				return stopped
			}
			return nil
		}
		if _, err := saveAs(t, d, "a", "s"); !errors.Is(err, stopped) {
			t.Fatalf("%s: %v", at, err)
		}
		d.fault = nil
		if left, err := filepath.Glob(d.savedFile("*") + halfSuffix); err != nil || len(left) > 0 {
			t.Errorf("%s: %v are left, %v", at, left, err)
		}
		r := create(t, d, Spec{ID: "b", Layers: []Layer{base}, SizeMB: 64, From: "s"})
		wantFile(t, filepath.Join(r.Path, "f"), "first")
		if err := d.Remove(t.Context(), "b"); err != nil {
			t.Fatal(err)
		}
	}
	write(t, d.savedFile("half")+".new", "half")
	if err := errors.Join(d.Close(), d.Open(t.Context())); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(d.savedFile("half") + ".new"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half of a saved disk is left: %v", err)
	}
	wantSaved(t, d, "s")
}

// A clone is of the instant when it was made, whatever is written until it is
// kept; one that is not kept is no saved disk, and goes like one.
func TestCloneThenKeep(t *testing.T) {
	for _, durable := range []bool{true, false} {
		d := openDisks(t, &Disks{Dir: newDir(t)})
		base := layer(t, map[string]string{"x": "x"})
		a := create(t, d, Spec{ID: "a", Layers: []Layer{base}, SizeMB: 64})
		write(t, filepath.Join(a.Path, "f"), "first")
		if err := errors.Join(d.Clone(t.Context(), "a", "s"), d.Clone(t.Context(), "a", "dropped")); err != nil {
			t.Fatal(err)
		}
		wantSaved(t, d)
		write(t, filepath.Join(a.Path, "f"), "second")
		if err := d.Flush("a"); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Keep(t.Context(), "s", durable); err != nil {
			t.Fatal(err)
		}
		if err := d.RemoveSaved(t.Context(), "dropped"); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Keep(t.Context(), "dropped", durable); err == nil {
			t.Error("a clone that was removed was kept")
		}
		wantSaved(t, d, "s")
		b := create(t, d, Spec{ID: "b", Layers: []Layer{base}, SizeMB: 64, From: "s"})
		wantFile(t, filepath.Join(b.Path, "f"), "first")
	}
}

// What was written long ago costs a save nothing where the pool clones files.
func BenchmarkSave(b *testing.B) {
	d := openDisks(b, &Disks{Dir: newDir(b)})
	base := layer(b, map[string]string{"x": "x"})
	a := create(b, d, Spec{ID: "a", Layers: []Layer{base}, SizeMB: 4096})
	for _, mib := range []int{0, 256, 1024} {
		write(b, filepath.Join(a.Path, "data"), strings.Repeat("x", mib<<20))
		if err := d.Flush("a"); err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("%dMiB", mib), func(b *testing.B) {
			var made time.Duration
			for n := 0; b.Loop(); n++ {
				save(b, d, "a", "s")
				began := time.Now()
				create(b, d, Spec{ID: "b", Layers: []Layer{base}, SizeMB: 4096, From: "s"})
				made += time.Since(began)
				b.StopTimer()
				if err := d.Remove(b.Context(), "b"); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(made.Microseconds())/1000/float64(b.N), "create-ms/op")
		})
	}
}
