// Package upgrade takes sandboxes and snapshots from one build of the product
// to another, whose engine does not fit them, and whose envd is another one.
package upgrade

import (
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/test/program"
	"github.com/cayhq/cay/test/sdk"
)

func TestMain(m *testing.M) { program.Main(m, buildEarlier, sdk.Install) }

// earlier is the program before the upgrade: of the same source, with an engine
// that calls itself another version. gVisor compares that, and nothing else.
func earlier() string { return program.Cache("upgrade", "cay") }

func buildEarlier() error {
	dir := program.Cache("upgrade")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	const flags = "-s -w -X github.com/cayhq/cay/runtime/gvisor.revision=earlier"
	engine, packed := filepath.Join(dir, "engine"), filepath.Join(dir, "engine.gz")
	if err := build(engine, "./cmd/engine", flags); err != nil {
		return err
	}
	if err := pack(packed, engine); err != nil {
		return err
	}
	replace := map[string]map[string]string{"Replace": {filepath.Join(program.Repo(), "cmd/cay/guest/engine.gz"): packed}}
	overlay, err := json.Marshal(replace)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, overlay, 0o600); err != nil {
		return err
	}
	return build(earlier(), "./cmd/cay", flags, "-overlay", file)
}

func build(out, pkg, flags string, more ...string) error {
	args := append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", out}, more...)
	cmd := exec.Command("go", append(args, pkg)...)
	cmd.Dir = program.Repo()
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", pkg, err, text)
	}
	return nil
}

// pack compresses a program, as quickly as may be.
func pack(to, from string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	z, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
	if err != nil {
		return err
	}
	_, err = io.Copy(z, in)
	return errors.Join(err, z.Close())
}

// counter counts in its memory, and shows that in a file.
const counter = `exec python3 -c '
import os, time
n = 0
while True:
    n += 1
    with open("/tmp/n.new", "w") as f: f.write("%d %d" % (n, os.getpid()))
    os.rename("/tmp/n.new", "/tmp/n")
    time.sleep(0.01)
'`

type count struct{ n, pid int }

func counts(t *testing.T, s *program.Sandbox) (c count) {
	t.Helper()
	program.Eventually(t, 30*time.Second, func() string {
		b, err := s.Read(t.Context(), "/tmp/n")
		if err == nil {
			_, err = fmt.Sscan(string(b), &c.n, &c.pid)
		}
		if err != nil {
			return fmt.Sprintf("the guest does not count: %v", err)
		}
		return ""
	})
	return c
}

// goesOn checks that the process of a count counts on from there.
func goesOn(t *testing.T, what string, s *program.Sandbox, from count) {
	t.Helper()
	program.Eventually(t, 30*time.Second, func() string {
		if c := counts(t, s); c.pid != from.pid || c.n <= from.n {
			return fmt.Sprintf("%s: %+v does not go on from %+v", what, c, from)
		}
		return ""
	})
}

// engines are the programs in the data directory.
func engines(t *testing.T, s *program.Server) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(s.Dir, "engine"))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// doctor returns what `cay doctor` says of the engines.
func doctor(t *testing.T, s *program.Server) (verdict, evidence string) {
	t.Helper()
	r := s.Run("doctor", "--json")
	var report struct {
		Checks []struct{ ID, Verdict, Evidence string }
	}
	if err := json.Unmarshal([]byte(r.Stdout), &report); err != nil {
		t.Fatalf("cay doctor --json: %v: %s", err, r)
	}
	for _, c := range report.Checks {
		if c.ID == "runtime.engines" {
			return c.Verdict, c.Evidence
		}
	}
	t.Fatalf("cay doctor says nothing of the engines: %s", r)
	return "", ""
}

