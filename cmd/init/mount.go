package main

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// mounts is what programs expect, in the order of mounting. gVisor makes all
// of it before PID 1 runs; a virtual machine's kernel makes nothing.
var mounts = []struct {
	target, fstype string
	flags          uintptr
	data           string
}{
	{"/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"/dev", "devtmpfs", unix.MS_NOSUID, "mode=755"},
	{"/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"},
	{"/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
}

// links are names in /dev that the kernel does not make.
var links = []struct{ name, target string }{
	{"/dev/fd", "/proc/self/fd"},
	{"/dev/stdin", "/proc/self/fd/0"},
	{"/dev/stdout", "/proc/self/fd/1"},
	{"/dev/stderr", "/proc/self/fd/2"},
	{"/dev/ptmx", "pts/ptmx"},
}

// mountMissing mounts what is not mounted, and returns what it could not. The
// sandbox goes on without.
func mountMissing() (errs []error) {
	have := mounted()
	for _, m := range mounts {
		if have[m.target] {
			continue
		}
		err := os.MkdirAll(m.target, 0o755)
		if err == nil {
			err = unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s is missing: %w", m.target, err))
		}
	}
	for _, l := range links {
		if _, err := os.Lstat(l.name); os.IsNotExist(err) {
			if err := os.Symlink(l.target, l.name); err != nil {
				errs = append(errs, fmt.Errorf("%s is missing: %w", l.name, err))
			}
		}
	}
	// Daemons of the base system expect it, and an image may lack it.
	if err := os.MkdirAll("/run", 0o755); err != nil {
		errs = append(errs, fmt.Errorf("/run is missing: %w", err))
	}
	return errs
}

// mounted is the set of mount points. Without /proc there is none to read of,
// and nothing else is mounted either.
func mounted() map[string]bool {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil
	}
	return mountPoints(string(b))
}

// mountPoints reads the second field of each line of proc_mounts(5). Targets
// with escaped characters are none of ours.
func mountPoints(text string) map[string]bool {
	m := map[string]bool{}
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) > 1 {
			m[f[1]] = true
		}
	}
	return m
}
