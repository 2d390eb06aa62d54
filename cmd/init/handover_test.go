package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	fspb "github.com/cayhq/cay/internal/gen/envd/filesystem"
	"github.com/cayhq/cay/internal/gen/envd/filesystem/filesystemconnect"
	pb "github.com/cayhq/cay/internal/gen/envd/process"
	"github.com/cayhq/cay/internal/gen/envd/process/processconnect"
)

// keeperEnv makes this test's program keep the envd that it names, as PID 1
// does.
const keeperEnv = "CAY_TEST_KEEPER"

// keepForTest never returns. The processes of an envd that ended become its
// children, as they become PID 1's.
func keepForTest() {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	path := os.Getenv(keeperEnv)
	k := keeper{path: path, args: []string{path}, env: []string{"PATH=" + os.Getenv("PATH"), noProfile}, token: "secret",
		store: &store{procs: map[uint32]*kept{}, envd: -1}, now: time.Now, sleep: time.Sleep}
	fd, err := unix.MemfdCreate("envd", unix.MFD_CLOEXEC)
	if err != nil {
		panic(err)
	}
	k.state = os.NewFile(uintptr(fd), "envd")
	for _, name := range []string{"public", "control"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			panic(err)
		}
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			panic(err)
		}
		fmt.Println(l.Addr())
		k.listeners = append(k.listeners, listener{name, int(f.Fd())})
		defer f.Close() // which is never: what nobody names any more would be closed
	}
	for {
		k.once()
	}
}

// realEnvd is the daemon, built once.
var realEnvd = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "cay-envd-test-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "envd")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "../envd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building envd: %w\n%s", err, out)
	}
	return os.ReadFile(path)
})

// guest is an envd, kept as in a guest.
type guest struct {
	t       *testing.T
	path    string // of its program
	control string
	public  string
	proc    processconnect.ProcessClient
	fs      filesystemconnect.FilesystemClient
	said    *console
	keeper  int
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: envd starts processes as other accounts")
	}
	program, err := realEnvd()
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{t: t, path: filepath.Join(t.TempDir(), "envd"), said: &console{}}
	if err := os.WriteFile(g.path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), keeperEnv+"="+g.path)
	cmd.Stderr = g.said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	g.keeper = cmd.Process.Pid
	t.Cleanup(func() {
		_ = unix.Kill(g.keeper, unix.SIGSTOP) // or it would start another envd
		left := childrenOf(g.keeper)
		for _, pid := range left {
			left = append(left, childrenOf(pid)...)
		}
		for _, pid := range left {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		if t.Failed() {
			t.Logf("PID 1 and envd said:\n%s", g.said)
		}
	})
	lines := bufio.NewScanner(out)
	var addrs []string
	for len(addrs) < 2 && lines.Scan() {
		addrs = append(addrs, lines.Text())
	}
	if len(addrs) < 2 {
		t.Fatal("the keeper did not start")
	}
	g.control = "http://" + addrs[1]
	g.public = "http://" + addrs[0]
	g.proc = processconnect.NewProcessClient(http.DefaultClient, g.public, connect.WithProtoJSON())
	g.fs = filesystemconnect.NewFilesystemClient(http.DefaultClient, g.public, connect.WithProtoJSON())
	return g
}

// childrenOf are the processes whose parent is pid.
func childrenOf(pid int) (out []int) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil
	}
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		for _, f := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(f); err == nil {
				out = append(out, n)
			}
		}
	}
	return out
}

// envd is the number of the envd that runs, or 0.
func (g *guest) envd() int {
	for _, pid := range childrenOf(g.keeper) {
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && strings.HasPrefix(exe, g.path) {
			return pid
		}
	}
	return 0
}

func (g *guest) killEnvd() error {
	pid := g.envd()
	if pid <= 0 {
		return errors.New("no envd runs") // and 0 would mean our own group
	}
	return unix.Kill(pid, unix.SIGKILL)
}