// What was paused or saved before an upgrade, or runs over it, keeps its memory
// for as long as anybody wants it; then the earlier engine goes.
func TestUpgradeOfTheEngine(t *testing.T) {
	server := program.Start(t, program.Options{Binary: earlier()})
	c := server.Client()
	post := func(s *program.Sandbox, what string, in, out any) {
		t.Helper()
		if err := c.Call(t.Context(), "POST", "/sandboxes/"+s.ID+what, in, out); err != nil {
			t.Fatalf("%s of %s: %v", what, s.ID, err)
		}
	}
	connect := map[string]any{"timeout": 600, "memory": true}
	paused, runs := c.Make(t, 10*time.Minute, nil), c.Make(t, 10*time.Minute, nil)
	for _, s := range []*program.Sandbox{paused, runs} {
		p, err := s.Start(t.Context(), "", counter)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Leave(); err != nil {
			t.Fatal(err)
		}
	}
	wasPaused := counts(t, paused)
	var snap struct{ SnapshotID string }
	post(paused, "/snapshots", map[string]any{}, &snap)
	post(paused, "/pause", nil, nil)
	first := engines(t, server)
	if verdict, evidence := doctor(t, server); verdict != "ok" || !strings.Contains(evidence, "present engine") {
		t.Errorf("before the upgrade: %s: %s", verdict, evidence)
	}

	server.Term(t)
	server.SetBinary(program.Binary())
	ran := counts0(t, server, c, runs)
	goesOn(t, "what ran over the upgrade", runs, ran)
	if got := engines(t, server); len(first) != 1 || len(got) != 2 {
		t.Errorf("the engines were %v and are %v", first, got)
	}
	id, _, _ := strings.Cut(snap.SnapshotID, ":")
	if verdict, evidence := doctor(t, server); verdict != "ok" || !strings.Contains(evidence, "kept: "+first[0]) || !strings.Contains(evidence, id) {
		t.Errorf("after the upgrade: %s: %s", verdict, evidence)
	}

	post(paused, "/connect", connect, nil)
	goesOn(t, "what was paused before the upgrade", paused, wasPaused)
	from, err := c.Create(t.Context(), 10*time.Minute, map[string]any{"templateID": snap.SnapshotID})
	if err != nil {
		t.Fatal(err)
	}
	goesOn(t, "what was saved before the upgrade", from, wasPaused)
	for range 2 { // and again, by the engine that it has
		at := counts(t, runs)
		post(runs, "/pause", nil, nil)
		post(runs, "/connect", connect, nil)
		goesOn(t, "what was paused after the upgrade", runs, at)
	}
	// A fresh sandbox is of the present engine.
	fresh := c.Make(t, 10*time.Minute, nil)
	if exe, earlierExe := exeOf(t, server, fresh), exeOf(t, server, runs); exe == earlierExe || filepath.Base(earlierExe) != first[0] {
		t.Errorf("a fresh sandbox runs on %s, and the earlier one on %s", exe, earlierExe)
	}

	for _, s := range []*program.Sandbox{paused, runs, from} {
		if err := s.Kill(t.Context()); err != nil {
			t.Errorf("killing %s: %v", s.ID, err)
		}
	}
	if got := engines(t, server); len(got) != 2 {
		t.Errorf("a snapshot is of the earlier engine, and there are %v", got)
	}
	if err := c.Call(t.Context(), "DELETE", "/templates/"+snap.SnapshotID, nil, nil); err != nil {
		t.Fatal(err)
	}
	program.Eventually(t, 30*time.Second, func() string {
		if got := engines(t, server); len(got) != 1 || got[0] == first[0] {
			return fmt.Sprintf("nobody needs the earlier engine %s, and there are %v", first[0], got)
		}
		return ""
	})
	if verdict, evidence := doctor(t, server); verdict != "ok" || !strings.Contains(evidence, "present engine") {
		t.Errorf("in the end: %s: %s", verdict, evidence)
	}
}

// counts0 starts the next server and returns what the guest had counted when
// it was there.
func counts0(t *testing.T, server *program.Server, c *program.Client, s *program.Sandbox) count {
	t.Helper()
	server.Up(t)
	c.Vanish()
	return counts(t, s)
}

// exeOf returns the program that a sandbox is a process of.
func exeOf(t *testing.T, server *program.Server, s *program.Sandbox) string {
	t.Helper()
	var out struct {
		Node struct{ Host struct{ PID int } }
	}
	c := server.Client()
	if err := c.Call(t.Context(), "GET", "/operator/v1/sandboxes/"+s.ID, nil, &out); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", out.Node.Host.PID))
	if err != nil {
		t.Fatalf("process %d of %s: %v", out.Node.Host.PID, s.ID, err)
	}
	return exe
}
