package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

// diskError types what failed while a disk was made or removed.
func diskError(what string, err error) error {
	var e *cay.Error
	if errors.As(err, &e) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%s: %w", what, err)
	}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return &cay.Error{Code: cay.CodeDiskFull, Layer: cay.LayerStorage,
			Message: "no room is left to " + what, Fix: "free space on the file system of the data directory", Err: err}
	case errors.Is(err, fs.ErrPermission):
		return &cay.Error{Code: cay.CodePrivilege, Layer: cay.LayerStorage,
			Message: "not allowed to " + what, Fix: "run Cay as root: it mounts file systems and uses loop devices", Err: err}
	}
	return &cay.Error{Code: cay.CodeDiskUnavailable, Layer: cay.LayerStorage,
		Message: "could not " + what + ": " + err.Error(), Fix: "run `cay doctor`: its storage checks name the missing part", Err: err}
}

// hostError types what failed in the directory of the disks itself.
func hostError(what, path string, err error) error {
	code := cay.CodeDataDirInvalid
	if errors.Is(err, unix.ENOSPC) {
		code = cay.CodeDiskFull
	}
	return &cay.Error{Code: code, Layer: cay.LayerStorage,
		Message: "could not " + what + " " + path + ": " + err.Error(),
		Fix:     "check that it is a directory on a local file system that root can write to",
		Detail:  map[string]string{"path": path}, Err: err}
}