// post sends a program to the control port.
func (g *guest) post(program []byte, digest string) (int, string) {
	g.t.Helper()
	req, err := http.NewRequestWithContext(g.t.Context(), http.MethodPost, g.control+"/upgrade", bytes.NewReader(program))
	if err != nil {
		g.t.Fatal(err)
	}
	req.Header.Set("X-Cay-Control", "secret")
	req.Header.Set("X-Cay-Envd-Digest", digest)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		g.t.Fatal(err)
	}
	defer resp.Body.Close()
	var b bytes.Buffer
	_, _ = b.ReadFrom(resp.Body)
	return resp.StatusCode, b.String()
}

func digestOf(program []byte) string {
	sum := sha256.Sum256(program)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// runs waits until an envd with this digest answers.
func (g *guest) runs(digest string) {
	g.t.Helper()
	eventually(g.t, "an envd with the digest "+digest+" answers", func() bool {
		req, err := http.NewRequestWithContext(g.t.Context(), http.MethodGet, g.control+"/identity", nil)
		if err != nil {
			return false
		}
		req.Header.Set("X-Cay-Control", "secret")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		var is struct {
			EnvdDigest string `json:"envdDigest"`
		}
		return json.NewDecoder(resp.Body).Decode(&is) == nil && is.EnvdDigest == digest
	})
}

// upgrade replaces envd by one that is the same but for its digest.
func (g *guest) upgrade(mark string) {
	g.t.Helper()
	program, err := realEnvd()
	if err != nil {
		g.t.Fatal(err)
	}
	program = append(bytes.Clone(program), mark...)
	if status, said := g.post(program, digestOf(program)); status != http.StatusAccepted {
		g.t.Fatalf("/upgrade: %d %s", status, said)
	}
	g.runs(digestOf(program))
}

// stream is what Start and Connect give.
type stream interface {
	Receive() bool
	Err() error
	Close() error
}

// reader collects what a process writes, over as many streams as it takes.
type reader struct {
	mu   sync.Mutex
	got  []byte
	end  *pb.ProcessEvent_EndEvent
	over chan error // one for each stream
}

func (r *reader) len() int { r.mu.Lock(); defer r.mu.Unlock(); return len(r.got) }

// read takes everything from a stream, in the background.
func (r *reader) read(s stream, event func() *pb.ProcessEvent) {
	go func() {
		defer s.Close()
		for s.Receive() {
			ev := event()
			r.mu.Lock()
			r.got = append(r.got, ev.GetData().GetStdout()...)
			r.got = append(r.got, ev.GetData().GetPty()...)
			if e := ev.GetEnd(); e != nil {
				r.end = e
			}
			r.mu.Unlock()
		}
		r.over <- s.Err()
	}()
}

// start runs a command; its first event, with its number, has come.
func (g *guest) start(q *pb.StartRequest) (uint32, *reader) {
	g.t.Helper()
	s, err := g.proc.Start(g.t.Context(), connect.NewRequest(q))
	if err != nil {
		g.t.Fatal(err)
	}
	if !s.Receive() {
		g.t.Fatal(s.Err())
	}
	pid := s.Msg().GetEvent().GetStart().GetPid()
	r := &reader{over: make(chan error, 8)}
	r.read(s, func() *pb.ProcessEvent { return s.Msg().GetEvent() })
	return pid, r
}

// join connects a reader again.
func (g *guest) join(sel *pb.ProcessSelector, r *reader) {
	g.t.Helper()
	s, err := g.proc.Connect(g.t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: sel}))
	if err != nil {
		g.t.Fatal(err)
	}
	r.read(s, func() *pb.ProcessEvent { return s.Msg().GetEvent() })
}

func byPID(pid uint32) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: pid}}
}

func byTag(tag string) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: tag}}
}

func shell(text string) *pb.StartRequest {
	return &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", text}}}
}

// await returns how a stream ended.
func (r *reader) await(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.over:
		return err
	case <-time.After(time.Minute):
		t.Fatal("a stream does not end")
		return nil
	}
}

