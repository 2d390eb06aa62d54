package envd

import (
	"bytes"
	"mime"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
)

// Whatever a client sends, the result is an absolute, clean path that the
// kernel can take, and a path that stays where its text says.
func FuzzResolvePath(f *testing.F) {
	for _, s := range []string{"", "~", "~/x", "~root", "~root/x", "a/../../b", "/", "//a//b/", "/a/./b/..", ".", "..",
		"a\x00b", "\xff", "~/..", "/" + strings.Repeat("x", maxPath), strings.Repeat("../", 1000), "a\nb", "é"} {
		f.Add(s, "")
		f.Add(s, "/work")
		f.Add("", s)
	}
	u := &user{name: "user", home: "/home/user"}
	f.Fuzz(func(t *testing.T, path, workdir string) {
		got, err := resolvePath(path, u, workdir)
		if err != nil {
			if asFault(err).code != invalid("").code {
				t.Fatalf("code of %v", err)
			}
			return
		}
		if !strings.HasPrefix(got, "/") || filepath.Clean(got) != got || len(got) >= maxPath ||
			strings.IndexByte(got, 0) >= 0 || !utf8.ValidString(got) {
			t.Fatalf("%q becomes %q", path, got)
		}
		if again, err := resolvePath(got, u, workdir); err != nil || again != got {
			t.Fatalf("%q is not stable: %q, %v", got, again, err)
		}
		if strings.HasPrefix(path, "/") && got != filepath.Clean(path) {
			t.Fatalf("%q becomes %q", path, got)
		}
		if strings.HasPrefix(path, "~") && path != "~" && !strings.HasPrefix(path, "~/") {
			t.Fatalf("%q was expanded to %q", path, got)
		}
	})
}

// A signature is good for what was signed and for nothing else.
func FuzzSignature(f *testing.F) {
	f.Add("x.txt", "", "token", "", "x.txt", "", "")
	f.Add("x", "user", "token", "1900000000", "x", "user", "1900000000")
	f.Add("x", "user", "token", "1900000000", "x", "user", "01900000000")
	f.Add("a:read", "u", "token", "", "a", "read:u", "")
	f.Add("x", "u", "t:1900000000", "", "x", "u", "")
	f.Add("x", "u", "t", "", "x", "u", "-1")
	now := time.Unix(1_800_000_000, 0)
	f.Fuzz(func(t *testing.T, path, user, token, expires, path2, user2, expires2 string) {
		sig := signature(path, opRead, user, token, expires)
		q := url.Values{"path": {path2}, "username": {user2}, "signature": {sig}}
		if expires2 != "" {
			q.Set("signature_expiration", expires2)
		}
		err := checkSignature(q, opRead, token, now)
		n, perr := strconv.ParseInt(expires2, 10, 64)
		valid := expires2 == "" || perr == nil && strconv.FormatInt(n, 10) == expires2 && n >= now.Unix()
		same := path == path2 && user == user2 && expires == expires2
		if same && valid && err != nil {
			t.Fatalf("refused: %v", err)
		}
		if err == nil && !valid {
			t.Fatalf("an end of %q passes", expires2)
		}
		// The text that is signed is the contract's, which joins its parts with
		// colons; only parts with colons of their own can be read in two ways.
		if err == nil && !same && !strings.Contains(path+path2+user+user2+token, ":") {
			t.Fatal("another request passes")
		}
		if checkSignature(q, opWrite, token, now) == nil && !strings.Contains(path+path2+user+user2+token, ":") {
			t.Fatal("a signature for reading writes")
		}
		if err == nil && checkSignature(q, opRead, token+"x", now) == nil {
			t.Fatal("another token passes")
		}
	})
}

// The file name of a part is taken whole or not at all.
func FuzzPartName(f *testing.F) {
	for _, s := range []string{`form-data; name="file"; filename="a/b.txt"`, `form-data; name=file; filename=x`, `form-data`,
		`attachment; name="file"; filename="x"`, `form-data; name="file"; filename*=UTF-8''%e2%82%ac`, `form-data; name="file"; filename="é"`,
		`form-data; name="file"; filename="a\"b"`, `form-data; name="file"; filename="C:\x"`, ";", `form-data; filename="`, `form-data; name="file"; name="x"`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		name, file := partName(s)
		kind, params, err := mime.ParseMediaType(s)
		if err != nil || kind != "form-data" {
			if name != "" || file != "" {
				t.Fatalf("%q yields %q, %q", s, name, file)
			}
			return
		}
		if name != params["name"] || file != params["filename"] {
			t.Fatalf("%q yields %q, %q", s, name, file)
		}
	})
}

