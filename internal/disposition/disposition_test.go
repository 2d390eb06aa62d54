package disposition

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

// mask reads a mask of signals from /proc/self/status (proc(5)).
func mask(t *testing.T, name string) uint64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), name+":\t")
	m, err := strconv.ParseUint(text[:16], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestThereAndBack(t *testing.T) {
	rest := 7 << 31 &^ mask(t, "SigCgt")  // Go has use for 33
	if err := RestoreRest(); err != nil { // `go run` has one ignored
		t.Fatal(err)
	}
	before := mask(t, "SigIgn")
	if before&rest != 0 {
		t.Fatalf("already ignored: %#x", before)
	}
	if rest == 0 {
		t.Fatal("Go handles them all")
	}
	for range 2 { // a second time changes nothing
		if err := IgnoreRest(); err != nil {
			t.Fatal(err)
		}
		if got := mask(t, "SigIgn"); got != before|rest {
			t.Errorf("ignored are %#x, want %#x", got, before|rest)
		}
	}
	if err := RestoreRest(); err != nil {
		t.Fatal(err)
	}
	if got := mask(t, "SigIgn"); got != before {
		t.Errorf("at the end ignored are %#x, want %#x", got, before)
	}
}
