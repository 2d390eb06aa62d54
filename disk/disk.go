// Package disk makes the root directories of sandboxes: read-only images that
// every sandbox shares, and under each sandbox one file of bounded size that
// takes what the guest writes.
//
// A root directory is an overlay. Its lower layers are EROFS images, mounted
// once per digest; its upper layer lives in an ext4 image file of the
// sandbox's disk size. The image files live in a pool that can clone a file
// without copying it, where the host offers one (see [Capabilities]). DESIGN.md
// says why, with figures.
//
// The package keeps no records. What exists is what the host's mounts and
// files say, so a process that was killed at any instant is followed by one
// that sees, adopts or removes everything.
package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/wholefile"
)

// DefaultReserve is the free space, in bytes, that is never given to new disks.
const DefaultReserve = 1 << 30

// Names under Dir. A disk is disks/<id>/{fs,root} and pool/disk/<id>.img.
const (
	imagesDir  = "images" // images/<hex of digest>: mounted images
	disksDir   = "disks"
	poolDir    = "pool"
	poolFile   = "pool.xfs"
	blankDir   = "blank" // in the pool: <sizeMB>-<version>.img, formatted and empty
	imageDir   = "disk"  // in the pool: <id>.img
	fsName     = "fs"    // mount of the disk's image
	rootName   = "root"  // mount of the overlay
	upperName  = "upper" // in the disk's image
	workName   = "work"
	readyStart = "ready-" // prefix of the IDs of disks that nobody owns yet
)

// Disks makes and removes root directories under one directory. Set the
// fields, then Open.
type Disks struct {
	// Dir is the directory for mounts and image files. One process at a time.
	Dir string
	// Reserve is the free space of Dir's file system, in bytes, below which
	// Create refuses. 0 is [DefaultReserve], negative is none.
	Reserve int64
	// Ahead is how many disks to hold ready for each recently used
	// combination of layers and size; 0 is none. A ready disk costs about
	// 200 KiB of disk, two mounts and a loop device.
	Ahead int
	// Log may be nil.
	Log *slog.Logger

	mu     sync.Mutex
	opened bool
	caps   Capabilities
	locks  keyLocks
	ahead  *ahead
	// layersUsed is held for reading while a disk is made over images, so that
	// none of them is unmounted between its mount and the overlay's.
	layersUsed sync.RWMutex

	reclaiming sync.Mutex

	// fault, in tests, is called before each step of Create and Remove.
	fault func(step string) error
}

// Layer is a read-only image of a root directory.
type Layer struct {
	Digest cay.Digest
	File   string // an EROFS image
}

// Spec says what a root directory is made of.
type Spec struct {
	// ID names the disk: 1 to 64 characters of [A-Za-z0-9._-], the first a
	// letter or digit.
	ID string
	// Layers, lowest first.
	Layers []Layer
	// SizeMB is how many MiB the guest may write.
	SizeMB int
	// From names a saved disk that the new one begins as; its size and layers
	// must be the same. Empty begins with nothing written.
	From string
}

// Root is a mounted, writable root directory.
type Root struct {
	Path  string // the directory
	Image string // the file that holds what the guest writes
}

// minSizeMB is the smallest disk.
const minSizeMB = 16

var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

func (d *Disks) log() *slog.Logger {
	if d.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return d.Log
}

func (d *Disks) path(elem ...string) string {
	return filepath.Join(append([]string{d.Dir}, elem...)...)
}

func (d *Disks) imageFile(id string) string { return d.path(poolDir, imageDir, id+".img") }

func (d *Disks) step(name string) error {
	if d.fault == nil {
		return nil
	}
	return d.fault(name)
}