// Over an upgrade every process goes on, and whoever connects again misses no
// byte and gets none twice.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	tag := "counter"

	fast, fastOut := g.start(shell("seq 1 3000000; exit 5"))
	q := shell("for i in $(seq 400); do echo $i; sleep 0.01; done")
	q.Tag = &tag
	_, slowOut := g.start(q)
	terminal, terminalOut := g.start(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/bash", Args: []string{"--norc", "-i"}, Envs: map[string]string{"PS1": ""}},
		Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 80, Rows: 24}}})
	cat, catOut := g.start(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/cat"}})
	short, shortOut := g.start(shell("exit 7"))
	if err := shortOut.await(t); err != nil || shortOut.end.GetExitCode() != 7 {
		t.Fatalf("%v, %v", shortOut.end, err)
	}
	eventually(t, "output comes", func() bool { return fastOut.len() > 1<<20 && slowOut.len() > 10 })

	g.upgrade("2")
	for name, r := range map[string]*reader{"fast": fastOut, "slow": slowOut, "terminal": terminalOut, "cat": catOut} {
		if err := r.await(t); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("the stream of %s ended with %v, %v", name, r.end, err)
		}
	}
	listed, err := g.proc.List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
	if err != nil || len(listed.Msg.GetProcesses()) != 4 {
		t.Fatalf("listed are %v, %v", listed, err)
	}
	g.join(byPID(fast), fastOut)
	g.join(byTag(tag), slowOut)
	g.join(byPID(terminal), terminalOut)
	g.join(byPID(cat), catOut)
	g.join(byPID(short), shortOut)
	if err := shortOut.await(t); err != nil || shortOut.end.GetExitCode() != 7 {
		t.Errorf("what ended before the upgrade: %v, %v", shortOut.end, err)
	}

	send := func(pid uint32, in *pb.ProcessInput) {
		t.Helper()
		if _, err := g.proc.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in})); err != nil {
			t.Error(err)
		}
	}
	send(terminal, &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("echo $((6*7))x; exit 3\n")}})
	send(cat, &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("through")}})
	if _, err := g.proc.CloseStdin(t.Context(), connect.NewRequest(&pb.CloseStdinRequest{Process: byPID(cat)})); err != nil {
		t.Error(err)
	}
	for _, c := range []struct {
		name string
		r    *reader
		want string
		code int32
	}{
		{"fast", fastOut, count(3_000_000), 5},
		{"slow", slowOut, count(400), 0},
		{"cat", catOut, "through", 0},
	} {
		if err := c.r.await(t); err != nil || c.r.end.GetExitCode() != c.code {
			t.Errorf("%s ended with %v, %v", c.name, c.r.end, err)
		}
		if string(c.r.got) != c.want {
			t.Errorf("%s: %d bytes came, want %d; they differ from %d on", c.name, len(c.r.got), len(c.want), differ(c.r.got, c.want))
		}
	}
	if err := terminalOut.await(t); err != nil || terminalOut.end.GetExitCode() != 3 || !strings.Contains(string(terminalOut.got), "42x") {
		t.Errorf("the terminal ended with %v, %v, and showed %q", terminalOut.end, err, terminalOut.got)
	}
}

func count(n int) string {
	var b strings.Builder
	for i := 1; i <= n; i++ {
		b.WriteString(strconv.Itoa(i))
		b.WriteByte('\n')
	}
	return b.String()
}

func differ(got []byte, want string) int {
	n := min(len(got), len(want))
	for i := range n {
		if got[i] != want[i] {
			return i
		}
	}
	return n
}

