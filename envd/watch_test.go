package envd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// poller is a watcher that a test asks for events.
type poller struct {
	g  *fileGuest
	id string
}

func (g *fileGuest) poll(req *pb.CreateWatcherRequest) poller {
	g.t.Helper()
	r, err := g.fs.CreateWatcher(context.Background(), as(req, ""))
	must(g.t, err)
	return poller{g, r.Msg.WatcherId}
}

func (p poller) messages() []*pb.FilesystemEvent {
	p.g.t.Helper()
	r, err := p.g.fs.GetWatcherEvents(context.Background(), as(&pb.GetWatcherEventsRequest{WatcherId: p.id}, ""))
	must(p.g.t, err)
	return r.Msg.Events
}

func label(ev *pb.FilesystemEvent) string {
	return strings.TrimPrefix(ev.Type.String(), "EVENT_TYPE_") + " " + ev.Name
}

func (p poller) expect(want ...string) {
	p.g.t.Helper()
	var got []string
	for _, ev := range p.messages() {
		got = append(got, label(ev))
	}
	if d := cmp.Diff(want, got); d != "" {
		p.g.t.Error(d)
	}
}

// Every event is there when the call that caused it has returned.
func TestWatchEvents(t *testing.T) {
	g := newFileGuest(t)
	p := g.poll(&pb.CreateWatcherRequest{Path: g.home})
	path := func(n string) string { return filepath.Join(g.home, n) }
	p.expect()
	must(t, os.WriteFile(path("f"), []byte("x"), 0o644))
	p.expect("CREATE f", "WRITE f")
	must(t, os.Chmod(path("f"), 0o600))
	p.expect("CHMOD f")
	must(t, os.Rename(path("f"), path("g")))
	p.expect("RENAME f", "CREATE g")
	must(t, os.Remove(path("g")))
	p.expect("REMOVE g")
	must(t, os.Mkdir(path("d"), 0o755))
	must(t, os.WriteFile(path("d/below"), nil, 0o644))
	p.expect("CREATE d")
}

// An upload looks like a file that is made, given away and written, or like
// one that is written to; its temporary file is not seen.
func TestWatchUpload(t *testing.T) {
	g := newFileGuest(t)
	p := g.poll(&pb.CreateWatcherRequest{Path: g.home})
	for range 2 {
		for _, body := range []string{"text", "", strings.Repeat("x", 1<<20)} {
			if code, text := g.put(g.url("path", "f"), strings.NewReader(body), "X-Metadata-K", "v"); code != 200 {
				t.Fatal(code, text)
			}
			p.expect("CREATE f", "CHMOD f", "WRITE f")
			if code, text := g.put(g.url("path", "f"), strings.NewReader(body)); code != 200 {
				t.Fatal(code, text)
			}
			p.expect("WRITE f")
			must(t, os.Remove(filepath.Join(g.home, "f")))
			p.expect("REMOVE f")
		}
	}
	g.put(g.url("path", "broken"), strings.NewReader("no gzip"), "Content-Encoding", "gzip")
	p.expect()
}

func TestWatchRecursive(t *testing.T) {
	g := newFileGuest(t)
	must(t, os.MkdirAll(filepath.Join(g.home, "old/deep"), 0o777))
	p := g.poll(&pb.CreateWatcherRequest{Path: g.home, Recursive: true})
	path := func(n string) string { return filepath.Join(g.home, n) }
	must(t, os.WriteFile(path("old/deep/f"), nil, 0o644))
	p.expect("CREATE old/deep/f")

	// A directory and what is made in it before anybody can watch it.
	must(t, os.MkdirAll(path("n/e/w"), 0o755))
	must(t, os.WriteFile(path("n/e/w/f"), []byte("x"), 0o644))
	seen := map[string]int{}
	for _, ev := range p.messages() {
		seen[label(ev)]++
	}
	for _, want := range []string{"CREATE n", "CREATE n/e", "CREATE n/e/w", "CREATE n/e/w/f"} {
		if seen[want] != 1 {
			t.Errorf("%q came %d times", want, seen[want])
		}
	}
	if seen["WRITE n/e/w/f"] == 0 {
		t.Error("the write is missing")
	}

	// Directories keep being watched under their new name.
	must(t, os.Rename(path("n/e"), path("old/moved")))
	must(t, os.WriteFile(path("old/moved/w/g"), nil, 0o644))
	p.expect("RENAME n/e", "CREATE old/moved", "CREATE old/moved/w/g")

	// Outside of the tree they are not.
	away := filepath.Join(g.dir, "away")
	must(t, os.Rename(path("old/moved"), away))
	p.expect("RENAME old/moved")
	must(t, os.WriteFile(filepath.Join(away, "w/h"), nil, 0o644))
	p.expect()
	// And what comes back is reported with all that is in it.
	must(t, os.Rename(away, path("back")))
	var came []string
	for _, ev := range p.messages() {
		came = append(came, label(ev))
	}
	slices.Sort(came) // a directory has no order
	want := []string{"CREATE back", "CREATE back/w", "CREATE back/w/f", "CREATE back/w/g", "CREATE back/w/h"}
	if d := cmp.Diff(want, came); d != "" {
		t.Error(d)
	}
	must(t, os.RemoveAll(path("back")))
	last := ""
	for _, ev := range p.messages() {
		if ev.Type != pb.EventType_EVENT_TYPE_REMOVE {
			t.Error(ev)
		}
		last = ev.Name
	}
	if last != "back" {
		t.Errorf("last %q", last)
	}
	// The same names again.
	must(t, os.MkdirAll(path("back/w"), 0o755))
	p.expect("CREATE back", "CREATE back/w")

	// A client's own sequence: each call sees to it that the next is seen.
	ctx := context.Background()
	_, err := g.fs.MakeDir(ctx, as(&pb.MakeDirRequest{Path: "mine/too"}, ""))
	must(t, err)
	if code, text := g.put(g.url("path", "mine/too/f"), strings.NewReader("x")); code != 200 {
		t.Fatal(code, text)
	}
	p.expect("CREATE mine", "CREATE mine/too", "CREATE mine/too/f", "CHMOD mine/too/f", "WRITE mine/too/f")
}

