package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/runsc/container"
	"gvisor.dev/gvisor/runsc/specutils"

	"github.com/cayhq/cay/runtime"
)

// launchRequest is what a launcher reads from its standard input.
type launchRequest struct {
	ID      string   `json:"id"`
	Bundle  string   `json:"bundle"`
	Console string   `json:"console"` // the pipe
	Flags   []string `json:"flags"`
	// InCgroup tells that the launcher is in the instance's cgroup already:
	// gVisor is to leave cgroups alone.
	InCgroup bool `json:"inCgroup,omitempty"`

	// Set when the launcher is of another engine than the supervisor: it
	// writes the bundle and chooses the flags as its own supervisor would, for
	// what the guest is given has to be what its memory was saved with.
	Home  string        `json:"home,omitempty"`
	Spec  *runtime.Spec `json:"spec,omitempty"`
	Debug string        `json:"debug,omitempty"`
}

// launchResult is what a launcher writes to file descriptor 3.
type launchResult struct {
	Sentry int    `json:"sentry"`
	Gofer  int    `json:"gofer"`
	Error  string `json:"error,omitempty"`
}

// guestOOMScore makes the kernel prefer a guest to the host's own processes
// when the whole machine is out of memory (oom_score_adj of proc(5)).
const guestOOMScore = 500

// launchMain is the launcher: one process that creates one instance and exits.
// With an argument it first moves into that cgroup, which it reports as a result
// of its own. The supervisor does not do that for it, for it should never be in
// a system call that cannot be interrupted: killed there it would not die.
func launchMain() int {
	silenceEngineLog()
	out := os.NewFile(3, "result")
	var req launchRequest
	res := launchResult{}
	if len(os.Args) > 1 {
		if err := cgroup(os.Args[1]).join(os.Getpid()); err != nil {
			res.Error = err.Error()
		}
		if err := json.NewEncoder(out).Encode(res); err != nil || res.Error != "" {
			return 1
		}
	}
	if err := json.NewDecoder(os.Stdin).Decode(&req); errors.Is(err, io.EOF) {
		return 0 // a spare one, not needed any more
	} else if err != nil {
		res.Error = fmt.Sprintf("reading the request: %v", err)
	} else if res, err = launch(req); err != nil {
		res.Error = err.Error()
	}
	if err := json.NewEncoder(out).Encode(res); err != nil || res.Error != "" {
		return 1
	}
	return 0
}

// launch creates the container. What it starts belongs, from its exit on, to
// the supervisor, its sub-reaper.
func launch(req launchRequest) (launchResult, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return launchResult{}, err
	}
	if req.Spec != nil {
		l := home(req.Home).instance(req.Spec.ID)
		if err := writeSpec(ociSpec(*req.Spec, l), l); err != nil {
			return launchResult{}, err
		}
		req.Flags = append(engineFlags(l, req.Debug), shortFlag())
	}
	con, err := openConsoleEnd(req.Console)
	if err != nil {
		return launchResult{}, err
	}
	// gVisor gives the guest the standard files of the process that creates it.
	os.Stdin, os.Stdout, os.Stderr = null, con, con
	unix.Umask(0)
	// Inherited by everything the engine forks, before and after Start.
	if err := os.WriteFile("/proc/self/oom_score_adj", fmt.Append(nil, guestOOMScore), 0); err != nil {
		return launchResult{}, fmt.Errorf("setting the OOM score: %w", err)
	}
	conf, err := engineConfig(req.Flags)
	if err != nil {
		return launchResult{}, err
	}
	conf.IgnoreCgroups = req.InCgroup
	spec, err := specutils.ReadSpec(req.Bundle, conf)
	if err != nil {
		return launchResult{}, err
	}
	c, err := container.New(conf, container.Args{ID: req.ID, Spec: spec, BundleDir: req.Bundle})
	if err != nil {
		return launchResult{}, err
	}
	return launchResult{Sentry: c.Sandbox.Getpid(), Gofer: c.GoferPid.Load()}, nil
}

// launcher is a launcher process that waits for its request, or works on it.
type launcher struct {
	exe    string // its program
	cmd    *exec.Cmd
	group  cgroup   // that it is in; "" if that is left to gVisor
	in     *os.File // the request goes here; closing it unused ends the launcher
	out    *os.File // the results come from here
	dec    *json.Decoder
	exited chan struct{}
	err    error // of its end, once exited is closed
}

