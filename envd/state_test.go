package envd

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// stateFile is like the one that PID 1 makes.
func stateFile(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC)
	must(t, err)
	f := os.NewFile(uintptr(fd), "state")
	t.Cleanup(func() { f.Close() })
	return f
}

// TestStateOutlivesDaemon: a daemon that is started again has the same
// configuration, and above all the same token.
func TestStateOutlivesDaemon(t *testing.T) {
	f := stateFile(t)
	conf := Config{ControlToken: "pid1", Instance: "i1", RunDir: t.TempDir() + "/cay", Hook: "/no/hook", State: f}
	first := New(conf)
	first.recall()
	if got := first.settings(); got.token != "" || got.control != "pid1" {
		t.Fatalf("the first daemon begins with %+v", got)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	for _, q := range []initRequest{
		{AccessToken: "a much longer token than the next one", EnvVars: map[string]string{"A": "1", "B": "1"}, Timestamp: &at},
		{AccessToken: "token", EnvVars: map[string]string{"B": "2"}, DefaultUser: "user", DefaultWorkdir: "/w",
			LifecycleID: "l", Generation: "g", Instance: "i2", ControlToken: "node", Timestamp: &at},
	} {
		must(t, first.apply(context.Background(), q))
	}
	next := New(conf)
	next.recall()
	got, want := next.settings(), first.settings()
	if diff := cmp.Diff(want.env, got.env); diff != "" {
		t.Error(diff)
	}
	if d := got.anchor.Sub(want.anchor); d < -time.Second || d > time.Second {
		t.Errorf("the clock of signatures is off by %s", d)
	}
	got.env, want.env, got.anchor, want.anchor = nil, nil, time.Time{}, time.Time{}
	if !got.timestamp.Equal(at) {
		t.Errorf("timestamp %v", got.timestamp)
	}
	got.timestamp, want.timestamp = time.Time{}, time.Time{}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(settings{})); diff != "" {
		t.Error(diff)
	}
	if got.token != "token" || got.control != "node" || got.instance != "i2" {
		t.Errorf("got %+v", got)
	}
}

// TestDamagedStateCloses: whoever cannot know the token lets nobody in.
func TestDamagedStateCloses(t *testing.T) {
	f := stateFile(t)
	conf := Config{ControlToken: "pid1", RunDir: t.TempDir() + "/cay", State: f}
	must(t, New(conf).apply(context.Background(), initRequest{AccessToken: "token"}))
	_, err := f.WriteAt([]byte("x"), 20)
	must(t, err)
	s := New(conf)
	s.recall()
	for _, token := range []string{"", "token"} {
		r := http.Request{Header: http.Header{}}
		r.Header.Set(headerToken, token)
		if s.authorized(&r) {
			t.Errorf("open to the token %q", token)
		}
	}
	must(t, s.apply(context.Background(), initRequest{AccessToken: "again"}))
	if s.settings().token != "again" {
		t.Error("the node cannot open it again")
	}
}

func FuzzReadState(f *testing.F) {
	f.Add([]byte{2, 0, 0, 0, 0x43, 0xbf, 0xa6, 0xa3, '{', '}'})
	f.Add([]byte{})
	f.Add([]byte{255, 255, 255, 255, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		_, err := readState(bytes.NewReader(b))
		if (err == io.EOF) != (len(b) == 0) {
			t.Errorf("%x: %v", b, err)
		}
		if err == nil && len(b) < stateHeader+2 {
			t.Errorf("%x passes for a configuration", b)
		}
	})
}
