package program

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The stages of a test process, in its environment.
const (
	stageEnv  = "CAY_TEST_STAGE"
	stageInit = "init" // PID 1 of the machine
	stageTest = "test" // runs the tests
	workEnv   = "CAY_TEST_WORK"
	imageEnv  = "CAY_BASE_IMAGE"
)

// The first thread stays in the machine's namespaces, whatever [InWorld] does
// to others: it is the one that /proc shows for the process.
func init() { runtime.LockOSThread() }

// workParent holds the data directories of tests. The path is short, because
// the engine's sockets are below it and a socket's name has 108 bytes; and on
// a disk, because a sandbox's disk is not to be in memory.
const workParent = "/var/tmp"

// Main runs the tests of a package in a machine of their own. prepare, if any,
// runs before, on the real machine: for what needs the real network. What it
// puts into the environment reaches the tests.
//
// Other packages may run their tests at the same time, on machines of theirs.
func Main(m *testing.M, prepare ...func() error) {
	run(m, func() error {
		if _, err := os.Stat(Binary()); err != nil {
			return fmt.Errorf("the program under test is missing; run `make build`, or set CAY_BIN: %w", err)
		}
		for _, p := range append([]func() error{prepareImage}, prepare...) {
			if err := p(); err != nil {
				return err
			}
		}
		return nil
	})
}

// Bare is Main for tests that need the machine and no program.
func Bare(m *testing.M) { run(m, func() error { return nil }) }

func run(m *testing.M, prepare func() error) {
	switch os.Getenv(stageEnv) {
	case stageInit:
		os.Exit(initMachine())
	case stageTest:
		if image := os.Getenv(buildEnv); image != "" {
			if err := runBuild(image); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
		if err := makeWorld(); err != nil {
			fmt.Fprintln(os.Stderr, "making the machine's network:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	os.Exit(outside(prepare))
}

// outside is the process that `go test` started.
func outside(prepare func() error) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if os.Geteuid() != 0 {
		return fail(errors.New("whole-program tests need root: sandboxes need namespaces, mounts and cgroups"))
	}
	if err := os.MkdirAll(Cache(), 0o755); err != nil {
		return fail(err)
	}
	if err := inTurn(func() error { removeStale(); return prepare() }); err != nil {
		return fail(err)
	}
	code, err := runMachine(unix.CLONE_NEWPID|unix.CLONE_NEWNS|unix.CLONE_NEWIPC|unix.CLONE_NEWNET, os.Args)
	if err != nil {
		return fail(err)
	}
	return code
}

// runMachine runs this program again, with args, as init of a machine in
// namespaces of its own, and returns the exit status. The kernel ends every
// process of the machine with its init, and the init with us.
func runMachine(flags uintptr, args []string) (int, error) {
	work := filepath.Join(workParent, "cay-t-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(work, 0o711); err != nil {
		return 1, err
	}
	defer removeWork(work)
	cmd := exec.Command("/proc/self/exe", args[1:]...)
	cmd.Args[0] = args[0]
	cmd.Env = append(os.Environ(), stageEnv+"="+stageInit, workEnv+"="+work)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL} // of this thread, which is the first
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), nil
	}
	return 0, err
}

// initMachine is PID 1 of the machine. It starts the tests and reaps what
// loses its parent.
func initMachine() int {
	if err := setUpMachine(); err != nil {
		fmt.Fprintln(os.Stderr, "making the tests' machine:", err)
		return 1
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), stageEnv+"="+stageTest)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			fmt.Fprintln(os.Stderr, "waiting for the tests:", err)
			return 1
		case pid == cmd.Process.Pid && ws.Exited():
			return ws.ExitStatus()
		case pid == cmd.Process.Pid:
			fmt.Fprintln(os.Stderr, "the tests were ended by", ws.Signal())
			return 1
		}
	}
}

// setUpMachine makes the new mount namespace a machine's.
func setUpMachine() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("cutting the mounts off: %w", err)
	}
	if err := dropForeign(); err != nil {
		return fmt.Errorf("letting go of other servers' mounts: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	for _, dir := range []string{"/run/netns", "/run/cay"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
			return fmt.Errorf("mounting %s: %w", dir, err)
		}
	}
	return nil
}

// dropForeign detaches what other servers of the real machine have mounted.
// Our copy of such a mount would be in the way of its end.
func dropForeign() error {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for _, line := range slices.Backward(strings.Split(string(table), "\n")) {
		head, tail, _ := strings.Cut(line, " - ")
		h, t := strings.Fields(head), strings.Fields(tail)
		if len(h) < 5 || len(t) < 2 || h[4] == "/" {
			continue
		}
		loop := strings.HasPrefix(t[1], "/dev/loop") && t[0] != "squashfs" // which packages of some distributions are
		if loop || t[0] == "overlay" || t[0] == "nsfs" {
			_ = unix.Unmount(h[4], unix.MNT_DETACH) // gone already, or under one that is
		}
	}
	return nil
}

// inTurn prepares what packages share: one of them at a time.
func inTurn(prepare func() error) error {
	unlock, err := lockFile(Cache("prepare.lock"))
	if err != nil {
		return err
	}
	defer unlock()
	return prepare()
}

// lockFile takes a lock that ends with the process at the latest.
func lockFile(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(int(f.Fd())); err != nil {
		f.Close()
		return nil, &os.PathError{Op: "flock", Path: path, Err: err}
	}
	return func() { f.Close() }, nil
}

func flock(fd int) error {
	for {
		if err := unix.Flock(fd, unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// removeStale removes what test processes that were killed have left.
func removeStale() {
	dirs, _ := filepath.Glob(filepath.Join(workParent, "cay-t-*")) // the pattern is well-formed
	for _, dir := range dirs {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), "cay-t-"))
		if err == nil && unix.Kill(pid, 0) == unix.ESRCH {
			removeWork(dir)
		}
	}
}

// removeWork removes the directories of a machine that is gone, whose mounts
// went with it, and the cgroups of its servers, which did not.
func removeWork(work string) {
	dirs, _ := filepath.Glob(filepath.Join(work, "*"))
	for _, dir := range dirs {
		groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + EngineCgroup(dir))
		for _, g := range append(groups, "/sys/fs/cgroup/"+EngineCgroup(dir)) {
			var all []string
			_ = filepath.WalkDir(g, func(path string, e fs.DirEntry, err error) error {
				if err == nil && e.IsDir() {
					all = append(all, path)
				}
				return nil
			})
			for _, path := range slices.Backward(all) { // children first
				_ = unix.Rmdir(path)
			}
		}
	}
	_ = os.RemoveAll(work) // the next run tries again
}
