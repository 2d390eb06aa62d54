package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// program is this command, built as it is for guests.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "cay-init-test-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building init: %w\n%s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	if os.Getenv(keeperEnv) != "" {
		keepForTest()
	}
	status := m.Run()
	if path, err := program(); err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(status)
}

// console collects what PID 1 and its children say.
type console struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.Write(p)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String()
}

// boot runs init as PID 1 of a namespace with its own mounts, and a shell
// script in the place of envd. It returns the console and init's PID outside.
func boot(t *testing.T, script string) (*console, int) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces")
	}
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	fake := filepath.Join(dir, "envd")
	if err := os.WriteFile(fake, []byte("#!/bin/bash\ncd "+dir+"\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	c := &console{}
	// The shell replaces itself, so that init is PID 1.
	cmd := exec.Command("/bin/sh", "-c", `mount -t proc proc /proc && exec "$@"`, "sh", path, "-envd", fake, "-cgroup", "")
	cmd.Env = []string{"PATH=/usr/bin:/bin", "CAY_CONTROL_TOKEN=very-secret", "CAY_BUILD=b1", "CAY_INSTANCE=i1", "CAY_PIDS=7"}
	cmd.Stdout, cmd.Stderr = c, c
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL,
	}
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("console:\n%s", c)
		}
	})
	return c, cmd.Process.Pid
}

func (c *console) until(t *testing.T, text string) {
	t.Helper()
	eventually(t, "the console says "+text, func() bool { return strings.Contains(c.String(), text) })
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	end := time.Now().Add(20 * time.Second)
	for tick := time.NewTicker(5 * time.Millisecond); !f(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("waiting until %s", what)
		}
	}
}

func TestKeepsEnvdRunning(t *testing.T) {
	c, pid := boot(t, `
n=$(cat count 2>/dev/null || echo 0); echo $((n+1)) > count
case $n in
0) echo "args $*"; echo "token $(cat <&3)"; echo remembered >&4; env | sort | sed 's/^/env /'
   setsid sleep 1000 > /dev/null 2>&1 < /dev/null & echo "user $!"; exit 3;;
1) kill -9 $$;;
2) kill -SEGV $$;;
*) echo "life $n"; echo "state $(cat /proc/self/fd/4)"; awk '{print $2}' /proc/net/tcp; ps -eo pid=,ppid=,stat=,comm= | sed 's/^/ps /'; echo listed; exec sleep 1000;;
esac
`)
	c.until(t, "listed")
	text := c.String()
	for _, want := range []string{
		"args -system -build=b1 -instance=i1 -token-fd=3 -state-fd=4 -public-fd=5 -control-fd=6 -store-fd=7\n",
		"token very-secret\n",
		"cay-init: envd ended: exit status 3 after ", "; starting it again in 50ms (end 1); processes of users go on\n",
		"cay-init: envd ended: signal: killed (by the kernel for lack of memory, or by root) after ", "in 100ms (end 2)",
		"cay-init: envd ended: signal: segmentation fault", "in 200ms (end 3)",
		"life 3\n", "state remembered\n", "00000000:C33F\n", "00000000:C33E\n", // 49983 and 49982
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the console does not say %q", want)
		}
	}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if strings.HasPrefix(line, "env ") && (strings.Contains(line, "secret") || strings.Contains(line, "CAY_")) {
			t.Errorf("envd's environment holds %s", line)
		}
		if len(f) < 5 || f[0] != "ps" {
			continue
		}
		if strings.HasPrefix(f[3], "Z") {
			t.Errorf("a zombie: %s", line)
		}
		if f[4] == "sleep" && f[2] != "1" {
			t.Errorf("the user's process has another parent: %s", line)
		}
	}
	if !strings.Contains(text, " sleep\n") {
		t.Error("the user's process did not outlive envd")
	}
	// The token is nowhere in PID 1's environment, the rest is.
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(b, []byte("secret")) || bytes.Contains(b, []byte(envToken)) {
		t.Errorf("PID 1's environment is %q", b)
	}
	if !bytes.Contains(b, []byte("CAY_BUILD=b1\x00")) {
		t.Errorf("PID 1's environment is damaged: %q", b)
	}
}

