package gvisor

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// TestUpgrade replaces a supervisor of another engine under its guests.
func TestUpgrade(t *testing.T) {
	m := newMachine(t)
	t.Setenv("CAY_TEST_ENGINE", "v0.0.0-older")
	old := m.runtime()
	h := home(filepath.Join(m.dir, "d"))
	old.home, old.log = h, slogDiscard()
	if _, err := old.startSupervisor(); err != nil {
		t.Fatal(err)
	}
	until(t, "the old supervisor listens", func() bool { _, err := os.Stat(h.socket()); return err == nil })
	os.Unsetenv("CAY_TEST_ENGINE")
	// A client of the old version, which takes it as it is.
	client := m.runtime()
	client.home, client.log, client.open = h, slogDiscard(), true
	client.http = clientOf(h)
	running, waiting := m.spec(t, "tick"), m.spec(t, "run")
	if err := errors.Join(client.Create(t.Context(), running), client.Start(t.Context(), running.ID), client.Create(t.Context(), waiting)); err != nil {
		t.Fatal(err)
	}
	info, err := client.Info(t.Context())
	if err != nil || info.Version != "v0.0.0-older" {
		t.Fatalf("%+v, %v", info, err)
	}

	r := m.open(t)
	if info, err := r.Info(t.Context()); err != nil || info.Version != EngineVersion {
		t.Errorf("after the upgrade: %+v, %v", info, err)
	}
	if i := one(t, r, running.ID); i.State != runtime.Running {
		t.Errorf("the running guest is %+v", i)
	}
	_, lines := says(t, r, running.ID, "tick 0")
	says(t, r, running.ID, fmt.Sprint("tick ", len(lines)+20))
	// What it is told, it is told by its own program.
	memory := t.TempDir()
	if err := errors.Join(r.Freeze(t.Context(), running.ID), r.Checkpoint(t.Context(), running.ID, memory), r.Thaw(t.Context(), running.ID)); err != nil {
		t.Errorf("saving a guest of the other engine: %v", err)
	}
	_, lines = says(t, r, running.ID, "tick")
	says(t, r, running.ID, fmt.Sprint("tick ", len(lines)+20))
	if i := one(t, r, waiting.ID); i.State != runtime.Exited || !strings.Contains(i.Exit.Message, "v0.0.0-older") {
		t.Errorf("the prepared guest of the other engine is %+v", i)
	}
	for _, id := range []runtime.InstanceID{running.ID, waiting.ID} {
		if err := r.Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if left := m.leftovers(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestAnotherEngine gives a guest another engine than the supervisor's, for its
// whole life. That the other one is of another gVisor, test/upgrade proves.
func TestAnotherEngine(t *testing.T) {
	m, r := open(t)
	programs := filepath.Join(m.dir, "engine")
	if err := os.Mkdir(programs, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "cp", "/proc/"+strconv.Itoa(os.Getpid())+"/exe", filepath.Join(programs, "other"))
	r.Programs = programs
	first, next := m.spec(t, "tick"), m.spec(t, "tick")
	first.Engine = runtime.Engine{Version: "v0.0.0-older", Program: "gone"}
	if err := r.Create(t.Context(), first); cay.CodeOf(err) != cay.CodeSnapshotIncompatible {
		t.Errorf("an engine that is not there: %v", err)
	}
	first.Engine.Program = "other"
	next.Engine = first.Engine
	if err := errors.Join(r.Create(t.Context(), first), r.Start(t.Context(), first.ID)); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", one(t, r, first.ID).PID))
	if err != nil || exe != filepath.Join(programs, "other") {
		t.Errorf("the guest runs on %s, %v", exe, err)
	}
	says(t, r, first.ID, "tick 2")
	memory := t.TempDir()
	if err := errors.Join(r.Freeze(t.Context(), first.ID), r.Checkpoint(t.Context(), first.ID, memory), r.Kill(t.Context(), first.ID)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Create(t.Context(), next), r.Restore(t.Context(), next.ID, memory)); err != nil {
		t.Fatal(err)
	}
	says(t, r, next.ID, "tick 10")
	// Its file may go while it runs.
	if err := os.Remove(filepath.Join(programs, "other")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Freeze(t.Context(), next.ID), r.Thaw(t.Context(), next.ID), r.Kill(t.Context(), next.ID)); err != nil {
		t.Error(err)
	}
	if left := m.leftovers(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestSupervisorGoesIdle is a supervisor that nobody needs any more.
func TestSupervisorGoesIdle(t *testing.T) {
	t.Setenv("CAY_TEST_IDLE", "100ms")
	_, r := open(t)
	p, err := openProcess(processID{PID: r.info.PID})
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if _, err := r.Instances(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !p.alive() {
		t.Error("the supervisor left while a server was connected")
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	_ = p.file.SetReadDeadline(time.Now().Add(30 * time.Second))
	if err := p.wait(); err != nil {
		t.Errorf("the supervisor stays: %v", err)
	}
}

// TestShutdownIsFinal ends supervisors while others look for them: none may come
// back, for nobody would end it.
func TestShutdownIsFinal(t *testing.T) {
	m := newMachine(t)
	for range 10 {
		r := m.runtime()
		if err := r.Open(t.Context()); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for {
					if _, err := r.Instances(t.Context()); err != nil {
						return // it is closed
					}
				}
			})
		}
		if err := r.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		lock, err := lockFile(r.home.lock())
		if err != nil {
			t.Fatalf("after Shutdown a supervisor runs: %v", err)
		}
		lock.Close()
	}
}

// TestCrashAtAnyPoint kills the supervisor at random moments of creates, starts,
// restores and kills, and of the start of engines for guests to come. Afterwards nothing may be there that is not listed, and after the
// kill of what is listed, nothing at all.
func TestCrashAtAnyPoint(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	m := newMachine(t)
	m.ahead = 2
	r := m.open(t)
	first := m.spec(t, "run")
	begin(t, r, first)
	memory := save(t, r, first.ID)
	if err := errors.Join(r.Kill(t.Context(), first.ID), r.Close()); err != nil {
		t.Fatal(err)
	}
	for round := range rounds {
		r := m.open(t)
		pid := r.info.PID
		r.Close()
		// A client that does not start the next supervisor by itself.
		c := m.runtime()
		c.home, c.log, c.http = r.home, slogDiscard(), clientOf(r.home)
		var g sync.WaitGroup
		for n := range 2 {
			s := m.spec(t, "run")
			run := withID(pathStart, s.ID)
			if (round+n)%2 == 1 {
				s.Restore = true
				run = pathRestore + "?" + url.Values{"id": {string(s.ID)}, "dir": {memory}}.Encode()
			}
			g.Go(func() {
				body := specJSON(t, s)
				for _, call := range []struct {
					path string
					body []byte
				}{{pathCreate + "?ahead=2", body}, {run, nil}, {withID(pathKill, s.ID), nil}} {
					if err := c.post(context.Background(), call.path, call.body); err != nil {
						return
					}
				}
			})
		}
		time.Sleep(time.Duration(rnd.IntN(200)) * time.Millisecond) // the random moment
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		g.Wait()
		r = m.open(t)
		if dirs, _ := filepath.Glob(filepath.Join(r.home.instances(), enginePrefix+"*")); len(dirs) > 0 {
			t.Errorf("round %d: the engines of the dead supervisor are there: %v", round, dirs)
		}
		all, err := r.Instances(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range all {
			if i.State == runtime.Exited && i.Exit.Reason != cay.EndEngineCrash && i.Exit.Reason != cay.EndRequest {
				t.Errorf("round %d: %+v", round, i)
			}
			if err := r.Kill(t.Context(), i.ID); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
		if left := m.leftovers(t); len(left) > 0 {
			t.Fatalf("round %d left: %s", round, strings.Join(left, "\n"))
		}
		r.Close()
	}
}

// TestCycles looks for what accumulates in the supervisor.
func TestCycles(t *testing.T) {
	n := 30
	if testing.Short() {
		n = 8
	}
	m, r := open(t)
	cycle := func() {
		s := m.spec(t, "exit", "0")
		begin(t, r, s)
		if _, err := r.Wait(t.Context(), s.ID); err != nil {
			t.Fatal(err)
		}
		if err := r.Kill(t.Context(), s.ID); err != nil {
			t.Fatal(err)
		}
	}
	cycle()
	fds := func() (open []string) {
		dir := fmt.Sprintf("/proc/%d/fd", r.info.PID)
		l, _ := os.ReadDir(dir)
		for _, e := range l {
			what, _ := os.Readlink(filepath.Join(dir, e.Name())) // closed meanwhile
			open = append(open, what)
		}
		return open
	}
	before := fds()
	for range n {
		cycle()
	}
	// What is closed late on a busy machine is no leak.
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		after := fds()
		if len(after) <= len(before)+5 {
			break
		}
		if time.Now().After(end) {
			t.Errorf("the supervisor has %d descriptors after %d cycles, and had %d:\n%s", len(after), n, len(before), strings.Join(after, "\n"))
			break
		}
	}
	if left := m.leftovers(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	for _, p := range children(t, r.info.PID) {
		if st := status(t, p); strings.HasPrefix(st["State"], "Z") {
			t.Errorf("a zombie is left: %d %s", p, st["Name"])
		}
	}
}

// TestLimits lets a guest try its limits on CPU time and host tasks.
func TestLimits(t *testing.T) {
	m, r := open(t)
	s := m.spec(t, "spin")
	begin(t, r, s)
	// The figure needs wall time to pass.
	time.Sleep(500 * time.Millisecond)
	a, err := r.Stats(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	time.Sleep(2 * time.Second)
	b, err := r.Stats(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	used := time.Duration(b.CPUNanos - a.CPUNanos)
	if wall := time.Since(began); used > wall*12/10 || used < wall/10 {
		t.Errorf("a guest with one CPU used %v of CPU time in %v", used, wall)
	}
	if err := r.Kill(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}

	s = m.spec(t, "fork", "2000")
	s.Limits.PIDs = 50
	begin(t, r, s)
	limit := int(hostPIDs(50, pidMax()))
	until(t, "the guest is at its limit", func() bool {
		i := one(t, r, s.ID)
		st, err := r.Stats(t.Context(), s.ID)
		if err != nil {
			t.Fatal(err)
		}
		if st.PIDs > limit {
			t.Fatalf("%d host tasks; want at most %d", st.PIDs, limit)
		}
		if i.State == runtime.Exited && i.Exit.Reason != cay.EndPIDs {
			t.Fatalf("ended by %+v", i.Exit)
		}
		return i.State == runtime.Exited || cgroup(home(r.Dir).instance(s.ID).cgroup).pidsRefused() > 0
	})
	if err := r.Kill(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	if left := m.leftovers(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestKillIsPrompt is the promise of 50 ms, with room for a busy machine.
func TestKillIsPrompt(t *testing.T) {
	m, r := open(t)
	s := m.spec(t, "memory", fmt.Sprint(256<<20))
	begin(t, r, s)
	says(t, r, s.ID, "memory held")
	members := cgroup(home(r.Dir).instance(s.ID).cgroup).members()
	began := time.Now()
	if err := r.Kill(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	t.Logf("a guest with 256 MiB in use was gone after %v", took)
	if took > time.Second {
		t.Errorf("the kill took %v", took)
	}
	for _, pid := range members {
		if _, err := startTime(pid); err == nil {
			t.Errorf("process %d is there after Kill", pid)
		}
	}
}
