package pause

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/cayhq/cay/test/program"
	"github.com/cayhq/cay/test/sdk"
)

// e2b is the official command line, as a user of the server has it.
type e2b struct {
	server *program.Server
	home   string
}

func (e e2b) command(t *testing.T, args ...string) *exec.Cmd {
	cmd := sdk.CLI.Command(t, e.server, args...)
	cmd.Env = append(cmd.Env, "HOME="+e.home, "NO_COLOR=1", "NO_UPDATE_NOTIFIER=1")
	return cmd
}

// fails runs a command that must end with the status, and returns all that it
// said.
func (e e2b) fails(t *testing.T, status int, args ...string) string {
	t.Helper()
	r := program.RunCmd(e.command(t, args...))
	if r.Code != status {
		t.Fatalf("e2b %s: %s\nwant exit status %d", strings.Join(args, " "), r, status)
	}
	return plain(r.Stdout + r.Stderr)
}

// does runs a command that must work.
func (e e2b) does(t *testing.T, args ...string) string {
	t.Helper()
	return e.fails(t, 0, args...)
}

// says runs a command that must work and say something.
func (e e2b) says(t *testing.T, want string, args ...string) {
	t.Helper()
	if got := e.does(t, args...); !strings.Contains(got, want) {
		t.Errorf("e2b %s: %q, want %q in it", strings.Join(args, " "), got, want)
	}
}

// decode runs a command that must print JSON.
func decode[T any](t *testing.T, e e2b, args ...string) (v T) {
	t.Helper()
	said := e.does(t, args...)
	if err := json.Unmarshal([]byte(said), &v); err != nil {
		t.Fatalf("e2b %s: %v in %q", strings.Join(args, " "), err, said)
	}
	return v
}

var escapes = regexp.MustCompile(`\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])|\r`)

// plain is what a terminal shows of a text.
func plain(s string) string { return escapes.ReplaceAllString(s, "") }

// screen is a command on a terminal.
type screen struct {
	cmd  *exec.Cmd
	tty  *os.File
	read chan struct{} // closed when the terminal is

	mu   sync.Mutex
	text strings.Builder
}

// open runs a command on a terminal with 100 columns and 30 rows.
func (e e2b) open(t *testing.T, args ...string) *screen {
	t.Helper()
	s := &screen{cmd: e.command(t, args...), read: make(chan struct{})}
	var err error
	if s.tty, err = pty.StartWithSize(s.cmd, &pty.Winsize{Cols: 100, Rows: 30}); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(s.read)
		_, _ = io.Copy(s, s.tty) // it ends with EIO when the command does
	}()
	t.Cleanup(func() { s.tty.Close() })
	return s
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return plain(s.text.String())
}

// sees waits until the screen shows what the pattern matches, and returns its
// first group.
func (s *screen) sees(t *testing.T, pattern string) string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	var found []string
	program.Eventually(t, time.Minute, func() string {
		if found = re.FindStringSubmatch(s.String()); found == nil {
			return fmt.Sprintf("the terminal shows %q, want %s", s, pattern)
		}
		return ""
	})
	return found[len(found)-1]
}

func (s *screen) types(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(s.tty, text); err != nil {
		t.Fatal(err)
	}
}

// ends waits for the command's end.
func (s *screen) ends(t *testing.T) {
	t.Helper()
	stop := time.AfterFunc(time.Minute, func() { _ = s.cmd.Process.Kill() })
	defer stop.Stop()
	err := s.cmd.Wait()
	<-s.read
	if err != nil {
		t.Errorf("%s: %v\n%s", s.cmd, err, s)
	}
}

type listed struct {
	SandboxID string    `json:"sandboxId"`
	Name      string    `json:"name"`
	State     string    `json:"state"`
	StartedAt time.Time `json:"startedAt"`
}

func ids(all []listed) string {
	var out []string
	for _, s := range all {
		out = append(out, s.SandboxID)
	}
	return strings.Join(out, " ")
}

