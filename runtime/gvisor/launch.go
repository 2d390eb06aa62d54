package gvisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	goruntime "runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/runsc/container"
	"gvisor.dev/gvisor/runsc/specutils"
)

// launchRequest is what a launcher reads from its standard input.
type launchRequest struct {
	ID      string   `json:"id"`
	Bundle  string   `json:"bundle"`
	Console string   `json:"console"` // the pipe
	Flags   []string `json:"flags"`
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
func launchMain() int {
	silenceEngineLog()
	out := os.NewFile(3, "result")
	var req launchRequest
	res := launchResult{}
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
	cmd    *exec.Cmd
	in     *os.File // the request goes here; closing it unused ends the launcher
	out    *os.File // the result comes from here
	exited chan struct{}
	err    error // of its end, once exited is closed
}

// startLauncher starts a launcher.
func startLauncher(r *reaper) (*launcher, error) {
	l := &launcher{exited: make(chan struct{})}
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
	l.in, l.out = inW, outR
	l.cmd = exec.Command("/proc/self/exe")
	l.cmd.Args, l.cmd.Env, l.cmd.Dir = []string{arg0Launch}, []string{}, "/"
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
	var raw bytes.Buffer
	_, _ = raw.ReadFrom(l.out) // ends with the launcher: what it starts does not inherit the pipe
	<-l.exited
	if ctx.Err() != nil {
		return launchResult{}, context.Cause(ctx)
	}
	var res launchResult
	if err := json.Unmarshal(raw.Bytes(), &res); err != nil {
		return launchResult{}, fmt.Errorf("the launcher ended without a result (%v; request: %v)", l.err, werr)
	}
	if res.Error != "" {
		return launchResult{}, fmt.Errorf("creating the container: %s", strings.TrimSpace(res.Error))
	}
	return res, nil
}

// takeLauncher returns a launcher that waits for a request: the spare one, if
// there is one, which saves the start of a large binary.
func (s *Supervisor) takeLauncher() (*launcher, error) {
	s.mu.Lock()
	l := s.spare
	s.spare = nil
	s.mu.Unlock()
	if l != nil {
		select {
		case <-l.exited: // somebody killed it
			l.close()
		default:
			return l, nil
		}
	}
	return startLauncher(s.reaper)
}

// keepSpare starts a spare launcher whenever wanted asks, until ctx ends.
func (s *Supervisor) keepSpare(ctx context.Context) {
	for {
		s.mu.Lock()
		have := s.spare != nil
		s.mu.Unlock()
		if !have {
			if l, err := startLauncher(s.reaper); err != nil {
				s.log.Warn("no spare launcher", "err", err)
			} else {
				s.mu.Lock()
				s.spare = l
				s.mu.Unlock()
			}
		}
		select {
		case <-s.wantSpare:
		case <-ctx.Done():
			s.mu.Lock()
			l := s.spare
			s.spare = nil
			s.mu.Unlock()
			if l != nil {
				l.close()
			}
			return
		}
	}
}
