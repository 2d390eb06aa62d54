package program

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay/test/invariant"
)

// Options say how a server is run.
type Options struct {
	// Pool is the number of guests booted ahead; 0 is none.
	Pool int
	// MemoryMB and DiskMB are those of its sandboxes; 0 is 512 and 2560.
	MemoryMB, DiskMB int
	// Args are further arguments of `cay up`.
	Args []string
	// Binary is the program, if it is not the one under test.
	Binary string
	// Env is added to the server's environment.
	Env []string
	// Fresh has the server begin with an empty data directory. Else it has one
	// with the base template in it, made once in a process for each size.
	Fresh bool
}

// Server is a cay server with a data directory of its own.
type Server struct {
	// Dir is the data directory.
	Dir string
	// API and Proxy are the server's URLs, Key its first API key, Admin the
	// admin token, Team the team that it made.
	API, Proxy, Key, Admin, Team string
	// Ready is how long the last Up took.
	Ready time.Duration

	opts     Options
	progress io.Writer // nil: kept in log
	cmd      *exec.Cmd
	done     chan struct{} // closed when cmd has ended
	log      output
}

// EngineCgroup is the name of the cgroup, below every hierarchy, that holds
// those of a data directory's sandboxes.
func EngineCgroup(dataDir string) string {
	sum := sha256.Sum256([]byte(filepath.Join(dataDir, "run", "gvisor")))
	return "cay-" + hex.EncodeToString(sum[:4])
}

// HostTag is what the network objects of a data directory have in their names.
func HostTag(dataDir string) string {
	sum := sha256.Sum256([]byte(dataDir))
	return hex.EncodeToString(sum[:])[:6]
}

// Scope is where a server of the data directory leaves traces.
func Scope(dataDir string) invariant.Scope {
	return invariant.Scope{DataDir: dataDir, Cgroups: []string{EngineCgroup(dataDir)}, Dirs: []string{"/run/netns", "/run/cay", dataDir + ".tmp"}}
}

var serial atomic.Int32

// NewDir returns a path for a data directory on the machine's disk.
func NewDir() string {
	return filepath.Join(os.Getenv(workEnv), "d"+strconv.Itoa(int(serial.Add(1))))
}

// Start runs a server until the test ends, and then `cay down`, which must
// work.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	s, err := newProgram(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the server said:\n%s", s.Log())
		}
		if err := s.stop(); err != nil {
			t.Error(err)
		}
	})
	if !o.Fresh {
		if err := s.plant(); err != nil {
			t.Fatalf("preparing a data directory: %v", err)
		}
	}
	s.Up(t)
	return s
}

// seeds are prepared data directories, by the sizes of their template.
var (
	seeding sync.Mutex
	seeds   = map[[2]int]string{}
)

// plant fills the data directory with what a server that made the base
// template has left after `cay down`.
func (s *Server) plant() error {
	seed, err := seedOf(s.opts.MemoryMB, s.opts.DiskMB)
	if err != nil {
		return err
	}
	from := os.DirFS(seed)
	if err := os.Mkdir(s.Dir, 0o711); err != nil {
		return err
	}
	for _, name := range []string{"credentials.json", "cay.db"} {
		if err := copyFile(filepath.Join(s.Dir, name), filepath.Join(seed, name), 0o600); err != nil {
			return err
		}
	}
	// Blobs are never changed in place, so that a second name is as good as a
	// copy.
	return fs.WalkDir(from, "blobs", func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := filepath.Join(s.Dir, path)
		if e.IsDir() {
			return os.Mkdir(to, 0o700)
		}
		return os.Link(filepath.Join(seed, path), to)
	})
}

// seedOf returns the prepared data directory for a size, which it makes first
// if it must.
func seedOf(memoryMB, diskMB int) (string, error) {
	seeding.Lock()
	defer seeding.Unlock()
	key := [2]int{memoryMB, diskMB}
	if seeds[key] == "" {
		seed, err := newProgram(Options{MemoryMB: memoryMB, DiskMB: diskMB})
		if err != nil {
			return "", err
		}
		if err := seed.up(); err != nil {
			return "", err
		}
		if err := seed.stop(); err != nil {
			return "", err
		}
		seeds[key] = seed.Dir
	}
	return seeds[key], nil
}

