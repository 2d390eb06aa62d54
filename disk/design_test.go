package disk

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

// onlyTools makes a PATH that has only the named programs.
func onlyTools(t *testing.T, names ...string) {
	t.Helper()
	dir := t.TempDir()
	for _, n := range names {
		p, err := exec.LookPath(n)
		if err != nil {
			t.Skip(err)
		}
		if err := os.Symlink(p, filepath.Join(dir, n)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
}

// unmountSoon unmounts a file system whose last loop device may just be going.
func unmountSoon(t *testing.T, mnt string) {
	t.Helper()
	var err error
	left := gone(func() []string {
		if err = unix.Unmount(mnt, 0); err != nil {
			return []string{err.Error()}
		}
		return nil
	})
	if left != nil {
		t.Errorf("umount %s: %v", mnt, left)
	}
}

// Every design gives the same disks; what is chosen, and why not the better
// ones, is said.
func TestDesigns(t *testing.T) {
	mountTemp := func(t *testing.T, fsType string, mkfs ...string) string {
		dir := newDir(t)
		img := filepath.Join(dir, "host.img")
		if err := makeSparse(img, 2<<30); err != nil {
			t.Fatal(err)
		}
		if err := runTool(t.Context(), mkfs[0], append(mkfs[1:], img)...); err != nil {
			t.Skip(err)
		}
		mnt := filepath.Join(dir, "mnt")
		if err := os.Mkdir(mnt, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := withLoop(img, false, func(dev string) error { return unix.Mount(dev, mnt, fsType, 0, "") }); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			unmountSoon(t, mnt)
		})
		return mnt
	}
	for _, c := range []struct {
		name    string
		dir     func(t *testing.T) string
		want    Design
		refused map[Design]string
	}{
		{"reflink", func(t *testing.T) string { return mountTemp(t, "xfs", "mkfs.xfs", "-q") }, DesignReflink, nil},
		{"pool", func(t *testing.T) string { return mountTemp(t, "ext4", "mkfs.ext4", "-q") }, DesignPool,
			map[Design]string{DesignReflink: "not supported"}},
		{"copy", func(t *testing.T) string {
			dir := mountTemp(t, "ext4", "mkfs.ext4", "-q")
			onlyTools(t, "mkfs.ext4", "mkfs.erofs")
			return dir
		}, DesignCopy, map[Design]string{DesignReflink: "not supported", DesignPool: "mkfs.xfs"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := openDisks(t, &Disks{Dir: filepath.Join(c.dir(t), "disks"), Reserve: 64 << 20})
			caps := d.Capabilities()
			if caps.Design != c.want || caps.Why == "" || caps.FreeBytes == 0 {
				t.Fatalf("Capabilities = %+v", caps)
			}
			for design, part := range c.refused {
				if !strings.Contains(caps.Refused[design], part) {
					t.Errorf("why not %s: %q, want %q in it", design, caps.Refused[design], part)
				}
			}
			lower := layer(t, map[string]string{"f": "1"})
			for _, id := range []string{"a", "b"} {
				r := create(t, d, Spec{ID: id, Layers: []Layer{lower}, SizeMB: 64})
				write(t, filepath.Join(r.Path, "f"), id)
			}
			wantFile(t, d.path(disksDir, "a", rootName, "f"), "a")

			// The choice is kept by the next process.
			again := &Disks{Dir: d.Dir}
			if err := again.Open(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := again.Capabilities().Design; got != c.want {
				t.Errorf("the next process uses %q", got)
			}
		})
	}
}

func TestMissingTool(t *testing.T) {
	dir := newDir(t)
	onlyTools(t)
	err := (&Disks{Dir: dir}).Open(t.Context())
	if cay.CodeOf(err) != cay.CodeHostUnsupported || !strings.Contains(err.Error(), "apt-get install e2fsprogs") {
		t.Fatalf("Open = %v", err)
	}
}

// When the host's disk is full under the pool, guests get errors, nobody hangs,
// and after room is made a new disk works.
func TestHostDiskFull(t *testing.T) {
	outer := newDir(t)
	img, mnt := filepath.Join(outer, "host.img"), filepath.Join(outer, "mnt")
	if err := makeSparse(img, 400<<20); err != nil {
		t.Fatal(err)
	}
	if err := runTool(t.Context(), "mkfs.ext4", "-q", "-m", "0", img); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := withLoop(img, false, func(dev string) error { return unix.Mount(dev, mnt, "ext4", 0, "") }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unmountSoon(t, mnt)
	})
	d := openDisks(t, &Disks{Dir: filepath.Join(mnt, "disks"), Reserve: 32 << 20})
	lower := layer(t, map[string]string{"f": "1"})
	a := create(t, d, Spec{ID: "a", Layers: []Layer{lower}, SizeMB: 1024})
	write(t, filepath.Join(a.Path, "small"), "kept")
	n, err := fill(filepath.Join(a.Path, "big"), 1024)
	err2 := syncFS(d.path(disksDir, "a", fsName))
	if err == nil && err2 == nil {
		t.Fatalf("wrote %d MiB to a host of 400", n)
	}
	_, cerr := d.Create(t.Context(), Spec{ID: "b", Layers: []Layer{lower}, SizeMB: 64})
	if cay.CodeOf(cerr) != cay.CodeDiskFull {
		t.Errorf("Create on a full host = %v", cerr)
	}
	if err := d.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := syncFS(d.path(poolDir)); err != nil {
		t.Logf("sync of the pool: %v", err)
	}
	b := create(t, d, Spec{ID: "b", Layers: []Layer{lower}, SizeMB: 64})
	if _, err := fill(filepath.Join(b.Path, "big"), 32); err != nil {
		t.Fatal(err)
	}
	if err := syncFS(d.path(disksDir, "b", fsName)); err != nil {
		t.Fatal(err)
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add("22 27 0:21 / /proc rw,relatime - proc proc rw\n")
	f.Add(`36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue` + "\n")
	f.Add("1 2 0:3 / /m rw - overlay overlay rw,lowerdir=/a\\134:/b,upperdir=/u\n")
	f.Add("x - y")
	f.Fuzz(func(t *testing.T, text string) {
		mounts, err := parseMounts(text)
		if err != nil {
			return
		}
		for _, m := range mounts {
			m.usesLower("/a")
		}
	})
}

func TestParseMounts(t *testing.T) {
	got, err := parseMounts(`36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue
40 35 0:50 / /o rw - overlay overlay rw,lowerdir=/i/a:/i/b\040c,upperdir=/u,workdir=/w
41 35 0:51 / /p rw - overlay overlay rw,lowerdir+=/i/a,lowerdir+=/i/d,upperdir=/u
`)
	if err != nil || len(got) != 3 || got[0].Point != "/mnt 2" || got[0].FSType != "ext3" {
		t.Fatalf("parseMounts = %+v, %v", got, err)
	}
	for _, c := range []struct {
		i    int
		dir  string
		want bool
	}{{0, "/i/a", false}, {1, "/i/a", true}, {1, "/i/b c", true}, {1, "/i", false}, {1, "/u", false}, {2, "/i/d", true}} {
		if got[c.i].usesLower(c.dir) != c.want {
			t.Errorf("usesLower(%d, %s) != %v", c.i, c.dir, c.want)
		}
	}
}
