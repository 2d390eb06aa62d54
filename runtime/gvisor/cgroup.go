package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/runtime"
)

// cgroupRoot is where the kernel's cgroups are, by convention of every
// distribution.
const cgroupRoot = "/sys/fs/cgroup"

// unified reports whether the machine has cgroup v2 only, as gVisor decides it.
var unified = sync.OnceValue(func() bool {
	var st unix.Statfs_t
	return unix.Statfs(cgroupRoot, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
})

// swapLimitable reports whether swap can be limited here.
var swapLimitable = sync.OnceValue(func() bool {
	if unified() {
		return true
	}
	_, err := os.Stat(filepath.Join(cgroupRoot, "memory", "memory.memsw.limit_in_bytes"))
	return err == nil
})

// hierarchies are the directories a cgroup path is below: one in v2, one for
// each controller in v1.
func hierarchies() []string {
	if unified() {
		return []string{cgroupRoot}
	}
	ents, err := os.ReadDir(cgroupRoot)
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range ents {
		// cpu and cpuacct may be links to one directory; unified is v2 beside v1.
		if e.IsDir() && e.Name() != "unified" {
			out = append(out, filepath.Join(cgroupRoot, e.Name()))
		}
	}
	return out
}

// cgroup is the cgroup of one instance.
type cgroup string

func (g cgroup) dir(controller string) string {
	if unified() {
		return filepath.Join(cgroupRoot, string(g))
	}
	return filepath.Join(cgroupRoot, controller, string(g))
}

func (g cgroup) number(controller, file string) int64 {
	data, err := os.ReadFile(filepath.Join(g.dir(controller), file))
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	return n
}

// fields reads a file of lines "name number".
func (g cgroup) fields(controller, file string) map[string]int64 {
	data, err := os.ReadFile(filepath.Join(g.dir(controller), file))
	if err != nil {
		return nil
	}
	return parseFields(string(data))
}

func parseFields(s string) map[string]int64 {
	m := map[string]int64{}
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) != 2 {
			continue
		}
		if n, err := strconv.ParseInt(f[1], 10, 64); err == nil {
			m[f[0]] = n
		}
	}
	return m
}

// oomKills is how many processes the kernel ended because the instance was at
// its memory limit.
func (g cgroup) oomKills() int64 {
	if unified() {
		return g.fields("", "memory.events")["oom_kill"]
	}
	return g.fields("memory", "memory.oom_control")["oom_kill"]
}

// pidsRefused is how many forks failed because of the limit on host tasks.
func (g cgroup) pidsRefused() int64 { return g.fields("pids", "pids.events")["max"] }

// stats reads the figures of the instance.
func (g cgroup) stats() runtime.Stats {
	var s runtime.Stats
	if unified() {
		s.CPUNanos = g.fields("", "cpu.stat")["usage_usec"] * 1000
		s.MemoryBytes = g.number("", "memory.current")
	} else {
		s.CPUNanos = g.number("cpuacct", "cpuacct.usage")
		s.MemoryBytes = g.number("memory", "memory.usage_in_bytes")
	}
	// Guest memory is a file in memory, which the kernel counts as shmem and
	// not among these two: what remains here is page cache of the disk.
	m := g.fields("memory", "memory.stat")
	prefix := "total_"
	if unified() {
		prefix = ""
	}
	s.MemoryCached = m[prefix+"inactive_file"] + m[prefix+"active_file"]
	s.MemoryBytes = max(0, s.MemoryBytes-s.MemoryCached)
	s.PIDs = int(g.number("pids", "pids.current"))
	return s
}

// make makes the cgroup, and its parents, in every hierarchy. It is for v1.
func (g cgroup) make() error {
	for _, h := range hierarchies() {
		dir := filepath.Join(h, string(g))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("making cgroup %s: %w", g, err)
		}
		if filepath.Base(h) != "cpuset" {
			continue
		}
		// A new cpuset is empty, and takes no process then.
		for d := filepath.Join(h, filepath.Dir(string(g))); ; d = dir {
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
				if err := inherit(d, f); err != nil {
					return fmt.Errorf("making cgroup %s: %w", g, err)
				}
			}
			if d == dir {
				break
			}
		}
	}
	return nil
}

// inherit fills an empty file of a cgroup with what its parent has there.
func inherit(dir, file string) error {
	have, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil || strings.TrimSpace(string(have)) != "" {
		return err
	}
	parents, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
	if err != nil {
		return err
	}
	return put(filepath.Join(dir, file), parents)
}

// put writes to a file of a cgroup. It makes none: what looks like a hierarchy
// may be none.
func put(path string, value []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(value)
	return errors.Join(err, f.Close())
}

