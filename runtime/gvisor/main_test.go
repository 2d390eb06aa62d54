package gvisor

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/runtime"
	"github.com/cayhq/cay/runtime/runtimetest"
)

var update = flag.Bool("update", false, "rewrite generated files")

// guestProgram is the compiled testdata/guest.
var guestProgram string

func TestMain(m *testing.M) {
	Dispatch()
	if len(os.Args) > 2 && os.Args[1] == "supervise" {
		s := &Supervisor{Dir: os.Args[2], Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), DebugDir: os.Getenv("CAY_TEST_DEBUG"), engine: os.Getenv("CAY_TEST_ENGINE")}
		if path := os.Getenv("CAY_TEST_GOFER"); path != "" {
			program, err := os.ReadFile(path)
			if err != nil {
				panic(err)
			}
			s.Gofer = program
		}
		if d, err := time.ParseDuration(os.Getenv("CAY_TEST_IDLE")); err == nil {
			s.IdleExit = d
		}
		if err := s.Run(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	flag.Parse()
	os.Exit(func() int {
		tmp, err := os.MkdirTemp("", "cay-guest")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(tmp)
		guestProgram = filepath.Join(tmp, "init")
		gofer := filepath.Join(tmp, "gofer")
		for path, source := range map[string]string{guestProgram: "./testdata/guest", gofer: "../../cmd/gofer"} {
			cmd := exec.Command("go", "build", "-o", path, source)
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				panic(fmt.Sprintf("building %s: %v\n%s", source, err, out))
			}
		}
		os.Setenv("CAY_TEST_GOFER", gofer)
		return m.Run()
	}())
}

// needRoot skips a test that makes namespaces and cgroups.
func needRoot(t testing.TB) {
	t.Helper()
	if builtWithCgo {
		t.Skip("gVisor cannot start itself from a binary with cgo: run with CGO_ENABLED=0")
	}
	if os.Geteuid() != 0 {
		t.Skip("gVisor's sandboxes need root: namespaces, mounts and cgroups")
	}
}

// shortDir is a temporary directory with a path short enough for sockets.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "cay")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// machine is the host of one test.
type machine struct {
	dir   string
	ahead int // of its runtimes
	count atomic.Int64
}

func newMachine(t testing.TB) *machine {
	t.Helper()
	needRoot(t)
	m := &machine{dir: shortDir(t)}
	t.Cleanup(func() {
		r := m.runtime()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := r.Open(ctx); err != nil {
			t.Errorf("cleaning up: %v", err)
			return
		}
		pid := r.info.PID
		if err := r.Shutdown(ctx); err != nil {
			t.Errorf("cleaning up: %v", err)
		}
		if err := r.waitGone(ctx, pid); err != nil {
			t.Errorf("cleaning up: %v", err)
		}
		if t.Failed() {
			log, _ := os.ReadFile(home(m.dir + "/d").log())
			t.Logf("supervisor's log:\n%s", log)
		}
	})
	return m
}

func (m *machine) runtime() *Runtime {
	r := New(filepath.Join(m.dir, "d"))
	r.Args = []string{"cay-test", "supervise", r.Dir}
	r.Env = os.Environ() // CAY_TEST_*
	r.Ahead = m.ahead
	return r
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// spec makes a root directory and a network namespace for one guest.
func (m *machine) spec(t testing.TB, args ...string) runtime.Spec {
	t.Helper()
	n := m.count.Add(1)
	id := runtime.InstanceID("x" + strconv.FormatInt(n, 10) + "t" + strconv.Itoa(os.Getpid()))
	root := filepath.Join(m.dir, "root", string(id))
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(guestProgram, filepath.Join(root, "init")); err != nil {
		data, rerr := os.ReadFile(guestProgram)
		if rerr != nil {
			t.Fatal(rerr)
		}
		if err := os.WriteFile(filepath.Join(root, "init"), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	ns := filepath.Base(m.dir) + "-" + strconv.FormatInt(n, 10)
	run(t, "ip", "netns", "add", ns)
	t.Cleanup(func() { run(t, "ip", "netns", "del", ns) })
	run(t, "ip", "-n", ns, "link", "set", "lo", "up")
	run(t, "ip", "-n", ns, "link", "add", "eth0", "type", "veth", "peer", "name", "host0")
	run(t, "ip", "-n", ns, "addr", "add", "169.254.0.21/30", "dev", "eth0")
	run(t, "ip", "-n", ns, "link", "set", "host0", "up")
	run(t, "ip", "-n", ns, "link", "set", "eth0", "up")
	return runtime.Spec{ID: id, RootFS: root, NetNS: "/run/netns/" + ns, Args: append([]string{"/init"}, args...),
		Env: []string{"PATH=/bin", "CAY_TEST=1"}, Hostname: "box",
		Limits: runtime.Limits{CPUs: 1, MemoryBytes: 512 << 20, PIDs: 512},
		Labels: map[string]string{"test": t.Name()}}
}

// crash kills the supervisor.
func (m *machine) crash(t testing.TB) {
	t.Helper()
	r := m.runtime()
	if err := r.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	pid := r.info.PID
	r.Close()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := r.waitGone(t.Context(), pid); err != nil {
		t.Fatal(err)
	}
}

// leftovers lists what belongs to instances of the machine.
func (m *machine) leftovers(t testing.TB) []string {
	t.Helper()
	var out []string
	h := home(filepath.Join(m.dir, "d"))
	ents, _ := os.ReadDir(h.instances())
	for _, e := range ents {
		if !strings.HasPrefix(e.Name(), sparePrefix) { // those are the supervisor's
			out = append(out, filepath.Join(h.instances(), e.Name()))
		}
	}
	for _, hier := range hierarchies() {
		groups, _ := filepath.Glob(filepath.Join(hier, h.cgroupParent(), "*", "cgroup.procs"))
		for _, g := range groups {
			if !strings.HasPrefix(filepath.Base(filepath.Dir(g)), sparePrefix) {
				out = append(out, g)
			}
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, m.dir) && !strings.Contains(line, h.shared()) {
			out = append(out, "mount "+strings.TrimSpace(line))
		}
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		data, _ := os.ReadFile(p)
		cmd := strings.ReplaceAll(string(data), "\x00", " ")
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		if strings.Contains(cmd, m.dir) && !m.spare(pid) && (strings.HasPrefix(cmd, "runsc") || strings.HasPrefix(cmd, arg0Launch)) {
			out = append(out, p+" "+cmd)
		}
	}
	return out
}

// spare reports whether a process is in a cgroup that no guest has yet.
func (m *machine) spare(pid int) bool {
	groups, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	return strings.Contains(string(groups), home(filepath.Join(m.dir, "d")).cgroupParent()+"/"+sparePrefix)
}

func TestConformance(t *testing.T) {
	needRoot(t)
	for name, ahead := range map[string]int{"nothing ahead": 0, "engines ahead": 2} {
		t.Run(name, func(t *testing.T) {
			runtimetest.Run(t, func(t *testing.T) *runtimetest.Fixture {
				m := newMachine(t)
				m.ahead = ahead
				return &runtimetest.Fixture{
					Runtime:   m.runtime(),
					Spec:      func(t *testing.T, args ...string) runtime.Spec { return m.spec(t, args...) },
					Again:     func(*testing.T) runtime.Runtime { return m.runtime() },
					Crash:     func(t *testing.T) { m.crash(t) },
					Leftovers: func(t *testing.T) []string { return m.leftovers(t) },
				}
			})
		})
	}
}
