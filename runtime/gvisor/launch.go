package gvisor

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
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
	ID     string   `json:"id"`
	Bundle string   `json:"bundle"`
	Flags  []string `json:"flags"`
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
// Its standard output and error are the guest's console, because gVisor gives
// the guest the standard files of the process that creates it.
func launchMain() int {
	silenceEngineLog()
	out := os.NewFile(3, "result")
	var req launchRequest
	res := launchResult{}
	if err := json.NewDecoder(os.Stdin).Decode(&req); err != nil {
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
	os.Stdin = null
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

// runLauncher starts a launcher for req with the given console and waits for
// its result. When ctx ends, the launcher is killed.
func runLauncher(ctx context.Context, r *reaper, req launchRequest, console *os.File) (launchResult, error) {
	in, err := json.Marshal(req)
	if err != nil {
		return launchResult{}, fmt.Errorf("encoding the launch request: %w", err)
	}
	rd, wr, err := os.Pipe()
	if err != nil {
		return launchResult{}, fmt.Errorf("opening the result pipe: %w", err)
	}
	defer rd.Close()
	// The request is small enough for a pipe's buffer, so nothing has to feed it.
	inR, inW, err := os.Pipe()
	if err != nil {
		wr.Close()
		return launchResult{}, fmt.Errorf("opening the request pipe: %w", err)
	}
	_, err = inW.Write(in)
	inW.Close()
	if err != nil {
		wr.Close()
		inR.Close()
		return launchResult{}, fmt.Errorf("writing the launch request: %w", err)
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{arg0Launch}
	cmd.Env = []string{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = inR, console, console
	cmd.ExtraFiles = []*os.File{wr}
	// When we die the launcher must not go on: the next supervisor removes what
	// it finds, and this one would make more. The signal is sent when the
	// thread that forked ends, so this thread stays until the launcher is done.
	goruntime.LockOSThread()
	defer goruntime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	err = r.start(cmd)
	inR.Close()
	wr.Close()
	if err != nil {
		return launchResult{}, fmt.Errorf("starting the launcher: %w", err)
	}
	defer r.forget(cmd)

	var res launchResult
	var raw bytes.Buffer
	_, _ = raw.ReadFrom(rd) // ends with the launcher: what it starts does not inherit the pipe
	werr := cmd.Wait()
	if ctx.Err() != nil {
		return launchResult{}, context.Cause(ctx)
	}
	if err := json.Unmarshal(raw.Bytes(), &res); err != nil {
		return launchResult{}, fmt.Errorf("the launcher ended without a result (%v)", werr)
	}
	if res.Error != "" {
		return launchResult{}, fmt.Errorf("creating the container: %s", strings.TrimSpace(res.Error))
	}
	return res, nil
}
