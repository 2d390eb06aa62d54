package envd

import (
	"errors"
	"io"
	"os"
	"path/filepath"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// How much a scan of a directory reports.
type scan int

const (
	scanQuiet  scan = iota // nothing: it was there before the watcher
	scanNames              // what is there: it came along with its directory
	scanWrites             // and that files which are not empty were written
)

// follow watches a directory that appeared in a watched one. What happened in
// it before the watch was there is found by looking.
func (w *watcher) follow(fd int, name string, moved bool) {
	dir, err := with(w.u, func() (int, error) {
		p, err := placeOf(filepath.Join(w.path, name))
		if err != nil {
			return -1, err
		}
		defer p.close()
		st, err := p.lstat()
		if err != nil {
			return -1, err
		}
		if !isDir(&st) {
			return -1, unix.ENOTDIR
		}
		return openChild(p.dir, p.name, &st)
	})
	if err != nil {
		w.skip(err)
		return
	}
	how := scanWrites
	if moved {
		how = scanNames
	}
	w.enter(fd, dir, name, how)
}

// skip judges the error of opening a directory. One that is gone, or that the
// account may not read, is none of the watcher's business.
func (w *watcher) skip(err error) {
	switch {
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM), errors.Is(err, errLostThread):
		w.fail(faultf(connect.CodeResourceExhausted, "watching the directories below %s: %v", w.path, err))
	}
}

// enter watches an open directory, which it closes, and with recursive those
// below it. The watch comes first and the look second, so that nothing falls
// in between; what both see is remembered in fresh.
func (w *watcher) enter(fd, dir int, name string, how scan) {
	f := os.NewFile(uintptr(dir), name)
	defer f.Close()
	if name != "" && !w.network && onNetwork(dir) {
		return
	}
	wd, err := unix.InotifyAddWatch(fd, fdLink(dir), watchMask)
	switch {
	case err == nil:
	case err == unix.ENOSPC || err == unix.ENOMEM:
		w.fail(faultf(connect.CodeResourceExhausted,
			"there are more directories below %s than the kernel can watch; watch a smaller tree, or raise fs.inotify.max_user_watches", w.path))
		return
	case name == "":
		w.fail(err)
		return
	default:
		return
	}
	w.dirs[int32(wd)] = name
	delete(w.leaving, int32(wd))
	if !w.recursive {
		return
	}
	type found struct {
		name string
		st   unix.Stat_t
	}
	for w.err == nil {
		var children []found
		err := w.u.do(func() error {
			names, err := f.Readdirnames(nameChunk)
			for _, n := range names {
				if st, serr := lstatAt(dir, n); serr == nil && tempKind(n) == 0 {
					children = append(children, found{n, st})
				}
			}
			return err
		})
		for _, c := range children {
			if w.err != nil {
				return
			}
			below := c.name
			if name != "" {
				below = name + "/" + c.name
			}
			child := -1
			if isDir(&c.st) {
				var oerr error
				child, oerr = with(w.u, func() (int, error) { return openChild(dir, c.name, &c.st) })
				if oerr != nil {
					w.skip(oerr)
				}
			}
			if how != scanQuiet {
				w.fresh[below] = child >= 0
				w.emit(below, pb.EventType_EVENT_TYPE_CREATE)
				if how == scanWrites && isRegular(&c.st) && c.st.Size > 0 {
					w.emit(below, pb.EventType_EVENT_TYPE_WRITE)
				}
			}
			if child >= 0 {
				w.enter(fd, child, below, how)
			}
		}
		if err != nil {
			if err != io.EOF {
				w.skip(err)
			}
			return
		}
	}
}

// flush stops watching directories that have left the tree.
func (w *watcher) flush(fd int) {
	for wd := range w.leaving {
		_, _ = unix.InotifyRmWatch(fd, uint32(wd)) // gone already, if it fails
		delete(w.dirs, wd)
	}
	clear(w.leaving)
}
