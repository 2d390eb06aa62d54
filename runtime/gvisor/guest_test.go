package gvisor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// open returns an open runtime on a new machine.
func open(t testing.TB) (*machine, *Runtime) {
	t.Helper()
	m := newMachine(t)
	return m, m.open(t)
}

func (m *machine) open(t testing.TB) *Runtime {
	t.Helper()
	r := m.runtime()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.Open(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// begin starts a guest and returns the engine's PID.
func begin(t testing.TB, r *Runtime, s runtime.Spec) int {
	t.Helper()
	if err := r.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	return one(t, r, s.ID).PID
}

func one(t testing.TB, r *Runtime, id runtime.InstanceID) runtime.Instance {
	t.Helper()
	all, err := r.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		if i.ID == id {
			return i
		}
	}
	t.Fatalf("instance %s is not listed", id)
	return runtime.Instance{}
}

// until polls a condition for at most a minute.
func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	end := time.Now().Add(time.Minute)
	for tick := time.NewTicker(5 * time.Millisecond); !f(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("waiting until %s", what)
		}
	}
}

// says waits for a console line that begins with text and returns it and all.
func says(t testing.TB, r *Runtime, id runtime.InstanceID, text string) (string, []string) {
	t.Helper()
	var found string
	var all []string
	until(t, fmt.Sprintf("the console says %q", text), func() bool {
		lines, err := r.Console(context.Background(), id)
		if err != nil {
			t.Fatal(err)
		}
		all = nil
		for _, l := range lines {
			all = append(all, l.Text)
			if strings.HasPrefix(l.Text, text) && found == "" {
				found = l.Text
			}
		}
		return found != ""
	})
	return found, all
}

func status(t testing.TB, pid int) map[string]string {
	t.Helper()
	return statusAt(t, fmt.Sprintf("/proc/%d/status", pid))
}

func statusAt(t testing.TB, path string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for line := range strings.Lines(string(data)) {
		k, v, _ := strings.Cut(line, ":")
		m[k] = strings.Join(strings.Fields(v), " ")
	}
	return m
}

// TestConfinement is S-2 of the reliability plan: what the engine's processes
// may do, read from the kernel.
func TestConfinement(t *testing.T) {
	m, r := open(t)
	s := m.spec(t, "print", "up")
	pid := begin(t, r, s)
	says(t, r, s.ID, "up")
	confined(t, r, s, pid)
}

// confined checks the processes of an instance that runs.
func confined(t *testing.T, r *Runtime, s runtime.Spec, pid int) {
	t.Helper()
	g := cgroup(home(r.Dir).instance(s.ID).cgroup)
	members := g.members()
	if !slices.Contains(members, pid) {
		t.Errorf("the sentry %d is not in its cgroup %v", pid, members)
	}
	gofers := 0
	for _, p := range members {
		st := status(t, p)
		args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p))
		name, _, _ := strings.Cut(string(args), "\x00")
		want := map[string]string{"NoNewPrivs": "1", "Seccomp": "2", "Uid": "65534 65534 65534 65534", "Gid": "65534 65534 65534 65534",
			"CapEff": "0000000000000000", "CapPrm": "0000000000000000", "CapBnd": "0000000000000000", "CapAmb": "0000000000000000", "CapInh": "0000000000000000"}
		if name == "runsc-gofer" {
			gofers++
			// It opens the guest's files whoever owns them, so it stays root,
			// in a chroot, with rights over files only: chown, dac_override,
			// dac_read_search, fowner, fsetid.
			const files = "000000000000001f"
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p)); err != nil || !strings.HasPrefix(filepath.Base(exe), goferPrefix) {
				t.Errorf("the file server is %s, %v", exe, err)
			}
			root, err := os.Stat(fmt.Sprintf("/proc/%d/root/.", p))
			if want, werr := os.Stat(s.RootFS); err != nil || werr != nil || !os.SameFile(root, want) {
				t.Errorf("the file server's root is not the guest's: %v, %v", err, werr)
			}
			if cwd, err := os.Stat(fmt.Sprintf("/proc/%d/cwd/.", p)); err != nil || !os.SameFile(root, cwd) {
				t.Errorf("the file server is not in its root: %v", err)
			}
			if mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", p)); err != nil || strings.Count(string(mounts), "\n") > 1 {
				t.Errorf("the file server still sees mounts: %s, %v", mounts, err)
			}
			want = map[string]string{"NoNewPrivs": "1", "Seccomp": "2", "CapEff": files, "CapPrm": files, "CapBnd": files}
		}
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p)) // credentials are a thread's
		for _, task := range tasks {
			st := statusAt(t, task)
			for k, v := range want {
				if st[k] != v {
					t.Errorf("%s, %s: %s is %q; want %q", name, task, k, st[k], v)
				}
			}
		}
		t.Logf("%s (%d): Uid %s CapEff %s Seccomp %s NoNewPrivs %s", name, p, st["Uid"], st["CapEff"], st["Seccomp"], st["NoNewPrivs"])
		namespaces := []string{"mnt", "pid", "ipc", "uts", "net"}
		if name != "runsc-gofer" {
			namespaces = append(namespaces, "user")
		}
		for _, ns := range namespaces {
			theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", p, ns))
			ours, _ := os.Readlink("/proc/self/ns/" + ns)
			if err != nil || theirs == ours {
				t.Errorf("%s (%d) has the host's %s namespace %s, %v", name, p, ns, theirs, err)
			}
		}
		if score, _ := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", p)); strings.TrimSpace(string(score)) != strconv.Itoa(guestOOMScore) {
			t.Errorf("%s (%d) has oom_score_adj %s; want %d", name, p, score, guestOOMScore)
		}
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p))
		for _, fd := range fds {
			if target, _ := os.Readlink(fd); strings.Contains(target, "supervisor") || strings.HasSuffix(target, "instance.json") || (name == "runsc-gofer" && strings.HasPrefix(target, home(r.Dir).instances())) {
				t.Errorf("%s (%d) holds %s", name, p, target)
			}
		}
	}
	if gofers != 1 || len(members) < 3 {
		t.Errorf("the cgroup holds %d processes, %d of them gofers", len(members), gofers)
	}
	for _, f := range []string{"instance.json", "config.json", ""} {
		fi, err := os.Stat(filepath.Join(home(r.Dir).instance(s.ID).dir, f))
		if err != nil || fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%q of the instance may be read by others: %v, %v", f, fi.Mode(), err)
		}
	}
}

