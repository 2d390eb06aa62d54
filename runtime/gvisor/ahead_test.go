package gvisor

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/runtime"
)

// openAhead returns a runtime that keeps engines, and a guest that counts.
func openAhead(t *testing.T, ahead int) (*machine, *Runtime, runtime.Spec) {
	t.Helper()
	m := newMachine(t)
	if unified() {
		t.Skip("no engine is started ahead under cgroup v2")
	}
	m.ahead = ahead
	r := m.open(t)
	s := m.spec(t, "tick")
	begin(t, r, s)
	says(t, r, s.ID, "tick 2")
	return m, r, s
}

// save freezes a guest, saves it, and lets it go on.
func save(t *testing.T, r *Runtime, id runtime.InstanceID) (memory string) {
	t.Helper()
	memory = t.TempDir()
	if err := errors.Join(r.Freeze(t.Context(), id), r.Checkpoint(t.Context(), id, memory), r.Thaw(t.Context(), id)); err != nil {
		t.Fatal(err)
	}
	return memory
}

// awaitAhead waits until so many engines have no guest.
func awaitAhead(t *testing.T, r *Runtime, n int) {
	t.Helper()
	until(t, fmt.Sprintf("%d engines are ahead", n), func() bool {
		info, err := r.Info(t.Context())
		return err == nil && info.Detail["engines_ahead"] == fmt.Sprint(n)
	})
}

// resume restores a guest like s.
func resume(t *testing.T, m *machine, r *Runtime, memory string) runtime.Spec {
	t.Helper()
	s := m.spec(t, "tick")
	s.Restore = true
	if err := errors.Join(r.Create(t.Context(), s), r.Restore(t.Context(), s.ID, memory)); err != nil {
		t.Fatal(err)
	}
	return s
}

// countsOn waits until a guest has counted on.
func countsOn(t *testing.T, r *Runtime, id runtime.InstanceID) {
	t.Helper()
	_, lines := says(t, r, id, "tick")
	last := lines[len(lines)-1]
	until(t, "the guest counts on from "+last, func() bool {
		now, err := r.Console(t.Context(), id)
		return err == nil && now[len(now)-1].Text != last
	})
}

// TestEngineAhead is a guest that comes to an engine that waited for one. It is
// confined like any other, and nothing tells it from any other.
func TestEngineAhead(t *testing.T) {
	m, r, s := openAhead(t, 1)
	if info, err := r.Info(t.Context()); err != nil || info.Detail["engines_ahead"] != "0" {
		t.Errorf("before anything was saved: %v, %v", info.Detail, err)
	}
	memory := save(t, r, s.ID)
	awaitAhead(t, r, 1)
	h := home(r.Dir)
	waiting := func() (id string, pids []int) {
		t.Helper()
		dirs, _ := filepath.Glob(filepath.Join(h.instances(), enginePrefix+"*"))
		if len(dirs) != 1 {
			t.Fatalf("the engine's directory: %v", dirs)
		}
		id = filepath.Base(dirs[0])
		return id, cgroup(filepath.Join(h.cgroupParent(), id)).members()
	}
	id, pids := waiting()

	next := resume(t, m, r, memory)
	rec, err := loadRecord(h.instance(next.ID).record)
	if err != nil || !slices.Contains(pids, rec.Sentry.PID) || !slices.Contains(pids, rec.Gofer.PID) || string(rec.Sandbox) != id {
		t.Errorf("the guest has engine %+v, %v; %s with processes %v waited", rec, err, id, pids)
	}
	countsOn(t, r, next.ID)
	confined(t, r, next, rec.Sentry.PID)
	addrs, err := exec.Command("ip", "-n", filepath.Base(next.NetNS), "addr", "show", "dev", "eth0").Output()
	if err != nil || strings.Contains(string(addrs), "169.254.0.21") {
		t.Errorf("the engine has not taken over the guest's network: %s, %v", addrs, err)
	}
	if ents, err := os.ReadDir(filepath.Join(next.RootFS, "tmp")); err != nil || len(ents) == 0 {
		t.Errorf("the guest's /tmp has %v, %v", ents, err)
	}

	// It outlives its supervisor, can be saved, and ends.
	r.Close()
	m.crash(t)
	r = m.open(t)
	countsOn(t, r, next.ID)
	again := save(t, r, next.ID)
	third := resume(t, m, r, again)
	countsOn(t, r, third.ID)
	for _, id := range []runtime.InstanceID{s.ID, next.ID, third.ID} {
		if err := r.Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if left := m.leftovers(t); len(left) > 0 {
		t.Errorf("left: %s", strings.Join(left, "\n"))
	}
	awaitAhead(t, r, 1)
	_, pids = waiting()
	if err := r.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if dirs, _ := filepath.Glob(filepath.Join(h.instances(), "*")); len(dirs) > 0 {
		t.Errorf("after the shutdown: %v", dirs)
	}
	for _, pid := range pids {
		if _, err := startTime(pid); err == nil {
			t.Errorf("process %d is there after the shutdown", pid)
		}
	}
}

// TestEngineAheadDies is an engine that ends while it waits: nobody gets it.
func TestEngineAheadDies(t *testing.T) {
	for _, victim := range []string{"runsc-sandbox", "runsc-gofer"} {
		t.Run(victim, func(t *testing.T) {
			m, r, s := openAhead(t, 1)
			memory := save(t, r, s.ID)
			awaitAhead(t, r, 1)
			group := cgroup(filepath.Join(home(r.Dir).cgroupParent(), enginePrefix+"1"))
			for _, pid := range group.members() {
				if args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); !strings.HasPrefix(string(args), victim+"\x00") {
					continue
				}
				p, err := openProcess(processID{PID: pid})
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(p.kill(), p.wait()); err != nil {
					t.Fatal(err)
				}
			}
			next := resume(t, m, r, memory)
			countsOn(t, r, next.ID)
			for _, id := range []runtime.InstanceID{s.ID, next.ID} {
				if err := r.Kill(t.Context(), id); err != nil {
					t.Error(err)
				}
			}
			until(t, "the dead engine is removed", func() bool { return len(group.members()) == 0 })
			if left := m.leftovers(t); len(left) > 0 {
				t.Errorf("left: %s", strings.Join(left, "\n"))
			}
		})
	}
}

