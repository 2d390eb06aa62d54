package life

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/test/invariant"
	"github.com/cayhq/cay/test/program"
)

// fails runs `cay up`, which must end with an error, and returns what it said.
// It must leave nothing behind.
func fails(t *testing.T, dir string, args ...string) program.Result {
	t.Helper()
	return failsAs(t, dir, program.Binary(), nil, args...)
}

func failsAs(t *testing.T, dir, bin string, who *syscall.Credential, args ...string) program.Result {
	t.Helper()
	return failsLeaving(t, nil, dir, bin, who, args...)
}

// failsLeaving is failsAs where files of the data directory may be left that
// are not otherwise.
func failsLeaving(t *testing.T, also []string, dir, bin string, who *syscall.Credential, args ...string) program.Result {
	t.Helper()
	scope := program.Scope(dir)
	// Another server on the machine may be preparing what was just used up.
	before := invariant.Steady(t, 20*time.Second, scope)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	all := append([]string{"up", "--data-dir", dir, "--api-addr", "127.0.0.1:0", "--proxy-addr", "127.0.0.1:0"}, args...)
	cmd := exec.CommandContext(ctx, bin, all...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: who}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "CAY_BASE_IMAGE=" + program.Image()}
	r := program.RunCmd(cmd)
	if r.Code != 1 && r.Code != 2 {
		t.Errorf("`cay %s` ended with status %d, want 1 or 2", strings.Join(all, " "), r.Code)
	}
	if strings.Contains(r.Stdout, "ready") {
		t.Errorf("`cay up` says that it is ready: %s", r)
	}
	program.Eventually(t, 10*time.Second, func() string {
		now, err := invariant.Take(scope)
		if err != nil {
			return err.Error()
		}
		var left []string
		for _, line := range invariant.Diff(before, now) {
			if !keeps(line) && !slices.ContainsFunc(also, func(f string) bool { return strings.Contains(line, " more of file <data>/"+f+": ") }) {
				left = append(left, line)
			}
		}
		return strings.Join(left, "\n")
	})
	return r
}

// says checks a message, with what differs from run to run cut out of it.
func says(t *testing.T, got string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("the message\n  %s\nlacks\n  %s", strings.TrimSpace(got), w)
		}
	}
	if strings.Contains(got, "goroutine ") || strings.Contains(got, "panic:") {
		t.Errorf("the message is a crash: %s", got)
	}
}

// Each start that cannot work says what is wrong and what to do, and leaves
// nothing behind.
func TestStartErrors(t *testing.T) {
	server := program.Start(t, program.Options{})

	t.Run("second server", func(t *testing.T) {
		r := fails(t, server.Dir)
		says(t, r.Stderr,
			fmt.Sprintf("the data directory %s is in use by process %d (%s up", server.Dir, server.PID(), program.Binary()),
			fmt.Sprintf("stop it with `cay down --data-dir %s`", server.Dir), "data_dir_locked")
		if err := whole(t.Context(), server.Client()); err != nil {
			t.Errorf("the first server after that: %v", err)
		}
	})

	t.Run("taken API port", func(t *testing.T) {
		addr := strings.TrimPrefix(server.API, "http://")
		r := fails(t, program.NewDir(), "--api-addr", addr)
		says(t, r.Stderr, fmt.Sprintf("the address %s for the api is taken by process %d (%s up", addr, server.PID(), program.Binary()),
			"choose another address with --api-addr (port 0 picks a free one)", "port_taken")
	})

	t.Run("taken proxy port", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		r := fails(t, program.NewDir(), "--proxy-addr", l.Addr().String())
		says(t, r.Stderr, fmt.Sprintf("the address %s for the proxy is taken by process %d (", l.Addr(), os.Getpid()),
			"choose another address with --proxy-addr", "port_taken")
	})

	t.Run("no privilege", func(t *testing.T) {
		// The repository may be closed to others.
		bin := filepath.Join(os.Getenv("CAY_TEST_WORK"), "cay-for-nobody")
		b, err := os.ReadFile(program.Binary())
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(bin, b, 0o755); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(bin)
		r := failsAs(t, program.NewDir(), bin, &syscall.Credential{Uid: 65534, Gid: 65534})
		says(t, r.Stderr, "cay up needs root on this machine (it runs as user 65534)", "run it as root, for example with sudo", "missing_privilege")
	})

	t.Run("full disk", func(t *testing.T) {
		dir := program.NewDir()
		if err := os.Mkdir(dir, 0o711); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=24m"); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(dir, unix.MNT_DETACH)
		// The database is in its log still, if there is no room to merge the two.
		r := failsLeaving(t, []string{"cay.db-wal", "cay.db-shm"}, dir, program.Binary(), nil)
		says(t, r.Stderr, "full", "disk_full", "free")
	})

	t.Run("not a directory", func(t *testing.T) {
		path := program.NewDir()
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		r := fails(t, path)
		says(t, r.Stderr, "the data directory "+path+" cannot be used", "name another with --data-dir", "data_dir_invalid")
	})

	for _, c := range []struct {
		name string
		args []string
		want []string
	}{
		{"wrong range", []string{"--sandbox-cidr", "10.1.2.0"},
			[]string{`the setting sandbox-cidr has the wrong value "10.1.2.0" (from flag:--sandbox-cidr): want an IPv4 range such as 10.193.0.0/16`, "config_invalid"}},
		{"wrong range family", []string{"--sandbox-cidr", "fd00::/64"}, []string{`"fd00::/64"`, "want an IPv4 range", "config_invalid"}},
		{"wrong number", []string{"--memory-mb", "lots"},
			[]string{`the setting memory-mb has the wrong value "lots" (from flag:--memory-mb): want a number from 128 to`, "config_invalid"}},
		{"wrong address", []string{"--api-addr", "localhost"},
			[]string{`the setting api-addr has the wrong value "localhost" (from flag:--api-addr): want address:port, such as 127.0.0.1:3000`, "config_invalid"}},
		{"foreign address", []string{"--api-addr", "203.0.113.7:3000"},
			[]string{"cannot listen on 203.0.113.7:3000 for the api", "give --api-addr an address of this machine", "config_invalid"}},
		{"unknown flag", []string{"--no-such-flag"}, []string{"unknown flag: --no-such-flag"}},
		{"unknown argument", []string{"sideways"}, []string{"sideways"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := fails(t, program.NewDir(), c.args...)
			says(t, r.Stderr, c.want...)
		})
	}
}

