package envd

import (
	"cmp"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// treeTest is a directory that is watched, and changed while the watcher does
// not look.
type treeTest struct {
	t *testing.T
	w *watcher
}

func watchTree(t *testing.T, before ...string) *treeTest {
	t.Helper()
	g := newFileGuest(t)
	for _, dir := range before {
		must(t, os.MkdirAll(filepath.Join(g.home, dir), 0o777))
	}
	u, err := g.users.lookup("user")
	must(t, err)
	w := newWatcher(g.Server, u, g.home)
	w.recursive = true
	must(t, g.watchers.add(w))
	must(t, w.start())
	t.Cleanup(w.close)
	return &treeTest{t, w}
}

// do makes changes of which the watcher hears only when all are made. Each is
// a name that is made, a directory if it ends with a slash, or "from > to", "one
// <> other", or "- name". A file that is made has content if its name ends with "+".
func (x *treeTest) do(steps ...string) {
	x.t.Helper()
	x.w.mu.Lock()
	defer x.w.mu.Unlock()
	for _, s := range steps {
		must(x.t, change1(x.w.path, s))
	}
}

func change1(root, step string) error {
	path := func(n string) string { return filepath.Join(root, n) }
	if gone, ok := strings.CutPrefix(step, "- "); ok {
		return os.RemoveAll(path(gone))
	}
	if a, b, ok := strings.Cut(step, " <> "); ok {
		return unix.Renameat2(unix.AT_FDCWD, path(a), unix.AT_FDCWD, path(b), unix.RENAME_EXCHANGE)
	}
	if from, to, ok := strings.Cut(step, " > "); ok {
		return unix.Rename(path(from), path(to)) // over an empty directory too
	}
	if strings.HasSuffix(step, "/") {
		return os.Mkdir(path(step), 0o777)
	}
	content := ""
	if strings.HasSuffix(step, "+") {
		content = "x"
	}
	return os.WriteFile(path(step), []byte(content), 0o666)
}

// take returns what the client gets.
func (x *treeTest) take() []string {
	x.t.Helper()
	x.w.sync()
	evs, err := x.w.take()
	must(x.t, err)
	var out []string
	for _, ev := range evs {
		out = append(out, label(&pb.FilesystemEvent{Name: ev.name, Type: ev.kind}))
	}
	return out
}

// settle compares what the watcher knows with the directories that there are.
func (x *treeTest) settle() {
	x.t.Helper()
	x.w.sync()
	w := x.w
	w.mu.Lock()
	defer w.mu.Unlock()
	must(x.t, w.err)
	want, got := map[string]int32{}, map[string]int32{}
	err := filepath.WalkDir(w.path, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		var wd int
		cerr := w.conn.Control(func(fd uintptr) { wd, err = unix.InotifyAddWatch(int(fd), path, watchMask|unix.IN_MASK_ADD) })
		rel, _ := filepath.Rel(w.path, path)
		want[rel] = int32(wd)
		return cmp.Or(err, cerr)
	})
	must(x.t, err)
	var walk func(n *node)
	walk = func(n *node) {
		got[filepath.Join(".", n.path())] = n.wd
		for _, c := range n.children {
			walk(c)
		}
	}
	walk(w.root)
	if d := gocmp.Diff(want, got); d != "" {
		x.t.Errorf("the directories and their watches (-are, +known):\n%s", d)
	}
	for wd, n := range w.dirs {
		if n.wd != wd || !w.holds(n) {
			x.t.Errorf("watch %d is of %q, which has %d", wd, n.path(), n.wd)
		}
	}
	if len(w.moving) != 0 || !w.queue.empty() || w.queue.cost != 0 || len(w.waiting) != 0 {
		x.t.Errorf("at rest, there are %d moves, %d bytes of events, %d directories to look for", len(w.moving), w.queue.cost, len(w.waiting))
	}
}

