package template

import (
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/cayhq/cay/templates"
)

// TestRealBase builds the stock base template from Debian's archive, which
// takes about a minute and needs root and a mirror. It runs when CAY_REAL_BUILD
// names a file to keep the system image in.
func TestRealBase(t *testing.T) {
	keep := os.Getenv("CAY_REAL_BUILD")
	if keep == "" {
		t.Skip("set CAY_REAL_BUILD to a file for the image")
	}
	recipe, err := ReadRecipe(templates.Files, "base")
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t)
	r.Now = time.Now
	r.Progress = Printer(os.Stdout, false, false)
	m, err := r.Build(t.Context(), recipe)
	if err != nil {
		t.Fatal(err)
	}
	in, o, err := r.blobs.Open(t.Context(), LayerKey(m.Layers[0].Digest))
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(keep)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d MiB, %s", m.Layers[0].Digest, o.SizeBytes>>20, keep)

	// What clients rely on, checked in a chroot without network.
	mnt := t.TempDir()
	if out, err := exec.Command("mount", "-o", "ro,loop", "-t", "erofs", keep, mnt).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	defer func() {
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	}()
	for _, c := range []string{
		`id user | grep -qx 'uid=1000(user) gid=1000(user) groups=1000(user),27(sudo)'`,
		`su - user -c 'echo $PATH' | grep -q '^/home/user/.local/bin:'`,
		`su - user -c 'sudo -n true'`,
		`test "$(stat -c %a /usr/local/bin /usr/local/lib | sort -u)" = 777`,
		`getent hosts "$(hostname)"`,
		`python --version && python3 -c 'import ssl, sqlite3, json' && python3 -m venv --help >/dev/null`,
		`pip --version && ! ls /usr/lib/python3*/EXTERNALLY-MANAGED`,
		`node --version && npm --version && git --version && curl --version`,
		`test -d /tmp/.X11-unix && test "$(stat -c %a /tmp)" = 1777`,
		`test -s /etc/apt/sources.list && ! test -e /etc/apt/apt.conf.d/99mmdebstrap`,
		`test -s /etc/ssl/certs/ca-certificates.crt`,
		`test "$(stat -c %a /)" = 755`,
		`! ls /var/lib/apt/lists/*Packages*`,
	} {
		cmd := exec.Command("chroot", mnt, "/bin/bash", "-c", c)
		cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", c, err, out)
		}
	}
}