// Every command of the official command line that has to do with sandboxes.
func TestE2BCommandLine(t *testing.T) {
	server := program.Start(t, program.Options{Pool: 1})
	e, c := e2b{server, t.TempDir()}, server.Client()
	one := strings.TrimSpace(e.does(t, "sandbox", "create", "--detach", "--timeout", "900", "base"))
	two := strings.TrimSpace(e.does(t, "sandbox", "create", "-d", "--lifecycle.ontimeout", "pause", "--lifecycle.autoresume", "--timeout", "900"))
	three := c.Make(t, 15*time.Minute, map[string]any{"metadata": map[string]string{"team": "blue"}}).ID
	t.Run("list", func(t *testing.T) { e.lists(t, one, two, three) })
	t.Run("side by side", func(t *testing.T) {
		for name, run := range map[string]func(*testing.T){
			"exec":                func(t *testing.T) { e.executes(t, one) },
			"connect":             func(t *testing.T) { e.connects(t, one) },
			"create":              func(t *testing.T) { e.creates(t, c) },
			"pause, snapshot":     func(t *testing.T) { e.pauses(t, three); e.snapshots(t, three, one) },
			"info, logs, metrics": func(t *testing.T) { e.tells(t, one, two); e.watches(t, two) },
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				run(t)
			})
		}
	})
	t.Run("kill", func(t *testing.T) { e.kills(t, one, two, three) })
	t.Run("wrong key", func(t *testing.T) {
		cmd := e.command(t, "sandbox", "list")
		cmd.Env = append(cmd.Env, "E2B_API_KEY=e2b_"+strings.Repeat("0", 40))
		if r := program.RunCmd(cmd); r.Code != 1 || !strings.Contains(r.Stderr, "AuthenticationError") {
			t.Errorf("with a wrong key: %s", r)
		}
	})
}

func (e e2b) lists(t *testing.T, one, two, three string) {
	if table := e.does(t, "sandbox", "list"); !strings.Contains(table, one) || !strings.Contains(table, two) || !strings.Contains(table, "Running") {
		t.Errorf("the table is %s, want %s and %s running", table, one, two)
	}
	all := decode[[]listed](t, e, "sandbox", "list", "-f", "json", "--state", "running,paused", "--template", "base", "--order", "asc")
	if got, want := ids(all), one+" "+two+" "+three; got != want {
		t.Errorf("sandboxes in order: %s, want %s", got, want)
	}
	for want, args := range map[string][]string{
		three:             {"--metadata", "team=blue"},
		two + " " + three: {"--started-after", all[1].StartedAt.Format(time.RFC3339Nano)},
		one:               {"--order", "asc", "--limit", "1"},
		"":                {"--state", "paused"},
	} {
		args = append([]string{"sandbox", "list", "-f", "json"}, args...)
		if got := ids(decode[[]listed](t, e, args...)); got != want {
			t.Errorf("e2b %q: %q, want %q", args, got, want)
		}
	}
	if got := e.does(t, "sandbox", "list", "--state", "paused"); !strings.Contains(got, "No sandboxes found") {
		t.Errorf("without any: %q", got)
	}
}

func (e e2b) tells(t *testing.T, one, two string) {
	info := decode[struct {
		listed
		Lifecycle struct {
			OnTimeout  string
			AutoResume bool
		}
	}](t, e, "sandbox", "info", "-f", "json", two)
	if info.SandboxID != two || info.State != "running" || info.Name != "base" || info.Lifecycle.OnTimeout != "pause" || !info.Lifecycle.AutoResume {
		t.Errorf("info: %+v", info)
	}
	e.says(t, "Sandbox ID: "+one, "sandbox", "info", one)
	if got := e.fails(t, 1, "sandbox", "info", "inosuchsandbox0000000"); !strings.Contains(got, "wasn't found") {
		t.Errorf("info of an unknown one: %q", got)
	}
}