// Open prepares the pool, adopts mounts of an earlier process, and removes the
// disks that it held ready. Disks of sandboxes stay: see [Disks.List].
func (d *Disks) Open(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.opened {
		return nil
	}
	if !filepath.IsAbs(d.Dir) {
		return &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerStorage,
			Message: fmt.Sprintf("the disk directory %q is not an absolute path", d.Dir), Fix: "name the data directory by its full path"}
	}
	// Mount tables show resolved paths; compare like with like.
	if err := os.MkdirAll(d.Dir, 0o700); err != nil {
		return hostError("make the disk directory", d.Dir, err)
	}
	resolved, err := filepath.EvalSymlinks(d.Dir)
	if err != nil {
		return hostError("resolve the disk directory", d.Dir, err)
	}
	d.Dir = resolved
	for _, sub := range []string{imagesDir, disksDir, poolDir} {
		if err := os.MkdirAll(d.path(sub), 0o700); err != nil {
			return hostError("make the disk directory", d.path(sub), err)
		}
	}
	d.caps = probeHost(d.Dir)
	if err := d.caps.usable(); err != nil {
		return err
	}
	if err := d.openPool(ctx); err != nil {
		return err
	}
	for _, sub := range []string{blankDir, imageDir, savedDir} {
		if err := os.MkdirAll(d.path(poolDir, sub), 0o700); err != nil {
			return hostError("make the pool directory", d.path(poolDir, sub), err)
		}
	}
	if err := d.dropHalfSaved(); err != nil {
		return err
	}
	ids, err := d.list()
	if err != nil {
		return err
	}
	for _, id := range ids {
		if strings.HasPrefix(id, readyStart) {
			if err := d.remove(ctx, id); err != nil {
				return err
			}
		}
	}
	if d.Ahead > 0 {
		d.ahead = newAhead(d)
		d.ahead.start()
	}
	d.opened = true
	d.log().Info("disks are ready", "dir", d.Dir, "design", d.caps.Design, "why", d.caps.Why)
	return nil
}

// Close stops the preparation of disks and removes those held ready. Disks and
// images stay mounted: sandboxes outlive the process. It may be called twice.
func (d *Disks) Close() error {
	d.mu.Lock()
	a := d.ahead
	d.ahead, d.opened = nil, false
	d.mu.Unlock()
	if a == nil {
		return nil
	}
	return a.close()
}

func (d *Disks) isOpen() (*ahead, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.opened {
		return nil, &cay.Error{Code: cay.CodeShuttingDown, Layer: cay.LayerStorage,
			Message: "the disks are closed", Fix: "wait until the server is up again"}
	}
	return d.ahead, nil
}

// Create makes and mounts a root directory. An ID that exists is
// cay.CodeConflict; too little room on the host is cay.CodeDiskFull, with the
// figures in Detail; everything else is cay.CodeDiskUnavailable. A failed
// Create has removed what it made, or List shows it.
func (d *Disks) Create(ctx context.Context, s Spec) (Root, error) {
	if err := checkSpec(s); err != nil {
		return Root{}, err
	}
	a, err := d.isOpen()
	if err != nil {
		return Root{}, err
	}
	if err := d.admit(ctx, s); err != nil {
		return Root{}, err
	}
	unlock := d.locks.lock(s.ID)
	defer unlock()
	if a != nil && s.From == "" {
		root, ok := a.take(s)
		if ok {
			return root, nil
		}
	}
	return d.make(ctx, s)
}

func checkSpec(s Spec) error {
	bad := func(format string, args ...any) error {
		return &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerStorage,
			Message: fmt.Sprintf(format, args...), Fix: "this is a defect of the caller; report it"}
	}
	if !validID.MatchString(s.ID) || strings.HasPrefix(s.ID, readyStart) {
		return bad("the disk ID %q is malformed", s.ID)
	}
	if s.SizeMB < minSizeMB {
		return bad("a disk of %d MiB is too small: the least is %d", s.SizeMB, minSizeMB)
	}
	if s.From != "" {
		if err := checkSavedName(s.From); err != nil {
			return err
		}
	}
	if len(s.Layers) == 0 {
		return bad("a root directory needs at least one layer")
	}
	return nil
}

