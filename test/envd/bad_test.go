package envd

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/test/program"
)

// answer is what came of a request that is nonsense: the HTTP status, and the
// code in words of Connect or in digits of the rest.
type answer struct {
	status int
	code   string
}

// nonsense is a request and what the contract answers.
type nonsense struct {
	name, method, path, contentType, user string
	body                                  []byte
	header                                http.Header
	want                                  answer
	says                                  string
}

// rpc is a unary call.
func rpc(name, method, body string, want answer, says string) nonsense {
	return nonsense{name: name, method: "POST", path: "/" + method, contentType: "application/json", body: []byte(body), want: want, says: says}
}

// streaming is a call with a stream for an answer, whose error comes last.
func streaming(name, method, body, code, says string) nonsense {
	frame := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
	return nonsense{name: name, method: "POST", path: "/" + method, contentType: "application/connect+json", body: frame, want: answer{200, code}, says: says}
}

// ask makes the request and reads the answer's code.
func (b *box) ask(t *testing.T, n nonsense) (answer, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), n.method, b.proxy+n.path, bytes.NewReader(n.body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range n.header {
		req.Header[k] = v
	}
	req.Header.Set("Content-Type", n.contentType)
	req.Header.Set("Connect-Protocol-Version", "1")
	if n.user != "" {
		req.Header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(n.user+":")))
	}
	resp, err := b.http.Do(req)
	if err != nil {
		t.Fatalf("%s: %v", n.name, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		t.Fatalf("%s: %v", n.name, err)
	}
	a := answer{status: resp.StatusCode}
	if n.contentType == "application/connect+json" && resp.StatusCode == http.StatusOK {
		for len(text) >= 5 {
			size := int(binary.BigEndian.Uint32(text[1:]))
			msg := text[5 : 5+size]
			if text[0]&2 != 0 {
				var m struct{ Error struct{ Code string } }
				if err := json.Unmarshal(msg, &m); err != nil {
					t.Errorf("%s: the stream ends with %q", n.name, msg)
				}
				return answer{resp.StatusCode, m.Error.Code}, string(msg)
			}
			text = text[5+size:]
		}
		t.Errorf("%s: the stream has no end", n.name)
		return a, ""
	}
	var m struct {
		Code    any
		Message string
	}
	if err := json.Unmarshal(text, &m); err != nil || m.Message == "" {
		t.Errorf("%s: the answer %d is no error in JSON: %q", n.name, a.status, text)
	}
	a.code = fmt.Sprint(m.Code)
	return a, m.Message
}

