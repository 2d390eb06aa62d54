package envd

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestDownload(t *testing.T) {
	g := newFileGuest(t)
	text := strings.Repeat("0123456789", 1000)
	g.write(filepath.Join(g.home, "a é.txt"), text, testUID, 0o644)
	g.write(filepath.Join(g.home, "empty"), "", testUID, 0o644)
	mod := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	must(t, os.Chtimes(filepath.Join(g.home, "a é.txt"), mod, mod))

	code, body, h := g.get(g.url("path", "a é.txt"))
	if code != 200 || body != text {
		t.Fatal(code, len(body))
	}
	for k, want := range map[string]string{
		"Content-Disposition": "inline; filename*=utf-8''a%20%C3%A9.txt",
		"Content-Type":        "text/plain; charset=utf-8",
		"Vary":                "Accept-Encoding",
		"Content-Length":      "10000",
		"Accept-Ranges":       "bytes",
		"Last-Modified":       mod.Format(http.TimeFormat),
	} {
		if h.Get(k) != want {
			t.Errorf("%s: %q", k, h.Get(k))
		}
	}

	t.Run("ranges and conditions", func(t *testing.T) {
		u := g.url("path", "a é.txt")
		for _, tt := range []struct {
			header []string
			code   int
			body   string
		}{
			{[]string{"Range", "bytes=0-3"}, 206, "0123"},
			{[]string{"Range", "bytes=-2"}, 206, "89"},
			{[]string{"Range", "bytes=9998-"}, 206, "89"},
			{[]string{"Range", "bytes=0-3", "Accept-Encoding", "gzip"}, 206, "0123"},
			{[]string{"Range", "bytes=20000-"}, 416, "invalid range: failed to overlap\n"},
			{[]string{"Range", "bytes=0-3", "If-Range", mod.Format(http.TimeFormat)}, 206, "0123"},
			{[]string{"Range", "bytes=0-3", "If-Range", mod.Add(time.Hour).Format(http.TimeFormat)}, 200, text},
			{[]string{"If-Modified-Since", mod.Format(http.TimeFormat)}, 304, ""},
			{[]string{"If-Modified-Since", mod.Add(-time.Hour).Format(http.TimeFormat)}, 200, text},
			{[]string{"If-Unmodified-Since", mod.Add(-time.Hour).Format(http.TimeFormat)}, 412, ""},
		} {
			code, body, _ := g.get(u, tt.header...)
			if code != tt.code || body != tt.body {
				t.Errorf("%v: %d %.40q", tt.header, code, body)
			}
		}
	})
	t.Run("gzip", func(t *testing.T) {
		code, body, h := g.get(g.url("path", "a é.txt"), "Accept-Encoding", "deflate, gzip, br")
		z, err := gzip.NewReader(strings.NewReader(body))
		must(t, err)
		plain, err := io.ReadAll(z)
		if code != 200 || err != nil || string(plain) != text || h.Get("Content-Encoding") != "gzip" || len(body) > 1000 {
			t.Error(code, err, len(plain), h)
		}
		if h.Get("Content-Type") != "text/plain; charset=utf-8" || h.Get("Vary") != "Accept-Encoding" {
			t.Error(h)
		}
		code, body, h = g.get(g.url("path", "empty"), "Accept-Encoding", "gzip")
		if code != 200 || body != "" || h.Get("Content-Length") != "0" || h.Get("Content-Encoding") != "" {
			t.Error(code, body, h)
		}
	})
	t.Run("not acceptable", func(t *testing.T) {
		for _, header := range [][]string{
			{"Accept-Encoding", "br, identity;q=0"},
			{"Accept-Encoding", "gzip, identity;q=0", "Range", "bytes=0-1"},
		} {
			if code, body, _ := g.get(g.url("path", "empty"), header...); code != 406 || !strings.Contains(body, `"code":406`) {
				t.Error(code, body)
			}
		}
	})
	t.Run("HEAD", func(t *testing.T) {
		for _, enc := range []string{"", "gzip"} {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodHead, g.url("path", "a é.txt"), nil)
			must(t, err)
			r.Header.Set("Accept-Encoding", enc)
			code, body, h := g.do(r)
			if code != 200 || body != "" || h.Get("Content-Encoding") != enc {
				t.Error(code, body, h)
			}
			if enc == "" && h.Get("Content-Length") != strconv.Itoa(len(text)) {
				t.Error(h)
			}
		}
	})
	t.Run("files of proc", func(t *testing.T) {
		want, err := os.ReadFile("/proc/version")
		must(t, err)
		for _, enc := range []string{"", "gzip"} {
			code, body, h := g.get(g.url("path", "/proc/version"), "Accept-Encoding", enc)
			if h.Get("Content-Encoding") == "gzip" {
				z, err := gzip.NewReader(strings.NewReader(body))
				must(t, err)
				b, _ := io.ReadAll(z)
				body = string(b)
			}
			if code != 200 || body != string(want) {
				t.Error(code, body)
			}
		}
	})
}

