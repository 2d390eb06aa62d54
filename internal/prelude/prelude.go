// Package prelude does what an engine process has to do before anything else
// of it is initialised: it imports next to nothing, so that the language's order
// of initialisation (dependencies first, then by import path) runs it before
// nearly every other package of a large program.
//
// Two of gVisor's processes begin with a step that needs nothing of gVisor.
// Taken here it costs a start of the Go runtime, a millisecond; taken where
// gVisor has it, it costs a start of the whole program, or the synchronisation
// of all its threads.
//
//   - The sandbox drops its capability bounding set, forty system calls on each
//     thread. Here it has one thread that matters: the one that executes the
//     program anew, which keeps the set.
//   - The helper that takes /proc from the sandbox waits for a byte and makes
//     one system call.
//   - The file server is a program of its own, which this one only has to
//     execute, with a bounding set of what it needs.
package prelude

import (
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
)

// Mark begins a flag of gVisor without an effect: it excludes commands that do
// not exist from the debug log. A sandbox whose command line has it begins in
// the short way of this package; every other one as gVisor would by itself. What
// follows it, after commas, is for runtime/gvisor.
const Mark = "--debug-command=!short"

// SelfExe is argv[0] of the helpers of a sandbox that has [Mark]; it is a
// spelling of /proc/self/exe.
const SelfExe = "/proc/self/./exe"

func init() {
	args := os.Args
	if len(args) > 0 && strings.HasPrefix(args[0], "runsc-") {
		runtime.MemProfileRate = 0 // nobody can ask a sandbox for a profile: a table less
	}
	switch {
	case IsSandbox(args) && slices.Contains(args, "--setup-root"):
		trim(args)
	case IsOwnGofer(args):
		if path, args := goferProgram(args); path != "" {
			ownGofer(path, args)
		}
	case slices.Equal(args, []string{SelfExe, "umount", "--sync-fd=3", "/proc"}):
		os.Exit(umount(3, "/proc"))
	}
}

// IsSandbox reports whether a command line is that of a marked sandbox.
func IsSandbox(args []string) bool {
	return len(args) > 0 && args[0] == "runsc-sandbox" &&
		slices.ContainsFunc(args, func(a string) bool { return strings.HasPrefix(a, Mark) })
}

// GoferOption is the option after [Mark] that names the program that is to be
// the file server of a sandbox. Its path has no comma.
const GoferOption = "gofer="

// RootOption is the option after [Mark] of a sandbox that was started before
// its guest is known: it names the socket from which its file server, which has
// to be the one of [GoferOption], gets the root directory. Its path has no comma.
const RootOption = "root="

// RootSocket returns what [RootOption] names on a command line, or "".
func RootSocket(args []string) string {
	for _, a := range args {
		options, _ := strings.CutPrefix(a, Mark+",")
		if options == a {
			continue
		}
		for o := range strings.SplitSeq(options, ",") {
			if path, ok := strings.CutPrefix(o, RootOption); ok {
				return path
			}
		}
	}
	return ""
}

// goferProgram returns the path of the file server's program, and the command
// line without it.
func goferProgram(args []string) (path string, rest []string) {
	rest = slices.Clone(args)
	for i, a := range rest {
		options, ok := strings.CutPrefix(a, Mark+",")
		if !ok {
			continue
		}
		kept := Mark
		for o := range strings.SplitSeq(options, ",") {
			if p, ok := strings.CutPrefix(o, GoferOption); ok {
				path = p
			} else {
				kept += "," + o
			}
		}
		rest[i] = kept
	}
	return path, rest
}

// IsOwnGofer reports whether a command line is that of a marked sandbox's file
// server, in the one configuration that runtime/gvisor/gofer knows: a root
// directory without other mounts, and no log.
func IsOwnGofer(args []string) bool {
	return len(args) > 0 && args[0] == "runsc-gofer" &&
		slices.ContainsFunc(args, func(a string) bool { return strings.HasPrefix(a, Mark) }) &&
		slices.Contains(args, "--gofer-mount-confs=lisafs:none") &&
		!slices.ContainsFunc(args, func(a string) bool {
			return strings.HasPrefix(a, "--debug-log-fd=") || strings.HasPrefix(a, "--dev-io-fd=")
		})
}

// Capabilities of the file server: over files (chown, dac_override,
// dac_read_search, fowner, fsetid), and until it is confined for its root
// directory and for giving them up (setpcap, sys_chroot, sys_admin).
var (
	GoferFiles = []uintptr{0, 1, 2, 3, 4}
	GoferSetup = []uintptr{8, 18, 21}
)

// ownGofer executes the file server's program. When that fails it returns, and
// gVisor's own serves.
func ownGofer(path string, args []string) {
	for c := uintptr(0); ; c++ {
		has, err := prctl(prCapbsetRead, c, 0)
		if err != 0 {
			break // the kernel knows no more
		}
		if has == 0 || slices.Contains(GoferFiles, c) || slices.Contains(GoferSetup, c) {
			continue
		}
		if _, err := prctl(prCapbsetDrop, c, 0); err != 0 {
			return
		}
	}
	_ = syscall.Exec(path, args, nil)
}

// The operations of prctl(2) on capabilities.
const (
	prCapbsetRead     = 23
	prCapbsetDrop     = 24
	prCapAmbient      = 47
	prCapAmbientLower = 3
)

// needed are what the sandbox makes its root directory with, and then gives up:
// CAP_SYS_CHROOT and CAP_SYS_ADMIN. They are rights in its own user namespace.
var needed = []uintptr{18, 21}

// Trimmed reports whether the process has the empty bounding set that this
// package gives to marked sandboxes, and so no capability but those it needs
// for its root directory.
var Trimmed bool

// trim empties the bounding set and executes the program again, which then has
// neither that nor the right to change one, and of its ambient capabilities the
// needed ones. When the set is empty already it notes so and returns. It also
// returns when something fails: gVisor then does everything.
func trim(args []string) {
	trimmed := true
	for c := uintptr(0); ; c++ {
		has, err := prctl(prCapbsetRead, c, 0)
		if err == syscall.EINVAL && c > 0 {
			break // the kernel knows no more
		}
		if err != 0 {
			return
		}
		if has == 0 {
			continue
		}
		trimmed = false
		if _, err := prctl(prCapbsetDrop, c, 0); err != 0 {
			return
		}
		if !slices.Contains(needed, c) {
			if _, err := prctl(prCapAmbient, prCapAmbientLower, c); err != 0 {
				return
			}
		}
	}
	if trimmed {
		Trimmed = true
		return
	}
	_ = syscall.Exec("/proc/self/exe", args, os.Environ()) // without success we go on as we are
}

// prctl is prctl(2), for this thread.
func prctl(op, a, b uintptr) (uintptr, syscall.Errno) {
	r, _, err := syscall.RawSyscall6(syscall.SYS_PRCTL, op, a, b, 0, 0, 0)
	return r, err
}

// umount takes a mount away when a byte comes from fd, and returns the exit
// status.
func umount(fd int, path string) int {
	var b [1]byte
	for {
		n, err := syscall.Read(fd, b[:])
		switch {
		case err == syscall.EINTR:
			continue
		case err != nil || n != 1:
			return 1
		}
		break
	}
	if syscall.Unmount(path, syscall.MNT_DETACH) != nil {
		return 1
	}
	return 0
}
