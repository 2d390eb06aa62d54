package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/cayhq/cay"
)

// readyFDEnv names the environment variable by which a detached server learns
// the descriptor on which it reports progress and readiness to its parent.
const readyFDEnv = "CAY_READY_FD"

// The lines on that descriptor.
const (
	linePrefixProgress = "progress "
	linePrefixReady    = "ready "
	linePrefixError    = "error "
)

// reporter tells whoever waits for a starting server how it goes: a terminal
// for a server in the foreground, a pipe to the parent for a detached one.
type reporter struct {
	pipe *os.File  // nil in the foreground
	out  io.Writer // the ready line and the exports
	err  io.Writer // progress
}

// newReporter returns the reporter for this process. A detached child finds
// its pipe in the environment.
func newReporter(a *app) (*reporter, error) {
	v := os.Getenv(readyFDEnv)
	if v == "" {
		return &reporter{out: a.out, err: a.err}, nil
	}
	os.Unsetenv(readyFDEnv)
	fd, err := strconv.Atoi(v)
	if err != nil {
		return nil, fmt.Errorf("%s=%q is no descriptor: %w", readyFDEnv, v, err)
	}
	syscall.CloseOnExec(fd)
	// The kernel named this process after the link it was started by.
	_ = os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)
	return &reporter{pipe: os.NewFile(uintptr(fd), "ready"), out: io.Discard, err: io.Discard}, nil
}

func (r *reporter) progress(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if r.pipe != nil {
		fmt.Fprintln(r.pipe, linePrefixProgress+text) // a parent that left early wants no progress
		return
	}
	fmt.Fprintln(r.err, text)
}

// progressText passes lines that are formatted already.
func (r *reporter) progressText(text string) {
	for line := range strings.Lines(text) {
		r.progress("%s", strings.TrimRight(line, "\r\n"))
	}
}

// ready tells that the server answers; it is said once.
func (r *reporter) ready(s serverInfo) error {
	if r.pipe == nil {
		return nil
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	fmt.Fprintf(r.pipe, "%s%s\n", linePrefixReady, b)
	return r.pipe.Close()
}

// failed tells why the server did not start.
func (r *reporter) failed(err error) {
	if r.pipe == nil {
		return
	}
	var e *cay.Error
	if !errors.As(err, &e) {
		e = &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerHost, Message: err.Error()}
	}
	b, _ := json.Marshal(detachedError{Code: e.Code, Layer: e.Layer, Message: e.Message, Fix: e.Fix, Detail: e.Detail}) // strings always encode
	fmt.Fprintf(r.pipe, "%s%s\n", linePrefixError, b)
	r.pipe.Close()
}

// detachedError is a cay.Error on the pipe.
type detachedError struct {
	Code    cay.Code          `json:"code"`
	Layer   cay.Layer         `json:"layer"`
	Message string            `json:"message"`
	Fix     string            `json:"fix"`
	Detail  map[string]string `json:"detail"`
}

// detach starts this program again as a server of its own session, shows its
// progress, and returns when it is ready or has failed.
func (a *app) detach(args []string, logFile string) (serverInfo, error) {
	var info serverInfo
	rd, wr, err := os.Pipe()
	if err != nil {
		return info, fmt.Errorf("making the pipe to the server: %w", err)
	}
	defer rd.Close()
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		wr.Close()
		return info, errDataDir(logFile, err)
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), readyFDEnv+"=3")
	cmd.ExtraFiles = []*os.File{wr}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		wr.Close()
		return info, fmt.Errorf("starting the server: %w", err)
	}
	wr.Close()
	sc := bufio.NewScanner(rd)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := sc.Text()
		switch {
		case strings.HasPrefix(line, linePrefixProgress):
			fmt.Fprintln(a.err, strings.TrimPrefix(line, linePrefixProgress))
		case strings.HasPrefix(line, linePrefixReady):
			if err := json.Unmarshal([]byte(strings.TrimPrefix(line, linePrefixReady)), &info); err != nil {
				return info, fmt.Errorf("reading the server's answer: %w", err)
			}
			return info, cmd.Process.Release()
		case strings.HasPrefix(line, linePrefixError):
			var e detachedError
			if err := json.Unmarshal([]byte(strings.TrimPrefix(line, linePrefixError)), &e); err != nil {
				return info, fmt.Errorf("reading the server's error: %w", err)
			}
			_ = cmd.Wait() // its error is the one it has just told
			return info, &cay.Error{Code: e.Code, Layer: e.Layer, Message: e.Message, Fix: e.Fix, Detail: e.Detail}
		}
	}
	state := "it ended without a word"
	if err := cmd.Wait(); err != nil {
		state = err.Error()
	}
	return info, &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerHost,
		Message: "the server did not become ready: " + state,
		Fix:     "read its log: " + logFile}
}