// Whatever nonsense a request is, the contract's code comes back, and envd
// goes on as if nothing had been.
func TestBadInput(t *testing.T) {
	t.Parallel()
	b := newBox(t, program.Start(t, program.Options{}), 10*time.Minute)
	b.Out(t, "echo old >/tmp/old; ln -s b /tmp/a; ln -s a /tmp/b; mkdir /tmp/dir; mkfifo /tmp/fifo")
	gone, err := b.Start(t.Context(), "", "true")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := gone.Wait(); err != nil {
		t.Fatal(err)
	}
	cat, err := b.Start(t.Context(), "", "sleep 300")
	if err != nil {
		t.Fatal(err)
	}
	defer cat.Leave()
	before := b.root(t, "pgrep -x envd")

	long, deep := strings.Repeat("n", 4096), strings.Repeat("/d", 3000)
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	io.WriteString(z, strings.Repeat("data", 10_000))
	z.Close()
	broken := append([]byte{}, packed.Bytes()...)
	broken[len(broken)-6] ^= 0xff // its checksum
	sel := func(pid int) string { return fmt.Sprintf(`"process":{"pid":%d}`, pid) }
	const files, start = "filesystem.Filesystem/", "process.Process/Start"
	form := func(parts ...string) []byte {
		return []byte("--b\r\n" + strings.Join(parts, "\r\n--b\r\n") + "\r\n--b--\r\n")
	}
	part := func(name string) string {
		return "Content-Disposition: form-data; name=\"file\"; filename=\"" + name + "\"\r\n\r\nx"
	}
	const multi = "multipart/form-data; boundary=b"
	upload := func(name, path, typ string, body []byte, h http.Header, status int) nonsense {
		return nonsense{name: name, method: "POST", path: "/files?path=" + path, contentType: typ, body: body, header: h, want: answer{status, fmt.Sprint(status)}}
	}
	download := func(name, query string, status int) nonsense {
		return nonsense{name: name, method: "GET", path: "/files?" + query, want: answer{status, fmt.Sprint(status)}}
	}
	asUser := func(n nonsense, user string) nonsense { n.user = user; return n }

	for _, n := range []nonsense{
		asUser(rpc("unknown user", files+"Stat", `{"path":"/tmp"}`, answer{401, "unauthenticated"}, "nobody-knows"), "nobody-knows"),
		asUser(streaming("unknown user of a command", start, `{"process":{"cmd":"true"}}`, "unauthenticated", "nobody-knows"), "nobody-knows"),
		rpc("path with NUL", files+"Stat", `{"path":"/tmp/a\u0000b"}`, answer{400, "invalid_argument"}, "NUL"),
		rpc("NUL to make", files+"MakeDir", `{"path":"/tmp/a\u0000b"}`, answer{400, "invalid_argument"}, "NUL"),
		rpc("NUL to move", files+"Move", `{"source":"/tmp/old","destination":"/tmp/\u0000"}`, answer{400, "invalid_argument"}, "NUL"),
		rpc("NUL to remove", files+"Remove", `{"path":"\u0000"}`, answer{400, "invalid_argument"}, "NUL"),
		rpc("NUL to watch", files+"CreateWatcher", `{"path":"\u0000"}`, answer{400, "invalid_argument"}, "NUL"),
		rpc("home of another", files+"Stat", `{"path":"~root/x"}`, answer{400, "invalid_argument"}, ""),
		rpc("long name", files+"Stat", `{"path":"/tmp/`+long+`"}`, answer{400, "invalid_argument"}, ""),
		rpc("long name to make", files+"MakeDir", `{"path":"/tmp/`+long+`"}`, answer{400, "invalid_argument"}, ""),
		rpc("deep path", files+"Stat", `{"path":"`+deep+`"}`, answer{400, "invalid_argument"}, ""),
		rpc("dots lead out of nothing", files+"Stat", `{"path":"/../../../no-such"}`, answer{404, "not_found"}, ""),
		rpc("link loop", files+"ListDir", `{"path":"/tmp/a"}`, answer{400, "failed_precondition"}, ""),
		rpc("a file as a directory", files+"ListDir", `{"path":"/etc/passwd"}`, answer{400, "invalid_argument"}, ""),
		rpc("below a file", files+"MakeDir", `{"path":"/etc/passwd/x"}`, answer{400, "invalid_argument"}, ""),
		rpc("a directory again", files+"MakeDir", `{"path":"/tmp/dir"}`, answer{409, "already_exists"}, ""),
		rpc("move of nothing", files+"Move", `{"source":"/tmp/none","destination":"/tmp/x"}`, answer{404, "not_found"}, ""),
		rpc("unknown watcher", files+"GetWatcherEvents", `{"watcherId":"none"}`, answer{404, "not_found"}, ""),
		rpc("unknown watcher to remove", files+"RemoveWatcher", `{"watcherId":"none"}`, answer{404, "not_found"}, ""),
		rpc("watch of a file", files+"CreateWatcher", `{"path":"/tmp/old"}`, answer{400, "invalid_argument"}, ""),
		streaming("watch of nothing", files+"WatchDir", `{"path":"/tmp/none"}`, "not_found", ""),
		rpc("no JSON", files+"Stat", `{"path"`, answer{400, "invalid_argument"}, ""),
		rpc("invalid UTF-8", files+"Stat", "{\"path\":\"/tmp/\xff\xfe\"}", answer{400, "invalid_argument"}, ""),
		rpc("a wrong type", files+"ListDir", `{"path":"/tmp","depth":-1}`, answer{400, "invalid_argument"}, ""),
		rpc("unknown method", files+"Format", `{}`, answer{404, "404"}, ""),
		rpc("oversized message", files+"Stat", `{"path":"`+strings.Repeat("x", 17<<20)+`"}`, answer{429, "resource_exhausted"}, ""),
		streaming("missing directory", start, `{"process":{"cmd":"true","cwd":"/no/such"}}`, "invalid_argument", "/no/such"),
		streaming("a file for a directory", start, `{"process":{"cmd":"true","cwd":"/etc/passwd"}}`, "invalid_argument", ""),
		streaming("no such program", start, `{"process":{"cmd":"/no/such"}}`, "invalid_argument", ""),
		streaming("no program", start, `{"process":{}}`, "invalid_argument", "empty"),
		streaming("a directory as a program", start, `{"process":{"cmd":"/tmp"}}`, "invalid_argument", ""),
		streaming("NUL in an argument", start, `{"process":{"cmd":"true","args":["\u0000"]}}`, "invalid_argument", "NUL"),
		streaming("NUL in the environment", start, `{"process":{"cmd":"true","envs":{"A":"\u0000"}}}`, "invalid_argument", ""),
		streaming("a nameless variable", start, `{"process":{"cmd":"true","envs":{"":"x"}}}`, "invalid_argument", ""),
		streaming("too long arguments", start, `{"process":{"cmd":"/bin/true","args":["`+strings.Repeat("x", 3<<20)+`"]}}`, "invalid_argument", ""),
		streaming("connect to a process that never was", "process.Process/Connect", `{`+sel(999_999)+`}`, "not_found", "999999"),
		streaming("connect to nothing", "process.Process/Connect", `{}`, "invalid_argument", ""),
		streaming("connect to a tag", "process.Process/Connect", `{"process":{"tag":"none"}}`, "not_found", "none"),
		rpc("unknown signal", "process.Process/SendSignal", `{`+sel(cat.PID)+`,"signal":5}`, answer{501, "unimplemented"}, ""),
		rpc("no signal", "process.Process/SendSignal", `{`+sel(cat.PID)+`}`, answer{501, "unimplemented"}, ""),
		rpc("signal to a gone process", "process.Process/SendSignal", `{`+sel(gone.PID)+`,"signal":"SIGNAL_SIGKILL"}`, answer{404, "not_found"}, ""),
		rpc("input to a gone process", "process.Process/SendInput", `{`+sel(gone.PID)+`,"input":{"stdin":"eA=="}}`, answer{404, "not_found"}, ""),
		rpc("input without stdin", "process.Process/SendInput", `{`+sel(cat.PID)+`,"input":{"stdin":"eA=="}}`, answer{500, "internal"}, ""),
		rpc("terminal input without one", "process.Process/SendInput", `{`+sel(cat.PID)+`,"input":{"pty":"eA=="}}`, answer{500, "internal"}, ""),
		rpc("input that is none", "process.Process/SendInput", `{`+sel(cat.PID)+`}`, answer{501, "unimplemented"}, ""),
		rpc("bad base64", "process.Process/SendInput", `{`+sel(cat.PID)+`,"input":{"stdin":"*"}}`, answer{400, "invalid_argument"}, ""),
		rpc("size of no terminal", "process.Process/Update", `{`+sel(cat.PID)+`,"pty":{"size":{"cols":1,"rows":1}}}`, answer{500, "internal"}, ""),
		rpc("end of a gone stdin", "process.Process/CloseStdin", `{`+sel(gone.PID)+`}`, answer{404, "not_found"}, ""),

		download("a directory as a file", "path=/tmp/dir", 400),
		download("a pipe as a file", "path=/tmp/fifo", 400),
		download("nothing", "path=/tmp/none", 404),
		download("a NUL", "path=/tmp/%00", 400),
		download("an unknown user", "path=/tmp/old&username=nobody-knows", 401),
		download("a long name", "path=/tmp/"+long, 400),
		download("a link loop", "path=/tmp/a", 400),
		upload("into a directory", "/tmp/dir", multi, form(part("x")), nil, 400),
		upload("below a file", "/tmp/old/x", multi, form(part("x")), nil, 400),
		upload("a NUL", "/tmp/%00", multi, form(part("x")), nil, 400),
		upload("a long name", "/tmp/"+long, multi, form(part("x")), nil, 400),
		upload("two to one path", "/tmp/two", multi, form(part("x"), part("y")), nil, 400),
		upload("a form without an end", "/tmp/old", multi, []byte("--b\r\n"+part("x")), nil, 400),
		upload("no form", "/tmp/old", multi, []byte("nonsense"), nil, 400),
		upload("bytes without a path", "", "application/octet-stream", []byte("x"), nil, 400),
		upload("another type", "/tmp/old", "text/plain", []byte("x"), nil, 400),
		upload("no gzip", "/tmp/old", "application/octet-stream", []byte("nonsense"), http.Header{"Content-Encoding": {"gzip"}}, 400),
		upload("a broken gzip", "/tmp/old", "application/octet-stream", broken, http.Header{"Content-Encoding": {"gzip"}}, 400),
		upload("half a gzip", "/tmp/old", "application/octet-stream", packed.Bytes()[:packed.Len()/2], http.Header{"Content-Encoding": {"gzip"}}, 400),
		upload("another encoding", "/tmp/old", "application/octet-stream", []byte("x"), http.Header{"Content-Encoding": {"br"}}, 400),
		upload("metadata that is no ASCII", "/tmp/old", "application/octet-stream", []byte("x"), http.Header{"X-Metadata-A": {"\xc3\xa9"}}, 400),
		upload("too much metadata", "/tmp/old", "application/octet-stream", []byte("x"), http.Header{"X-Metadata-A": {strings.Repeat("v", 4097)}}, 400),
		{name: "compose of nothing", method: "POST", path: "/files/compose", contentType: "application/json", body: []byte(`{"source_paths":["/tmp/none"],"destination":"/tmp/old"}`), want: answer{404, "404"}},
		{name: "compose without sources", method: "POST", path: "/files/compose", contentType: "application/json", body: []byte(`{"source_paths":[],"destination":"/tmp/old"}`), want: answer{400, "400"}},
		{name: "compose of no JSON", method: "POST", path: "/files/compose", contentType: "application/json", body: []byte(`{`), want: answer{400, "400"}},
		{name: "wrong token", method: "GET", path: "/envs", header: http.Header{"X-Access-Token": {"wrong"}}, want: answer{401, "401"}},
		{name: "wrong token for a file", method: "GET", path: "/files?path=/tmp/old", header: http.Header{"X-Access-Token": {"wrong"}}, want: answer{401, "401"}},
		{name: "control route", method: "POST", path: "/init", body: []byte(`{}`), want: answer{404, "404"}},
		{name: "unknown path", method: "GET", path: "/no/such", want: answer{404, "404"}},
	} {
		t.Run(strings.ReplaceAll(n.name, " ", "-"), func(t *testing.T) {
			got, said := b.ask(t, n)
			if got != n.want || !strings.Contains(said, n.says) {
				t.Errorf("the answer is %v, %q, want %v with %q", got, said[:min(len(said), 300)], n.want, n.says)
			}
		})
	}
	if got := b.Out(t, "cat /tmp/old; ls /tmp/two /tmp/x 2>/dev/null; find /tmp -name '.envd-*'; true"); got != "old\n" {
		t.Errorf("of the refused uploads came %q", got)
	}
	if after := b.root(t, "pgrep -x envd"); after != before {
		t.Error("envd has ended meanwhile and was started again")
	}
}

