package envd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
)

// staged is a file on its way to a path. Its content gathers beside the target
// and takes the target's place in one rename, so that whatever happens before,
// the old file is there, or none.
//
// The target itself is opened for writing first, so that it is the kernel that
// says whether the account may write to it, and through which links. Where the
// account may write to a file but not to its directory, the content gathers
// elsewhere and is copied into the file once it is complete.
type staged struct {
	u    *user
	path string // as the client named it
	at   place  // the target, links resolved; dir is -1 if it cannot be named
	old  int    // the existing target, open for writing, or -1
	mode uint32 // permission bits the file gets; of a new one, before the umask
	is   bool   // the target exists
	made bool   // it exists because we followed a link to nothing

	tmp     string // "" once it is gone
	file    *os.File
	inPlace bool
}

// stage prepares a file at a path for an account. With base, the real path of
// a directory, nothing outside of it may be written. The caller writes to
// file and calls commit, and discard in any case.
func stage(u *user, path, base string) (*staged, error) {
	t := &staged{u: u, path: path, at: place{dir: -1}, old: -1}
	err := u.do(func() error {
		if err := t.locate(base); err != nil {
			return err
		}
		return t.create()
	})
	if err == nil && t.inPlace {
		err = t.spool()
	}
	if err != nil {
		t.discard()
		return nil, pathError(path, err)
	}
	return t, nil
}

func outside(path string) error {
	return faultf(connect.CodePermissionDenied, "path '%s' is outside of the directory that this signature allows", path)
}