// TestReapsOrphans: whatever loses its parent is reaped, while envd's own
// children are left to envd.
func TestReapsOrphans(t *testing.T) {
	c, _ := boot(t, `
for i in $(seq 100); do ( ( exit 7 ) & ) ; done
sh -c 'exit 9'; echo "own child ended with $?"
while ps -eo ppid=,stat= | grep -q '^ *1 Z'; do sleep 0.01; done
echo clean; exec sleep 1000
`)
	c.until(t, "own child ended with 9")
	c.until(t, "clean")
	if strings.Contains(c.String(), "envd ended") {
		t.Error("another child was taken for envd")
	}
}

// TestSignalsHaveNoEffect: root in the sandbox cannot end it by accident, and
// children get default handlers.
func TestSignalsHaveNoEffect(t *testing.T) {
	// What this test was started with ignored, by nohup for one, would be so in
	// PID 1. A handler is not inherited.
	for _, s := range []os.Signal{unix.SIGHUP, unix.SIGINT} { // of the others Go takes care
		if signal.Ignored(s) {
			handler := make(chan os.Signal, 1)
			signal.Notify(handler, s)
			defer func() { signal.Stop(handler); signal.Ignore(s) }()
		}
	}
	c, pid := boot(t, `
for s in HUP INT QUIT ABRT USR1 USR2 PIPE ALRM TERM STKFLT CHLD XCPU IO PWR SYS SEGV FPE ILL TRAP BUS RTMIN; do kill -$s 1; done
grep SigIgn /proc/self/status; grep -h -e SigIgn -e SigCgt /proc/1/status | sed 's/^/PID 1 /'; echo sent; exec sleep 1000
`)
	c.until(t, "sent")
	// Whatever PID 1 has no handler for may end it, if its first thread blocks
	// signals at that moment.
	var without uint64 = 1<<64 - 1
	for _, of := range []string{"PID 1 SigIgn:\t", "PID 1 SigCgt:\t"} {
		_, mask, _ := strings.Cut(c.String(), of)
		m, err := strconv.ParseUint(mask[:min(16, len(mask))], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		without &^= m
	}
	if without != 1<<(unix.SIGKILL-1)|1<<(unix.SIGSTOP-1) {
		t.Errorf("PID 1 has no handlers for the signals %#x", without)
	}
	// Signals 32 to 34 are the C library's own, which neither it nor Go lets a
	// program set; `go run` has the first one ignored.
	_, status, _ := strings.Cut(c.String(), "SigIgn:\t") // the first one is of the child
	ignored, err := strconv.ParseUint(strings.TrimSpace(status[:min(16, len(status))]), 16, 64)
	if err != nil || ignored&^(7<<31) != 0 {
		t.Errorf("a child ignores signals %#x, %v", ignored, err)
	}
	if err := unix.Kill(pid, 0); err != nil {
		t.Errorf("PID 1 is gone: %v", err)
	}
	if strings.Contains(c.String(), "envd ended") {
		t.Error("envd was restarted")
	}
}

func TestMissingEnvd(t *testing.T) {
	k := keeper{path: "/no/such/envd", args: []string{"/no/such/envd"}, token: "x", now: time.Now, sleep: func(time.Duration) {}}
	if _, _, err := k.start(); err == nil || !strings.Contains(err.Error(), "executing /no/such/envd: no such file") {
		t.Errorf("got %v", err)
	}
}

// TestOpenPorts: all or none, and nobody else has them then.
func TestOpenPorts(t *testing.T) {
	ls, err := openPorts([]port{{"a", 0}, {"b", 0}})
	if err != nil || len(ls) != 2 || ls[1].name != "b" {
		t.Fatalf("%v, %v", ls, err)
	}
	taken := 0
	for _, l := range ls {
		defer unix.Close(l.fd)
		sa, err := unix.Getsockname(l.fd)
		if err != nil {
			t.Fatal(err)
		}
		taken = sa.(*unix.SockaddrInet4).Port
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", taken))
		if err != nil {
			t.Fatalf("nobody listens: %v", err)
		}
		conn.Close()
	}
	if ls, err := openPorts([]port{{"a", 0}, {"b", taken}}); err == nil || len(ls) > 0 || !strings.Contains(err.Error(), "taking the b port") {
		t.Errorf("a taken port: %v, %v", ls, err)
	}
}

func TestNotPID1(t *testing.T) {
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(path).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "must be the first process") {
		t.Errorf("%v: %s", err, out)
	}
	if out, _ := exec.Command(path, "-help").CombinedOutput(); !strings.Contains(string(out), "Example") {
		t.Errorf("help: %s", out)
	}
	st, err := os.Stat(path)
	if err != nil || st.Size() > 4<<20 {
		t.Errorf("init has %d bytes, %v", st.Size(), err)
	}
}

