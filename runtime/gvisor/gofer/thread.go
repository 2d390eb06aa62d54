package gofer

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// allThreads makes a system call on every thread of the process.
func allThreads(trap, a, b, c uintptr) (r1, r2 uintptr, err syscall.Errno) {
	return syscall.AllThreadsSyscall(trap, a, b, c)
}

// capset is capset(2) for every thread.
func capset(h *unix.CapUserHeader, d *[2]unix.CapUserData) syscall.Errno {
	_, _, err := allThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(h)), uintptr(unsafe.Pointer(d)), 0)
	return err
}
