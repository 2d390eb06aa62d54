package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

const (
	// poolLeast is the smallest file system mkfs.xfs makes, with room to spare.
	poolLeast = 1 << 30
	// xfsOptions: discard gives the space of removed disks back to the host.
	xfsOptions = "discard"
	// blankVersion is part of a blank's name; change it with the way a blank is
	// made.
	blankVersion = "v1"
)

// openPool chooses where image files live. A pool that exists stays in use,
// whatever the host offers today.
func (d *Disks) openPool(ctx context.Context) error {
	pool, file := d.path(poolDir), d.path(poolFile)
	mounted, err := isMountPoint(pool)
	if err != nil {
		return hostError("look at", pool, err)
	}
	_, statErr := os.Stat(file)
	switch {
	case mounted:
		d.choose(DesignPool, "adopted: it was mounted already")
		return nil
	case statErr == nil:
		if err := mountAgain(ctx, file, pool); err != nil {
			if held := loopsOf(file); len(held) > 0 {
				return &cay.Error{Code: cay.CodeDiskUnavailable, Layer: cay.LayerStorage,
					Message: fmt.Sprintf("the pool %s is still mounted in another mount namespace, by way of %s", file, strings.Join(held, ", ")),
					Fix:     "end the processes that hold it; `grep -l " + pool + " /proc/*/mountinfo` finds them",
					Detail:  map[string]string{"path": file}, Err: err}
			}
			return &cay.Error{Code: cay.CodeDiskUnavailable, Layer: cay.LayerStorage,
				Message: "the pool " + file + " cannot be mounted: " + err.Error(),
				Fix:     "repair it with xfs_repair; or, if no paused sandbox is worth keeping, remove it",
				Detail:  map[string]string{"path": file}, Err: err}
		}
		d.choose(DesignPool, "the data directory has a pool")
		return nil
	case !errors.Is(statErr, fs.ErrNotExist):
		return hostError("look at", file, statErr)
	}
	reflink := d.caps.feature("reflink")
	if reflink.OK {
		d.choose(DesignReflink, reflink.Detail)
		return nil
	}
	d.caps.Refused[DesignReflink] = reflink.Detail
	if err := d.makePool(ctx); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		d.caps.Refused[DesignPool] = err.Error()
		d.choose(DesignCopy, "the host offers nothing better")
		return nil
	}
	d.choose(DesignPool, "the data directory's own file system does not clone files")
	return nil
}

func (d *Disks) choose(design Design, why string) {
	d.caps.Design, d.caps.Why = design, why
	// A host may get better after the choice was made; say why it is kept.
	if design == DesignPool && d.caps.Refused[DesignReflink] == "" {
		if f := d.caps.feature("reflink"); f.OK {
			d.caps.Refused[DesignReflink] = "a pool exists already; it is used as long as it is there"
		} else {
			d.caps.Refused[DesignReflink] = f.Detail
		}
	}
}

// makePool makes and mounts the XFS pool. Where plain image files exist they
// must not disappear under a mount.
func (d *Disks) makePool(ctx context.Context) error {
	if entries, err := os.ReadDir(d.path(poolDir, imageDir)); err == nil && len(entries) > 0 {
		return fmt.Errorf("%d disks exist outside of a pool; end their sandboxes first", len(entries))
	}
	for _, name := range []string{"file system xfs", "program mkfs.xfs"} {
		if f := d.caps.feature(name); !f.OK {
			return fmt.Errorf("%s: %s (%s)", f.Name, f.Detail, f.Fix)
		}
	}
	_, total, err := freeSpace(d.Dir)
	if err != nil {
		return err
	}
	file := d.path(poolFile)
	tmp := file + ".new"
	if err := makeSparse(tmp, max(total, poolLeast)&^(1<<20-1)); err != nil {
		return err
	}
	defer os.Remove(tmp) // gone after the rename
	if err := runTool(ctx, "mkfs.xfs", "-q", "-K", "-f", "-m", "reflink=1,crc=1", "-l", "size=64m", tmp); err != nil {
		return err
	}
	if err := publish(tmp, file); err != nil {
		return err
	}
	if err := mountXFS(file, d.path(poolDir)); err != nil {
		return errors.Join(err, os.Remove(file))
	}
	return nil
}

// heldFor is how long a pool that another mount namespace still has is waited
// for: one that was made while the pool was mounted has a mount of its own
// until its last process is gone.
const heldFor = 10 * time.Second

