package network

import (
	"testing"
)

func BenchmarkSlot(b *testing.B) {
	p := testPool(b, "bench")
	for b.Loop() {
		s := acquire(b, p, true)
		b.StopTimer()
		if err := p.Release(b.Context(), s.Index); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

func BenchmarkRelease(b *testing.B) {
	p := testPool(b, "bench")
	for b.Loop() {
		b.StopTimer()
		s := acquire(b, p, true)
		b.StartTimer()
		if err := p.Release(b.Context(), s.Index); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPolicy(b *testing.B) {
	p := testPool(b, "bench")
	for b.Loop() {
		b.StopTimer()
		s := acquire(b, p, true)
		b.StartTimer()
		if err := p.SetPolicy(b.Context(), s.Index, closed); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := p.Release(b.Context(), s.Index); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