func (e e2b) executes(t *testing.T, one string) {
	e.says(t, "root /tmp v", "sandbox", "exec", "-u", "root", "-c", "/tmp", "-e", "K=v", one, "echo $(whoami) $PWD $K")
	if got := e.fails(t, 7, "sandbox", "exec", one, "--", "sh", "-c", "echo out; echo err >&2; exit 7"); got != "out\nerr\nexit status 7\n" {
		t.Errorf("both streams: %q", got)
	}
	cmd := e.command(t, "sandbox", "exec", one, "wc", "-c")
	in, err := os.Open(program.Binary())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	const much = 1 << 20
	pipe, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer pipe.Close()
		_, _ = io.CopyN(pipe, in, much) // what is missing is missing in the count
	}()
	if r := program.RunCmd(cmd); strings.TrimSpace(r.Stdout) != fmt.Sprint(much) {
		t.Errorf("wc -c: %s", r)
	}
	pid := strings.TrimSpace(e.does(t, "sandbox", "exec", "--background", one, "exec sleep 1234"))
	e.says(t, "sleep", "sandbox", "exec", one, "cat /proc/"+pid+"/comm")
}

func (e e2b) connects(t *testing.T, one string) {
	s := e.open(t, "sandbox", "connect", "-u", "root", "-c", "/tmp", "-e", "K=v", one)
	s.sees(t, `[#$] $`)
	s.types(t, "echo \"<$(whoami) $PWD $K $(stty size)>\"\n")
	s.sees(t, `<root /tmp v 30 100>`)
	if err := pty.Setsize(s.tty, &pty.Winsize{Cols: 70, Rows: 20}); err != nil {
		t.Fatal(err)
	}
	program.Eventually(t, 30*time.Second, func() string {
		s.types(t, "echo \"[$(stty size)]\"\n")
		if time.Sleep(200 * time.Millisecond); !strings.Contains(s.String(), "[20 70]") {
			return "the terminal did not change its size: " + s.String()
		}
		return ""
	})
	s.types(t, "echo begun; sleep 1000\n")
	s.sees(t, `\nbegun`)
	// Before the shell has given the terminal to sleep, the key interrupts
	// nothing.
	program.Eventually(t, 30*time.Second, func() string {
		s.types(t, "\x03")
		time.Sleep(200 * time.Millisecond)
		s.types(t, "echo int''errupted\n")
		if time.Sleep(200 * time.Millisecond); !strings.Contains(s.String(), "\ninterrupted") {
			return "the command was not interrupted: " + s.String()
		}
		return ""
	})
	s.types(t, "exit 0\n")
	s.ends(t)
	if !strings.Contains(s.String(), "Closing terminal connection to sandbox "+one) {
		t.Errorf("the terminal ended with %q", s)
	}
	e.says(t, one, "sandbox", "list") // it lives on
}

func (e e2b) creates(t *testing.T, c *program.Client) {
	s := e.open(t, "sandbox", "create", "-e", "K=v", "base")
	id := s.sees(t, `with sandbox ID (i[a-z0-9]{20})`)
	s.sees(t, `[#$] $`)
	s.types(t, "echo \"<$(whoami) $K>\"; exit\n")
	s.sees(t, `<user v>`)
	s.ends(t)
	// It gives the sandbox a second more.
	program.Eventually(t, 30*time.Second, func() string {
		if got := state(c, id); got == "running" {
			return "sandbox " + id + " runs on after its terminal was closed"
		}
		return ""
	})
}

func (e e2b) pauses(t *testing.T, id string) {
	e.does(t, "sandbox", "exec", "--background", id, "exec sleep 1234")
	e.says(t, "has been paused", "sandbox", "pause", id)
	e.says(t, "is already paused", "sandbox", "pause", id)
	e.says(t, "Paused", "sandbox", "list", "--state", "paused")
	if got := e.fails(t, 1, "sandbox", "pause", "inosuchsandbox0000000"); !strings.Contains(got, "wasn't found") {
		t.Errorf("pausing an unknown one: %q", got)
	}
	e.says(t, "has been resumed", "sandbox", "resume", id)
	e.says(t, "1234", "sandbox", "exec", id, "pgrep -a sleep") // it went on
	e.says(t, "has been paused", "sandbox", "ps", id)
	e.says(t, "here", "sandbox", "exec", id, "echo here") // which connects
}

