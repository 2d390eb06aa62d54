package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// makeGroups divides the sandbox's cgroup v2 hierarchy: "cay" holds PID 1 and
// envd, "user" the processes of users, "system" those that are never frozen.
// Each of the latter two may hold pids tasks; 0 means no limit. It returns the
// directory of "user".
//
// gVisor allows no processes beside subgroups in the root either, so PID 1
// moves before the controller is handed down.
func makeGroups(root string, pids int) (string, error) {
	own := filepath.Join(root, "cay")
	if err := os.MkdirAll(own, 0o755); err != nil {
		return "", fmt.Errorf("making a cgroup: %w", err)
	}
	if err := write(filepath.Join(own, "cgroup.procs"), "1"); err != nil {
		return "", fmt.Errorf("moving PID 1 into a cgroup: %w", err)
	}
	if err := write(filepath.Join(root, "cgroup.subtree_control"), "+pids"); err != nil {
		return "", fmt.Errorf("handing the pids controller down: %w", err)
	}
	user := filepath.Join(root, "user")
	for _, dir := range []string{user, filepath.Join(root, "system")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", fmt.Errorf("making a cgroup: %w", err)
		}
		if pids == 0 {
			continue
		}
		if err := write(filepath.Join(dir, "pids.max"), strconv.Itoa(pids)); err != nil {
			return "", fmt.Errorf("limiting the processes of users: %w", err)
		}
	}
	return user, nil
}

// write writes to a file of the kernel, which must be there.
func write(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(text)
	return err
}