// An upload whose body is shorter than announced, or breaks off, leaves the old
// file.
func TestBrokenUpload(t *testing.T) {
	t.Parallel()
	b := newBox(t, program.Start(t, program.Options{}), 10*time.Minute)
	b.Out(t, "echo old >/tmp/old")
	for _, c := range []struct{ name, head, body string }{
		{"wrong content length", "Content-Length: 1000000\r\n", "short"},
		{"half a chunk", "Transfer-Encoding: chunked\r\n", "ffff\r\nshort"},
		{"broken chunk", "Transfer-Encoding: chunked\r\n", "5\r\nshort\r\nzz\r\n"},
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(b.proxy, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST /files?path=/tmp/old HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: %s\r\nE2b-Sandbox-Port: %d\r\nX-Access-Token: %s\r\nContent-Type: application/octet-stream\r\n%s\r\n%s",
			b.ID, program.EnvdPort, b.Token, c.head, c.body)
		conn.(*net.TCPConn).CloseWrite()
		said, _ := io.ReadAll(io.LimitReader(conn, 1<<16)) // a reset is an answer, too
		conn.Close()
		if strings.HasPrefix(string(said), "HTTP/1.1 2") {
			t.Errorf("%s: the answer is %.900q", c.name, said)
		}
		program.Eventually(t, 15*time.Second, func() string {
			if got := b.Out(t, "cat /tmp/old; find /tmp -name '.envd-*'"); got != "old\n" {
				return c.name + ": there is " + got
			}
			return ""
		})
	}
}

