package doctor

import (
	"strconv"
	"strings"
)

// mount is one line of proc_pid_mountinfo(5).
type mount struct {
	point, fsType, source string
	options               []string
}

func (d *Doctor) mounts() ([]mount, error) {
	text, err := d.read("proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(text), nil
}

// parseMounts leaves out lines it does not understand.
func parseMounts(text string) []mount {
	var out []mount
	for line := range strings.Lines(text) {
		head, tail, ok := strings.Cut(strings.TrimSpace(line), " - ")
		h, t := strings.Fields(head), strings.Fields(tail)
		if !ok || len(h) < 6 || len(t) < 2 {
			continue
		}
		out = append(out, mount{point: unescape(h[4]), fsType: t[0], source: unescape(t[1]), options: strings.Split(h[5], ",")})
	}
	return out
}

// unescape undoes the kernel's \ooo for white space and backslashes.
func unescape(s string) string {
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

// mountOf returns the mount that a path is on: the one with the longest mount
// point above it, and of several on one point the last, which hides the others.
func mountOf(ms []mount, path string) (mount, bool) {
	var best mount
	found := false
	for _, m := range ms {
		if below(path, m.point) && (!found || len(m.point) >= len(best.point)) {
			best, found = m, true
		}
	}
	return best, found
}

// below reports whether path is dir or in it.
func below(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, strings.TrimRight(dir, "/")+"/")
}