// join moves a process into the cgroup, in every hierarchy. The first move waits
// until no processor of the machine is in the middle of a fork or an exit:
// milliseconds.
func (g cgroup) join(pid int) error {
	for _, h := range hierarchies() {
		if err := put(filepath.Join(h, string(g), "cgroup.procs"), strconv.AppendInt(nil, int64(pid), 10)); err != nil {
			return fmt.Errorf("moving process %d into cgroup %s: %w", pid, g, err)
		}
	}
	return nil
}

// rename gives the cgroup another name beside its own, which only v1 can.
func (g cgroup) rename(to cgroup) error {
	for _, h := range hierarchies() {
		if err := os.Rename(filepath.Join(h, string(g)), filepath.Join(h, string(to))); err != nil {
			return fmt.Errorf("renaming cgroup %s: %w", g, err)
		}
	}
	return nil
}

// limit sets the limits of an instance.
func (g cgroup) limit(r *specs.LinuxResources) error {
	type value struct {
		controller, file string
		n                int64
	}
	values := []value{
		{"cpu", "cpu.cfs_period_us", int64(*r.CPU.Period)}, {"cpu", "cpu.cfs_quota_us", *r.CPU.Quota},
		{"memory", "memory.limit_in_bytes", *r.Memory.Limit},
	}
	if r.Memory.Swap != nil {
		values = append(values, value{"memory", "memory.memsw.limit_in_bytes", *r.Memory.Swap})
	}
	for _, v := range append(values, value{"pids", "pids.max", r.Pids.Limit}) {
		if err := put(filepath.Join(g.dir(v.controller), v.file), strconv.AppendInt(nil, v.n, 10)); err != nil {
			return fmt.Errorf("limiting cgroup %s: %w", g, err)
		}
	}
	return nil
}

// members returns the processes in the cgroup, and in the cgroups below it.
func (g cgroup) members() []int {
	var pids []int
	seen := map[int]bool{}
	for _, controller := range []string{"pids", "memory", "cpu"} {
		_ = filepath.WalkDir(g.dir(controller), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil //nolint:nilerr // it may go away while we look
			}
			data, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			for line := range strings.Lines(string(data)) {
				if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && pid > 0 && !seen[pid] {
					seen[pid] = true
					pids = append(pids, pid)
				}
			}
			return nil
		})
		if unified() {
			break
		}
	}
	return pids
}

// killAll ends every process in the cgroup and returns when none is left.
func (g cgroup) killAll(ctx context.Context) error {
	for {
		pids := g.members()
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			p, err := openProcess(processID{PID: pid})
			if err != nil {
				continue
			}
			_ = p.kill()
			_ = p.file.SetReadDeadline(time.Now().Add(time.Second))
			_ = p.wait()
			p.close()
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("waiting for processes %v of cgroup %s: %w", g.members(), g, err)
		}
	}
}

// remove removes the cgroup from every hierarchy.
func (g cgroup) remove(ctx context.Context) error {
	var errs []error
	for _, h := range hierarchies() {
		if err := removeTree(ctx, filepath.Join(h, string(g))); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removeTree removes a cgroup directory and those below it. A cgroup whose last
// process has just ended is busy for a moment.
func removeTree(ctx context.Context, dir string) error {
	for wait := time.Millisecond; ; wait *= 2 {
		err := unix.Rmdir(dir)
		switch {
		case err == nil || errors.Is(err, unix.ENOENT):
			return nil
		case !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY):
			return fmt.Errorf("removing cgroup %s: %w", dir, err)
		}
		ents, _ := os.ReadDir(dir)
		for _, e := range ents {
			if e.IsDir() {
				if err := removeTree(ctx, filepath.Join(dir, e.Name())); err != nil {
					return err
				}
			}
		}
		select {
		case <-time.After(min(wait, 50*time.Millisecond)):
		case <-ctx.Done():
			return fmt.Errorf("removing cgroup %s: %w", dir, err)
		}
	}
}

// pidMax is the number of tasks the machine can hold.
var pidMax = sync.OnceValue(func() int64 {
	data, err := os.ReadFile("/proc/sys/kernel/pid_max")
	if err != nil {
		return 32768 // the kernel's least default
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return 32768
	}
	return n
})

// hostPIDs is the limit on host tasks of an instance whose guest may have n
// processes and threads.
//
// The engine dies when it cannot fork, so this limit protects the machine and
// is not the guest's: that one is kept inside, by PID 1. Measured: 20 tasks for
// an idle guest, 3.0 for each further process of a Go program (with 5 threads),
// 0.7 for one of a single-threaded sleeper. No guest may have more than a
// quarter of the machine's.
func hostPIDs(n int, machine int64) int64 { return min(int64(3*n+256), machine/4) }
