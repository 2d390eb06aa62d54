package envd

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// raceTime is how long each race lasts: CAY_RACE_TIME, or a moment.
func raceTime(t *testing.T) time.Duration {
	t.Helper()
	if s := os.Getenv("CAY_RACE_TIME"); s != "" {
		d, err := time.ParseDuration(s)
		must(t, err)
		return d
	}
	return 500 * time.Millisecond
}

// state is all that matters of a tree: names, kinds, modes, owners, contents
// and attributes.
func state(t *testing.T, dir string) map[string]string {
	t.Helper()
	m := map[string]string{}
	must(t, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		text := fmt.Sprintf("%v %d:%d %v ", fileMode(st.Mode), st.Uid, st.Gid, pathAttrs(p).metadata())
		if isRegular(&st) {
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			text += string(b)
		}
		m[p] = text
		return nil
	}))
	return m
}

// victims makes root's files next to the homes: open to be read, and private.
func (g *fileGuest) victims() string {
	g.t.Helper()
	dir := filepath.Join(g.dir, "victims")
	for _, d := range []string{dir, filepath.Join(dir, "sub"), filepath.Join(dir, "private")} {
		must(g.t, os.Mkdir(d, 0o755))
	}
	for _, f := range []string{"f", "g", "sub/f", "sub/g", "private/f"} {
		g.write(filepath.Join(dir, f), "root's "+f, 0, 0o644)
	}
	g.write(filepath.Join(dir, "secret"), "top secret", 0, 0o600)
	must(g.t, os.Chmod(filepath.Join(dir, "private"), 0o700))
	return dir
}

// attempt is one try to reach what a path must not reach; the text is what it
// got to see.
type attempt func(ctx context.Context, i int) string

// tries are all operations on names below dir, as an account.
func (g *fileGuest) tries(user, dir string) []attempt {
	p := func(n string) string { return filepath.Join(dir, n) }
	send := func(path, text string, header ...string) {
		g.put(g.url("path", path, "username", user), strings.NewReader(text), header...)
	}
	fetch := func(path string) string {
		code, body, _ := g.get(g.url("path", path, "username", user))
		if code != 200 {
			return ""
		}
		return body
	}
	return []attempt{
		func(context.Context, int) string { send(p("f"), "stolen", "X-Metadata-K", "v"); return "" },
		func(_ context.Context, i int) string { send(p(fmt.Sprint("new", i%8)), "stolen"); return "" },
		func(_ context.Context, i int) string { send(p(fmt.Sprintf("made%d/f", i%8)), "stolen"); return "" },
		func(context.Context, int) string { return fetch(p("secret")) },
		func(context.Context, int) string { return fetch(p("private/f")) },
		func(ctx context.Context, _ int) string {
			g.fs.Move(ctx, as(&pb.MoveRequest{Source: p("f"), Destination: p("g")}, user))
			return ""
		},
		func(ctx context.Context, i int) string {
			g.fs.Move(ctx, as(&pb.MoveRequest{Source: p("sub"), Destination: filepath.Join(g.home, fmt.Sprint("got", i))}, user))
			return ""
		},
		func(ctx context.Context, _ int) string {
			g.fs.Remove(ctx, as(&pb.RemoveRequest{Path: p("f")}, user))
			return ""
		},
		func(ctx context.Context, _ int) string {
			g.fs.Remove(ctx, as(&pb.RemoveRequest{Path: p("sub")}, user))
			return ""
		},
		func(ctx context.Context, i int) string {
			g.fs.MakeDir(ctx, as(&pb.MakeDirRequest{Path: p(fmt.Sprintf("dir%d/x", i%8))}, user))
			return ""
		},
		func(ctx context.Context, _ int) string {
			r, err := g.fs.ListDir(ctx, as(&pb.ListDirRequest{Path: p("private"), Depth: 3}, user))
			if err != nil {
				return ""
			}
			return fmt.Sprint(r.Msg.Entries)
		},
	}
}

