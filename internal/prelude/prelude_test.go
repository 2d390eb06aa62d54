package prelude

import (
	"os"
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
