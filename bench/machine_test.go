package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseCPU(t *testing.T) {
	for name, c := range map[string]struct {
		info    string
		model   string
		virtual bool
	}{
		"a virtual machine": {"processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu hypervisor lahf_lm\n\nprocessor\t: 1\nmodel name\t: AMD EPYC\n", "AMD EPYC", true},
		"a real machine":    {"model name\t: Ryzen: 9\nflags\t\t: fpu nohypervisor\n", "Ryzen: 9", false},
		"nothing":           {"", "", false},
	} {
		if model, virtual := parseCPU(c.info); model != c.model || virtual != c.virtual {
			t.Errorf("%s: got %q, %v", name, model, virtual)
		}
	}
}

func TestParseKiB(t *testing.T) {
	got := parseKiB("MemTotal:       24684036 kB\nMemAvailable:    1000 kB\nHugePages_Total:       0\nPss: x kB\n")
	want := map[string]float64{"MemTotal": 24684036 * 1024, "MemAvailable": 1024000}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestTimes(t *testing.T) {
	a, err := parseTimes("cpu  100 0 50 800 50 0 0 0 999 0\ncpu0 1 2 3\n")
	if err != nil {
		t.Fatal(err)
	}
	b, err := parseTimes("cpu  130 0 60 840 60 0 0 10 999 0\n")
	if err != nil {
		t.Fatal(err)
	}
	if busy, steal := b.since(a); busy != 50 || steal != 10 {
		t.Errorf("got %v %% busy, %v %% stolen, want 50 and 10", busy, steal)
	}
	if busy, steal := a.since(a); busy != 0 || steal != 0 {
		t.Errorf("over no time: %v, %v", busy, steal)
	}
	for _, bad := range []string{"", "cpu 1 2", "intr 1 2 3 4 5 6 7 8", "cpu a b c d e f g h"} {
		if _, err := parseTimes(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}
