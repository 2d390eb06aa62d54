package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// isMountPoint reports whether something is mounted at path. A path that is
// not there is not a mount point.
func isMountPoint(path string) (bool, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_TYPE, &st)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("statx %s: %w", path, err)
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// busyFor is how long unmount waits for the last user of a mount to go.
const busyFor = 2 * time.Second

// unmount takes everything off path that is mounted there. A mount that stays
// busy is detached: it leaves the tree at once and the host when its last user
// does.
func (d *Disks) unmount(ctx context.Context, path string) error {
	wait, waited := time.Millisecond, time.Duration(0)
	for {
		mounted, err := isMountPoint(path)
		if err != nil || !mounted {
			return err
		}
		err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		if err == nil {
			continue // something may lie under it
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("umount %s: %w", path, err)
		}
		if waited >= busyFor || ctx.Err() != nil {
			d.log().Warn("a mount is still in use; detaching it", "mount", path)
			if err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
				return fmt.Errorf("detach %s: %w", path, err)
			}
			continue
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		waited += wait
		wait = min(2*wait, 100*time.Millisecond)
	}
}

// mountOpts of the disk's ext4, see DESIGN.md. Nobody needs a running
// sandbox's writes after a power cut, so nothing waits for the host's disk.
const ext4Options = "noinit_itable,barrier=0,errors=remount-ro"

// mountExt4 mounts an image file.
func mountExt4(image, dir string) error {
	return withLoop(image, false, func(dev string) error {
		if err := unix.Mount(dev, dir, "ext4", unix.MS_NOATIME|unix.MS_NODEV, ext4Options); err != nil {
			return fmt.Errorf("mount ext4 image %s: %w", image, err)
		}
		return nil
	})
}

// overlayOptions, see DESIGN.md: renaming a directory of a lower layer works,
// inode numbers are unique and stay the same when a file is copied up, and
// fsync does not wait for the host's disk.
const overlayOptions = "redirect_dir=on,xino=on,index=off,metacopy=off,volatile"

// mountOverlay mounts lowers (lowest first) under the directories upper and
// work of disk.
func mountOverlay(dir string, lowers []string, disk string) error {
	for _, p := range append([]string{disk}, lowers...) {
		// The kernel splits the option at these.
		if strings.ContainsAny(p, ":,\\") {
			return fmt.Errorf("the path %q cannot be a part of an overlay: it has ':', ',' or '\\'", p)
		}
	}
	var topFirst []string
	for _, l := range lowers {
		topFirst = append([]string{l}, topFirst...)
	}
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,%s", strings.Join(topFirst, ":"),
		filepath.Join(disk, upperName), filepath.Join(disk, workName), overlayOptions)
	if len(data) >= os.Getpagesize() {
		return fmt.Errorf("the overlay of %d layers needs %d bytes of options, more than a page: use a shorter data directory", len(lowers), len(data))
	}
	if err := unix.Mount("overlay", dir, "overlay", unix.MS_NOATIME, data); err != nil {
		return fmt.Errorf("mount overlay (%s): %w", data, err)
	}
	return nil
}

// ext4Shutdown is EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32), of the kernel's
// include/uapi/linux/ext4.h; shutdownNoFlush is EXT4_GOING_FLAGS_NOLOGFLUSH.
const (
	ext4Shutdown    = 0x8004587d
	shutdownNoFlush = 2
)

// discard tells the file system of a disk that is about to go to forget what
// it has not written yet, so that removing a sandbox that wrote gigabytes does
// not write them.
//
// The call would end any ext4 it is made on. So it is made only on a
// directory whose device is a loop device over this very image.
func (d *Disks) discard(fsDir, img string) error {
	mounted, err := isMountPoint(fsDir)
	if err != nil || !mounted {
		return err
	}
	f, err := os.Open(fsDir)
	if err != nil {
		// A file system that stopped after an error may refuse even this.
		d.log().Warn("removing a disk without discarding its writes", "disk", fsDir, "err", err)
		return nil
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("fstat %s: %w", fsDir, err)
	}
	backing, err := loopBacking(st.Dev)
	if err != nil || strings.TrimSuffix(backing, " (deleted)") != img {
		return nil
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), ext4Shutdown, shutdownNoFlush); err != nil {
		d.log().Warn("removing a disk without discarding its writes", "disk", fsDir, "err", err)
	}
	return nil
}

// loopBacking returns the file behind a loop device.
func loopBacking(dev uint64) (string, error) {
	name := strconv.FormatUint(uint64(unix.Major(dev)), 10) + ":" + strconv.FormatUint(uint64(unix.Minor(dev)), 10)
	b, err := os.ReadFile("/sys/dev/block/" + name + "/loop/backing_file")
	if err != nil {
		return "", err
	}
	return strings.TrimSuffix(string(b), "\n"), nil
}