// locate finds the target and makes its parents.
func (t *staged) locate(base string) error {
	for range maxRaces {
		fd, err := openPath(t.path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
		writable := true
		if err == unix.ETXTBSY {
			// It may be written to, but it is running; replacing it is fine.
			fd, err = openPath(t.path, unix.O_PATH)
			writable = false
		}
		switch err {
		case nil:
			return t.existing(fd, writable, base)
		case unix.ENOENT:
		case unix.EISDIR:
			return invalid("path is a directory: %s", t.path)
		case unix.ENXIO:
			return invalid("path is not a regular file: %s", t.path)
		case unix.ENOTDIR:
			return invalid("a parent of '%s' is not a directory", t.path)
		case unix.EACCES:
			// gVisor judges the rights first, and so may not say EISDIR.
			if p, perr := openPath(t.path, unix.O_PATH|unix.O_DIRECTORY); perr == nil {
				unix.Close(p)
				return invalid("path is a directory: %s", t.path)
			}
			return err
		default:
			return err
		}
		dir, err := parents(t.path, base)
		if err != nil {
			return err
		}
		name := filepath.Base(t.path)
		st, err := lstatAt(dir, name)
		switch {
		case err == unix.ENOENT:
			t.at, t.mode = place{dir, name}, 0o666
			return nil
		case err == nil && isLink(&st) && base == "":
			fd, err = openAt(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_NONBLOCK|unix.O_NOCTTY, 0o666)
			unix.Close(dir)
			if err != nil {
				return err
			}
			t.made = true
			return t.existing(fd, true, base)
		case err == nil && isLink(&st):
			unix.Close(dir)
			return outside(t.path)
		}
		unix.Close(dir)
		if err != nil {
			return err
		}
	}
	return fmt.Errorf("the file is being changed: %w", unix.EBUSY)
}

// parents opens the directory of a path that does not exist, and makes it. A
// link that leads out of base is seen before anything is made.
func parents(path, base string) (int, error) {
	dir := filepath.Dir(path)
	if base == "" {
		return makeDirs(dir)
	}
	inside := func(fd int) error {
		if real, err := fdPath(fd); err != nil || !within(real, base) {
			return outside(path)
		}
		return nil
	}
	for up := dir; ; up = filepath.Dir(up) {
		fd, err := openPath(up, unix.O_PATH)
		if err == unix.ENOENT && up != "/" {
			continue
		}
		if err != nil {
			return -1, err
		}
		err = inside(fd)
		unix.Close(fd)
		if err != nil {
			return -1, err
		}
		break
	}
	fd, err := makeDirs(dir)
	if err != nil {
		return -1, err
	}
	if err := inside(fd); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// existing takes the open target and finds the directory it is in.
func (t *staged) existing(fd int, writable bool, base string) error {
	t.is = true
	st, err := fstat(fd)
	if err == nil && isDir(&st) {
		err = invalid("path is a directory: %s", t.path)
	} else if err == nil && !isRegular(&st) {
		err = invalid("path is not a regular file: %s", t.path)
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	t.mode = st.Mode & 0o777
	real, err := fdPath(fd)
	if writable {
		t.old = fd
	} else {
		unix.Close(fd)
	}
	if base != "" && (err != nil || !within(real, base)) {
		return outside(t.path)
	}
	if err != nil {
		return nil
	}
	p, err := placeOf(real)
	if err != nil {
		return nil
	}
	if got, err := p.lstat(); err != nil || !sameFile(&got, &st) {
		p.close()
		return nil
	}
	t.at = p
	return nil
}

// create makes the file that the content gathers in.
func (t *staged) create() error {
	kind := byte(tempCreates)
	if t.is {
		kind = tempReplaces
	}
	name := tempName(kind)
	err := error(unix.EACCES)
	fd := -1
	if t.at.dir >= 0 {
		fd, err = openAt(t.at.dir, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, t.mode)
	}
	switch err {
	case nil:
		t.tmp = name
	case unix.EACCES, unix.EPERM, unix.EROFS:
		if t.old < 0 {
			return err
		}
		t.inPlace = true
		return nil
	default:
		return err
	}
	t.file = os.NewFile(uintptr(fd), t.path)
	if t.is {
		return unix.Fchmod(fd, t.mode) // the umask is for new files
	}
	return nil
}

// spool opens a file without a name, as root: it is nobody's business.
func (t *staged) spool() error {
	f, err := os.CreateTemp("", tempName(tempCreates))
	if err != nil {
		return fmt.Errorf("making room for what is received: %w", err)
	}
	t.file = f
	return os.Remove(f.Name())
}

// free reports whether the filesystem has room for n more bytes, so that an
// upload that cannot succeed does not fill the disk first.
func (t *staged) free(n int64) bool {
	var fs unix.Statfs_t
	if unix.Fstatfs(int(t.file.Fd()), &fs) != nil || fs.Blocks == 0 || fs.Bsize <= 0 {
		return true
	}
	return uint64(n)/uint64(fs.Bsize) <= fs.Bavail
}

// commit puts the file in its place and returns the metadata that it has.
func (t *staged) commit(meta map[string]string) (map[string]string, error) {
	var stored map[string]string
	err := t.u.do(func() (err error) {
		fd := int(t.file.Fd())
		if !t.inPlace {
			if len(meta) > 0 {
				if stored, err = setMetadata(fd, meta); err != nil {
					return fmt.Errorf("storing the metadata: %w", err)
				}
			}
			err = t.rename()
			switch err {
			case nil:
				t.tmp = ""
				return t.announce(fd)
			case unix.EPERM, unix.EACCES, unix.EBUSY, unix.EXDEV:
				// The target cannot be replaced: it is somebody else's in a
				// sticky directory, or something is mounted on it.
				if t.old < 0 {
					return err
				}
			default:
				return err
			}
		}
		if err := t.copyBack(); err != nil {
			return err
		}
		stored, err = setMetadata(t.old, meta)
		return err
	})
	if err != nil {
		return nil, pathError(t.path, err)
	}
	t.made = false
	return stored, nil
}

// rename lets the file take the target's name.
func (t *staged) rename() error {
	tmp := place{t.at.dir, t.tmp}
	if t.is {
		return renameat(tmp, t.at)
	}
	err := unix.Renameat2(tmp.dir, tmp.name, t.at.dir, t.at.name, unix.RENAME_NOREPLACE)
	switch err {
	case unix.EEXIST:
		// Made since; the kernel shall say again whether it may be written.
		fd, err := openAt(t.at.dir, t.at.name, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err != nil {
			return err
		}
		st, err := fstat(fd)
		unix.Close(fd)
		if err != nil {
			return err
		}
		if !isRegular(&st) {
			return invalid("path is not a regular file: %s", t.path)
		}
		return renameat(tmp, t.at)
	case unix.EINVAL, unix.ENOSYS, unix.EINTR:
		return renameat(tmp, t.at)
	default:
		return err
	}
}

// announce makes watchers see what they would see if the content had been
// written to the path: a change of mode, as from the account that the file is
// given to, if it is new, and a write in any case.
func (t *staged) announce(fd int) error {
	st, err := fstat(fd)
	if err != nil {
		return err
	}
	if !t.is {
		if err := unix.Fchmod(fd, st.Mode&0o777); err != nil {
			return err
		}
	}
	return unix.Ftruncate(fd, st.Size)
}

// copyBack writes the content into the existing target.
func (t *staged) copyBack() error {
	size, err := t.file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := t.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	buf := make([]byte, copyBuffer)
	for at := int64(0); ; {
		n, err := t.file.Read(buf)
		for done := 0; done < n; {
			w, err := unix.Pwrite(t.old, buf[done:n], at)
			if err != nil && err != unix.EINTR {
				return fmt.Errorf("copying into the file: %w", err)
			}
			w = max(w, 0)
			done, at = done+w, at+int64(w)
		}
		if err == io.EOF {
			return unix.Ftruncate(t.old, size)
		}
		if err != nil {
			return fmt.Errorf("reading what was received: %w", err)
		}
	}
}

// discard closes what is open and removes what was not committed.
func (t *staged) discard() {
	if t.tmp != "" || t.made {
		// Best effort: the account may have lost its rights since.
		_ = t.u.do(func() error {
			if t.tmp != "" {
				_ = unix.Unlinkat(t.at.dir, t.tmp, 0)
			}
			if t.made && t.old >= 0 && t.at.dir >= 0 {
				mine, err1 := fstat(t.old)
				there, err2 := t.at.lstat()
				if errors.Join(err1, err2) == nil && sameFile(&mine, &there) && there.Size == 0 {
					_ = unix.Unlinkat(t.at.dir, t.at.name, 0)
				}
			}
			return nil
		})
		t.tmp, t.made = "", false
	}
	if t.file != nil {
		t.file.Close()
		t.file = nil
	}
	if t.old >= 0 {
		unix.Close(t.old)
		t.old = -1
	}
	if t.at.dir >= 0 {
		t.at.close()
		t.at.dir = -1
	}
}
