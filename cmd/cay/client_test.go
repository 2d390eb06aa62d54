package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

// ended returns the ID of a process that has just ended.
func ended(t *testing.T) int {
	c := exec.Command("true")
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	return c.Process.Pid
}

func TestAlive(t *testing.T) {
	c := exec.Command("cat")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if !alive(c.Process.Pid) || !alive(os.Getpid()) || !alive(1) {
		t.Error("a process that runs is not alive")
	}
	in.Close()
	// It ends and stays, for nobody has asked for its status yet.
	var si unix.Siginfo
	if err := unix.Waitid(unix.P_PID, c.Process.Pid, &si, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if alive(c.Process.Pid) {
		t.Error("a process that has ended is alive")
	}
	if err := c.Wait(); err != nil {
		t.Fatal(err)
	}
	if alive(c.Process.Pid) || alive(0) || alive(-1) {
		t.Error("no process is alive")
	}
}

func TestLocate(t *testing.T) {
	info := func(pid int) string {
		b, err := json.Marshal(serverInfo{PID: pid, APIURL: "http://127.0.0.1:1", ProxyURL: "http://127.0.0.1:2"})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	const creds = `{"teamID":"t","adminToken":"a","apiKey":"k","pepper":"p","seed":"s"}`
	self := os.Getpid()
	tests := []struct {
		name               string
		server, creds, pid string
		code               cay.Code
		has                string
	}{
		{"running", info(self), creds, "", "", ""},
		{"nothing there", "", "", "", cay.CodeNotRunning, "no server runs"},
		{"used before", "", creds, "", cay.CodeNotRunning, "no server runs"},
		{"killed", info(ended(t)), creds, "", cay.CodeNotRunning, "its sandboxes still run"},
		{"damaged", "{", creds, "", cay.CodeDataDirInvalid, "server.json cannot be read"},
		{"credentials damaged", info(self), "{}", "", cay.CodeDataDirInvalid, "damaged"},
		{"a number left by a crash, of another process now", "", creds, "1", cay.CodeNotRunning, "no server runs"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := dataDir(t.TempDir())
			for path, content := range map[string]string{d.serverFile(): tt.server, d.credentialsFile(): tt.creds, d.pidFile(): tt.pid} {
				if content == "" {
					continue
				}
				if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			s, err := locate(string(d))
			if cay.CodeOf(err) != tt.code || tt.code != "" && !strings.Contains(err.Error(), tt.has) {
				t.Errorf("%v, want %s …%s…", err, tt.code, tt.has)
			}
			if err == nil && (s.APIURL != "http://127.0.0.1:1" || s.APIKey.Reveal() != "k" || s.TeamID != "t") {
				t.Errorf("%+v", s)
			}
		})
	}
}

// A server that holds the lock but has not told where it listens is starting.
func TestLocateStarting(t *testing.T) {
	d, unlock, err := openDataDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if err := os.WriteFile(d.pidFile(), []byte("1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := locate(string(d)); cay.CodeOf(err) != cay.CodeNotRunning || !strings.Contains(err.Error(), "(pid 1) is not ready yet") {
		t.Errorf("%v", err)
	}
}

// The whole command line, with the parts of the server in it: status and words.
func TestCommandLines(t *testing.T) {
	t.Setenv("NO_COLOR", "1")
	tests := []struct {
		args   string
		status int
		out    string
		err    string
	}{
		{"version", 0, "gvisor", ""},
		{"nope", 2, "", `there is no command "nope"`},
		{"up now", 2, "", "See `cay up --help`"},
		{"up --nope", 2, "", "unknown flag: --nope"},
		{"supervise", 2, "", `required flag(s) "dir"`},
		{"doctor --deeper", 2, "", "unknown flag: --deeper"},
		{"status --data-dir /nonexistent-cay", 1, "", "fix: start it with `cay up --data-dir /nonexistent-cay`"},
		{"--help", 0, "doctor", ""},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			var out, errw bytes.Buffer
			got := run(strings.Fields(tt.args), strings.NewReader(""), &out, &errw)
			if got != tt.status || !strings.Contains(out.String(), tt.out) || !strings.Contains(errw.String(), tt.err) {
				t.Errorf("status %d, out %q, err %q", got, out.String(), errw.String())
			}
		})
	}
}

// Every command of the program is described, those of the server too.
func TestCommandsAreDescribed(t *testing.T) {
	root := newRootCmd(&app{in: strings.NewReader(""), out: &bytes.Buffer{}, err: &bytes.Buffer{}})
	for _, cmd := range root.Commands() {
		if cmd.Short == "" || cmd.Example == "" && cmd.Name() != "completion" && cmd.Name() != "help" {
			t.Errorf("%s: Short %q, Example %q", cmd.Name(), cmd.Short, cmd.Example)
		}
	}
}