// A directory with very many entries is listed, or refused with a code; either
// way envd stays what it was.
func TestHugeDirectory(t *testing.T) {
	t.Parallel()
	entries := program.Sized(10_000, 1_000_000)
	b := newBox(t, program.Start(t, program.Options{DiskMB: program.Sized(2560, 6144)}), time.Hour)
	b.Out(t, fmt.Sprintf(`mkdir /tmp/huge; python3 -c "
for i in range(%d): open('/tmp/huge/%%d' %% i, 'w').close()"`, entries))
	before := b.root(t, "pgrep -x envd")
	n := rpc("list", "filesystem.Filesystem/ListDir", `{"path":"/tmp/huge"}`, answer{}, "")
	if program.Nightly() {
		if got, _ := b.ask(t, n); got != (answer{429, "resource_exhausted"}) {
			t.Errorf("the answer is %v", got)
		}
	} else {
		req, err := http.NewRequestWithContext(t.Context(), "POST", b.proxy+n.path, bytes.NewReader(n.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", n.contentType)
		resp, err := b.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var out struct{ Entries []struct{ Name string } }
		if err := json.NewDecoder(resp.Body).Decode(&out); err != nil || len(out.Entries) != entries {
			t.Errorf("%d entries are listed, want %d: %v", len(out.Entries), entries, err)
		}
	}
	if err := b.remove(t.Context(), "", "/tmp/huge"); err != nil {
		t.Error(err)
	}
	if after := b.root(t, "ls /tmp; pgrep -x envd"); after != before {
		t.Errorf("there is left, with envd's number: %q, want %q", after, before)
	}
}
