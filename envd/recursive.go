package envd

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// What the kernel says is about names, and comes after the fact: when a watcher
// hears of a new directory, that may have another name, or another directory
// may have its name. So the watcher keeps the tree as it is at its place in the
// queue of events, and takes care that each directory in it is the right one:
//
//   - A directory is opened, watched, and then the queue is read. If the name
//     it was opened by has changed since, the events to come say where it is,
//     and it is looked for there.
//   - What a directory held when its watch began follows from what it holds
//     later and the events in between. The watch comes first and the look
//     second, so that nothing falls in between.
//
// Each file and directory is reported once by these rules, by the name that it
// has when its directory is looked at. A file that is gone by then, with its
// directory, is not known to have been there.

// tree is what a watcher knows of the directories it watches, as of the event
// that it judges. Without recursive that is the root alone.
type tree struct {
	root    *node
	dirs    map[int32]*node  // by their watches
	moving  map[uint32]*node // between the two halves of a move, by its cookie
	waiting []*node          // not watched yet, to be looked for when the queue is empty
	doubts  []doubt
	fences  int
}

// doubt is a name that two directories had at once: the first was empty and
// gave way, or the two changed names, which the kernel reports as if one name
// were gone.
type doubt struct {
	dir  *node
	name string
}

func newTree() tree {
	return tree{root: &node{}, dirs: map[int32]*node{}, moving: map[uint32]*node{}}
}

// node is a directory.
type node struct {
	parent   *node // nil of the root, and of one that is not in the tree any more
	name     string
	wd       int32 // 0 while it is not watched
	children map[string]*node
	how      scan // what its first scan reports
	waits    bool // it is in tree.waiting
	claims   bool // its directory was found to be at another place in the tree
	missed   int  // how often it was not where it should be, and nothing told why
}

// path is the path below the root, "" of the root itself.
func (n *node) path() string {
	if n.parent == nil {
		return ""
	}
	return n.parent.below(n.name)
}

// below is the path of a name in the directory.
func (n *node) below(name string) string {
	if p := n.path(); p != "" {
		return p + "/" + name
	}
	return name
}

// within reports whether n is m or below it.
func (n *node) within(m *node) bool {
	for ; n != nil; n = n.parent {
		if n == m {
			return true
		}
	}
	return false
}

// put enters n under a name of p, in the place of what had that name, and
// takes it from where it was.
func (n *node) put(p *node, name string) {
	n.leave()
	n.parent, n.name = p, name
	if p.children == nil {
		p.children = map[string]*node{}
	}
	p.children[name] = n
}

// leave takes n from its place. It keeps its name.
func (n *node) leave() {
	if n.parent != nil && n.parent.children[n.name] == n {
		delete(n.parent.children, n.name)
	}
}

// How much a scan of a directory reports.
type scan int

const (
	scanQuiet  scan = iota // nothing: it was there before the watcher
	scanNames              // what is there: it came along with its directory
	scanWrites             // and that files which are not empty were written
)

// begin watches the root and, with recursive, what is below it.
func (w *watcher) begin(fd, dir int) {
	f := os.NewFile(uintptr(dir), w.path)
	defer f.Close()
	wd, err := w.add(fd, dir)
	if err != nil {
		w.fail(err)
		return
	}
	w.root.wd = wd
	w.dirs[wd] = w.root
	if w.recursive {
		w.scan(fd, f, w.root, scanQuiet)
	}
}

// add watches an open directory, or finds its watch. An error that means that
// no more can be watched ends the watcher.
//
// Without IN_MASK_ADD the kernel takes the events of a watch away before it
// gives it the same ones again, and loses what happens in between.
func (w *watcher) add(fd, dir int) (int32, error) {
	wd, err := unix.InotifyAddWatch(fd, fdLink(dir), watchMask|unix.IN_MASK_ADD)
	if err == unix.ENOSPC || err == unix.ENOMEM {
		w.fail(faultf(connect.CodeResourceExhausted,
			"there are more directories below %s than the kernel can watch; watch a smaller tree, or raise fs.inotify.max_user_watches", w.path))
	}
	return int32(wd), err
}

