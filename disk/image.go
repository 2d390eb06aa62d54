package disk

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/wholefile"
)

// parseDigest returns the hex part of a digest.
func parseDigest(dg cay.Digest) (string, error) {
	h, ok := strings.CutPrefix(string(dg), "sha256:")
	if b, err := hex.DecodeString(h); !ok || err != nil || len(b) != 32 || strings.ToLower(h) != h {
		return "", &cay.Error{Code: cay.CodeTemplateInvalid, Layer: cay.LayerStorage,
			Message: fmt.Sprintf("the layer digest %q is malformed", dg), Fix: "build the template again"}
	}
	return h, nil
}

// mountPoints returns the digests of the images that have a mount point. Mounts of
// an earlier process are adopted by being there.
func (d *Disks) mountPoints() ([]cay.Digest, error) {
	entries, err := os.ReadDir(d.path(imagesDir))
	if err != nil {
		return nil, hostError("read the images", d.path(imagesDir), err)
	}
	var out []cay.Digest
	for _, e := range entries {
		dg := cay.Digest("sha256:" + e.Name())
		if _, err := parseDigest(dg); err == nil {
			out = append(out, dg)
		}
	}
	return out, nil
}

// lockImage locks an image against other mounts and unmounts of it and returns
// its mount point.
func (d *Disks) lockImage(dg cay.Digest) (dir string, unlock func(), err error) {
	h, err := parseDigest(dg)
	if err != nil {
		return "", nil, err
	}
	return d.path(imagesDir, h), d.locks.lock("image/" + h), nil // no ID has a slash
}

// MountImage mounts an EROFS image read-only and returns the directory. The
// same digest gives the same directory, for every caller and after a restart;
// the file is looked at by the first only. That the file has the digest is the
// caller's to check. A missing file is cay.CodeObjectMissing, one that is not
// EROFS cay.CodeObjectCorrupt.
func (d *Disks) MountImage(ctx context.Context, file string, dg cay.Digest) (string, error) {
	if _, err := d.isOpen(); err != nil {
		return "", err
	}
	dir, unlock, err := d.lockImage(dg)
	if err != nil {
		return "", err
	}
	defer unlock()
	return dir, mountImage(ctx, dir, file, dg)
}

// mountImage mounts file on dir unless it is. The caller holds the image's lock.
func mountImage(ctx context.Context, dir, file string, dg cay.Digest) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	// Not from memory: whoever unmounted it behind our back would turn the
	// next sandbox's root into an empty directory.
	mounted, err := isMountPoint(dir)
	if err != nil || mounted {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return diskError("make a mount point for layer "+string(dg), err)
	}
	err = withLoop(file, true, func(dev string) error {
		return unix.Mount(dev, dir, "erofs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOATIME, "")
	})
	if err == nil {
		return nil
	}
	_ = os.Remove(dir) // an empty mount point is harmless
	detail := map[string]string{"digest": string(dg), "file": file}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &cay.Error{Code: cay.CodeObjectMissing, Layer: cay.LayerStorage,
			Message: "the file of layer " + string(dg) + " is missing: " + file, Fix: "build the template again", Detail: detail, Err: err}
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EIO), errors.Is(err, unix.ENXIO):
		return &cay.Error{Code: cay.CodeObjectCorrupt, Layer: cay.LayerStorage,
			Message: "the file of layer " + string(dg) + " is not an EROFS image: " + file, Fix: "build the template again", Detail: detail, Err: err}
	}
	return diskError("mount layer "+string(dg), err)
}

// mountLayers returns the directories of the layers, mounted.
func (d *Disks) mountLayers(ctx context.Context, layers []Layer) ([]string, error) {
	dirs := make([]string, 0, len(layers))
	for _, l := range layers {
		dir, err := d.MountImage(ctx, l.File, l.Digest)
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, dir)
	}
	return dirs, nil
}

// UnmountUnused unmounts the images that no disk uses and returns their
// digests. A Create that runs meanwhile mounts again what it needs.
func (d *Disks) UnmountUnused(ctx context.Context) ([]cay.Digest, error) {
	if _, err := d.isOpen(); err != nil {
		return nil, err
	}
	return d.unmountUnused(ctx)
}

func (d *Disks) unmountUnused(ctx context.Context) ([]cay.Digest, error) {
	d.layersUsed.Lock()
	defer d.layersUsed.Unlock()
	all, err := d.mountPoints()
	if err != nil {
		return nil, err
	}
	var gone []cay.Digest
	var errs []error
	for _, dg := range all {
		ok, err := d.unmountIfUnused(ctx, dg)
		if err != nil {
			errs = append(errs, diskError("unmount layer "+string(dg), err))
		}
		if ok {
			gone = append(gone, dg)
		}
	}
	return gone, errors.Join(errs...)
}

func (d *Disks) unmountIfUnused(ctx context.Context, dg cay.Digest) (bool, error) {
	dir, unlock, err := d.lockImage(dg)
	if err != nil {
		return false, err
	}
	defer unlock()
	mounted, err := isMountPoint(dir)
	if err != nil {
		return false, err
	}
	if !mounted { // left by a restart of the host
		return false, wholefile.Remove(dir)
	}
	mounts, err := readMounts()
	if err != nil {
		return false, err
	}
	for _, m := range mounts {
		if m.usesLower(dir) {
			return false, nil
		}
	}
	if err := d.unmount(ctx, dir); err != nil {
		return false, err
	}
	return true, wholefile.Remove(dir)
}

// Release closes, then unmounts what is not in use: images, and with no disk
// left the pool. It is for an orderly end with no sandbox left.
func (d *Disks) Release(ctx context.Context) error {
	if err := d.Close(); err != nil {
		return err
	}
	if _, err := d.unmountUnused(ctx); err != nil {
		return err
	}
	ids, err := d.list()
	if err != nil || len(ids) > 0 {
		return err
	}
	if err := d.unmount(ctx, d.path(poolDir)); err != nil {
		return diskError("unmount the pool", err)
	}
	return nil
}
