package envd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

func codeOf(err error) connect.Code {
	if err == nil {
		return 0
	}
	return connect.CodeOf(err)
}

func TestStatEntry(t *testing.T) {
	g := newFileGuest(t)
	file := filepath.Join(g.home, "f.txt")
	g.write(file, "12345", testUID, 0o640)
	must(t, unix.Setxattr(file, "user.e2b.author", []byte("mish"), 0))
	must(t, unix.Setxattr(file, "user.e2b.raw", []byte{0xff}, 0))
	must(t, unix.Setxattr(file, "user.other", []byte("x"), 0))
	must(t, os.Symlink("f.txt", filepath.Join(g.home, "link")))
	must(t, os.Symlink("nothing", filepath.Join(g.home, "dangling")))
	must(t, os.Symlink("dir", filepath.Join(g.home, "dirlink")))
	must(t, os.Mkdir(filepath.Join(g.home, "dir"), 0o755))
	must(t, os.Chmod(filepath.Join(g.home, "dir"), os.ModeSticky|0o777))
	must(t, os.Chown(filepath.Join(g.home, "dir"), 54321, 54322))
	must(t, unix.Mkfifo(filepath.Join(g.home, "pipe"), 0o600))

	type entry struct {
		Name, Path, Perm, Owner, Group, Target string
		Type                                   pb.FileType
		Mode                                   uint32
		Size                                   int64
		Meta                                   map[string]string
	}
	p := func(n string) string { return filepath.Join(g.home, n) }
	meta := map[string]string{"author": "mish"}
	for _, want := range []entry{
		{"f.txt", p("f.txt"), "-rw-r-----", "user", "user", "", pb.FileType_FILE_TYPE_FILE, 0o640, 5, meta},
		{"link", p("link"), "Lrwxrwxrwx", "root", "root", p("f.txt"), pb.FileType_FILE_TYPE_FILE, 0o640, 5, meta},
		{"dangling", p("dangling"), "Lrwxrwxrwx", "root", "root", p("dangling"), pb.FileType_FILE_TYPE_UNSPECIFIED, 0o777, 7, nil},
		{"dirlink", p("dirlink"), "Lrwxrwxrwx", "root", "root", p("dir"), pb.FileType_FILE_TYPE_DIRECTORY, 0o777, 3, nil},
		{"dir", p("dir"), "dtrwxrwxrwx", "54321", "54322", "", pb.FileType_FILE_TYPE_DIRECTORY, 0o777, -1, nil},
		{"pipe", p("pipe"), "prw-------", "root", "root", "", pb.FileType_FILE_TYPE_UNSPECIFIED, 0o600, 0, nil},
	} {
		t.Run(want.Name, func(t *testing.T) {
			e := g.stat(want.Name)
			got := entry{e.Name, e.Path, e.Permissions, e.Owner, e.Group, e.GetSymlinkTarget(), e.Type, e.Mode, e.Size, e.Metadata}
			if want.Size < 0 {
				got.Size = want.Size // what a directory has is the filesystem's affair
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Error(d)
			}
			st, err := os.Lstat(want.Path)
			must(t, err)
			if !e.ModifiedTime.AsTime().Equal(st.ModTime()) {
				t.Errorf("modified %v, not %v", e.ModifiedTime.AsTime(), st.ModTime())
			}
			if isLnk := st.Mode()&os.ModeSymlink != 0; isLnk != (e.SymlinkTarget != nil) {
				t.Errorf("target %v", e.SymlinkTarget)
			}
		})
	}
}

func TestStatErrors(t *testing.T) {
	g := newFileGuest(t)
	g.write(filepath.Join(g.home, "file"), "", testUID, 0o644)
	for path, want := range map[string]connect.Code{
		"missing":                            connect.CodeNotFound,
		"file/below":                         connect.CodeNotFound,
		"a\x00b":                             connect.CodeInvalidArgument,
		"~nobody/x":                          connect.CodeInvalidArgument,
		strings.Repeat("x", 4096):            connect.CodeInvalidArgument,
		strings.Repeat("x", 256):             connect.CodeInvalidArgument,
		filepath.Join(g.dir, "root", "x"):    connect.CodePermissionDenied,
		"/proc/self/fd/0/../../../../x-gone": connect.CodeNotFound, // cleaned to /x-gone
	} {
		_, err := g.fs.Stat(context.Background(), as(&pb.StatRequest{Path: path}, ""))
		if codeOf(err) != want {
			t.Errorf("%.40q: %v", path, err)
		}
	}
	_, err := g.fs.Stat(context.Background(), as(&pb.StatRequest{Path: "/"}, "stranger"))
	if codeOf(err) != connect.CodeUnauthenticated {
		t.Error("unknown user:", err)
	}
	if e := g.stat("/"); e.Type != pb.FileType_FILE_TYPE_DIRECTORY || e.Path != "/" {
		t.Error(e)
	}
	// The default directory.
	if e := g.stat(""); e.Path != g.home {
		t.Error(e)
	}
}