// When envd is killed, what its processes are connected to stays open: none
// dies of a pipe or hangs up, and each can be joined, told and ended.
func TestCrash(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	writer, writerOut := g.start(shell("while :; do echo x; sleep 0.01; done"))
	terminal, _ := g.start(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", "while :; do echo y; sleep 0.01; done"}}, Pty: &pb.PTY{}})
	waits, _ := g.start(shell("read line; exit 9"))
	eventually(t, "output comes", func() bool { return writerOut.len() > 0 })
	for range 2 {
		before := g.envd()
		if err := g.killEnvd(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "another envd runs", func() bool { now := g.envd(); return now != 0 && now != before })
		for _, pid := range []uint32{writer, terminal} {
			r := &reader{over: make(chan error, 1)}
			g.join(byPID(pid), r)
			eventually(t, "output comes again", func() bool { return r.len() > 10 })
		}
	}
	r := &reader{over: make(chan error, 1)}
	g.join(byPID(waits), r)
	if _, err := g.proc.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(waits),
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("\n")}}})); err != nil {
		t.Error(err)
	}
	if err := r.await(t); err != nil || r.end.GetExitCode() != 9 {
		t.Errorf("it ended with %v, %v", r.end, err)
	}
	r = &reader{over: make(chan error, 1)}
	g.join(byPID(writer), r)
	if _, err := g.proc.SendSignal(t.Context(), connect.NewRequest(&pb.SendSignalRequest{Process: byPID(writer), Signal: pb.Signal_SIGNAL_SIGKILL})); err != nil {
		t.Error(err)
	}
	if err := r.await(t); err != nil || r.end.GetStatus() != "signal: killed" {
		t.Errorf("it ended with %v, %v", r.end, err)
	}
}

// A program that is not what was meant, or does not run, replaces nothing; one
// that ends at once is replaced by the one before it.
func TestUpgradeRefused(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	program, err := realEnvd()
	if err != nil {
		t.Fatal(err)
	}
	g.runs(digestOf(program))
	if status, said := g.post(program, digestOf(program)); status != http.StatusNoContent {
		t.Errorf("the same program: %d %s", status, said)
	}
	if status, said := g.post([]byte("half"), digestOf(program[1:])); status != http.StatusBadRequest || !strings.Contains(said, "digest") {
		t.Errorf("another digest: %d %s", status, said)
	}
	bad := []byte("#!/bin/sh\nexit 1\n")
	if status, said := g.post(bad, digestOf(bad)); status != http.StatusBadRequest || !strings.Contains(said, "does not run") {
		t.Errorf("a program that does not run: %d %s", status, said)
	}
	pid, out := g.start(shell("sleep 1000"))
	watcher := g.watch(t, t.TempDir())
	for i, c := range []struct{ what, then, said string }{
		{"ends at once", "exit 1", "the program before it is back"},
		{"does not serve", "exec sleep 1000", "envd does not serve after 12s"},
	} {
		bad = []byte("#!/bin/sh\n[ \"$1\" = -version ] || " + c.then + "\n")
		if status, said := g.post(bad, digestOf(bad)); status != http.StatusAccepted {
			t.Errorf("a program that %s: %d %s", c.what, status, said)
		}
		if i == 0 {
			_ = out.await(t) // the stream is cut in any case
		}
		watcher.make(t, c.what)
		g.said.until(t, c.said)
		g.runs(digestOf(program))
		watcher.look(t)
	}
	watcher.hasAll(t)
	if _, err := g.proc.SendSignal(t.Context(), connect.NewRequest(&pb.SendSignalRequest{Process: byPID(pid), Signal: pb.Signal_SIGNAL_SIGKILL})); err != nil {
		t.Error(err)
	}
	left, err := os.ReadDir(filepath.Dir(g.path))
	if err != nil || len(left) != 1 {
		t.Errorf("beside the program lies %v, %v", left, err)
	}
}

// watcher is one that is polled, and what was made where it watches.
type watcher struct {
	g    *guest
	dir  string
	id   string
	mu   sync.Mutex
	made []string
	got  map[string]int
}

