package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// stream is a server's stream of messages, the last one flagged.
func stream(msgs ...string) []byte {
	var b []byte
	for _, m := range msgs {
		b = append(b, envelope([]byte(m))...)
	}
	last := envelope([]byte(msgs[len(msgs)-1]))
	last[0] = lastFlag
	return append(b[:len(b)-len(last)], last...)
}

func TestReadCommand(t *testing.T) {
	start, exited := `{"event":{"start":{"pid":7}}}`, `{"event":{"end":{"exited":true,"status":"exit status 0"}}}`
	for _, c := range []struct {
		name string
		in   []byte
		out  string
		code int
		err  string
	}{
		{"output in two parts", stream(start, `{"event":{"data":{"stdout":"aGVs"}}}`, `{"event":{"keepalive":{}}}`, `{"event":{"data":{"stdout":"bG8="}}}`, exited, `{}`), "hello", 0, ""},
		{"exit code", stream(start, `{"event":{"end":{"exitCode":3,"exited":true}}}`, `{}`), "", 3, ""},
		{"only standard error", stream(start, `{"event":{"data":{"stderr":"eA=="}}}`, exited, `{}`), "", 0, ""},
		{"an error at the end", stream(`{"error":{"code":"not_found","message":"no such user"}}`), "", 0, "the command failed: not_found: no such user"},
		{"killed", stream(start, `{"event":{"end":{"exitCode":-1,"status":"signal: killed"}}}`, `{}`), "", -1, "the command did not exit: signal: killed"},
		{"an end without the command's", stream(start, `{}`), "", 0, "the stream ended before the command"},
		{"cut off", stream(start, exited, `{}`)[:12], "", 0, "unexpected EOF"},
		{"a broken length", []byte{0, 0xff, 0xff, 0xff, 0xff}, "", 0, "a message of 4294967295 bytes"},
		{"no JSON", stream("x", `{}`), "", 0, "reading an event of the command"},
	} {
		got, err := readCommand(bytes.NewReader(c.in))
		if (err == nil) != (c.err == "") || (err != nil && !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.err)
		}
		if string(got.out) != c.out || got.code != c.code || got.first.IsZero() != (c.out == "") {
			t.Errorf("%s: got %q, code %d, first output at %v", c.name, got.out, got.code, got.first)
		}
	}
}

// TestReadAnything reads streams that are cut and changed at random: a command
// is never taken for ended that did not end, and nothing is made of a length.
func TestReadAnything(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	whole := stream(`{"event":{"data":{"stdout":"aGk="}}}`, `{"event":{"end":{"exited":true}}}`, `{}`)
	for range 5000 {
		b := bytes.Clone(whole[:r.IntN(len(whole))])
		if _, err := readCommand(bytes.NewReader(b)); err == nil {
			t.Fatalf("%q was taken for a whole stream", b)
		}
		for range 1 + r.IntN(3) {
			if len(b) > 0 {
				b[r.IntN(len(b))] = byte(r.Uint32())
			}
		}
		last, msg, err := readEnvelope(bytes.NewReader(b))
		if err != nil {
			continue
		}
		if n := int(binary.BigEndian.Uint32(b[1:5])); n != len(msg) || last != (b[0]&lastFlag != 0) || !bytes.Equal(msg, b[5:5+n]) {
			t.Fatalf("%x: last %v, message %x", b, last, msg)
		}
	}
}

