package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	if c := Probe(t.TempDir()); c.usable() != nil {
		t.Skip(c.usable())
	}
}

// checkLeaks fails the test if anything under dir is mounted or backs a loop
// device when the test is over.
func checkLeaks(t testing.TB, dir string) {
	t.Helper()
	t.Cleanup(func() {
		mounts, err := readMounts()
		if err != nil {
			t.Error(err)
		}
		for _, m := range slices.Backward(mounts) {
			if strings.HasPrefix(m.Point, dir+"/") {
				t.Errorf("left mounted: %s on %s", m.FSType, m.Point)
				_ = unix.Unmount(m.Point, unix.MNT_DETACH)
			}
		}
		if left := gone(func() []string { return loops(t, dir) }); left != nil {
			t.Errorf("left loop devices over %v", left)
		}
	})
}

// gone waits until f finds nothing, and returns what it found last. A process
// that is just being started in a mount namespace of its own, by whomever,
// holds a copy of every mount for an instant.
func gone(f func() []string) []string {
	var left []string
	for range 100 {
		if left = f(); len(left) == 0 {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return left
}

// loops returns the files under dir that back loop devices.
func loops(t testing.TB, dir string) []string {
	t.Helper()
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err == nil && strings.HasPrefix(string(b), dir+"/") {
			out = append(out, strings.TrimSpace(string(b)))
		}
	}
	return out
}

// newDir returns a directory that is checked for leaks at the end.
func newDir(t testing.TB) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	checkLeaks(t, dir)
	return dir
}

// openDisks opens disks over dir; at the end every disk is removed and
// everything unmounted.
func openDisks(t testing.TB, d *Disks) *Disks {
	t.Helper()
	if err := d.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if err := d.Close(); err != nil { // stops the filler, which reads fault
			t.Error(err)
		}
		d.fault = nil
		if err := d.Open(ctx); err != nil {
			t.Error(err)
			return
		}
		ids, err := d.List(ctx)
		for _, id := range ids {
			err = errors.Join(err, d.Remove(ctx, id))
		}
		if err := errors.Join(err, d.Release(ctx)); err != nil {
			t.Error(err)
		}
	})
	return d
}

// layer makes an EROFS image of the given files.
func layer(t testing.TB, files map[string]string) Layer {
	t.Helper()
	src := t.TempDir()
	for name, content := range files {
		p := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	img := filepath.Join(t.TempDir(), "layer.erofs")
	if out, err := exec.Command("mkfs.erofs", "-x-1", "-T0", "--quiet", img, src).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v: %s", err, out)
	}
	b, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	return Layer{Digest: cay.Digest(fmt.Sprintf("sha256:%x", sha256.Sum256(b))), File: img}
}

func create(t testing.TB, d *Disks, s Spec) Root {
	t.Helper()
	r, err := d.Create(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func wantFile(t testing.TB, path, content string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil || string(b) != content {
		t.Fatalf("%s = %.40q, %v; want %.40q", path, b, err, content)
	}
}

func wantIDs(t testing.TB, d *Disks, want ...string) {
	t.Helper()
	got, err := d.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" && len(want)+len(got) > 0 {
		t.Fatalf("List (-want +got):\n%s", diff)
	}
}

func TestCreate(t *testing.T) {
	d := openDisks(t, &Disks{Dir: newDir(t)})
	base := layer(t, map[string]string{"etc/name": "base", "etc/under": "base", "dir/sub/file": "f"})
	top := layer(t, map[string]string{"etc/name": "top", "usr/bin/agent": "agent"})
	a := create(t, d, Spec{ID: "a", Layers: []Layer{base, top}, SizeMB: 64})
	b := create(t, d, Spec{ID: "b", Layers: []Layer{base, top}, SizeMB: 64})
	wantIDs(t, d, "a", "b")

	// The higher layer wins, the lower shows through, and the root is a plain
	// directory that anyone in the guest may pass.
	wantFile(t, filepath.Join(a.Path, "etc/name"), "top")
	wantFile(t, filepath.Join(a.Path, "etc/under"), "base")
	if fi, err := os.Stat(a.Path); err != nil || fi.Mode().Perm() != 0o755 {
		t.Fatalf("root: %v, %v", fi.Mode(), err)
	}
	if _, err := os.Stat(filepath.Join(a.Path, "lost+found")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("lost+found: %v", err)
	}

	// Two disks over the same layers do not see each other's writes.
	write(t, filepath.Join(a.Path, "etc/name"), "mine")
	if err := os.Remove(filepath.Join(a.Path, "etc/under")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(a.Path, "dir"), filepath.Join(a.Path, "moved")); err != nil {
		t.Fatalf("rename of a directory of a lower layer: %v", err)
	}
	wantFile(t, filepath.Join(a.Path, "moved/sub/file"), "f")
	wantFile(t, filepath.Join(b.Path, "etc/name"), "top")
	wantFile(t, filepath.Join(b.Path, "etc/under"), "base")
	wantFile(t, filepath.Join(b.Path, "dir/sub/file"), "f")

	// A taken ID is refused and the disk that has it unharmed.
	if _, err := d.Create(t.Context(), Spec{ID: "a", Layers: []Layer{base}, SizeMB: 64}); cay.CodeOf(err) != cay.CodeConflict {
		t.Fatalf("Create of a taken ID = %v", err)
	}
	wantFile(t, filepath.Join(a.Path, "etc/name"), "mine")

	if err := d.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, d, "b")
	wantFile(t, filepath.Join(b.Path, "etc/name"), "top")
	a = create(t, d, Spec{ID: "a", Layers: []Layer{base, top}, SizeMB: 64})
	wantFile(t, filepath.Join(a.Path, "etc/name"), "top")
}

