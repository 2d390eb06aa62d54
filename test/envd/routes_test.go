package envd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	fs "github.com/cayhq/cay/internal/gen/envd/filesystem"
	"github.com/cayhq/cay/internal/gen/envd/filesystem/filesystemconnect"
	pb "github.com/cayhq/cay/internal/gen/envd/process"
	"github.com/cayhq/cay/internal/gen/envd/process/processconnect"
	"github.com/cayhq/cay/test/program"
)

// get makes a request with headers and reads the answer, whatever it is. A
// header with the value "" is left out, the access token too.
func (b *box) get(t *testing.T, method, path string, headers map[string]string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, b.proxy+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("E2b-Sandbox-Id", b.ID)
	req.Header.Set("E2b-Sandbox-Port", fmt.Sprint(program.EnvdPort))
	req.Header.Set("X-Access-Token", b.Token)
	for k, v := range headers {
		if v == "" {
			req.Header.Del(k)
		} else {
			req.Header.Set(k, v)
		}
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(text)
}

// The routes beside files and services answer as contracted, to those who may
// ask.
func TestRoutes(t *testing.T) {
	t.Parallel()
	server := program.Start(t, program.Options{})
	s := server.Client().Make(t, 10*time.Minute, map[string]any{"envVars": map[string]string{"GREETING": "hello"}})
	b := &box{Sandbox: s, proxy: server.Proxy}
	none := map[string]string{"X-Access-Token": ""}

	if r, _ := b.get(t, "GET", "/health", none); r.StatusCode != 204 || r.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("/health: %s, %v", r.Status, r.Header)
	}
	for _, path := range []string{"/metrics", "/envs", "/process.Process/List", "/files/compose"} {
		r, text := b.get(t, map[bool]string{true: "GET", false: "POST"}[strings.Count(path, "/") == 1], path, none)
		var refusal struct {
			Code    int
			Message string
		}
		if err := json.Unmarshal([]byte(text), &refusal); err != nil || r.StatusCode != 401 || refusal.Code != 401 || refusal.Message == "" {
			t.Errorf("%s without a token: %s, %q", path, r.Status, text)
		}
	}
	_, text := b.get(t, "GET", "/envs", nil)
	var envs map[string]string
	if err := json.Unmarshal([]byte(text), &envs); err != nil || envs["GREETING"] != "hello" || envs["E2B_SANDBOX"] != "true" || envs["E2B_SANDBOX_ID"] != b.ID {
		t.Errorf("/envs: %q", text)
	}
	_, text = b.get(t, "GET", "/metrics", nil)
	var m map[string]float64
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		t.Fatalf("/metrics: %q", text)
	}
	for _, k := range []string{"ts", "cpu_count", "mem_total", "mem_used", "mem_total_mib", "mem_used_mib", "disk_used", "disk_total"} {
		if m[k] <= 0 {
			t.Errorf("/metrics: %s is %v", k, m[k])
		}
	}
	for _, k := range []string{"cpu_used_pct", "mem_cache"} {
		if _, ok := m[k]; !ok {
			t.Errorf("/metrics has no %s", k)
		}
	}
	if want := float64(512 << 20); m["mem_total"] != want || m["mem_used"] >= want {
		t.Errorf("/metrics: memory %v of %v, want a total of %v", m["mem_used"], m["mem_total"], want)
	}

	r, _ := b.get(t, "OPTIONS", "/process.Process/Start", map[string]string{"X-Access-Token": "", "Origin": "https://example.com",
		"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-access-token"})
	if r.StatusCode/100 != 2 || r.Header.Get("Access-Control-Allow-Origin") != "*" || r.Header.Get("Access-Control-Max-Age") != "7200" ||
		!strings.Contains(r.Header.Get("Access-Control-Allow-Headers"), "authorization") || !strings.Contains(r.Header.Get("Access-Control-Allow-Methods"), "PATCH") {
		t.Errorf("preflight: %s, %v", r.Status, r.Header)
	}
	if r, _ := b.get(t, "GET", "/health", map[string]string{"Origin": "https://example.com"}); r.Header.Get("Access-Control-Allow-Origin") != "*" ||
		!strings.Contains(r.Header.Get("Access-Control-Expose-Headers"), "Location") {
		t.Errorf("of another origin: %v", r.Header)
	}

	for _, path := range []string{"/init", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw", "/upgrade", "/identity"} {
		if r, text := b.get(t, "POST", path, nil); r.StatusCode != 404 {
			t.Errorf("%s from outside: %s, %q", path, r.Status, text)
		}
	}
	if r, _ := b.get(t, "GET", "/health", map[string]string{"E2b-Sandbox-Port": "49982"}); r.StatusCode != 502 {
		t.Errorf("the control port from outside: %s", r.Status)
	}
	if got := b.Out(t, `curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:49982/identity`); got != "401" {
		t.Errorf("the control port from inside answers %s", got)
	}
}

