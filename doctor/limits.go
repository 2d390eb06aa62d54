package doctor

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

var limitChecks = []check{
	{id: "host.memory", title: "memory", run: checkMemory},
	{id: "host.overcommit", title: "address space", run: checkOvercommit},
	{id: "host.maps", title: "memory maps", run: checkMaps},
	{id: "host.files", title: "open files", run: checkOpenFiles},
	{id: "host.pids", title: "processes", run: checkPIDs},
}

const (
	mib = 1 << 20
	gib = 1 << 30
	// engineMemory is what an idle sandbox takes of the host, all in all; the
	// benchmark keeps it.
	engineMemory = 16 * mib
	// leastMemory is the smallest sandbox and the server.
	leastMemory = 256 * mib
)

func checkMemory(_ context.Context, d *Doctor) Finding {
	text, err := d.read("proc/meminfo")
	if err != nil {
		return skip("/proc/meminfo cannot be read: %v", err)
	}
	total, known := kilobytes(text, "MemTotal")
	available, known2 := kilobytes(text, "MemAvailable")
	if !known || !known2 {
		return skip("/proc/meminfo has no MemTotal or MemAvailable")
	}
	one := int64(d.MemoryMB) * mib
	if one <= 0 {
		one = gib
	}
	full := max(0, available-leastMemory) / one
	evidence := fmt.Sprintf("%s of %s available: room for %d sandboxes that use all of their %d MiB, and for about %d idle ones",
		size(available), size(total), full, one/mib, max(0, available-leastMemory)/engineMemory)
	switch {
	case available < leastMemory:
		return fail(evidence, "free memory, or use a larger machine; Cay needs at least 256 MiB")
	case full == 0:
		return warn(evidence, "free memory, or make sandboxes smaller with --memory-mb")
	}
	return ok("%s", evidence)
}

func kilobytes(meminfo, name string) (int64, bool) {
	v, found := field(meminfo, name)
	if !found {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSuffix(v, " kB"), 10, 64)
	return n << 10, err == nil
}

func checkOvercommit(_ context.Context, d *Doctor) Finding {
	mode, known := d.number("proc/sys/vm/overcommit_memory")
	if !known {
		return skip("vm.overcommit_memory cannot be read")
	}
	if mode == 2 {
		return fail("the kernel counts address space (vm.overcommit_memory = 2); the engine reserves much more of it than it uses",
			"`sysctl -w vm.overcommit_memory=0`, and the same in /etc/sysctl.d to keep it")
	}
	status, err := d.read("proc/self/limits")
	if err == nil {
		if hard, limited := hardLimit(status, "Max address space"); limited {
			return fail(fmt.Sprintf("a process may have %s of address space (ulimit -v); the engine reserves much more than it uses", size(hard)),
				"lift it: `ulimit -v unlimited`; in a systemd unit LimitAS=infinity")
		}
	}
	return ok("not limited (vm.overcommit_memory = %d)", mode)
}

// The kernel's default. An engine process with many threads and mapped files
// comes near it.
const defaultMaps = 65530

func checkMaps(_ context.Context, d *Doctor) Finding {
	n, known := d.number("proc/sys/vm/max_map_count")
	if !known {
		return skip("vm.max_map_count cannot be read")
	}
	if n < defaultMaps {
		return warn(fmt.Sprintf("a process may have %d memory maps; guests with many threads need more", n),
			"`sysctl -w vm.max_map_count=262144`, and the same in /etc/sysctl.d to keep it")
	}
	return ok("%d for a process", n)
}

const (
	enoughFiles = 8192
	leastFiles  = 1024
)

func checkOpenFiles(_ context.Context, d *Doctor) Finding {
	text, err := d.read("proc/self/limits")
	if err != nil {
		return skip("/proc/self/limits cannot be read: %v", err)
	}
	hard, limited := hardLimit(text, "Max open files")
	all, _ := d.number("proc/sys/fs/file-max")
	repair := "raise it: `ulimit -Hn 1048576` before `cay up`; in a systemd unit LimitNOFILE=1048576"
	switch {
	case limited && hard < leastFiles:
		return fail(fmt.Sprintf("a process may open %d files; each connection to a sandbox takes two", hard), repair)
	case limited && hard < enoughFiles:
		return warn(fmt.Sprintf("a process may open %d files; each connection to a sandbox takes two", hard), repair)
	case all > 0 && all < enoughFiles*4:
		return warn(fmt.Sprintf("the machine may have %d open files in all", all), "`sysctl -w fs.file-max=1048576`, and the same in /etc/sysctl.d to keep it")
	case !limited:
		return ok("not limited")
	}
	return ok("%d for a process", hard)
}

