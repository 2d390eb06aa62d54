package main

import (
	"math"
	"slices"
	"time"
)

// Summary describes a series of measurements in one unit.
type Summary struct {
	Unit string  `json:"unit"`
	N    int     `json:"n"`
	Min  float64 `json:"min"`
	P50  float64 `json:"p50"`
	P95  float64 `json:"p95"`
	P99  float64 `json:"p99"`
	Max  float64 `json:"max"`
	Mean float64 `json:"mean"`
}

// series is what was measured under one name, in the order of measurement.
type series struct {
	unit   string
	values []float64
}

// book holds every series of a run by its name. The zero value is not usable.
type book map[string]*series

func (b book) add(name, unit string, v float64) {
	s := b[name]
	if s == nil {
		s = &series{unit: unit}
		b[name] = s
	}
	s.values = append(s.values, v)
}

// took records a duration in milliseconds.
func (b book) took(name string, d time.Duration) {
	b.add(name, "ms", float64(d)/float64(time.Millisecond))
}

// summaries describes every series.
func (b book) summaries() map[string]Summary {
	out := make(map[string]Summary, len(b))
	for name, s := range b {
		out[name] = summarize(s.unit, s.values)
	}
	return out
}

// summarize describes values, of which there must be one at least. It does not
// change them.
func summarize(unit string, values []float64) Summary {
	v := slices.Sorted(slices.Values(values))
	var sum float64
	for _, x := range v {
		sum += x
	}
	return Summary{Unit: unit, N: len(v), Min: round(v[0]), P50: round(rank(v, 50)), P95: round(rank(v, 95)),
		P99: round(rank(v, 99)), Max: round(v[len(v)-1]), Mean: round(sum / float64(len(v)))}
}

// rank is the p-th percentile of sorted values by nearest rank: the smallest
// value that at least p percent of all do not exceed. It is always a value that
// was measured; of fewer than 100 values the 99th percentile is the largest.
func rank(sorted []float64, p int) float64 {
	n := (len(sorted)*p + 99) / 100
	return sorted[max(n, 1)-1]
}

// round keeps what a clock and a busy machine can tell apart.
func round(v float64) float64 { return math.Round(v*1000) / 1000 }
