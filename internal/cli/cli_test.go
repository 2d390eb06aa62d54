package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/settings"
)

// Every command says what it does and shows it.
func TestEveryCommandIsDescribed(t *testing.T) {
	root := (&CLI{}).Root()
	Finish(root)
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		path := cmd.CommandPath()
		if strings.HasPrefix(path, "cay completion") || strings.HasPrefix(path, "cay help") {
			return // cobra's own
		}
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: Short is %q, want a phrase", path, cmd.Short)
		}
		if cmd.Example == "" {
			t.Errorf("%s has no example", path)
		}
		for line := range strings.Lines(cmd.Long) {
			if len(strings.TrimRight(line, "\n")) > 85 {
				t.Errorf("%s: a line of Long is %d characters wide: %s", path, len(line), line)
			}
		}
		if cmd.Args == nil {
			t.Errorf("%s does not check its arguments", path)
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(root)
}

func TestExit(t *testing.T) {
	typed := &cay.Error{Code: cay.CodePortTaken, Layer: cay.LayerHost, Message: "the port is taken", Fix: "choose another"}
	tests := []struct {
		name   string
		err    error
		status int
		want   string
	}{
		{"nothing", nil, 0, ""},
		{"status of a command", fmt.Errorf("x: %w", &ExitError{42}), 42, ""},
		{"typed", typed, 1, "error: the port is taken\nfix: choose another\n[host/port_taken]\n"},
		{"wrapped: what was being done stays", fmt.Errorf("starting the API: %w", typed), 1, "error: starting the API: the port is taken\nfix: choose another\n[host/port_taken]\n"},
		{"without a fix", &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerAPI, Message: "odd"}, 1, "error: odd\n[api/internal_server_error]\n"},
		{"the cause is for the log", &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerAPI, Message: "odd", Err: errors.New("secret detail")}, 1, "error: odd\n[api/internal_server_error]\n"},
		{"plain", errors.New("broken"), 1, "error: broken\n"},
		{"two at once", errors.Join(typed, errors.New("broken")), 1, "error: the port is taken\nfix: choose another\n[host/port_taken]\nerror: broken\n"},
		{"usage", &UsageError{"cay env", errors.New("unknown flag: --x")}, 2, "cay env: unknown flag: --x\nSee `cay env --help`.\n"},
		{"cobra's own words", errors.New(`required flag(s) "dir" not set`), 2, "cay: required flag(s) \"dir\" not set\nSee `cay --help`.\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var b bytes.Buffer
			if got := Exit(&b, false, tt.err); got != tt.status {
				t.Errorf("status %d, want %d", got, tt.status)
			}
			if diff := cmp.Diff(tt.want, b.String()); diff != "" {
				t.Error(diff)
			}
		})
	}
	var b bytes.Buffer
	Exit(&b, true, typed)
	if want := "\x1b[31merror:\x1b[0m the port is taken\n\x1b[1mfix:\x1b[0m choose another\n\x1b[2m[host/port_taken]\x1b[0m\n"; b.String() != want {
		t.Errorf("in colour: %q", b.String())
	}
}

// A defect of the server is told with the request's ID, and a body that is not
// ours without a crash.
func TestFailuresOfTheServer(t *testing.T) {
	f := newFakeServer()
	f.broken = true
	c := direct(t, f)
	_, err := c.Sandboxes(t.Context(), nil)
	var e *cay.Error
	if !errors.As(err, &e) || e.Code != cay.CodeInternal || e.Message != "something went wrong inside Cay" || e.Detail[detailRequest] != "req_1" {
		t.Errorf("%#v", err)
	}
	for _, status := range []int{200, 502} {
		c.http.Transport = handlerTransport(func(w *httptest.ResponseRecorder) {
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, "<html>")
		})
		if _, err := c.Sandboxes(t.Context(), nil); !errors.As(err, &e) || !strings.Contains(e.Message, "does not understand") {
			t.Errorf("status %d with HTML: %v", status, err)
		}
	}
}

// syncBuffer is an output that a test reads while the command writes.
type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// waitFor waits until the output holds a text.
func (s *syncBuffer) waitFor(t *testing.T, text string) {
	t.Helper()
	for range 5000 {
		if strings.Contains(s.String(), text) {
			return
		}
		time.Sleep(time.Millisecond) // polling another goroutine's output
	}
	t.Fatalf("no %q in %q", text, s.String())
}

