package template

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/cayhq/cay"
)

// fakeEnvd answers the calls of the probe as envd does.
type fakeEnvd struct {
	files  map[string]string
	mangle func(string) string // what a download gives
	frames func(content string) []byte
	refuse int
}

func end(code int) []byte {
	return frame([]byte(fmt.Sprintf(`{"event":{"end":{"exitCode":%d,"exited":true,"status":"exit status %d"}}}`, code, code)))
}

func stdout(s string) []byte {
	return frame([]byte(`{"event":{"data":{"stdout":"` + base64.StdEncoding.EncodeToString([]byte(s)) + `"}}}`))
}

func endStream(s string) []byte {
	f := frame([]byte(s))
	f[0] = frameEnd
	return f
}

func (f *fakeEnvd) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("X-Access-Token") != "token" {
		http.Error(w, "no token", http.StatusUnauthorized)
		return
	}
	if f.refuse != 0 {
		http.Error(w, "refused", f.refuse)
		return
	}
	switch r.Method + " " + r.URL.Path {
	case "POST /files":
		file, _, err := r.FormFile("file")
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		b, _ := io.ReadAll(file)
		f.files[r.URL.Query().Get("path")] = string(b)
		io.WriteString(w, "[]")
	case "GET /files":
		s := f.files[r.URL.Query().Get("path")]
		if f.mangle != nil {
			s = f.mangle(s)
		}
		io.WriteString(w, s)
	case "POST /process.Process/Start":
		w.Write(f.frames(f.files[probePath]))
	}
}

func TestEnvdProber(t *testing.T) {
	good := func(content string) []byte {
		return bytes.Join([][]byte{frame([]byte(`{"event":{"start":{"pid":7}}}`)), frame([]byte(`{"event":{"keepalive":{}}}`)),
			stdout(content + "\nuser\n"), stdout("/home/user\ndone\n"), end(0), endStream("{}")}, nil)
	}
	for _, c := range []struct {
		name string
		envd fakeEnvd
		want cay.Code
		text string
	}{
		{"good", fakeEnvd{frames: good}, "", ""},
		{"file changed", fakeEnvd{frames: good, mangle: strings.ToUpper}, cay.CodeGuestProbe, "other content"},
		{"refused", fakeEnvd{frames: good, refuse: 500}, cay.CodeGuestProbe, "500"},
		{"exit code", fakeEnvd{frames: func(string) []byte { return append(end(3), endStream("{}")...) }}, cay.CodeGuestProbe, "exit code 3"},
		{"wrong output", fakeEnvd{frames: func(string) []byte { return bytes.Join([][]byte{stdout("?"), end(0), endStream("{}")}, nil) }},
			cay.CodeGuestProbe, "exit code 0"},
		{"no end", fakeEnvd{frames: func(string) []byte { return endStream("{}") }}, cay.CodeGuestProbe, "no result"},
		{"error", fakeEnvd{frames: func(string) []byte { return endStream(`{"error":{"code":"invalid_argument","message":"no bash"}}`) }},
			cay.CodeGuestProbe, "no bash"},
		{"cut off", fakeEnvd{frames: func(string) []byte { return stdout("x")[:9] }}, cay.CodeGuestProbe, "broke off"},
		{"too long", fakeEnvd{frames: func(string) []byte { return []byte{0, 255, 255, 255, 255} }}, cay.CodeGuestProbe, "too long"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.envd.files = map[string]string{}
			srv := httptest.NewServer(&c.envd)
			defer srv.Close()
			host, port, _ := net.SplitHostPort(srv.Listener.Addr().String())
			n, _ := strconv.Atoi(port)
			p := EnvdProber{Port: n, Client: srv.Client()}
			err := p.Probe(t.Context(), cay.NodeSandbox{Host: cay.SandboxOnHost{Address: host}}, "token")
			if cay.CodeOf(err) != c.want || (err != nil && !strings.Contains(err.Error(), c.text)) {
				t.Fatalf("Probe = %v, want %q with %q", err, c.want, c.text)
			}
		})
	}
	t.Run("nobody there", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		l.Close()
		err = EnvdProber{Port: port}.Probe(t.Context(), cay.NodeSandbox{Host: cay.SandboxOnHost{Address: "127.0.0.1"}}, "token")
		if cay.CodeOf(err) != cay.CodeEnvdUnreachable {
			t.Fatalf("Probe = %v", err)
		}
	})
}

func FuzzReadProcess(f *testing.F) {
	f.Add([]byte{})
	f.Add(append(stdout("x"), end(0)...))
	f.Add(endStream("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = readProcess(bytes.NewReader(b))
	})
}