func (g *guest) watch(t *testing.T, dir string) *watcher {
	t.Helper()
	r, err := g.fs.CreateWatcher(t.Context(), connect.NewRequest(&fspb.CreateWatcherRequest{Path: dir, Recursive: true}))
	if err != nil {
		t.Fatal(err)
	}
	return &watcher{g: g, dir: dir, id: r.Msg.GetWatcherId(), got: map[string]int{}}
}

// make makes a directory with a file in it.
func (w *watcher) make(t *testing.T, name string) {
	if err := os.Mkdir(filepath.Join(w.dir, name), 0o755); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, name, "f"), nil, 0o644); err != nil {
		t.Error(err)
	}
	w.mu.Lock()
	w.made = append(w.made, name, name+"/f")
	w.mu.Unlock()
}

// look takes what the watcher has. A call that is cut off by a replacement is
// made again: it comes before anything is taken, or is answered.
func (w *watcher) look(t *testing.T) {
	t.Helper()
	eventually(t, "the watcher answers", func() bool {
		r, err := w.g.fs.GetWatcherEvents(t.Context(), connect.NewRequest(&fspb.GetWatcherEventsRequest{WatcherId: w.id}))
		if connect.CodeOf(err) == connect.CodeUnavailable {
			return false
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, ev := range r.Msg.GetEvents() {
			if ev.GetType() == fspb.EventType_EVENT_TYPE_CREATE {
				w.got[ev.GetName()]++
			}
		}
		return true
	})
}

// hasAll checks that what was made was reported, once.
func (w *watcher) hasAll(t *testing.T) {
	t.Helper()
	w.look(t)
	for _, name := range w.made {
		if w.got[name] != 1 {
			t.Errorf("%s was reported %d times", name, w.got[name])
		}
	}
	if len(w.got) != len(w.made) {
		t.Errorf("%d names were reported, and %d made", len(w.got), len(w.made))
	}
}

// Files are made all the while, and envd is replaced several times: a watcher
// that is polled reports each once, under its ID.
func TestUpgradeKeepsWatchers(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	w := g.watch(t, t.TempDir())
	silent := g.watch(t, w.dir) // nobody asks it before the end
	silent.dir, silent.made = w.dir, nil
	stop, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		tick := time.NewTicker(2 * time.Millisecond) // so that the test's machine does something else, too
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-tick.C:
				w.make(t, strconv.Itoa(i))
			}
		}
	}()
	for _, mark := range []string{"2", "3", "4"} {
		w.look(t)
		g.upgrade(mark)
		w.look(t)
	}
	close(stop)
	<-over
	w.hasAll(t)
	silent.made = w.made
	silent.hasAll(t)
	if n := len(w.made); n < 100 {
		t.Errorf("only %d names were made meanwhile", n)
	}
}

// A broken program takes nothing away from a guest with very many processes: PID
// 1 is not held up by telling it of them, and the one before has them again.
func TestUpgradeRefusedOfMany(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	program, err := realEnvd()
	if err != nil {
		t.Fatal(err)
	}
	g.runs(digestOf(program))
	const processes = 60
	long := strings.Repeat("x", 30<<10) // more than the sockets hold, in all
	outs := make([]*reader, processes)
	pids := make([]uint32, processes)
	for i := range processes {
		q := shell("echo begun; read line; echo ended")
		q.Process.Args = append(q.Process.Args, long)
		q.Stdin = new(bool)
		*q.Stdin = true
		pids[i], outs[i] = g.start(q)
	}
	eventually(t, "all have begun", func() bool {
		for _, o := range outs {
			if o.len() == 0 {
				return false
			}
		}
		return true
	})
	bad := []byte("#!/bin/sh\n[ \"$1\" = -version ] || exit 1\n")
	if status, said := g.post(bad, digestOf(bad)); status != http.StatusAccepted {
		t.Fatalf("%d %s", status, said)
	}
	g.said.until(t, "the program before it is back")
	g.runs(digestOf(program))
	for i, pid := range pids {
		_ = outs[i].await(t)
		g.join(byPID(pid), outs[i])
		if _, err := g.proc.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid),
			Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("\n")}}})); err != nil {
			t.Error(err)
		}
		if err := outs[i].await(t); err != nil || string(outs[i].got) != "begun\nended\n" {
			t.Fatalf("process %d ended with %v after %q", i, err, outs[i].got)
		}
	}
}

