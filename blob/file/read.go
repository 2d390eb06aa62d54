package file

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"syscall"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob"
)

// Open implements [blob.Store]. The reader is an *os.File, so that it can seek
// and be given to the kernel.
func (s *Store) Open(ctx context.Context, k blob.Key) (io.ReadCloser, blob.Object, error) {
	if err := ctx.Err(); err != nil {
		return nil, blob.Object{}, err
	}
	f, obj, err := s.open(k)
	if err != nil {
		return nil, blob.Object{}, err
	}
	return f, obj, nil
}

// Stat implements [blob.Store].
func (s *Store) Stat(ctx context.Context, k blob.Key) (blob.Object, error) {
	if err := ctx.Err(); err != nil {
		return blob.Object{}, err
	}
	if err := CheckKey(k); err != nil {
		return blob.Object{}, err
	}
	fi, err := s.root.Lstat(objectPath(k))
	if err == nil && !fi.Mode().IsRegular() {
		err = fs.ErrNotExist
	}
	if err != nil {
		return blob.Object{}, s.objectError("look up", k, err)
	}
	return blob.Object{Key: k, SizeBytes: fi.Size(), Modified: fi.ModTime()}, nil
}

// List implements [blob.Store].
func (s *Store) List(ctx context.Context, prefix string) ([]blob.Object, error) {
	// The walk starts at the deepest directory that the prefix names whole.
	start := objectsDir
	if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
		if err := CheckKey(blob.Key(prefix[:i])); err != nil {
			return nil, err
		}
		start = path.Join(objectsDir, prefix[:i])
	}
	var out []blob.Object
	err := fs.WalkDir(s.root.FS(), start, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) { // removed under the walk, or no such prefix
				return nil
			}
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		k := strings.TrimPrefix(p, objectsDir+"/")
		if !d.Type().IsRegular() || !strings.HasPrefix(k, prefix) {
			return nil
		}
		fi, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		out = append(out, blob.Object{Key: blob.Key(k), SizeBytes: fi.Size(), Modified: fi.ModTime()})
		return nil
	})
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, s.hostError("list artefacts under "+prefix, err)
	}
	// A directory walk orders "a/b" and "a.b" by segment, the contract by key.
	sort.Slice(out, func(i, j int) bool { return out[i].Key < out[j].Key })
	return out, nil
}

// Delete implements [blob.Store]. Directories that become empty go too.
func (s *Store) Delete(ctx context.Context, k blob.Key) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := CheckKey(k); err != nil {
		return err
	}
	fi, err := s.root.Lstat(objectPath(k))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || (err == nil && fi.IsDir()) {
		return nil
	}
	if err != nil {
		return s.objectError("look up", k, err)
	}
	if err := s.root.Remove(objectPath(k)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return s.objectError("delete", k, err)
	}
	dir := path.Dir(objectPath(k))
	for ; dir != objectsDir; dir = path.Dir(dir) {
		if s.root.Remove(dir) != nil { // not empty, or a Put has just used it
			break
		}
	}
	if err := s.syncDir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return s.objectError("sync the directory of", k, err)
	}
	return nil
}

// Path implements [blob.Local]. The file is read-only; whoever writes to it
// breaks its digest.
func (s *Store) Path(ctx context.Context, k blob.Key) (string, error) {
	if _, err := s.Stat(ctx, k); err != nil {
		return "", err
	}
	return filepath.Join(s.dir, filepath.FromSlash(objectPath(k))), nil
}

// objectError makes a typed error of what went wrong with one object.
func (s *Store) objectError(what string, k blob.Key, err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	detail := map[string]string{"key": string(k), "provider": "file", "dir": s.dir}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR):
		return &cay.Error{Code: cay.CodeObjectMissing, Layer: cay.LayerStorage,
			Message: "the artefact " + string(k) + " is not in the store",
			Fix:     "build the template again: `cay template build`",
			Detail:  detail, Err: err}
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return &cay.Error{Code: cay.CodeDiskFull, Layer: cay.LayerStorage,
			Message: "no room is left to " + what + " the artefact " + string(k) + " in " + s.dir,
			Fix:     "free space on that file system, then try again", Detail: detail, Err: err}
	}
	return &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerStorage,
		Message: "could not " + what + " the artefact " + string(k), Fix: "see the log for the cause",
		Detail: detail, Err: err}
}

func (s *Store) hostError(what string, err error) error {
	code := cay.CodeDataDirInvalid
	if errors.Is(err, syscall.ENOSPC) {
		code = cay.CodeDiskFull
	}
	return &cay.Error{Code: code, Layer: cay.LayerStorage, Message: "could not " + what,
		Fix:    "check that the directory is writable for the user that runs Cay and that the disk is not full",
		Detail: map[string]string{"dir": s.dir}, Err: err}
}
