package envd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"connectrpc.com/connect"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
	"github.com/cayhq/cay/internal/gen/envd/filesystem/filesystemconnect"
)

// The accounts of a test guest. No such numbers exist on the machine.
const (
	testUID  = 12345
	testUID2 = 12346
)

// fileGuest is a daemon with accounts and homes of its own.
type fileGuest struct {
	*Server
	t    testing.TB
	dir  string // of everything; the accounts may pass through
	home string // of "user"
	web  *httptest.Server
	fs   filesystemconnect.FilesystemClient
}

// newFileGuest starts one whose default account is "user".
func newFileGuest(t testing.TB) *fileGuest {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: acts for other accounts")
	}
	dir, err := os.MkdirTemp("", "envd-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	home := filepath.Join(dir, "home", "user")
	other := filepath.Join(dir, "home", "other")
	root := filepath.Join(dir, "root")
	for d, uid := range map[string]int{home: testUID, other: testUID2, root: 0} {
		must(t, os.MkdirAll(d, 0o755))
		must(t, os.Chown(d, uid, uid))
	}
	must(t, os.Chmod(root, 0o700))
	passwd := fmt.Sprintf("root:x:0:0::%s:/bin/sh\nuser:x:%d:%d::%s:/bin/sh\nother:x:%d:%d::%s:/bin/sh\n",
		root, testUID, testUID, home, testUID2, testUID2, other)
	group := fmt.Sprintf("root:x:0:\nuser:x:%d:\nother:x:%d:\nteam:x:12399:user,other\n", testUID, testUID2)
	must(t, os.WriteFile(filepath.Join(dir, "passwd"), []byte(passwd), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "group"), []byte(group), 0o644))
	g := &fileGuest{t: t, dir: dir, home: home, Server: New(Config{
		ControlToken: "control", RunDir: filepath.Join(dir, "run"), Hook: filepath.Join(dir, "none"),
		PasswdFile: filepath.Join(dir, "passwd"), GroupFile: filepath.Join(dir, "group"),
	})}
	g.state.user = "user"
	g.web = httptest.NewServer(g.Public())
	g.fs = filesystemconnect.NewFilesystemClient(g.web.Client(), g.web.URL, connect.WithProtoJSON())
	t.Cleanup(func() { g.Close(); g.web.Close() })
	return g
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// as names the account of a call; "" is the default one.
func as[T any](msg *T, user string) *connect.Request[T] {
	r := connect.NewRequest(msg)
	if user != "" {
		hr := http.Request{Header: r.Header()}
		hr.SetBasicAuth(user, "")
	}
	return r
}

// write makes a file as root and gives it to an account.
func (g *fileGuest) write(path, text string, uid int, mode os.FileMode) {
	g.t.Helper()
	must(g.t, os.WriteFile(path, []byte(text), 0o600))
	must(g.t, os.Chown(path, uid, uid))
	must(g.t, os.Chmod(path, mode))
}

func (g *fileGuest) read(path string) string {
	g.t.Helper()
	b, err := os.ReadFile(path)
	must(g.t, err)
	return string(b)
}

func (g *fileGuest) url(query ...string) string {
	v := url.Values{}
	for i := 0; i+1 < len(query); i += 2 {
		v.Set(query[i], query[i+1])
	}
	return g.web.URL + "/files?" + v.Encode()
}

// do sends a request and returns the status and the body.
func (g *fileGuest) do(r *http.Request) (int, string, http.Header) {
	g.t.Helper()
	tr := &http.Transport{DisableCompression: true, DisableKeepAlives: true}
	resp, err := tr.RoundTrip(r)
	must(g.t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	must(g.t, err)
	return resp.StatusCode, string(b), resp.Header
}

// put uploads bytes as application/octet-stream.
func (g *fileGuest) put(url string, body io.Reader, header ...string) (int, string) {
	g.t.Helper()
	r, err := http.NewRequestWithContext(g.t.Context(), http.MethodPost, url, body)
	must(g.t, err)
	r.Header.Set("Content-Type", "application/octet-stream")
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	code, text, _ := g.do(r)
	return code, text
}

// form builds a body of parts named file.
func form(parts ...[2]string) (io.Reader, string) {
	var b bytes.Buffer
	m := multipart.NewWriter(&b)
	for _, p := range parts {
		h := textproto.MIMEHeader{"Content-Disposition": {fmt.Sprintf(`form-data; name="file"; filename="%s"`, p[0])}}
		w, _ := m.CreatePart(h)
		io.WriteString(w, p[1])
	}
	m.Close()
	return &b, m.FormDataContentType()
}

func (g *fileGuest) get(url string, header ...string) (int, string, http.Header) {
	g.t.Helper()
	r, err := http.NewRequestWithContext(g.t.Context(), http.MethodGet, url, nil)
	must(g.t, err)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	return g.do(r)
}

func decodeUploaded(t testing.TB, text string) []uploaded {
	t.Helper()
	var u []uploaded
	if err := json.Unmarshal([]byte(text), &u); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
	return u
}

func (g *fileGuest) stat(path string) *pb.EntryInfo {
	g.t.Helper()
	r, err := g.fs.Stat(context.Background(), as(&pb.StatRequest{Path: path}, ""))
	must(g.t, err)
	return r.Msg.GetEntry()
}

// leftovers fails the test if an unfinished upload lies in a directory.
func (g *fileGuest) leftovers(dir string) {
	g.t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, tempPrefix+"*"))
	must(g.t, err)
	if len(names) > 0 {
		g.t.Errorf("left behind: %v", names)
	}
}
