package crash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/test/invariant"
	"github.com/cayhq/cay/test/program"
)

// onEngine is the real program on gVisor.
type onEngine struct {
	*program.Server
	file string // arms it
	c    *program.Client
}

func startOnEngine(t *testing.T) *onEngine {
	t.Helper()
	file := filepath.Join(t.TempDir(), "armed")
	s := &onEngine{Server: program.Start(t, program.Options{Env: []string{"CAY_KILLPOINT_FILE=" + file, program.OtherEnvd(t)}}), file: file}
	s.c = s.Client()
	return s
}

func (s *onEngine) client() *program.Client { return s.c }

func (s *onEngine) up(t *testing.T) {
	t.Helper()
	s.Up(t)
}

func (s *onEngine) arm(t *testing.T, kill, fail string, _ syscall.Errno) {
	t.Helper()
	text := ""
	if kill != "" {
		text += "kill " + kill + "\n"
	}
	if fail != "" {
		text += "fail " + fail + "\n"
	}
	if err := replace(s.file, []byte(text)); err != nil {
		t.Fatal(err)
	}
}

func (s *onEngine) died(t *testing.T, within time.Duration) {
	t.Helper()
	program.Eventually(t, within, func() string {
		if s.Running() {
			return "the point was never passed"
		}
		return ""
	})
	if err := os.Remove(s.file); err != nil {
		t.Fatal(err)
	}
}

// box is a sandbox with its token.
func (s *onEngine) box(id string) (*program.Sandbox, error) {
	return s.c.Get(context.Background(), id)
}

func (s *onEngine) write(id, v string) error {
	b, err := s.box(id)
	if err != nil {
		return err
	}
	r, err := b.Exec(context.Background(), "", fmt.Sprintf("echo %s >/dev/shm/v && echo %s >~/v", v, v))
	if err == nil && r.Code != 0 {
		err = errors.New(r.String())
	}
	return err
}

func (s *onEngine) read(id string) (v value, err error) {
	b, err := s.box(id)
	if err != nil {
		return v, err
	}
	r, err := b.Exec(context.Background(), "", `echo "$(cat /dev/shm/v 2>/dev/null) $(cat ~/v)"`)
	if err != nil {
		return v, err
	}
	v.Memory, v.Disk, _ = strings.Cut(strings.TrimSuffix(r.Stdout, "\n"), " ")
	return v, nil
}

// inventory does not look at networks, which are made ahead: the invariants at
// the end do.
func (s *onEngine) inventory(t *testing.T) inventory {
	t.Helper()
	v := inventory{States: map[string]string{}}
	var rows []struct{ SandboxID, State, ExecutionID, SnapshotID string }
	if err := s.c.Call(t.Context(), "GET", "/operator/v1/sandboxes", nil, &rows); err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		v.States[r.SandboxID] = r.State
		switch r.State {
		case "running":
			v.Running = append(v.Running, r.ExecutionID)
		case "paused":
			v.Owned = append(v.Owned, r.SnapshotID)
		}
	}
	var snaps []struct{ SnapshotID string }
	if err := s.c.Call(t.Context(), "GET", "/snapshots", nil, &snaps); err != nil {
		t.Fatal(err)
	}
	for _, n := range snaps {
		id, _, _ := strings.Cut(n.SnapshotID, ":")
		v.Owned = append(v.Owned, id)
	}
	names := func(elem ...string) (out []string) {
		all, err := list(filepath.Join(append([]string{s.Dir}, elem...)...))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		for _, n := range all {
			n, _, _ = strings.Cut(n, ".json")
			n, _, _ = strings.Cut(n, ".img")
			if !strings.HasPrefix(n, "ready-") && !strings.HasPrefix(n, "spare-") { // made ahead
				out = append(out, n)
			}
		}
		return out
	}
	v.Instances, v.Disks, v.Records = names("run", "gvisor", "i"), names("disk", "disks"), names("run", "orchestrator")
	v.Slots, v.Saved = v.Running, names("disk", "pool", "saved")
	for _, n := range names("snapshots") {
		if strings.HasSuffix(n, ".new") {
			v.HalfMade = append(v.HalfMade, n)
		} else {
			v.Snapshots = append(v.Snapshots, n)
		}
	}
	for _, l := range [][]string{v.Running, v.Owned, v.Instances, v.Disks, v.Records, v.Saved, v.Snapshots} {
		slices.Sort(l)
	}
	return v
}

// fewPoints are those of every run; the nightly one has all.
var fewPoints = []string{"create.init.after", "pause.manifest.before-rename", "pause.engine-gone.before", "resume.start.after", "snapshot.disk.after", "fork.api.made", "kill.engine-gone.after", "upgrade.send.after"}

// The same, with the real program, on gVisor.
func TestKillPointsOfTheEngine(t *testing.T) {
	points := fewPoints
	if program.Nightly() {
		points = killpoint.Points()
	}
	srv := startOnEngine(t)
	k := &trial{t: t, srv: srv, c: srv.c}
	k.stand() // what the first sandboxes leave for the next ones is no leak
	k.dismiss()
	srv.c.Vanish() // its idle connections are its own, as many as there were requests at a time
	before := invariant.Steady(t, time.Minute, program.Scope(srv.Dir))
	k.stand()
	for _, p := range points {
		ok := t.Run(p, func(t *testing.T) {
			k.t = t
			k.killed(p)
		})
		if !ok {
			t.FailNow()
		}
	}
	k.t = t
	k.connect(k.paused)
	k.has(k.paused, k.values[k.paused], true)
	k.dismiss()
	// Snapshots that were made and told to nobody are in quarantine.
	for _, id := range k.settled() {
		t.Logf("in quarantine: %s", id)
		for _, path := range []string{filepath.Join(srv.Dir, "snapshots", id), filepath.Join(srv.Dir, "disk", "pool", "saved", id+".img")} {
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	srv.c.Vanish()
	invariant.Settle(t, time.Minute, program.Scope(srv.Dir), before)
}
