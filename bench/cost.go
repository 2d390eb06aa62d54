package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/runtime/gvisor"
)

// cost is what a server and its sandboxes use at one instant.
type cost struct {
	groups  int           // cgroups: one for each guest
	pss     parts         // bytes, of the guests' processes
	server  float64       // bytes, PSS of server and supervisor
	cgroup  float64       // bytes charged to the guests' cgroups, without file cache
	cpu     time.Duration // consumed by the guests
	daemons time.Duration // consumed by server and supervisor
}

// parts are of a guest: the engine's kernel, the engine's file server, and the
// processes that run the guest's own code.
type parts struct{ sentry, gofer, stubs float64 }

func (p parts) sum() float64 { return p.sentry + p.gofer + p.stubs }

// add adds to the part that a process with this name is.
func (p *parts) add(name string, bytes float64) {
	switch {
	case strings.HasPrefix(name, "runsc-gofer"):
		p.gofer += bytes
	case strings.HasPrefix(name, "runsc"):
		p.sentry += bytes
	default: // they have no name
		p.stubs += bytes
	}
}

// guestGroups is where the cgroups of a data directory's guests are.
type guestGroups struct {
	memory, cpu string // directories of the hierarchies
	v2          bool
	daemonMark  string // in the command line of server and supervisor
}

const cgroupRoot = "/sys/fs/cgroup"

func groupsOf(dataDir string) guestGroups {
	_, group := gvisor.HostNames(filepath.Join(dataDir, "run", "gvisor"))
	g := guestGroups{daemonMark: dataDir}
	if _, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers")); err == nil {
		g.v2, g.memory, g.cpu = true, filepath.Join(cgroupRoot, group), filepath.Join(cgroupRoot, group)
		return g
	}
	g.memory, g.cpu = filepath.Join(cgroupRoot, "memory", group), filepath.Join(cgroupRoot, "cpuacct", group)
	return g
}

// count returns how many guests have a cgroup.
func (g guestGroups) count() (int, error) {
	entries, err := os.ReadDir(g.memory)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	n := 0
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), spareGroup) {
			n++
		}
	}
	return n, err
}

// spareGroup begins the names of cgroups that were made ahead, for no guest yet.
const spareGroup = "spare-"

// busy returns the processor time that guests, server and supervisor have
// consumed so far.
func (g guestGroups) busy() (guests, daemons time.Duration, err error) {
	if guests, err = g.cpuTime(); err != nil {
		return 0, 0, err
	}
	pids, err := g.daemons()
	for _, pid := range pids {
		d, e := processTime(pid)
		if e == nil { // one that has ended is at rest
			daemons += d
		}
	}
	return guests, daemons, err
}

// daemons are server and supervisor: processes with the data directory in
// their command line and outside the guests' cgroups.
func (g guestGroups) daemons() ([]int, error) {
	inGuests, err := g.members()
	if err != nil {
		return nil, err
	}
	all, err := processesWith(g.daemonMark)
	return slices.DeleteFunc(all, func(pid int) bool { return slices.Contains(inGuests, pid) }), err
}

// members are the processes in the guests' cgroups.
func (g guestGroups) members() ([]int, error) {
	var out []int
	err := filepath.WalkDir(g.memory, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a guest that has just ended, or no guest yet
		}
		if err == nil && e.IsDir() && strings.HasPrefix(e.Name(), spareGroup) {
			return filepath.SkipDir
		}
		if err != nil || e.Name() != "cgroup.procs" {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil // as above
		}
		for f := range strings.FieldsSeq(string(b)) {
			pid, err := strconv.Atoi(f)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			out = append(out, pid)
		}
		return nil
	})
	return out, err
}

// cpuTime is what the guests have consumed.
func (g guestGroups) cpuTime() (time.Duration, error) {
	name := filepath.Join(g.cpu, "cpuacct.usage")
	if g.v2 {
		name = filepath.Join(g.cpu, "cpu.stat")
	}
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	text, unit := strings.TrimSpace(string(b)), time.Nanosecond
	if g.v2 {
		text, unit = statLine(string(b), "usage_usec"), time.Microsecond
	}
	n, err := strconv.ParseInt(text, 10, 64)
	return time.Duration(n) * unit, err
}