// appeared handles a directory that got a name in p.
func (w *watcher) appeared(fd int, p *node, r raw) {
	if old := p.children[r.name]; old != nil {
		w.drop(fd, old)
		w.doubts = append(w.doubts, doubt{p, r.name})
	}
	n := &node{how: scanWrites}
	if r.has(unix.IN_MOVED_TO) {
		n.how = scanNames
		if m := w.moving[r.cookie]; m != nil && !p.within(m) {
			delete(w.moving, r.cookie)
			n = m
		}
	}
	n.put(p, r.name)
	if n.wd == 0 {
		w.look(fd, n)
	}
}

// vanished handles a directory that lost its name in p.
func (w *watcher) vanished(fd int, p *node, r raw) {
	n := p.children[r.name]
	if n == nil {
		return
	}
	if r.has(unix.IN_MOVED_FROM) && w.staysWithin(fd, p, r.cookie) {
		n.leave()
		w.moving[r.cookie] = n
		return
	}
	w.drop(fd, n)
}

// staysWithin reports whether the second half of a move comes, and is about a
// directory of the tree.
func (w *watcher) staysWithin(fd int, from *node, cookie uint32) bool {
	if to := w.queue.arrives(cookie); to != 0 {
		return w.dirs[to] != nil
	}
	if dir, err := w.open(from.path()); err == nil {
		w.fence(dir)
		unix.Close(dir)
	}
	w.pullAll(fd)
	return w.dirs[w.queue.arrives(cookie)] != nil
}

// fence returns when renames that have begun in an open directory are over,
// and so their events in the kernel's queue: the look-up of a name that nobody
// has asked for takes the same lock.
func (w *watcher) fence(dir int) {
	w.fences++
	_, _ = lstatAt(dir, tempPrefix+strconv.Itoa(w.fences)) // whether there is one or not
}

// open finds a directory of the tree by its path, with the account's rights.
func (w *watcher) open(path string) (int, error) {
	return with(w.u, func() (int, error) {
		return openPath(filepath.Join(w.path, path), unix.O_PATH|unix.O_DIRECTORY)
	})
}

// drop forgets a directory that has left the tree, and those below it.
func (w *watcher) drop(fd int, n *node) {
	n.leave()
	n.parent = nil
	if n.wd != 0 {
		_, _ = unix.InotifyRmWatch(fd, uint32(n.wd)) // gone already, if it fails
		w.forget(n)
	}
	for _, c := range n.children {
		w.drop(fd, c)
	}
}

// forget is told that a watch is gone.
func (w *watcher) forget(n *node) {
	delete(w.dirs, n.wd)
	n.wd = 0
}

// wait has n looked for again when the queue is empty.
func (w *watcher) wait(n *node) {
	if !n.waits {
		n.waits = true
		w.waiting = append(w.waiting, n)
	}
}

// lookAgain looks for the directories that were not where they should be. It
// reports whether there are events to judge now.
func (w *watcher) lookAgain(fd int) bool {
	for cookie, n := range w.moving {
		w.drop(fd, n) // it went into a directory that has left the tree since
		delete(w.moving, cookie)
	}
	doubts := w.doubts
	w.doubts = nil
	for _, d := range doubts {
		w.resolve(fd, d)
	}
	// One that is found elsewhere is looked for once more, unless there are
	// events, which may tell why.
	for pass := 0; pass < 2 && w.queue.empty(); pass++ {
		nodes := w.waiting
		w.waiting = nil
		for _, n := range nodes {
			n.waits = false
			if w.err == nil && n.wd == 0 && w.holds(n) {
				w.look(fd, n)
			}
		}
	}
	return !w.queue.empty()
}

