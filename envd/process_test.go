package envd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/process"
	"github.com/cayhq/cay/internal/gen/envd/process/processconnect"
)

// patience bounds what a test waits for.
const testPatience = 20 * time.Second

// procGuest is a test guest with a client of the process service, in the JSON
// that the SDKs speak.
type procGuest struct {
	*fileGuest
	procs *processes
	rpc   processconnect.ProcessClient
}

func newProcGuest(t testing.TB) *procGuest {
	t.Helper()
	g := &procGuest{fileGuest: newFileGuest(t)}
	g.procs = g.Server.procs
	g.rpc = processconnect.NewProcessClient(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, g.web.URL, connect.WithProtoJSON())
	t.Cleanup(func() {
		for _, p := range g.procs.list() {
			signalSession(p.Pid, unix.SIGKILL)
		}
	})
	return g
}

// sh is a request for a shell script, without standard input as the SDK asks.
func sh(script string, edit ...func(*pb.StartRequest)) *pb.StartRequest {
	no := false
	r := &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", script}}, Stdin: &no}
	for _, f := range edit {
		f(r)
	}
	return r
}

func withStdin(r *pb.StartRequest) { r.Stdin = nil }

func withTag(tag string) func(*pb.StartRequest) { return func(r *pb.StartRequest) { r.Tag = &tag } }

func withPTY(cols, rows uint32) func(*pb.StartRequest) {
	return func(r *pb.StartRequest) { r.Pty = &pb.PTY{Size: &pb.PTY_Size{Cols: cols, Rows: rows}} }
}

// running is a stream of a process's events.
type running struct {
	t    testing.TB
	next func() (*pb.ProcessEvent, error)
	pid  uint32
	out  bytes.Buffer
	err  bytes.Buffer
	beat int // keepalives seen
}

// start runs a command and reads its first event.
func (g *procGuest) start(ctx context.Context, user string, m *pb.StartRequest, header ...string) *running {
	g.t.Helper()
	r := as(m, user)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header().Set(header[i], header[i+1])
	}
	s, err := g.rpc.Start(ctx, r)
	must(g.t, err)
	run := &running{t: g.t, next: func() (*pb.ProcessEvent, error) {
		if s.Receive() {
			return s.Msg().GetEvent(), nil
		}
		return nil, errors.Join(s.Err(), io.EOF)
	}}
	run.first()
	return run
}

// connect joins a process.
func (g *procGuest) connect(ctx context.Context, sel *pb.ProcessSelector) *running {
	g.t.Helper()
	s, err := g.rpc.Connect(ctx, connect.NewRequest(&pb.ConnectRequest{Process: sel}))
	must(g.t, err)
	run := &running{t: g.t, next: func() (*pb.ProcessEvent, error) {
		if s.Receive() {
			return s.Msg().GetEvent(), nil
		}
		return nil, errors.Join(s.Err(), io.EOF)
	}}
	run.first()
	return run
}

func (r *running) first() {
	r.t.Helper()
	ev, err := r.next()
	if err != nil {
		r.t.Fatalf("no start event: %v", err)
	}
	if ev.GetStart() == nil {
		r.t.Fatalf("the first event is %v", ev)
	}
	r.pid = ev.GetStart().GetPid()
}

// step reads one event; nil is the end of the stream.
func (r *running) step() (*pb.ProcessEvent, error) {
	ev, err := r.next()
	if err != nil {
		return nil, err
	}
	r.out.Write(ev.GetData().GetStdout())
	r.out.Write(ev.GetData().GetPty())
	r.err.Write(ev.GetData().GetStderr())
	if ev.GetKeepalive() != nil {
		r.beat++
	}
	return ev, nil
}

// end reads everything and returns the end event, after which the stream ends.
func (r *running) end() *pb.ProcessEvent_EndEvent {
	r.t.Helper()
	for {
		ev, err := r.step()
		if err != nil {
			r.t.Fatalf("the stream ended without an end event: %v (stdout %q, stderr %q)", err, r.out.String(), r.err.String())
		}
		if e := ev.GetEnd(); e != nil {
			if _, err := r.step(); err == nil || connect.CodeOf(err) != connect.CodeUnknown && !errors.Is(err, io.EOF) {
				r.t.Fatalf("after the end: %v", err)
			}
			return e
		}
	}
}

// failure reads everything and returns the stream's error.
func (r *running) failure() error {
	for {
		if _, err := r.step(); err != nil {
			return err
		}
	}
}

// until reads until the output holds a text.
func (r *running) until(text string) {
	r.t.Helper()
	for !strings.Contains(r.out.String(), text) {
		if _, err := r.step(); err != nil {
			r.t.Fatalf("waiting for %q: %v (output %q)", text, err, r.out.String())
		}
	}
}

func byPID(pid uint32) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: pid}}
}

func byTag(tag string) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: tag}}
}

