package disk

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// mountEntry is one line of /proc/self/mountinfo (Documentation/filesystems/proc.rst, 3.5).
type mountEntry struct {
	Point   string
	FSType  string
	Source  string
	Options string // of the file system
}

func readMounts() ([]mountEntry, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(string(b))
}

func parseMounts(text string) ([]mountEntry, error) {
	var out []mountEntry
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if line == "" {
			continue
		}
		// ID, parent, device, root, mount point, options, optional fields, "-",
		// type, source, options of the file system.
		head, tail, ok := strings.Cut(line, " - ")
		h, t := strings.Split(head, " "), strings.Split(tail, " ")
		if !ok || len(h) < 6 || len(t) < 2 {
			return nil, fmt.Errorf("unknown line in the mount table: %q", line)
		}
		m := mountEntry{Point: unescape(h[4]), FSType: t[0], Source: unescape(t[1])}
		if len(t) > 2 {
			m.Options = t[2] // unescaped per option: an escaped comma is no separator
		}
		out = append(out, m)
	}
	return out, nil
}

// unescape undoes the kernel's \ooo for space, tab, newline, backslash and comma.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// usesLower reports whether the mount is an overlay with dir among its lower
// layers.
func (m mountEntry) usesLower(dir string) bool {
	if m.FSType != "overlay" {
		return false
	}
	for opt := range strings.SplitSeq(m.Options, ",") {
		key, val, _ := strings.Cut(opt, "=")
		if (key == "lowerdir" || key == "lowerdir+") && slices.Contains(strings.Split(unescape(val), ":"), dir) {
			return true
		}
	}
	return false
}
