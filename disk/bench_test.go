package disk

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkCreate measures Create and Remove without disks held ready.
func BenchmarkCreate(b *testing.B) {
	d := openDisks(b, &Disks{Dir: newDir(b)})
	spec := Spec{Layers: []Layer{layer(b, map[string]string{"f": "1"}), layer(b, map[string]string{"g": "1"})}, SizeMB: 10240}
	spec.ID = "warm"
	create(b, d, spec)
	var made, removed time.Duration
	n := 0
	for b.Loop() {
		n++
		spec.ID = fmt.Sprint("d", n)
		t0 := time.Now()
		r := create(b, d, spec)
		made += time.Since(t0)
		write(b, filepath.Join(r.Path, "x"), "x")
		t0 = time.Now()
		if err := d.Remove(b.Context(), spec.ID); err != nil {
			b.Fatal(err)
		}
		removed += time.Since(t0)
	}
	b.ReportMetric(float64(made.Microseconds())/float64(n), "µs/create")
	b.ReportMetric(float64(removed.Microseconds())/float64(n), "µs/remove")
}

// BenchmarkTake measures Create of a disk that is ready.
func BenchmarkTake(b *testing.B) {
	d := openDisks(b, &Disks{Dir: newDir(b), Ahead: 1})
	spec := Spec{Layers: []Layer{layer(b, map[string]string{"f": "1"})}, SizeMB: 10240}
	if err := d.Prepare(spec); err != nil {
		b.Fatal(err)
	}
	var took time.Duration
	n := 0
	for b.Loop() {
		for countReady(d) == 0 {
			time.Sleep(time.Millisecond)
		}
		n++
		spec.ID = fmt.Sprint("d", n)
		t0 := time.Now()
		create(b, d, spec)
		took += time.Since(t0)
		if err := d.Remove(b.Context(), spec.ID); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(took.Microseconds())/float64(n), "µs/create")
}

// BenchmarkRemoveDirty measures Remove of a disk with 512 MiB just written.
func BenchmarkRemoveDirty(b *testing.B) {
	d := openDisks(b, &Disks{Dir: newDir(b)})
	spec := Spec{Layers: []Layer{layer(b, map[string]string{"f": "1"})}, SizeMB: 10240}
	var took time.Duration
	n := 0
	for b.Loop() {
		n++
		spec.ID = fmt.Sprint("d", n)
		r := create(b, d, spec)
		if _, err := fill(filepath.Join(r.Path, "big"), 512); err != nil {
			b.Fatal(err)
		}
		t0 := time.Now()
		if err := d.Remove(b.Context(), spec.ID); err != nil {
			b.Fatal(err)
		}
		took += time.Since(t0)
	}
	b.ReportMetric(float64(took.Microseconds())/float64(n), "µs/remove")
}
