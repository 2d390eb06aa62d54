package gvisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// guestCapabilities are those of the guest's root: everything gVisor knows. They
// are rights inside the guest's own kernel and none on the host.
var guestCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
	"CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE",
	"CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
	"CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT",
	"CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
	"CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP",
}

// cpuPeriod is the CFS period in microseconds, the kernel's default.
const cpuPeriod = 100_000

// validID reports whether s is an instance's ID: 1 to 64 letters, digits, "_",
// "." and "-", of which the first is a letter or a digit. It is no regular
// expression because every engine process would keep that in memory.
func validID(s string) bool {
	for i, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case i > 0 && (c == '_' || c == '.' || c == '-'):
		default:
			return false
		}
	}
	return s != "" && len(s) <= 64
}

// maxSocketPath is the longest path of a unix socket (sun_path of unix(7),
// without the final NUL).
const maxSocketPath = 107

// checkSpec refuses what could not run, or would run without a limit.
func checkSpec(s runtime.Spec, l layout) error {
	bad := func(format string, args ...any) error {
		return &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerRuntime, Message: fmt.Sprintf(format, args...)}
	}
	switch {
	case !validID(string(s.ID)):
		return bad("the instance ID %q is malformed", s.ID)
	case !filepath.IsAbs(s.RootFS):
		return bad("the root directory %q is not an absolute path", s.RootFS)
	case !filepath.IsAbs(s.NetNS):
		return bad("the network namespace %q is not an absolute path", s.NetNS)
	case len(s.Args) == 0 || s.Args[0] == "":
		return bad("instance %s has no program to run", s.ID)
	case s.Limits.CPUs <= 0 || s.Limits.MemoryBytes <= 0 || s.Limits.PIDs <= 0:
		return bad("instance %s lacks a limit: want CPUs, memory and PIDs, all above 0", s.ID)
	}
	if sock := filepath.Join(l.engineRoot, "runsc-"+string(s.ID)+".sock"); len(sock) > maxSocketPath {
		return &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerRuntime,
			Message: fmt.Sprintf("the path of the data directory is too long: the engine's socket %s would have %d bytes of at most %d", sock, len(sock), maxSocketPath),
			Fix:     "use a data directory with a shorter path"}
	}
	if st, err := os.Stat(s.RootFS); err != nil || !st.IsDir() {
		return &cay.Error{Code: cay.CodeDiskUnavailable, Layer: cay.LayerStorage,
			Message: fmt.Sprintf("the root directory %s of instance %s cannot be used", s.RootFS, s.ID), Err: err}
	}
	if _, err := os.Stat(s.NetNS); err != nil {
		return &cay.Error{Code: cay.CodeNetworkUnavailable, Layer: cay.LayerNetwork,
			Message: fmt.Sprintf("the network namespace %s of instance %s cannot be used", s.NetNS, s.ID), Err: err}
	}
	return nil
}

// writeSpec writes the OCI bundle of an instance.
func writeSpec(s *specs.Spec, l layout) error {
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encoding the spec: %w", err)
	}
	// The environment holds the guest's control token.
	return os.WriteFile(l.spec, data, 0o600)
}

// ociSpec says to gVisor what to run.
func ociSpec(s runtime.Spec, l layout) *specs.Spec {
	oomScore := guestOOMScore
	mem := s.Limits.MemoryBytes
	quota, period := int64(s.Limits.CPUs)*cpuPeriod, uint64(cpuPeriod)
	pids := hostPIDs(s.Limits.PIDs, pidMax())
	res := &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Quota: &quota, Period: &period},
		Memory: &specs.LinuxMemory{Limit: &mem},
		Pids:   &specs.LinuxPids{Limit: pids},
	}
	if swapLimitable() {
		res.Memory.Swap = &mem // memory and swap together: no swap
	}
	return &specs.Spec{
		Version:  specs.Version,
		Hostname: s.Hostname,
		Root:     &specs.Root{Path: s.RootFS},
		Process: &specs.Process{
			Args: s.Args,
			Env:  s.Env,
			Cwd:  "/",
			Capabilities: &specs.LinuxCapabilities{
				Bounding:  guestCapabilities,
				Effective: guestCapabilities,
				Permitted: guestCapabilities,
			},
			Rlimits:     []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 65536, Hard: 1048576}},
			OOMScoreAdj: &oomScore,
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=1m"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "nodev", "mode=1777", "size=" + strconv.FormatInt(shmBytes(mem), 10)}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "rw"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: l.cgroup,
			Resources:   res,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace},
				{Type: specs.NetworkNamespace, Path: s.NetNS},
			},
		},
	}
}

// bootLimits are the flags of gVisor's boot command that say what machine the
// guest sees, as gVisor derives them from the cgroup when it makes that itself.
func bootLimits(l runtime.Limits) []string {
	cpus := min(max(l.CPUs, 2), goruntime.NumCPU()) // with one processor, some programs leave locks away
	return []string{
		"cpu-num=" + strconv.Itoa(cpus),
		"cpu-quota=" + strconv.Itoa(l.CPUs*cpuPeriod),
		"cpu-period=" + strconv.Itoa(cpuPeriod),
		"total-memory=" + strconv.FormatInt(min(l.MemoryBytes, hostMemory()), 10),
	}
}

// hostMemory is the machine's memory in bytes.
var hostMemory = sync.OnceValue(func() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return math.MaxInt64
	}
	return int64(info.Totalram) * int64(info.Unit)
})

// shmBytes is the size of the guest's /dev/shm: half its memory, as on Linux. It
// is memory of the instance like any other.
func shmBytes(memory int64) int64 { return max(memory/2, 64<<20) }

// tmpMarker makes /tmp non-empty; it is what systemd-tmpfiles makes there too.
const tmpMarker = "tmp/.X11-unix"

// keepTmpOnDisk makes sure that the guest's /tmp is not empty: gVisor mounts a
// file system of its own over an empty /tmp, in memory, where a large file
// would end the guest instead of filling its disk. A directory on the disk
// costs a tenth of a millisecond; a mount would cost a second gofer connection
// and make renames into and out of /tmp fail.
func keepTmpOnDisk(rootfs string) error {
	root, err := os.OpenRoot(rootfs) // the directory is the guest's: follow no link out of it
	if err != nil {
		return fmt.Errorf("opening the root directory: %w", err)
	}
	defer root.Close()
	d, err := root.Open("tmp")
	if err == nil {
		names, err := d.Readdirnames(1)
		d.Close()
		if err == nil && len(names) > 0 {
			return nil
		}
	} else if errors.Is(err, fs.ErrNotExist) {
		if err := makeSticky(root, "tmp"); err != nil {
			return err
		}
	} else if strings.Contains(err.Error(), "escapes") || errors.Is(err, fs.ErrInvalid) {
		return nil // /tmp is a link the guest's image made; gVisor follows it inside the guest
	}
	return makeSticky(root, tmpMarker)
}

// makeSticky makes a directory that everybody may write to.
func makeSticky(root *os.Root, name string) error {
	if err := root.Mkdir(name, 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("making /%s: %w", name, err)
	}
	if err := root.Chmod(name, fs.ModeSticky|0o777); err != nil {
		return fmt.Errorf("opening /%s to everybody: %w", name, err)
	}
	return nil
}