func TestDownloadRefused(t *testing.T) {
	g := newFileGuest(t)
	must(t, unix.Mkfifo(filepath.Join(g.home, "pipe"), 0o666))
	g.write(filepath.Join(g.home, "private"), "x", 0, 0o600)
	g.write(filepath.Join(g.dir, "root", "open"), "x", 0, 0o644)
	must(t, os.Symlink("/proc/self/fd", filepath.Join(g.home, "fds")))
	must(t, os.Symlink(filepath.Join(g.dir, "root", "open"), filepath.Join(g.home, "link")))
	held, err := os.Open(filepath.Join(g.dir, "root")) // as if a request of root were under way
	must(t, err)
	defer held.Close()
	fd := strconv.Itoa(int(held.Fd()))
	for path, want := range map[string]int{
		"":                                     400, // the default directory
		"missing":                              404,
		"private/x":                            404,
		"pipe":                                 400,
		"/dev/zero":                            400,
		"private":                              403,
		"link":                                 403,
		"a\x00b":                               400,
		"a\xff":                                400,
		"~other/x":                             400,
		"fds/" + fd + "/open":                  400,
		"/proc/self/fd/" + fd + "/open":        400,
		"/proc/thread-self/fd/" + fd + "/open": 400,
	} {
		code, body, _ := g.get(g.url("path", path))
		if code != want || !strings.Contains(body, `"code":`+strconv.Itoa(want)) {
			t.Errorf("%q: %d %s", path, code, body)
		}
	}
	if code, _, _ := g.get(g.url("path", "x", "username", "stranger")); code != 401 {
		t.Error(code)
	}
	// As root, the private file is there.
	if code, body, _ := g.get(g.url("path", filepath.Join(g.home, "private"), "username", "root")); code != 200 || body != "x" {
		t.Error(code, body)
	}
	// Basic authentication names the account of calls, not of files.
	if code, _, _ := g.get(g.url("path", filepath.Join(g.home, "private")), "Authorization", "Basic cm9vdDo="); code != 403 {
		t.Error(code)
	}
}

func TestAcceptedEncoding(t *testing.T) {
	for _, tt := range []struct{ header, want string }{
		{"", ""}, {"gzip", "gzip"}, {"GZIP", "gzip"}, {"deflate, gzip, br", "gzip"}, {"gzip;q=1.0", "gzip"},
		{"gzip ; q=0.8", "gzip"}, {"gzip;q=bad", "gzip"}, {"identity", ""}, {"*", ""}, {"br", ""}, {"deflate, br", ""},
		{"br;q=1.0, gzip;q=0.5", "gzip"}, {"gzip;q=0.5, identity;q=1.0", ""}, {"gzip;q=0, identity", ""},
		{"gzip;q=0, br", ""}, {"br, identity;q=0", refused}, {"*, identity;q=0", "gzip"}, {"*;q=0", refused},
		{"gzip;q=0, *, identity;q=0", refused}, {"identity, gzip", ""}, {"gzip, identity", "gzip"}, {"*;q=0, identity", ""},
		{"gzip, *;q=0", "gzip"}, {",,;q=1,", ""},
	} {
		if got, _ := acceptedEncoding([]string{tt.header}); got != tt.want {
			t.Errorf("%q: %q, not %q", tt.header, got, tt.want)
		}
	}
}

