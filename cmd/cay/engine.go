package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/wholefile"
)

// engineName is the engine's program among the embedded binaries.
const engineName = "engine.gz"

// installEngine puts the engine's program where it can be executed, and returns
// its path. It returns "" when this binary has to do: cay was built without the
// program, or the data directory's file system executes nothing. Then sandboxes
// start slower and take more memory.
func installEngine(dir string, log *slog.Logger) (string, error) {
	packed, err := guestFS.ReadFile("guest/" + engineName)
	if errors.Is(err, fs.ErrNotExist) {
		log.Warn("this cay was built without its engine program and is its own engine, which is slower", "fix", "build it with `make build`")
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", errDataDir(filepath.Dir(dir), fmt.Errorf("making the engine's directory: %w", err))
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", fmt.Errorf("looking at the engine's directory: %w", err)
	}
	if st.Flags&unix.ST_NOEXEC != 0 {
		log.Warn("the file system of the data directory is mounted noexec, so that cay is its own engine, which is slower", "dir", dir)
		return "", nil
	}
	path, err := unpackEngine(packed, dir)
	if err != nil {
		return "", errDataDir(filepath.Dir(dir), fmt.Errorf("unpacking the engine: %w", err))
	}
	engineFiles{dir}.removeHalf(log)
	return path, nil
}

// nameOfEngine names a packed program after its content.
func nameOfEngine(packed []byte) string {
	sum := sha256.Sum256(packed)
	return hex.EncodeToString(sum[:8])
}

// unpackEngine writes the program to a file that is named after its content,
// unless it is there. What is there is whole: it got its name when it was.
func unpackEngine(packed []byte, dir string) (string, error) {
	if len(packed) < 8 {
		return "", errors.New("the embedded program is cut off")
	}
	path := filepath.Join(dir, nameOfEngine(packed))
	size := binary.LittleEndian.Uint32(packed[len(packed)-4:]) // the end of a gzip file is the size of what is in it
	if have, err := os.Stat(path); err == nil && have.Size() == int64(size) && have.Mode().Perm() == 0o755 {
		return path, nil
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp(dir, newEngine)
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	_, err = io.Copy(f, r) // checks the sum
	// Executed by the sandbox's own user, too.
	err = errors.Join(err, f.Chmod(0o755), f.Close())
	if err != nil {
		return "", err
	}
	return path, os.Rename(f.Name(), path)
}

// newEngine begins the names of programs that are being unpacked.
const newEngine = "new-"

// engineFiles are the unpacked programs. It implements [orchestrator.Engines].
type engineFiles struct{ dir string }

// List implements [orchestrator.Engines].
func (f engineFiles) List() ([]string, error) {
	entries, err := os.ReadDir(f.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing the engine programs: %w", err)
	}
	var names []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), newEngine) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Remove implements [orchestrator.Engines].
func (f engineFiles) Remove(name string) error {
	if err := wholefile.Remove(filepath.Join(f.dir, name)); err != nil {
		return fmt.Errorf("removing the engine program %s: %w", name, err)
	}
	return nil
}

// removeHalf removes what a crash left of unpacking.
func (f engineFiles) removeHalf(log *slog.Logger) {
	half, _ := filepath.Glob(filepath.Join(f.dir, newEngine+"*")) // the pattern is valid
	for _, path := range half {
		if err := wholefile.Remove(path); err != nil {
			log.Warn("half of an engine program cannot be removed", "err", err)
		}
	}
}

// openEngine starts the engine's supervisor, or finds it.
func (h *host) openEngine(ctx context.Context) error {
	exe, err := installEngine(h.dir.path("engine"), h.log)
	if err != nil {
		return err
	}
	h.rt.Exe = exe
	return h.rt.Open(ctx)
}
