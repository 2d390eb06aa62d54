package envd

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

func TestUploadOctetStream(t *testing.T) {
	g := newFileGuest(t)
	code, body := g.put(g.url("path", "a/b/c.txt"), strings.NewReader("hello"), "X-Metadata-Author", "mish")
	if code != 200 {
		t.Fatal(code, body)
	}
	path := filepath.Join(g.home, "a/b/c.txt")
	want := []uploaded{{Name: "c.txt", Path: path, Type: "file", Metadata: map[string]string{"author": "mish"}}}
	if d := cmp.Diff(want, decodeUploaded(t, body)); d != "" {
		t.Error(d)
	}
	if got := g.read(path); got != "hello" {
		t.Errorf("content %q", got)
	}
	for _, p := range []string{path, filepath.Dir(path), filepath.Join(g.home, "a")} {
		st, err := os.Stat(p)
		must(t, err)
		if sys := st.Sys().(*syscall.Stat_t); sys.Uid != testUID || sys.Gid != testUID {
			t.Errorf("%s belongs to %d:%d", p, sys.Uid, sys.Gid)
		}
	}
	if e := g.stat(path); e.Permissions != "-rw-r--r--" || e.Owner != "user" || e.Metadata["author"] != "mish" {
		t.Errorf("entry %v", e)
	}
	// Each upload replaces the whole set.
	if code, body := g.put(g.url("path", path), strings.NewReader("again")); code != 200 || strings.Contains(body, "metadata") {
		t.Error(code, body)
	}
	if e := g.stat(path); len(e.Metadata) != 0 {
		t.Errorf("metadata stayed: %v", e.Metadata)
	}
	g.leftovers(filepath.Dir(path))
}

func TestUploadMultipart(t *testing.T) {
	g := newFileGuest(t)
	send := func(query string, parts ...[2]string) (int, string) {
		body, kind := form(parts...)
		return g.put(g.web.URL+"/files?"+query, body, "Content-Type", kind)
	}
	t.Run("full file names", func(t *testing.T) {
		code, body := send("", [2]string{"x/one.txt", "1"}, [2]string{filepath.Join(g.home, "y/two é.txt"), "22"})
		if code != 200 {
			t.Fatal(code, body)
		}
		want := []uploaded{
			{Name: "one.txt", Path: filepath.Join(g.home, "x/one.txt"), Type: "file"},
			{Name: "two é.txt", Path: filepath.Join(g.home, "y/two é.txt"), Type: "file"},
		}
		if d := cmp.Diff(want, decodeUploaded(t, body)); d != "" {
			t.Error(d)
		}
		if g.read(want[0].Path) != "1" || g.read(want[1].Path) != "22" {
			t.Error("contents differ")
		}
	})
	t.Run("the query's path wins", func(t *testing.T) {
		code, body := send("path=given.txt", [2]string{"ignored.txt", "3"})
		if code != 200 || g.read(filepath.Join(g.home, "given.txt")) != "3" {
			t.Error(code, body)
		}
	})
	t.Run("two parts for one path", func(t *testing.T) {
		code, body := send("", [2]string{"dup", "1"}, [2]string{"./dup", "2"})
		if code != 400 || !strings.Contains(body, "more than one") {
			t.Error(code, body)
		}
		code, _ = send("path=dup2", [2]string{"a", "1"}, [2]string{"b", "2"})
		if code != 400 {
			t.Error(code)
		}
	})
	t.Run("no name", func(t *testing.T) {
		if code, body := send("", [2]string{"", "1"}); code != 400 {
			t.Error(code, body)
		}
	})
	t.Run("no file", func(t *testing.T) {
		if code, body := send(""); code != 400 {
			t.Error(code, body)
		}
	})
	t.Run("many", func(t *testing.T) {
		var parts [][2]string
		for i := range 300 {
			parts = append(parts, [2]string{fmt.Sprintf("many/%d", i), fmt.Sprint(i)})
		}
		if code, body := send("", parts...); code != 200 {
			t.Fatal(code, body)
		}
		names, _ := os.ReadDir(filepath.Join(g.home, "many"))
		if len(names) != 300 {
			t.Errorf("%d files", len(names))
		}
	})
	t.Run("gzip", func(t *testing.T) {
		body, kind := form([2]string{"z1", "one"}, [2]string{"z2", "two"})
		plain, _ := io.ReadAll(body)
		code, text := g.put(g.url(), bytes.NewReader(zipped(t, plain)), "Content-Type", kind, "Content-Encoding", "gzip")
		if code != 200 || g.read(filepath.Join(g.home, "z2")) != "two" {
			t.Error(code, text)
		}
		// A wrong checksum at the very end: the last file is not taken.
		body, kind = form([2]string{"z3", "three"})
		plain, _ = io.ReadAll(body)
		z := zipped(t, plain)
		z[len(z)-5] ^= 1
		code, _ = g.put(g.url(), bytes.NewReader(z), "Content-Type", kind, "Content-Encoding", "gzip")
		if _, err := os.Stat(filepath.Join(g.home, "z3")); code != 400 || !os.IsNotExist(err) {
			t.Error(code, err)
		}
	})
	g.leftovers(g.home)
}

func zipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	z.Write(b)
	must(t, z.Close())
	return buf.Bytes()
}

func TestUploadRefused(t *testing.T) {
	g := newFileGuest(t)
	must(t, os.Mkdir(filepath.Join(g.home, "dir"), 0o755))
	must(t, unix.Mkfifo(filepath.Join(g.home, "pipe"), 0o666))
	must(t, os.Chmod(filepath.Join(g.home, "pipe"), 0o666))
	g.write(filepath.Join(g.home, "file"), "old", testUID, 0o644)
	secret := filepath.Join(g.dir, "root", "secret")
	g.write(secret, "root's", 0, 0o644)
	g.write(filepath.Join(g.home, "theirs"), "root's", 0, 0o644)
	must(t, os.Symlink(secret, filepath.Join(g.home, "link")))
	must(t, os.Symlink("loop", filepath.Join(g.home, "loop")))
	broken := zipped(t, bytes.Repeat([]byte("x"), 1000))[:20]
	for _, tt := range []struct {
		name, path string
		header     []string
		body       string
		code       int
	}{
		{"no path", "", nil, "x", 400},
		{"directory", "dir", nil, "x", 400},
		{"root directory", "/", nil, "x", 400},
		{"pipe", "pipe", nil, "x", 400},
		{"device", "/dev/null", nil, "x", 400},
		{"file as directory", "file/x", nil, "x", 400},
		{"NUL", "a\x00b", nil, "x", 400},
		{"not UTF-8", "a\xff", nil, "x", 400},
		{"long name", strings.Repeat("n", 256), nil, "x", 400},
		{"long path", strings.Repeat("n/", 2048), nil, "x", 400},
		{"home of another", "~root/x", nil, "x", 400},
		{"link loop", "loop", nil, "x", 400},
		{"root's file", "theirs", nil, "x", 403},
		{"root's directory", filepath.Join(g.dir, "x"), nil, "x", 403},
		{"private directory", secret, nil, "x", 403},
		{"link to root's file", "link", nil, "x", 403},
		{"envd's own descriptors", "/proc/self/fd/1", nil, "x", 400},
		{"broken gzip", "file", []string{"Content-Encoding", "gzip"}, string(broken), 400},
		{"no gzip", "file", []string{"Content-Encoding", "gzip"}, "plain", 400},
		{"unknown encoding", "file", []string{"Content-Encoding", "br"}, "x", 400},
		{"content type", "file", []string{"Content-Type", "text/plain"}, "x", 400},
		{"no content type", "file", []string{"Content-Type", ""}, "x", 400},
		{"no boundary", "file", []string{"Content-Type", "multipart/form-data"}, "x", 400},
		{"broken multipart", "file", []string{"Content-Type", "multipart/form-data; boundary=b"}, "--b\r\nx", 400},
		{"metadata", "file", []string{"X-Metadata-A", "ä"}, "x", 400},
		{"large metadata", "file", []string{"X-Metadata-A", strings.Repeat("v", 4096)}, "x", 400},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, body := g.put(g.url("path", tt.path), strings.NewReader(tt.body), tt.header...)
			if code != tt.code || !strings.Contains(body, fmt.Sprintf(`"code":%d`, tt.code)) {
				t.Error(code, body)
			}
		})
	}
	code, body := g.put(g.url("path", "x", "username", "nobody-here"), strings.NewReader("x"))
	if code != 401 {
		t.Error("unknown user:", code, body)
	}
	if g.read(filepath.Join(g.home, "file")) != "old" || g.read(secret) != "root's" || g.read(filepath.Join(g.home, "theirs")) != "root's" {
		t.Error("a refused upload changed a file")
	}
	g.leftovers(g.home)
}

