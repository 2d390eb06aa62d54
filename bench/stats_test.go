package main

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSummarize(t *testing.T) {
	upTo := func(n int) []float64 {
		var out []float64
		for i := range n {
			out = append(out, float64(i+1))
		}
		rand.New(rand.NewPCG(1, 2)).Shuffle(n, func(i, j int) { out[i], out[j] = out[j], out[i] })
		return out
	}
	for _, c := range []struct {
		name   string
		values []float64
		want   Summary
	}{
		{"one value is every percentile", []float64{7}, Summary{"ms", 1, 7, 7, 7, 7, 7, 7}},
		{"the median of two is the smaller", []float64{3, 1}, Summary{"ms", 2, 1, 1, 3, 3, 3, 2}},
		{"of three the middle one", []float64{9, 1, 2}, Summary{"ms", 3, 1, 2, 9, 9, 9, 4}},
		{"a percentile is a measured value", upTo(20), Summary{"ms", 20, 1, 10, 19, 20, 20, 10.5}},
		{"one in a hundred is beyond the 99th", upTo(100), Summary{"ms", 100, 1, 50, 95, 99, 100, 50.5}},
		{"one in a hundred of 1,000", upTo(1000), Summary{"ms", 1000, 1, 500, 950, 990, 1000, 500.5}},
		{"rounded to thousandths", []float64{1.23456}, Summary{"ms", 1, 1.235, 1.235, 1.235, 1.235, 1.235, 1.235}},
	} {
		before := slices.Clone(c.values)
		if diff := cmp.Diff(c.want, summarize("ms", c.values)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
		if !slices.Equal(before, c.values) {
			t.Errorf("%s: the values were reordered", c.name)
		}
	}
}

// TestRankByDefinition compares with how many values a percentile covers. It is
// no fuzz target because gVisor, in this program, does not compile as one.
func TestRankByDefinition(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 5000 {
		v := make([]float64, 1+r.IntN(250))
		for i := range v {
			v[i] = float64(r.IntN(50)) // with repetitions
		}
		slices.Sort(v)
		p := 1 + r.IntN(100)
		got := rank(v, p)
		within, below := 0, 0
		for _, x := range v {
			if x <= got {
				within++
			}
			if x < got {
				below++
			}
		}
		if within*100 < p*len(v) || below*100 >= p*len(v) {
			t.Fatalf("the %dth percentile of %v is %v: %d are within it, %d below", p, v, got, within, below)
		}
	}
}

func TestBook(t *testing.T) {
	b := book{}
	b.took("create", 1500*time.Microsecond)
	b.took("create", 500*time.Microsecond)
	b.add("idle", "MB", 12)
	want := map[string]Summary{
		"create": {Unit: "ms", N: 2, Min: 0.5, P50: 0.5, P95: 1.5, P99: 1.5, Max: 1.5, Mean: 1},
		"idle":   {Unit: "MB", N: 1, Min: 12, P50: 12, P95: 12, P99: 12, Max: 12, Mean: 12},
	}
	if diff := cmp.Diff(want, b.summaries()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
