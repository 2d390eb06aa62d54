package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// loopTries bounds the race with other users of the host's loop devices.
const loopTries = 64

// loopMajor is the device number of loop devices (Documentation/admin-guide/devices.txt).
const loopMajor = 7

// withLoop sets up a loop device over file and calls f with its path while the
// device is held open. The device clears itself when its last user is gone:
// after f, if it mounted nothing, and else with the mount. So a process that
// dies at any instant leaves no device.
func withLoop(file string, readOnly bool, f func(dev string) error) error {
	mode, flags := os.O_RDWR, uint32(unix.LO_FLAGS_AUTOCLEAR)
	if readOnly {
		mode, flags = os.O_RDONLY, flags|unix.LO_FLAGS_READ_ONLY
	}
	backing, err := os.OpenFile(file, mode, 0)
	if err != nil {
		return err
	}
	defer backing.Close()
	dev, err := attachLoop(backing, mode, flags)
	if err != nil {
		return fmt.Errorf("attach a loop device to %s: %w", file, err)
	}
	defer dev.Close()
	return f(dev.Name())
}

func attachLoop(backing *os.File, mode int, flags uint32) (*os.File, error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	// Direct: what is read or written through the device is cached once, by
	// the file system on it, and not again as pages of the file under it. A
	// file system that cannot do it refuses.
	cfg := unix.LoopConfig{Fd: uint32(backing.Fd())}
	cfg.Info.Flags = flags | unix.LO_FLAGS_DIRECT_IO
	for try := 0; ; try++ {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		dev, err := openLoop(n, mode)
		if err == nil {
			err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
			if err == nil {
				return dev, nil
			}
			dev.Close()
		}
		switch {
		case errors.Is(err, unix.EINVAL) && cfg.Info.Flags&unix.LO_FLAGS_DIRECT_IO != 0:
			cfg.Info.Flags &^= unix.LO_FLAGS_DIRECT_IO
		case (errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENXIO)) && try < loopTries: // somebody else took it
		default:
			return nil, fmt.Errorf("configure /dev/loop%d: %w", n, err)
		}
	}
}

// openLoop opens a loop device, making its node where no devtmpfs does.
func openLoop(n, mode int) (*os.File, error) {
	name := "/dev/loop" + strconv.Itoa(n)
	dev, err := os.OpenFile(name, mode, 0)
	if !errors.Is(err, os.ErrNotExist) {
		return dev, err
	}
	if err := unix.Mknod(name, unix.S_IFBLK|0o660, int(unix.Mkdev(loopMajor, uint32(n)))); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("make %s: %w", name, err)
	}
	return os.OpenFile(name, mode, 0)
}

// loopsOf returns the names of the loop devices over a file.
func loopsOf(file string) []string {
	attrs, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil
	}
	var out []string
	for _, a := range attrs {
		if b, err := os.ReadFile(a); err == nil && strings.TrimSuffix(string(b), "\n") == file {
			out = append(out, filepath.Base(filepath.Dir(filepath.Dir(a))))
		}
	}
	return out
}