func TestMakeDir(t *testing.T) {
	g := newFileGuest(t)
	mk := func(path string) (*pb.EntryInfo, error) {
		r, err := g.fs.MakeDir(context.Background(), as(&pb.MakeDirRequest{Path: path}, ""))
		if err != nil {
			return nil, err
		}
		return r.Msg.Entry, nil
	}
	e, err := mk("a/b/c")
	must(t, err)
	if e.Path != filepath.Join(g.home, "a/b/c") || e.Permissions != "drwxr-xr-x" || e.Owner != "user" {
		t.Error(e)
	}
	st, err := os.Stat(filepath.Join(g.home, "a"))
	must(t, err)
	if st.Sys().(*syscall.Stat_t).Uid != testUID {
		t.Error("a parent belongs to somebody else")
	}
	g.write(filepath.Join(g.home, "file"), "", testUID, 0o644)
	must(t, os.Symlink("a", filepath.Join(g.home, "link")))
	must(t, os.Symlink("nothing", filepath.Join(g.home, "dangling")))
	for path, want := range map[string]connect.Code{
		"a/b/c":                   connect.CodeAlreadyExists,
		"link":                    connect.CodeAlreadyExists,
		"/":                       connect.CodeAlreadyExists,
		"file":                    connect.CodeInvalidArgument,
		"file/x":                  connect.CodeInvalidArgument,
		"dangling":                connect.CodeInvalidArgument,
		filepath.Join(g.dir, "x"): connect.CodePermissionDenied,
	} {
		if _, err := mk(path); codeOf(err) != want {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestMove(t *testing.T) {
	g := newFileGuest(t)
	mv := func(from, to string) error {
		r, err := g.fs.Move(context.Background(), as(&pb.MoveRequest{Source: from, Destination: to}, ""))
		if err == nil && r.Msg.Entry.Path != filepath.Join(g.home, to) && r.Msg.Entry.Path != to {
			t.Errorf("entry %v", r.Msg.Entry)
		}
		return err
	}
	g.write(filepath.Join(g.home, "a"), "a", testUID, 0o644)
	g.write(filepath.Join(g.home, "b"), "b", testUID, 0o644)
	must(t, mv("a", "new/dir/a"))
	must(t, mv("b", "new/dir/a")) // replaces
	if g.read(filepath.Join(g.home, "new/dir/a")) != "b" {
		t.Error("not replaced")
	}
	g.write(filepath.Join(g.home, "theirs"), "x", 0, 0o644)
	must(t, mv("theirs", "mine")) // its directory is the account's
	for _, tt := range []struct {
		from, to string
		want     connect.Code
	}{
		{"missing", "x", connect.CodeNotFound},
		{"", "x", connect.CodeInvalidArgument},
		{"mine", "", connect.CodeInvalidArgument},
		{"mine", "new", connect.CodeInvalidArgument},
		{"new", "new/inside", connect.CodeInvalidArgument},
		{"mine", "mine/x", connect.CodeInvalidArgument},
		{"mine", filepath.Join(g.dir, "x"), connect.CodePermissionDenied},
		{filepath.Join(g.dir, "passwd"), "x", connect.CodePermissionDenied},
	} {
		if err := mv(tt.from, tt.to); codeOf(err) != tt.want {
			t.Errorf("%s to %s: %v", tt.from, tt.to, err)
		}
	}
}

func TestMoveAcrossFilesystems(t *testing.T) {
	g := newFileGuest(t)
	other := filepath.Join(g.home, "other")
	must(t, os.Mkdir(other, 0o777))
	if err := unix.Mount("tmpfs", other, "tmpfs", 0, "size=8m,mode=1777"); err != nil {
		t.Skip("cannot mount:", err)
	}
	t.Cleanup(func() { unix.Unmount(other, unix.MNT_DETACH) })
	tree := filepath.Join(g.home, "tree")
	must(t, os.MkdirAll(filepath.Join(tree, "sub"), 0o755))
	for _, d := range []string{tree, filepath.Join(tree, "sub")} {
		must(t, os.Chown(d, testUID, testUID))
	}
	g.write(filepath.Join(tree, "sub", "f"), "content", testUID, 0o751)
	must(t, os.Symlink("sub/f", filepath.Join(tree, "link")))
	mod, err := os.Stat(filepath.Join(tree, "sub", "f"))
	must(t, err)
	_, err = g.fs.Move(context.Background(), as(&pb.MoveRequest{Source: "tree", Destination: "other/x/tree"}, ""))
	must(t, err)
	if _, err := os.Stat(tree); !os.IsNotExist(err) {
		t.Error("the source stayed:", err)
	}
	moved := filepath.Join(other, "x/tree")
	st, err := os.Stat(filepath.Join(moved, "sub/f"))
	must(t, err)
	if g.read(filepath.Join(moved, "link")) != "content" || st.Mode().Perm() != 0o751 || !st.ModTime().Equal(mod.ModTime()) {
		t.Error(st.Mode(), st.ModTime(), mod.ModTime())
	}
	// What cannot be copied whole stays where it is, whole.
	pipes := filepath.Join(other, "pipes")
	must(t, os.Mkdir(pipes, 0o777))
	must(t, os.Chown(pipes, testUID, testUID))
	must(t, unix.Mkfifo(filepath.Join(pipes, "p"), 0o600))
	_, err = g.fs.Move(context.Background(), as(&pb.MoveRequest{Source: pipes, Destination: "pipes"}, ""))
	if codeOf(err) != connect.CodeInvalidArgument {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(pipes, "p")); err != nil {
		t.Error(err)
	}
	g.leftovers(g.home)
}

func TestListDir(t *testing.T) {
	g := newFileGuest(t)
	for _, d := range []string{"d/b/deep/deeper", "d/a.dir", "d/empty"} {
		must(t, os.MkdirAll(filepath.Join(g.home, d), 0o755))
	}
	for _, f := range []string{"d/b/2", "d/b/10", "d/a", "d/b-file", "d/c"} {
		g.write(filepath.Join(g.home, f), "x", testUID, 0o644)
	}
	must(t, os.Symlink("b", filepath.Join(g.home, "d", "zlink")))
	must(t, os.Symlink("d", filepath.Join(g.home, "l")))
	must(t, os.Symlink("loop", filepath.Join(g.home, "loop")))
	must(t, os.Mkdir(filepath.Join(g.home, "d", "private"), 0o700))
	list := func(path string, depth uint32) ([]string, error) {
		r, err := g.fs.ListDir(context.Background(), as(&pb.ListDirRequest{Path: path, Depth: depth}, ""))
		if err != nil {
			return nil, err
		}
		var names []string
		for _, e := range r.Msg.Entries {
			names = append(names, strings.TrimPrefix(e.Path, g.home+"/"))
		}
		return names, nil
	}
	one := []string{"a", "a.dir", "b", "b-file", "c", "empty", "private", "zlink"}
	three := []string{"a", "a.dir", "b", "b/10", "b/2", "b/deep", "b/deep/deeper", "b-file", "c", "empty", "private", "zlink"}
	prefix := func(p string, names []string) []string {
		var out []string
		for _, n := range names {
			out = append(out, p+"/"+n)
		}
		return out
	}
	for _, tt := range []struct {
		path  string
		depth uint32
		want  []string
	}{
		{"d", 0, prefix("d", one)},
		{"d/", 1, prefix("d", one)},
		{"l", 1, prefix("l", one)},
		{"d", 3, prefix("d", three)},
		{"l", 1 << 31, prefix("l", three)},
		{"d/empty", 5, nil},
	} {
		got, err := list(tt.path, tt.depth)
		must(t, err)
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s, %d: %s", tt.path, tt.depth, d)
		}
	}
	for path, want := range map[string]connect.Code{
		"missing":                    connect.CodeNotFound,
		"d/a/x":                      connect.CodeNotFound,
		"d/a":                        connect.CodeInvalidArgument,
		"loop":                       connect.CodeFailedPrecondition,
		"d/private":                  connect.CodePermissionDenied,
		filepath.Join(g.dir, "root"): connect.CodePermissionDenied,
		"/proc/self/fd":              0,
		"/proc/self/cwd":             connect.CodeFailedPrecondition,
	} {
		if _, err := list(path, 1); codeOf(err) != want {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestListDirIsBounded(t *testing.T) {
	g := newFileGuest(t)
	l := listing{ctx: context.Background(), s: g.Server, left: 100 * (entrySize + 200)}
	for i := range 200 {
		g.write(filepath.Join(g.home, strings.Repeat("n", 100)+fmt.Sprint(i)), "", testUID, 0o644)
	}
	if err := l.root(g.home, 1); asFault(err).code != connect.CodeResourceExhausted {
		t.Error(err)
	}
	if len(l.entries) != 0 {
		t.Error("entries were made for nothing")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	l = listing{ctx: ctx, s: g.Server, left: maxListing}
	if err := l.root(g.home, 1); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestRemove(t *testing.T) {
	g := newFileGuest(t)
	rm := func(path string) error {
		_, err := g.fs.Remove(context.Background(), as(&pb.RemoveRequest{Path: path}, ""))
		return err
	}
	tree := filepath.Join(g.home, "tree")
	must(t, os.MkdirAll(filepath.Join(tree, "a/b/c"), 0o755))
	must(t, os.MkdirAll(filepath.Join(g.home, "kept"), 0o755))
	g.write(filepath.Join(g.home, "kept", "f"), "x", testUID, 0o644)
	for i := range 3000 {
		must(t, os.WriteFile(filepath.Join(tree, "a", fmt.Sprint(i)), nil, 0o644))
	}
	must(t, os.Symlink("../kept", filepath.Join(tree, "out")))
	must(t, filepath.Walk(tree, func(p string, _ os.FileInfo, err error) error {
		return errors.Join(err, os.Lchown(p, testUID, testUID))
	}))
	must(t, rm("tree"))
	if _, err := os.Lstat(tree); !os.IsNotExist(err) {
		t.Error(err)
	}
	if g.read(filepath.Join(g.home, "kept/f")) != "x" {
		t.Error("a link was followed")
	}
	must(t, rm("tree"))
	must(t, rm("kept/f/below"))
	must(t, rm("no/such/parent"))

	// Deeper than any path may be long.
	dir, err := os.Open(g.home)
	must(t, err)
	fd := int(dir.Fd())
	for range 300 {
		must(t, unix.Mkdirat(fd, "deep-deep-deep-deep", 0o755))
		must(t, unix.Fchownat(fd, "deep-deep-deep-deep", testUID, testUID, 0))
		next, err := unix.Openat(fd, "deep-deep-deep-deep", unix.O_DIRECTORY, 0)
		must(t, err)
		if fd != int(dir.Fd()) {
			unix.Close(fd)
		}
		fd = next
	}
	unix.Close(fd)
	dir.Close()
	must(t, rm("deep-deep-deep-deep"))

	root := filepath.Join(g.home, "rootdir")
	must(t, os.Mkdir(root, 0o755))
	g.write(filepath.Join(root, "f"), "x", 0, 0o666)
	for path, want := range map[string]connect.Code{
		"":                             connect.CodeInvalidArgument,
		"/":                            connect.CodeInvalidArgument,
		"x/../../../../../../../../..": connect.CodeInvalidArgument,
		"rootdir":                      connect.CodePermissionDenied,
		filepath.Join(g.dir, "passwd"): connect.CodePermissionDenied,
	} {
		if err := rm(path); codeOf(err) != want {
			t.Errorf("%s: %v", path, err)
		}
	}
	if g.read(filepath.Join(root, "f")) != "x" {
		t.Error("root's file is gone")
	}
}

func TestTempNames(t *testing.T) {
	var names []string
	for _, k := range []byte{tempCreates, tempReplaces} {
		n := tempName(k)
		if tempKind(n) != k {
			t.Errorf("%q is not known", n)
		}
		names = append(names, n)
	}
	if slices.Equal(names[:1], names[1:]) {
		t.Error("names repeat")
	}
	forged := strings.Replace(names[0], tempPrefix+"c", tempPrefix+"r", 1)
	for _, n := range []string{"", "x", tempPrefix, forged, names[0] + "x", names[0][:len(names[0])-1] + "~"} {
		if tempKind(n) != 0 {
			t.Errorf("%q passes", n)
		}
	}
}

// A name that is not UTF-8 stands in listings, answers and events with U+FFFD,
// and takes nothing else away.
func TestNamesThatAreNotUTF8(t *testing.T) {
	g := newFileGuest(t)
	p := g.poll(&pb.CreateWatcherRequest{Path: g.home, IncludeEntry: true})
	must(t, os.WriteFile(filepath.Join(g.home, "a\xff\xfeb"), nil, 0o644))
	must(t, os.Symlink("a\xff\xfeb", filepath.Join(g.home, "link")))
	evs := p.messages()
	if len(evs) != 2 || evs[0].Name != "a\ufffdb" || evs[0].Entry.GetPath() != g.home+"/a\ufffdb" || evs[1].Entry.GetSymlinkTarget() != g.home+"/a\ufffdb" {
		t.Errorf("reported are %v", evs)
	}
	r, err := g.fs.ListDir(t.Context(), as(&pb.ListDirRequest{Path: g.home, Depth: 1}, ""))
	must(t, err)
	if es := r.Msg.Entries; len(es) != 2 || es[0].Name != "a\ufffdb" || es[1].Name != "link" {
		t.Errorf("listed are %v", es)
	}
}
