package envd

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// socketToPID1 returns envd's end of a socket, and the other.
func socketToPID1(t *testing.T) (envds, pid1s *keeperConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	var ends [2]*keeperConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		must(t, err)
		must(t, f.Close())
		t.Cleanup(func() { c.Close() })
		ends[i] = &keeperConn{conn: c.(*net.UnixConn)}
	}
	return ends[0], ends[1]
}

// next replaces the daemon by another, which gets what PID 1 would keep.
func (g *fileGuest) next() *fileGuest {
	g.t.Helper()
	n := newFileGuest(g.t)
	n.dir, n.home = g.dir, g.home
	n.users.passwdFile, n.users.groupFile = g.users.passwdFile, g.users.groupFile
	k, pid1 := socketToPID1(g.t.(*testing.T))
	g.watchers.leave()
	polled := len(g.watchers.byID)
	done := make(chan []error, 1)
	go func() { done <- g.watchers.handOver(k) }()
	buf, oob := make([]byte, maxPacket), make([]byte, unix.CmsgSpace(4*fileCount))
	for range polled {
		m, err := pid1.next(buf, oob)
		must(g.t, err)
		if m.kind != keepProcess || m.pid < firstWatcher {
			g.t.Fatalf("PID 1 hears %c of %d", m.kind, m.pid)
		}
		must(g.t, n.watchers.takeOver(n.Server, m))
	}
	for _, err := range <-done {
		g.t.Error(err)
	}
	return n
}

// Files and directories are made all the while, as fast as can be, and envd is
// replaced again and again: each is reported, once, by a watcher of one
// directory and by one of the tree, under the ID that it had.
func TestWatchersAreHandedOver(t *testing.T) {
	const replacements, least, ahead = 8, 400, 100
	g := newFileGuest(t)
	flat := g.poll(&pb.CreateWatcherRequest{Path: g.home})
	tree := g.poll(&pb.CreateWatcherRequest{Path: g.home, Recursive: true, IncludeEntry: true})
	var made, may atomic.Int64 // it goes ahead of replacements, and not out of sight
	may.Store(ahead)
	stop, over := make(chan struct{}), make(chan error, 1)
	home := g.home // for g becomes another
	go func() {
		for i := int64(0); ; i++ {
			select {
			case <-stop:
				over <- nil
				return
			default:
			}
			if i >= may.Load() {
				i--
				runtime.Gosched()
				continue
			}
			d := filepath.Join(home, fmt.Sprint("d", i))
			if err := os.MkdirAll(filepath.Join(d, "e"), 0o755); err != nil {
				over <- err
				return
			}
			if err := os.WriteFile(filepath.Join(d, "e", "f"), nil, 0o644); err != nil {
				over <- err
				return
			}
			made.Store(i + 1)
		}
	}()
	inFlat, inTree := map[string]int{}, map[string]int{}
	look := func(into map[string]int, p poller) {
		for _, ev := range p.messages() {
			if ev.Type == pb.EventType_EVENT_TYPE_CREATE {
				into[ev.Name]++
			}
		}
	}
	for i := int64(1); i <= replacements; i++ {
		for made.Load() < i*least/replacements {
			look(inTree, tree) // the other's events stay where they are
		}
		may.Store(i*least/replacements + ahead)
		g = g.next()
		flat.g, tree.g = g, g
	}
	close(stop)
	must(t, <-over)
	look(inFlat, flat)
	look(inTree, tree)
	for i := range made.Load() {
		d := fmt.Sprint("d", i)
		if inFlat[d] != 1 {
			t.Errorf("%s was reported %d times", d, inFlat[d])
		}
		for _, name := range []string{d, d + "/e", d + "/e/f"} {
			if inTree[name] != 1 {
				t.Errorf("below, %s was reported %d times", name, inTree[name])
			}
		}
	}
	if want := int(made.Load()); len(inFlat) != want || len(inTree) != 3*want {
		t.Errorf("%d directories were made; reported are %d and %d names", want, len(inFlat), len(inTree))
	}
	// It is the client's as before.
	_, err := g.fs.RemoveWatcher(t.Context(), as(&pb.RemoveWatcherRequest{WatcherId: tree.id}, ""))
	must(t, err)
	_, err = g.fs.GetWatcherEvents(t.Context(), as(&pb.GetWatcherEventsRequest{WatcherId: tree.id}, ""))
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("a watcher that was removed: %v", err)
	}
	if n := g.watchers.held.Load(); n != 0 {
		t.Errorf("%d bytes are held of events that were taken", n)
	}
}

