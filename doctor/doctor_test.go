package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/blob"
	"github.com/cayhq/cay/disk"
	"github.com/cayhq/cay/runtime"
)

func TestGoodMachine(t *testing.T) {
	r := goodDoctor(t, goodMachine()).Run(t.Context())
	for _, res := range r.Results {
		if res.Verdict != OK && res.ID != "runtime.server" {
			t.Errorf("%s: %s: %s", res.ID, res.Verdict, res.Evidence)
		}
		if res.Verdict == OK && res.Repair != "" {
			t.Errorf("%s is well and has a repair: %s", res.ID, res.Repair)
		}
	}
	if r.Count(Fail) != 0 || r.Count(Skip) != 1 {
		t.Errorf("%d failures, %d skipped", r.Count(Fail), r.Count(Skip))
	}
}

func earlier(err error, all ...EarlierEngine) func(*Doctor) {
	return func(d *Doctor) {
		d.Earlier = func(context.Context) ([]EarlierEngine, error) { return all, err }
	}
}

// Each case is a machine with one thing wrong. Evidence and repair are what
// the operator is told.
func TestMachines(t *testing.T) {
	good := goodMachine
	tests := []struct {
		name     string
		tree     tree
		set      func(*Doctor)
		id       string
		verdict  Verdict
		evidence string
		repair   string
	}{
		{name: "ordinary user", tree: good().with(tree{"proc/self/status": plainUser}),
			id: "host.privilege", verdict: Fail, evidence: "running as user 1000", repair: "sudo cay doctor"},
		{name: "ordinary user: what needs root is skipped", tree: good().with(tree{"proc/self/status": plainUser}),
			id: "network.slot", verdict: Skip, evidence: "needs root"},
		{name: "ordinary user: a database that it may not read is not a broken one", tree: good().with(tree{"proc/self/status": plainUser}), set: func(d *Doctor) { d.Store = func(context.Context) error { return errPlain } },
			id: "storage.database", verdict: Skip, evidence: "needs root"},
		{name: "ordinary user: records that it may not read own nothing", tree: good().with(tree{"proc/self/status": plainUser, "sys/fs/cgroup/cay-0a0b0c0d/x1": "dir"}),
			id: "leftovers.cgroups", verdict: Skip, evidence: "needs root"},
		{name: "root in a container", tree: good().with(tree{"proc/self/status": "Uid:\t0\t0\t0\t0\nCapEff:\t00000000a80425fb"}),
			id: "host.privilege", verdict: Fail, evidence: "root without CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN", repair: "--privileged"},
		{name: "old kernel", tree: good().with(tree{"proc/sys/kernel/osrelease": "4.19.0-26-amd64"}),
			id: "host.kernel", verdict: Fail, evidence: "Linux 4.19.0-26-amd64 is too old", repair: "5.10"},
		{name: "just too old", tree: good().with(tree{"proc/sys/kernel/osrelease": "5.9.16"}), id: "host.kernel", verdict: Fail, evidence: "5.9.16"},
		{name: "just new enough", tree: good().with(tree{"proc/sys/kernel/osrelease": "5.10-rc1"}), id: "host.kernel", verdict: OK, evidence: "5.10-rc1"},
		{name: "strange kernel", tree: good().with(tree{"proc/sys/kernel/osrelease": "mine"}), id: "host.kernel", verdict: Warn, evidence: `"mine"`},

		{name: "cgroup v2", tree: good(), id: "host.cgroup", verdict: OK, evidence: "cgroup v2 with cpu, memory, pids"},
		{name: "cgroup v2 without memory", tree: good().with(tree{"sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids"}),
			id: "host.cgroup", verdict: Fail, evidence: "cgroup v2 without memory", repair: "cgroup_enable=memory"},
		{name: "container without controllers", tree: good().with(tree{"sys/fs/cgroup/cgroup.controllers": "", "sys/fs/cgroup/cgroup.type": "domain"}),
			id: "host.cgroup", verdict: Fail, evidence: "cgroup v2 without cpu, memory, pids", repair: "container"},
		{name: "cgroup v1", tree: v1("cpu,cpuacct", "memory", "pids"), id: "host.cgroup", verdict: OK, evidence: "cgroup v1 with"},
		{name: "cgroup v1 without pids", tree: v1("cpu", "memory").without("sys/fs/cgroup/pids/system.slice/pids.max"),
			id: "host.cgroup", verdict: Fail, evidence: "cgroup v1 without pids", repair: "unified_cgroup_hierarchy"},
		{name: "cgroup hybrid", tree: v1("cpu", "memory", "pids").with(tree{"sys/fs/cgroup/unified/cgroup.controllers": ""}),
			id: "host.cgroup", verdict: OK, evidence: "hybrid"},
		{name: "cgroup hybrid, memory taken by v2", tree: v1("cpu", "memory", "pids").with(tree{"sys/fs/cgroup/unified/cgroup.controllers": "memory"}),
			id: "host.cgroup", verdict: Fail, evidence: "without memory"},
		{name: "no cgroups", tree: good().without("sys/fs/cgroup/cgroup.controllers", "sys/fs/cgroup/user.slice/session-1.scope/pids.max", "sys/fs/cgroup/user.slice/pids.max"),
			id: "host.cgroup", verdict: Fail, evidence: "no cgroups", repair: "mount -t cgroup2"},
		{name: "cgroups read-only", tree: good().with(tree{"proc/self/mountinfo": "30 22 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup2 rw"}),
			id: "host.cgroup", verdict: Fail, evidence: "read-only", repair: "privileged"},

		{name: "no user namespaces", tree: good().without("proc/self/ns/user"), id: "host.userns", verdict: Fail, evidence: "no user namespaces", repair: "CONFIG_USER_NS"},
		{name: "user namespaces off", tree: good().with(tree{"proc/sys/user/max_user_namespaces": "0"}), id: "host.userns", verdict: Fail, evidence: "switched off", repair: "sysctl -w user.max_user_namespaces"},
		{name: "few user namespaces", tree: good().with(tree{"proc/sys/user/max_user_namespaces": "63"}), id: "host.userns", verdict: Warn, evidence: "only 63"},
		{name: "no seccomp", tree: good().without("proc/sys/kernel/seccomp/actions_avail"), id: "host.seccomp", verdict: Fail, evidence: "no seccomp", repair: "CONFIG_SECCOMP_FILTER"},
		{name: "seccomp without trap", tree: good().with(tree{"proc/sys/kernel/seccomp/actions_avail": "kill allow"}), id: "host.seccomp", verdict: Fail, evidence: "cannot trap"},
		{name: "ptrace off", tree: good().with(tree{"proc/sys/kernel/yama/ptrace_scope": "3"}), id: "host.ptrace", verdict: Fail, evidence: "ptrace_scope = 3", repair: "restart the machine"},
		{name: "large pages", tree: good(), set: func(d *Doctor) { d.PageSize = 65536 }, id: "host.pagesize", verdict: Fail, evidence: "65536"},
		{name: "clock runs free", tree: good(), set: func(d *Doctor) { d.ClockSynced = func() (bool, error) { return false, nil } }, id: "host.clock", verdict: Warn, evidence: "not synchronised", repair: "timesyncd"},

		{name: "little memory", tree: good().with(tree{"proc/meminfo": "MemTotal: 1000000 kB\nMemAvailable: 900000 kB"}),
			id: "host.memory", verdict: Warn, evidence: "room for 0 sandboxes that use all of their 1024 MiB, and for about 38 idle ones", repair: "--memory-mb"},
		{name: "no memory", tree: good().with(tree{"proc/meminfo": "MemTotal: 1000000 kB\nMemAvailable: 100000 kB"}), id: "host.memory", verdict: Fail, evidence: "97 MiB"},
		{name: "strict overcommit", tree: good().with(tree{"proc/sys/vm/overcommit_memory": "2"}), id: "host.overcommit", verdict: Fail, evidence: "overcommit_memory = 2", repair: "overcommit_memory=0"},
		{name: "ulimit -v", tree: good().with(tree{"proc/self/limits": limits("1048576", "127000", "8589934592")}), id: "host.overcommit", verdict: Fail, evidence: "8.0 GiB of address space", repair: "LimitAS"},
		{name: "few maps", tree: good().with(tree{"proc/sys/vm/max_map_count": "4096"}), id: "host.maps", verdict: Warn, evidence: "4096"},
		{name: "low ulimit of files", tree: good().with(tree{"proc/self/limits": limits("4096", "127000", "unlimited")}), id: "host.files", verdict: Warn, evidence: "4096 files", repair: "LimitNOFILE"},
		{name: "very low ulimit of files", tree: good().with(tree{"proc/self/limits": limits("256", "127000", "unlimited")}), id: "host.files", verdict: Fail, evidence: "256 files"},
		{name: "low ulimit of processes", tree: good().with(tree{"proc/self/limits": limits("1048576", "1024", "unlimited")}), id: "host.pids", verdict: Warn, evidence: "1024, by ulimit -u", repair: "LimitNPROC"},
		{name: "pids.max of a slice", tree: good().with(tree{"sys/fs/cgroup/user.slice/pids.max": "300"}), id: "host.pids", verdict: Fail, evidence: "300, by the cgroup's pids.max", repair: "TasksMax"},
		{name: "pids.max, cgroup v1", tree: v1("cpu", "memory").with(tree{"sys/fs/cgroup/pids/system.slice/pids.max": "4915"}), id: "host.pids", verdict: Warn, evidence: "4915, by the cgroup"},
		{name: "small pid_max", tree: good().with(tree{"proc/sys/kernel/pid_max": "4096"}), id: "host.pids", verdict: Warn, evidence: "about 40 small sandboxes"},

		{name: "mitigations=off", tree: good().with(tree{"sys/devices/system/cpu/vulnerabilities/spectre_v2": "Vulnerable, IBPB: disabled"}), id: "host.cpu", verdict: Warn, evidence: "spectre_v2", repair: "microcode"},
		{name: "SMT leaks", tree: good().with(tree{"sys/devices/system/cpu/vulnerabilities/mds": "Mitigation: Clear CPU buffers; SMT vulnerable"}), id: "host.smt", verdict: Warn, evidence: "(mds)", repair: "nosmt"},
		{name: "SMT off", tree: good().with(tree{"sys/devices/system/cpu/smt/active": "0"}), id: "host.smt", verdict: OK, evidence: "off"},
		{name: "KSM", tree: good().with(tree{"sys/kernel/mm/ksm/run": "1"}), id: "host.ksm", verdict: Warn, evidence: "merged", repair: "echo 2"},
		{name: "swap", tree: good().with(tree{"proc/swaps": "Filename Type Size Used Priority\n/dev/sda5 partition 999 0 -2"}), id: "host.swap", verdict: Warn, evidence: "/dev/sda5", repair: "swapoff"},
		{name: "zram is not disk", tree: good().with(tree{"proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 999 0 -2"}), id: "host.swap", verdict: OK, evidence: "none"},

		{name: "taken port", tree: good().with(tree{"proc/net/tcp": tcpHeader + tcpLoopback, "proc/77/fd/3": "link:socket:[111]", "proc/77/cmdline": "node\x00server.js"}),
			id: "network.ports", verdict: Fail, evidence: "the API's address 127.0.0.1:3000 is taken by process 77 (node server.js)", repair: "kill 77"},
		{name: "our own port", tree: good().with(tree{"proc/net/tcp": tcpHeader + tcpLoopback, "proc/77/fd/3": "link:socket:[111]", "proc/77/cmdline": "cay\x00up"}), set: running(77),
			id: "network.ports", verdict: OK, evidence: "127.0.0.1:3000: held by this data directory's server (pid 77); 127.0.0.1:3002 free"},
		{name: "our own port, still starting", tree: good().with(tree{"proc/net/tcp": tcpHeader + tcpLoopback, "proc/77/fd/3": "link:socket:[111]", "proc/77/cmdline": "cay\x00up"}), set: func(d *Doctor) { d.Starting = 77 },
			id: "network.ports", verdict: OK, evidence: "server (pid 77)"},
		{name: "server starts", tree: good(), set: func(d *Doctor) { d.Starting = 77 }, id: "runtime.server", verdict: Warn, evidence: "process 77 is starting", repair: "wait"},
		{name: "port of an invisible process", tree: good().with(tree{"proc/net/tcp": tcpHeader + tcpLoopback}),
			id: "network.ports", verdict: Fail, evidence: "cannot be seen", repair: "--api-addr"},
		{name: "any port", tree: good(), set: func(d *Doctor) { d.APIAddr, d.ProxyAddr = "127.0.0.1:0", "127.0.0.1:0" }, id: "network.ports", verdict: OK, evidence: "any free port"},
		{name: "no nftables", tree: good(), set: func(d *Doctor) { d.Tables = func() ([]Table, error) { return nil, errPlain } }, id: "network.firewall", verdict: Fail, evidence: "nftables does not answer: broken", repair: "modprobe nf_tables"},
		{name: "Docker's firewall", tree: good(), set: func(d *Doctor) {
			d.Tables = func() ([]Table, error) { return []Table{{"ip", "nat", ""}, {"ip", "filter", "FORWARD"}}, nil }
		}, id: "network.firewall", verdict: Warn, evidence: "ip filter FORWARD", repair: `nft insert rule ip filter FORWARD iifname "cyabc123-*" accept`},
		{name: "old iptables", tree: good().with(tree{"proc/net/ip_tables_names": "nat\nfilter"}), id: "network.firewall", verdict: Warn, evidence: "old iptables", repair: "iptables-legacy"},
		{name: "our table flushed", tree: good(), set: running(5), id: "network.firewall", verdict: Fail, evidence: `"cay-abc123" is gone`, repair: "flushing"},
		{name: "our table in force", tree: good(), set: func(d *Doctor) {
			running(5)(d)
			d.Tables = func() ([]Table, error) { return []Table{{"inet", "cay-abc123", "forward"}}, nil }
		}, id: "network.firewall", verdict: OK, evidence: "in force (table cay-abc123)"},
		{name: "forwarding off before the start", tree: good().with(tree{"proc/sys/net/ipv4/ip_forward": "0"}), id: "network.forwarding", verdict: OK, evidence: "`cay up` switches it on"},
		{name: "forwarding off under the server", tree: good().with(tree{"proc/sys/net/ipv4/ip_forward": "0"}), set: running(5), id: "network.forwarding", verdict: Fail, evidence: "switched it off since", repair: "sysctl -w net.ipv4.ip_forward=1"},
		{name: "forwarding off and fixed", tree: good().with(tree{"proc/sys/net/ipv4/ip_forward": "0", "proc/self/mountinfo": "9 1 0:5 / /proc/sys ro - proc proc rw"}), id: "network.forwarding", verdict: Fail, evidence: "read-only", repair: "--sysctl"},
		{name: "no default route", tree: good().with(tree{"proc/net/route": routeHeader}), id: "network.route", verdict: Warn, evidence: "no default route"},
		{name: "no IPv6 in the kernel", tree: good(), id: "network.ipv6", verdict: OK, evidence: "off: this machine's kernel"},
		{name: "no way by IPv6", tree: good().with(tree{"proc/net/ipv6_route": noRoute6}), id: "network.ipv6", verdict: OK, evidence: "no default route"},
		{name: "private IPv6", tree: good().with(tree{"proc/net/ipv6_route": noRoute6 + defaultRoute6, "proc/net/if_inet6": address6("fd00", "eth0")}), id: "network.ipv6", verdict: OK, evidence: "no public address"},
		{name: "IPv6", tree: good().with(tree{"proc/net/ipv6_route": noRoute6 + defaultRoute6, "proc/net/if_inet6": address6("fe80", "eth0") + address6("2606", "eth0")}),
			id: "network.ipv6", verdict: OK, evidence: "on, in the name of 2606::2 by eth0"},
		{name: "range in use", tree: good().with(tree{"proc/net/route": routeHeader + defaultRoute + "tun0\t0040C10A\t00000000\t0001\t0\t0\t0\t00C0FFFF\t0\t0\t0\n"}),
			id: "network.range", verdict: Fail, evidence: "reaches 10.193.64.0/18 by tun0", repair: "--sandbox-cidr"},
		{name: "range in use by Cay", tree: good().with(tree{"proc/net/route": routeHeader + "cyabc123-1\t0000C10A\t00000000\t0001\t0\t0\t0\tFEFFFFFF\t0\t0\t0\n"}), id: "network.range", verdict: OK, evidence: "not used"},
		{name: "private resolver", tree: good().with(tree{"etc/resolv.conf": "nameserver 127.0.0.53"}), id: "network.resolver", verdict: OK, evidence: "sandboxes ask 8.8.8.8, 1.1.1.1"},
		{name: "no resolv.conf", tree: good().without("etc/resolv.conf"), id: "network.resolver", verdict: Warn, evidence: "cannot be read"},
		{name: "domain without a record", tree: good(), set: func(d *Doctor) {
			d.Domain = "sbx.example.com"
			d.LookupHost = func(_ context.Context, name string) ([]string, error) {
				return nil, fmt.Errorf("lookup %s: no such host", name)
			}
		}, id: "network.domain", verdict: Fail, evidence: "3000-doctor.sbx.example.com does not resolve", repair: "*.sbx.example.com"},
		{name: "local domain", tree: good(), set: func(d *Doctor) {
			d.Domain = "sbx.localhost"
			d.LookupHost = func(context.Context, string) ([]string, error) { return nil, errors.New("no such host") }
		}, id: "network.domain", verdict: Warn, evidence: "browsers and curl", repair: "libnss-myhostname"},
		{name: "no certificate", tree: good(), id: "network.certificate", verdict: OK, evidence: "left to a proxy in front"},
		{name: "a certificate fails", tree: good(), set: certificateOf(Certificate{}, errors.New("it is for [a.b] and not for *.x")), id: "network.certificate", verdict: Fail, evidence: "not for *.x", repair: "part=certificate"},
		{name: "a certificate ends", tree: good(), set: certificateOf(Certificate{Issuer: "CN=R3", Left: 50 * time.Hour}, nil), id: "network.certificate", verdict: Warn, evidence: "ends in 50 hours", repair: "renew"},
		{name: "a certificate that is not trusted", tree: good(), set: certificateOf(Certificate{Issuer: "CN=R3", Left: 900 * time.Hour, Untrusted: true}, nil), id: "network.certificate", verdict: Warn, evidence: "does not trust", repair: "cay trust"},
		{name: "a certificate", tree: good(), set: certificateOf(Certificate{Issuer: "CN=R3", Left: 900 * time.Hour}, nil), id: "network.certificate", verdict: OK, evidence: "37 more days"},
		{name: "domain", tree: good(), set: func(d *Doctor) { d.Domain = "sbx.example.com" }, id: "network.domain", verdict: OK, evidence: "127.0.0.1"},
		{name: "full connection table", tree: good().with(tree{"proc/sys/net/netfilter/nf_conntrack_count": "250000"}), id: "network.conntrack", verdict: Warn, evidence: "250000 of 262144", repair: "nf_conntrack_max=1048576"},
		{name: "a slot fails", tree: good(), set: func(d *Doctor) { d.TrySlot = func(context.Context) (string, error) { return "", errTyped } }, id: "network.slot", verdict: Fail, evidence: "the layer sha256:12 is gone", repair: "build it again"},

		{name: "full disk", tree: good(), set: spaceOf(Space{Free: 200 * mib, Total: 100 * gib, FreeInodes: 1e6, TotalInodes: 1e6}), id: "storage.space", verdict: Fail, evidence: "200 MiB of 100 GiB free", repair: "du -xh"},
		{name: "nearly full disk", tree: good(), set: spaceOf(Space{Free: 2 * gib, Total: 100 * gib, FreeInodes: 1e6, TotalInodes: 1e6}), id: "storage.space", verdict: Warn, evidence: "building a template"},
		{name: "no inodes", tree: good(), set: spaceOf(Space{Free: 80 * gib, Total: 100 * gib, FreeInodes: 12, TotalInodes: 1e6}), id: "storage.inodes", verdict: Fail, evidence: "12 of 1000000"},
		{name: "few inodes", tree: good(), set: spaceOf(Space{Free: 80 * gib, Total: 100 * gib, FreeInodes: 9000, TotalInodes: 1e6}), id: "storage.inodes", verdict: Warn, evidence: "9000"},
		{name: "btrfs has no inode limit", tree: good(), set: spaceOf(Space{Free: 80 * gib, Total: 100 * gib}), id: "storage.inodes", verdict: OK, evidence: "not limited"},
		{name: "read-only file system", tree: good().with(tree{"proc/self/mountinfo": "22 1 8:1 / / ro,relatime - ext4 /dev/sda1 ro"}), id: "storage.datadir", verdict: Fail, evidence: "mounted read-only", repair: "remount,rw /"},
		{name: "tmpfs", tree: good().with(tree{"proc/self/mountinfo": "22 1 8:1 / / rw - tmpfs tmpfs rw"}), id: "storage.datadir", verdict: Warn, evidence: "in memory (tmpfs)"},
		{name: "nfs", tree: good().with(tree{"proc/self/mountinfo": "22 1 8:1 / / rw - nfs4 srv:/x rw"}), id: "storage.datadir", verdict: Warn, evidence: "nfs4"},
		{name: "long path", tree: good(), set: func(d *Doctor) { d.DataDir = "/" + strings.Repeat("d", 80) }, id: "storage.datadir", verdict: Fail, evidence: "too long"},
		{name: "fresh directory", tree: good(), set: func(d *Doctor) { d.DataDir = "/nonexistent-cay/x" }, id: "storage.datadir", verdict: OK, evidence: "`cay up` makes it"},
		{name: "fresh directory: the disk above is asked", tree: good(), set: func(d *Doctor) {
			d.DataDir = "/nonexistent-cay/x"
			d.Space = func(dir string) (Space, error) { return Space{Free: 50 * gib, Total: 90 * gib}, nil }
		}, id: "storage.space", verdict: OK, evidence: "free at /,"},
		{name: "directory for everybody", tree: good(), set: func(d *Doctor) { os.Chmod(d.DataDir, 0o777) }, id: "storage.datadir", verdict: Fail, evidence: "mode 0777", repair: "chmod go-w"},
		{name: "a file in its place", tree: good(), set: func(d *Doctor) {
			d.DataDir = filepath.Join(d.DataDir, "f")
			os.WriteFile(d.DataDir, nil, 0o600)
		}, id: "storage.datadir", verdict: Fail, evidence: "not a directory"},
		{name: "open credentials", tree: good(), set: func(d *Doctor) { os.WriteFile(filepath.Join(d.DataDir, "credentials.json"), nil, 0o644) }, id: "storage.secrets", verdict: Fail, evidence: "mode 0644", repair: "chmod 600"},
		{name: "database of a newer version", tree: good(), set: func(d *Doctor) { d.Store = func(context.Context) error { return errTyped } }, id: "storage.database", verdict: Fail, evidence: "gone", repair: "build it again"},
		{name: "artefacts cannot be opened", tree: good(), set: func(d *Doctor) {
			d.Blobs = func(context.Context) (blob.Store, error) { return nil, errTyped }
		}, id: "storage.artefacts", verdict: Fail, evidence: "gone"},
		{name: "no loop devices", tree: good(), set: func(d *Doctor) {
			d.TryDisks = func(context.Context, string) (disk.Capabilities, error) {
				return disk.Capabilities{Features: []disk.Feature{{Name: "loop devices", Needed: true, Fix: "run `modprobe loop`"}, {Name: "reflink", Fix: "never shown"}}}, errPlain
			}
		}, id: "storage.disks", verdict: Fail, evidence: "broken", repair: "run `modprobe loop`"},
		{name: "no XFS", tree: good(), set: func(d *Doctor) {
			d.TryDisks = func(context.Context, string) (disk.Capabilities, error) {
				return disk.Capabilities{Design: disk.DesignCopy, Why: "works anywhere", Refused: map[disk.Design]string{disk.DesignPool: "no mkfs.xfs"}}, nil
			}
		}, id: "storage.disks", verdict: Warn, evidence: "design copy: works anywhere (not xfs-pool: no mkfs.xfs)", repair: "xfsprogs"},

		{name: "server does not answer", tree: good(), set: func(d *Doctor) {
			d.Server = &Server{PID: 9, Health: func(context.Context) error { return errPlain }}
		}, id: "runtime.server", verdict: Fail, evidence: "process 9 runs, but: broken", repair: "log"},
		{name: "engine does not start", tree: good(), set: func(d *Doctor) {
			d.Engine = func(context.Context) (runtime.Info, error) { return runtime.Info{}, errTyped }
		}, id: "runtime.engine", verdict: Fail, evidence: "gone"},
		{name: "snapshots of earlier engines", tree: good(), set: earlier(nil,
			EarlierEngine{Program: "0a1b", Version: "v0", Kept: true, Snapshots: []string{"s1", "s2"}, Guests: []string{"e1"}},
			EarlierEngine{Program: "0c0d", Kept: true}),
			id: "runtime.engines", verdict: OK, evidence: "kept: 0a1b (v0) for snapshots s1, s2, sandboxes e1; 0c0d for nobody"},
		{name: "a snapshot whose engine is gone", tree: good(), set: earlier(nil,
			EarlierEngine{Program: "0a1b", Version: "v0", Kept: true, Snapshots: []string{"s1"}},
			EarlierEngine{Program: "0c0d", Version: "v1", Snapshots: []string{"1", "2", "3", "4", "5", "6", "7", "8", "9", "10"}}),
			id: "runtime.engines", verdict: Warn, evidence: "not there any more: v1 of snapshots 1, 2, 3, 4, 5, 6, 7, 8 and 2 more", repair: "memory: false"},
		{name: "a sandbox whose engine's file is gone runs on", tree: good(), set: earlier(nil, EarlierEngine{Version: "v1", Guests: []string{"e1"}}),
			id: "runtime.engines", verdict: OK, evidence: "present engine"},
		{name: "a snapshot that cannot be read", tree: good(), set: earlier(errTyped),
			id: "runtime.engines", verdict: Fail, evidence: "gone"},
		{name: "sandboxes with another envd", tree: good(), set: func(d *Doctor) {
			d.OtherEnvd = func(context.Context) ([]string, error) {
				return strings.Split("i1 i2 i3 i4 i5 i6 i7 i8 i9", " "), nil
			}
		}, id: "runtime.envd", verdict: OK, evidence: "another one in i1, i2, i3, i4, i5, i6, i7, i8 and 1 more", repair: "cay sandbox upgrade --all"},
		{name: "records that cannot be read", tree: good(), set: func(d *Doctor) {
			d.OtherEnvd = func(context.Context) ([]string, error) { return nil, errTyped }
		}, id: "runtime.envd", verdict: Fail, evidence: "gone"},
		{name: "no mmdebstrap", tree: good(), set: func(d *Doctor) { d.LookPath = func(string) (string, error) { return "", errPlain } }, id: "template.tools", verdict: Warn, evidence: "mmdebstrap", repair: "apt-get install mmdebstrap"},
		{name: "no template", tree: good(), set: func(d *Doctor) { d.Templates = func(context.Context, bool) ([]Template, error) { return nil, nil } }, id: "template.builds", verdict: Warn, evidence: "there is none"},
		{name: "template without a layer", tree: good(), set: func(d *Doctor) {
			d.Templates = func(context.Context, bool) ([]Template, error) {
				return []Template{{Name: "ok", Build: "b0"}, {Name: "base", Build: "b1", Err: errTyped}}, nil
			}
		}, id: "template.builds", verdict: Fail, evidence: "base (build b1): the layer sha256:12 is gone", repair: "build it again"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := goodDoctor(t, tt.tree)
			if tt.set != nil {
				tt.set(d)
			}
			res := find(t, d.Run(t.Context()), tt.id)
			if res.Verdict != tt.verdict || !strings.Contains(res.Evidence, tt.evidence) || !strings.Contains(res.Repair, tt.repair) {
				t.Errorf("%s: %s\n%s\nfix: %s\nwant %s\n…%s…\nfix: …%s…", res.ID, res.Verdict, res.Evidence, res.Repair, tt.verdict, tt.evidence, tt.repair)
			}
			if (res.Verdict == Fail || res.Verdict == Warn) && res.Repair == "" {
				t.Errorf("%s has no repair", res.ID)
			}
		})
	}
	if len(tests) < 25 {
		t.Errorf("only %d machines", len(tests))
	}
}