// served runs a command line against the fake over the network.
func served(t *testing.T, c *CLI) func(context.Context, ...string) error {
	f := newFakeServer()
	api, proxy := httptest.NewServer(f.apiHandler()), httptest.NewServer(f.proxyHandler())
	t.Cleanup(api.Close)
	t.Cleanup(proxy.Close)
	c.Settings = func(*cobra.Command) (settings.Settings, error) { return settings.Settings{DataDir: "/d"}, nil }
	c.Locate = func(string) (Server, error) {
		return Server{APIURL: api.URL, ProxyURL: proxy.URL, TeamID: fakeTeam, APIKey: fakeKey, AdminToken: fakeAdmin}, nil
	}
	return func(ctx context.Context, args ...string) error {
		root := c.Root()
		Finish(root)
		root.SetArgs(args)
		return root.ExecuteContext(ctx)
	}
}

// fakeTerminal is a person's terminal.
type fakeTerminal struct {
	mu      sync.Mutex
	size    Size
	raw     bool
	resized func()
}

func (f *fakeTerminal) Raw() (func(), error) {
	f.raw = true
	return func() { f.raw = false }, nil
}

func (f *fakeTerminal) Size() (Size, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.size, nil
}

func (f *fakeTerminal) Resized(call func()) func() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resized = call
	return func() {}
}

func TestExecOnATerminal(t *testing.T) {
	term := &fakeTerminal{size: Size{Cols: 80, Rows: 24}}
	keys, hands := io.Pipe()
	var out syncBuffer
	c := &CLI{In: keys, Out: &out, Err: io.Discard, InTerm: term, Term: "vt220"}
	run := served(t, c)
	ended := make(chan error, 1)
	go func() { ended <- run(t.Context(), "sandbox", "exec", "-it", guarded) }()
	out.waitFor(t, "/bin/bash [-i -l] 80x24 TERM=vt220\r\n")
	if !term.raw {
		t.Error("the terminal is not raw")
	}
	_, _ = hands.Write([]byte("\x03")) // a key, not a signal
	out.waitFor(t, `"\x03"`)
	term.mu.Lock()
	term.size, _ = Size{Cols: 120, Rows: 40}, 0
	call := term.resized
	term.mu.Unlock()
	call()
	out.waitFor(t, "now 120x40")
	_, _ = hands.Write([]byte("exit\r"))
	var exit *ExitError
	if err := <-ended; !errors.As(err, &exit) || exit.Status != 3 {
		t.Errorf("%v, want exit status 3", err)
	}
	if term.raw {
		t.Error("the terminal stays raw")
	}
}

// A terminal without a size, as of a program that plays one, gets the usual.
func TestExecOnATerminalWithoutSize(t *testing.T) {
	var out syncBuffer
	run := served(t, &CLI{In: strings.NewReader("exit\r"), Out: &out, Err: io.Discard, InTerm: &fakeTerminal{}})
	var exit *ExitError
	if err := run(t.Context(), "sandbox", "exec", "-t", open, "top"); !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if !strings.HasPrefix(out.String(), "top [] 80x24 TERM=xterm-256color") {
		t.Errorf("%q", out.String())
	}
}

// Interrupting ends the command in the sandbox, and its end is told.
func TestExecInterrupted(t *testing.T) {
	tests := []struct{ name, script, says string }{
		{"it ends", "trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.01; done", "bye"},
		{"it dies", "echo up; exec sleep 60", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out syncBuffer
			run := served(t, &CLI{In: strings.NewReader(""), Out: &out, Err: io.Discard})
			ctx, interrupt := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- run(ctx, "sandbox", "exec", open, "--", "sh", "-c", tt.script) }()
			out.waitFor(t, "up")
			interrupt()
			want := 143
			if tt.says != "" {
				want = 9
			}
			var exit *ExitError
			if err := <-ended; !errors.As(err, &exit) || exit.Status != want {
				t.Errorf("%v, want exit status %d", err, want)
			}
			if !strings.Contains(out.String(), tt.says) {
				t.Errorf("output %q lacks %q", out.String(), tt.says)
			}
		})
	}
}