// What a watcher sees is judged by the rights of its account and by its own
// rules in the next envd, too, and its end stays its end.
func TestWatcherKeepsItsRules(t *testing.T) {
	g := newFileGuest(t)
	p := g.poll(&pb.CreateWatcherRequest{Path: g.home, Recursive: true})
	must(t, os.Mkdir(filepath.Join(g.home, "own"), 0o755))
	must(t, os.Mkdir(filepath.Join(g.home, "secret"), 0o700)) // root's
	lost := g.poll(&pb.CreateWatcherRequest{Path: g.home})
	g.watchers.byID[lost.id].mu.Lock()
	g.watchers.byID[lost.id].lost()
	g.watchers.byID[lost.id].mu.Unlock()
	odd := "\xff\xfe"
	must(t, os.WriteFile(filepath.Join(g.home, odd), nil, 0o644))
	temporary := filepath.Join(g.home, tempName(tempCreates))
	must(t, os.WriteFile(temporary, nil, 0o644))

	g = g.next()
	p.g, lost.g = g, g
	must(t, os.Rename(temporary, filepath.Join(g.home, "whole")))
	must(t, os.WriteFile(filepath.Join(g.home, "own", "f"), nil, 0o644))
	must(t, os.WriteFile(filepath.Join(g.home, "secret", "f"), nil, 0o644))
	var got []string
	for _, ev := range p.messages() {
		got = append(got, label(ev))
	}
	if want := "CREATE own|CREATE secret|CREATE \ufffd|CREATE whole|CREATE own/f"; strings.Join(got, "|") != want {
		t.Errorf("reported are %q, want %s", got, want)
	}
	_, err := g.fs.GetWatcherEvents(t.Context(), as(&pb.GetWatcherEventsRequest{WatcherId: lost.id}, ""))
	if connect.CodeOf(err) != connect.CodeResourceExhausted || !strings.Contains(err.Error(), "events were lost") {
		t.Errorf("a watcher that had lost events says %v", err)
	}
}

// A stream ends with a replacement, after all that happened before it.
func TestWatchStreamEndsWhole(t *testing.T) {
	g := newFileGuest(t)
	st, err := g.fs.WatchDir(t.Context(), as(&pb.WatchDirRequest{Path: g.home}, ""))
	must(t, err)
	if !st.Receive() || st.Msg().GetStart() == nil {
		t.Fatal(st.Err())
	}
	const files = 500
	for i := range files {
		must(t, os.Mkdir(filepath.Join(g.home, fmt.Sprint(i)), 0o755))
	}
	g.watchers.leave()
	n := 0
	for st.Receive() {
		if want := fmt.Sprint(n); st.Msg().GetFilesystem().GetName() != want {
			t.Fatalf("event %d is of %v", n, st.Msg())
		}
		n++
	}
	if n != files || connect.CodeOf(st.Err()) != connect.CodeUnavailable {
		t.Errorf("%d of %d events came, then %v", n, files, st.Err())
	}
	if _, err := g.fs.CreateWatcher(t.Context(), as(&pb.CreateWatcherRequest{Path: g.home}, "")); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("a watcher that is opened late: %v", err)
	}
	_, err = g.fs.GetWatcherEvents(context.Background(), as(&pb.GetWatcherEventsRequest{WatcherId: "w1"}, ""))
	if connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("a watcher that the next envd may have: %v", err)
	}
}

// All that a watcher knows is kept: what is not judged yet, what waits and what
// moves, whatever the size.
func TestWatcherIsKeptWhole(t *testing.T) {
	s := New(Config{})
	w := newWatcher(s, &user{name: "u", uid: 1, gid: 2, groups: []uint32{2, 3}, home: "/h"}, "/d")
	w.recursive, w.entries, w.fences, w.queue.hidden = true, true, 9, 77
	w.root.wd = 1
	w.dirs[1] = w.root
	parent := w.root
	for i := range 3 * keptItems {
		n := &node{how: scanNames, wd: int32(i + 2), missed: i % 3}
		n.put(parent, fmt.Sprint(i))
		w.dirs[n.wd] = n
		if i%5 == 0 {
			parent = n
		}
	}
	moves := w.dirs[20]
	moves.leave() // it keeps its parent and its name
	w.moving[5] = moves
	late := &node{how: scanWrites, waits: true, claims: true}
	late.put(w.dirs[30], "late\xff")
	w.waiting = append(w.waiting, late)
	w.doubts = append(w.doubts, doubt{w.dirs[40], "doubt"})
	for i := range 2*keptItems + 7 {
		w.queue.push(raw{wd: int32(i), mask: unix.IN_CREATE, cookie: uint32(i), name: fmt.Sprint("r\xff", i)})
		w.emit(fmt.Sprint("c\xff", i), pb.EventType_EVENT_TYPE_WRITE)
	}
	w.queue.pop()
	var b bytes.Buffer
	must(t, w.save("w7", &b))
	got, id, err := loadWatcher(s, &b)
	must(t, err)
	same := func(what string, got, want any) {
		t.Helper()
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	same("ID", id, "w7")
	same("account", *got.u, *w.u)
	same("rules", []any{got.path, got.recursive, got.entries, got.network, got.fences, got.queue.hidden}, []any{"/d", true, true, false, 9, 77})
	same("events", got.events, w.events)
	same("their cost", got.cost, w.cost)
	same("queue", got.queue.events[got.queue.next:], w.queue.events[w.queue.next:])
	same("its cost", got.queue.cost, w.queue.cost)
	same("number of directories", len(got.dirs), len(w.dirs))
	for wd, n := range w.dirs {
		g := got.dirs[wd]
		if g == nil || g.path() != n.path() || g.how != n.how || g.missed != n.missed || got.holds(g) != w.holds(n) || len(g.children) != len(n.children) {
			t.Fatalf("directory %d is %+v, want %+v", wd, g, n)
		}
	}
	same("what moves", got.moving[5] == got.dirs[20] && len(got.moving) == 1, true)
	l := got.waiting[0]
	same("what waits", []any{len(got.waiting), l.path(), l.waits, l.claims, l.how, got.holds(l)}, []any{1, late.path(), true, true, scanWrites, true})
	same("doubts", []any{len(got.doubts), got.doubts[0].dir == got.dirs[40], got.doubts[0].name}, []any{1, true, "doubt"})
}