// make builds the disk from nothing. The caller holds the ID's lock.
func (d *Disks) make(ctx context.Context, s Spec) (root Root, err error) {
	dir := d.path(disksDir, s.ID)
	// The directory is the claim on the ID, and what makes List see a disk
	// that a crash leaves half-made.
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return Root{}, &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerStorage,
				Message: "a disk named " + s.ID + " exists already", Fix: "remove it first", Err: err}
		}
		return Root{}, diskError("make the directory of disk "+s.ID, err)
	}
	defer func() {
		if err == nil {
			return
		}
		if rerr := d.remove(context.WithoutCancel(ctx), s.ID); rerr != nil {
			err = errors.Join(err, rerr)
		}
	}()
	d.layersUsed.RLock()
	defer d.layersUsed.RUnlock()
	lowers, err := d.mountLayers(ctx, s.Layers)
	if err != nil {
		return Root{}, err
	}
	fsDir, rootDir, img := filepath.Join(dir, fsName), filepath.Join(dir, rootName), d.imageFile(s.ID)
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"make the mount points", func() error {
			return errors.Join(os.Mkdir(fsDir, 0o700), os.Mkdir(rootDir, 0o755))
		}},
		{"clone the image", func() error {
			from, err := d.savedFile(s.From), error(nil)
			if s.From == "" {
				from, err = d.blank(ctx, s.SizeMB)
			}
			if err != nil {
				return err
			}
			return cloneFile(img, from)
		}},
		{"mount the image", func() error { return mountExt4(img, fsDir) }},
		{"forget the volatile mark", func() error {
			if s.From == "" {
				return nil
			}
			return forgetVolatile(fsDir)
		}},
		{"mount the overlay", func() error { return mountOverlay(rootDir, lowers, fsDir) }},
	} {
		if err := ctx.Err(); err != nil {
			return Root{}, err
		}
		if err := d.step(step.name); err != nil {
			return Root{}, diskError(step.name+" of disk "+s.ID, err)
		}
		if err := step.do(); err != nil {
			return Root{}, diskError(step.name+" of disk "+s.ID, err)
		}
	}
	if err := d.step("return"); err != nil {
		return Root{}, diskError("return disk "+s.ID, err)
	}
	return Root{Path: rootDir, Image: img}, nil
}

// Remove takes a disk away with everything written to it, also one that is
// half made or half removed. An unknown one is no error. The guest must be
// gone: what it still holds open stays on the host until it closes it.
func (d *Disks) Remove(ctx context.Context, id string) error {
	if !validID.MatchString(id) {
		return checkSpec(Spec{ID: id})
	}
	if _, err := d.isOpen(); err != nil {
		return err
	}
	unlock := d.locks.lock(id)
	defer unlock()
	return d.remove(ctx, id)
}

// remove undoes make, last step first; every step is a no-op when done.
func (d *Disks) remove(ctx context.Context, id string) error {
	dir, img := d.path(disksDir, id), d.imageFile(id)
	fsDir, rootDir := filepath.Join(dir, fsName), filepath.Join(dir, rootName)
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"discard unwritten data", func() error { return d.discard(fsDir, img) }},
		{"unmount the overlay", func() error { return d.unmount(ctx, rootDir) }},
		{"unmount the image", func() error { return d.unmount(ctx, fsDir) }},
		{"remove the image", func() error { return wholefile.Remove(img) }},
		// rmdir, never a recursive removal: if something is mounted here
		// after all, this fails instead of emptying it.
		{"remove the mount points", func() error {
			return errors.Join(wholefile.Remove(rootDir), wholefile.Remove(fsDir))
		}},
		{"remove the directory", func() error { return wholefile.Remove(dir) }},
	} {
		if err := d.step(step.name); err != nil {
			return diskError(step.name+" of disk "+id, err)
		}
		if err := step.do(); err != nil {
			return diskError(step.name+" of disk "+id, err)
		}
	}
	return nil
}