// Files are served with ranges, conditions, types and compression.
func TestFileHeaders(t *testing.T) {
	t.Parallel()
	b := newBox(t, program.Start(t, program.Options{}), 10*time.Minute)
	if err := b.Write(t.Context(), "/tmp/a b.txt", []byte("0123456789")); err != nil {
		t.Fatal(err)
	}
	const path = "/files?path=/tmp/a%20b.txt"
	whole, text := b.get(t, "GET", path, map[string]string{"Accept-Encoding": "identity"})
	if text != "0123456789" || whole.Header.Get("Content-Disposition") != `inline; filename="a b.txt"` || !strings.HasPrefix(whole.Header.Get("Content-Type"), "text/plain") ||
		!strings.Contains(whole.Header.Get("Vary"), "Accept-Encoding") || whole.Header.Get("Last-Modified") == "" || whole.ContentLength != 10 {
		t.Errorf("whole: %q, %v", text, whole.Header)
	}
	modified := whole.Header.Get("Last-Modified")
	for _, c := range []struct {
		name    string
		headers map[string]string
		status  int
		text    string
	}{
		{"range", map[string]string{"Range": "bytes=2-4"}, 206, "234"},
		{"end", map[string]string{"Range": "bytes=-3"}, 206, "789"},
		{"beyond", map[string]string{"Range": "bytes=20-"}, 416, ""},
		{"not modified", map[string]string{"If-Modified-Since": modified}, 304, ""},
		{"modified", map[string]string{"If-Unmodified-Since": "Mon, 02 Jan 2006 15:04:05 GMT"}, 412, ""},
		{"range if the same", map[string]string{"Range": "bytes=0-0", "If-Range": modified}, 206, "0"},
		{"nothing acceptable", map[string]string{"Accept-Encoding": "identity;q=0, br"}, 406, ""},
	} {
		r, text := b.get(t, "GET", path, c.headers)
		if r.StatusCode != c.status || c.text != "" && text != c.text {
			t.Errorf("%s: %s, %q", c.name, r.Status, text)
		}
	}
	if r, text := b.get(t, "GET", path, map[string]string{"Accept-Encoding": "gzip"}); r.Header.Get("Content-Encoding") != "gzip" || !strings.HasPrefix(text, "\x1f\x8b") {
		t.Errorf("gzip: %v, %q", r.Header, text)
	}
	if r, text := b.get(t, "HEAD", path, nil); r.StatusCode != 200 || text != "" {
		t.Errorf("HEAD: %s, %q", r.Status, text)
	}
}

