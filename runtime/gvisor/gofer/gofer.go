// Package gofer serves the root directory of one guest to gVisor's kernel: it
// is gVisor's file server without the rest of gVisor, for the one configuration
// that package gvisor asks for.
//
// gVisor's own way is to execute all of itself as the file server. Each guest
// would have the tables of a kernel in memory that nobody uses, 2 MB, and pay
// 10 ms of processor for initialising them.
package gofer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/lisafs"
	"gvisor.dev/gvisor/pkg/pinring"
	"gvisor.dev/gvisor/pkg/unet"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/fsgofer"
	"gvisor.dev/gvisor/runsc/fsgofer/filter"

	"github.com/cayhq/cay/internal/prelude"
)

// options is what gVisor says on the command line of a file server.
type options struct {
	bundle string
	socket string // the root directory comes from there; "" if it is the spec's
	spec   int    // descriptors
	mounts int
	root   int
	chroot int
	rpc    int
	exits  int
}

// parse reads a command line that [prelude.IsOwnGofer] has accepted.
func parse(args []string) (options, error) {
	o := options{spec: -1, mounts: -1, root: -1, chroot: -1, rpc: -1, exits: -1}
	numbers := map[string]*int{"spec-fd": &o.spec, "mounts-fd": &o.mounts, "io-fds": &o.root,
		"sync-chroot-fd": &o.chroot, "rpc-fd": &o.rpc, "sync-sentry-exit-fd": &o.exits}
	at := slices.Index(args, "gofer")
	if !prelude.IsOwnGofer(args) || at < 0 {
		return o, errors.New("this is not a command line that it serves")
	}
	o.socket = prelude.RootSocket(args[:at])
	rest := args[at+1:]
	for i := 0; i < len(rest)-1; i++ { // the last one is the container's ID
		name, value, ok := strings.Cut(strings.TrimLeft(rest[i], "-"), "=")
		if !ok && i+1 < len(rest)-1 {
			i++
			value = rest[i]
		}
		switch n := numbers[name]; {
		case n != nil:
			v, err := strconv.Atoi(value)
			if err != nil {
				return o, fmt.Errorf("the flag %s: %w", name, err)
			}
			*n = v
		case name == "bundle":
			o.bundle = value
		case name == "gofer-mount-confs", name == "pin-ring-fd": // accepted by prelude; held open
		default:
			return o, fmt.Errorf("the flag %s is not known", name)
		}
	}
	if o.bundle == "" || o.spec < 0 || o.mounts < 0 || o.root < 0 {
		return o, errors.New("the bundle, spec-fd, mounts-fd or io-fds is missing")
	}
	return o, nil
}

// idleAfter is longer than a guest takes to start.
const idleAfter = 2 * time.Second

// Main is the program; it returns the exit status.
func Main(args []string) int {
	debug.SetGCPercent(25) // thousands of open files, and a heap of less than a megabyte
	// Before the filter is there, which refuses what the first timer needs.
	defer time.AfterFunc(idleAfter, debug.FreeOSMemory).Stop()
	if err := serve(args); err != nil {
		fmt.Fprintln(os.Stderr, "gofer:", err)
		return 1
	}
	return 0
}

// serve confines the process and then serves until the kernel is gone.
func serve(args []string) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	RegisterFilter()
	root, mounts, err := readSpec(o)
	if err != nil {
		return err
	}
	if o.chroot >= 0 { // closed when all is ready to be mounted
		if err := untilClosed(o.chroot); err != nil {
			return err
		}
	}
	if o.rpc >= 0 {
		_ = unix.Close(o.rpc) // for mounts that we do not have
	}
	tree, later := -1, -1
	if o.socket == "" {
		tree, err = CloneTree(root)
	} else {
		later, err = connect(o.socket)
	}
	if err != nil {
		return err
	}
	if err := leaveHost(); err != nil {
		return err
	}
	// The kernel takes the mounts from us, who may have resolved their links.
	out := os.NewFile(uintptr(o.mounts), "mounts")
	_, err = out.Write(mounts)
	if err := errors.Join(err, out.Close()); err != nil {
		return fmt.Errorf("writing the mounts: %w", err)
	}
	if later >= 0 {
		if tree, err = receiveTree(later); err != nil || tree < 0 {
			return err // or there is no guest for it
		}
	}
	if err := enter(tree); err != nil {
		return err
	}
	unix.Umask(0) // the guest's kernel has applied the guest's own
	if err := confine(); err != nil {
		return err
	}

	sock, err := unet.NewSocket(o.root)
	if err != nil {
		return fmt.Errorf("taking over the connection: %w", err)
	}
	server := lisafs.NewServer()
	impl := fsgofer.NewConnectionImpl(&fsgofer.Config{HostUDS: config.HostUDSNone, HostFifo: config.HostFifoNone, CharDevicePolicy: config.CharDevEmulatedOnly})
	conn, err := server.CreateConnection(sock, "/", fsgofer.ConnectionOpts(false), impl)
	if err != nil {
		return fmt.Errorf("beginning the connection: %w", err)
	}
	server.StartConnection(conn)
	server.Wait()
	server.Destroy()
	if o.exits >= 0 {
		// Whoever goes last gives back what both hold: that should be us, and
		// not the kernel, whose end is waited for.
		pinring.WaitExit(o.exits, 500*time.Millisecond)
	}
	return nil
}