// The inode number of a file must not change when it is written to: programs
// (and the gVisor gofer) tell files apart by it.
func TestInodeNumbersAreStable(t *testing.T) {
	d := openDisks(t, &Disks{Dir: newDir(t)})
	r := create(t, d, Spec{ID: "a", SizeMB: 64, Layers: []Layer{
		layer(t, map[string]string{"f": "1", "g": "1"}), layer(t, map[string]string{"h": "1"})}})
	ino := func(name string) (dev, ino uint64) {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(r.Path, name), &st); err != nil {
			t.Fatal(err)
		}
		return st.Dev, st.Ino
	}
	dev, before := ino("f")
	write(t, filepath.Join(r.Path, "f"), "2")
	if gotDev, after := ino("f"); after != before || gotDev != dev {
		t.Errorf("copy-up changed the file's identity from %d:%d to %d:%d", dev, before, gotDev, after)
	}
	seen := map[uint64]string{}
	for _, n := range []string{"f", "g", "h", "."} {
		gotDev, i := ino(n)
		if seen[i] != "" || gotDev != dev {
			t.Errorf("%s and %s share an inode number, or devices differ", n, seen[i])
		}
		seen[i] = n
	}
}

func TestDiskSize(t *testing.T) {
	d := openDisks(t, &Disks{Dir: newDir(t)})
	lower := layer(t, map[string]string{"f": "1"})
	for _, mb := range []int{64, 512, 10240} {
		r := create(t, d, Spec{ID: fmt.Sprint("s", mb), Layers: []Layer{lower}, SizeMB: mb})
		free, _, err := freeSpace(r.Path)
		if err != nil {
			t.Fatal(err)
		}
		if want := int64(mb) << 20; free < want || free > want*106/100+8<<20 {
			t.Errorf("a disk of %d MiB has %d MiB free", mb, free>>20)
		}
		var st unix.Stat_t
		if err := unix.Stat(r.Image, &st); err != nil {
			t.Fatal(err)
		}
		if st.Blocks*512 > 4<<20 {
			t.Errorf("an empty disk of %d MiB takes %d KiB of the host", mb, st.Blocks/2)
		}
	}
}

func fill(path string, limit int) (int, error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	chunk := bytes.Repeat([]byte("x"), 1<<20)
	for n := range limit {
		if _, err := f.Write(chunk); err != nil {
			return n, err
		}
	}
	return limit, nil
}

// The size is a hard limit; the disk works again when room is made; others do
// not notice.
func TestFullDisk(t *testing.T) {
	d := openDisks(t, &Disks{Dir: newDir(t)})
	lower := layer(t, map[string]string{"f": "1"})
	a := create(t, d, Spec{ID: "a", Layers: []Layer{lower}, SizeMB: 64})
	b := create(t, d, Spec{ID: "b", Layers: []Layer{lower}, SizeMB: 64})
	n, err := fill(filepath.Join(a.Path, "big"), 100)
	if !errors.Is(err, unix.ENOSPC) || n < 60 || n > 72 {
		t.Fatalf("wrote %d MiB of 64, then %v", n, err)
	}
	if _, err := fill(filepath.Join(b.Path, "big"), 40); err != nil {
		t.Fatalf("another disk: %v", err)
	}
	if err := os.Remove(filepath.Join(a.Path, "big")); err != nil {
		t.Fatal(err)
	}
	if n, err := fill(filepath.Join(a.Path, "again"), 40); err != nil {
		t.Fatalf("after a removal: %d MiB, %v", n, err)
	}
}

