package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/wholefile"
)

// savedDir holds saved disks, in the pool: <name>.img.
const savedDir = "saved"

// halfSuffix ends the name of a saved disk in the making.
const halfSuffix = ".new"

// Saved is a disk as it was at one instant.
type Saved struct {
	File      string // the image
	SizeBytes int64  // of the file, holes included
}

func (d *Disks) savedFile(name string) string { return d.path(poolDir, savedDir, name+".img") }

func checkSavedName(name string) error {
	if validID.MatchString(name) {
		return nil
	}
	return &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerStorage,
		Message: fmt.Sprintf("the name %q of a saved disk is malformed", name), Fix: "this is a defect of the caller; report it"}
}

// Clone takes what a disk holds, which stays as it is, under a name: the first
// half of saving it, and [Disks.Keep] the second. Nothing may write to the disk
// meanwhile: the guest is frozen, or gone; afterwards it may. Where the pool
// clones files the cost is that of what was not written back yet; see
// [Capabilities].
//
// An unknown disk is cay.CodeNotFound; a full pool cay.CodeDiskFull.
func (d *Disks) Clone(ctx context.Context, id, name string) error {
	if err := checkSavedName(name); err != nil {
		return err
	}
	if _, err := d.isOpen(); err != nil {
		return err
	}
	unlock := d.locks.lock(id)
	defer unlock()
	img, fsDir := d.imageFile(id), d.path(disksDir, id, fsName)
	mounted, err := isMountPoint(fsDir)
	if err != nil {
		return diskError("look at disk "+id, err)
	}
	if !mounted {
		return &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerStorage,
			Message: "no disk " + id + " is mounted", Fix: "this is a defect of the caller; report it"}
	}
	clone := d.savedFile(name) + halfSuffix
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"write back", func() error { return syncDisk(fsDir) }},
		{"clone the image", func() error {
			if err := wholefile.Remove(clone); err != nil {
				return err
			}
			return cloneFile(clone, img)
		}},
	} {
		err := ctx.Err()
		if err == nil {
			err = d.step("save: " + step.name)
		}
		if err == nil {
			err = step.do()
		}
		if err != nil {
			return errors.Join(diskError(step.name+" of disk "+id, err), wholefile.Remove(clone))
		}
	}
	return nil
}

// Keep makes what was cloned under a name a saved disk. If it is to be durable,
// it survives a power cut after a nil return. After an error there is none, or
// that of an earlier save under the name.
func (d *Disks) Keep(ctx context.Context, name string, durable bool) (Saved, error) {
	if err := checkSavedName(name); err != nil {
		return Saved{}, err
	}
	file := d.savedFile(name)
	clone := file + halfSuffix
	err := ctx.Err()
	if err == nil {
		err = d.step("save: publish")
	}
	switch {
	case err != nil:
	case durable || d.Capabilities().Design == DesignCopy: // until it is written, a file's blocks may change, and its stamp
		err = publish(clone, file)
	default:
		err = os.Rename(clone, file)
	}
	if err != nil {
		return Saved{}, errors.Join(diskError("publish the saved disk "+name, err), wholefile.Remove(clone))
	}
	return d.FindSaved(name)
}

// Receive makes a saved disk of what fill writes to the file, as Save does of a
// disk: whole and on stable storage, or not there. The name must be free.
func (d *Disks) Receive(ctx context.Context, name string, fill func(*os.File) error) (Saved, error) {
	if err := checkSavedName(name); err != nil {
		return Saved{}, err
	}
	if _, err := d.isOpen(); err != nil {
		return Saved{}, err
	}
	file := d.savedFile(name)
	tmp := file + halfSuffix
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return Saved{}, diskError("make the saved disk "+name, err)
	}
	defer os.Remove(tmp) // gone after the rename
	if err := errors.Join(fill(f), f.Close(), ctx.Err()); err != nil {
		return Saved{}, diskError("write the saved disk "+name, err)
	}
	if err := publish(tmp, file); err != nil {
		return Saved{}, diskError("publish the saved disk "+name, err)
	}
	return d.FindSaved(name)
}

// syncDisk writes back everything of the file system mounted at dir, and
// reports an error of an earlier write that nobody was told of.
func syncDisk(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

// Flush begins to write back what a disk holds, so that a Save soon after has
// little left to do. The guest may run.
func (d *Disks) Flush(id string) error {
	fsDir := d.path(disksDir, id, fsName)
	mounted, err := isMountPoint(fsDir)
	if err != nil || !mounted {
		return err
	}
	if err := syncDisk(fsDir); err != nil {
		return diskError("write back disk "+id, err)
	}
	return nil
}

// Usage returns how many bytes a mounted disk holds, and can hold.
func (d *Disks) Usage(id string) (used, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(d.path(disksDir, id, fsName), &st); err != nil {
		return 0, 0, diskError("measure disk "+id, err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

// FindSaved returns a saved disk; an unknown one is cay.CodeObjectMissing.
func (d *Disks) FindSaved(name string) (Saved, error) {
	if err := checkSavedName(name); err != nil {
		return Saved{}, err
	}
	file := d.savedFile(name)
	fi, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return Saved{}, &cay.Error{Code: cay.CodeObjectMissing, Layer: cay.LayerStorage,
			Message: "the saved disk " + name + " is missing", Fix: "restore it from a backup",
			Detail: map[string]string{"path": file}, Err: err}
	}
	if err != nil {
		return Saved{}, hostError("look at the saved disk", file, err)
	}
	return Saved{File: file, SizeBytes: fi.Size()}, nil
}

// ListSaved returns the names of the saved disks, sorted.
func (d *Disks) ListSaved(ctx context.Context) ([]string, error) {
	if _, err := d.isOpen(); err != nil {
		return nil, err
	}
	files, err := os.ReadDir(d.path(poolDir, savedDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, hostError("read the saved disks", d.path(poolDir, savedDir), err)
	}
	var names []string
	for _, f := range files {
		if name, ok := strings.CutSuffix(f.Name(), ".img"); ok && validID.MatchString(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, ctx.Err()
}

// RemoveSaved removes a saved disk, or one that was cloned and not kept; an
// unknown one is no error. Disks that were made from it keep what they hold.
func (d *Disks) RemoveSaved(_ context.Context, name string) error {
	if err := checkSavedName(name); err != nil {
		return err
	}
	file := d.savedFile(name)
	if err := errors.Join(wholefile.Remove(file+halfSuffix), wholefile.Remove(file)); err != nil {
		return diskError("remove the saved disk "+name, err)
	}
	return nil
}

// dropHalfSaved removes what a crash left of a disk that was being saved.
func (d *Disks) dropHalfSaved() error {
	half, err := filepath.Glob(d.path(poolDir, savedDir, "*.img"+halfSuffix))
	if err != nil {
		return err
	}
	for _, f := range half {
		if err := wholefile.Remove(f); err != nil {
			return hostError("remove half of a saved disk", f, err)
		}
	}
	return nil
}

// forgetVolatile removes the mark by which the kernel refuses a second mount of
// a volatile overlay: it stands for data that may be lost in a crash, and a
// saved disk was written back before it was cloned.
func forgetVolatile(fsDir string) error {
	return os.RemoveAll(filepath.Join(fsDir, workName, "work", "incompat"))
}