const (
	enoughPIDs = 8192
	leastPIDs  = 512
)

// checkPIDs finds the smallest of the limits on processes and threads. A
// sandbox takes some thirty on the host, and the guest's own.
func checkPIDs(_ context.Context, d *Doctor) Finding {
	lowest, name, repair := int64(1)<<40, "", ""
	consider := func(n int64, what, fix string) {
		if n > 0 && n < lowest {
			lowest, name, repair = n, what, fix
		}
	}
	if n, known := d.number("proc/sys/kernel/pid_max"); known {
		consider(n, "kernel.pid_max", "`sysctl -w kernel.pid_max=4194304`, and the same in /etc/sysctl.d to keep it")
	}
	if n, known := d.number("proc/sys/kernel/threads-max"); known {
		consider(n, "kernel.threads-max", "`sysctl -w kernel.threads-max=1000000`, and the same in /etc/sysctl.d to keep it")
	}
	if text, err := d.read("proc/self/limits"); err == nil {
		if n, limited := hardLimit(text, "Max processes"); limited {
			consider(n, "ulimit -u", "`ulimit -u unlimited` before `cay up`; in a systemd unit LimitNPROC=infinity")
		}
	}
	for _, dir := range d.ownCgroups("pids") {
		if n, known := d.number(dir + "/pids.max"); known {
			consider(n, "the cgroup's pids.max", "raise it; in a systemd unit TasksMax=infinity")
		}
	}
	if name == "" {
		return skip("no limit can be read")
	}
	evidence := fmt.Sprintf("at most %d, by %s", lowest, name)
	switch {
	case lowest < leastPIDs:
		return fail(evidence+": not enough for one sandbox and the server", repair)
	case lowest < enoughPIDs:
		return warn(fmt.Sprintf("%s: enough for about %d small sandboxes", evidence, lowest/100), repair)
	}
	return ok("%s", evidence)
}

// ownCgroups returns the directories of this process's cgroup for a
// controller, and of those above it.
func (d *Doctor) ownCgroups(controller string) []string {
	text, err := d.read("proc/self/cgroup")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(text) {
		// "8:pids:/path", or "0::/path" in v2 (cgroups(7)).
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		at := "sys/fs/cgroup"
		switch f[1] {
		case controller:
			at += "/" + controller
		case "":
		default:
			continue
		}
		var dirs []string
		for path := f[2]; ; path = parent(path) {
			dirs = append(dirs, strings.TrimRight(at+path, "/"))
			if path == "/" || path == "" {
				break
			}
		}
		if _, err := d.read(dirs[0] + "/pids.max"); err == nil || f[1] == controller {
			return dirs
		}
	}
	return nil
}

// hardLimit reads one line of proc_pid_limits(5); limited is false for
// "unlimited" and for a line that is not there.
func hardLimit(text, name string) (n int64, limited bool) {
	for line := range strings.Lines(text) {
		rest, found := strings.CutPrefix(line, name)
		if !found {
			continue
		}
		f := strings.Fields(rest) // soft, hard, unit
		if len(f) < 2 || f[1] == "unlimited" {
			return 0, false
		}
		n, err := strconv.ParseInt(f[1], 10, 64)
		return n, err == nil
	}
	return 0, false
}

// size is a number of bytes for people.
func size(n int64) string {
	switch {
	case n >= 10*gib:
		return fmt.Sprintf("%d GiB", n/gib)
	case n >= gib:
		return fmt.Sprintf("%.1f GiB", float64(n)/gib)
	case n >= mib:
		return fmt.Sprintf("%d MiB", n/mib)
	}
	return fmt.Sprintf("%d KiB", n>>10)
}
