package envd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// Bounds of events that wait for their client, in bytes. Beyond them the
// kernel's queue fills, and when that overflows the watcher ends.
const (
	maxHeld    = 8 << 20  // of one watcher
	maxHeldAll = 32 << 20 // of all
	changeSize = 64       // what one takes beside its name
)

// budget counts bytes that all watchers hold.
type budget struct{ atomic.Int64 }

// change is one event for a client. name is relative to the watched directory.
type change struct {
	name string
	kind pb.EventType
}

const watchMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_MODIFY |
	unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

// watcher follows a directory, and with recursive what is below it, by an
// inotify instance of its own.
//
// A directory is opened with the account's rights and watched through that
// descriptor: gVisor does not ask for the right to read when it adds a watch.
type watcher struct {
	s                           *Server
	u                           *user
	path                        string
	recursive, entries, network bool

	live  atomic.Bool   // start has returned
	ready chan struct{} // a token when there is something to take
	room  chan struct{} // a token when something was taken
	done  chan struct{} // closed by close

	mu     sync.Mutex
	file   *os.File // nil before start and after close
	conn   syscall.RawConn
	dirs   map[int32]string // watched directories by their path below the root, "" itself
	events []change
	cost   int
	err    error // why no more events come
	ended  bool

	// fresh are names that a scan of a new directory has reported already,
	// and whether they are watched; the kernel may report them too. Forgotten
	// when the queue is empty.
	fresh map[string]bool
	// leaving are directories whose name was moved away, by the cookie of the
	// move. If its other half does not show up, they have left the tree.
	leaving map[int32]departure
	hidden  uint32 // cookie of an upload that takes the place of a file
}

type departure struct {
	cookie uint32
	name   string // of the directory that was moved
}

func newWatcher(s *Server, u *user, path string) *watcher {
	return &watcher{s: s, u: u, path: path,
		ready: make(chan struct{}, 1), room: make(chan struct{}, 1), done: make(chan struct{}),
		dirs: map[int32]string{}, fresh: map[string]bool{}, leaving: map[int32]departure{}}
}

// start opens the watch. When it returns, nothing that happens is missed.
func (w *watcher) start() error {
	root, err := with(w.u, func() (int, error) {
		fd, err := openPath(w.path, unix.O_RDONLY|unix.O_DIRECTORY)
		if err == unix.ENOTDIR {
			if p, perr := openPath(w.path, unix.O_PATH); perr == nil {
				unix.Close(p)
				return -1, invalid("path is not a directory: %s", w.path)
			}
		}
		return fd, err
	})
	if err != nil {
		return err
	}
	if !w.network && onNetwork(root) {
		unix.Close(root)
		return invalid("path %s is on a network filesystem, whose changes by others the kernel does not report; "+
			"allow network mounts to watch it all the same", w.path)
	}
	fd, err := w.s.inotifyInit()
	if err != nil {
		unix.Close(root)
		return faultf(connect.CodeResourceExhausted, "opening a watcher: %v", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	conn, err := f.SyscallConn()
	if err != nil {
		unix.Close(root)
		f.Close()
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		unix.Close(root)
		f.Close()
		return errEnded
	}
	w.file, w.conn = f, conn
	if w.enter(fd, root, "", scanQuiet); w.err != nil {
		return w.err
	}
	w.live.Store(true)
	go w.run()
	return nil
}

// inotifyInit opens an instance. A kernel's default of 128 per account is too
// few for a sandbox, where envd is the one account that watches for all.
func (s *Server) inotifyInit() (int, error) {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err == unix.EMFILE && s.cfg.System {
		const limit = "/proc/sys/fs/inotify/max_user_instances"
		if os.WriteFile(limit, []byte("8192"), 0) == nil {
			fd, err = unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
		}
	}
	return fd, err
}

// Filesystems whose changes by other machines the kernel does not see.
var networkTypes = map[uint32]bool{
	unix.NFS_SUPER_MAGIC: true, unix.SMB_SUPER_MAGIC: true, unix.CIFS_SUPER_MAGIC: true,
	unix.SMB2_SUPER_MAGIC: true, unix.FUSE_SUPER_MAGIC: true,
}

func onNetwork(fd int) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(fd, &st) == nil && networkTypes[uint32(st.Type)]
}

// close ends the watcher. It may be called twice.
func (w *watcher) close() {
	w.mu.Lock()
	f := w.file
	w.file = nil
	if !w.ended {
		w.ended = true
		close(w.done)
		w.s.watchers.held.Add(-int64(w.cost))
		w.events, w.cost = nil, 0
	}
	w.fail(errEnded)
	w.mu.Unlock()
	if f != nil {
		f.Close()
	}
	w.s.watchers.drop(w)
}

// run takes events in as they come.
func (w *watcher) run() {
	for {
		full := false
		err := w.conn.Read(func(fd uintptr) bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			empty := w.drain(int(fd))
			full = !empty
			return full || w.err != nil
		})
		if err != nil {
			return // closed
		}
		w.mu.Lock()
		over := w.err != nil
		w.mu.Unlock()
		if over {
			return
		}
		if full {
			select {
			case <-w.room:
			case <-w.done:
				return
			}
		}
	}
}

// sync takes in what the kernel has now.
func (w *watcher) sync() {
	w.mu.Lock()
	conn, open := w.conn, w.file != nil
	w.mu.Unlock()
	if !open {
		return
	}
	_ = conn.Control(func(fd uintptr) { // fails only for a closed one
		w.mu.Lock()
		defer w.mu.Unlock()
		w.drain(int(fd))
	})
}

