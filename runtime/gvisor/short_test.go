package gvisor

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/prelude"
	"github.com/cayhq/cay/runtime"
)

func TestShortBoot(t *testing.T) {
	defer func(v bool) { prelude.Trimmed = v }(prelude.Trimmed)
	flag := shortFlag("cpu-num=2", "total-memory=512")
	if !prelude.IsSandbox([]string{"runsc-sandbox", flag, "boot", "x"}) {
		t.Fatalf("%s is not taken for the mark", flag)
	}
	for name, c := range map[string]struct {
		trimmed    bool
		args, want []string
	}{
		"limits, and capabilities given up in place": {true,
			[]string{"runsc-sandbox", flag, "boot", "--total-memory=4096", "x"},
			[]string{"runsc-sandbox", flag, "boot", "--total-memory=4096", "--cpu-num=2", "--total-memory=512", "--apply-caps=true", "x"}},
		"the file server's program is not the sandbox's": {true,
			[]string{"runsc-sandbox", shortFlag("cpu-num=2", "gofer=/g"), "boot", "x"},
			[]string{"runsc-sandbox", shortFlag("cpu-num=2", "gofer=/g"), "boot", "--cpu-num=2", "--apply-caps=true", "x"}},
		"the bounding set could not be emptied": {false,
			[]string{"runsc-sandbox", shortFlag(), "boot", "--setup-root", "x"},
			[]string{"runsc-sandbox", shortFlag(), "boot", "--setup-root", "x"}},
		"no boot command": {true,
			[]string{"runsc-sandbox", flag},
			[]string{"runsc-sandbox", flag}},
	} {
		t.Run(name, func(t *testing.T) {
			prelude.Trimmed = c.trimmed
			given := slices.Clone(c.args)
			if diff := cmp.Diff(c.want, shortBoot(c.args)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(given, c.args); diff != "" {
				t.Errorf("the given arguments changed: %s", diff)
			}
		})
	}
}

func TestBootLimits(t *testing.T) {
	got := bootLimits(runtime.Limits{CPUs: 1, MemoryBytes: 512 << 20, PIDs: 7})
	for _, want := range []string{"cpu-quota=100000", "cpu-period=100000", "total-memory=536870912"} {
		if !slices.Contains(got, want) {
			t.Errorf("%q lacks %s", got, want)
		}
	}
	if hostMemory() <= 0 {
		t.Errorf("the machine has %d bytes of memory", hostMemory())
	}
}

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{
		"x": true, "X9_.-": true, "0": true, strings.Repeat("a", 64): true,
		"": false, "-x": false, ".": false, "_": false, "a/b": false, "a b": false, "é": false, "a\x00": false, strings.Repeat("a", 65): false,
	} {
		if validID(id) != want {
			t.Errorf("validID(%q) = %t", id, !want)
		}
	}
}