func TestNextPause(t *testing.T) {
	last := time.Duration(0)
	var got []time.Duration
	for range 9 {
		last = nextPause(last, time.Second)
		got = append(got, last)
	}
	if got[0] != firstPause || got[1] != 2*firstPause || got[8] != lastPause {
		t.Errorf("pauses %v", got)
	}
	if p := nextPause(lastPause, calm); p != firstPause {
		t.Errorf("after a calm life: %v", p)
	}
}

func TestDescribe(t *testing.T) {
	for st, want := range map[syscall.WaitStatus]string{
		0: "exit status 0", 0x0200: "exit status 2", 15: "signal: terminated", 9: "signal: killed (by the kernel for lack of memory, or by root)",
	} {
		if got := describe(st); got != want {
			t.Errorf("%#x: %q, want %q", int(st), got, want)
		}
	}
}

// TestMakeGroups holds the order of what is written, on files that stand for
// the kernel's.
func TestMakeGroups(t *testing.T) {
	tree := func(files ...string) string {
		root := t.TempDir()
		for _, f := range files {
			p := filepath.Join(root, f)
			if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(p, nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		return root
	}
	all := []string{"cay/cgroup.procs", "cgroup.subtree_control", "user/pids.max", "system/pids.max"}
	root := tree(all...)
	dir, err := makeGroups(root, 2048)
	if err != nil || dir != filepath.Join(root, "user") {
		t.Fatalf("%q, %v", dir, err)
	}
	for f, want := range map[string]string{all[0]: "1", all[1]: "+pids", all[2]: "2048", all[3]: "2048"} {
		if b, _ := os.ReadFile(filepath.Join(root, f)); string(b) != want {
			t.Errorf("%s holds %q, want %q", f, b, want)
		}
	}
	if _, err := makeGroups(tree(all[:2]...), 0); err != nil {
		t.Errorf("without a limit: %v", err)
	}
	for i, want := range []string{"moving PID 1", "handing the pids controller down", "limiting", "limiting"} {
		files := append(append([]string{}, all[:i]...), all[i+1:]...)
		if _, err := makeGroups(tree(files...), 7); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("without %s: %v, want %q", all[i], err, want)
		}
	}
}

func TestMountPoints(t *testing.T) {
	m := mountPoints("none / 9p rw 0 0\nproc /proc proc rw 0 0\n\nshort\nx /a\\040b tmpfs rw 0 0\n")
	for p, want := range map[string]bool{"/": true, "/proc": true, "/dev": false, "/a\\040b": true} {
		if m[p] != want {
			t.Errorf("%s mounted: %v", p, m[p])
		}
	}
}

func FuzzMountPoints(f *testing.F) {
	f.Add("proc /proc proc rw 0 0\n")
	f.Fuzz(func(t *testing.T, s string) {
		if n := len(mountPoints(s)); n > strings.Count(s, "\n")+1 {
			t.Errorf("%s points in %q", strconv.Itoa(n), s)
		}
	})
}
