package upgrade

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/test/program"
	"github.com/cayhq/cay/test/sdk"
)

// The official clients use a sandbox while its envd is replaced: a terminal, a
// process with output, a stream of events, a polled watcher, an upload under way,
// a pause right after.
func TestUpgradeOfEnvd(t *testing.T) {
	server := program.Start(t, program.Options{Env: []string{program.OtherEnvd(t)}})
	admin := "TEST_ADMIN=" + server.Admin
	for _, c := range sdk.Clients {
		scenarios := []string{"watcher", "ended"}
		if strings.HasPrefix(c.Name, "js-") {
			scenarios = []string{"all goes on", "twice", "over a pause"}
		}
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			c.Exercise(t, server, scenarios, admin)
		})
	}
}

// inspected is what `cay sandbox inspect` says of a sandbox's envd.
type inspected struct {
	EnvdVersion, EnvdDigest string
	EnvdOutdated            bool
}

func inspect(t *testing.T, server *program.Server, s *program.Sandbox) inspected {
	t.Helper()
	var out struct{ Node inspected }
	r := server.Run("sandbox", "inspect", "-o", "json", s.ID)
	if err := json.Unmarshal([]byte(r.Stdout), &out); err != nil {
		t.Fatalf("cay sandbox inspect: %v: %s", err, r)
	}
	return out.Node
}

// After an upgrade of Cay sandboxes have the envd that they were started with,
// until somebody says otherwise. A program that does not run, or ends at once,
// changes nothing but says so; the server may be killed in the middle.
func TestEnvdOfAnotherVersion(t *testing.T) {
	give := program.GiveEnvd(t, []byte("#!/bin/sh\necho no such machine\nexit 4\n"))
	file := strings.TrimPrefix(give, "CAY_ENVD=")
	armed := t.TempDir() + "/armed"
	server := program.Start(t, program.Options{Env: []string{give, "CAY_KILLPOINT_FILE=" + armed}})
	c := server.Client()
	s := c.Make(t, 20*time.Minute, nil)
	p, err := s.Start(t.Context(), "", counter)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Leave(); err != nil {
		t.Fatal(err)
	}
	first := inspect(t, server, s)
	if !first.EnvdOutdated || first.EnvdDigest == "" {
		t.Errorf("a fresh sandbox has %+v", first)
	}
	pauses := func(what string, from count) {
		t.Helper()
		for _, step := range []string{"/pause", "/connect"} {
			if err := c.Call(context.Background(), "POST", "/sandboxes/"+s.ID+step, map[string]any{"timeout": 1200, "memory": true}, nil); err != nil {
				t.Fatalf("%s: %s: %v", what, step, err)
			}
		}
		goesOn(t, what, s, from)
	}
	next := func(content []byte) {
		t.Helper()
		if err := os.WriteFile(file, content, 0o755); err != nil {
			t.Fatal(err)
		}
		server.Term(t)
		server.Up(t)
		c.Vanish()
	}
	for _, broken := range []struct{ what, program, says string }{
		{"a program that does not run", "", "no such machine"},
		{"a program that ends at once", "#!/bin/sh\n[ \"$1\" = -version ] || exit 5\n", "exit status 5; the program before it is back"},
	} {
		if broken.program != "" {
			next([]byte(broken.program))
		}
		at := counts(t, s)
		r := server.Run("sandbox", "upgrade", s.ID)
		if r.Code != 1 || !strings.Contains(r.Stderr, broken.says) || !strings.Contains(r.Stderr, "[envd/envd_upgrade_failed") || !strings.Contains(r.Stdout, "failed") {
			t.Errorf("%s: %s", broken.what, r)
		}
		if got := inspect(t, server, s); got != first {
			t.Errorf("%s: the sandbox has %+v, and had %+v", broken.what, got, first)
		}
		goesOn(t, broken.what, s, at)
		pauses(broken.what, at)
	}

	// The server dies when it has sent the other one.
	other, err := os.ReadFile(strings.TrimPrefix(program.OtherEnvd(t), "CAY_ENVD="))
	if err != nil {
		t.Fatal(err)
	}
	next(other)
	at := counts(t, s)
	if err := os.WriteFile(armed, []byte("kill upgrade.send.after\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := server.Run("sandbox", "upgrade", s.ID); r.Code == 0 {
		t.Errorf("the server was killed, and yet: %s", r)
	}
	program.Eventually(t, time.Minute, func() string {
		if server.Running() {
			return "the server does not die"
		}
		return ""
	})
	if err := os.Remove(armed); err != nil {
		t.Fatal(err)
	}
	server.Up(t)
	c.Vanish()
	pauses("killed in the middle", at) // before the next server knows which of the two it is
	program.Eventually(t, time.Minute, func() string {
		if got := inspect(t, server, s); got.EnvdOutdated || got.EnvdDigest == first.EnvdDigest {
			return fmt.Sprintf("the sandbox has %+v, and had %+v", got, first)
		}
		return ""
	})
	r := server.Run("sandbox", "upgrade", "--all", "-o", "json")
	var all []struct {
		SandboxID, Error string
		Changed          bool
	}
	if err := json.Unmarshal([]byte(r.Stdout), &all); err != nil || len(all) != 1 || all[0].SandboxID != s.ID || all[0].Changed || all[0].Error != "" {
		t.Errorf("upgrade --all: %v: %s", err, r)
	}
	goesOn(t, "in the end", s, at)
}