// What happens to a directory before the watcher has looked at it is put
// together from what it finds and what the kernel says.
func TestRecursiveInterleaved(t *testing.T) {
	for _, c := range []struct {
		name   string
		before []string
		steps  []string
		want   []string
	}{
		{name: "made with content",
			steps: []string{"new/", "new/er/", "new/er/leaf+"},
			want:  []string{"CREATE new", "CREATE new/er", "CREATE new/er/leaf+", "WRITE new/er/leaf+"}},
		{name: "made with content and renamed",
			steps: []string{"new/", "new/er/", "new/er/leaf+", "new > moved", "moved/er/later"},
			want: []string{"CREATE new", "RENAME new", "CREATE moved",
				"CREATE moved/er", "CREATE moved/er/later", "CREATE moved/er/leaf+", "WRITE moved/er/leaf+"}},
		{name: "renamed twice, into an old directory", before: []string{"old"},
			steps: []string{"new/", "new/leaf", "new > a", "a > old/b", "old/b/later"},
			want: []string{"CREATE new", "RENAME new", "CREATE a", "RENAME a", "CREATE old/b",
				"CREATE old/b/later", "CREATE old/b/leaf"}},
		{name: "another one has its name",
			steps: []string{"new/", "new/one", "new > moved", "new/", "new/two"},
			want:  []string{"CREATE new", "RENAME new", "CREATE moved", "CREATE moved/one", "CREATE new", "CREATE new/two"}},
		{name: "two change names", before: []string{"a/one", "b/two"},
			steps: []string{"a > c", "b > a", "c > b", "a/two/x", "b/one/y"},
			want: []string{"RENAME a", "CREATE c", "RENAME b", "CREATE a", "RENAME c", "CREATE b",
				"CREATE a/two/x", "CREATE b/one/y"}},
		{name: "made in one that is renamed", before: []string{"old"},
			steps: []string{"old/new/", "old/new/leaf", "old > moved"},
			want:  []string{"CREATE old/new", "RENAME old", "CREATE moved", "CREATE moved/new/leaf"}},
		{name: "moved into a new one", before: []string{"old/deep"},
			steps: []string{"old/deep/f", "new/", "old > new/old", "new/old/deep/g"},
			want: []string{"CREATE old/deep/f", "CREATE new", "CREATE new/old", "CREATE new/old/deep", "CREATE new/old/deep/f",
				"RENAME old", "CREATE new/old/deep/g"}},
		{name: "a file moves out of a new one",
			steps: []string{"new/", "new/f", "new/g", "new/f > f"},
			want:  []string{"CREATE new", "CREATE new/g", "CREATE f"}},
		{name: "gone again",
			steps: []string{"new/", "new/f", "- new"},
			want:  []string{"CREATE new", "REMOVE new"}},
		{name: "gone, and made again",
			steps: []string{"new/", "new/f", "- new", "new/", "new/g"},
			want:  []string{"CREATE new", "REMOVE new", "CREATE new", "CREATE new/g"}},
		{name: "an old one takes the place of a new one", before: []string{"old"},
			steps: []string{"old/f", "new/", "old > new", "new/g"},
			want:  []string{"CREATE old/f", "CREATE new", "RENAME old", "CREATE new", "CREATE new/g"}},
		{name: "parent and child change places", before: []string{"a/b"},
			steps: []string{"a/b > b", "a > b/a", "b/a/f", "b/g"},
			want:  []string{"RENAME a/b", "CREATE b", "RENAME a", "CREATE b/a", "CREATE b/a/f", "CREATE b/g"}},
		{name: "two exchange names at once", before: []string{"a/one", "b/two"},
			steps: []string{"a <> b", "a/two/x"},
			want: []string{"RENAME a", "CREATE b", "RENAME b", "CREATE a", // as two renames
				"CREATE b", "CREATE b/one", "CREATE a/two", "CREATE a/two/x"}},
		{name: "renamed over an empty one and back", before: []string{"a/one", "b"},
			steps: []string{"a > b", "b > a", "a/one/x"},
			want:  []string{"RENAME a", "CREATE b", "RENAME b", "CREATE a", "CREATE a/one/x"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := watchTree(t, c.before...)
			x.do(c.steps...)
			got := x.take()
			slices.Sort(got) // a directory has no order, and a scan comes when it can
			slices.Sort(c.want)
			if d := gocmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
			x.settle()
		})
	}
}

// churn makes random changes below root, with few names, so that they are used
// again and again.
func churn(root string, luck *rand.Rand, n int) {
	names := []string{"a", "b", "c"}
	path := func() string {
		p := names[luck.IntN(len(names))]
		for luck.IntN(2) == 0 {
			p += "/" + names[luck.IntN(len(names))]
		}
		return p
	}
	for range n {
		switch luck.IntN(6) {
		case 0, 1, 2:
			_ = os.MkdirAll(filepath.Join(root, path()), 0o777)
		case 3, 4:
			_ = unix.Rename(filepath.Join(root, path()), filepath.Join(root, path()))
		default:
			_ = os.RemoveAll(filepath.Join(root, path()))
		}
	}
}

// Whatever happens while a watcher looks, it watches all directories that
// there are in the end, by their names.
func TestRecursiveChurn(t *testing.T) {
	rounds := 5
	if os.Getenv("CAY_NIGHTLY") == "1" {
		rounds = 100
	}
	for seed := range uint64(rounds) {
		x := watchTree(t)
		luck := rand.New(rand.NewPCG(seed, 1))
		for range 3 {
			churn(x.w.path, luck, 300)
			x.settle()
		}
		x.take()
		var want []string
		must(t, filepath.WalkDir(x.w.path, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				rel, _ := filepath.Rel(x.w.path, path)
				want = append(want, "CREATE "+filepath.Join(rel, "live"))
			}
			return err
		}))
		for _, f := range want {
			must(t, os.WriteFile(filepath.Join(x.w.path, strings.TrimPrefix(f, "CREATE ")), nil, 0o666))
		}
		got := x.take()
		slices.Sort(want)
		slices.Sort(got)
		if d := gocmp.Diff(want, got); d != "" {
			t.Errorf("events of a file in each directory:\n%s", d)
		}
		if x.w.close(); t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// replay is a client that keeps a list of all paths by the events alone.