// take hands over what has gathered; err tells that no more will come.
func (w *watcher) take() ([]change, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	evs := w.events
	w.s.watchers.held.Add(-int64(w.cost))
	w.events, w.cost = nil, 0
	select {
	case w.room <- struct{}{}:
	default:
	}
	return evs, w.err
}

func (w *watcher) fail(err error) {
	if w.err == nil {
		w.err = err
	}
	w.wake()
}

func (w *watcher) wake() {
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

func (w *watcher) lost() {
	w.fail(faultf(connect.CodeResourceExhausted,
		"events were lost: there were more changes below %s than were taken; list it and watch again", w.path))
}

// emit adds an event. What repeats the last one says nothing new.
func (w *watcher) emit(name string, kind pb.EventType) {
	if w.ended || w.err != nil {
		return
	}
	ev := change{name, kind}
	if n := len(w.events); n > 0 && w.events[n-1] == ev &&
		(kind == pb.EventType_EVENT_TYPE_WRITE || kind == pb.EventType_EVENT_TYPE_CHMOD) {
		return
	}
	size := changeSize + len(name)
	if w.cost+size > 2*maxHeld {
		w.lost() // only a scan can go so far
		return
	}
	w.events = append(w.events, ev)
	w.cost += size
	w.s.watchers.held.Add(int64(size))
	w.wake()
}

// drain reads the kernel's queue until it is empty, which it reports, or until
// too much waits for the client. w.mu is held.
func (w *watcher) drain(fd int) (empty bool) {
	if w.file == nil {
		return true
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for w.err == nil {
		if w.cost > maxHeld || w.cost > 0 && w.s.watchers.held.Load() > maxHeldAll {
			return false
		}
		n, err := unix.Read(fd, *buf)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			clear(w.fresh)
			w.flush(fd)
			return true
		case err != nil:
			w.fail(fmt.Errorf("reading the events of %s: %w", w.path, err))
			return true
		case n == 0:
			w.fail(fmt.Errorf("reading the events of %s: %w", w.path, io.ErrUnexpectedEOF))
			return true
		}
		w.parse(fd, (*buf)[:n])
	}
	return true
}

// parse splits what was read (inotify(7)) into events.
func (w *watcher) parse(fd int, b []byte) {
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(b))
		mask := binary.NativeEndian.Uint32(b[4:])
		cookie := binary.NativeEndian.Uint32(b[8:])
		size := int(binary.NativeEndian.Uint32(b[12:]))
		b = b[unix.SizeofInotifyEvent:]
		if size < 0 || size > len(b) {
			return
		}
		name, _, _ := bytes.Cut(b[:size], []byte{0})
		b = b[size:]
		w.event(fd, wd, mask, cookie, string(name))
	}
}

// event turns one event of the kernel into those of the contract.
func (w *watcher) event(fd int, wd int32, mask, cookie uint32, base string) {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		w.lost()
		return
	}
	dir, ok := w.dirs[wd]
	if !ok {
		return
	}
	if mask&unix.IN_IGNORED != 0 {
		delete(w.dirs, wd)
		delete(w.leaving, wd)
		return
	}
	has := func(bits uint32) bool { return mask&bits != 0 }
	if base == "" {
		// About the directory itself. Below the root, its parent says the same.
		if dir != "" {
			return
		}
		if has(unix.IN_ATTRIB) {
			w.emit(".", pb.EventType_EVENT_TYPE_CHMOD)
		}
		if has(unix.IN_DELETE_SELF) {
			w.emit(".", pb.EventType_EVENT_TYPE_REMOVE)
		}
		if has(unix.IN_MOVE_SELF) {
			w.emit(".", pb.EventType_EVENT_TYPE_RENAME)
		}
		return
	}
	if k := tempKind(base); k != 0 {
		if k == tempReplaces && has(unix.IN_MOVED_FROM) {
			w.hidden = cookie // the write that follows is the event
		}
		return
	}
	name := base
	if dir != "" {
		name = dir + "/" + base
	}
	follow := w.recursive && has(unix.IN_ISDIR)
	if has(unix.IN_CREATE | unix.IN_MOVED_TO) {
		w.appeared(fd, name, cookie, has(unix.IN_MOVED_TO), follow)
	}
	if has(unix.IN_MODIFY) {
		w.emit(name, pb.EventType_EVENT_TYPE_WRITE)
	}
	if has(unix.IN_ATTRIB) {
		w.emit(name, pb.EventType_EVENT_TYPE_CHMOD)
	}
	if has(unix.IN_DELETE) {
		delete(w.fresh, name)
		w.emit(name, pb.EventType_EVENT_TYPE_REMOVE)
	}
	if has(unix.IN_MOVED_FROM) {
		delete(w.fresh, name)
		w.emit(name, pb.EventType_EVENT_TYPE_RENAME)
		if follow {
			for wd, d := range w.dirs {
				if d == name || strings.HasPrefix(d, name+"/") {
					w.leaving[wd] = departure{cookie, name}
				}
			}
		}
	}
}

// appeared handles a name that is new in a watched directory.
func (w *watcher) appeared(fd int, name string, cookie uint32, moved, follow bool) {
	entered, seen := w.fresh[name]
	switch {
	case moved && cookie != 0 && cookie == w.hidden:
		w.hidden = 0
	case seen:
		delete(w.fresh, name)
	default:
		w.emit(name, pb.EventType_EVENT_TYPE_CREATE)
	}
	if !follow || entered {
		return
	}
	if moved {
		within := false
		for wd, m := range w.leaving {
			if m.cookie == cookie {
				w.dirs[wd] = name + strings.TrimPrefix(w.dirs[wd], m.name)
				delete(w.leaving, wd)
				within = true
			}
		}
		if within {
			return
		}
	}
	w.follow(fd, name, moved)
}
