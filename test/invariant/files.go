package invariant

import (
	"database/sql"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	_ "modernc.org/sqlite" // the driver
)

// files reads the files of the data directory and of the scope's others. It
// does not enter what is mounted there, for that is a sandbox's or an image's
// content; but for the pool, which is a file system of the server's own.
func files(s Snapshot, scope Scope) error {
	dirs := slices.Clone(scope.Dirs)
	if scope.DataDir != "" {
		dirs = append(dirs, scope.DataDir)
	}
	var outer, inner syscall.Stat_t
	pool := filepath.Join(scope.DataDir, "disk", "pool")
	if syscall.Lstat(scope.DataDir, &outer) == nil && syscall.Lstat(pool, &inner) == nil && outer.Dev != inner.Dev {
		dirs = append(dirs, pool)
	}
	for _, dir := range dirs {
		if err := walk(s, scope, dir); err != nil {
			return err
		}
	}
	return nil
}

func walk(s Snapshot, scope Scope, dir string) error {
	var dev uint64
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			return nil // it has just gone, or never was
		}
		if err != nil {
			return err
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return nil //nolint:nilerr // the same
		}
		if path == dir {
			dev = st.Dev
			return nil
		}
		s.add(scope, File, path, path)
		if e.IsDir() && st.Dev != dev {
			return fs.SkipDir
		}
		return nil
	})
}

// rows reads the sandboxes that the database has as not ended, from every
// database file in the data directory.
func rows(s Snapshot, scope Scope) error {
	if scope.DataDir == "" {
		return nil
	}
	entries, err := os.ReadDir(scope.DataDir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(scope.DataDir, e.Name())
		if head, err := readHead(path); err != nil || head != "SQLite format 3\x00" {
			continue
		}
		if err := live(s, scope, path); err != nil {
			return err
		}
	}
	return nil
}

func readHead(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b := make([]byte, 16)
	_, err = f.Read(b)
	return string(b), err
}

func live(s Snapshot, scope Scope, path string) error {
	db, err := sql.Open("sqlite", "file:"+path+"?mode=ro&_pragma=busy_timeout(5000)")
	if err != nil {
		return err
	}
	defer db.Close()
	var n int
	if err := db.QueryRow(`SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'sandboxes'`).Scan(&n); err != nil || n == 0 {
		return err
	}
	found, err := db.Query(`SELECT id, state FROM sandboxes WHERE state <> 'ended'`)
	if err != nil {
		return err
	}
	defer found.Close()
	for found.Next() {
		var id, state string
		if err := found.Scan(&id, &state); err != nil {
			return err
		}
		s.add(scope, Row, "sandbox "+state, id)
	}
	return found.Err()
}
