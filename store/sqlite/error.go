package sqlite

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
	driver "modernc.org/sqlite"
	lib "modernc.org/sqlite/lib"

	"github.com/cayhq/cay"
)

var errNotOpen = errors.New("the database is not open")

// fail types an error; what is what was to be done.
func (s *Store) fail(what string, err error) error {
	var typed *cay.Error
	if errors.As(err, &typed) {
		return err
	}
	e := &cay.Error{Layer: cay.LayerStorage, Detail: map[string]string{"path": s.path}, Err: err}
	say := func(code cay.Code, why, fix string) error {
		e.Code, e.Message, e.Fix = code, "could not "+what+": "+why, fix
		return e
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return say(cay.CodeStoreUnavailable, "the request ended while it waited for the database", "try again")
	}
	if errors.Is(err, errNotOpen) {
		return say(cay.CodeStoreUnavailable, "the database is not open", "try again when the server is up")
	}
	var de *driver.Error
	if !errors.As(err, &de) {
		return s.failFile(what, err)
	}
	switch de.Code() { // the extended code
	case lib.SQLITE_CONSTRAINT_UNIQUE, lib.SQLITE_CONSTRAINT_PRIMARYKEY:
		return say(cay.CodeConflict, "there is one with the same ID, name or hash already", "choose another")
	case lib.SQLITE_CONSTRAINT_FOREIGNKEY:
		return say(cay.CodeNotFound, "the team does not exist", "make the team first")
	}
	switch de.Code() & 0xff {
	case lib.SQLITE_FULL:
		return s.full(what, err)
	case lib.SQLITE_CORRUPT, lib.SQLITE_NOTADB:
		return s.damaged(de.Error(), err)
	case lib.SQLITE_IOERR, lib.SQLITE_CANTOPEN:
		if s.noRoom() {
			return s.full(what, err)
		}
		if de.Code()&0xff == lib.SQLITE_IOERR {
			return say(cay.CodeStoreUnavailable, "the disk answers with an error", "look in the kernel's log (dmesg) for the disk's faults")
		}
		return s.failFile(what, errors.Join(unix.Access(filepath.Dir(s.path), unix.W_OK), err))
	case lib.SQLITE_READONLY, lib.SQLITE_PERM:
		return s.failFile(what, errors.Join(fs.ErrPermission, err))
	case lib.SQLITE_BUSY, lib.SQLITE_LOCKED:
		return say(cay.CodeStoreUnavailable, "another process has held the database for too long", "find it with `fuser "+s.path+"` and end it")
	case lib.SQLITE_INTERRUPT:
		return say(cay.CodeStoreUnavailable, "the request ended while it waited for the database", "try again")
	}
	return say(cay.CodeInternal, de.Error(), "report this: it is a defect in Cay")
}

// failFile types what concerns the file as such.
func (s *Store) failFile(what string, err error) error {
	e := &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerStorage, Detail: map[string]string{"path": s.path}, Err: err}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return s.full(what, err)
	case errors.Is(err, fs.ErrNotExist):
		e.Message = "could not " + what + ": the directory " + filepath.Dir(s.path) + " does not exist"
		e.Fix = "make the directory"
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		e.Message = "could not " + what + ": " + s.path + " cannot be written"
		e.Fix = "run Cay as root, or as the user that owns the data directory, on a file system mounted read-write"
	default:
		e.Message = "could not " + what + ": " + err.Error()
		e.Fix = "check that " + s.path + " is a file on a local file system that Cay may write"
	}
	return e
}

func (s *Store) full(what string, err error) error {
	return &cay.Error{Code: cay.CodeDiskFull, Layer: cay.LayerStorage,
		Message: "could not " + what + ": no room is left on the disk of " + s.path,
		Fix:     "free space on the file system of the data directory; nothing was changed",
		Detail:  map[string]string{"path": s.path}, Err: err}
}

func (s *Store) flushFailed(what string, err error) error {
	code := cay.CodeStoreUnavailable
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		code = cay.CodeDiskFull
	}
	return &cay.Error{Code: code, Layer: cay.LayerStorage,
		Message: "could not " + what + " for good: the disk of " + s.path + " refused to flush it, so the next loss of power may undo it",
		Fix:     "look in the kernel's log (dmesg) for the disk's faults, then do the same again",
		Detail:  map[string]string{"path": s.path}, Err: err}
}

func (s *Store) damaged(found string, err error) error {
	return &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerStorage,
		Message: "the database " + s.path + " is damaged: " + found,
		Fix: "stop Cay and restore the file with its -wal and -shm from a backup, or rescue what can be read: " +
			"sqlite3 " + s.path + " .recover | sqlite3 rescued.db, and put rescued.db in its place; then check the disk",
		Detail: map[string]string{"path": s.path}, Err: err}
}

// noRoom reports whether the file system cannot give a page to a file: SQLite
// has one code for every failed operation on a file.
func (s *Store) noRoom() bool {
	var st unix.Statfs_t
	return unix.Statfs(filepath.Dir(s.path), &st) == nil && (st.Bavail*uint64(st.Bsize) < 1<<16 || st.Ffree == 0 && st.Files != 0)
}

func internal(message string) error {
	return &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerStorage, Message: message, Fix: "report this: it is a defect in Cay"}
}