func newProgram(o Options) (*Server, error) {
	if o.MemoryMB == 0 {
		o.MemoryMB = 512
	}
	if o.DiskMB == 0 {
		o.DiskMB = 2560
	}
	// `go test` runs a cached test again when a file it looked at has changed.
	if o.Binary == "" {
		o.Binary = Binary()
	}
	if _, err := os.Stat(o.Binary); err != nil {
		return nil, err
	}
	s := &Server{Dir: NewDir(), opts: o, API: "http://127.0.0.1:0", Proxy: "http://127.0.0.1:0"}
	return s, os.MkdirAll(s.tmp(), 0o755)
}

// tmp is the TMPDIR of the server.
func (s *Server) tmp() string { return s.Dir + ".tmp" }

// Up starts the server and waits until it says that it is ready. After the
// first time it listens where it listened before.
func (s *Server) Up(t testing.TB) {
	t.Helper()
	if err := s.up(); err != nil {
		t.Fatal(err)
	}
}

// upWithin is how long a start may take, with the making of the template: some
// minutes, and more on a machine that does other things.
const upWithin = 12 * time.Minute

func (s *Server) up() error {
	began := time.Now()
	if err := s.launch(); err != nil {
		return err
	}
	ready := make(chan string, 1)
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", s.cmd, err)
	}
	cmd, done := s.cmd, s.done
	go func() {
		defer close(done)
		sc := bufio.NewScanner(out)
		for sc.Scan() {
			if strings.HasPrefix(sc.Text(), "ready ") {
				ready <- sc.Text()
			}
		}
		_ = cmd.Wait() // its status is for those who look at cmd.ProcessState
	}()
	select {
	case line := <-ready:
		s.Ready = time.Since(began)
		return s.parseReady(line)
	case <-done:
		return fmt.Errorf("`cay up` ended before it was ready (%s):\n%s", cmd.ProcessState, s.Log())
	case <-time.After(upWithin):
		return errors.Join(fmt.Errorf("`cay up` was not ready within %s:\n%s", upWithin, s.Log()), s.signal(syscall.SIGKILL))
	}
}

// launch makes the command of the server.
func (s *Server) launch() error {
	if s.cmd != nil {
		select {
		case <-s.done:
		default:
			return errors.New("the server runs already")
		}
	}
	args := append([]string{"up", "--data-dir", s.Dir, "--api-addr", strings.TrimPrefix(s.API, "http://"),
		"--proxy-addr", strings.TrimPrefix(s.Proxy, "http://"), "--pool-size", strconv.Itoa(s.opts.Pool),
		"--memory-mb", strconv.Itoa(s.opts.MemoryMB), "--disk-mb", strconv.Itoa(s.opts.DiskMB)}, s.opts.Args...)
	s.cmd = exec.Command(s.opts.Binary, args...)
	s.cmd.Env = append(s.environ(), s.opts.Env...)
	s.cmd.Stderr = &s.log
	if s.progress != nil {
		s.cmd.Stderr = io.MultiWriter(&s.log, s.progress)
	}
	// Its own session, as under a service manager.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	s.cmd.WaitDelay = 5 * time.Second
	s.done = make(chan struct{})
	return nil
}

// environ is the machine's environment without what an earlier stage or the
// user's own Cay put there.
func (s *Server) environ() []string {
	var env []string
	for _, e := range os.Environ() {
		if strings.HasPrefix(e, imageEnv+"=") || (!strings.HasPrefix(e, "CAY_") && !strings.HasPrefix(e, "E2B_")) {
			env = append(env, e)
		}
	}
	return append(env, "TMPDIR="+s.tmp())
}