// TestClient holds the requests together with the contract of the clients.
func TestClient(t *testing.T) {
	type seen struct {
		Line string
		Head map[string]string
		Body string
	}
	var got []seen
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		s := seen{Line: r.Method + " " + r.URL.Path, Body: string(b), Head: map[string]string{}}
		for _, k := range []string{"X-Api-Key", "X-Admin-Token", "E2b-Sandbox-Id", "E2b-Sandbox-Port", "X-Access-Token", "Content-Type"} {
			if v := r.Header.Get(k); v != "" {
				s.Head[k] = v
			}
		}
		got = append(got, s)
		switch r.URL.Path {
		case "/v2/sandboxes":
			w.WriteHeader(http.StatusCreated)
			io.WriteString(w, `{"sandboxID":"abc","envdAccessToken":"tok"}`)
		case "/operator/v1/status":
			io.WriteString(w, `{"node":{"poolReady":2}}`)
		case "/operator/v1/sandboxes/abc/trace":
			io.WriteString(w, `[{"name":"disk","layer":"storage","tookMs":1.5,"error":""}]`)
		case "/process.Process/Start":
			w.Write(stream(`{"event":{"data":{"stdout":"aGk="}}}`, `{"event":{"end":{"exited":true}}}`, `{}`))
		case "/sandboxes/abc":
			w.WriteHeader(http.StatusNoContent)
		case "/filesystem.Filesystem/Stat":
			http.Error(w, `{"code":"not_found"}`, http.StatusNotFound)
		}
	})
	srv := httptest.NewServer(h)
	defer srv.Close()
	c := newClient(&server{api: srv.URL, proxy: srv.URL, key: "e2b_k", admin: "adm"})
	defer c.close()
	b, err := c.create(t.Context(), 90*time.Second)
	if err != nil || b != (box{"abc", "tok"}) {
		t.Fatalf("create: %v, %v", b, err)
	}
	if n, err := c.pooled(t.Context()); n != 2 || err != nil {
		t.Errorf("pooled: %d, %v", n, err)
	}
	if steps, err := c.trace(t.Context(), b); err != nil || !cmp.Equal(steps, []step{{"disk", 1.5}}) {
		t.Errorf("trace: %v, %v", steps, err)
	}
	if cmd, err := c.run(t.Context(), b, "/bin/echo", "hi"); err != nil || string(cmd.out) != "hi" {
		t.Errorf("run: %q, %v", cmd.out, err)
	}
	if err := c.stat(t.Context(), b); err == nil || !strings.Contains(err.Error(), `POST /filesystem.Filesystem/Stat: 404 Not Found: {"code":"not_found"}`) {
		t.Errorf("a refusal: %v", err)
	}
	if err := c.kill(t.Context(), b); err != nil {
		t.Error(err)
	}
	start, err := json.Marshal(map[string]any{"process": map[string]any{"cmd": "/bin/echo", "args": []string{"hi"}}})
	if err != nil {
		t.Fatal(err)
	}
	in := func(kind string) map[string]string {
		return map[string]string{"E2b-Sandbox-Id": "abc", "E2b-Sandbox-Port": "49983", "X-Access-Token": "tok", "Content-Type": kind}
	}
	want := []seen{
		{"POST /v2/sandboxes", map[string]string{"X-Api-Key": "e2b_k", "Content-Type": "application/json"}, `{"templateID":"base","timeout":90}`},
		{"GET /operator/v1/status", map[string]string{"X-Admin-Token": "adm"}, ""},
		{"GET /operator/v1/sandboxes/abc/trace", map[string]string{"X-Admin-Token": "adm"}, ""},
		{"POST /process.Process/Start", in("application/connect+json"), string(envelope(start))},
		{"POST /filesystem.Filesystem/Stat", in("application/json"), `{"path":"/etc/hostname"}`},
		{"DELETE /sandboxes/abc", map[string]string{"X-Api-Key": "e2b_k"}, ""},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A caller uses one connection, reads every answer to its end, and says what a
// server refuses.
func TestCaller(t *testing.T) {
	var calls, conns atomic.Int32
	refuse := errors.New("no")
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if calls.Add(1) > 3 || err != nil || string(body) != "{}" || r.URL.Path != "/a" || r.Header.Get("X-Who") != "me" || r.Header.Get("Content-Type") != "application/json" {
			http.Error(w, refuse.Error(), http.StatusTeapot)
			return
		}
		fmt.Fprint(w, strings.Repeat("x", 10_000))
	}))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			conns.Add(1)
		}
	}
	srv.Start()
	defer srv.Close()
	c, err := dialCaller(t.Context(), srv.URL, "/a", http.Header{"X-Who": {"me"}}, "{}")
	if err != nil {
		t.Fatal(err)
	}
	defer c.conn.Close()
	for i := range 3 {
		if err := c.call(); err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
	}
	if err := c.call(); err == nil || !strings.Contains(err.Error(), "418") || !strings.Contains(err.Error(), refuse.Error()) {
		t.Errorf("%v, want what the server said", err)
	}
	if n := conns.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}