// mountAgain mounts a pool that was mounted before. XFS refuses to be mounted
// twice by way of two loop devices, for its own good.
func mountAgain(ctx context.Context, file, dir string) error {
	for end := time.Now().Add(heldFor); ; {
		err := mountXFS(file, dir)
		if !errors.Is(err, unix.EINVAL) || len(loopsOf(file)) == 0 || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func mountXFS(file, dir string) error {
	return withLoop(file, false, func(dev string) error {
		if err := unix.Mount(dev, dir, "xfs", unix.MS_NOATIME|unix.MS_NODEV|unix.MS_NOSUID, xfsOptions); err != nil {
			return fmt.Errorf("mount xfs: %w", err)
		}
		return nil
	})
}

// makeSparse makes an empty file of size bytes, without room for them.
func makeSparse(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// publish makes tmp durable and renames it.
func publish(tmp, path string) error {
	f, err := os.Open(tmp)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// blank returns the empty formatted image of a size, making it on first use.
func (d *Disks) blank(ctx context.Context, sizeMB int) (string, error) {
	path := d.path(poolDir, blankDir, strconv.Itoa(sizeMB)+"-"+blankVersion+".img")
	unlock := d.locks.lock("blank/" + strconv.Itoa(sizeMB)) // no ID has a slash
	defer unlock()
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	tmp := path + ".new"
	defer os.Remove(tmp)
	if err := makeSparse(tmp, imageSize(int64(sizeMB)<<20)); err != nil {
		return "", err
	}
	tree, err := os.MkdirTemp("", "cay-blank-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tree)
	if err := errors.Join(os.Mkdir(filepath.Join(tree, upperName), 0o755), os.Mkdir(filepath.Join(tree, workName), 0o755)); err != nil {
		return "", err
	}
	// DESIGN.md has the reasons: no journal, an inode for every 8 KiB, nothing
	// reserved for root, inode tables left as the holes they are.
	if err := runTool(ctx, "mkfs.ext4", "-q", "-F", "-O", "^has_journal,^resize_inode", "-E", "nodiscard,lazy_itable_init=1,root_owner=0:0",
		"-b", "4096", "-I", "256", "-m", "0", "-i", "8192", "-d", tree, tmp); err != nil {
		return "", err
	}
	if err := publish(tmp, path); err != nil {
		return "", err
	}
	return path, nil
}

// imageSize returns how large an image must be for the guest to have size
// bytes: the tables of the file system take 3.2 % and a little, and the kernel
// keeps 2 % and at most 16 MiB for itself (ext4_calculate_resv_clusters).
func imageSize(size int64) int64 {
	return (size + size*36/1000 + min(size*22/1000, 16<<20) + 4<<20) &^ 4095
}

// cloneFile makes dst a copy of src that shares its blocks where the file
// system can, and else copies what src holds, leaving its holes.
func cloneFile(dst, src string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = unix.IoctlFileClone(int(out.Fd()), int(in.Fd()))
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EINVAL) {
		err = copySparse(out, in)
	}
	if err != nil {
		err = fmt.Errorf("clone %s: %w", src, err)
	}
	return errors.Join(err, out.Close())
}

func copySparse(out, in *os.File) error {
	fi, err := in.Stat()
	if err != nil {
		return err
	}
	if err := out.Truncate(fi.Size()); err != nil {
		return err
	}
	for pos := int64(0); pos < fi.Size(); {
		start, err := unix.Seek(int(in.Fd()), pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // only a hole is left
			return nil
		}
		if err != nil {
			return err
		}
		end, err := unix.Seek(int(in.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(out, start), io.NewSectionReader(in, start, end-start)); err != nil {
			return err
		}
		pos = end
	}
	return nil
}

// fitrim is FITRIM, _IOWR('X', 121, struct fstrim_range), of include/uapi/linux/fs.h.
const fitrim = 0xc0185879

// reclaim gives the free room of the pool back to the host, now. XFS does it by
// itself some seconds after a removal.
func (d *Disks) reclaim() {
	f, err := os.Open(d.path(poolDir))
	if err != nil {
		d.log().Warn("opening the pool", "err", err)
		return
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		d.log().Warn("syncing the pool", "err", err)
	}
	all := struct{ start, length, least uint64 }{length: 1<<64 - 1}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fitrim, uintptr(unsafe.Pointer(&all))); errno != 0 {
		d.log().Warn("trimming the pool", "err", errno)
	}
}
