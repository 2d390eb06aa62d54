// Package file keeps artefacts as files under one directory.
//
// Layout: <Dir>/objects/<key> holds the objects, each a read-only file whose
// path is its key; <Dir>/tmp holds what is being written. An object appears by
// one rename after its bytes and before its directories are synced, so a
// reader never sees a part of one. Files left in tmp by a crash are removed by
// the next Open.
package file

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob"
	"github.com/cayhq/cay/internal/ctxio"
)

var (
	_ blob.Store = (*Store)(nil)
	_ blob.Local = (*Store)(nil)
)

const (
	objectsDir = "objects"
	tmpDir     = "tmp"
	// staleAfter is how old a file in tmp must be before Open takes it for the
	// leftover of a crash; another process may be writing a younger one.
	staleAfter = 24 * time.Hour
	// maxKey is the longest key of the contract, in bytes.
	maxKey = 512
)

// Store is a [blob.Store] and a [blob.Local] over one directory. Several
// processes may share it.
type Store struct {
	dir  string
	root *os.Root

	closing sync.Once
	closed  error

	// fault, in tests, is called before each step of a Put and may fail it.
	fault func(step string) error
}

// Open returns a store over dir, which it makes if needed, and removes what
// crashed writes left. It is a function, not a method, because Open of a store
// is the contract's name for reading an object.
func Open(ctx context.Context, dir string) (*Store, error) {
	s := &Store{dir: dir}
	for _, d := range []string{dir, filepath.Join(dir, objectsDir), filepath.Join(dir, tmpDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, s.hostError("make the artefact directory "+d, err)
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, s.hostError("open the artefact directory "+dir, err)
	}
	s.root = root
	if err := s.clean(time.Now()); err != nil {
		root.Close()
		return nil, err
	}
	return s, ctx.Err()
}

// Close lets go of the directory. It may be called twice; readers that are
// open stay usable.
func (s *Store) Close() error {
	s.closing.Do(func() { s.closed = s.root.Close() })
	return s.closed
}

// clean removes what is left of writes that began long before now.
func (s *Store) clean(now time.Time) error {
	entries, err := fs.ReadDir(s.root.FS(), tmpDir)
	if err != nil {
		return s.hostError("read the artefact directory", err)
	}
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil || now.Sub(fi.ModTime()) < staleAfter {
			continue
		}
		if err := s.root.Remove(path.Join(tmpDir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return s.hostError("remove a stale file", err)
		}
	}
	return nil
}

// CheckKey reports whether k keeps the contract's rules for keys.
func CheckKey(k blob.Key) error {
	bad := func(why string) error {
		return &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerStorage,
			Message: "the object key " + strconv.Quote(string(k)) + " " + why,
			Fix:     "use slash-separated segments of letters, digits, '.', '_' and '-'",
			Detail:  map[string]string{"key": string(k)}}
	}
	if len(k) == 0 || len(k) > maxKey {
		return bad("is empty or longer than " + strconv.Itoa(maxKey) + " bytes")
	}
	for seg := range strings.SplitSeq(string(k), "/") {
		if seg == "" || seg == "." || seg == ".." {
			return bad("has an empty or dotted segment")
		}
		if len(seg) > 255 {
			return bad("has a segment of more than 255 bytes")
		}
		for _, c := range []byte(seg) {
			if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '.' && c != '_' && c != '-' {
				return bad("has a character that is not allowed")
			}
		}
	}
	return nil
}

func objectPath(k blob.Key) string { return path.Join(objectsDir, string(k)) }

// Put implements [blob.Store].
func (s *Store) Put(ctx context.Context, k blob.Key, r io.Reader) (blob.Object, error) {
	if err := CheckKey(k); err != nil {
		return blob.Object{}, err
	}
	var id [12]byte
	rand.Read(id[:])
	tmp := path.Join(tmpDir, fmt.Sprintf("%x", id))
	obj, err := s.write(ctx, tmp, k, r)
	if err != nil {
		// A temporary file that cannot be removed now is removed by a later Open.
		_ = s.root.Remove(tmp)
		return blob.Object{}, err
	}
	return obj, nil
}

func (s *Store) step(name string) error {
	if s.fault == nil {
		return nil
	}
	return s.fault(name)
}

func (s *Store) write(ctx context.Context, tmp string, k blob.Key, r io.Reader) (blob.Object, error) {
	wrap := func(what string, err error) error { return s.objectError(what, k, err) }
	if err := s.step("create"); err != nil {
		return blob.Object{}, wrap("create a temporary file for", err)
	}
	f, err := s.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return blob.Object{}, wrap("create a temporary file for", err)
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	n, err := io.Copy(w, ctxio.Reader(ctx, r))
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = s.step("write")
	}
	if err != nil {
		return blob.Object{}, wrap("write", err)
	}
	if err := f.Chmod(0o400); err != nil {
		return blob.Object{}, wrap("set the mode of", err)
	}
	if err := s.step("sync"); err != nil {
		return blob.Object{}, wrap("sync", err)
	}
	if err := f.Sync(); err != nil {
		return blob.Object{}, wrap("sync", err)
	}
	fi, err := f.Stat()
	if err != nil {
		return blob.Object{}, wrap("read the size of", err)
	}
	if err := f.Close(); err != nil {
		return blob.Object{}, wrap("close", err)
	}
	dst := objectPath(k)
	for try := 0; ; try++ {
		if err := s.makeDirs(path.Dir(dst)); err != nil {
			return blob.Object{}, wrap("make the directory of", err)
		}
		if err := s.step("rename"); err != nil {
			return blob.Object{}, wrap("publish", err)
		}
		err := s.root.Rename(tmp, dst)
		if err == nil {
			break
		}
		// A concurrent Delete may have removed the empty directory.
		if !errors.Is(err, fs.ErrNotExist) || try == 8 {
			return blob.Object{}, wrap("publish", err)
		}
	}
	// From here on the object is visible; an error means that it may not
	// survive a power cut.
	if err := s.step("syncdir"); err != nil {
		return blob.Object{}, wrap("sync the directory of", err)
	}
	if err := s.syncDir(path.Dir(dst)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return blob.Object{}, wrap("sync the directory of", err)
	}
	return blob.Object{Key: k, SizeBytes: n, Modified: fi.ModTime()}, nil
}

// makeDirs makes dir and syncs every parent in which it made an entry.
func (s *Store) makeDirs(dir string) error {
	if dir == "." || dir == "/" {
		return nil
	}
	if _, err := s.root.Stat(dir); err == nil {
		return nil
	}
	parent := path.Dir(dir)
	if err := s.makeDirs(parent); err != nil {
		return err
	}
	if err := s.root.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	return s.syncDir(parent)
}

func (s *Store) syncDir(dir string) error {
	d, err := s.root.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// open returns the file of an object.
func (s *Store) open(k blob.Key) (*os.File, blob.Object, error) {
	if err := CheckKey(k); err != nil {
		return nil, blob.Object{}, err
	}
	f, err := s.root.Open(objectPath(k))
	if err != nil {
		return nil, blob.Object{}, s.objectError("open", k, err)
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fs.ErrNotExist // a key that is only a prefix of others
	}
	if err != nil {
		f.Close()
		return nil, blob.Object{}, s.objectError("open", k, err)
	}
	return f, blob.Object{Key: k, SizeBytes: fi.Size(), Modified: fi.ModTime()}, nil
}
