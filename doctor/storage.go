package doctor

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cayhq/cay/disk"
)

var storageChecks = []check{
	{id: "storage.datadir", title: "data directory", run: checkDataDir},
	{id: "storage.space", title: "disk space", run: checkSpace},
	{id: "storage.inodes", title: "inodes", run: checkInodes},
	{id: "storage.write", title: "writing", run: checkWrite},
	{id: "storage.secrets", title: "credentials", run: checkSecrets},
	{id: "storage.database", title: "database", run: needRoot(checkDatabase)},
	{id: "storage.artefacts", title: "artefact store", run: needRoot(checkArtefacts)},
	{id: "storage.disks", title: "disks of sandboxes", run: needRoot(checkDisks), alone: true, limit: 30 * time.Second},
}

// Space is the room of a file system.
type Space struct {
	Free, Total             int64 // bytes
	FreeInodes, TotalInodes int64 // TotalInodes is 0 where there is no limit
}

// longestDataDir leaves room below it for the path of a socket, which the
// kernel bounds at 108 bytes.
const longestDataDir = 70

func checkDataDir(_ context.Context, d *Doctor) Finding {
	if !filepath.IsAbs(d.DataDir) {
		return fail(fmt.Sprintf("%q is not an absolute path", d.DataDir), "name it by its full path")
	}
	if len(d.DataDir) > longestDataDir {
		return fail(fmt.Sprintf("%s is too long: sockets below it would have more than 107 bytes", d.DataDir),
			fmt.Sprintf("use a directory whose path has at most %d bytes", longestDataDir))
	}
	if ms, err := d.mounts(); err == nil {
		m, found := mountOf(ms, d.DataDir)
		switch {
		case found && slices.Contains(m.options, "ro"):
			return fail(fmt.Sprintf("%s is on %s, mounted read-only", d.DataDir, m.point), "`mount -o remount,rw "+m.point+"`, or name another directory with --data-dir")
		case found && (m.fsType == "tmpfs" || m.fsType == "ramfs"):
			return warn(fmt.Sprintf("%s is in memory (%s): what sandboxes write takes memory, and a restart of the machine loses templates and keys", d.DataDir, m.fsType),
				"name a directory on a disk with --data-dir")
		case found && (strings.HasPrefix(m.fsType, "nfs") || m.fsType == "cifs" || strings.HasPrefix(m.fsType, "fuse.")):
			return warn(fmt.Sprintf("%s is on a network file system (%s): slow, and locks and images may not work there", d.DataDir, m.fsType),
				"name a directory on a local disk with --data-dir")
		}
	}
	st, err := os.Stat(d.DataDir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ok("%s does not exist yet; `cay up` makes it", d.DataDir)
	case err != nil:
		return fail(fmt.Sprintf("%s cannot be looked at: %v", d.DataDir, err), "run as root, or name another directory with --data-dir")
	case !st.IsDir():
		return fail(d.DataDir+" is not a directory", "remove it, or name another directory with --data-dir")
	case st.Mode().Perm()&0o022 != 0:
		return fail(fmt.Sprintf("%s can be written by others (mode %#o)", d.DataDir, st.Mode().Perm()), "`chmod go-w "+d.DataDir+"`")
	}
	return ok("%s", d.DataDir)
}

// roomToBuild is what a build of the base template takes meanwhile.
const roomToBuild = 2 * gib

func checkSpace(_ context.Context, d *Doctor) Finding {
	if d.Space == nil {
		return skip("not asked")
	}
	dir := d.existing()
	s, err := d.Space(dir)
	if err != nil {
		return skip("%s does not tell: %v", dir, err)
	}
	evidence := fmt.Sprintf("%s of %s free at %s", size(s.Free), size(s.Total), dir)
	repair := "free space there (`du -xh --max-depth=2 " + dir + "`), or name a directory on another disk with --data-dir"
	switch {
	case s.Free <= d.ReserveBytes:
		return fail(fmt.Sprintf("%s; %s are kept in reserve, so no sandbox starts", evidence, size(d.ReserveBytes)), repair)
	case s.Free < d.ReserveBytes+roomToBuild:
		return warn(evidence+"; building a template needs 2 GiB beside the reserve of "+size(d.ReserveBytes), repair)
	}
	return ok("%s, %s of it in reserve", evidence, size(d.ReserveBytes))
}

func checkInodes(_ context.Context, d *Doctor) Finding {
	if d.Space == nil {
		return skip("not asked")
	}
	dir := d.existing()
	s, err := d.Space(dir)
	if err != nil {
		return skip("%s does not tell: %v", dir, err)
	}
	evidence := fmt.Sprintf("%d of %d free at %s", s.FreeInodes, s.TotalInodes, dir)
	repair := "remove small files there (`du -x --inodes --max-depth=2 " + dir + "`), or use another disk"
	switch {
	case s.TotalInodes == 0:
		return ok("not limited by this file system")
	case s.FreeInodes < 1000:
		return fail(evidence, repair)
	case s.FreeInodes < 50_000:
		return warn(evidence+"; building a template needs some 50,000", repair)
	}
	return ok("%s", evidence)
}

