package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestJudge(t *testing.T) {
	o := outcome{cores: 2,
		series: map[string]Summary{
			bareReady:  {Unit: "ms", P50: 100},
			createCold: {Unit: "ms", P50: 80, P99: 240},
			createPool: {Unit: "ms", P50: 46, P99: 200},
			upEmpty:    {Unit: "ms", P50: 900, Max: 2001},
		},
		figures: map[string]Figure{
			idleMemory: {16, "MB"},
			ratePool:   {9, "/s"},
		}}
	want := []Target{
		{Name: "create, no pool ÷ bare runsc run --detach, to envd's answer", Value: 0.8, Limit: 0.8, Unit: "×", Met: true, Required: true},
		{Name: "create, pool ÷ bare runsc run --detach, to envd's answer", Value: 0.46, Limit: 0.45, Unit: "×", Required: true},
		{Name: "create, no pool: p99 ÷ p50", Value: 3, Limit: 3, Unit: "×", Met: true, Required: true},
		{Name: "create, pool: p99 ÷ p50", Value: 4.348, Limit: 3, Unit: "×", Required: true},
		{Name: "idle sandbox, memory", Value: 16, Limit: 16, Unit: "MB", Met: true, Required: true},
		{Name: "cay up, prepared directory: slowest", Value: 2001, Limit: 2000, Unit: "ms", Required: true},
		{Name: "create, pool: p50", Value: 46, Limit: 2, Unit: "ms"},
		{Name: "creates and kills a second, pool, per core", Value: 4.5, Limit: 5, AtLeast: true, Unit: "/s"},
	}
	if diff := cmp.Diff(want, judge(o)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestJudgeNothing: a target without its figures is left out, not met.
func TestJudgeNothing(t *testing.T) {
	if got := judge(outcome{}); len(got) != 0 {
		t.Errorf("got %v", got)
	}
}