func TestWatchEntry(t *testing.T) {
	g := newFileGuest(t)
	must(t, os.Mkdir(filepath.Join(g.home, "d"), 0o755))
	p := g.poll(&pb.CreateWatcherRequest{Path: g.home, Recursive: true, IncludeEntry: true})
	g.write(filepath.Join(g.home, "d/f"), "12", testUID, 0o640)
	evs := p.messages()
	if len(evs) == 0 {
		t.Fatal("no event")
	}
	for _, ev := range evs {
		if e := ev.Entry; e == nil || e.Path != filepath.Join(g.home, "d/f") || e.Name != "f" || e.Size != 2 || e.Owner != "user" {
			t.Errorf("%s: %v", label(ev), e)
		}
	}
	must(t, os.Rename(filepath.Join(g.home, "d/f"), filepath.Join(g.home, "d/g")))
	must(t, os.Remove(filepath.Join(g.home, "d/g")))
	for _, ev := range p.messages() {
		if ev.Entry != nil {
			t.Errorf("%s carries %v", label(ev), ev.Entry)
		}
	}
}

func TestWatchErrors(t *testing.T) {
	g := newFileGuest(t)
	g.write(filepath.Join(g.home, "file"), "", testUID, 0o644)
	must(t, os.Mkdir(filepath.Join(g.home, "private"), 0o700))
	must(t, os.Mkdir(filepath.Join(g.home, "blind"), 0o711)) // may be entered, not read
	for path, want := range map[string]connect.Code{
		"missing": connect.CodeNotFound,
		"file":    connect.CodeInvalidArgument,
		"file/x":  connect.CodeNotFound,
		"private": connect.CodePermissionDenied,
		"blind":   connect.CodePermissionDenied,
		"a\x00":   connect.CodeInvalidArgument,
	} {
		_, err := g.fs.CreateWatcher(context.Background(), as(&pb.CreateWatcherRequest{Path: path}, ""))
		if codeOf(err) != want {
			t.Errorf("%s: %v", path, err)
		}
		s, err := g.fs.WatchDir(context.Background(), as(&pb.WatchDirRequest{Path: path}, ""))
		must(t, err)
		if s.Receive() || codeOf(s.Err()) != want {
			t.Errorf("stream of %s: %v", path, s.Err())
		}
		s.Close()
	}
	ctx := context.Background()
	if _, err := g.fs.GetWatcherEvents(ctx, as(&pb.GetWatcherEventsRequest{WatcherId: "w"}, "")); codeOf(err) != connect.CodeNotFound {
		t.Error(err)
	}
	p := g.poll(&pb.CreateWatcherRequest{Path: g.home})
	_, err := g.fs.RemoveWatcher(ctx, as(&pb.RemoveWatcherRequest{WatcherId: p.id}, ""))
	must(t, err)
	if _, err := g.fs.RemoveWatcher(ctx, as(&pb.RemoveWatcherRequest{WatcherId: p.id}, "")); codeOf(err) != connect.CodeNotFound {
		t.Error(err)
	}
	if n := len(g.watchers.open); n != 0 {
		t.Errorf("%d watchers stay", n)
	}
	// What the account may not read below a tree stays unseen.
	q := g.poll(&pb.CreateWatcherRequest{Path: g.home, Recursive: true})
	must(t, os.WriteFile(filepath.Join(g.home, "private/secret"), nil, 0o644))
	must(t, os.WriteFile(filepath.Join(g.home, "blind/secret"), nil, 0o644))
	q.expect()
}

// The number of /proc and so on are no network filesystems.
func TestNetworkMounts(t *testing.T) {
	fd, err := unix.Open("/proc", unix.O_RDONLY, 0)
	must(t, err)
	defer unix.Close(fd)
	if onNetwork(fd) {
		t.Error("/proc counts as a network filesystem")
	}
	networkTypes[unix.PROC_SUPER_MAGIC] = true
	defer delete(networkTypes, unix.PROC_SUPER_MAGIC)
	g := newFileGuest(t)
	ctx := context.Background()
	_, err = g.fs.CreateWatcher(ctx, as(&pb.CreateWatcherRequest{Path: "/proc/sys"}, ""))
	if codeOf(err) != connect.CodeInvalidArgument {
		t.Error(err)
	}
	_, err = g.fs.CreateWatcher(ctx, as(&pb.CreateWatcherRequest{Path: "/proc/sys", AllowNetworkMounts: true}, ""))
	must(t, err)
}