// TestStore holds what PID 1 does with messages that no envd sends.
func TestStore(t *testing.T) {
	s := &store{procs: map[uint32]*kept{}, envd: -1}
	theirs, over, err := s.open()
	if err != nil {
		t.Fatal(err)
	}
	null := func() int {
		fd, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	a, b := null(), null()
	for _, m := range [][]byte{{}, {'k'}, {'k', 1, 0, 0, 0}, message('c', 5, 200), message('f', 5), message('p', 5, 1), message('?', 7, 1, 2)} {
		if len(m) > 0 { // an empty packet is the end
			send(theirs, m, a)
		}
	}
	send(theirs, message(keepProcess, 7, append([]byte{1<<1 | 1<<2}, "record"...)...), a, b)
	send(theirs, message(closeFile, 7, 2))
	send(theirs, message(tellStatus, 7, 0, 3, 0, 0))
	for i := range byte(2 * maxPieces) {
		send(theirs, message(keepPiece, 7, 1, i))
	}
	s.hangUp()
	<-over
	p := s.procs[7]
	if len(s.procs) != 1 || p == nil || string(p.record) != "record" || p.files[0] >= 0 || p.files[1] < 0 || p.files[2] >= 0 ||
		len(p.pieces) != maxPieces || len(p.status) != 4 || s.handedOver() {
		t.Errorf("kept are %v, %+v", s.procs, p)
	}
	unix.Close(theirs)

	// The next one gets it, and what ends later.
	theirs, over, err = s.open()
	if err != nil {
		t.Fatal(err)
	}
	s.handOut()
	s.ended(7, 0)
	s.ended(8, 0)
	var kinds []string
	buf, oob := make([]byte, 1<<10), make([]byte, 1<<10)
	for {
		n, oobn, _, _, err := unix.Recvmsg(theirs, buf, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		if err != nil {
			if !errors.Is(err, unix.EAGAIN) {
				t.Error(err)
			}
			break
		}
		fds := received(oob[:oobn])
		for _, fd := range fds {
			unix.Close(fd)
		}
		kinds = append(kinds, fmt.Sprintf("%c%d", buf[0], len(fds)))
		_ = n
	}
	if got, want := strings.Join(kinds, " "), "k1 s0 "+strings.Repeat("p0 ", maxPieces)+"d0 s0"; got != want {
		t.Errorf("the next envd hears %q, want %q", got, want)
	}
	send(theirs, message(handOver, 0))
	send(theirs, message(isUp, 0))
	unix.Close(theirs)
	<-over
	// It said nothing of what had been read, and may never have come to that.
	if p := s.procs[7]; p == nil || len(p.pieces) != maxPieces || !s.serves() {
		t.Errorf("kept are %v, %+v", s.procs, p)
	}
	if theirs, over, err = s.open(); err != nil {
		t.Fatal(err)
	}
	if s.handedOver() || s.serves() {
		t.Error("the next envd has said nothing yet")
	}
	send(theirs, message(gotPieces, 7))
	send(theirs, message(gotPieces, 8))
	send(theirs, message(handOver, 0))
	unix.Close(theirs)
	<-over
	if p := s.procs[7]; p == nil || len(p.pieces) != 0 {
		t.Errorf("kept are %v, %+v", s.procs, p)
	}
	if theirs, over, err = s.open(); err != nil {
		t.Fatal(err)
	}
	send(theirs, message(handOver, 0))
	send(theirs, message(forgetProcess, 7))
	unix.Close(theirs)
	<-over
	if len(s.procs) != 0 || !s.handedOver() {
		t.Errorf("after all is said, %d are kept", len(s.procs))
	}
}
