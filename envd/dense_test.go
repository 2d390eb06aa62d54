package envd

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"
)

// TestDense: what compression does not make smaller is told by its middle.
func TestDense(t *testing.T) {
	noise := make([]byte, 1<<20)
	r := rand.NewChaCha8([32]byte{})
	r.Read(noise)
	text := []byte(strings.Repeat("a line of text\n", 1<<16))
	for _, c := range []struct {
		name string
		data []byte
		want bool
	}{
		{"noise", noise, true},
		{"text", text, false},
		{"text within noise", append(append(append([]byte{}, noise...), text...), noise...), false},
		{"little noise", noise[:sampleSize], false},
		{"nothing", nil, false},
	} {
		if got := dense(bytes.NewReader(c.data), int64(len(c.data))); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	if dense(bytes.NewReader(noise), 4<<20) {
		t.Error("a file that has become shorter passes for dense")
	}
}