// A name without a quote or a control character arrives as it was written.
func FuzzPartNameRoundTrip(f *testing.F) {
	f.Add("a/b/c.txt")
	f.Add("/home/user/ü %22.txt")
	f.Add("..")
	f.Fuzz(func(t *testing.T, file string) {
		if !utf8.ValidString(file) || strings.ContainsAny(file, "\"\\\r\n") || file == "" {
			t.Skip()
		}
		for _, r := range file {
			if r < 0x20 || r == 0x7f {
				t.Skip()
			}
		}
		if name, got := partName(`form-data; name="file"; filename="` + file + `"`); name != "file" || got != file {
			t.Fatalf("%q becomes %q, %q", file, name, got)
		}
	})
}

// What passes can be stored and is within the limits.
func FuzzMetadata(f *testing.F) {
	f.Add("X-Metadata-Author", "mish", "X-Metadata-B", "")
	f.Add("x-metadata-A", "1", "X-Metadata-a", "2")
	f.Add("X-Metadata-", "x", "X-Other", "y")
	f.Add("X-Metadata-"+strings.Repeat("k", 300), "x", "X-Metadata-K", strings.Repeat("v", 4096))
	f.Add("X-Metadata-É", "x", "X-Metadata-K", "a\nb")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		m, err := parseMetadata(http.Header{k1: {v1}, k2: {v2}})
		if err != nil {
			if asFault(err).code != invalid("").code || m != nil {
				t.Fatalf("%v, %v", m, err)
			}
			return
		}
		total := 0
		for k, v := range m {
			total += len(metadataAttr) + len(k) + len(v)
			if k == "" || k != strings.ToLower(k) || !printable(k) || !printable(v) || len(metadataAttr)+len(k) > maxAttrName {
				t.Fatalf("%q: %q", k, v)
			}
		}
		if total > maxMetadata {
			t.Fatalf("%d bytes", total)
		}
	})
}

// Any list of encodings yields one of ours, and never an excluded one.
func FuzzAcceptedEncoding(f *testing.F) {
	f.Add("gzip;q=0.5, identity")
	f.Add("*;q=0,,;;=")
	f.Fuzz(func(t *testing.T, s string) {
		enc, plain := acceptedEncoding([]string{s})
		switch enc {
		case "":
			if !plain {
				t.Fatalf("%q: plain bytes that are not acceptable", s)
			}
		case "gzip":
			if low := strings.ToLower(s); !strings.Contains(low, "gzip") && !strings.Contains(low, "*") {
				t.Fatalf("%q: gzip", s)
			}
		case refused:
			if plain {
				t.Fatalf("%q: refused", s)
			}
		default:
			t.Fatalf("%q: %q", s, enc)
		}
	})
}

func FuzzParseStat(f *testing.F) {
	f.Add("12 (a) S 1 5 7 0 -1")
	f.Fuzz(func(t *testing.T, s string) {
		st, ok := parseStat(s)
		if again, ok2 := parseStat("1 (" + s + ") S 1 2 3"); !ok2 || again.session != 3 {
			t.Errorf("a name %q hides the rest: %v", s, again)
		}
		if ok && st.state == 0 {
			t.Error("no state")
		}
	})
}

func FuzzKeepalive(f *testing.F) {
	f.Add("50")
	f.Fuzz(func(t *testing.T, s string) {
		h := http.Header{headerKeepalive: {s}}
		if d := keepalive(h); d < time.Second || d > maxKeepalive {
			t.Errorf("%q: %v", s, d)
		}
	})
}