// TestEngineAheadUnusable is an engine that cannot be given its guest's root: the
// guest gets another one, and nothing of the first is left.
func TestEngineAheadUnusable(t *testing.T) {
	m, r, s := openAhead(t, 1)
	memory := save(t, r, s.ID)
	awaitAhead(t, r, 1)
	next := m.spec(t, "tick")
	next.Restore = true
	// The name of the instance's cgroup is taken in one hierarchy.
	taken := filepath.Join(hierarchies()[0], home(r.Dir).instance(next.ID).cgroup)
	if err := os.MkdirAll(filepath.Join(taken, "below"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Create(t.Context(), next), r.Restore(t.Context(), next.ID, memory)); err != nil {
		t.Fatal(err)
	}
	countsOn(t, r, next.ID)
	if rec, err := loadRecord(home(r.Dir).instance(next.ID).record); err != nil || rec.Sandbox != "" || rec.NetNS != "" {
		t.Errorf("its record: %+v, %v", rec, err)
	}
	for _, id := range []runtime.InstanceID{s.ID, next.ID} {
		if err := r.Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if left := m.leftovers(t); len(left) > 0 {
		t.Errorf("left: %s", strings.Join(left, "\n"))
	}
}

// TestPlan is when engines are started and ended.
func TestPlan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, c := kind{Hostname: "a"}, kind{Hostname: "b"}, kind{Hostname: "c"}
		self, err := openProcess(processID{PID: os.Getpid()})
		if err != nil {
			t.Fatal(err)
		}
		defer self.close()
		s := &Supervisor{kinds: map[kind]time.Time{}, wantSpare: make(chan struct{}, 1), ahead: 2}
		have := func(kinds ...kind) (out []*engine) {
			for _, k := range kinds {
				out = append(out, &engine{kind: k, sentry: self, gofer: self})
			}
			s.engines = slices.Clone(out)
			return out
		}
		check := func(what string, available int64, wantDrop []*engine, want *kind, wantAgain time.Duration) {
			t.Helper()
			drop, start, again := s.plan(available)
			if !slices.Equal(drop, wantDrop) || (start == nil) != (want == nil) || (start != nil && *start != *want) || again != wantAgain {
				t.Errorf("%s: drops %d, starts %v, again after %v; want %d, %v, %v", what, len(drop), start, again, len(wantDrop), want, wantAgain)
			}
		}
		const plenty, scarce, none = 8 << 30, engineReserve - 1, engineReserve/2 - 1
		check("nobody saved anything", plenty, nil, nil, 0)
		s.heat(a)
		check("without a socket for file servers", plenty, nil, nil, engineCheck)
		s.roots = new(net.UnixListener) // is not used
		check("one was saved", plenty, nil, &a, 0)
		done := s.busy()
		check("while it is saved", plenty, nil, nil, engineCheck)
		done()
		check("right after it", plenty, nil, nil, engineAfter)
		time.Sleep(engineAfter)
		check("later", plenty, nil, &a, 0)
		check("when memory is scarce", scarce, nil, nil, engineCheck)
		e := have(a)
		check("the second", plenty, nil, &a, 0)
		check("when memory is short", none, e, nil, engineCheck)
		have(a, a)
		check("enough", plenty, nil, nil, engineCheck)
		time.Sleep(time.Second)
		s.heat(b)
		check("another kind", plenty, nil, &b, 0)
		e = have(a, a, b, b)
		time.Sleep(time.Second)
		s.heat(c)
		check("a third kind, and the oldest goes", plenty, e[:2], &c, 0)
		e = have(b, b, c, c)
		s.ahead = 1
		check("fewer are wanted", plenty, []*engine{e[1], e[3]}, nil, engineCheck)
		s.lastFailed = time.Now()
		have()
		check("after a failure", plenty, nil, nil, engineCheck)
		time.Sleep(engineCheck)
		check("and later", plenty, nil, &c, 0)
		e = have(c)
		time.Sleep(engineHot)
		check("nobody asks any more", plenty, e, nil, 0)
		s.heat(c)
		s.ahead = 0
		e = have(c)
		check("none are wanted", plenty, e, nil, engineCheck)
	})
}

func TestAwaitUse(t *testing.T) {
	const mb = 1 << 20
	// At the beginning, at each tick, and when it begins to rest.
	allocates, rested := []uint64{0, 5 * mb, 8 * mb, 8*mb + 100, 8*mb + 200, 9 * mb, 9*mb + 300}, false
	tick := make(chan time.Time, len(allocates))
	for range cap(tick) {
		tick <- time.Time{}
	}
	awaitUse(tick, func() uint64 {
		n := allocates[0]
		allocates = allocates[1:]
		return n
	}, func() {
		if rested || len(allocates) != 3 {
			t.Errorf("it rests with %d looks left; want 3, and once", len(allocates))
		}
		rested = true
	})
	if len(allocates) != 0 {
		t.Errorf("it is put to use with %d looks left; want 0", len(allocates))
	}
}
