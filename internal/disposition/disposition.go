// Package disposition says what becomes of the signals that Go leaves alone: 32
// to 34, of which the C library has the first two for itself.
//
// PID 1 has a handler for no signal but those that Go knows, and need not, it
// would seem: the kernel does not deliver to it what it has no handler for. But
// if its first thread blocks all signals just then, as Go's do while they start
// a process, the kernel chooses another thread, and ends them all
// (complete_signal of kernel/signal.c). So PID 1 ignores them, and envd, which
// inherits that, takes it back for its own children.
package disposition

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// left are the signals that os/signal sets no handler for.
var left = []syscall.Signal{32, 33, 34}

// The handlers of <signal.h> that are none.
const (
	sigDfl = 0
	sigIgn = 1
)

// IgnoreRest ignores what os/signal cannot handle, unless it has a handler.
func IgnoreRest() error { return turn(sigDfl, sigIgn) }

// RestoreRest takes back an inherited [IgnoreRest].
func RestoreRest() error { return turn(sigIgn, sigDfl) }

func turn(from, to uintptr) error {
	for _, s := range left {
		var a action
		if err := sigaction(s, nil, &a); err != nil {
			return err
		}
		if a.handler != from {
			continue
		}
		if err := sigaction(s, &action{handler: to}, nil); err != nil {
			return err
		}
	}
	return nil
}

// action is struct sigaction of the kernel, of rt_sigaction(2), on amd64 and
// arm64.
type action struct {
	handler  uintptr
	flags    uint64
	restorer uintptr
	mask     uint64
}

func sigaction(s syscall.Signal, to, from *action) error {
	_, _, e := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(to)), uintptr(unsafe.Pointer(from)), unsafe.Sizeof(action{}.mask), 0, 0)
	if e != 0 {
		return os.NewSyscallError("rt_sigaction", e)
	}
	return nil
}