// race runs every attempt again and again, for a while.
func (g *fileGuest) race(d time.Duration, tries []attempt) {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	var wg sync.WaitGroup
	for _, try := range tries {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				if got := try(context.Background(), i); strings.Contains(got, "root's") || strings.Contains(got, "secret") {
					g.t.Errorf("got to see %q", got)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestIdentity(t *testing.T) {
	g := newFileGuest(t)
	dir := g.victims()
	before := state(t, dir)
	for _, try := range g.tries("user", dir) {
		for i := range 3 {
			if got := try(context.Background(), i); strings.Contains(got, "secret") || strings.Contains(got, "private") {
				t.Errorf("got to see %q", got)
			}
		}
	}
	if d := cmp.Diff(before, state(t, dir)); d != "" {
		t.Error(d)
	}
	// Root may, of course.
	if code, body, _ := g.get(g.url("path", filepath.Join(dir, "secret"), "username", "root")); code != 200 || body != "top secret" {
		t.Error(code, body)
	}
	if code, _ := g.put(g.url("path", filepath.Join(dir, "f"), "username", "root"), strings.NewReader("mine")); code != 200 {
		t.Error(code)
	}
	// Groups count.
	team := filepath.Join(g.dir, "team")
	must(t, os.Mkdir(team, 0o755))
	must(t, os.Chown(team, 0, 12399))
	must(t, os.Chmod(team, 0o770))
	for _, u := range []string{"user", "other"} {
		if code, body := g.put(g.url("path", filepath.Join(team, u), "username", u), strings.NewReader("x")); code != 200 {
			t.Error(code, body)
		}
	}
}

// While a directory of the account and a link to root's directory change
// places without pause, nothing of root's is changed or seen.
func TestRaceDirectoryForLink(t *testing.T) {
	g := newFileGuest(t)
	dir := g.victims()
	before := state(t, dir)
	d, l := filepath.Join(g.home, "d"), filepath.Join(g.home, "l")
	must(t, os.MkdirAll(filepath.Join(d, "private"), 0o755))
	must(t, os.Lchown(d, testUID, testUID))
	must(t, os.Symlink(dir, l))
	must(t, os.Lchown(l, testUID, testUID))

	var stop atomic.Bool
	var swaps int
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			if unix.Renameat2(unix.AT_FDCWD, d, unix.AT_FDCWD, l, unix.RENAME_EXCHANGE) == nil {
				swaps++
			}
		}
	})
	g.race(raceTime(t), g.tries("user", d))
	stop.Store(true)
	wg.Wait()
	if swaps < 10 {
		t.Errorf("only %d swaps", swaps)
	}
	if diff := cmp.Diff(before, state(t, dir)); diff != "" {
		t.Error(diff)
	}
	// What the account could not have made: files of root's in its home.
	must(t, filepath.WalkDir(g.home, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := os.Lstat(p)
		if err != nil {
			return err
		}
		if st.Mode().IsRegular() && st.Sys().(*syscall.Stat_t).Uid == 0 {
			t.Errorf("%s is root's", p)
		}
		return nil
	}))
}

// Root removes and lists a tree in which the account swaps directories for
// links: rights do not help there, only that links are not followed.
func TestRaceRootInForeignTree(t *testing.T) {
	g := newFileGuest(t)
	dir := g.victims()
	before := state(t, dir)
	tree := filepath.Join(g.home, "tree")
	d, l := filepath.Join(tree, "d"), filepath.Join(g.home, "l")
	must(t, os.Symlink(dir, l))
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			os.MkdirAll(filepath.Join(d, "sub"), 0o755)
			os.WriteFile(filepath.Join(d, "sub", "f"), nil, 0o644)
			os.WriteFile(filepath.Join(d, "f"), nil, 0o644)
			unix.Renameat2(unix.AT_FDCWD, d, unix.AT_FDCWD, l, unix.RENAME_EXCHANGE)
			unix.Renameat2(unix.AT_FDCWD, d, unix.AT_FDCWD, l, unix.RENAME_EXCHANGE)
		}
	})
	remove := func(ctx context.Context, _ int) string {
		g.fs.Remove(ctx, as(&pb.RemoveRequest{Path: tree}, "root"))
		return ""
	}
	list := func(ctx context.Context, _ int) string {
		r, err := g.fs.ListDir(ctx, as(&pb.ListDirRequest{Path: tree, Depth: 5}, "root"))
		if err != nil {
			return ""
		}
		for _, e := range r.Msg.Entries {
			if e.SymlinkTarget == nil && (e.Name == "secret" || e.Name == "private") {
				return "secret: " + e.Path
			}
		}
		return ""
	}
	g.race(raceTime(t), []attempt{remove, remove, list})
	stop.Store(true)
	wg.Wait()
	if diff := cmp.Diff(before, state(t, dir)); diff != "" {
		t.Error(diff)
	}
}

// Accounts at the same time, each gets its own, and every thread is root's
// again afterwards.
func TestThreadsComeBack(t *testing.T) {
	g := newFileGuest(t)
	var wg sync.WaitGroup
	for i := range 60 {
		name, uid, home := "user", uint32(testUID), g.home
		if i%2 == 1 {
			name, uid, home = "other", testUID2, filepath.Join(g.dir, "home", "other")
		}
		wg.Go(func() {
			path := filepath.Join(home, fmt.Sprint("f", i))
			if code, body := g.put(g.url("path", path, "username", name), strings.NewReader("x")); code != 200 {
				t.Error(code, body)
				return
			}
			st, err := os.Stat(path)
			if err != nil || st.Sys().(*syscall.Stat_t).Uid != uid {
				t.Errorf("%s: %v", path, err)
			}
			wrong := filepath.Join(g.dir, "home", map[string]string{"user": "other", "other": "user"}[name], "x")
			if code, _ := g.put(g.url("path", wrong, "username", name), strings.NewReader("x")); code != 403 {
				t.Errorf("%s in the home of another: %d", name, code)
			}
		})
	}
	wg.Wait()
	tasks, err := filepath.Glob("/proc/self/task/*/status")
	must(t, err)
	for _, f := range tasks {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // the thread has ended
		}
		for line := range strings.Lines(string(b)) {
			if k, v, _ := strings.Cut(line, ":"); (k == "Uid" || k == "Gid") && strings.Join(strings.Fields(v), " ") != "0 0 0 0" {
				t.Errorf("%s: %s", f, line)
			}
		}
	}
}