// eventually polls a condition.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(testPatience); !f(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("waiting until %s", what)
		}
	}
}

// alive reports whether a process exists and is no zombie.
func alive(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	st, ok := parseStat(string(b))
	return ok && st.state != 'Z' && st.state != 'X'
}

// pidIn reads a PID that a script printed, and kills it in the end.
func pidIn(t testing.TB, text string) int {
	t.Helper()
	pid, err := strconv.Atoi(strings.TrimSpace(text))
	must(t, err)
	t.Cleanup(func() { unix.Kill(pid, unix.SIGKILL) })
	return pid
}

func wantCode(t testing.TB, err error, want connect.Code) {
	t.Helper()
	if got := connect.CodeOf(err); err == nil || got != want {
		t.Errorf("got %v (code %v), want code %v", err, got, want)
	}
}

func TestStartEnds(t *testing.T) {
	g := newProcGuest(t)
	for _, c := range []struct {
		script   string
		out, err string
		code     int32
		exited   bool
		status   string
		problem  string
	}{
		{"echo hi", "hi\n", "", 0, true, "exit status 0", ""},
		{"printf a; printf b >&2; exit 3", "a", "b", 3, true, "exit status 3", "exit status 3"},
		{"cat", "", "", 0, true, "exit status 0", ""}, // the input is /dev/null
		{"kill -9 $$", "", "", -1, false, "signal: killed", "signal: killed"},
		{"kill -TERM $$", "", "", -1, false, "signal: terminated", "signal: terminated"},
		{`printf 'ä\xff\0z'`, "ä\xff\x00z", "", 0, true, "exit status 0", ""},
	} {
		r := g.start(t.Context(), "user", sh(c.script))
		e := r.end()
		got := []any{r.out.String(), r.err.String(), e.GetExitCode(), e.GetExited(), e.GetStatus(), e.GetError()}
		if diff := cmp.Diff([]any{c.out, c.err, c.code, c.exited, c.status, c.problem}, got); diff != "" {
			t.Errorf("%s: %s", c.script, diff)
		}
	}
	if l := g.procs.list(); len(l) != 0 {
		t.Errorf("still listed: %v", l)
	}
}

// TestStartWire holds the bytes that the SDKs read: enveloped JSON, with
// defaults left out, and {} at the end.
func TestStartWire(t *testing.T) {
	g := newProcGuest(t)
	body := []byte(`{"process":{"cmd":"/bin/bash","args":["-l","-c","echo hi"],"envs":{},"later":1},"stdin":false,"unknown":{}}`)
	msg := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
	// A timeout of 0 is none.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.web.URL+"/process.Process/Start", bytes.NewReader(msg))
	must(t, err)
	req.Header = http.Header{"Content-Type": {"application/connect+json"}, "Connect-Protocol-Version": {"1"}, "Connect-Timeout-Ms": {"0"}}
	code, text, h := g.do(req)
	if code != 200 || h.Get("Content-Type") != "application/connect+json" {
		t.Fatalf("%d %v %q", code, h, text)
	}
	var got []string
	for len(text) >= 5 {
		n := int(binary.BigEndian.Uint32([]byte(text[1:5])))
		got = append(got, fmt.Sprintf("%d ", text[0])+strings.ReplaceAll(text[5:5+n], " ", ""))
		text = text[5+n:]
	}
	if len(got) != 4 {
		t.Fatalf("events: %q", got)
	}
	if !strings.HasPrefix(got[0], `0 {"event":{"start":{"pid":`) {
		t.Errorf("first: %s", got[0])
	}
	want := []string{`0 {"event":{"data":{"stdout":"aGkK"}}}`, `0 {"event":{"end":{"exited":true,"status":"exitstatus0"}}}`, "2 {}"}
	if diff := cmp.Diff(want, got[1:]); diff != "" {
		t.Error(diff)
	}
}

func TestStartIdentity(t *testing.T) {
	g := newProcGuest(t)
	t.Setenv("PATH", "/usr/bin:/bin")
	t.Setenv("CAY_CONTROL_TOKEN", "secret")
	t.Setenv("SECRET", "of envd")
	g.state.env = map[string]string{"E2B_SANDBOX": "true", "A": "global", "B": "global"}
	m := sh("env | sort; id -u; id -g; id -G; pwd; cat /proc/self/oom_score_adj; nice; umask; stat -Lc %u /proc/self/fd/1; echo again > /dev/stdout")
	m.Process.Envs = map[string]string{"B": "request", "C": "request"}
	r := g.start(t.Context(), "user", m)
	if e := r.end(); e.GetExitCode() != 0 {
		t.Fatalf("%v: %s", e, r.err.String())
	}
	want := fmt.Sprintf(`A=global
B=request
C=request
E2B_SANDBOX=true
HOME=%[1]s
LOGNAME=user
PATH=/usr/bin:/bin
PWD=%[1]s
SHLVL=%[4]s
USER=user
_=/usr/bin/env
%[2]d
%[2]d
%[2]d 12399
%[1]s
100
0
0022
%[2]d
again
`, g.home, testUID, 0, "1")
	// Bash counts a pipeline's shell differently over its versions.
	if diff := cmp.Diff(strings.ReplaceAll(want, "SHLVL=1\n", ""), strings.ReplaceAll(strings.ReplaceAll(r.out.String(), "SHLVL=0\n", ""), "SHLVL=1\n", "")); diff != "" {
		t.Error(diff)
	}
}