// ownExe is the program that runs.
const ownExe = "/proc/self/exe"

// startLauncher starts a launcher, and moves it into a cgroup unless that is "".
func startLauncher(r *reaper, group cgroup, exe string) (*launcher, error) {
	l := &launcher{exe: exe, group: group, exited: make(chan struct{})}
	started := make(chan error)
	go func() {
		defer close(l.exited)
		// When we die the launcher must not go on: the next supervisor removes
		// what it finds, and this one would make more. The signal is sent when
		// the thread that forked ends, so this thread stays for as long.
		goruntime.LockOSThread()
		defer goruntime.UnlockOSThread()
		err := l.start(r)
		started <- err
		if err == nil {
			l.err = l.cmd.Wait()
			r.disown(l.cmd.Process.Pid)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting the launcher: %w", err)
	}
	if group == "" {
		return l, nil
	}
	var res launchResult
	err := l.dec.Decode(&res)
	if err == nil && res.Error != "" {
		err = errors.New(res.Error)
	}
	if err != nil {
		l.close()
		return nil, fmt.Errorf("moving the launcher into its cgroup: %w", err)
	}
	return l, nil
}

func (l *launcher) start(r *reaper) error {
	inR, inW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer inR.Close()
	outR, outW, err := os.Pipe()
	if err != nil {
		inW.Close()
		return err
	}
	defer outW.Close()
	l.in, l.out, l.dec = inW, outR, json.NewDecoder(outR)
	l.cmd = exec.Command(l.exe)
	l.cmd.Args, l.cmd.Env, l.cmd.Dir = []string{arg0Launch}, []string{}, "/"
	if l.group != "" {
		l.cmd.Args = append(l.cmd.Args, string(l.group))
	}
	l.cmd.Stdin = inR
	l.cmd.ExtraFiles = []*os.File{outW}
	l.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	if err := r.start(l.cmd); err != nil {
		l.in.Close()
		l.out.Close()
		return err
	}
	return nil
}

// close ends a launcher that has no request, and waits for it.
func (l *launcher) close() {
	l.in.Close()
	<-l.exited
	l.out.Close()
}

// run hands the launcher its request and waits for the result. It can be done
// once. When ctx ends, the launcher is killed.
func (l *launcher) run(ctx context.Context, req launchRequest) (launchResult, error) {
	defer l.out.Close()
	stop := context.AfterFunc(ctx, func() { _ = l.cmd.Process.Kill() })
	defer stop()
	werr := json.NewEncoder(l.in).Encode(req)
	l.in.Close()
	var res launchResult
	err := l.dec.Decode(&res) // or the end of the launcher: what it starts does not inherit the pipe
	if ctx.Err() != nil {
		<-l.exited
		return launchResult{}, context.Cause(ctx)
	}
	if err != nil {
		<-l.exited
		return launchResult{}, fmt.Errorf("the launcher ended without a result (%v; request: %v)", l.err, werr)
	}
	if res.Error != "" {
		return launchResult{}, fmt.Errorf("creating the container: %s", strings.TrimSpace(res.Error))
	}
	return res, nil
}

// spareMax is how many launchers wait for a request.
const spareMax = 2

// spareAfter is how long the processors are left to the guest that took a
// spare launcher, and now boots, as long as another one is there.
const spareAfter = 250 * time.Millisecond

// sparePrefix begins the names of the cgroups of spare launchers, which are
// beside those of the instances.
const sparePrefix = "spare-"

// takeLauncher returns a launcher that waits for a request, a spare one if there
// is one: that saves the start of a large binary, and where it is slow, under
// cgroup v1, also its way into a cgroup. On v1 the launcher is in the cgroup
// group, with the limits of res.
func (s *Supervisor) takeLauncher(group cgroup, res *specs.LinuxResources) (*launcher, error) {
	s.mu.Lock()
	var l *launcher
	if n := len(s.spares); n > 0 {
		l, s.spares = s.spares[n-1], s.spares[:n-1]
		s.lastTaken = s.now()
	}
	s.mu.Unlock()
	if l != nil {
		if err := s.giveGroup(l, group, res); err == nil {
			return l, nil
		} else if l.alive() {
			s.log.Warn("a spare launcher cannot be used", "err", err)
		}
		s.dropLauncher(l)
	}
	return startLauncher(s.reaper, "", ownExe)
}

// giveGroup makes the cgroup of a spare launcher the one of an instance.
func (s *Supervisor) giveGroup(l *launcher, group cgroup, res *specs.LinuxResources) error {
	if !l.alive() {
		return errGone
	}
	if l.group == "" {
		return nil
	}
	if err := l.group.limit(res); err != nil {
		return err
	}
	if err := l.group.rename(group); err != nil {
		_ = group.rename(l.group) // some hierarchies may have it
		return err
	}
	l.group = group
	return nil
}

// alive reports whether nobody has killed the launcher.
func (l *launcher) alive() bool {
	select {
	case <-l.exited:
		return false
	default:
		return true
	}
}

// dropLauncher ends a launcher that has no request, and removes its cgroup.
func (s *Supervisor) dropLauncher(l *launcher) {
	l.close()
	if l.group != "" {
		s.removeGroup(l.group)
	}
}

// newSpare starts a spare launcher, under cgroup v1 in a cgroup of its own.
func (s *Supervisor) newSpare() (*launcher, error) {
	if unified() {
		return startLauncher(s.reaper, "", ownExe)
	}
	s.mu.Lock()
	taken := map[cgroup]bool{}
	for _, o := range s.spares {
		taken[o.group] = true
	}
	s.mu.Unlock()
	g := s.spareGroup(0)
	for n := 1; taken[g]; n++ {
		g = s.spareGroup(n)
	}
	err := g.make()
	if err == nil {
		var l *launcher
		if l, err = startLauncher(s.reaper, g, ownExe); err == nil {
			return l, nil
		}
	}
	s.log.Warn("cgroups are left to gVisor", "err", err)
	s.removeGroup(g)
	return startLauncher(s.reaper, "", ownExe)
}

func (s *Supervisor) spareGroup(n int) cgroup {
	return cgroup(filepath.Join(s.home.cgroupParent(), sparePrefix+strconv.Itoa(n)))
}

// removeGroup removes the cgroup of a spare launcher.
func (s *Supervisor) removeGroup(g cgroup) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := errors.Join(g.killAll(ctx), g.remove(ctx)); err != nil {
		s.log.Warn("the cgroup of a spare launcher could not be removed", "err", err)
	}
}

