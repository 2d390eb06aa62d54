package doctor

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob"
	"github.com/cayhq/cay/blob/blobtest"
	"github.com/cayhq/cay/disk"
	"github.com/cayhq/cay/runtime"
)

// tree is a machine's files: path to content. A value "link:x" is a symbolic
// link, "dir" a directory.
type tree map[string]string

func (t tree) FS() fs.FS {
	out := fstest.MapFS{}
	for name, content := range t {
		switch to, link := strings.CutPrefix(content, "link:"); {
		case link:
			out[name] = &fstest.MapFile{Data: []byte(to), Mode: fs.ModeSymlink | 0o777}
		case content == "dir":
			out[name] = &fstest.MapFile{Mode: fs.ModeDir | 0o755}
		default:
			out[name] = &fstest.MapFile{Data: []byte(content + "\n"), Mode: 0o644}
		}
	}
	return out
}

// limits is proc_pid_limits(5) with the hard limits given.
func limits(files, processes, space string) string {
	return "Limit                     Soft Limit           Hard Limit           Units     \n" +
		"Max processes             " + processes + "                " + processes + "                processes \n" +
		"Max open files            1024                 " + files + "               files     \n" +
		"Max address space         unlimited            " + space + "            bytes     "
}

const (
	allCaps   = "CapEff:\t000001ffffffffff"
	rootUser  = "Name:\tcay\nUid:\t0\t0\t0\t0\n" + allCaps
	plainUser = "Name:\tcay\nUid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000"

	routeHeader  = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
	defaultRoute = "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
)

// goodMachine is a Debian 12 server where everything is well, with no server
// of ours running.
func goodMachine() tree {
	return tree{
		"proc/self/status":                                  rootUser,
		"proc/self/limits":                                  limits("1048576", "127000", "unlimited"),
		"proc/self/cgroup":                                  "0::/user.slice/session-1.scope",
		"proc/self/ns/user":                                 "link:user:[4026531837]",
		"proc/self/mountinfo":                               "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n30 22 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw",
		"proc/sys/kernel/osrelease":                         "6.1.0-18-amd64",
		"proc/sys/kernel/pid_max":                           "4194304",
		"proc/sys/kernel/threads-max":                       "254000",
		"proc/sys/kernel/seccomp/actions_avail":             "kill_process kill_thread trap errno user_notif trace log allow",
		"proc/sys/kernel/yama/ptrace_scope":                 "0",
		"proc/sys/user/max_user_namespaces":                 "127000",
		"proc/sys/vm/overcommit_memory":                     "0",
		"proc/sys/vm/max_map_count":                         "65530",
		"proc/sys/fs/file-max":                              "9223372036854775807",
		"proc/sys/net/ipv4/ip_forward":                      "1",
		"proc/sys/net/netfilter/nf_conntrack_max":           "262144",
		"proc/sys/net/netfilter/nf_conntrack_count":         "12",
		"proc/meminfo":                                      "MemTotal:       32000000 kB\nMemFree:         1000000 kB\nMemAvailable:   30000000 kB",
		"proc/swaps":                                        "Filename\tType\tSize\tUsed\tPriority",
		"proc/net/tcp":                                      tcpHeader,
		"proc/net/tcp6":                                     tcpHeader,
		"proc/net/route":                                    routeHeader + defaultRoute,
		"etc/resolv.conf":                                   "nameserver 9.9.9.9",
		"sys/fs/cgroup/cgroup.controllers":                  "cpuset cpu io memory hugetlb pids rdma misc",
		"sys/fs/cgroup/user.slice/session-1.scope/pids.max": "max",
		"sys/fs/cgroup/user.slice/pids.max":                 "max",
		"sys/devices/system/cpu/smt/active":                 "1",
		"sys/devices/system/cpu/vulnerabilities/mds":        "Not affected",
		"sys/devices/system/cpu/vulnerabilities/l1tf":       "Mitigation: PTE Inversion",
		"sys/kernel/mm/ksm/run":                             "0",
		"sys/class/net/eth0":                                "link:../../devices/x",
		"sys/class/net/lo":                                  "link:../../devices/y",
	}
}

