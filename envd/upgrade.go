package envd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
)

// headerDigest carries the SHA-256 of the program that is sent, "sha256:…".
const headerDigest = "X-Cay-Envd-Digest"

const (
	// maxProgram bounds the program of an envd.
	maxProgram = 64 << 20
	// previousSuffix is where PID 1 finds the program before, if the next one
	// ends at once.
	previousSuffix = ".previous"
	trialRun       = 10 * time.Second
)

// upgrade puts another program in the place of this one and lets it take over.
// The answer comes before that: the node sees by /identity that it is done.
func (s *Server) upgrade(w http.ResponseWriter, r *http.Request) {
	switch changed, err := s.install(r); {
	case err != nil:
		writeFault(w, err)
	case !changed:
		w.WriteHeader(http.StatusNoContent)
	default:
		s.replacing.Store(true)
		w.WriteHeader(http.StatusAccepted)
		s.replace()
	}
}

// install writes the body of a request over this program, once it is known to
// be whole and to run here.
func (s *Server) install(r *http.Request) (changed bool, err error) {
	if s.procs.keeper == nil || s.replace == nil {
		return false, faultf(connect.CodeFailedPrecondition, "this envd cannot be replaced: nothing keeps its processes")
	}
	now, err := s.envdDigest()
	if err != nil {
		return false, err
	}
	want := r.Header.Get(headerDigest)
	if want == now {
		return false, nil
	}
	path, err := os.Executable()
	if err != nil {
		return false, fmt.Errorf("finding envd's own binary: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".envd-upgrade-")
	if err != nil {
		return false, fmt.Errorf("making room for the other envd: %w", err)
	}
	defer os.Remove(f.Name()) // its name has gone when all went well
	h := sha256.New()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(f, h)}, io.LimitReader(r.Body, maxProgram+1), make([]byte, copyBuffer))
	err = errors.Join(err, f.Chmod(0o755), f.Sync(), f.Close())
	if err != nil {
		return false, fmt.Errorf("receiving the other envd: %w", err)
	}
	if got := digestPrefix + hex.EncodeToString(h.Sum(nil)); got != want || n > maxProgram {
		return false, invalid("the program has the digest %s, not %q as %s says", got, want, headerDigest)
	}
	ctx, stop := context.WithTimeout(r.Context(), trialRun)
	defer stop()
	if out, err := exec.CommandContext(ctx, f.Name(), "-version").CombinedOutput(); err != nil {
		return false, invalid("the other envd does not run here: %v: %s", err, out[:min(len(out), 512)])
	}
	return true, put(f.Name(), path)
}

// put has a program take the place of another, of which a copy is kept. At every
// instant there is one in the place: a disk that is saved now boots. It is no
// second name of the same file: gVisor loses a file of two names when another
// takes the place of one of them.
func put(program, path string) error {
	previous := path + previousSuffix
	if err := copyProgram(path, previous); err != nil {
		return errors.Join(fmt.Errorf("keeping this envd: %w", err), os.Remove(previous))
	}
	if err := os.Rename(program, path); err != nil {
		return errors.Join(fmt.Errorf("putting the other envd in place: %w", err), os.Remove(previous))
	}
	return nil
}

// copyProgram makes a copy of the same time, by which the sum beside the program
// goes for it (laidSum).
func copyProgram(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{out}, struct{ io.Reader }{in}, make([]byte, copyBuffer))
	return errors.Join(err, out.Chmod(0o755), out.Sync(), out.Close(), os.Chtimes(to, st.ModTime(), st.ModTime()))
}
