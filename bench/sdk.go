package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// sdkVersion is the release of the official JavaScript client that is measured.
const sdkVersion = "2.51.0"

// installSDK makes sure of the client and returns the file to import. The tests
// use the same installation, from the lock file beside it.
func installSDK(ctx context.Context, repo string) (string, error) {
	dir := filepath.Join(repo, "test", "sdk", "js-2.51")
	manifest := filepath.Join(dir, "node_modules", "e2b", "package.json")
	installed := func() (string, error) {
		b, err := os.ReadFile(manifest)
		if err != nil {
			return "", err
		}
		var p struct{ Version, Module string }
		if err := json.Unmarshal(b, &p); err != nil {
			return "", err
		}
		if p.Version != sdkVersion {
			return "", fmt.Errorf("%s is of version %s, want %s", manifest, p.Version, sdkVersion)
		}
		return filepath.Join(filepath.Dir(manifest), p.Module), nil
	}
	if file, err := installed(); err == nil {
		return file, nil
	}
	cmd := exec.CommandContext(ctx, "npm", "ci", "--no-audit", "--no-fund", "--loglevel=error")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("installing the JavaScript client: %w\n%s", err, out)
	}
	return installed()
}

// sdk is a program that uses the client, one for a whole run, so that its own
// start is not in the figures.
type sdk struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// startSDK starts the program against a server.
func startSDK(repo, module string, s *server) (*sdk, error) {
	cmd := exec.Command("node", filepath.Join(repo, "bench", "sdk.mjs"), module)
	cmd.Env = environ("E2B_API_KEY="+s.key, "E2B_API_URL="+s.api, "E2B_SANDBOX_URL="+s.proxy)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it ends when its input does
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the JavaScript client: %w", err)
	}
	return &sdk{cmd: cmd, in: in, out: bufio.NewReader(out)}, nil
}

// sdkRound is what the client took, in milliseconds.
type sdkRound struct {
	Create, First, Kill float64
	Runs                []float64
	Error               string
}

func (s *sdk) round() (sdkRound, error) {
	var r sdkRound
	if _, err := io.WriteString(s.in, "go\n"); err != nil {
		return r, fmt.Errorf("asking the JavaScript client: %w", err)
	}
	line, err := s.out.ReadBytes('\n')
	if err != nil {
		return r, fmt.Errorf("reading from the JavaScript client: %w", err)
	}
	if err := json.Unmarshal(line, &r); err != nil {
		return r, fmt.Errorf("reading from the JavaScript client: %w: %s", err, line)
	}
	if r.Error != "" {
		return r, errors.New("the JavaScript client: " + r.Error)
	}
	return r, nil
}

func (s *sdk) close() error {
	s.in.Close()
	stop := time.AfterFunc(10*time.Second, func() { _ = s.cmd.Process.Kill() })
	defer stop.Stop()
	return s.cmd.Wait()
}