// Much output and input arrive whole and in order.
func TestExecBulk(t *testing.T) {
	var in bytes.Buffer
	for i := range 40000 {
		fmt.Fprintf(&in, "line %d\n", i)
	}
	want := in.String()
	var out syncBuffer
	run := served(t, &CLI{In: &in, Out: &out, Err: io.Discard})
	if err := run(t.Context(), "sandbox", "exec", "-i", guarded, "--", "cat"); err != nil {
		t.Fatal(err)
	}
	if out.String() != want {
		t.Errorf("%d bytes came back, want the same %d", len(out.String()), len(want))
	}
}

// The stages are those of the doctor, against the proxy's own rules.
func TestTrial(t *testing.T) {
	f := newFakeServer()
	f.alive = nil
	trial := NewTrial(direct(t, f), "base")
	for _, stage := range []func(context.Context) error{trial.Create, trial.Command, trial.File, trial.Kill} {
		if err := stage(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(f.killed, []string{guarded}) || trial.ID() != guarded {
		t.Errorf("killed %v, the trial's is %q", f.killed, trial.ID())
	}
	if err := trial.Command(t.Context()); err == nil {
		t.Error("a command in an ended sandbox succeeded")
	}
	if err := trial.File(t.Context()); cay.CodeOf(err) != cay.CodeGuestProbe || !strings.Contains(err.Error(), "The sandbox was not found") {
		t.Errorf("a file in an ended sandbox: %v", err)
	}
	if err := NewTrial(direct(t, f), "base").Kill(t.Context()); err != nil {
		t.Errorf("the end of a trial that made nothing: %v", err)
	}
}

func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeServer()
		var got []string
		fo := &follower{client: direct(t, f), id: guarded, tail: 2, print: func(e api.SandboxLogEntry) error {
			got = append(got, e.Message)
			return nil
		}}
		if err := fo.first(t.Context()); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- fo.follow(t.Context()) }()
		add := func(after time.Duration, m string) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.logs = append(f.logs, api.SandboxLogEntry{Timestamp: fakeNow.Add(after), Level: api.LogLevelInfo, Message: m})
		}
		synctest.Wait()
		add(2*time.Second, "same millisecond as the last")
		time.Sleep(2 * followEvery)
		add(2*time.Second+300*time.Microsecond, "same again")
		time.Sleep(2 * followEvery)
		f.mu.Lock()
		f.alive = nil
		f.mu.Unlock()
		add(9*time.Second, "sandbox ended")
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		want := []string{"envd is ready", "something odd", "same millisecond as the last", "same again", "sandbox ended"}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}

// A terminal of the kernel is taken to raw mode and back.
func TestFileTerminal(t *testing.T) {
	if f, err := os.Open(os.DevNull); err != nil || FileTerminal(f) != nil {
		t.Errorf("%s is a terminal, %v", os.DevNull, err)
	}
	ptmx, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer ptmx.Close()
	defer tty.Close()
	if err := pty.Setsize(ptmx, &pty.Winsize{Cols: 100, Rows: 30}); err != nil {
		t.Fatal(err)
	}
	term := FileTerminal(tty)
	if s, err := term.Size(); err != nil || s != (Size{100, 30}) {
		t.Errorf("size %v, %v", s, err)
	}
	restore, err := term.Raw()
	if err != nil {
		t.Fatal(err)
	}
	// Raw: a key arrives at once and as it is, and is not echoed.
	_, _ = ptmx.Write([]byte("\x03"))
	b := make([]byte, 8)
	if n, err := tty.Read(b); err != nil || string(b[:n]) != "\x03" {
		t.Errorf("read %q, %v", b[:n], err)
	}
	restore()
	_, _ = ptmx.Write([]byte("a\n"))
	if n, err := tty.Read(b); err != nil || string(b[:n]) != "a\n" {
		t.Errorf("after restore: read %q, %v", b[:n], err)
	}
}

func TestAgo(t *testing.T) {
	for want, d := range map[string]time.Duration{"0s": 0, "59s": 59 * time.Second, "1m00s": time.Minute, "59m59s": time.Hour - time.Second,
		"47h59m": 48*time.Hour - time.Minute, "2d00h": 48 * time.Hour, "10d05h": 245 * time.Hour} {
		if got := ago(d); got != want {
			t.Errorf("ago(%s) = %s, want %s", d, got, want)
		}
	}
}