// A detached start that cannot work says the same.
func TestDetachedStartError(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r := fails(t, program.NewDir(), "--detach", "--api-addr", l.Addr().String())
	says(t, r.Stderr, fmt.Sprintf("the address %s for the api is taken by process %d (", l.Addr(), os.Getpid()), "port_taken")
}

var requestID = regexp.MustCompile(`\[[A-Za-z0-9_-]+\]$`)

// What a client reads when it asks for what there is not.
func TestAPIErrors(t *testing.T) {
	server := program.Start(t, program.Options{})
	c := server.Client()
	ended := c.Make(t, time.Minute, nil)
	if err := ended.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	badKey := server.Client()
	badKey.Key = "e2b_" + strings.Repeat("0", 40)
	noKey := server.Client()
	noKey.Key = ""
	create := func(c *program.Client, more map[string]any) error {
		s, err := c.Create(t.Context(), time.Minute, more)
		if err == nil {
			t.Cleanup(func() { s.Kill(context.Background()) })
		}
		return err
	}
	for _, e := range []struct {
		name   string
		err    error
		status int
		code   string
		want   []string
	}{
		{"unknown template", create(c, map[string]any{"templateID": "nonsense"}), 404, "template_not_found",
			[]string{"template 'nonsense' not found", "cay template list"}},
		{"malformed template", create(c, map[string]any{"templateID": "no such/template!"}), 400, "invalid_request", []string{"no such/template!"}},
		{"wrong key", create(badKey, nil), 401, "unauthorized", []string{"key"}},
		{"no key", create(noKey, nil), 401, "unauthorized", []string{"X-API-Key"}},
		{"no time", create(c, map[string]any{"timeout": 0}), 400, "invalid_request", []string{"timeout"}},
		{"ended sandbox, info", get(t, c, ended.ID), 404, "sandbox_not_found", []string{ended.ID, "ended"}},
		{"ended sandbox, kill", ended.Kill(t.Context()), 404, "sandbox_not_found", []string{ended.ID, "ended"}},
		{"sandbox that never was", get(t, c, "i00000000000000000000"), 404, "sandbox_not_found", []string{"i00000000000000000000"}},
		{"ended sandbox, timeout", c.Call(t.Context(), "POST", "/sandboxes/"+ended.ID+"/timeout", map[string]int{"timeout": 60}, nil), 404, "sandbox_not_found", []string{ended.ID}},
	} {
		t.Run(e.name, func(t *testing.T) {
			r := refusal(t, e.err, e.status)
			if r.Code != e.status || r.ErrorCode != e.code {
				t.Errorf("the body's codes are %d and %q, want %d and %q: %s", r.Code, r.ErrorCode, e.status, e.code, r.Body)
			}
			says(t, r.Message, e.want...)
			if !requestID.MatchString(r.Message) {
				t.Errorf("the message %q does not end with the request's ID", r.Message)
			}
		})
	}
	t.Run("ended sandbox, proxy", func(t *testing.T) {
		r := refusal(t, ended.Answers(t.Context()), 502)
		says(t, r.Message, "The sandbox was not found")
	})
	t.Run("closed port", func(t *testing.T) {
		s := c.Make(t, time.Minute, nil)
		_, err := s.Request(t.Context(), "GET", 4567, "/", "", nil)
		says(t, refusal(t, err, 502).Message, "The sandbox is running but port is not open")
	})
}

func get(t *testing.T, c *program.Client, id string) error {
	_, err := c.Get(t.Context(), id)
	return err
}

// The host's disk being full is said at create, with figures, and running
// sandboxes go on.
func TestHostDiskFull(t *testing.T) {
	// More than any disk has: every create is one too many.
	server := program.Start(t, program.Options{})
	running := server.Client().Make(t, 10*time.Minute, nil)
	server.Term(t)
	server.SetArgs("--disk-reserve-mb", fmt.Sprint(1<<29))
	server.Up(t)
	c := server.Client()
	_, err := c.Create(t.Context(), time.Minute, nil)
	r := refusal(t, err, 507)
	says(t, r.Message, "Failed to place sandbox", "the host's disk is full", "stay reserved", "lower the reserve")
	if r.ErrorCode != "disk_full" {
		t.Errorf("the code is %q", r.ErrorCode)
	}
	if out := running.Out(t, "echo still here"); out != "still here\n" {
		t.Errorf("a running sandbox says %q", out)
	}
}