func (e e2b) snapshots(t *testing.T, id, other string) {
	e.does(t, "sandbox", "exec", id, "echo kept > ~/state")
	e.says(t, "/warm:default from sandbox "+id, "sandbox", "snapshot", "create", "--name", "warm", id)
	type snapshot struct {
		SnapshotID string `json:"snapshotId"`
	}
	bare := strings.Fields(e.does(t, "sandbox", "snapshot", "create", id))[2]
	if all := decode[[]snapshot](t, e, "sandbox", "snapshot", "list", "-f", "json", id); len(all) != 2 || all[0].SnapshotID != bare {
		t.Errorf("snapshots of %s: %+v, want two, %s first", id, all, bare)
	}
	named := decode[[]snapshot](t, e, "sandbox", "snapshot", "list", "-f", "json", "--name", "warm:default")
	if len(named) != 1 || !strings.HasSuffix(named[0].SnapshotID, "/warm:default") {
		t.Fatalf("snapshots by name: %+v", named)
	}
	e.says(t, "No snapshots found", "sandbox", "snapshot", "list", other)
	e.says(t, bare, "sandbox", "snapshot", "list", "--limit", "1")
	made := strings.TrimSpace(e.does(t, "sandbox", "create", "-d", named[0].SnapshotID))
	e.says(t, "kept", "sandbox", "exec", made, "cat state")
	e.says(t, "has been deleted", "sandbox", "snapshot", "delete", bare, named[0].SnapshotID)
	e.says(t, "wasn't found", "sandbox", "snapshot", "delete", bare)
}

func (e e2b) watches(t *testing.T, id string) {
	e.says(t, "lifecycle", "sandbox", "logs", id)
	type line struct{ Timestamp, Level, Logger, Message string }
	for l := range strings.Lines(strings.TrimSpace(e.does(t, "sandbox", "logs", "--format", "json", "--loggers", "lifecycle", id))) {
		var v line
		if err := json.Unmarshal([]byte(l), &v); err != nil || v.Message == "" || v.Logger != "lifecycle" {
			t.Errorf("a line of the logs is %q: %v", l, err)
		}
	}
	if got := strings.TrimSpace(e.does(t, "sandbox", "logs", "--format", "json", "--level", "ERROR", id)); got != "" {
		t.Errorf("errors in the logs: %s", got)
	}
	e.says(t, "MiB", "sandbox", "metrics", id)
	var m struct{ MemTotal, CPUCount int }
	if said := strings.SplitN(strings.TrimSpace(e.does(t, "sandbox", "metrics", "--format", "json", id)), "\n", 2)[0]; json.Unmarshal([]byte(said), &m) != nil || m.MemTotal == 0 || m.CPUCount == 0 {
		t.Errorf("metrics: %q", said)
	}
	follow := e.open(t, "sandbox", "metrics", "--follow", "--format", "json", id)
	follow.sees(t, `memTotal`)
	if err := follow.cmd.Process.Signal(syscall.SIGKILL); err != nil { // it never ends by itself
		t.Fatal(err)
	}
	<-follow.read
	tail := e.open(t, "sandbox", "logs", "--follow", id)
	tail.sees(t, "lifecycle")
	e.says(t, id+" has been killed", "sandbox", "kill", id)
	tail.sees(t, "Stopped printing logs")
	tail.ends(t)
}

func (e e2b) kills(t *testing.T, one, two, three string) {
	e.says(t, "wasn't found", "sandbox", "kill", two)
	e.does(t, "sandbox", "pause", one)
	e.says(t, three+" has been killed", "sandbox", "kill", "--all", "--metadata", "team=blue")
	e.says(t, one+" has been killed", "sandbox", "kill", "--all", "--state", "running,paused")
	e.says(t, "No running sandboxes", "sandbox", "kill", "-a")
	if got := e.fails(t, 1, "sandbox", "kill"); !strings.Contains(got, "You need to specify") {
		t.Errorf("kill without a sandbox: %q", got)
	}
}
