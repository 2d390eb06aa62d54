package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func sample() Report {
	r := Report{Format: 1, At: time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC), Commit: "abc", Took: 12,
		Machine:  Machine{CPU: "AMD EPYC", Cores: 2, MemoryMB: 24683, Kernel: "6.18", OS: "Debian 12", Arch: "amd64", Virtual: true},
		Load:     Load{Average: 0.4, BusyPercent: 3, StealPercent: 0},
		Versions: Versions{Cay: "0.1.0", Engine: "v0", SDK: "2.51.0", Node: "22", Go: "1.26"},
		Series: map[string]Summary{
			bareReady:            summarize("ms", []float64{100, 120, 90}),
			createCold:           summarize("ms", []float64{71.25, 80, 60}),
			stepPrefix + "ready": summarize("ms", []float64{0.0421}),
		},
		Figures: map[string]Figure{idleMemory: {17.25, "MB"}},
	}
	r.Targets = judge(outcome{series: r.Series, figures: r.Figures, cores: 2})
	return r
}

func TestPrint(t *testing.T) {
	var out strings.Builder
	sample().print(&out)
	want := `Cay 0.1.0 (abc) with gVisor v0
virtual machine: AMD EPYC, 2 cores, 24683 MB, Debian 12, Linux 6.18
before the run: load 0.40, processors 3 % busy, 0 % stolen

                                             n    min    p50    p95    p99    max
Create
  create, no pool                            3     60   71.2     80     80     80  ms
Yardsticks of the same run
  bare runsc run --detach, to envd's answer  3     90    100    120    120    120  ms
Steps of a create without a pool
  ready                                      1  0.042  0.042  0.042  0.042  0.042  ms

  idle sandbox, memory  17.2  MB

Promised
  create, no pool ÷ bare runsc run --detach, to envd's answer  0.71  ≤  0.80  ×   met
  create, no pool: p99 ÷ p50                                   1.12  ≤     3  ×   met
  idle sandbox, memory                                         17.2  ≤    16  MB  MISSED
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestSave(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "results")
	r := sample()
	path, err := r.save(dir)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(dir, "2026-11-24-abc.json"); path != want {
		t.Errorf("saved as %s, want %s", path, want)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var again Report
	if err := json.Unmarshal(b, &again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r, again); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if again.missed() != 1 {
		t.Errorf("%d promises missed, want 1", again.missed())
	}
	r.Quick = true
	if path, err = r.save(dir); err != nil || filepath.Base(path) != "2026-11-24-abc-quick.json" {
		t.Errorf("a quick run: %s, %v", path, err)
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0421: "0.042", 0.125: "0.12", 12.34: "12.3", 211.178: "211", 7: "7",
		-0.042: "-0.042", -0.998: "-1.00", -12.34: "-12.3", -211.178: "-211"} {
		if got := number(v); got != want {
			t.Errorf("%v is written %s, want %s", v, got, want)
		}
	}
}
