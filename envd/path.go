package envd

import (
	"path/filepath"
	"strings"
	"unicode/utf8"
)

// maxPath is the kernel's limit of a path's length, with the final zero.
const maxPath = 4096

// resolvePath makes an absolute, clean path of a client's: empty is the
// default directory, ~ the account's home, and a relative path lies below the
// home. It looks at nothing on disk.
func resolvePath(path string, a *user, workdir string) (string, error) {
	if path == "" {
		path = workdir
	}
	switch {
	case strings.IndexByte(path, 0) >= 0:
		return "", invalid("path must not contain a NUL byte")
	case !utf8.ValidString(path):
		return "", invalid("path is not valid UTF-8")
	case len(path) >= maxPath:
		return "", invalid("path is longer than %d bytes", maxPath-1)
	}
	switch {
	case path == "" || path == "~":
		path = a.home
	case strings.HasPrefix(path, "~/"):
		path = filepath.Join(a.home, path[2:])
	case path[0] == '~':
		return "", invalid("cannot expand user-specific home dir in path '%s'", path)
	case path[0] != '/':
		path = filepath.Join(a.home, path)
	}
	path = filepath.Clean(path)
	if len(path) >= maxPath {
		return "", invalid("path is longer than %d bytes", maxPath-1)
	}
	return path, nil
}

// within reports whether a clean path is dir or lies below it, by its text.
func within(path, dir string) bool {
	return dir == "/" || path == dir || strings.HasPrefix(path, dir+"/")
}