func TestStartDirectory(t *testing.T) {
	g := newProcGuest(t)
	must(t, os.MkdirAll(filepath.Join(g.home, "sub"), 0o755))
	must(t, os.WriteFile(filepath.Join(g.home, "file"), nil, 0o644))
	work := filepath.Join(g.dir, "work")
	must(t, os.Mkdir(work, 0o755))
	for _, c := range []struct{ cwd, workdir, want string }{
		{"", "", g.home},
		{"", work, work},
		{"~", work, g.home},
		{"~/sub", "", g.home + "/sub"},
		{"sub", work, g.home + "/sub"},
		{"/", "", "/"},
		{g.home + "/missing", "", "does not exist"},
		{g.home + "/file", "", "is not a directory"},
		{"~other", "", "user-specific"},
		{g.dir + "/root", "", "cannot be used"}, // root's own
		{"a\x00b", "", "NUL"},
	} {
		g.state.workdir = c.workdir
		m := sh("pwd")
		if c.cwd != "" {
			m.Process.Cwd = &c.cwd
		}
		s, err := g.rpc.Start(t.Context(), as(m, "user"))
		must(t, err)
		var out strings.Builder
		for s.Receive() {
			out.Write(s.Msg().GetEvent().GetData().GetStdout())
		}
		if filepath.IsAbs(c.want) {
			if s.Err() != nil || strings.TrimSpace(out.String()) != c.want {
				t.Errorf("cwd %q, default %q: %q, %v; want %s", c.cwd, c.workdir, out.String(), s.Err(), c.want)
			}
			continue
		}
		wantCode(t, s.Err(), connect.CodeInvalidArgument)
		if !strings.Contains(fmt.Sprint(s.Err()), c.want) {
			t.Errorf("cwd %q: %v; want %q", c.cwd, s.Err(), c.want)
		}
	}
}

func TestStartRefused(t *testing.T) {
	g := newProcGuest(t)
	must(t, os.WriteFile(filepath.Join(g.home, "plain"), []byte("x"), 0o644))
	for _, c := range []struct {
		name, user string
		edit       func(*pb.StartRequest)
		want       connect.Code
		text       string
	}{
		{"no process", "user", func(r *pb.StartRequest) { r.Process = nil }, connect.CodeInvalidArgument, "no process"},
		{"no command", "user", func(r *pb.StartRequest) { r.Process.Cmd = "" }, connect.CodeInvalidArgument, "empty"},
		{"unknown command", "user", func(r *pb.StartRequest) { r.Process.Cmd = "no-such-program" }, connect.CodeInvalidArgument, "executable file not found"},
		{"missing file", "user", func(r *pb.StartRequest) { r.Process.Cmd = "/no/such" }, connect.CodeInvalidArgument, "no such file"},
		{"not executable", "user", func(r *pb.StartRequest) { r.Process.Cmd = "./plain" }, connect.CodeInvalidArgument, "permission denied"},
		{"NUL in command", "user", func(r *pb.StartRequest) { r.Process.Cmd = "a\x00" }, connect.CodeInvalidArgument, "NUL"},
		{"NUL in argument", "user", func(r *pb.StartRequest) { r.Process.Args = []string{"a\x00"} }, connect.CodeInvalidArgument, "NUL"},
		{"bad variable", "user", func(r *pb.StartRequest) { r.Process.Envs = map[string]string{"a=b": "c"} }, connect.CodeInvalidArgument, "'='"},
		{"empty variable", "user", func(r *pb.StartRequest) { r.Process.Envs = map[string]string{"": "c"} }, connect.CodeInvalidArgument, "environment"},
		{"too long", "user", func(r *pb.StartRequest) { r.Process.Args = []string{strings.Repeat("x", 4<<20)} }, connect.CodeInvalidArgument, "too long"},
		{"unknown user", "nobody-here", nil, connect.CodeUnauthenticated, "unknown user"},
	} {
		m := sh("true")
		if c.edit != nil {
			c.edit(m)
		}
		s, err := g.rpc.Start(t.Context(), as(m, c.user))
		must(t, err)
		if s.Receive() {
			t.Errorf("%s: got %v", c.name, s.Msg())
		}
		wantCode(t, s.Err(), c.want)
		if !strings.Contains(fmt.Sprint(s.Err()), c.text) {
			t.Errorf("%s: %v; want %q", c.name, s.Err(), c.text)
		}
	}
	fds, _ := os.ReadDir("/proc/self/fd")
	if len(fds) > 100 {
		t.Errorf("%d descriptors are open", len(fds))
	}
}