// readSpec returns the guest's root directory and its mounts as the kernel
// wants them: with sources below the bundle.
func readSpec(o options) (root string, mounts []byte, err error) {
	f := os.NewFile(uintptr(o.spec), "spec")
	defer f.Close()
	var spec struct {
		Root struct {
			Path     string `json:"path"`
			Readonly bool   `json:"readonly"`
		} `json:"root"`
		Mounts []specs.Mount `json:"mounts"`
	}
	if err := json.NewDecoder(io.NewSectionReader(f, 0, 16<<20)).Decode(&spec); err != nil {
		return "", nil, fmt.Errorf("reading the spec: %w", err)
	}
	if !filepath.IsAbs(spec.Root.Path) || spec.Root.Readonly {
		return "", nil, fmt.Errorf("the root %q is not one that it serves", spec.Root.Path)
	}
	for i, m := range spec.Mounts {
		if m.Source != "" && !filepath.IsAbs(m.Source) {
			spec.Mounts[i].Source = filepath.Join(o.bundle, m.Source)
		}
	}
	mounts, err = json.Marshal(spec.Mounts)
	return spec.Root.Path, mounts, err
}

// untilClosed waits for the end of a descriptor's other side.
func untilClosed(fd int) error {
	f := os.NewFile(uintptr(fd), "sync")
	defer f.Close()
	var b [1]byte
	if n, err := f.Read(b[:]); n != 0 || err != io.EOF {
		return fmt.Errorf("waiting for the start: %d bytes, %w", n, err)
	}
	return nil
}

// stage is where the new root is made: a directory that every machine has, and
// that nobody needs once it is covered.
const stage = "/proc/fs"

// guestRoot is where the guest's root directory is then.
const guestRoot = "/root"

// leaveHost leaves nothing of the host mounted in this process's namespace.
func leaveHost() error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		source, target, fstype string
		flags                  uintptr
		dirs                   []string
	}{
		{"", "/", "", unix.MS_SLAVE | unix.MS_REC, nil}, // what we mount is ours alone
		{"gofer", stage, "tmpfs", flags, []string{stage + guestRoot, stage + "/fd"}},
		// By way of it files are opened again with other rights. It is a mount
		// of its own, so that ".." does not lead into /proc.
		{"/proc/self/fd", stage + "/fd", "", unix.MS_BIND, nil},
	} {
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m.target, err)
		}
		for _, d := range m.dirs {
			if err := os.Mkdir(d, 0o755); err != nil {
				return err
			}
		}
	}
	if err := unix.Chdir(stage); err != nil {
		return fmt.Errorf("entering the new root: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("changing the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil { // the old one, on top
		return fmt.Errorf("letting go of the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if err := fsgofer.OpenProcSelfFD("/fd"); err != nil {
		return err
	}
	if err := unix.Unmount("/fd", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("hiding /proc: %w", err)
	}
	return nil
}

// enter makes the guest's root directory the root of this process.
func enter(tree int) error {
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, guestRoot, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mounting the guest's root: %w", err)
	}
	if err := unix.Close(tree); err != nil {
		return fmt.Errorf("closing the guest's root: %w", err)
	}
	if err := unix.Mount("", guestRoot, "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("keeping the guest's root apart: %w", err)
	}
	if err := unix.Chroot(guestRoot); err != nil {
		return fmt.Errorf("changing to the guest's root: %w", err)
	}
	return unix.Chdir("/")
}

// confine leaves every thread with rights over files, and with gVisor's filter
// of system calls.
func confine() error {
	if err := dropCapabilities(); err != nil {
		return err
	}
	return filter.Install(filter.Options{})
}

// Version of the ABI of capset(2).
const capabilityV3 = 0x20080522

// dropCapabilities takes from every thread what is not over files. Package
// prelude has emptied most of the bounding set, when that took one thread.
func dropCapabilities() error {
	const drop = 24 // PR_CAPBSET_DROP
	for _, c := range prelude.GoferSetup {
		if _, _, err := allThreads(unix.SYS_PRCTL, drop, c, 0); err != 0 {
			return fmt.Errorf("dropping capability %d: %w", c, err)
		}
	}
	var files uint32
	for _, c := range prelude.GoferFiles {
		files |= 1 << c
	}
	header := unix.CapUserHeader{Version: capabilityV3}
	data := [2]unix.CapUserData{{Effective: files, Permitted: files}}
	var pin runtime.Pinner // other threads read it
	defer pin.Unpin()
	pin.Pin(&header)
	pin.Pin(&data)
	if err := capset(&header, &data); err != 0 {
		return fmt.Errorf("giving up capabilities: %w", err)
	}
	return nil
}