// slowSync is the time from which on a synced write holds up creates.
const slowSync = 200 * time.Millisecond

// checkWrite does what every durable object of Cay goes through: write, sync,
// rename, sync the directory, read back.
func checkWrite(_ context.Context, d *Doctor) (f Finding) {
	dir := d.existing()
	want := make([]byte, 1<<16)
	rand.Read(want)
	began := time.Now()
	path, err := durable(dir, want)
	took := time.Since(began)
	if path != "" {
		defer func() {
			if err := os.Remove(path); err != nil && f.Verdict == OK {
				f = failed(fmt.Errorf("removing the file again: %w", err), "look at the file system of "+dir)
			}
		}()
	}
	if errors.Is(err, fs.ErrPermission) {
		return skip("no permission to write in %s", dir)
	}
	if err != nil {
		return failed(err, "look at `dmesg` and the file system of "+dir)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		return failed(err, "look at `dmesg` and the file system of "+dir)
	}
	if !bytes.Equal(got, want) {
		return fail("a file in "+dir+" read back differently than it was written", "the disk or its file system is broken: look at `dmesg`, check it with fsck")
	}
	if took > slowSync {
		return warn(fmt.Sprintf("a durable write of 64 KiB in %s took %s", dir, took.Round(time.Millisecond)), "the disk is slow or busy (`iostat -x 1`); creates of sandboxes wait for it")
	}
	return ok("written, synced, renamed and read back in %s", took.Round(100*time.Microsecond))
}

// durable writes a file and returns its name, also after a failure once there
// is one.
func durable(dir string, b []byte) (string, error) {
	f, err := os.CreateTemp(dir, ".doctor-*")
	if err != nil {
		return "", err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return f.Name(), err
	}
	to := f.Name() + ".done"
	if err := os.Rename(f.Name(), to); err != nil {
		return f.Name(), err
	}
	dirFile, err := os.Open(dir)
	if err != nil {
		return to, err
	}
	defer dirFile.Close()
	return to, dirFile.Sync()
}

func checkSecrets(_ context.Context, d *Doctor) Finding {
	path := filepath.Join(d.DataDir, "credentials.json")
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ok("none yet; the first `cay up` makes them")
	case err != nil:
		return skip("%s cannot be looked at: %v", path, err)
	case st.Mode().Perm()&0o077 != 0:
		return fail(fmt.Sprintf("%s can be read by others (mode %#o)", path, st.Mode().Perm()),
			"`chmod 600 "+path+"`; if others use this machine, make new keys with `cay key create` and delete the old ones")
	}
	return ok("%s, for its owner only", path)
}

func checkDatabase(ctx context.Context, d *Doctor) Finding {
	if d.Store == nil {
		return skip("none yet; the first `cay up` makes it")
	}
	if err := d.Store(ctx); err != nil {
		return failed(err, "restore the data directory from a backup")
	}
	return ok("opens, and has this version's schema")
}

func checkArtefacts(ctx context.Context, d *Doctor) Finding {
	if d.Blobs == nil {
		return skip("none yet; the first `cay up` makes it")
	}
	blobs, err := d.Blobs(ctx)
	if err != nil {
		return failed(err, "look at the file system of "+d.DataDir)
	}
	objects, err := blobs.List(ctx, "")
	if err != nil {
		return failed(err, "look at the file system of "+d.DataDir)
	}
	var sum int64
	for _, o := range objects {
		sum += o.SizeBytes
	}
	return ok("%d objects, %s", len(objects), size(sum))
}

func checkDisks(ctx context.Context, d *Doctor) Finding {
	if d.TryDisks == nil {
		return skip("not tried")
	}
	c, err := d.TryDisks(ctx, d.existing())
	if err != nil {
		f := failed(err, "see the findings on the data directory above")
		var lacking []string
		for _, ft := range c.Features {
			if ft.Needed && !ft.OK {
				lacking = append(lacking, ft.Fix)
			}
		}
		if lacking != nil {
			f.Repair = strings.Join(lacking, "; ")
		}
		return f
	}
	evidence := fmt.Sprintf("design %s: %s", c.Design, c.Why)
	for _, better := range []disk.Design{disk.DesignReflink, disk.DesignPool} {
		if why, refused := c.Refused[better]; refused && better != c.Design {
			evidence += fmt.Sprintf(" (not %s: %s)", better, why)
		}
	}
	if c.Design == disk.DesignCopy {
		return warn(evidence+"; sandboxes work, but snapshots of them will be copies",
			"`apt-get install xfsprogs`, on a kernel with XFS; or put the data directory on XFS or Btrfs")
	}
	return ok("%s", evidence)
}