func TestSignedFiles(t *testing.T) {
	g := newFileGuest(t)
	token := strings.Repeat("a", 64)
	now := time.Unix(1_800_000_000, 0)
	g.now = func() time.Time { return now }
	g.state.token = token
	g.write(filepath.Join(g.home, "x.txt"), "x", testUID, 0o644)
	sign := func(op, path, user, expires string) string {
		return g.url("path", path, "username", user, "signature_expiration", expires,
			"signature", signature(path, op, user, token, expires))
	}
	later, earlier := strconv.Itoa(1_800_000_001), strconv.Itoa(1_799_999_999)
	if code, body, _ := g.get(sign(opRead, "x.txt", "", "")); code != 200 || body != "x" {
		t.Error(code, body)
	}
	if code, _, _ := g.get(sign(opRead, "x.txt", "user", later)); code != 200 {
		t.Error(code)
	}
	code, body, _ := g.get(sign(opRead, "x.txt", "user", earlier))
	if code != 401 || strings.TrimSpace(body) != `{"code":401,"message":"signature is already expired"}` {
		t.Error(code, body)
	}
	for name, u := range map[string]string{
		"other path": strings.Replace(sign(opRead, "x.txt", "", ""), "x.txt", "y.txt", 1),
		"other user": sign(opRead, "x.txt", "", "") + "&username=root",
		"other use":  sign(opWrite, "x.txt", "", ""),
		"other end":  strings.Replace(sign(opRead, "x.txt", "", earlier), earlier, later, 1),
		"no expiry":  strings.Replace(sign(opRead, "x.txt", "", earlier), "signature_expiration="+earlier, "", 1),
		"none":       g.url("path", "x.txt"),
		"odd expiry": sign(opRead, "x.txt", "", "0"+later),
	} {
		// The URL has an empty username already, so a second one does not count.
		if name == "other user" {
			u = strings.Replace(u, "username=&", "", 1)
			u = strings.Replace(u, "&username=", "&username=", 1)
		}
		if code, body, _ := g.get(u); code != 401 {
			t.Errorf("%s: %d %s", name, code, body)
		}
	}
	if code, _, _ := g.get(g.url("path", "x.txt"), "X-Access-Token", token); code != 200 {
		t.Error(code)
	}
	if code, _, _ := g.get(sign(opRead, "x.txt", "", ""), "X-Access-Token", "wrong"); code != 401 {
		t.Error("a wrong token beside a right signature:", code)
	}
}

// A signature for no path is good for the default directory alone.
func TestSignedUploadIsConfined(t *testing.T) {
	g := newFileGuest(t)
	g.state.token = "token"
	work := filepath.Join(g.home, "work")
	must(t, os.Mkdir(work, 0o755))
	must(t, os.Chown(work, testUID, testUID))
	g.state.workdir = work
	must(t, os.Symlink(g.home, filepath.Join(work, "out")))
	g.write(filepath.Join(g.home, "victim"), "old", testUID, 0o644)
	must(t, os.Symlink(filepath.Join(g.home, "victim"), filepath.Join(work, "victim")))
	must(t, os.Symlink(filepath.Join(g.home, "unborn"), filepath.Join(work, "unborn")))
	u := g.web.URL + "/files?" + url.Values{"signature": {signature("", opWrite, "", "token", "")}}.Encode()
	for name, want := range map[string]int{
		filepath.Join(work, "ok"):               200,
		filepath.Join(work, "sub/ok"):           200,
		"relative":                              403, // below the home, above the default directory
		filepath.Join(g.home, "abs"):            403,
		filepath.Join(work, "../up"):            403,
		filepath.Join(work, "out/via-link"):     403,
		filepath.Join(work, "out/new/via-link"): 403,
		filepath.Join(work, "victim"):           403,
		filepath.Join(work, "unborn"):           403,
		"/etc/cay-test":                         403,
	} {
		body, kind := form([2]string{name, "new"})
		code, text := g.put(u, body, "Content-Type", kind)
		if code != want {
			t.Errorf("%s: %d %s", name, code, text)
		}
	}
	if code, _ := g.put(u, strings.NewReader("x")); code != 400 {
		t.Error("no path at all:", code)
	}
	if g.read(filepath.Join(g.home, "victim")) != "old" {
		t.Error("a link was followed out")
	}
	names, err := os.ReadDir(g.home)
	must(t, err)
	var got []string
	for _, n := range names {
		got = append(got, n.Name())
	}
	if d := cmp.Diff([]string{"victim", "work"}, got); d != "" {
		t.Error(d)
	}
}