// TestEndDoesNotWaitForChildren is `commands.run("server &")`.
func TestEndDoesNotWaitForChildren(t *testing.T) {
	g := newProcGuest(t)
	began := time.Now()
	r := g.start(t.Context(), "user", sh("sleep 1000 & echo $!"))
	r.end()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the end came after %s", took)
	}
	if pid := pidIn(t, r.out.String()); !alive(pid) {
		t.Error("the child is gone")
	}
}

// TestOrphanMayWrite: a server in the background lives on though it logs to
// where nobody reads.
func TestOrphanMayWrite(t *testing.T) {
	g := newProcGuest(t)
	file, fifo := filepath.Join(g.home, "file"), filepath.Join(g.home, "fifo")
	r := g.start(t.Context(), "user", sh(`mkfifo fifo; (read x < fifo; head -c 1000000 /dev/zero && echo done > file) & echo $!`))
	r.end()
	pidIn(t, r.out.String())
	f, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	must(t, err)
	f.WriteString("go\n")
	f.Close()
	eventually(t, "the orphan has written everything", func() bool {
		b, _ := os.ReadFile(file)
		return string(b) == "done\n"
	})
}

// TestBusyOrphan: a child that never stops writing does not hold up the end.
func TestBusyOrphan(t *testing.T) {
	g := newProcGuest(t)
	r := g.start(t.Context(), "user", sh("yes >&2 & echo $!"))
	if e := r.end(); e.GetExitCode() != 0 {
		t.Error(e)
	}
	pidIn(t, r.out.String())
}

// TestLateDescendants: a filter that is still at work when the shell ends is
// heard.
func TestLateDescendants(t *testing.T) {
	g := newProcGuest(t)
	r := g.start(t.Context(), "user", sh(`for i in 1 2 3; do echo $i; done > >(while read x; do sleep 0.05; echo got $x; done)`))
	r.end()
	if got := r.out.String(); got != "got 1\ngot 2\ngot 3\n" {
		t.Errorf("got %q", got)
	}
}

// TestOwnOutputIsComplete: what the process itself wrote arrives, however late
// the client reads, while a child keeps the pipe open.
func TestOwnOutputIsComplete(t *testing.T) {
	g := newProcGuest(t)
	const size = 3 << 20
	r := g.start(t.Context(), "user", sh(fmt.Sprintf("head -c %d /dev/zero; sleep 1000 & echo -n end", size)))
	eventually(t, "the process waits for its reader or has ended", func() bool { return r.stalled() })
	r.end()
	if n := r.out.Len(); n != size+3 || !strings.HasSuffix(r.out.String(), "end") {
		t.Errorf("%d bytes of %d", n, size+3)
	}
}

// stalled reports whether the process has written nothing for a while.
func (r *running) stalled() bool {
	before := written(r.pid)
	time.Sleep(100 * time.Millisecond) // an interval of measurement
	return before == written(r.pid)
}

// written is how much the living members of a session have written.
func written(pid uint32) int64 {
	var sum int64
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range files {
		b, _ := os.ReadFile(f)
		if st, ok := parseStat(string(b)); !ok || st.session != int(pid) {
			continue
		}
		b, _ = os.ReadFile(filepath.Join(filepath.Dir(f), "io"))
		for l := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(l, "wchar: "); ok {
				n, _ := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
				sum += n
			}
		}
	}
	return sum
}

// TestBackPressure: a reader that does not read stops the process, costs
// bounded memory and loses nothing.
func TestBackPressure(t *testing.T) {
	g := newProcGuest(t)
	// Binary: decoding JSON would be most of the test.
	g.rpc = processconnect.NewProcessClient(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, g.web.URL)
	const last = 8_000_000
	r := g.start(t.Context(), "user", sh(fmt.Sprintf("exec seq %d", last)))
	eventually(t, "the process waits for its reader", func() bool { return written(r.pid) > 0 && r.stalled() })
	if n := written(r.pid); n > 24<<20 { // the buffers of two sockets and a pipe
		t.Errorf("%d bytes are on their way", n)
	}
	got, want := sha256.New(), sha256.New()
	for {
		ev, err := r.next()
		must(t, err)
		if ev.GetEnd() != nil {
			break
		}
		b := ev.GetData().GetStdout()
		if len(b) > pipeChunk {
			t.Fatalf("a piece of %d bytes", len(b))
		}
		got.Write(b)
	}
	line := []byte{}
	for i := range last {
		line = append(strconv.AppendInt(line[:0], int64(i+1), 10), '\n')
		want.Write(line)
	}
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Error("the output is not what the process wrote")
	}
}

