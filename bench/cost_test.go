package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// write makes files below dir, by path.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestGuestGroups(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"v1/memory/memory.usage_in_bytes":   "1000\n",
		"v1/memory/memory.stat":             "active_file 1\ntotal_active_file 100\ntotal_inactive_file 200\n",
		"v1/memory/cgroup.procs":            "",
		"v1/memory/one/cgroup.procs":        "11\n12\n",
		"v1/memory/two/sentry/cgroup.procs": "13\n",
		"v1/cpu/cpuacct.usage":              "2000000000\n",
		"v2/memory.current":                 "5000\n",
		"v2/memory.stat":                    "anon 1\nactive_file 1000\ninactive_file 2000\n",
		"v2/cpu.stat":                       "usage_usec 3000000\nuser_usec 1\n",
		"v2/one/cgroup.procs":               "21\n",
	})
	for _, c := range []struct {
		name    string
		g       guestGroups
		groups  int
		members []int
		charged float64
		cpu     time.Duration
	}{
		{"version 1", guestGroups{memory: filepath.Join(dir, "v1", "memory"), cpu: filepath.Join(dir, "v1", "cpu")}, 2, []int{11, 12, 13}, 700, 2 * time.Second},
		{"version 2", guestGroups{memory: filepath.Join(dir, "v2"), cpu: filepath.Join(dir, "v2"), v2: true}, 1, []int{21}, 2000, 3 * time.Second},
	} {
		if n, err := c.g.count(); n != c.groups || err != nil {
			t.Errorf("%s: %d groups, %v, want %d", c.name, n, err, c.groups)
		}
		if pids, err := c.g.members(); !slices.Equal(pids, c.members) || err != nil {
			t.Errorf("%s: processes %v, %v, want %v", c.name, pids, err, c.members)
		}
		if m, err := c.g.charged(); m != c.charged || err != nil {
			t.Errorf("%s: %v bytes, %v, want %v", c.name, m, err, c.charged)
		}
		if d, err := c.g.cpuTime(); d != c.cpu || err != nil {
			t.Errorf("%s: %v, %v, want %v", c.name, d, err, c.cpu)
		}
	}
	none := guestGroups{memory: filepath.Join(dir, "none"), cpu: filepath.Join(dir, "none"), daemonMark: "no process has this in its command line"}
	if c, err := none.cost(); c != (cost{}) || err != nil {
		t.Errorf("without guests and server: %+v, %v", c, err)
	}
}

func TestParts(t *testing.T) {
	var p parts
	for name, bytes := range map[string]float64{"runsc-sandbox\x00--x": 1, "runsc-gofer\x00--x": 2, "": 4} {
		p.add(name, bytes)
	}
	if p != (parts{sentry: 1, gofer: 2, stubs: 4}) || p.sum() != 7 {
		t.Errorf("got %+v, in all %v", p, p.sum())
	}
}

// TestOwnProcess holds the readers of /proc against this process.
func TestOwnProcess(t *testing.T) {
	if pss := pssOf(os.Getpid()); pss < 1e6 {
		t.Errorf("a Go program with %v bytes", pss)
	}
	if pss := pssOf(-1); pss != 0 {
		t.Errorf("no process with %v bytes", pss)
	}
	before, err := processTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; {
		now, err := processTime(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if now > before {
			break
		}
		if time.Now().After(end) {
			t.Fatal("10 s of work do not show")
		}
	}
}

func TestParseProcessTime(t *testing.T) {
	rest := " S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 9\n"
	for _, name := range []string{"(cay)", "(a) b)", "(x y)"} {
		if d, err := parseProcessTime("7 " + name + rest); d != 2*time.Second || err != nil {
			t.Errorf("%s: %v, %v, want 2 s", name, d, err)
		}
	}
	for _, bad := range []string{"", "7 (x", "7 (x) S 1", "7 (x) S 1 2 3 4 5 6 7 8 9 10 a b 0"} {
		if _, err := parseProcessTime(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

// A thread shares the memory of its process, as a process may with another one.
func TestAddressSpaces(t *testing.T) {
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Skip(err)
	}
	defer func() { _ = child.Process.Kill(); _ = child.Wait() }()
	thread, done := make(chan int), make(chan struct{})
	defer close(done)
	go func() {
		runtime.LockOSThread()
		thread <- unix.Gettid()
		<-done
	}()
	us, shared, other := os.Getpid(), <-thread, child.Process.Pid
	if _, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(us), uintptr(shared), 1, 0, 0, 0); errno != 0 {
		t.Skipf("this kernel does not compare: %v", errno)
	}
	if got := addressSpaces([]int{us, shared, other, us}); !slices.Equal(got, []int{us, other}) {
		t.Errorf("of %d, its thread %d and its child %d, %v are counted", us, shared, other, got)
	}
}