func TestUploadKeepsModeAndLinks(t *testing.T) {
	g := newFileGuest(t)
	script := filepath.Join(g.home, "script")
	g.write(script, "old", testUID, 0o750)
	must(t, os.Symlink("script", filepath.Join(g.home, "link")))
	must(t, os.Symlink("missing", filepath.Join(g.home, "dangling")))

	if code, body := g.put(g.url("path", "link"), strings.NewReader("new")); code != 200 {
		t.Fatal(code, body)
	}
	if to, err := os.Readlink(filepath.Join(g.home, "link")); to != "script" {
		t.Error("the link is gone:", to, err)
	}
	st, err := os.Stat(script)
	must(t, err)
	if g.read(script) != "new" || st.Mode().Perm() != 0o750 {
		t.Error(g.read(script), st.Mode())
	}
	if code, body := g.put(g.url("path", "dangling"), strings.NewReader("made")); code != 200 || g.read(filepath.Join(g.home, "missing")) != "made" {
		t.Error(code, body)
	}
	// A link to nothing, and an upload that breaks: nothing stays.
	must(t, os.Remove(filepath.Join(g.home, "missing")))
	if code, _ := g.put(g.url("path", "dangling"), strings.NewReader("xx"), "Content-Encoding", "gzip"); code != 400 {
		t.Error(code)
	}
	u, err := g.users.lookup("user")
	must(t, err)
	s, err := stage(u, filepath.Join(g.home, "dangling"), "")
	must(t, err)
	s.discard()
	if _, err := os.Lstat(filepath.Join(g.home, "missing")); !os.IsNotExist(err) {
		t.Error("an empty file stayed:", err)
	}
	g.leftovers(g.home)
}

// A file that the account may write to in a directory where it may make none.
func TestUploadInPlace(t *testing.T) {
	g := newFileGuest(t)
	dir := filepath.Join(g.dir, "shared")
	must(t, os.Mkdir(dir, 0o755))
	sticky := filepath.Join(g.dir, "sticky")
	must(t, os.Mkdir(sticky, 0o755))
	must(t, os.Chmod(sticky, os.ModeSticky|0o777))
	for _, f := range []string{filepath.Join(dir, "f"), filepath.Join(sticky, "f")} {
		g.write(f, "a much longer old text", 0, 0o666)
		before, err := os.Stat(f)
		must(t, err)
		code, body := g.put(g.url("path", f), strings.NewReader("new"), "X-Metadata-K", "v")
		if code != 200 || g.read(f) != "new" {
			// protected_regular may forbid it in a sticky directory only for
			// opens that create, which these are not.
			t.Error(code, body, g.read(f))
		}
		after, err := os.Stat(f)
		must(t, err)
		if !os.SameFile(before, after) {
			t.Error("the file was replaced")
		}
		if e := g.stat(f); e.Metadata["k"] != "v" {
			t.Error("metadata", e.Metadata)
		}
		g.leftovers(filepath.Dir(f))
	}
}

// A client that vanishes in the middle leaves the old file, or none.
func TestUploadBroken(t *testing.T) {
	g := newFileGuest(t)
	old := filepath.Join(g.home, "old")
	g.write(old, "old", testUID, 0o644)
	for _, name := range []string{"old", "new"} {
		conn, err := net.Dial("tcp", g.web.Listener.Addr().String())
		must(t, err)
		fmt.Fprintf(conn, "POST /files?path=%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\n", name)
		conn.Write(bytes.Repeat([]byte("n"), 500_000))
		conn.(*net.TCPConn).CloseWrite()
		answer, _ := io.ReadAll(conn) // the daemon has let go when it is there
		conn.Close()
		if !bytes.Contains(answer, []byte(" 400 ")) {
			t.Errorf("answer %q", answer)
		}
	}
	if g.read(old) != "old" {
		t.Error("the old file is damaged")
	}
	if _, err := os.Stat(filepath.Join(g.home, "new")); !os.IsNotExist(err) {
		t.Error("half a file appeared:", err)
	}
	g.leftovers(g.home)
}