func TestSubscribers(t *testing.T) {
	g := newProcGuest(t)
	r := g.start(t.Context(), "user", sh("read x; for i in $(seq 1000); do echo out $i; echo err $i >&2; done; exit 4", withStdin))
	others := []*running{g.connect(t.Context(), byPID(r.pid)), g.connect(t.Context(), byPID(r.pid))}
	ctx, cancel := context.WithCancel(t.Context())
	stuck := g.connect(ctx, byPID(r.pid)) // never reads, and goes away
	in := &pb.SendInputRequest{Process: byPID(r.pid), Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("go\n")}}}
	_, err := g.rpc.SendInput(t.Context(), connect.NewRequest(in))
	must(t, err)
	cancel()
	_ = stuck
	done := make(chan *running)
	for _, o := range others {
		go func() {
			for {
				if ev, err := o.step(); err != nil || ev.GetEnd() != nil {
					done <- o
					return
				}
			}
		}()
	}
	if e := r.end(); e.GetExitCode() != 4 {
		t.Error(e)
	}
	for range others {
		o := <-done
		if o.out.String() != r.out.String() || o.err.String() != r.err.String() {
			t.Errorf("subscribers differ: %d and %d bytes, %d and %d", o.out.Len(), r.out.Len(), o.err.Len(), r.err.Len())
		}
	}
	if !strings.HasSuffix(r.out.String(), "out 1000\n") {
		t.Errorf("got %d bytes", r.out.Len())
	}
}

// TestStuckSubscriber: a request whose time is over does not hold up a process,
// though its client never reads.
func TestStuckSubscriber(t *testing.T) {
	over := make(chan struct{})
	p := &process{done: make(chan struct{})}
	if _, end := p.subscribe(over); end != nil {
		t.Fatal(end)
	}
	sub, _ := p.subscribe(t.Context().Done())
	close(over)
	go func() {
		p.broadcast(&pb.ProcessEvent{Event: &pb.ProcessEvent_Data{Data: stdoutData([]byte("x"))}}, nil)
		p.finish(&pb.ProcessEvent_EndEvent{ExitCode: 7})
	}()
	if ev := <-sub.ch; string(ev.GetData().GetStdout()) != "x" {
		t.Error(ev)
	}
	<-p.done
	if _, end := p.subscribe(over); end.GetExitCode() != 7 {
		t.Error("the end is not kept")
	}
}

func TestEndedAnswersForAWhile(t *testing.T) {
	g := newProcGuest(t)
	r := g.start(t.Context(), "user", sh("exit 5", withTag("job")))
	r.end()
	for _, sel := range []*pb.ProcessSelector{byPID(r.pid), byTag("job")} {
		again := g.connect(t.Context(), sel)
		if e := again.end(); again.pid != r.pid || e.GetExitCode() != 5 {
			t.Errorf("pid %d: %v", again.pid, e)
		}
	}
	_, err := g.rpc.SendSignal(t.Context(), connect.NewRequest(&pb.SendSignalRequest{Process: byPID(r.pid), Signal: pb.Signal_SIGNAL_SIGKILL}))
	wantCode(t, err, connect.CodeNotFound)
}

func TestRetain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ps := newProcesses(slog.New(slog.DiscardHandler))
		tag := "t"
		p := &process{pid: 42, tag: &tag}
		ps.add(p)
		ps.retire(p)
		time.Sleep(retain - time.Second) // virtual
		for _, sel := range []*pb.ProcessSelector{byPID(42), byTag("t")} {
			if got, err := ps.find(sel, true); got != p {
				t.Error(err)
			}
			if _, err := ps.find(sel, false); err == nil {
				t.Error("an ended process takes input")
			}
		}
		// The number is given out again: the young one counts, and lives on
		// when the old one's time is over.
		young := &process{pid: 42, tag: &tag}
		ps.add(young)
		time.Sleep(2 * time.Second)
		if got, _ := ps.find(byPID(42), true); got != young {
			t.Error("the old process answers for the young one")
		}
		ps.retire(young)
		time.Sleep(retain + time.Second)
		if got, err := ps.find(byPID(42), true); err == nil {
			t.Error("still answered for:", got)
		}
		if len(ps.timers) != 0 || len(ps.ended) != 0 || len(ps.order) != 0 {
			t.Error("something is left")
		}
		ps.close()
	})
}