// A client of another codec, in binary, gets the same; silent streams give
// signs of life; deadlines end what was started.
func TestStreams(t *testing.T) {
	t.Parallel()
	b := newBox(t, program.Start(t, program.Options{}), 10*time.Minute)
	ctx := t.Context()
	binary := processconnect.NewProcessClient(b.http, b.proxy)
	files := filesystemconnect.NewFilesystemClient(b.http, b.proxy, connect.WithSendGzip())
	if r, err := binary.List(ctx, as("", &pb.ListRequest{})); err != nil || len(r.Msg.GetProcesses()) != 0 {
		t.Errorf("in binary: %v, %v", r, err)
	}
	if r, err := files.Stat(ctx, as("", &fs.StatRequest{Path: "/etc/" + strings.Repeat("./", 500) + "passwd"})); err != nil || r.Msg.GetEntry().GetPath() != "/etc/passwd" {
		t.Errorf("in gzip: %v, %v", r, err)
	}

	tag := "mine"
	req := as("", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", "sleep 2.6; echo x"}}, Tag: &tag})
	req.Header().Set("Keepalive-Ping-Interval", "1")
	st, err := b.proc.Start(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for st.Receive() {
		ev := st.Msg().GetEvent()
		kinds = append(kinds, strings.TrimPrefix(fmt.Sprintf("%T", ev.GetEvent()), "*process.ProcessEvent_"))
		if len(kinds) == 1 {
			r, err := b.proc.List(ctx, as("", &pb.ListRequest{}))
			if err != nil || len(r.Msg.GetProcesses()) != 1 || r.Msg.GetProcesses()[0].GetTag() != tag || r.Msg.GetProcesses()[0].GetConfig().GetCmd() != "/bin/sh" {
				t.Errorf("listed: %v, %v", r, err)
			}
			again, err := b.proc.Connect(ctx, as("", &pb.ConnectRequest{Process: &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: tag}}}))
			if err != nil || !again.Receive() || again.Msg().GetEvent().GetStart().GetPid() != ev.GetStart().GetPid() {
				t.Errorf("by its tag: %v", err)
			}
			again.Close()
		}
	}
	if diff := cmp.Diff([]string{"Start", "Keepalive", "Keepalive", "Data", "End"}, kinds); diff != "" || st.Err() != nil {
		t.Errorf("%v, events (-want +got):\n%s", st.Err(), diff)
	}

	soon, cancel := context.WithTimeout(ctx, 700*time.Millisecond)
	defer cancel()
	late, number, err := b.start(soon, "", shell("sleep 3005"))
	if err != nil {
		t.Fatal(err)
	}
	var e *connect.Error
	if _, err := ended(late, nil); !errors.As(err, &e) || e.Code() != connect.CodeDeadlineExceeded {
		t.Errorf("after its deadline: %v", err)
	}
	program.Eventually(t, 5*time.Second, func() string {
		if b.Out(t, "pgrep -f '^sleep 3005' || true") != "" {
			return fmt.Sprintf("process %d lives after its deadline", number)
		}
		return ""
	})

	// What a client leaves goes on.
	leaving, cancel := context.WithCancel(ctx)
	if _, _, err := b.start(leaving, "", shell("sleep 1; touch /tmp/went-on")); err != nil {
		t.Fatal(err)
	}
	cancel()
	program.Eventually(t, 10*time.Second, func() string {
		return strings.TrimSpace(b.Out(t, "[ -e /tmp/went-on ] || echo the command ended with its client"))
	})

	in := b.proc.StreamInput(ctx)
	gets := shell("cat")
	gets.Stdin = nil
	cat, n, err := b.start(ctx, "", gets)
	if err != nil {
		t.Fatal(err)
	}
	sends := []*pb.StreamInputRequest{{Event: &pb.StreamInputRequest_Start{Start: &pb.StreamInputRequest_StartEvent{Process: pid(n)}}}}
	for i := range 100 {
		sends = append(sends, &pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{
			Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: bytes.Repeat([]byte{byte('a' + i%26)}, 1000)}}}}})
		sends = append(sends, &pb.StreamInputRequest{Event: &pb.StreamInputRequest_Keepalive{Keepalive: &pb.StreamInputRequest_KeepAlive{}}})
	}
	for _, m := range sends {
		if err := in.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := in.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.proc.CloseStdin(ctx, as("", &pb.CloseStdinRequest{Process: pid(n)})); err != nil {
		t.Error(err)
	}
	size := 0
	if end, err := ended(cat, func(p []byte) { size += len(p) }); err != nil || end.GetExitCode() != 0 || size != 100_000 {
		t.Errorf("%d bytes came through, %v, %v", size, end, err)
	}
}
