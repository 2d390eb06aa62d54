// Package crash kills servers, at every point between two steps of what they
// do, and looks at what the next one makes of it.
package crash

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/test/program"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		fmt.Fprintln(os.Stderr, runChild(dir))
		os.Exit(1)
	}
	program.Main(m)
}

// onFiles is a server on a host of files, in a process of its own.
type onFiles struct {
	dir string
	env []string
	c   *program.Client
	cmd *exec.Cmd
	log *os.File
}

// startOnFiles starts a server until the test ends. The files are in memory
// where that is possible: what dies here is the process, not the machine.
func startOnFiles(t *testing.T, env ...string) *onFiles {
	t.Helper()
	parent := "/dev/shm"
	if _, err := os.Stat(parent); err != nil {
		parent = ""
	}
	dir, err := os.MkdirTemp(parent, "cay-crash-")
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "socket")
	s := &onFiles{dir: dir, env: env, log: log, c: &program.Client{API: "http://cay", Key: testKey, Admin: testAdmin, HTTP: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}}}
	t.Cleanup(func() {
		if s.cmd != nil {
			_ = s.cmd.Process.Kill()
			_ = s.cmd.Wait()
		}
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("the servers said:\n%s", b[max(0, len(b)-64<<10):])
		}
		if err := errors.Join(log.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	s.up(t)
	return s
}

func (s *onFiles) client() *program.Client { return s.c }

func (s *onFiles) up(t *testing.T) {
	t.Helper()
	s.cmd = exec.Command("/proc/self/exe")
	s.cmd.Env = append(os.Environ(), append(s.env, childEnv+"="+s.dir)...)
	s.cmd.Stderr = s.log
	// Nothing of it outlives the test.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := s.cmd.StdoutPipe()
	if err == nil {
		err = s.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "ready\n" {
		t.Fatalf("the server is not ready: %q, %v", line, err)
	}
}

func (s *onFiles) ask(path string, out any) error {
	resp, err := s.c.HTTP.Get("http://cay/test/" + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, b)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(b, out)
}

func (s *onFiles) arm(t *testing.T, kill, fail string, errno syscall.Errno) {
	t.Helper()
	if err := s.ask("arm?"+url.Values{"kill": {kill}, "fail": {fail}, "errno": {strconv.Itoa(int(errno))}}.Encode(), nil); err != nil {
		t.Fatal(err)
	}
}

func (s *onFiles) died(t *testing.T, within time.Duration) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- s.cmd.Wait() }()
	select {
	case <-done:
	case <-time.After(within):
		t.Fatal("the point was never passed")
	}
	if st, ok := s.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || st.Signal() != syscall.SIGKILL {
		t.Fatalf("the server ended by itself: %v", s.cmd.ProcessState)
	}
}

func (s *onFiles) write(id, v string) error {
	return s.ask("write?"+url.Values{"id": {id}, "value": {v}}.Encode(), nil)
}

func (s *onFiles) read(id string) (v value, err error) {
	return v, s.ask("read?"+url.Values{"id": {id}}.Encode(), &v)
}

func (s *onFiles) inventory(t *testing.T) (v inventory) {
	t.Helper()
	if err := s.ask("inventory", &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// share splits the points among servers, so that they are killed side by side.
func share(n int, all []string) [][]string {
	out := make([][]string, n)
	for i, p := range all {
		out[i%n] = append(out[i%n], p)
	}
	return out
}

// The server dies at every point there is: within ten seconds the next one is in
// a legal state, nothing that was acknowledged is undone, and nothing is left
// over. A point that is never passed fails, and so does one that is passed and
// not in the list: its process ends otherwise.
func TestKillPoints(t *testing.T) {
	for i, points := range share(2, killpoint.Points()) {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			srv := startOnFiles(t)
			k := &trial{t: t, srv: srv, c: srv.c}
			k.stand()
			var slowest time.Duration
			for _, p := range points {
				ok := t.Run(p, func(t *testing.T) {
					k.t = t
					began := time.Now()
					k.killed(p)
					slowest = max(slowest, time.Since(began))
				})
				if !ok {
					t.FailNow() // the next would begin with what this one left
				}
			}
			k.t = t
			k.connect(k.paused)
			k.has(k.paused, k.values[k.paused], true)
			t.Logf("%d points; the slowest took %v", len(points), slowest)
			// What was made and told to nobody was in quarantine until now.
			left := k.settled()
			if err := srv.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			srv.died(t, legalWithin)
			srv.env = append(srv.env, hastyEnv+"=1")
			srv.up(t)
			program.Eventually(t, 2*legalWithin, func() string {
				if now := k.settled(); len(now) > 0 {
					return fmt.Sprintf("of snapshots without an owner %v, %v are still there", left, now)
				}
				return ""
			})
		})
	}
}