func (s *Server) parseReady(line string) error {
	for f := range strings.FieldsSeq(line) {
		switch k, v, _ := strings.Cut(f, "="); k {
		case "api":
			s.API = v
		case "proxy":
			s.Proxy = v
		}
	}
	var c struct{ APIKey, AdminToken, TeamID string }
	b, err := os.ReadFile(filepath.Join(s.Dir, "credentials.json"))
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	if err != nil {
		return fmt.Errorf("reading the generated credentials: %w", err)
	}
	s.Key, s.Admin, s.Team = c.APIKey, c.AdminToken, c.TeamID
	return nil
}

// SetArgs replaces the further arguments of the next Up.
func (s *Server) SetArgs(args ...string) { s.opts.Args = args }

// SetBinary replaces the program of the next Up, as an upgrade does.
func (s *Server) SetBinary(path string) { s.opts.Binary = path }

// PID is the server's process.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Descriptors is how many files the server's process has open.
func (s *Server) Descriptors(t testing.TB) int {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.PID()))
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// Log is what all servers of the data directory wrote to standard error.
func (s *Server) Log() string { return s.log.String() }

// Running reports whether the server's process runs.
func (s *Server) Running() bool {
	if s.cmd == nil || s.cmd.Process == nil {
		return false
	}
	select {
	case <-s.done:
		return false
	default:
		return true
	}
}

func (s *Server) signal(sig syscall.Signal) error {
	if !s.Running() {
		return nil
	}
	if err := s.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-s.done:
		return nil
	case <-time.After(30 * time.Second):
		return fmt.Errorf("the server did not end within 30 s after %s", sig)
	}
}

// Kill9 ends the server's process, and nothing else, at once.
func (s *Server) Kill9(t testing.TB) {
	t.Helper()
	if err := s.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// Term asks the server to stop, waits, and leaves the sandboxes.
func (s *Server) Term(t testing.TB) {
	t.Helper()
	if err := s.signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if c := s.cmd.ProcessState.ExitCode(); c != 0 {
		t.Errorf("after SIGTERM the server ended with status %d:\n%s", c, s.Log())
	}
}

// Restart is Term and Up.
func (s *Server) Restart(t testing.TB) {
	t.Helper()
	s.Term(t)
	s.Up(t)
}

// Down runs `cay down`.
func (s *Server) Down(t testing.TB) Result {
	t.Helper()
	r := s.Run("down")
	if r.Code != 0 {
		t.Fatalf("`cay down`: %s", r)
	}
	return r
}

func (s *Server) stop() error {
	if _, err := os.Stat(filepath.Join(s.Dir, "credentials.json")); err != nil {
		return s.signal(syscall.SIGKILL) // it never got anywhere
	}
	if r := s.Run("down"); r.Code != 0 {
		return errors.Join(fmt.Errorf("`cay down`: %s", r), s.signal(syscall.SIGKILL))
	}
	return nil
}

// Env is what a user's program gets to find the server.
func (s *Server) Env() []string {
	return append(s.environ(), "E2B_API_KEY="+s.Key, "E2B_API_URL="+s.API, "E2B_SANDBOX_URL="+s.Proxy)
}

// Result is how a command ended.
type Result struct {
	Code           int
	Stdout, Stderr string
}

// String implements fmt.Stringer.
func (r Result) String() string {
	return fmt.Sprintf("exit status %d\nstdout: %s\nstderr: %s", r.Code, r.Stdout, r.Stderr)
}

// Run runs a command of the program on the data directory.
func (s *Server) Run(args ...string) Result {
	cmd := exec.Command(s.opts.Binary, append(args, "--data-dir", s.Dir)...)
	cmd.Env = s.environ()
	return RunCmd(cmd)
}

// RunCmd runs a command to its end.
func RunCmd(cmd *exec.Cmd) Result {
	var out, errw bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errw
	cmd.WaitDelay = 2 * time.Second
	err := cmd.Run()
	r := Result{Stdout: out.String(), Stderr: errw.String()}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		r.Code, r.Stderr = -1, r.Stderr+err.Error()
	}
	return r
}

// output collects what a process writes while others read it.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}
