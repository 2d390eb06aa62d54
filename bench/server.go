package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// server is a real Cay with a data directory of its own.
type server struct {
	bin, dir string
	pool     int

	// Known when it is ready.
	api, proxy, key, admin string
	ready                  time.Duration // how long the last start took

	cmd  *exec.Cmd
	done chan struct{} // closed when cmd has ended
	log  logFile
}

// imageEnv names a system image for the base template, which saves building
// one.
const imageEnv = "CAY_BASE_IMAGE"

// environ is ours without what points a program at the user's own Cay.
func environ(more ...string) []string {
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "CAY_") && !strings.HasPrefix(e, "E2B_") {
			env = append(env, e)
		}
	}
	return append(env, more...)
}

// up starts the server and returns when it says that it is ready. The first
// start of a directory makes the base template, of image if that is not empty.
func (s *server) up(ctx context.Context, image string) error {
	if err := os.MkdirAll(s.dir, 0o711); err != nil {
		return err
	}
	s.log.path = s.dir + ".log"
	log, err := os.OpenFile(s.log.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(s.bin, "up", "--data-dir", s.dir, "--api-addr", "127.0.0.1:0", "--proxy-addr", "127.0.0.1:0",
		"--pool-size", strconv.Itoa(s.pool))
	cmd.Env = environ()
	if image != "" {
		cmd.Env = append(cmd.Env, imageEnv+"="+image)
	}
	cmd.Stderr = log
	// Its own session: a key that interrupts us must not end it before its
	// sandboxes are gone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", s.bin, err)
	}
	s.cmd, s.done = cmd, make(chan struct{})
	line := make(chan string, 1)
	go func(done chan struct{}) {
		defer close(done)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			if text, ok := strings.CutPrefix(sc.Text(), "ready "); ok {
				line <- text
			}
		}
		_ = cmd.Wait() // its status is kept in cmd
	}(s.done)
	select {
	case text := <-line:
		s.ready = time.Since(began)
		return s.learn(text)
	case <-s.done:
		return fmt.Errorf("`cay up` ended (%s) before it was ready:\n%s", cmd.ProcessState, s.log.tail())
	case <-ctx.Done():
		return errors.Join(ctx.Err(), s.signal(syscall.SIGKILL))
	}
}

// learn takes the addresses from the line that says ready, and the generated
// credentials from the data directory.
func (s *server) learn(text string) error {
	for f := range strings.FieldsSeq(text) {
		switch k, v, _ := strings.Cut(f, "="); k {
		case "api":
			s.api = v
		case "proxy":
			s.proxy = v
		}
	}
	b, err := os.ReadFile(filepath.Join(s.dir, "credentials.json"))
	if err != nil {
		return err
	}
	var c struct{ APIKey, AdminToken string }
	if err := json.Unmarshal(b, &c); err != nil {
		return fmt.Errorf("reading the generated credentials: %w", err)
	}
	s.key, s.admin = c.APIKey, c.AdminToken
	if s.api == "" || s.proxy == "" || s.key == "" {
		return fmt.Errorf("the server is ready but does not say where: %q", text)
	}
	return nil
}

// signal ends the server's process and nothing else.
func (s *server) signal(sig syscall.Signal) error {
	if s.cmd == nil || s.cmd.Process == nil {
		return nil
	}
	if err := s.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-s.done:
		return nil
	case <-time.After(20 * time.Second):
		return fmt.Errorf("the server did not end after %s", sig)
	}
}

// down ends the server, its sandboxes and everything of them on the host.
func (s *server) down() error { return down(s.bin, s.dir) }

func down(bin, dir string) error {
	cmd := exec.Command(bin, "down", "--data-dir", dir)
	cmd.Env = environ()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("`cay down --data-dir %s`: %w\n%s", dir, err, out)
	}
	return nil
}

// logFile is what servers of one directory wrote.
type logFile struct{ path string }

func (l logFile) tail() string {
	b, err := os.ReadFile(l.path)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-20):], []byte("\n")))
}