// List returns the IDs of the disks found on the host, half-made and
// half-removed ones included, sorted. Disks held ready are not listed.
func (d *Disks) List(ctx context.Context) ([]string, error) {
	if _, err := d.isOpen(); err != nil {
		return nil, err
	}
	ids, err := d.list()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(ids, func(id string) bool { return strings.HasPrefix(id, readyStart) }), ctx.Err()
}

// list returns every disk that has a directory or an image file. A mount
// without its directory cannot exist.
func (d *Disks) list() ([]string, error) {
	dirs, err := os.ReadDir(d.path(disksDir))
	if err != nil {
		return nil, hostError("read the disks", d.path(disksDir), err)
	}
	files, err := os.ReadDir(d.path(poolDir, imageDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // absent: the pool is not mounted
		return nil, hostError("read the pool", d.path(poolDir, imageDir), err)
	}
	var ids []string
	for _, e := range dirs {
		if validID.MatchString(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	for _, e := range files {
		id, ok := strings.CutSuffix(e.Name(), ".img")
		if ok && validID.MatchString(id) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// admit refuses a disk when the host has too little room. A disk is sparse: it
// takes room as the guest writes, so its size is not asked for in advance, and
// the reserve is what keeps running guests from failing.
func (d *Disks) admit(ctx context.Context, s Spec) error {
	reserve := d.Reserve
	if reserve == 0 {
		reserve = DefaultReserve
	}
	if reserve < 0 {
		return nil
	}
	err := d.checkRoom(s, reserve)
	if err == nil || d.Capabilities().Design != DesignPool || !d.reclaiming.TryLock() {
		return err
	}
	defer d.reclaiming.Unlock()
	// XFS frees a removed file in the background. Ask a few times.
	for range reclaimTries {
		d.reclaim()
		if err = d.checkRoom(s, reserve); err == nil {
			return nil
		}
		select {
		case <-time.After(reclaimWait):
		case <-ctx.Done():
			return err
		}
	}
	return err
}

const (
	reclaimTries = 8
	reclaimWait  = 50 * time.Millisecond
)

func (d *Disks) checkRoom(s Spec, reserve int64) error {
	for _, dir := range []string{d.path(poolDir), d.Dir} {
		free, total, err := freeSpace(dir)
		if err != nil {
			return diskError("measure the free space of "+dir, err)
		}
		if free < reserve {
			return &cay.Error{Code: cay.CodeDiskFull, Layer: cay.LayerStorage,
				Message: fmt.Sprintf("the host's disk is full: %s free of %s at %s, of which %s stay reserved",
					humanBytes(free), humanBytes(total), dir, humanBytes(reserve)),
				Fix: "free space on that file system, end sandboxes, or lower the reserve",
				Detail: map[string]string{"path": dir, "freeBytes": fmt.Sprint(free), "totalBytes": fmt.Sprint(total),
					"reserveBytes": fmt.Sprint(reserve), "diskMB": fmt.Sprint(s.SizeMB)}}
		}
	}
	return nil
}

// freeSpace returns the bytes that the file system of dir has left, and has.
func freeSpace(dir string) (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, err
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

func humanBytes(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d bytes", n)
}

// keyLocks is a mutex per key; a key's lock is gone when nobody holds or
// awaits it.
type keyLocks struct {
	mu sync.Mutex
	m  map[string]*keyLock
}

type keyLock struct {
	mu    sync.Mutex
	users int
}

func (l *keyLocks) lock(key string) (unlock func()) {
	l.mu.Lock()
	if l.m == nil {
		l.m = map[string]*keyLock{}
	}
	k := l.m[key]
	if k == nil {
		k = &keyLock{}
		l.m[key] = k
	}
	k.users++
	l.mu.Unlock()
	k.mu.Lock()
	return func() {
		k.mu.Unlock()
		l.mu.Lock()
		defer l.mu.Unlock()
		if k.users--; k.users == 0 {
			delete(l.m, key)
		}
	}
}