// charged is the memory charged to the guests' cgroups that the kernel cannot
// take back by dropping file cache.
func (g guestGroups) charged() (float64, error) {
	usage := "memory.usage_in_bytes"
	active, inactive := "total_active_file", "total_inactive_file"
	if g.v2 {
		usage, active, inactive = "memory.current", "active_file", "inactive_file"
	}
	b, err := os.ReadFile(filepath.Join(g.memory, usage))
	if err != nil {
		return 0, err
	}
	all, err := strconv.ParseFloat(strings.TrimSpace(string(b)), 64)
	if err != nil {
		return 0, err
	}
	stat, err := os.ReadFile(filepath.Join(g.memory, "memory.stat"))
	if err != nil {
		return 0, err
	}
	for _, key := range []string{active, inactive} {
		n, err := strconv.ParseFloat(statLine(string(stat), key), 64)
		if err != nil {
			return 0, fmt.Errorf("%s of memory.stat: %w", key, err)
		}
		all -= n
	}
	return all, nil
}

// statLine returns the value of a key in a file of "key value" lines.
func statLine(text, key string) string {
	for line := range strings.Lines(text) {
		if k, v, _ := strings.Cut(strings.TrimSpace(line), " "); k == key {
			return v
		}
	}
	return ""
}

// cost measures everything. It takes some milliseconds for each process.
func (g guestGroups) cost() (cost, error) {
	var c cost
	var err error
	if c.groups, err = g.count(); err != nil {
		return c, err
	}
	if c.groups > 0 {
		if c.cgroup, err = g.charged(); err != nil {
			return c, err
		}
	}
	if c.cpu, c.daemons, err = g.busy(); err != nil {
		return c, err
	}
	guests, err := g.members()
	if err != nil {
		return c, err
	}
	daemons, err := g.daemons()
	if err != nil {
		return c, err
	}
	for _, pid := range addressSpaces(guests) {
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // one that has ended has no memory either
		c.pss.add(string(name), pssOf(pid))
	}
	for _, pid := range daemons {
		c.server += pssOf(pid)
	}
	return c, nil
}

// addressSpaces leaves out processes that share the memory of an earlier one:
// the kernel reports all of it for each. gVisor's threads that run guest code
// are such processes. Where the kernel cannot compare, nothing is left out.
func addressSpaces(pids []int) []int {
	const kcmpVM = 1 // of kcmp(2)
	var out []int
	for _, pid := range pids {
		if !slices.ContainsFunc(out, func(other int) bool {
			r, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(other), uintptr(pid), kcmpVM, 0, 0, 0)
			return errno == 0 && r == 0
		}) {
			out = append(out, pid)
		}
	}
	return out
}

// pssOf is a process's memory in bytes, each shared page divided by the number
// of its users; 0 for one that has ended.
func pssOf(pid int) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0
	}
	return parseKiB(string(b))["Pss"]
}

// ticks is USER_HZ, which Linux fixes for user space.
const ticks = 100

// processTime is the processor time of all threads of a process, see proc(5).
func processTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseProcessTime(string(b))
}

func parseProcessTime(stat string) (time.Duration, error) {
	// The name may hold anything; the last parenthesis ends it.
	rest := stat[strings.LastIndex(stat, ")")+1:]
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0, fmt.Errorf("malformed: %q", stat)
	}
	var sum int64
	for _, s := range f[11:13] { // utime, stime: fields 14 and 15
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return time.Duration(sum) * time.Second / ticks, nil
}

// removeCgroups removes a group, and those below it, from every hierarchy. One
// that is still in use stays.
func removeCgroups(group string) {
	tops, _ := filepath.Glob(cgroupRoot + "/*" + group) // the pattern is well-formed
	for _, top := range append(tops, cgroupRoot+group) {
		var dirs []string
		_ = filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for _, d := range slices.Backward(dirs) { // children first
			_ = unix.Rmdir(d)
		}
	}
}
