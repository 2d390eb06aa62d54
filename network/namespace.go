package network

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/wholefile"
)

// threadNS is the network namespace of the calling thread. Namespaces belong
// to threads, so "self" would name the main thread's.
const threadNS = "/proc/thread-self/ns/net"

// onThread runs f on an OS thread of its own, which ends with f: whatever
// namespace f has put the thread in, no other goroutine ever runs there.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread does not die with its goroutine, and its
			// namespace is what /proc shows as the process's. Held here, it
			// leaves another thread for f.
			defer runtime.UnlockOSThread()
			done <- onThread(f)
			return
		}
		done <- f() // never unlocked: the thread dies with the goroutine
	}()
	return <-done
}

// inNamespace runs f on a thread in the network namespace that is open as ns.
func inNamespace(ns *os.File, f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return f()
	})
}

// newNamespace moves the calling thread, which must be one of onThread, into a
// fresh network namespace, pins the namespace to path and returns it open.
func newNamespace(path string) (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, os.NewSyscallError("unshare", err)
	}
	file, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return nil, err
	}
	file.Close()
	if err := unix.Mount(threadNS, path, "", unix.MS_BIND, ""); err != nil {
		return nil, &fs.PathError{Op: "mount", Path: path, Err: err}
	}
	return os.Open(path)
}

// unpin removes the name of a namespace. The namespace goes when nothing else
// holds it. An absent name is no error.
func unpin(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // no mount there, any more
		}
		if err != nil {
			return &fs.PathError{Op: "unmount", Path: path, Err: err}
		}
	}
	return wholefile.Remove(path)
}

// inodeOf returns the identity of the namespace pinned at path, and 0 when
// path pins none.
func inodeOf(path string) uint64 {
	var s unix.Statfs_t
	if unix.Statfs(path, &s) != nil || s.Type != unix.NSFS_MAGIC {
		return 0
	}
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Ino
}

// occupants returns the processes whose main thread is in one of the
// namespaces.
func occupants(inodes ...uint64) ([]int, error) {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []int
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(filepath.Join("/proc", p.Name(), "ns/net"), &st) != nil {
			continue // it has ended, or is a zombie: neither holds a namespace
		}
		for _, ino := range inodes {
			if ino != 0 && st.Ino == ino {
				out = append(out, pid)
				break
			}
		}
	}
	return out, nil
}

// sysctl writes a kernel setting of the calling thread's network namespace.
func sysctl(name, value string) error {
	return os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0)
}

func readSysctl(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join("/proc/sys/net", name))
	for len(b) > 0 && b[len(b)-1] == '\n' {
		b = b[:len(b)-1]
	}
	return string(b), err
}