// ofTheHost are operations of the engine, the disks, the networks and the
// database that can fail.
var ofTheHost = []string{"engine.create", "engine.start", "engine.freeze", "engine.checkpoint", "engine.restore",
	"disk.create", "disk.flush", "disk.save", "disk.keep", "disk.remove", "disk.remove-saved", "network.acquire", "store.write"}

// Every file operation there is, of every operation, fails for want of room and
// by a broken disk: what is refused is typed, what is not is done, the sandbox
// runs on or is paused as before, and nothing is left over. Once the disk works
// again, so does the operation.
func TestFailingDisk(t *testing.T) {
	srv := startOnFiles(t)
	k := &trial{t: t, srv: srv, c: srv.c}
	k.stand()
	tried := map[string]bool{}
	for name, op := range operations {
		var places []string
		for _, p := range killpoint.Points() {
			if killpoint.Fails(p) && opOf(p) == name {
				places = append(places, p)
			}
		}
		for _, place := range append(places, ofTheHost...) {
			for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EIO} {
				ok := t.Run(name+"/"+place+"/"+unix.ErrnoName(errno), func(t *testing.T) {
					k.t = t
					tried[place] = k.fails(op, place, errno) || tried[place]
				})
				if !ok {
					t.FailNow()
				}
			}
		}
	}
	k.t = t
	for _, p := range append(killpoint.Points(), ofTheHost...) {
		fails := killpoint.Fails(p) || slices.Contains(ofTheHost, p)
		if fails && !killpoint.Undoes(p) && !tried[p] {
			t.Errorf("nothing failed at %s", p)
		}
	}
}

// fails does an operation while one of its steps fails, and then again. It
// reports whether the step was come to.
func (k *trial) fails(op operation, place string, errno syscall.Errno) (passed bool) {
	k.t.Helper()
	k.begin(place)
	op.before(k)
	k.srv.arm(k.t, "", place, errno)
	err := op.act(k)
	passed = slices.Contains(k.passed(), place)
	if !passed && !slices.Contains(ofTheHost, place) && !killpoint.Undoes(place) {
		// What is left of a sandbox goes after the answer.
		program.Eventually(k.t, legalWithin, func() string {
			if passed = slices.Contains(k.passed(), place); !passed {
				return "the point was never passed"
			}
			return ""
		})
	}
	var r *program.Refusal
	switch {
	case err == nil:
	case !errors.As(err, &r):
		k.t.Fatalf("the operation ended with %v", err)
	case r.ErrorCode == "" || r.ErrorCode == string(cay.CodeInternal):
		k.t.Errorf("the refusal is not typed: %v", err)
	case errno == syscall.ENOSPC && r.ErrorCode != string(cay.CodeDiskFull):
		k.t.Errorf("for want of room it was refused as %s: %v", r.ErrorCode, err)
	}
	if err != nil && k.box != "" && k.state(k.box) == "" {
		k.t.Errorf("after %v the sandbox is gone", err)
	}
	k.srv.arm(k.t, "", "", 0)
	k.settled()
	op.after(k, err == nil)
	k.stillStand()
	k.sweep()
	k.settled()
	return passed
}

// passed lists what the server has come to since it was armed.
func (k *trial) passed() (out []string) {
	k.t.Helper()
	k.must(k.srv.(*onFiles).ask("hits", &out))
	return out
}
