package envd

import (
	"errors"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
)

// user is an account of the guest.
type user struct {
	name     string
	uid, gid uint32
	groups   []uint32 // all of them, with gid
	home     string
}

// users reads the guest's accounts. Only the two files count: a guest has no
// directory service, and envd is linked without libc.
type users struct {
	passwdFile, groupFile string

	mu     sync.Mutex
	passwd fileID
	group  fileID
	byName map[string]*user
	names  map[uint32]string
	gnames map[uint32]string
}

// fileID tells whether a file is still the one that was read.
type fileID struct {
	ino  uint64
	size int64
	mod  time.Time
}

func identify(path string) fileID {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return fileID{}
	}
	return fileID{ino: st.Ino, size: st.Size, mod: time.Unix(st.Mtim.Unix())}
}

// maxAccounts bounds what is read of an account file; a guest may write
// anything there.
const maxAccounts = 4 << 20

func readLines(path string) []string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	b := make([]byte, 0, 4096)
	for len(b) < maxAccounts {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := f.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if n == 0 || err != nil {
			break
		}
	}
	return strings.Split(string(b), "\n")
}

// refresh reads the files again if they changed. u.mu is held.
func (u *users) refresh() {
	p, g := identify(u.passwdFile), identify(u.groupFile)
	if u.byName != nil && p == u.passwd && g == u.group {
		return
	}
	u.passwd, u.group = p, g
	u.byName = map[string]*user{}
	u.names = map[uint32]string{}
	u.gnames = map[uint32]string{}
	for _, l := range readLines(u.passwdFile) {
		f := strings.Split(l, ":")
		if len(f) < 7 || f[0] == "" || strings.HasPrefix(f[0], "#") {
			continue
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		// The highest number means "unchanged" to the kernel: a thread that
		// was told to become it would stay root.
		if err1 != nil || err2 != nil || uid == noID || gid == noID || u.byName[f[0]] != nil {
			continue
		}
		home := f[5]
		if !strings.HasPrefix(home, "/") {
			home = "/"
		}
		u.byName[f[0]] = &user{name: f[0], uid: uint32(uid), gid: uint32(gid), groups: []uint32{uint32(gid)}, home: home}
		if _, ok := u.names[uint32(uid)]; !ok {
			u.names[uint32(uid)] = f[0]
		}
	}
	for _, l := range readLines(u.groupFile) {
		f := strings.Split(l, ":")
		if len(f) < 4 || f[0] == "" {
			continue
		}
		n, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil || n == noID {
			continue
		}
		gid := uint32(n)
		if _, ok := u.gnames[gid]; !ok {
			u.gnames[gid] = f[0]
		}
		for m := range strings.SplitSeq(f[3], ",") {
			if a := u.byName[strings.TrimSpace(m)]; a != nil && a.gid != gid {
				a.groups = append(a.groups, gid)
			}
		}
	}
}

// lookup returns an account; an unknown one is unauthenticated (401).
func (u *users) lookup(name string) (*user, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.refresh()
	if a := u.byName[name]; a != nil {
		return a, nil
	}
	return nil, faultf(connect.CodeUnauthenticated, "error looking up user '%s': user: unknown user %s", name, name)
}

// owner returns the names of a user and a group, as numbers where unknown.
func (u *users) owner(uid, gid uint32) (string, string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.byName == nil {
		u.refresh()
	}
	un, ok := u.names[uid]
	if !ok {
		un = strconv.FormatUint(uint64(uid), 10)
	}
	gn, ok := u.gnames[gid]
	if !ok {
		gn = strconv.FormatUint(uint64(gid), 10)
	}
	return un, gn
}

// noID is -1 to setresuid(2) and its relatives.
const noID = 1<<32 - 1

var errLostThread = errors.New("the thread's rights could not be changed")

// do runs fn with the rights of the account, as the kernel judges them: the
// thread that runs fn has the account's effective user, group and groups and
// no effective capabilities while it does. fn must not start goroutines that
// do its work.
//
// The real and saved IDs stay root's. File access goes by the effective ones
// alone, while signals and tracing go by the others: so the account cannot
// kill or trace the thread, and the thread can go back. The kernel's
// setfsuid(2), made for this, does not exist under gVisor.
func (a *user) do(fn func() error) error {
	if os.Geteuid() != 0 || a.uid == 0 && a.gid == 0 {
		return fn()
	}
	runtime.LockOSThread()
	// A thread that cannot come back is never unlocked: it serves this
	// goroutine with the lower rights and ends with it.
	ok := true
	defer func() {
		if ok {
			runtime.UnlockOSThread()
		}
	}()
	if err := a.enter(); err != nil {
		ok = leave() == nil
		return err
	}
	defer func() { ok = leave() == nil }()
	return fn()
}

func (a *user) enter() error {
	if err := setgroups(a.groups); err != nil {
		return err
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, noID, uintptr(a.gid), noID); e != 0 {
		return errors.Join(errLostThread, e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, noID, uintptr(a.uid), noID); e != 0 {
		return errors.Join(errLostThread, e)
	}
	return nil
}

// leave makes the thread root's again. It goes by the calls' own answers:
// they cannot succeed in part.
func leave() error {
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, noID, 0, noID); e != 0 {
		return errors.Join(errLostThread, e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, noID, 0, noID); e != 0 {
		return errors.Join(errLostThread, e)
	}
	return setgroups(nil)
}

// setgroups changes the groups of this thread alone, unlike [unix.Setgroups].
func setgroups(g []uint32) error {
	var p unsafe.Pointer
	if len(g) > 0 {
		p = unsafe.Pointer(&g[0])
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(g)), uintptr(p), 0); e != 0 {
		return errors.Join(errLostThread, e)
	}
	return nil
}

// with is do for a function with a result.
func with[T any](a *user, fn func() (T, error)) (T, error) {
	var v T
	err := a.do(func() (err error) {
		v, err = fn()
		return err
	})
	return v, err
}

func isNotExist(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}
