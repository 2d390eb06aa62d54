package envd

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// composeRequest is the body of POST /files/compose.
type composeRequest struct {
	SourcePaths []string `json:"source_paths"`
	Destination string   `json:"destination"`
	Username    string   `json:"username"`
}

// compose joins files into one and deletes them: the parts of an upload that a
// client sent side by side.
func (s *Server) compose(w http.ResponseWriter, r *http.Request) {
	file, err := s.join(r)
	s.watchers.settle()
	if err != nil {
		writeFault(w, err)
		return
	}
	writeJSON(w, http.StatusOK, file)
}

func (s *Server) join(r *http.Request) (*uploaded, error) {
	var q composeRequest
	if err := json.NewDecoder(io.LimitReader(r.Body, maxMessage)).Decode(&q); err != nil {
		return nil, broken(err)
	}
	if len(q.SourcePaths) == 0 {
		return nil, invalid("source_paths must name at least one file")
	}
	if q.Destination == "" {
		return nil, invalid("destination must not be empty")
	}
	if q.Username == "" {
		q.Username = s.settings().user
	}
	u, err := s.users.lookup(q.Username)
	if err != nil {
		return nil, err
	}
	workdir := s.settings().workdir
	dest, err := resolvePath(q.Destination, u, workdir)
	if err != nil {
		return nil, err
	}
	// Everything is looked at before anything is written.
	sources := make([]string, len(q.SourcePaths))
	for i, p := range q.SourcePaths {
		if p == "" {
			return nil, invalid("a source path is empty")
		}
		if sources[i], err = resolvePath(p, u, workdir); err != nil {
			return nil, err
		}
		if sources[i] == dest {
			return nil, invalid("the destination '%s' is one of the sources", dest)
		}
		f, st, err := openRegular(u, sources[i])
		if err != nil {
			return nil, err
		}
		f.Close()
		if old, err := statPath(u, dest); err == nil && sameFile(&old, &st) {
			return nil, invalid("the destination '%s' is one of the sources", dest)
		}
	}
	t, err := stage(u, dest, "")
	if err != nil {
		return nil, err
	}
	defer t.discard()
	for _, p := range sources {
		if err := r.Context().Err(); err != nil {
			return nil, err
		}
		f, _, err := openRegular(u, p)
		if err != nil {
			return nil, err
		}
		_, err = io.Copy(t.file, f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("appending '%s' to '%s': %w", p, dest, err)
		}
	}
	if _, err := t.commit(nil); err != nil {
		return nil, err
	}
	for _, p := range sources {
		err := u.do(func() error {
			at, err := placeOf(p)
			if err != nil {
				return err
			}
			defer at.close()
			return unix.Unlinkat(at.dir, at.name, 0)
		})
		if err != nil && !isNotExist(err) {
			return nil, fmt.Errorf("'%s' was composed, but deleting the source '%s': %w", dest, p, err)
		}
	}
	return &uploaded{Name: filepath.Base(dest), Path: dest, Type: "file"}, nil
}

// statPath looks at what a path leads to, with an account's rights.
func statPath(u *user, path string) (unix.Stat_t, error) {
	return with(u, func() (unix.Stat_t, error) {
		fd, err := openPath(path, unix.O_PATH)
		if err != nil {
			return unix.Stat_t{}, err
		}
		defer unix.Close(fd)
		return fstat(fd)
	})
}

// openRegular opens a regular file for reading, with an account's rights. It
// never waits, as opening a pipe would.
func openRegular(u *user, path string) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	f, err := with(u, func() (*os.File, error) {
		fd, err := openPath(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
		if err == unix.ENXIO {
			return nil, invalid("path is not a regular file: %s", path)
		}
		if err != nil {
			return nil, err
		}
		st, err = fstat(fd)
		switch {
		case err != nil:
		case isDir(&st):
			err = invalid("path '%s' is a directory", path)
		case !isRegular(&st):
			err = invalid("path '%s' is not a regular file", path)
		}
		if err != nil {
			unix.Close(fd)
			return nil, err
		}
		return os.NewFile(uintptr(fd), path), nil
	})
	if err != nil {
		return nil, st, pathError(path, err)
	}
	return f, st, nil
}