type replay struct {
	paths map[string]bool
	below map[uint32][]string // what is below a name that was renamed, by the cookie of the move
}

// take is told of an event, and of the cookie of the move that it is a half of.
func (r *replay) take(ev change, move uint32) error {
	switch ev.kind {
	case pb.EventType_EVENT_TYPE_CREATE:
		if r.paths[ev.name] {
			return fmt.Errorf("%s is created twice", ev.name)
		}
		r.paths[ev.name] = true
		for _, p := range r.below[move] {
			r.paths[ev.name+p] = true
		}
	case pb.EventType_EVENT_TYPE_REMOVE, pb.EventType_EVENT_TYPE_RENAME:
		if !r.paths[ev.name] {
			return fmt.Errorf("%s goes and was never there", ev.name)
		}
		for p := range r.paths {
			if rest, ok := strings.CutPrefix(p, ev.name); ok && (rest == "" || rest[0] == '/') {
				delete(r.paths, p)
				if rest != "" && ev.kind == pb.EventType_EVENT_TYPE_RENAME {
					r.below[move] = append(r.below[move], rest)
				}
			}
		}
	}
	return nil
}

// follow lets the client take what the watcher has, and says which of the
// events are two halves of one move: of a directory whose content moves along.
func (r *replay) follow(t *testing.T, w *watcher, fd int) {
	told := func(from int, move uint32) {
		for i, ev := range w.events[from:] {
			if i > 0 {
				move = 0 // found
			}
			if err := r.take(ev, move); err != nil {
				t.Error(err)
			}
		}
	}
	for w.err == nil {
		before := len(w.events)
		if !w.queue.empty() {
			ev := w.queue.pop()
			move := ev.cookie
			if ev.has(unix.IN_MOVED_TO) && w.moving[move] == nil {
				move = 0
			}
			w.event(fd, ev)
			told(before, move)
			continue
		}
		more := w.pull(fd) || w.lookAgain(fd)
		if told(before, 0); !more {
			return
		}
	}
}

// Who keeps a list by the events has the list of what is there: nothing is
// missing, and nothing is reported twice.
func TestRecursiveReplay(t *testing.T) {
	rounds := 5
	if os.Getenv("CAY_NIGHTLY") == "1" {
		rounds = 100
	}
	for seed := range uint64(rounds) {
		x := watchTree(t)
		luck := rand.New(rand.NewPCG(seed, 2))
		x.w.mu.Lock() // its own goroutine waits
		done := make(chan struct{})
		go func() { // what the watcher looks at changes at any instant
			defer close(done)
			shuffle(x.w.path, luck, 300)
		}()
		client := replay{map[string]bool{}, map[uint32][]string{}}
		must(t, x.w.conn.Control(func(fd uintptr) {
			for over := false; !over; {
				select {
				case <-done:
					over = true
				default:
				}
				client.follow(t, x.w, int(fd))
			}
		}))
		must(t, x.w.err)
		x.w.queue.cost = 0 // follow has not counted
		x.w.mu.Unlock()
		want := map[string]bool{}
		must(t, filepath.WalkDir(x.w.path, func(path string, e fs.DirEntry, err error) error {
			if rel, _ := filepath.Rel(x.w.path, path); rel != "." {
				want[rel] = true
			}
			return err
		}))
		if d := gocmp.Diff(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(client.paths))); d != "" {
			t.Errorf("paths (-are, +by the events):\n%s", d)
		}
		x.settle()
		if x.w.close(); t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// shuffle makes, renames and removes files and directories below root, of which
// no two have a name in common.
func shuffle(root string, luck *rand.Rand, n int) {
	dirs := []string{""}
	for i := range n {
		name := filepath.Join(dirs[luck.IntN(len(dirs))], fmt.Sprint(i))
		path := filepath.Join(root, name)
		some := dirs[luck.IntN(len(dirs))]
		below := func(d string) bool { return d == some || strings.HasPrefix(d, some+"/") }
		switch luck.IntN(16) {
		case 0, 1, 2, 3, 4, 5:
			_ = os.Mkdir(path, 0o777)
			dirs = append(dirs, name)
		case 6, 7, 8, 9:
			_ = os.WriteFile(path, []byte("x"), 0o666)
		case 10, 11, 12, 13, 14:
			if some == "" || unix.Rename(filepath.Join(root, some), path) != nil {
				continue
			}
			for j, d := range dirs {
				if below(d) {
					dirs[j] = name + d[len(some):]
				}
			}
		default:
			if some != "" {
				_ = os.RemoveAll(filepath.Join(root, some))
				dirs = slices.DeleteFunc(dirs, below)
			}
		}
	}
}