func TestSelect(t *testing.T) {
	g := newProcGuest(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pids := map[string]uint32{}
	for _, tag := range []string{"a", "b", "c", "b"} {
		pids[tag] = g.start(ctx, "user", sh("exec sleep 1000", withTag(tag))).pid // the youngest of two
	}
	for tag, pid := range pids {
		p, err := g.procs.find(byTag(tag), false)
		if err != nil || p.pid != pid {
			t.Errorf("tag %s: %v, %v; want %d", tag, p, err, pid)
		}
	}
	list, err := g.rpc.List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
	must(t, err)
	var got []string
	for _, p := range list.Msg.GetProcesses() {
		got = append(got, p.GetTag()+" "+p.GetConfig().GetCmd())
	}
	if diff := cmp.Diff([]string{"a /bin/bash", "b /bin/bash", "c /bin/bash", "b /bin/bash"}, got); diff != "" {
		t.Error(diff)
	}
	for _, sel := range []*pb.ProcessSelector{byPID(1 << 30), byTag("none")} {
		_, e1 := g.rpc.SendSignal(t.Context(), connect.NewRequest(&pb.SendSignalRequest{Process: sel, Signal: pb.Signal_SIGNAL_SIGKILL}))
		_, e2 := g.rpc.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: sel}))
		_, e3 := g.rpc.Update(t.Context(), connect.NewRequest(&pb.UpdateRequest{Process: sel}))
		_, e4 := g.rpc.CloseStdin(t.Context(), connect.NewRequest(&pb.CloseStdinRequest{Process: sel}))
		s, e5 := g.rpc.Connect(t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: sel}))
		must(t, e5)
		if s.Receive() {
			t.Error("connected to", sel)
		}
		for _, err := range []error{e1, e2, e3, e4, s.Err()} {
			wantCode(t, err, connect.CodeNotFound)
		}
	}
	_, err = g.rpc.SendSignal(t.Context(), connect.NewRequest(&pb.SendSignalRequest{Process: byTag("a"), Signal: pb.Signal(3)}))
	wantCode(t, err, connect.CodeUnimplemented)
	_, err = g.rpc.SendSignal(t.Context(), connect.NewRequest(&pb.SendSignalRequest{Signal: pb.Signal_SIGNAL_SIGKILL}))
	wantCode(t, err, connect.CodeInvalidArgument)
}

func TestKillIsWhole(t *testing.T) {
	g := newProcGuest(t)
	// Job control puts each job into a group of its own.
	r := g.start(t.Context(), "user", sh(`set -m; sleep 1000 & a=$!; (trap "" TERM HUP; sleep 1000 & sleep 1000) & bash -c 'sleep 1000 | sleep 1000' & echo $a; wait`))
	r.until("\n")
	session := func() (pids []int) {
		files, _ := filepath.Glob("/proc/[0-9]*/stat")
		for _, f := range files {
			b, _ := os.ReadFile(f)
			if st, ok := parseStat(string(b)); ok && st.session == int(r.pid) && st.state != 'Z' {
				pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
				pids = append(pids, pid)
			}
		}
		return pids
	}
	eventually(t, "all jobs run", func() bool { return len(session()) >= 7 })
	_, err := g.rpc.SendSignal(t.Context(), connect.NewRequest(&pb.SendSignalRequest{Process: byPID(r.pid), Signal: pb.Signal_SIGNAL_SIGKILL}))
	must(t, err)
	if e := r.end(); e.GetExitCode() != -1 || e.GetStatus() != "signal: killed" || e.GetExited() {
		t.Error(e)
	}
	eventually(t, "the session is empty", func() bool { return len(session()) == 0 })
}

func TestTerminate(t *testing.T) {
	g := newProcGuest(t)
	r := g.start(t.Context(), "user", sh(`trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 1000 & wait; done`))
	r.until("ready")
	_, err := g.rpc.SendSignal(t.Context(), connect.NewRequest(&pb.SendSignalRequest{Process: byPID(r.pid), Signal: pb.Signal_SIGNAL_SIGTERM}))
	must(t, err)
	if e := r.end(); e.GetExitCode() != 9 || r.out.String() != "ready\ncaught\n" {
		t.Errorf("%v %q", e, r.out.String())
	}
}

func TestDeadline(t *testing.T) {
	g := newProcGuest(t)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	r := g.start(ctx, "user", sh("trap '' TERM HUP; sleep 1000 & sleep 1000"))
	wantCode(t, r.failure(), connect.CodeDeadlineExceeded)
	eventually(t, "the process is killed", func() bool { return !alive(int(r.pid)) && g.procs.count() == 0 })

	// The client's own impatience is not the deadline: the daemon itself says
	// so to a client that waits longer.
	s, err := g.rpc.Start(t.Context(), func() *connect.Request[pb.StartRequest] {
		q := as(sh("sleep 1000"), "user")
		q.Header().Set("Connect-Timeout-Ms", "200")
		return q
	}())
	must(t, err)
	for s.Receive() {
	}
	wantCode(t, s.Err(), connect.CodeDeadlineExceeded)
}

