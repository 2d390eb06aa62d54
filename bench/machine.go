package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/runtime/gvisor"
)

// Machine is what a run was measured on.
type Machine struct {
	CPU      string `json:"cpu"`
	Cores    int    `json:"cores"`
	MemoryMB int    `json:"memoryMB"`
	Kernel   string `json:"kernel"`
	OS       string `json:"os"`
	Arch     string `json:"arch"`
	Virtual  bool   `json:"virtual"` // a virtual machine, by the processor's word
}

// Load is how busy the machine was with other work.
type Load struct {
	// Average is the kernel's load average of the last minute: tasks that run
	// or wait.
	Average float64 `json:"average"`
	// BusyPercent and StealPercent are of all processors' time over a second
	// before the run began: by this machine, and taken by its host.
	BusyPercent  float64 `json:"busyPercent"`
	StealPercent float64 `json:"stealPercent"`
}

// Versions name what was measured.
type Versions struct {
	Cay    string `json:"cay"`
	Engine string `json:"engine"`
	SDK    string `json:"sdk"`
	Node   string `json:"node"`
	Go     string `json:"go"`
}

func describeMachine() (Machine, error) {
	m := Machine{Cores: runtime.NumCPU(), Arch: runtime.GOARCH}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	m.CPU, m.Virtual = parseCPU(string(info))
	mem, err := memory()
	if err != nil {
		return m, err
	}
	m.MemoryMB = int(mem["MemTotal"] / 1e6)
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, os.NewSyscallError("uname", err)
	}
	m.Kernel = unix.ByteSliceToString(u.Release[:])
	if b, err := os.ReadFile("/etc/os-release"); err == nil {
		for line := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
				m.OS = strings.Trim(strings.TrimSpace(v), `"`)
			}
		}
	}
	return m, nil
}

// parseCPU finds the model of the first processor, and whether a hypervisor is
// below it.
func parseCPU(info string) (model string, virtual bool) {
	for line := range strings.Lines(info) {
		k, v, _ := strings.Cut(line, ":")
		switch v = strings.TrimSpace(v); strings.TrimSpace(k) {
		case "model name":
			if model == "" {
				model = v
			}
		case "flags":
			virtual = virtual || strings.Contains(" "+v+" ", " hypervisor ")
		}
	}
	return model, virtual
}

// memory returns /proc/meminfo, in bytes.
func memory() (map[string]float64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	return parseKiB(string(b)), nil
}

// parseKiB reads lines such as "MemTotal:  24684036 kB", in bytes.
func parseKiB(text string) map[string]float64 {
	out := map[string]float64{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 3 && f[2] == "kB" {
			if n, err := strconv.ParseFloat(f[1], 64); err == nil {
				out[strings.TrimSuffix(f[0], ":")] = n * 1024
			}
		}
	}
	return out
}

// times are processor times since boot, of all processors, in ticks.
type times struct{ total, idle, steal float64 }

// parseTimes reads the first line of /proc/stat, see proc(5).
func parseTimes(stat string) (times, error) {
	line, _, _ := strings.Cut(stat, "\n")
	f := strings.Fields(line)
	if len(f) < 9 || f[0] != "cpu" {
		return times{}, fmt.Errorf("/proc/stat begins with %q", line)
	}
	var t times
	for i, s := range f[1:9] { // the rest, guest time, is in these already
		n, err := strconv.ParseFloat(s, 64)
		if err != nil {
			return times{}, fmt.Errorf("reading /proc/stat: %w", err)
		}
		t.total += n
		switch i {
		case 3, 4: // idle, iowait
			t.idle += n
		case 7:
			t.steal += n
		}
	}
	return t, nil
}

func cpuTimes() (times, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return times{}, err
	}
	return parseTimes(string(b))
}

func (t times) since(was times) (busy, steal float64) {
	all := t.total - was.total
	if all <= 0 {
		return 0, 0
	}
	return round(100 * (all - (t.idle - was.idle)) / all), round(100 * (t.steal - was.steal) / all)
}

// loadAverage is that of the last minute.
func loadAverage() (float64, error) {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(b), " ")
	return strconv.ParseFloat(first, 64)
}

// measureLoad takes a second.
func measureLoad() (Load, error) {
	was, err := cpuTimes()
	if err != nil {
		return Load{}, err
	}
	time.Sleep(time.Second)
	now, err := cpuTimes()
	if err != nil {
		return Load{}, err
	}
	l := Load{}
	l.BusyPercent, l.StealPercent = now.since(was)
	l.Average, err = loadAverage()
	return l, err
}

func findVersions(cayBin, sdk string) Versions {
	said := func(name string, args ...string) string {
		out, err := exec.Command(name, args...).Output()
		if err != nil {
			return "unknown"
		}
		return strings.TrimSpace(string(out))
	}
	fields := strings.Fields(said(cayBin, "--version"))
	return Versions{Cay: fields[len(fields)-1], Engine: gvisor.EngineVersion, SDK: sdk,
		Node: strings.TrimPrefix(said("node", "--version"), "v"), Go: strings.TrimPrefix(runtime.Version(), "go")}
}

// findCommit names the source; "-dirty" if what was measured is not a commit.
func findCommit(repo string) string {
	git := func(args ...string) (string, error) {
		out, err := exec.Command("git", append([]string{"-C", repo}, args...)...).Output()
		return strings.TrimSpace(string(out)), err
	}
	commit, err := git("rev-parse", "--short=12", "HEAD")
	if err != nil {
		return "unknown"
	}
	if changed, err := git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"); err != nil || changed != "" {
		commit += "-dirty"
	}
	return commit
}

// findRepo returns the root of the repository.
func findRepo() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("no go.mod above %s: run it in the repository", dir)
		}
	}
}