func (t tree) with(more tree) tree {
	out := maps.Clone(t)
	maps.Copy(out, more)
	return out
}

func (t tree) without(names ...string) tree {
	out := maps.Clone(t)
	for _, n := range names {
		delete(out, n)
	}
	return out
}

// v1 is the cgroup tree of a machine with the old hierarchies.
func v1(dirs ...string) tree {
	t := goodMachine().without("sys/fs/cgroup/cgroup.controllers", "sys/fs/cgroup/user.slice/session-1.scope/pids.max", "sys/fs/cgroup/user.slice/pids.max")
	for _, d := range dirs {
		t["sys/fs/cgroup/"+d] = "dir"
	}
	t["proc/self/cgroup"] = "8:pids:/system.slice\n0::/"
	t["sys/fs/cgroup/pids/system.slice/pids.max"] = "max"
	return t
}

// goodDoctor is the doctor of the tree, with every part of the product well
// and no server running.
func goodDoctor(t *testing.T, files tree) *Doctor {
	dir := filepath.Join(t.TempDir(), "data")
	if err := os.Mkdir(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return &Doctor{
		Root: files.FS(), PageSize: 4096, DataDir: dir,
		APIAddr: "127.0.0.1:3000", ProxyAddr: "127.0.0.1:3002",
		CIDR: netip.MustParsePrefix("10.193.0.0/16"), ReserveBytes: gib, MemoryMB: 1024,
		Tag: "abc123", NamespaceDir: "/run/netns", InstanceDir: dir + "/run/gvisor/i", CgroupParent: "/cay-0a0b0c0d",
		Space: func(string) (Space, error) {
			return Space{Free: 80 * gib, Total: 100 * gib, FreeInodes: 5e6, TotalInodes: 6e6}, nil
		},
		ClockSynced: func() (bool, error) { return true, nil },
		Tables:      func() ([]Table, error) { return nil, nil },
		LookPath:    func(p string) (string, error) { return "/usr/bin/" + p, nil },
		LookupHost:  func(context.Context, string) ([]string, error) { return []string{"127.0.0.1"}, nil },
		TrySlot:     func(context.Context) (string, error) { return "made and taken away", nil },
		TryDisks: func(context.Context, string) (disk.Capabilities, error) {
			return disk.Capabilities{Design: disk.DesignReflink, Why: "it clones files"}, nil
		},
		Engine: func(context.Context) (runtime.Info, error) {
			return runtime.Info{Name: "gvisor", Version: "v1", Platform: "systrap"}, nil
		},
		Earlier:   func(context.Context) ([]EarlierEngine, error) { return nil, nil },
		OtherEnvd: func(context.Context) ([]string, error) { return nil, nil },
		Store:     func(context.Context) error { return nil },
		Blobs:     func(context.Context) (blob.Store, error) { return &blobtest.Memory{}, nil },
		Owned:     func(context.Context) (Owned, error) { return Owned{}, nil },
		Templates: func(context.Context, bool) ([]Template, error) {
			return []Template{{Name: "base", Build: "b1", Bytes: 600 * mib}}, nil
		},
	}
}

// find returns the result of one check.
func find(t *testing.T, r Report, id string) Result {
	t.Helper()
	for _, res := range r.Results {
		if res.ID == id {
			return res
		}
	}
	t.Fatalf("no check %q", id)
	return Result{}
}

func running(pid int) func(*Doctor) {
	return func(d *Doctor) {
		d.Server = &Server{PID: pid, Health: func(context.Context) error { return nil }}
	}
}

func spaceOf(s Space) func(*Doctor) {
	return func(d *Doctor) { d.Space = func(string) (Space, error) { return s, nil } }
}

var errTyped = &cay.Error{Code: cay.CodeObjectMissing, Layer: cay.LayerStorage, Message: "the layer sha256:12 is gone", Fix: "build it again"}

var errPlain = errors.New("broken")
