package envd

import (
	"fmt"
	"io"
	"os"
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

	mu   sync.Mutex
	file *os.File // nil before start and after close
	conn syscall.RawConn
	tree
	queue  pending // from the kernel
	events []change
	cost   int   // of events
	err    error // why no more events come
	ended  bool
}

func newWatcher(s *Server, u *user, path string) *watcher {
	return &watcher{s: s, u: u, path: path,
		ready: make(chan struct{}, 1), room: make(chan struct{}, 1), done: make(chan struct{}), tree: newTree()}
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
	if w.begin(fd, root); w.err != nil {
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
		w.s.watchers.held.Add(-int64(w.cost + w.queue.cost))
		w.events, w.cost, w.queue = nil, 0, pending{}
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

// drain judges what the kernel's queue has until that is empty, which it
// reports, or until too much waits for the client. w.mu is held.
func (w *watcher) drain(fd int) (empty bool) {
	if w.file == nil {
		return true
	}
	for w.err == nil {
		if w.cost > maxHeld || w.cost > 0 && w.s.watchers.held.Load() > maxHeldAll {
			return false
		}
		if w.queue.empty() && !w.pull(fd) && !w.lookAgain(fd) {
			return true
		}
		for !w.queue.empty() && w.err == nil && w.cost <= maxHeld {
			r := w.queue.pop()
			w.s.watchers.held.Add(-int64(r.cost()))
			w.event(fd, r)
		}
	}
	return true
}

// pull moves what the kernel has, a buffer of it, to the queue, and reports
// whether there was anything.
func (w *watcher) pull(fd int) bool {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := unix.Read(fd, *buf)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return false
		case err == nil && n == 0:
			err = io.ErrUnexpectedEOF
			fallthrough
		case err != nil:
			w.fail(fmt.Errorf("reading the events of %s: %w", w.path, err))
			return false
		}
		before := w.queue.cost
		parse((*buf)[:n], w.queue.push)
		w.s.watchers.held.Add(int64(w.queue.cost - before))
		return true
	}
}

// pullAll moves all that the kernel has to the queue. It is for scans, which
// must know what has happened until then.
func (w *watcher) pullAll(fd int) {
	for w.err == nil && w.pull(fd) {
		if w.queue.cost > maxHeld || w.s.watchers.held.Load() > 2*maxHeldAll {
			w.lost()
		}
	}
}

// event turns one event of the kernel into those of the contract.
func (w *watcher) event(fd int, r raw) {
	if r.has(unix.IN_Q_OVERFLOW) {
		w.lost()
		return
	}
	dir, ok := w.dirs[r.wd]
	if !ok {
		return
	}
	if r.has(unix.IN_IGNORED) {
		w.forget(dir)
		return
	}
	if r.name == "" {
		// About the directory itself. Below the root, its parent says the same.
		if dir.parent != nil {
			return
		}
		if r.has(unix.IN_ATTRIB) {
			w.emit(".", pb.EventType_EVENT_TYPE_CHMOD)
		}
		if r.has(unix.IN_DELETE_SELF) {
			w.emit(".", pb.EventType_EVENT_TYPE_REMOVE)
		}
		if r.has(unix.IN_MOVE_SELF) {
			w.emit(".", pb.EventType_EVENT_TYPE_RENAME)
		}
		return
	}
	if tempKind(r.name) != 0 {
		return // the write that follows is the event
	}
	name := dir.below(r.name)
	follow := w.recursive && r.has(unix.IN_ISDIR)
	if r.has(unix.IN_CREATE|unix.IN_MOVED_TO) && !r.replaces {
		w.emit(name, pb.EventType_EVENT_TYPE_CREATE)
		if follow {
			w.appeared(fd, dir, r)
		}
	}
	if r.has(unix.IN_MODIFY) {
		w.emit(name, pb.EventType_EVENT_TYPE_WRITE)
	}
	if r.has(unix.IN_ATTRIB) {
		w.emit(name, pb.EventType_EVENT_TYPE_CHMOD)
	}
	if r.has(unix.IN_DELETE) {
		w.emit(name, pb.EventType_EVENT_TYPE_REMOVE)
	}
	if r.has(unix.IN_MOVED_FROM) {
		w.emit(name, pb.EventType_EVENT_TYPE_RENAME)
	}
	if follow && r.has(unix.IN_DELETE|unix.IN_MOVED_FROM) {
		w.vanished(fd, dir, r)
	}
}