// keepSpares keeps launchers spare until ctx ends.
func (s *Supervisor) keepSpares(ctx context.Context) {
	for {
		s.mu.Lock()
		have, since := len(s.spares), s.now().Sub(s.lastTaken)
		s.mu.Unlock()
		var later <-chan time.Time
		switch {
		case have >= spareMax:
			if d := s.keepEngines(ctx); d > 0 {
				later = time.After(d)
			}
			if s.fewLaunchers() { // one became an engine
				continue
			}
		case have > 0 && since < spareAfter:
			later = time.After(spareAfter - since)
		default:
			if l, err := s.newSpare(); err != nil {
				s.log.Warn("no spare launcher", "err", err)
				later = time.After(time.Second)
			} else {
				s.mu.Lock()
				s.spares = append(s.spares, l)
				s.mu.Unlock()
				continue
			}
		}
		select {
		case <-s.wantSpare:
		case <-later:
		case <-ctx.Done():
			s.dropEngines()
			s.mu.Lock()
			spares := s.spares
			s.spares = nil
			s.mu.Unlock()
			for _, l := range spares {
				s.dropLauncher(l)
			}
			return
		}
	}
}

// fewLaunchers reports whether launchers are missing.
func (s *Supervisor) fewLaunchers() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.spares) < spareMax
}

// removeSpareGroups removes the spare cgroups of a dead supervisor, and ends the
// engines in them. Its launchers died with it.
func (s *Supervisor) removeSpareGroups() {
	seen := map[string]bool{}
	for _, h := range hierarchies() {
		ents, _ := os.ReadDir(filepath.Join(h, s.home.cgroupParent())) // none was made
		for _, e := range ents {
			if name := e.Name(); e.IsDir() && strings.HasPrefix(name, sparePrefix) && !seen[name] {
				seen[name] = true
				s.removeGroup(cgroup(filepath.Join(s.home.cgroupParent(), name)))
			}
		}
	}
}
