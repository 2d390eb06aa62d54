package gvisor

import "path/filepath"

// HostNames returns where the host objects of a runtime directory are, for
// those who look for what it left behind: the directory that holds one
// directory for each instance, which is also in the command line of every
// engine process, and the path below each cgroup hierarchy that holds one
// cgroup for each instance.
func HostNames(dir string) (instances, cgroupParent string) {
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	return home(dir).instances(), home(dir).cgroupParent()
}
