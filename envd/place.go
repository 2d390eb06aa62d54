package envd

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Every function of this file is called inside user.do: the kernel judges.
//
// Paths are opened with RESOLVE_NO_MAGICLINKS. The kernel lets a thread follow
// /proc/self/fd/N of its own process whatever its user is, so without it an
// account could reach, by a path, what envd holds open for another one.
//
// gVisor follows a symbolic link despite O_NOFOLLOW|O_DIRECTORY, so wherever a
// link must not be followed, the opened inode is compared with the one that
// was looked at before.

// place is a name in an open directory. What happens to the path above does
// not matter any more.
type place struct {
	dir  int // O_PATH
	name string
}

func (p place) close() { unix.Close(p.dir) }

// lstat looks at the name itself, not at what a link points to.
func (p place) lstat() (unix.Stat_t, error) { return lstatAt(p.dir, p.name) }

func lstatAt(dir int, name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	for {
		err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err != unix.EINTR {
			return st, err
		}
	}
}

func fstat(fd int) (unix.Stat_t, error) {
	var st unix.Stat_t
	for {
		err := unix.Fstat(fd, &st)
		if err != unix.EINTR {
			return st, err
		}
	}
}

func isDir(st *unix.Stat_t) bool     { return st.Mode&unix.S_IFMT == unix.S_IFDIR }
func isRegular(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFREG }
func isLink(st *unix.Stat_t) bool    { return st.Mode&unix.S_IFMT == unix.S_IFLNK }

func sameFile(a, b *unix.Stat_t) bool { return a.Dev == b.Dev && a.Ino == b.Ino }

// openAt opens a path from dir. The descriptor is the caller's to close.
func openAt(dir int, path string, flags int, mode uint32) (int, error) {
	how := &unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: unix.RESOLVE_NO_MAGICLINKS}
	if flags&unix.O_CREAT != 0 {
		how.Mode = uint64(mode)
	}
	for {
		fd, err := unix.Openat2(dir, path, how)
		switch err {
		case nil:
			return fd, nil
		case unix.EINTR, unix.EAGAIN:
		default:
			return -1, err
		}
	}
}

func openPath(path string, flags int) (int, error) {
	return openAt(unix.AT_FDCWD, path, flags, 0)
}

// openChild opens a directory below dir that is known to be none of another
// name's: want is what lstat said about the name.
func openChild(dir int, name string, want *unix.Stat_t) (int, error) {
	fd, err := openAt(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return -1, err
	}
	got, err := fstat(fd)
	if err == nil && !sameFile(&got, want) {
		err = unix.ENOTDIR
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// placeOf opens the directory that holds a path's last name.
func placeOf(path string) (place, error) {
	dir, name := filepath.Split(path)
	if name == "" {
		name = "."
	}
	fd, err := openPath(dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return place{}, err
	}
	return place{fd, name}, nil
}

// makeDirs opens a directory and makes it, and its parents, if it is missing.
func makeDirs(path string) (int, error) {
	fd, err := openPath(path, unix.O_PATH|unix.O_DIRECTORY)
	if err != unix.ENOENT || path == "/" {
		return fd, err
	}
	parent, err := makeDirs(filepath.Dir(path))
	if err != nil {
		return -1, err
	}
	defer unix.Close(parent)
	name := filepath.Base(path)
	if err := unix.Mkdirat(parent, name, 0o755); err != nil && err != unix.EEXIST {
		return -1, err
	}
	return openAt(parent, name, unix.O_PATH|unix.O_DIRECTORY, 0)
}

// fdLink is a descriptor as a path, for calls that take no descriptor.
func fdLink(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// fdPath is where an open file is now, every link resolved.
func fdPath(fd int) (string, error) {
	buf := make([]byte, maxPath+len(" (deleted)"))
	for {
		n, err := unix.Readlink(fdLink(fd), buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return "", err
		}
		if n == len(buf) || n == 0 || buf[0] != '/' {
			return "", unix.ENAMETOOLONG
		}
		return string(buf[:n]), nil
	}
}

// Files that an upload has not finished yet lie beside their target under a
// name that only this process can make, so that listings and watchers can
// leave them out and nobody else can hide a file that way.
const (
	tempPrefix   = ".envd-"
	tempCreates  = 'c' // the target is new
	tempReplaces = 'r' // the target exists
)

// secretKey is made when it is first asked for, or is that of the envd before.
type secretKey struct {
	mu  sync.Mutex
	key []byte
}

func (k *secretKey) get() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.key == nil {
		k.key = make([]byte, 32)
		rand.Read(k.key)
	}
	return k.key
}

// inherit takes another key over, unless that is none.
func (k *secretKey) inherit(key []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(key) > 0 {
		k.key = key
	}
}

var tempKey secretKey

func tempSum(s string) string {
	h := hmac.New(sha256.New, tempKey.get())
	h.Write([]byte(s))
	return hex.EncodeToString(h.Sum(nil)[:12])
}

func tempName(kind byte) string {
	b := make([]byte, 8)
	rand.Read(b)
	s := string(kind) + hex.EncodeToString(b)
	return tempPrefix + s + tempSum(s)
}

// tempKind tells whether a name is one of tempName's, and for what; else 0.
func tempKind(name string) byte {
	s, ok := strings.CutPrefix(name, tempPrefix)
	const n = 1 + 16
	if !ok || len(s) != n+24 || !hmac.Equal([]byte(tempSum(s[:n])), []byte(s[n:])) {
		return 0
	}
	return s[0]
}

// ignorable are errors of an extended attribute on a filesystem or file that
// has none.
func ignorable(err error) bool {
	return errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENODATA)
}