func TestCompose(t *testing.T) {
	g := newFileGuest(t)
	call := func(body any) (int, string) {
		b, _ := json.Marshal(body)
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.web.URL+"/files/compose", bytes.NewReader(b))
		must(t, err)
		code, text, _ := g.do(r)
		return code, text
	}
	parts := func() []string {
		for _, n := range []string{"p0", "p1", "p2"} {
			g.write(filepath.Join(g.home, n), strings.Repeat(n, 100_000), testUID, 0o644)
		}
		return []string{"p0", "p1", "p2"}
	}
	code, text := call(composeRequest{SourcePaths: parts(), Destination: "new/whole"})
	if code != 200 {
		t.Fatal(code, text)
	}
	var got uploaded
	must(t, json.Unmarshal([]byte(text), &got))
	path := filepath.Join(g.home, "new/whole")
	if d := cmp.Diff(uploaded{Name: "whole", Path: path, Type: "file"}, got); d != "" {
		t.Error(d)
	}
	if g.read(path) != strings.Repeat("p0", 100_000)+strings.Repeat("p1", 100_000)+strings.Repeat("p2", 100_000) {
		t.Error("content differs")
	}
	for _, n := range []string{"p0", "p1", "p2"} {
		if _, err := os.Stat(filepath.Join(g.home, n)); !os.IsNotExist(err) {
			t.Error(n, "stayed:", err)
		}
	}
	parts()
	g.write(filepath.Join(g.home, "theirs"), "x", 0, 0o600)
	must(t, os.Symlink("p0", filepath.Join(g.home, "alias")))
	for _, tt := range []struct {
		name string
		req  any
		code int
	}{
		{"no source", composeRequest{Destination: "d"}, 400},
		{"empty source", composeRequest{SourcePaths: []string{""}, Destination: "d"}, 400},
		{"no destination", composeRequest{SourcePaths: []string{"p0"}}, 400},
		{"source is destination", composeRequest{SourcePaths: []string{"p1", "p0"}, Destination: "./p0"}, 400},
		{"source is destination by a link", composeRequest{SourcePaths: []string{"p0"}, Destination: "alias"}, 400},
		{"directory", composeRequest{SourcePaths: []string{"new"}, Destination: "d"}, 400},
		{"onto a directory", composeRequest{SourcePaths: []string{"p0"}, Destination: "new"}, 400},
		{"missing", composeRequest{SourcePaths: []string{"p0", "gone"}, Destination: "d"}, 404},
		{"unknown user", composeRequest{SourcePaths: []string{"p0"}, Destination: "d", Username: "stranger"}, 401},
		{"root's", composeRequest{SourcePaths: []string{"theirs"}, Destination: "d"}, 403},
		{"not JSON", "x", 400},
	} {
		if code, text := call(tt.req); code != tt.code {
			t.Errorf("%s: %d %s", tt.name, code, text)
		}
	}
	if _, err := os.Stat(filepath.Join(g.home, "d")); !os.IsNotExist(err) {
		t.Error("a refused request wrote:", err)
	}
	if len(g.read(filepath.Join(g.home, "p0"))) != 200_000 {
		t.Error("a refused request took a source")
	}
	g.leftovers(g.home)
}
