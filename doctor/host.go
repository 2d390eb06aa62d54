package doctor

import (
	"context"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
)

var hostChecks = []check{
	{id: "host.privilege", title: "privilege", run: checkPrivilege},
	{id: "host.kernel", title: "kernel", run: checkKernel},
	{id: "host.cgroup", title: "cgroups", run: checkCgroup},
	{id: "host.userns", title: "user namespaces", run: checkUserNamespaces},
	{id: "host.seccomp", title: "system call filters", run: checkSeccomp},
	{id: "host.ptrace", title: "process tracing", run: checkPtrace},
	{id: "host.pagesize", title: "page size", run: checkPageSize},
	{id: "host.clock", title: "clock", run: checkClock},
}

func checkPrivilege(_ context.Context, d *Doctor) Finding {
	status, err := d.read("proc/self/status")
	if err != nil {
		return skip("/proc/self/status cannot be read: %v", err)
	}
	uids, _ := field(status, "Uid")
	effective := "unknown"
	if f := strings.Fields(uids); len(f) > 1 {
		effective = f[1]
	}
	if effective != "0" {
		return fail(fmt.Sprintf("running as user %s; Cay makes namespaces, mounts and cgroups", effective),
			"run it as root, for example `sudo cay doctor`; without it some checks are skipped")
	}
	var missing []string
	for _, c := range []struct {
		number int
		name   string
	}{{capNetAdmin, "CAP_NET_ADMIN"}, {capSysPtrace, "CAP_SYS_PTRACE"}, {capSysAdmin, "CAP_SYS_ADMIN"}} {
		if !d.capable(c.number) {
			missing = append(missing, c.name)
		}
	}
	if missing != nil {
		return fail("root without "+strings.Join(missing, ", "),
			"in a container, give it these capabilities (docker run --privileged); in a systemd unit, remove CapabilityBoundingSet")
	}
	return ok("root, with the capabilities that are needed")
}

// The oldest kernel that has what Cay uses: overlay's "volatile" (5.10) is the
// youngest of statx mount roots (5.8), pidfds (5.3) and fsopen (5.2).
const kernelMajor, kernelMinor = 5, 10

func checkKernel(_ context.Context, d *Doctor) Finding {
	release, err := d.read("proc/sys/kernel/osrelease")
	if err != nil {
		return skip("the kernel's version cannot be read: %v", err)
	}
	major, minor, understood := kernelVersion(release)
	switch {
	case !understood:
		return warn(fmt.Sprintf("the version %q is not understood", release), fmt.Sprintf("Cay needs Linux %d.%d or newer", kernelMajor, kernelMinor))
	case major < kernelMajor || (major == kernelMajor && minor < kernelMinor):
		return fail(fmt.Sprintf("Linux %s is too old", release),
			fmt.Sprintf("use Linux %d.%d or newer; Debian 12 has 6.1", kernelMajor, kernelMinor))
	}
	return ok("Linux %s", release)
}

// kernelVersion reads "6.1.0-18-amd64".
func kernelVersion(release string) (major, minor int, ok bool) {
	parts := strings.SplitN(release, ".", 3)
	if len(parts) < 2 {
		return 0, 0, false
	}
	digits := func(s string) (int, error) {
		if i := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
			s = s[:i]
		}
		return strconv.Atoi(s)
	}
	major, err1 := digits(parts[0])
	minor, err2 := digits(parts[1])
	return major, minor, err1 == nil && err2 == nil
}

// controllers are those that hold a sandbox within its limits.
var controllers = []string{"cpu", "memory", "pids"}

