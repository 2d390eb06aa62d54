// Package meminfo says how much memory this machine has.
package meminfo

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Total returns the machine's memory in bytes (MemTotal of proc_meminfo(5)).
func Total() (int64, error) { return read("MemTotal") }

// Available returns the bytes the kernel thinks can be given to new processes
// without swapping (MemAvailable of proc_meminfo(5)).
func Available() (int64, error) { return read("MemAvailable") }

func read(field string) (int64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		rest, ok := strings.CutPrefix(line, field+":")
		if !ok {
			continue
		}
		kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("reading %s of /proc/meminfo: %w", field, err)
		}
		return kb << 10, nil
	}
	return 0, fmt.Errorf("/proc/meminfo has no %s", field)
}