func TestUploadFullDisk(t *testing.T) {
	g := newFileGuest(t)
	small := filepath.Join(g.home, "small")
	must(t, os.Mkdir(small, 0o777))
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m,mode=1777"); err != nil {
		t.Skip("cannot mount:", err)
	}
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	if code, body := g.put(g.url("path", "small/old"), strings.NewReader("old")); code != 200 {
		t.Fatal(code, body)
	}
	big := bytes.Repeat([]byte("x"), 2<<20)
	for name, body := range map[string]io.Reader{
		"known size":   bytes.NewReader(big),
		"unknown size": struct{ io.Reader }{bytes.NewReader(big)},
	} {
		code, text := g.put(g.url("path", "small/old"), body)
		if code != 507 || !strings.Contains(text, `"code":507`) {
			t.Errorf("%s: %d %s", name, code, text)
		}
	}
	if got := g.read(filepath.Join(small, "old")); got != "old" {
		t.Errorf("the old file holds %d bytes", len(got))
	}
	g.leftovers(small)
}

// A transfer takes a few buffers, whatever its size, on both sides together.
func TestLargeFile(t *testing.T) {
	g := newFileGuest(t)
	const size, most = 64 << 20, 4 << 20
	allocated := func() uint64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.TotalAlloc
	}
	start := allocated()
	code, body := g.put(g.url("path", "large"), io.LimitReader(pattern{}, size))
	if code != 200 {
		t.Fatal(code, body)
	}
	if n := allocated() - start; n > most {
		t.Errorf("the upload took %d KiB", n>>10)
	}
	f, err := os.Open(filepath.Join(g.home, "large"))
	must(t, err)
	defer f.Close()
	if n := comparePattern(t, f); n != size {
		t.Errorf("%d bytes", n)
	}
	for _, enc := range []string{"identity", "gzip"} {
		start = allocated()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.url("path", "large"), nil)
		must(t, err)
		r.Header.Set("Accept-Encoding", enc)
		resp, err := g.web.Client().Do(r)
		must(t, err)
		in := io.Reader(resp.Body)
		if enc == "gzip" {
			in, err = gzip.NewReader(in)
			must(t, err)
		}
		if n := comparePattern(t, in); n != size {
			t.Errorf("%d bytes came back as %s", n, enc)
		}
		resp.Body.Close()
		if n := allocated() - start; n > most {
			t.Errorf("the download as %s took %d KiB", enc, n>>10)
		}
	}
}

// pattern is an endless text in which no two places look alike.
type pattern struct{}

func (pattern) Read(b []byte) (int, error) {
	b = b[:len(b)&^7]
	for i := 0; i < len(b); i += 8 {
		copy(b[i:], "cay-sand")
	}
	return len(b), nil
}

func comparePattern(t *testing.T, r io.Reader) int {
	t.Helper()
	n := 0
	buf := make([]byte, 1<<16)
	for {
		m, err := io.ReadFull(r, buf)
		for i := range m {
			if buf[i] != "cay-sand"[(n+i)%8] {
				t.Fatalf("byte %d differs", n+i)
			}
		}
		if n += m; err != nil {
			return n
		}
	}
}

// The file appears under its name only when it is whole.
func TestUploadAtomic(t *testing.T) {
	g := newFileGuest(t)
	path := filepath.Join(g.home, "f")
	g.write(path, "old", testUID, 0o644)
	pr, pw := io.Pipe()
	done := make(chan int)
	go func() {
		code, _ := g.put(g.url("path", path), pr)
		done <- code
	}()
	for range 64 {
		pw.Write(bytes.Repeat([]byte("n"), 64<<10))
		if got := g.read(path); got != "old" {
			t.Fatalf("half of it shows: %d bytes", len(got))
		}
	}
	l, err := g.fs.ListDir(context.Background(), as(&pb.ListDirRequest{Path: g.home}, ""))
	must(t, err)
	if len(l.Msg.Entries) != 1 {
		t.Errorf("unfinished files are listed: %v", l.Msg.Entries)
	}
	pw.Close()
	select {
	case code := <-done:
		if code != 200 {
			t.Error(code)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the upload hangs")
	}
	if got := len(g.read(path)); got != 64*64<<10 {
		t.Errorf("%d bytes", got)
	}
}