func TestChecksHaveStableNames(t *testing.T) {
	form := regexp.MustCompile(`^(host|network|storage|runtime|template|leftovers|deep)\.[a-z0-9]+$`)
	seen := map[string]bool{}
	for _, c := range append(checks(), trialCheck) {
		if !form.MatchString(c.id) || seen[c.id] || c.title == "" || c.run == nil {
			t.Errorf("check %q, title %q: malformed or double", c.id, c.title)
		}
		seen[c.id] = true
	}
}

// A data directory really takes a durable write, and nothing stays of it.
func TestWriteLeavesNothing(t *testing.T) {
	d := goodDoctor(t, goodMachine())
	if f := checkWrite(t.Context(), d); f.Verdict != OK && f.Verdict != Warn {
		t.Errorf("%+v", f)
	}
	entries, err := os.ReadDir(d.DataDir)
	if err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// A check that hangs fails alone; the report comes.
func TestHangingCheck(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := goodDoctor(t, goodMachine())
		d.DataDir = dir
		release := make(chan struct{})
		d.TrySlot = func(context.Context) (string, error) { <-release; return "", nil }
		d.LookupHost = func(ctx context.Context, _ string) ([]string, error) { <-ctx.Done(); return nil, ctx.Err() }
		d.Domain = "example.com"
		began := time.Now()
		r := d.Run(t.Context())
		if took := time.Since(began); took > time.Minute {
			t.Errorf("took %s", took)
		}
		if res := find(t, r, "network.slot"); res.Verdict != Fail || !strings.Contains(res.Evidence, "no answer in 10s") {
			t.Errorf("%+v", res)
		}
		if res := find(t, r, "network.domain"); res.Verdict != Fail || !strings.Contains(res.Evidence, "deadline") {
			t.Errorf("%+v", res)
		}
		if res := find(t, r, "template.builds"); res.Verdict != OK {
			t.Errorf("%+v", res)
		}
		close(release)
	})
}

// certificateOf is a server that shows a certificate.
func certificateOf(c Certificate, err error) func(*Doctor) {
	return func(d *Doctor) {
		running(5)(d)
		d.TLSAddr = "127.0.0.1:1"
		d.Certificate = func(context.Context) (Certificate, error) { return c, err }
	}
}