// resolve looks for a directory of which the kernel says nothing.
func (w *watcher) resolve(fd int, d doubt) {
	if !w.holds(d.dir) || d.dir.children[d.name] != nil {
		return
	}
	st, err := with(w.u, func() (unix.Stat_t, error) {
		p, err := placeOf(filepath.Join(w.path, d.dir.below(d.name)))
		if err != nil {
			return unix.Stat_t{}, err
		}
		defer p.close()
		return p.lstat()
	})
	w.pullAll(fd)
	if err != nil || !isDir(&st) || w.queue.changes(d.dir.wd)[d.name] != nil {
		return
	}
	w.emit(d.dir.below(d.name), pb.EventType_EVENT_TYPE_CREATE)
	n := &node{how: scanNames}
	n.put(d.dir, d.name)
	w.look(fd, n)
}

// holds reports whether n is in the tree.
func (w *watcher) holds(n *node) bool {
	for n.parent != nil {
		if n.parent.children[n.name] != n {
			return false
		}
		n = n.parent
	}
	return n == w.root
}

// maxMissed bounds how often a directory is looked for of which nothing says
// that it has moved. It is not where it should be for an instant, between a
// change and its event, or for good, if the kernel says nothing of it.
const maxMissed = 8

// look watches and scans a directory of the tree, or leaves it for later.
func (w *watcher) look(fd int, n *node) {
	p := n.parent
	if w.queue.changes(p.wd)[n.name] != nil {
		w.wait(n)
		return
	}
	dir, err := w.open(p.path())
	if err != nil {
		w.miss(fd, n, err)
		return
	}
	defer unix.Close(dir)
	// Is it p that has this path?
	wd, err := w.add(fd, dir)
	if err == nil && w.dirs[wd] != p {
		if w.dirs[wd] == nil {
			_, _ = unix.InotifyRmWatch(fd, uint32(wd))
		}
		err = unix.ENOENT
	}
	if err != nil {
		w.miss(fd, n, err)
		return
	}
	w.enter(fd, dir, n, nil)
}

// miss judges the error of opening a directory. One that is gone, or that the
// account may not read, is none of the watcher's business; where one that is
// gone has gone to, the events to come tell.
func (w *watcher) miss(fd int, n *node, err error) {
	switch {
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM), errors.Is(err, errLostThread):
		w.fail(faultf(connect.CodeResourceExhausted, "watching the directories below %s: %v", w.path, err))
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		if w.pullAll(fd); w.queue.empty() {
			n.missed++
		}
		if n.missed < maxMissed {
			w.wait(n)
		}
	}
}

// enter watches and scans n, which is in the open directory dir. st is what
// lstat says of it, if that is known.
func (w *watcher) enter(fd, dir int, n *node, st *unix.Stat_t) {
	p, scanned := n.parent, st != nil
	child, err := with(w.u, func() (int, error) {
		if st == nil {
			now, err := lstatAt(dir, n.name)
			if err != nil {
				return -1, err
			}
			if !isDir(&now) {
				return -1, unix.ENOTDIR
			}
			st = &now
		}
		return openChild(dir, n.name, st)
	})
	if err != nil {
		w.miss(fd, n, err)
		return
	}
	f := os.NewFile(uintptr(child), n.name)
	defer f.Close()
	if !w.network && onNetwork(child) {
		return
	}
	wd, err := w.add(fd, child)
	if err != nil {
		return // it is gone, or the watcher has ended
	}
	if !scanned {
		w.fence(dir)
	}
	w.pullAll(fd)
	if w.queue.changes(p.wd)[n.name] != nil {
		// It is not, or not any more, the directory that has this name here.
		if w.dirs[wd] == nil {
			_, _ = unix.InotifyRmWatch(fd, uint32(wd))
		}
		w.wait(n)
		return
	}
	if n = w.claim(fd, n, wd); n != nil {
		w.scan(fd, f, n, n.how)
	}
}

