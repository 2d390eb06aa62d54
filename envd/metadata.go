package envd

import (
	"bytes"
	"errors"
	"net/http"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Metadata of a file: request headers at its upload, extended attributes on
// disk, a map in its entry.
const (
	metadataHeader = "X-Metadata-"
	metadataAttr   = "user.e2b."
	// maxMetadata bounds names and values of one file's set, as stored: what
	// ext4 can hold.
	maxMetadata = 4096
	// maxAttrName is the kernel's limit of an attribute's name.
	maxAttrName = 255
	// maxAttrs is the kernel's limit of a list of names and of a value.
	maxAttrs = 64 << 10
)

// parseMetadata reads the set out of an upload's headers; nil if it is empty.
func parseMetadata(h http.Header) (map[string]string, error) {
	var m map[string]string
	total := 0
	for name, vals := range h {
		if len(name) < len(metadataHeader) || !strings.EqualFold(name[:len(metadataHeader)], metadataHeader) {
			continue
		}
		key := strings.ToLower(name[len(metadataHeader):])
		value := strings.Join(vals, ", ")
		switch {
		case key == "":
			return nil, invalid("metadata header %q names no key", name)
		case len(metadataAttr)+len(key) > maxAttrName:
			return nil, invalid("metadata key %q... is longer than %d bytes", key[:32], maxAttrName-len(metadataAttr))
		case !printable(key):
			return nil, invalid("metadata key %q must be printable ASCII", key)
		case !printable(value):
			return nil, invalid("the value of metadata key %q must be printable ASCII", key)
		}
		if m == nil {
			m = map[string]string{}
		}
		if _, ok := m[key]; ok {
			return nil, invalid("metadata key %q is given twice", key)
		}
		m[key] = value
		if total += len(metadataAttr) + len(key) + len(value); total > maxMetadata {
			return nil, invalid("metadata is larger than %d bytes in all", maxMetadata)
		}
	}
	return m, nil
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}

// attrs gives access to the attributes of one file.
type attrs struct {
	list func([]byte) (int, error)
	get  func(string, []byte) (int, error)
}

// pathAttrs does not follow a link at the end of path.
func pathAttrs(path string) attrs {
	return attrs{
		func(b []byte) (int, error) { return unix.Llistxattr(path, b) },
		func(k string, b []byte) (int, error) { return unix.Lgetxattr(path, k, b) },
	}
}

// linkAttrs follows path, which is a descriptor's.
func linkAttrs(path string) attrs {
	return attrs{
		func(b []byte) (int, error) { return unix.Listxattr(path, b) },
		func(k string, b []byte) (int, error) { return unix.Getxattr(path, k, b) },
	}
}

// grow calls fn with a buffer that is large enough, within the kernel's limit.
func grow(fn func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; size = min(size*8, maxAttrs) {
		buf := make([]byte, size)
		n, err := fn(buf)
		switch {
		case err == unix.EINTR:
		case errors.Is(err, unix.ERANGE) && size < maxAttrs:
		case err != nil:
			return nil, err
		default:
			return buf[:n], nil
		}
	}
}

// metadata reads a file's set; nil if there is none, or none may be read.
func (a attrs) metadata() map[string]string {
	names, err := grow(a.list)
	if err != nil {
		return nil
	}
	var m map[string]string
	for name := range bytes.SplitSeq(names, []byte{0}) {
		key, ok := strings.CutPrefix(string(name), metadataAttr)
		if !ok || key == "" || !utf8.ValidString(key) {
			continue
		}
		v, err := grow(func(b []byte) (int, error) { return a.get(string(name), b) })
		if err != nil || !utf8.Valid(v) {
			continue
		}
		if m == nil {
			m = map[string]string{}
		}
		m[key] = string(v)
	}
	return m
}

// setMetadata replaces the set of an open file and returns what is stored: a
// filesystem without attributes stores nothing.
func setMetadata(fd int, m map[string]string) (map[string]string, error) {
	names, err := grow(func(b []byte) (int, error) { return unix.Flistxattr(fd, b) })
	if err != nil {
		if ignorable(err) {
			return nil, nil
		}
		return nil, err
	}
	for name := range bytes.SplitSeq(names, []byte{0}) {
		key, ok := strings.CutPrefix(string(name), metadataAttr)
		if _, keep := m[key]; !ok || keep {
			continue
		}
		if err := unix.Fremovexattr(fd, string(name)); err != nil && !ignorable(err) {
			return nil, err
		}
	}
	for k, v := range m {
		if err := unix.Fsetxattr(fd, metadataAttr+k, []byte(v), 0); err != nil {
			if ignorable(err) {
				return nil, nil
			}
			return nil, err
		}
	}
	return m, nil
}