func TestDisconnect(t *testing.T) {
	g := newProcGuest(t)
	ctx, cancel := context.WithCancel(t.Context())
	r := g.start(ctx, "user", sh("read x; echo got $x", withStdin))
	cancel()
	wantCode(t, r.failure(), connect.CodeCanceled)
	if !alive(int(r.pid)) {
		t.Fatal("the process ended with its client")
	}
	again := g.connect(t.Context(), byPID(r.pid))
	_, err := g.rpc.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(r.pid),
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("it\n")}}}))
	must(t, err)
	if again.end(); again.out.String() != "got it\n" {
		t.Errorf("%q", again.out.String())
	}
}

func TestInput(t *testing.T) {
	g := newProcGuest(t)
	stdin := func(pid uint32, text string) error {
		_, err := g.rpc.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid),
			Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte(text)}}}))
		return err
	}
	closeIn := func(pid uint32) error {
		_, err := g.rpc.CloseStdin(t.Context(), connect.NewRequest(&pb.CloseStdinRequest{Process: byPID(pid)}))
		return err
	}
	r := g.start(t.Context(), "user", sh("cat; read -t 1000 x < <(sleep 1000)", withStdin))
	must(t, stdin(r.pid, "one\n"))
	must(t, stdin(r.pid, "two"))
	must(t, closeIn(r.pid))
	must(t, closeIn(r.pid)) // twice is fine
	r.until("one\ntwo")
	wantCode(t, stdin(r.pid, "late"), connect.CodeInternal)

	none := g.start(t.Context(), "user", sh("exec sleep 1000"))
	wantCode(t, stdin(none.pid, "x"), connect.CodeInternal)
	must(t, closeIn(none.pid))
	_, err := g.rpc.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(none.pid),
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("x")}}}))
	wantCode(t, err, connect.CodeInternal)
	_, err = g.rpc.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(none.pid)}))
	wantCode(t, err, connect.CodeUnimplemented)

	// A process that does not read takes a pipe full, and the rest waits until
	// the caller gives up; nobody else is blocked by it.
	idle := g.start(t.Context(), "user", sh("exec sleep 1000", withStdin))
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = g.rpc.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(idle.pid),
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: make([]byte, 1<<20)}}}))
	wantCode(t, err, connect.CodeDeadlineExceeded)
	must(t, closeIn(idle.pid))
	_, err = g.rpc.Update(t.Context(), connect.NewRequest(&pb.UpdateRequest{Process: byPID(idle.pid), Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 1, Rows: 1}}}))
	wantCode(t, err, connect.CodeInternal)
}

func TestStreamInput(t *testing.T) {
	g := newProcGuest(t)
	r := g.start(t.Context(), "user", sh("exec sha256sum", withStdin))
	s := g.rpc.StreamInput(t.Context())
	must(t, s.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Start{Start: &pb.StreamInputRequest_StartEvent{Process: byPID(r.pid)}}}))
	h := sha256.New()
	for i := range 200 {
		b := bytes.Repeat([]byte{byte(i)}, 10_000)
		h.Write(b)
		must(t, s.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{
			Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: b}}}}}))
		must(t, s.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Keepalive{Keepalive: &pb.StreamInputRequest_KeepAlive{}}}))
	}
	_, err := s.CloseAndReceive()
	must(t, err)
	_, err = g.rpc.CloseStdin(t.Context(), connect.NewRequest(&pb.CloseStdinRequest{Process: byPID(r.pid)}))
	must(t, err)
	if r.end(); !strings.HasPrefix(r.out.String(), hex.EncodeToString(h.Sum(nil))) {
		t.Errorf("got %s", r.out.String())
	}

	s = g.rpc.StreamInput(t.Context())
	s.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{}}})
	_, err = s.CloseAndReceive()
	wantCode(t, err, connect.CodeInvalidArgument)
}

func TestTerminal(t *testing.T) {
	g := newProcGuest(t)
	type_ := func(pid uint32, text string) {
		t.Helper()
		_, err := g.rpc.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid),
			Input: &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte(text)}}}))
		must(t, err)
	}
	m := sh("", withPTY(123, 45))
	m.Process.Args = []string{"--norc", "--noprofile", "-i"}
	m.Process.Envs = map[string]string{"PS1": "> ", "TERM": "xterm-256color"}
	r := g.start(t.Context(), "user", m)
	type_(r.pid, "stty size; id -un $(stat -c %u $(tty)) 2>/dev/null; stat -c 'owner %u' $(tty)\n")
	r.until("45 123")
	r.until(fmt.Sprintf("owner %d", testUID))
	_, err := g.rpc.Update(t.Context(), connect.NewRequest(&pb.UpdateRequest{Process: byPID(r.pid), Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 80, Rows: 24}}}))
	must(t, err)
	type_(r.pid, "stty size\n")
	r.until("24 80")
	// Ctrl-C ends the foreground job, and only that.
	type_(r.pid, "sleep 1000; echo code $?\n")
	eventually(t, "the job runs", func() bool { return slices.ContainsFunc(children(int(r.pid)), alive) })
	type_(r.pid, "\x03")
	type_(r.pid, "echo still $((40+2))\n")
	r.until("still 42")
	if strings.Contains(r.out.String(), "no job control") {
		t.Errorf("no job control: %q", r.out.String())
	}
	_, err = g.rpc.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(r.pid),
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("x")}}}))
	wantCode(t, err, connect.CodeInternal)
	_, err = g.rpc.CloseStdin(t.Context(), connect.NewRequest(&pb.CloseStdinRequest{Process: byPID(r.pid)}))
	wantCode(t, err, connect.CodeUnknown)
	// The shell's end hangs up what it left in the background.
	type_(r.pid, "sleep 1000 &\n")
	type_(r.pid, "echo job $! here; exit 6\n")
	e := r.end()
	found := regexp.MustCompile(`job (\d+) here`).FindStringSubmatch(r.out.String())
	if found == nil {
		t.Fatalf("the shell says %q", r.out.String())
	}
	job := pidIn(t, found[1])
	if e.GetExitCode() != 6 {
		t.Error(e)
	}
	eventually(t, "the job is hung up", func() bool { return !alive(job) })
}

