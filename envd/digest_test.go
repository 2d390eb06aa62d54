package envd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestLaidSum: the sum beside a program is taken only while both are as the
// image has them.
func TestLaidSum(t *testing.T) {
	epoch, sum := time.Unix(1577836800, 0), strings.Repeat("0a", 32)
	for name, c := range map[string]struct {
		text        string
		program, at time.Time
		want        bool
	}{
		"as laid":             {sum + "  envd\n", epoch, epoch, true},
		"program replaced":    {sum + "  envd\n", epoch.Add(time.Second), epoch, false},
		"sum replaced":        {sum + "  envd\n", epoch, time.Now(), false},
		"too short":           {sum[2:] + "  envd\n", epoch, epoch, false},
		"not hexadecimal":     {"zz" + sum[2:] + "  envd\n", epoch, epoch, false},
		"nothing":             {"", epoch, epoch, false},
		"endless":             {sum + " " + strings.Repeat("x", 1<<20), epoch, epoch, false},
		"no sum beside it":    {"-", epoch, epoch, false},
		"without a file name": {sum, epoch, epoch, true},
	} {
		program := filepath.Join(t.TempDir(), "envd")
		lay := func(path, text string, at time.Time) {
			if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(path, at, at); err != nil {
				t.Fatal(err)
			}
		}
		lay(program, "program", c.program)
		if c.text != "-" {
			lay(program+sumSuffix, c.text, c.at)
		}
		if got, ok := laidSum(program); ok != c.want || ok && got != sum {
			t.Errorf("%s: %q, %t", name, got, ok)
		}
	}
}