// A disk that was removed gives its room back to the host.
func TestRemoveGivesRoomBack(t *testing.T) {
	dir := newDir(t)
	d := openDisks(t, &Disks{Dir: dir})
	lower := layer(t, map[string]string{"f": "1"})
	r := create(t, d, Spec{ID: "a", Layers: []Layer{lower}, SizeMB: 512})
	if _, err := fill(filepath.Join(r.Path, "big"), 256); err != nil {
		t.Fatal(err)
	}
	unix.Sync()
	used := func() int64 {
		var n int64
		for _, p := range []string{filepath.Join(dir, poolFile), r.Image} {
			var st unix.Stat_t
			if unix.Stat(p, &st) == nil {
				n += st.Blocks * 512
			}
		}
		return n >> 20
	}
	before := used()
	if err := d.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := syncFS(d.path(poolDir)); err != nil { // discards run behind
		t.Fatal(err)
	}
	if after := used(); before-after < 200 {
		t.Errorf("the host file took %d MiB with the disk and takes %d without", before, after)
	}
}

func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

func TestAdmission(t *testing.T) {
	d := openDisks(t, &Disks{Dir: newDir(t), Reserve: 1 << 60})
	_, err := d.Create(t.Context(), Spec{ID: "a", Layers: []Layer{layer(t, nil)}, SizeMB: 64})
	var e *cay.Error
	if !errors.As(err, &e) || e.Code != cay.CodeDiskFull || e.Detail["freeBytes"] == "" || e.Detail["reserveBytes"] != fmt.Sprint(1<<60) || e.Fix == "" {
		t.Fatalf("Create = %v", err)
	}
	wantIDs(t, d)
}

func TestBadSpecs(t *testing.T) {
	d := openDisks(t, &Disks{Dir: newDir(t)})
	good := layer(t, map[string]string{"f": "1"})
	notImage := filepath.Join(t.TempDir(), "text")
	write(t, notImage, strings.Repeat("no image\n", 10000))
	other := cay.Digest("sha256:" + strings.Repeat("0", 64))
	for _, c := range []struct {
		name string
		spec Spec
		want cay.Code
	}{
		{"no ID", Spec{Layers: []Layer{good}, SizeMB: 64}, cay.CodeInvalidRequest},
		{"path as ID", Spec{ID: "../x", Layers: []Layer{good}, SizeMB: 64}, cay.CodeInvalidRequest},
		{"dot ID", Spec{ID: "..", Layers: []Layer{good}, SizeMB: 64}, cay.CodeInvalidRequest},
		{"ready ID", Spec{ID: "ready-1", Layers: []Layer{good}, SizeMB: 64}, cay.CodeInvalidRequest},
		{"no layer", Spec{ID: "a", SizeMB: 64}, cay.CodeInvalidRequest},
		{"no size", Spec{ID: "a", Layers: []Layer{good}}, cay.CodeInvalidRequest},
		{"bad digest", Spec{ID: "a", Layers: []Layer{{Digest: "sha256:../..", File: good.File}}, SizeMB: 64}, cay.CodeTemplateInvalid},
		{"missing file", Spec{ID: "a", Layers: []Layer{good, {Digest: other, File: "/no/such"}}, SizeMB: 64}, cay.CodeObjectMissing},
		{"not an image", Spec{ID: "a", Layers: []Layer{good, {Digest: other, File: notImage}}, SizeMB: 64}, cay.CodeObjectCorrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := d.Create(t.Context(), c.spec); cay.CodeOf(err) != c.want {
				t.Fatalf("Create = %v, want %s", err, c.want)
			}
			wantIDs(t, d)
		})
	}
	if err := d.Remove(t.Context(), "../x"); cay.CodeOf(err) != cay.CodeInvalidRequest {
		t.Errorf("Remove of a path = %v", err)
	}
	if err := d.Remove(t.Context(), "unknown"); err != nil {
		t.Errorf("Remove of an unknown disk = %v", err)
	}
}

// Many at once: no two get the same loop device, nothing is left.
func TestConcurrent(t *testing.T) {
	dir := newDir(t)
	d := openDisks(t, &Disks{Dir: dir, Ahead: 2})
	lower := layer(t, map[string]string{"f": "1"})
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 4 {
				id := fmt.Sprintf("w%d-%d", w, i)
				r, err := d.Create(t.Context(), Spec{ID: id, Layers: []Layer{lower}, SizeMB: 64})
				if err != nil {
					t.Error(err)
					return
				}
				p := filepath.Join(r.Path, "mine")
				if err := os.WriteFile(p, []byte(id), 0o644); err != nil {
					t.Error(err)
				}
				if es, err := os.ReadDir(r.Path); err != nil || len(es) != 2 {
					t.Errorf("%s holds %v, %v", id, es, err)
				}
				if i%2 == 0 {
					if err := d.Remove(t.Context(), id); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	for w := range 8 {
		for _, i := range []int{1, 3} {
			id := fmt.Sprintf("w%d-%d", w, i)
			wantFile(t, d.path(disksDir, id, rootName, "mine"), id)
		}
	}
}