func TestWatchStream(t *testing.T) {
	g := newFileGuest(t)
	ctx, cancel := context.WithTimeout(context.Background(), 120*time.Second)
	defer cancel()
	req := as(&pb.WatchDirRequest{Path: g.home, Recursive: true}, "")
	req.Header().Set(headerKeepalive, "1")
	s, err := g.fs.WatchDir(ctx, req)
	must(t, err)
	defer s.Close()
	if !s.Receive() || s.Msg().GetStart() == nil {
		t.Fatal(s.Msg(), s.Err())
	}
	if !s.Receive() || s.Msg().GetKeepalive() == nil {
		t.Fatal(s.Msg(), s.Err())
	}
	// Ten thousand files in new directories, each reported once.
	const files, dirs = 10_000, 20
	go func() {
		for i := range files {
			d := filepath.Join(g.home, fmt.Sprint("d", i%dirs))
			os.Mkdir(d, 0o755)
			f, err := os.Create(filepath.Join(d, fmt.Sprint(i)))
			if err != nil {
				return
			}
			f.Close()
		}
	}()
	seen := map[string]int{}
	for len(seen) < files+dirs && s.Receive() {
		if ev := s.Msg().GetFilesystem(); ev.GetType() == pb.EventType_EVENT_TYPE_CREATE {
			seen[ev.Name]++
		}
	}
	if len(seen) != files+dirs {
		t.Fatalf("%d names, %v", len(seen), s.Err())
	}
	for n, c := range seen {
		if c != 1 {
			t.Errorf("%s came %d times", n, c)
		}
	}
	g.Close()
	for s.Receive() {
	}
	if codeOf(s.Err()) != connect.CodeUnavailable {
		t.Error(s.Err())
	}
	if _, err := g.fs.CreateWatcher(context.Background(), as(&pb.CreateWatcherRequest{Path: g.home}, "")); codeOf(err) != connect.CodeUnavailable {
		t.Error(err)
	}
}

// A watcher that nobody asks holds a bounded number of events, and then says
// that there were more.
func TestWatchOverflow(t *testing.T) {
	g := newFileGuest(t)
	u, err := g.users.lookup("user")
	must(t, err)
	w := newWatcher(g.Server, u, g.home)
	must(t, g.watchers.add(w))
	must(t, w.start())
	defer w.close()
	long := strings.Repeat("n", 200)
	for w.cost <= maxHeld {
		w.mu.Lock()
		w.emit(long, pb.EventType_EVENT_TYPE_CREATE)
		w.mu.Unlock()
	}
	must(t, os.WriteFile(filepath.Join(g.home, "late"), nil, 0o644))
	w.sync()
	w.mu.Lock()
	last := w.events[len(w.events)-1]
	w.event(0, raw{wd: -1, mask: unix.IN_Q_OVERFLOW})
	w.mu.Unlock()
	if last.name != long {
		t.Error("the kernel's queue was read although the watcher is full")
	}
	evs, err := w.take()
	if len(evs) < maxHeld/(len(long)+changeSize) || asFault(err).code != connect.CodeResourceExhausted {
		t.Error(len(evs), err)
	}
	if n := g.watchers.held.Load(); n != 0 {
		t.Errorf("%d bytes stay accounted", n)
	}
	if evs, err := w.take(); len(evs) != 0 || err == nil {
		t.Error(evs, err)
	}
}

func TestWatchersAreBounded(t *testing.T) {
	ws := newWatchers()
	s := &Server{watchers: ws}
	for range maxWatchers {
		must(t, ws.add(newWatcher(s, nil, "")))
	}
	if err := ws.add(newWatcher(s, nil, "")); asFault(err).code != connect.CodeResourceExhausted {
		t.Error(err)
	}
	ws.closeAll()
	if len(ws.open) != 0 {
		t.Errorf("%d stay", len(ws.open))
	}
	if err := ws.add(newWatcher(s, nil, "")); !errors.As(err, new(*fault)) {
		t.Error(err)
	}
}

func TestWatchRoot(t *testing.T) {
	g := newFileGuest(t)
	d := filepath.Join(g.home, "d")
	must(t, os.Mkdir(d, 0o755))
	must(t, os.Symlink("d", filepath.Join(g.home, "link")))
	p := g.poll(&pb.CreateWatcherRequest{Path: "link", IncludeEntry: true})
	must(t, os.WriteFile(filepath.Join(d, "f"), nil, 0o644))
	for _, ev := range p.messages() {
		if ev.Name != "f" || ev.Entry.GetPath() != filepath.Join(g.home, "link/f") {
			t.Error(ev)
		}
	}
	must(t, os.RemoveAll(d))
	p.expect("REMOVE f", "REMOVE .")
	p.expect()
}