// TestGuestSees is what the guest finds.
func TestGuestSees(t *testing.T) {
	m, r := open(t)
	s := m.spec(t, "look")
	begin(t, r, s)
	_, lines := says(t, r, s.ID, "look done")
	for _, want := range []string{
		"hostname box", "uid 0", "env CAY_TEST=1,HOME=/,PATH=/bin",
		"meminfo MemTotal:         524288 kB",
		"link eth0 [169.254.0.21/30",
		"mount none /sys/fs/cgroup cgroup2", "mount none /dev/pts devpts", "mount none /proc proc",
		"statfs /dev/shm type=1021994 size=268435456",
		"statfs /tmp type=1021997", // 9p: the disk, not memory
	} {
		if !slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, want) }) {
			t.Errorf("the guest does not see %q in\n%s", want, strings.Join(lines, "\n"))
		}
	}
}

func TestTmpStaysOnDisk(t *testing.T) {
	for name, prepare := range map[string]func(root string) error{
		"no /tmp":    func(string) error { return nil },
		"empty":      func(root string) error { return os.Mkdir(filepath.Join(root, "tmp"), 0o700) },
		"full":       func(root string) error { return os.MkdirAll(filepath.Join(root, "tmp/a"), 0o700) },
		"link out":   func(root string) error { return os.Symlink("/etc", filepath.Join(root, "tmp")) },
		"link up":    func(root string) error { return os.Symlink("../..", filepath.Join(root, "tmp")) },
		"link there": func(root string) error { return os.Symlink("var", filepath.Join(root, "tmp")) },
		"a file":     func(root string) error { return os.WriteFile(filepath.Join(root, "tmp"), nil, 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			outer := t.TempDir()
			root := filepath.Join(outer, "a", "root")
			if err := os.MkdirAll(filepath.Join(root, "var"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := prepare(root); err != nil {
				t.Fatal(err)
			}
			err := keepTmpOnDisk(root)
			for _, p := range []string{"/etc/.X11-unix", filepath.Join(outer, ".X11-unix")} {
				if _, err := os.Lstat(p); err == nil {
					t.Errorf("%s was made outside of the root directory", p)
				}
			}
			switch name {
			case "no /tmp", "empty":
				fi, serr := os.Stat(filepath.Join(root, tmpMarker))
				if err != nil || serr != nil || fi.Mode() != os.ModeDir|os.ModeSticky|0o777 {
					t.Errorf("%v, %v, %v", err, serr, fi)
				}
			case "link out", "link up", "full", "link there":
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestEngineUsesCompiledFilters looks into the engine's own log.
func TestEngineUsesCompiledFilters(t *testing.T) {
	if len(seccompData) == 0 {
		t.Skip("no filters are committed for this architecture")
	}
	debug := t.TempDir()
	t.Setenv("CAY_TEST_DEBUG", debug)
	m, r := open(t)
	s := m.spec(t, "print", "up")
	begin(t, r, s)
	says(t, r, s.ID, "up")
	for _, who := range []string{"boot", "gofer"} {
		logs, _ := filepath.Glob(filepath.Join(debug, "*"+who+"*"))
		var all string
		for _, l := range logs {
			data, _ := os.ReadFile(l)
			all += string(data)
		}
		if !strings.Contains(all, "Loaded precompiled seccomp instructions") || strings.Contains(all, "building seccomp program from scratch") {
			t.Errorf("the %s compiled its filters; logs: %v", who, logs)
		}
		if who == "boot" && !strings.Contains(all, EngineVersion) {
			t.Error("the sentry does not know its version")
		}
	}
}

// TestPID1Missing is the failure of a root directory that is not what it should
// be.
func TestPID1Missing(t *testing.T) {
	m, r := open(t)
	s := m.spec(t)
	s.Args = []string{"/no/such/program"}
	if err := r.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	err := r.Start(t.Context(), s.ID)
	if cay.CodeOf(err) != cay.CodeInitFailed {
		t.Errorf("starting a program that is not there: %v", err)
	}
	if err := r.Kill(t.Context(), s.ID); err != nil {
		t.Error(err)
	}
	if left := m.leftovers(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestEngineDies is a sentry, and a gofer, that end for no reason of the guest.
func TestEngineDies(t *testing.T) {
	m, r := open(t)
	for _, victim := range []string{"sentry", "gofer"} {
		s := m.spec(t, "run")
		begin(t, r, s)
		rec, err := loadRecord(home(r.Dir).instance(s.ID).record)
		if err != nil {
			t.Fatal(err)
		}
		pid := rec.Sentry.PID
		if victim == "gofer" {
			pid = rec.Gofer.PID
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		e, err := r.Wait(t.Context(), s.ID)
		if err != nil || e.Reason != cay.EndEngineCrash || e.Message == "" {
			t.Errorf("after the death of the %s: %+v, %v", victim, e, err)
		}
		if err := r.Kill(t.Context(), s.ID); err != nil {
			t.Error(err)
		}
	}
	if left := m.leftovers(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