func checkCgroup(_ context.Context, d *Doctor) Finding {
	at := "sys/fs/cgroup"
	list, err := d.read(at + "/cgroup.controllers")
	version, have := "v2", strings.Fields(list)
	if err != nil {
		version = "v1"
		entries, err := fs.ReadDir(d.Root, at)
		if err != nil || len(entries) == 0 {
			return fail("no cgroups at /"+at, "mount them: `mount -t cgroup2 none /sys/fs/cgroup`")
		}
		for _, e := range entries {
			// systemd mounts pairs as one directory, "cpu,cpuacct".
			have = append(have, strings.Split(e.Name(), ",")...)
		}
		if v2, err := d.read(at + "/unified/cgroup.controllers"); err == nil {
			version = "hybrid (v1, with v2 beside it)"
			// A controller that v2 has taken is of no use in v1.
			for _, c := range strings.Fields(v2) {
				have = slices.DeleteFunc(have, func(h string) bool { return h == c })
			}
		}
	}
	var missing []string
	for _, c := range controllers {
		if !slices.Contains(have, c) {
			missing = append(missing, c)
		}
	}
	if missing != nil {
		repair := "boot with the kernel parameters cgroup_enable=memory cgroup_memory=1, or without cgroup_disable"
		if version != "v2" {
			repair = "boot with the kernel parameter systemd.unified_cgroup_hierarchy=1, which gives cgroup v2"
		} else if _, err := fs.Stat(d.Root, at+"/cgroup.type"); err == nil {
			// Only a cgroup that is not the root has a type: a container's.
			repair = "this is a container that was not given these controllers: delegate them, or run Cay on the machine itself"
		}
		return fail(fmt.Sprintf("cgroup %s without %s: sandboxes would have no limits", version, strings.Join(missing, ", ")), repair)
	}
	if ms, err := d.mounts(); err == nil {
		if m, found := mountOf(ms, "/"+at); found && slices.Contains(m.options, "ro") {
			return fail("cgroup "+version+", mounted read-only", "in a container, run it privileged with its own cgroup namespace; else `mount -o remount,rw /sys/fs/cgroup`")
		}
	}
	return ok("cgroup %s with %s", version, strings.Join(controllers, ", "))
}

func checkUserNamespaces(_ context.Context, d *Doctor) Finding {
	if _, err := fs.Lstat(d.Root, "proc/self/ns/user"); err != nil {
		return fail("the kernel has no user namespaces", "use a kernel with CONFIG_USER_NS; every distribution's has it")
	}
	n, known := d.number("proc/sys/user/max_user_namespaces")
	if known && n == 0 {
		return fail("user namespaces are switched off (user.max_user_namespaces = 0): the engine takes its own privileges away with one",
			"`sysctl -w user.max_user_namespaces=65536`, and the same in /etc/sysctl.d to keep it")
	}
	if known && n < 1024 {
		return warn(fmt.Sprintf("only %d user namespaces; each sandbox takes one", n),
			"`sysctl -w user.max_user_namespaces=65536`, and the same in /etc/sysctl.d to keep it")
	}
	if !known {
		return ok("available")
	}
	return ok("available, at most %d", n)
}

func checkSeccomp(_ context.Context, d *Doctor) Finding {
	actions, err := d.read("proc/sys/kernel/seccomp/actions_avail")
	if err != nil {
		return fail("the kernel has no seccomp filters", "use a kernel with CONFIG_SECCOMP_FILTER; every distribution's has it")
	}
	// The engine's platform takes a guest's system calls by trap.
	if !slices.Contains(strings.Fields(actions), "trap") {
		return fail("seccomp cannot trap: "+actions, "use Linux 4.14 or newer with CONFIG_SECCOMP_FILTER")
	}
	return ok("seccomp with %s", actions)
}

func checkPtrace(_ context.Context, d *Doctor) Finding {
	scope, known := d.number("proc/sys/kernel/yama/ptrace_scope")
	if known && scope >= 3 {
		return fail("tracing is switched off for everybody (kernel.yama.ptrace_scope = 3): the engine starts its guests' threads by it",
			"set kernel.yama.ptrace_scope to 2 or less in /etc/sysctl.d and restart the machine; 3 cannot be undone while it runs")
	}
	if !known {
		return ok("not restricted")
	}
	return ok("allowed (kernel.yama.ptrace_scope = %d)", scope)
}

func checkPageSize(_ context.Context, d *Doctor) Finding {
	switch d.PageSize {
	case 0:
		return skip("unknown")
	case 4096:
		return ok("4 KiB")
	}
	return fail(fmt.Sprintf("%d bytes; templates and the engine are made for 4096", d.PageSize), "boot a kernel with pages of 4 KiB")
}

func checkClock(_ context.Context, d *Doctor) Finding {
	if d.ClockSynced == nil {
		return skip("not asked")
	}
	synced, err := d.ClockSynced()
	if err != nil {
		return skip("the kernel does not tell: %v", err)
	}
	if !synced {
		return warn("not synchronised: deadlines follow this clock, and TLS in sandboxes needs a right one",
			"start a time service: `apt-get install systemd-timesyncd`, or chrony; a virtual machine may take its host's clock and need none")
	}
	return ok("synchronised")
}
