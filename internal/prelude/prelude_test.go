package prelude

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestIsSandbox(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want bool
	}{
		"marked":            {[]string{"runsc-sandbox", "--root=/r", Mark, "boot", "--setup-root", "x"}, true},
		"of a bare runsc":   {[]string{"runsc-sandbox", "--root=/r", "boot", "--setup-root", "x"}, false},
		"gofer":             {[]string{"runsc-gofer", Mark, "gofer", "x"}, false},
		"without arguments": {nil, false},
	} {
		if got := IsSandbox(c.args); got != c.want {
			t.Errorf("%s: IsSandbox(%q) = %t", name, c.args, got)
		}
	}
}

// TestGoferProgram: the program is executed once, since its own command line
// does not name it any more.
func TestGoferProgram(t *testing.T) {
	args := []string{"runsc-gofer", "--root=/r", Mark + ",cpu-num=2," + GoferOption + "/a b/gofer-1,total-memory=3", "gofer", "--gofer-mount-confs=lisafs:none", "x"}
	if !IsOwnGofer(args) {
		t.Fatal("not recognised")
	}
	path, rest := goferProgram(args)
	want := slices.Clone(args)
	want[2] = Mark + ",cpu-num=2,total-memory=3"
	if path != "/a b/gofer-1" || !slices.Equal(rest, want) {
		t.Errorf("%q, %q; want %q", path, rest, want)
	}
	if path, again := goferProgram(rest); path != "" || !slices.Equal(again, rest) {
		t.Errorf("once more: %q, %q", path, again)
	}
	for name, edit := range map[string][2]string{
		"other mounts":    {"lisafs:none", "lisafs:none,lisafs:none"},
		"with a log":      {"--root=/r", "--debug-log-fd=3"},
		"of a bare runsc": {Mark, "--debug-command=x"},
		"a sandbox":       {"runsc-gofer", "runsc-sandbox"},
	} {
		other := slices.Clone(args)
		for i, a := range other {
			other[i] = strings.Replace(a, edit[0], edit[1], 1)
		}
		if IsOwnGofer(other) {
			t.Errorf("%s: taken for the one configuration", name)
		}
	}
}

// TestUmountWaits: nothing is unmounted without the byte, and what cannot be
// unmounted is told. The rest is in runtime/gvisor's TestConfinement, which
// starts real sandboxes.
func TestUmountWaits(t *testing.T) {
	for name, byteSent := range map[string]bool{"the sandbox died": false, "no such mount": true} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if byteSent {
			if _, err := w.Write([]byte{0}); err != nil {
				t.Fatal(err)
			}
		}
		w.Close()
		if got := umount(int(r.Fd()), t.TempDir()+"/absent"); got != 1 {
			t.Errorf("%s: the status is %d", name, got)
		}
		r.Close()
	}
}
