package gvisor

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// goferPrefix begins the name of the file server's program in the directory of
// a supervisor; the rest names its content.
const goferPrefix = "gofer-"

// installGofer puts the file server's program where launchers find it, and
// removes those of other builds, which guests that run have open. It returns ""
// without a program.
func installGofer(h home, program []byte) (string, error) {
	path := ""
	if len(program) > 0 {
		sum := sha256.Sum256(program)
		path = filepath.Join(string(h), goferPrefix+hex.EncodeToString(sum[:8]))
		if strings.Contains(path, ",") {
			return "", fmt.Errorf("the path %s has a comma", path) // it becomes part of a list
		}
		if st, err := os.Stat(path); err != nil || st.Size() != int64(len(program)) || st.Mode().Perm() != 0o700 {
			if err := writeProgram(path, program); err != nil {
				return "", fmt.Errorf("writing the file server's program: %w", err)
			}
		}
	}
	old, _ := filepath.Glob(filepath.Join(string(h), goferPrefix+"*")) // the pattern is well-formed
	for _, f := range old {
		if f != path {
			_ = os.Remove(f)
		}
	}
	return path, nil
}

// writeProgram writes a file that is whole when it has its name.
func writeProgram(path string, program []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), goferPrefix+"new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(program)
	if err := errors.Join(err, f.Chmod(0o700), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
