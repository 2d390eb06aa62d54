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

// client is an official client in one version.
type client struct {
	name    string
	dir     string   // with the lock file
	lock    string   // that file
	install string   // shell, run in the directory of the installation
	run     []string // {dir} is that directory
}

var clients = []client{
	{"js-2.51", "js-2.51", "package-lock.json", npm, []string{"node", "run.mjs", "{dir}"}},
	{"js-2.45", "js-2.45", "package-lock.json", npm, []string{"node", "run.mjs", "{dir}"}},
	{"python-sync", "python", "requirements.txt", pip, []string{"{dir}/venv/bin/python", "-B", "run.py", "sync"}},
	{"python-async", "python", "requirements.txt", pip, []string{"{dir}/venv/bin/python", "-B", "run.py", "async"}},
}

const (
	npm = `npm ci --no-audit --no-fund --loglevel=error`
	pip = `python3 -m venv venv && venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt`
)

// scenarios are those that each client goes through, in order.
var scenarios = []string{
	"create", "stdout and stderr", "output as it comes", "much output", "exit code", "exit by signal", "unknown command",
	"background", "list commands", "kill a command", "connect to a command", "stdin", "environment",
	"working directory", "user", "command timeout", "python and node",
	"write and read", "bytes", "many files", "list files", "file info", "move", "remove",
	"info", "set timeout", "list with metadata and pages", "connect", "kill", "kill during a command", "the end comes",
	"wrong key", "unknown template",
}

func TestMain(m *testing.M) {
	program.Main(m, func() error {
		for _, c := range clients {
			if err := c.prepare(); err != nil {
				return fmt.Errorf("installing the client %s: %w", c.name, err)
			}
		}
		return nil
	})
}

// home is where the client is installed: a name that changes with its lock.
func (c client) home() (string, error) {
	lock, err := os.ReadFile(filepath.Join(c.dir, c.lock))
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append(lock, c.install...))
	return program.Cache("sdk", c.dir+"-"+hex.EncodeToString(sum[:6])), nil
}

// prepare installs the client unless it is: all of it, or nothing.
func (c client) prepare() error {
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
	if err := errors.Join(os.RemoveAll(home), os.MkdirAll(home, 0o755), os.CopyFS(home, os.DirFS(c.dir))); err != nil {
		return err
	}
	cmd := exec.Command("/bin/sh", "-c", c.install)
	cmd.Dir = home
	if r := program.RunCmd(cmd); r.Code != 0 {
		return fmt.Errorf("%s: %s", c.install, r)
	}
	return os.WriteFile(done, nil, 0o644)
}

// result is what a runner prints for each scenario.
type result struct {
	Name  string
	OK    bool
	Error string
	MS    int
}

// Each client goes through every scenario.
func TestClients(t *testing.T) {
	server := program.Start(t, program.Options{Pool: 2})
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			results := c.exercise(t, server)
			var names []string
			for _, r := range results {
				names = append(names, r.Name)
				t.Run(strings.ReplaceAll(r.Name, " ", "-"), func(t *testing.T) {
					if !r.OK {
						t.Errorf("after %d ms: %s", r.MS, r.Error)
					}
				})
			}
			if !slices.Equal(names, scenarios) {
				t.Errorf("the client went through %q, want %q", names, scenarios)
			}
		})
	}
}

// exercise runs the client's runner to its end.
func (c client) exercise(t *testing.T, server *program.Server) []result {
	t.Helper()
	home, err := c.home()
	if err != nil {
		t.Fatal(err)
	}
	args := slices.Clone(c.run)
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "{dir}", home)
	}
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Env = server.Env()
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
	stop := time.AfterFunc(3*time.Minute, func() { _ = cmd.Process.Kill() }) // the missing scenarios are the failure
	defer stop.Stop()
	var results []result
	for sc := bufio.NewScanner(out); sc.Scan(); {
		var r result
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
