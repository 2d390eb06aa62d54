// Package sdk drives the official clients, unmodified, as a user's program
// would, against the real binary. Versions are those of the lock files beside
// it; they are installed into .cache once.
package sdk

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/test/program"
)

// Client is an official client in one version.
type Client struct {
	Name    string
	dir     string   // with the lock file
	lock    string   // that file
	install string   // shell, run in the directory of the installation
	run     []string // {dir} is that directory
}

// Clients are those that the whole-program tests use.
var Clients = []Client{
	{"js-2.51", "js-2.51", "package-lock.json", npm, []string{"node", "run.mjs", "{dir}"}},
	{"js-2.45", "js-2.45", "package-lock.json", npm, []string{"node", "run.mjs", "{dir}"}},
	{"python-sync", "python", "requirements.txt", pip, []string{"{dir}/venv/bin/python", "-B", "run.py", "sync"}},
	{"python-async", "python", "requirements.txt", pip, []string{"{dir}/venv/bin/python", "-B", "run.py", "async"}},
}

// CLI is the official command line.
var CLI = Client{"cli", "cli", "package-lock.json", npm, []string{"{dir}/node_modules/.bin/e2b"}}

const (
	npm = `npm ci --no-audit --no-fund --loglevel=error`
	pip = `python3 -m venv venv && venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt`
)

// Install installs every client that is not. It needs the real network.
func Install() error {
	for _, c := range append(slices.Clone(Clients), CLI) {
		if err := c.prepare(); err != nil {
			return fmt.Errorf("installing the client %s: %w", c.Name, err)
		}
	}
	return nil
}

// frames is the directory of what the runners share.
func frames() string { return filepath.Join(program.Repo(), "test", "sdk") }

// source is the directory of the lock file.
func (c Client) source() string { return filepath.Join(frames(), c.dir) }

// home is where the client is installed: a name that changes with its lock.
func (c Client) home() (string, error) {
	lock, err := os.ReadFile(filepath.Join(c.source(), c.lock))
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append(lock, c.install...))
	return program.Cache("sdk", c.dir+"-"+hex.EncodeToString(sum[:6])), nil
}

// prepare installs the client unless it is: all of it, or nothing.
func (c Client) prepare() error {
	home, err := c.home()
	if err != nil {
		return err
	}
	done := filepath.Join(home, "installed")
	if _, err := os.Stat(done); err == nil {
		return nil
	}
	fmt.Fprintf(os.Stderr, "installing the client %s into %s, once\n", c.dir, home)
	// A virtual environment cannot be moved, so it is made where it stays, and
	// the file that says that it is whole comes last.
	if err := errors.Join(os.RemoveAll(home), os.MkdirAll(home, 0o755), os.CopyFS(home, os.DirFS(c.source()))); err != nil {
		return err
	}
	cmd := exec.Command("/bin/sh", "-c", c.install)
	cmd.Dir = home
	if r := program.RunCmd(cmd); r.Code != 0 {
		return fmt.Errorf("%s: %s", c.install, r)
	}
	return os.WriteFile(done, nil, 0o644)
}

// Command returns the client's command, pointed at the server.
func (c Client) Command(t *testing.T, server *program.Server, args ...string) *exec.Cmd {
	t.Helper()
	home, err := c.home()
	if err != nil {
		t.Fatal(err)
	}
	all := append(slices.Clone(c.run), args...)
	for i := range c.run {
		all[i] = strings.ReplaceAll(all[i], "{dir}", home)
	}
	cmd := exec.CommandContext(t.Context(), all[0], all[1:]...)
	cmd.Env = append(server.Env(), "PYTHONPATH="+frames()) // of frame.py
	return cmd
}

// Result is what a runner prints for each scenario.
type Result struct {
	Name  string
	OK    bool
	Error string
	MS    int
}

// Exercise runs the client's runner, run.mjs or run.py in the directory of the
// package under test, and reports each scenario as a subtest. They must be the
// given ones, in this order. further is the runner's environment beside what
// points it at the server.
func (c Client) Exercise(t *testing.T, server *program.Server, scenarios []string, further ...string) {
	t.Helper()
	var names []string
	for _, r := range c.results(t, server, further) {
		names = append(names, r.Name)
		t.Run(strings.ReplaceAll(r.Name, " ", "-"), func(t *testing.T) {
			t.Logf("took %d ms", r.MS)
			if !r.OK {
				t.Error(r.Error)
			}
		})
	}
	if !slices.Equal(names, scenarios) {
		t.Errorf("the client went through %q, want %q", names, scenarios)
	}
}

// results runs the client's runner to its end.
func (c Client) results(t *testing.T, server *program.Server, further []string) []Result {
	t.Helper()
	// `go test` runs a cached test again when a file it looked at has changed.
	for _, dir := range []string{".", frames()} {
		for _, name := range []string{"run.py", "run.mjs", "frame.py", "frame.mjs"} {
			_, _ = os.Stat(filepath.Join(dir, name)) // not every directory has each
		}
	}
	cmd := c.Command(t, server)
	cmd.Env = append(cmd.Env, further...)
	cmd.WaitDelay = time.Second
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := time.AfterFunc(6*time.Minute, func() { _ = cmd.Process.Kill() }) // the missing scenarios are the failure
	defer stop.Stop()
	var results []Result
	for sc := bufio.NewScanner(out); sc.Scan(); {
		var r Result
		if err := json.Unmarshal(sc.Bytes(), &r); err != nil {
			t.Errorf("the runner printed %q", sc.Text())
			continue
		}
		results = append(results, r)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the runner: %v\n%s", err, said.String())
	}
	return results
}
