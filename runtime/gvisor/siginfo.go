package gvisor

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// siginfoPID reads si_pid, which package unix does not name: the first field
// after signal, error and code, at the union's alignment (siginfo_t of
// sigaction(2), 64-bit layout).
func siginfoPID(i *unix.Siginfo) int {
	return int(*(*int32)(unsafe.Add(unsafe.Pointer(i), 16)))
}