// claim gives n its watch, and returns the node that is at its place then, or
// nil if the directory is somewhere else in the tree still.
func (w *watcher) claim(fd int, n *node, wd int32) *node {
	old := w.dirs[wd]
	switch {
	case old == n:
		return n
	case old != nil && (!n.claims || n.within(old)):
		// It was moved here from there, and the event that takes it from
		// there is to come.
		n.claims, n.how = true, max(n.how, scanNames)
		w.miss(fd, n, unix.ENOENT)
		return nil
	case old != nil:
		// There is no such event.
		p, name := old.parent, old.name
		held := w.holds(old)
		old.leave()
		old.how, old.missed = n.how, old.missed+1
		at, as := n.parent, n.name
		w.drop(fd, n)
		old.put(at, as)
		if held {
			rest := &node{how: scanWrites, missed: old.missed}
			rest.put(p, name)
			if old.missed < maxMissed {
				w.wait(rest)
			}
		}
		return old
	case n.wd != 0:
		// Another directory than the one that had the name.
		p, name, how := n.parent, n.name, n.how
		w.drop(fd, n)
		n = &node{how: how}
		n.put(p, name)
	}
	n.wd = wd
	w.dirs[wd] = n
	return n
}

// scan reports what is in a directory that is watched now, and enters the
// directories in it. f is the open directory.
func (w *watcher) scan(fd int, f *os.File, n *node, how scan) {
	type found struct {
		name string
		st   unix.Stat_t
	}
	dir := int(f.Fd())
	from := len(w.events)
	for done := false; !done && w.err == nil; {
		var children []found
		err := w.u.do(func() error {
			names, err := f.Readdirnames(nameChunk)
			for _, name := range names {
				if st, serr := lstatAt(dir, name); serr == nil && tempKind(name) == 0 {
					children = append(children, found{name, st})
				}
			}
			return err
		})
		done = err != nil
		w.pullAll(fd)
		for _, c := range children {
			// A name that nothing has happened to was there from the start. Of
			// the others the events tell.
			if w.err != nil || w.queue.changes(n.wd)[c.name] != nil {
				continue
			}
			w.find(n, c.name, how, isRegular(&c.st) && c.st.Size > 0)
			if isDir(&c.st) {
				sub := n.children[c.name]
				if sub == nil {
					sub = &node{how: how}
					sub.put(n, c.name)
				}
				sub.how = how
				w.enter(fd, dir, sub, &c.st)
			}
		}
		if err != nil && err != io.EOF {
			w.miss(fd, n, err)
		}
	}
	w.findLost(n, how, from)
}

// find reports a name that was in a directory when its watch began.
func (w *watcher) find(n *node, name string, how scan, written bool) {
	if how == scanQuiet {
		return
	}
	w.emit(n.below(name), pb.EventType_EVENT_TYPE_CREATE)
	if how == scanWrites && written {
		w.emit(n.below(name), pb.EventType_EVENT_TYPE_WRITE)
	}
}

// findLost reports what was in a directory when its watch began and was not
// there any more when it was scanned: the first that the events say of such a
// name is that it goes. from is where the reports of the scan begin.
func (w *watcher) findLost(n *node, how scan, from int) {
	var lost map[string]bool // and whether it was a directory
	for name, masks := range w.queue.changes(n.wd) {
		if masks[0]&(unix.IN_DELETE|unix.IN_MOVED_FROM) == 0 || tempKind(name) != 0 {
			continue
		}
		if lost == nil {
			lost = map[string]bool{}
		}
		lost[name] = masks[0]&unix.IN_ISDIR != 0
	}
	if lost == nil || w.err != nil {
		return
	}
	// Some were scanned before they went.
	prefix := n.below("")
	for _, ev := range w.events[from:] {
		if ev.kind == pb.EventType_EVENT_TYPE_CREATE {
			if name, ok := strings.CutPrefix(ev.name, prefix); ok {
				delete(lost, name)
			}
		}
	}
	for name, dir := range lost {
		w.find(n, name, how, false)
		if dir && n.children[name] == nil {
			(&node{how: how}).put(n, name)
		}
	}
}