func FuzzBasicUser(f *testing.F) {
	f.Add("Basic dXNlcjo=")
	f.Add("basic Og==")
	f.Fuzz(func(t *testing.T, s string) {
		name, ok := basicUser(http.Header{"Authorization": {s}})
		if ok && (name == "" || strings.Contains(name, ":")) {
			t.Errorf("%q gives %q", s, name)
		}
		r := http.Request{Header: http.Header{}}
		if !strings.Contains(s, ":") && s != "" {
			r.SetBasicAuth(s, "password")
			if got, ok := basicUser(r.Header); !ok || got != s {
				t.Errorf("user %q comes back as %q", s, got)
			}
		}
	})
}

func FuzzAccounts(f *testing.F) {
	f.Add("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/bash\n", "root:x:0:\nteam:x:7:user, root\n", "user")
	f.Add("a:x:4294967295:0::/:\n", "a:::\n", "a")
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, passwd, group, name string) {
		u := &users{passwdFile: filepath.Join(dir, "passwd"), groupFile: filepath.Join(dir, "group")}
		must(t, os.WriteFile(u.passwdFile, []byte(passwd), 0o600))
		must(t, os.WriteFile(u.groupFile, []byte(group), 0o600))
		a, err := u.lookup(name)
		if err != nil {
			wantCode(t, rpcError(err), connect.CodeUnauthenticated)
			return
		}
		if a.name != name || a.uid == noID || a.gid == noID || slices.Contains(a.groups, noID) || !strings.HasPrefix(a.home, "/") || a.groups[0] != a.gid {
			t.Errorf("%+v", a)
		}
	})
}

// FuzzKept: nothing that PID 1 may hand over, or a process's own configuration
// in it, stops the next envd.
func FuzzKept(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{keepProcess, 7, 0, 0})
	f.Add(append([]byte{keepProcess, 7, 0, 0, 0, 0}, `{"config":{"cmd":"x"},"end":{"exitCode":7},"ended":"2026-01-02T03:04:05Z"}`...))
	f.Add(append([]byte{keepProcess, 7, 0, 0, 0, 6}, `{"config":{"cmd":"x","envs":{"a":"b"}},"tag":"t","deadline":5}`...))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parsePacket(b)
		if err != nil {
			if len(b) >= messageHead {
				t.Errorf("%x: %v", b, err)
			}
			return
		}
		p, err := adopt(m)
		switch {
		case err != nil:
		case p.end == nil:
			t.Errorf("a process without files was taken over: %+v", p)
		case p.config == nil || p.pid != m.pid:
			t.Errorf("it has the number %d, not %d, and the configuration %v", p.pid, m.pid, p.config)
		}
	})
}

// FuzzKeptWatcher: nothing that PID 1 may hand over as a watcher stops the next
// envd, and what it takes is what it would hand over itself.
func FuzzKeptWatcher(f *testing.F) {
	const head = `{"id":"w1","user":"u","path":"/d","recursive":true}`
	f.Add([]byte(""))
	f.Add([]byte(head))
	f.Add([]byte(head + `{"nodes":[{"p":-1,"w":1},{"p":0,"n":"YQ==","c":true,"w":2}]}`))
	f.Add([]byte(head + `{"nodes":[{"p":-1},{"p":0,"n":"YQ=="}],"moving":{"7":1},"waiting":[1],"doubts":[{"d":0,"n":"YQ=="}],` +
		`"raw":[{"w":1,"m":256,"n":"/w=="}],"changes":[{"k":1,"n":"/w=="}]}`))
	f.Add([]byte(head + `{"nodes":[{"p":0,"c":true}]}`))
	f.Add([]byte(head + `{"nodes":[{"p":-1}],"waiting":[9]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := New(Config{})
		w, id, err := loadWatcher(s, bytes.NewReader(b))
		if err != nil {
			return
		}
		var once, twice bytes.Buffer
		must(t, w.save(id, &once))
		again, id, err := loadWatcher(s, bytes.NewReader(once.Bytes()))
		must(t, err)
		must(t, again.save(id, &twice))
		// The order of children and of cookies is no matter of ours.
		if once.Len() != twice.Len() || again.cost != w.cost || again.queue.cost != w.queue.cost || len(again.dirs) != len(w.dirs) {
			t.Errorf("%s becomes %s", &once, &twice)
		}
	})
}