// children lists the children of a process.
func children(pid int) (out []int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	for _, f := range strings.Fields(string(b)) {
		n, _ := strconv.Atoi(f)
		out = append(out, n)
	}
	return out
}

func TestTerminalOutput(t *testing.T) {
	g := newProcGuest(t)
	r := g.start(t.Context(), "user", sh("stty -opost; seq 200000", withPTY(80, 24)))
	for {
		ev, err := r.step()
		must(t, err)
		if ev.GetEnd() != nil {
			break
		}
		if n := len(ev.GetData().GetPty()); n > ptyChunk {
			t.Fatalf("a piece of %d bytes", n)
		}
	}
	if got := r.out.String(); len(got) != 1288895 || !strings.HasSuffix(got, "\n200000\n") {
		t.Errorf("%d bytes", len(got))
	}
}

func TestKeepaliveEvents(t *testing.T) {
	g := newProcGuest(t)
	r := g.start(t.Context(), "user", sh("sleep 2.5"), headerKeepalive, "1")
	r.end()
	if r.beat < 1 || r.beat > 2 {
		t.Errorf("%d keepalives in 2.5 s at one each second", r.beat)
	}
}

func TestKeepaliveHeader(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"": defaultKeepalive, "50": 50 * time.Second, "0": defaultKeepalive, "-1": defaultKeepalive, "1.5": defaultKeepalive,
		"x": defaultKeepalive, "4000000000": maxKeepalive, "99999999999999999999": defaultKeepalive, " 1": defaultKeepalive,
	} {
		h := http.Header{}
		h.Set(headerKeepalive, text)
		if got := keepalive(h); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}

// TestManyProcesses: no thread and no buffer belongs to a silent process.
func TestManyProcesses(t *testing.T) {
	g := newProcGuest(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	const n = 200
	before := threads(t)
	pids := make(chan uint32)
	for range n {
		go func() { pids <- g.start(ctx, "user", sh("exec sleep 1000")).pid }()
	}
	seen := map[uint32]bool{}
	for range n {
		seen[<-pids] = true
	}
	if len(seen) != n || g.procs.count() != n {
		t.Errorf("%d processes, %d live", len(seen), g.procs.count())
	}
	// Starting them all at once takes some threads, more on a busy machine.
	if after := threads(t); after-before >= n {
		t.Errorf("%d threads for %d processes", after-before, n)
	}
	for pid := range seen {
		_, err := g.rpc.SendSignal(t.Context(), connect.NewRequest(&pb.SendSignalRequest{Process: byPID(pid), Signal: pb.Signal_SIGNAL_SIGKILL}))
		must(t, err)
	}
	eventually(t, "all have ended", func() bool { return g.procs.count() == 0 })
	for pid := range seen {
		if alive(int(pid)) {
			t.Errorf("process %d lives", pid)
		}
	}
}

func threads(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/task")
	must(t, err)
	return len(d)
}

func TestParseStat(t *testing.T) {
	for text, want := range map[string]procStat{
		"12 (a) S 1 5 7 0 -1":               {'S', 5, 7},
		"12 (a) b (c)) R 1 2 3 0":           {'R', 2, 3},
		"12 (x\n) Z 1 2 3":                  {'Z', 2, 3},
		"12 () D 1 -1 0":                    {'D', -1, 0},
		"":                                  {},
		"12 (a":                             {},
		"12 (a) S 1 x 3":                    {},
		"12 (a) S 1 2":                      {},
		"12 (a) SS 1 2 3":                   {},
		"12 (a) S 1 99999999999999999999 3": {},
	} {
		if got, ok := parseStat(text); ok && got != want || ok != (want != procStat{}) {
			t.Errorf("%q: %v %v, want %v", text, got, ok, want)
		}
	}
}
