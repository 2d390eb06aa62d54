package template

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cayhq/cay"
)

// bootstrap makes a Debian system in dir with mmdebstrap.
func (b *Builder) bootstrap(ctx context.Context, r Recipe, dir string, rep *reporter) error {
	tool, err := exec.LookPath("mmdebstrap")
	if err != nil {
		return &cay.Error{Code: cay.CodeTemplateBuild, Layer: cay.LayerTemplate,
			Message: "the program mmdebstrap is missing; it makes the base system of templates",
			Fix:     "install it: apt-get install mmdebstrap", Err: err}
	}
	setup := dir + ".setup.sh"
	if err := os.WriteFile(setup, r.setup, 0o700); err != nil {
		return buildError("write the setup script", err, nil)
	}
	defer os.Remove(setup)
	args := []string{"--variant=minbase", "--mode=root", "--format=directory", "--verbose",
		"--architectures=" + debianArch(), "--include=" + strings.Join(r.packages, ","),
		// setup.sh cleans up itself; what it leaves in /tmp and /run is meant.
		"--skip=cleanup/tmp", "--skip=cleanup/run",
		"--aptopt=Acquire::Languages \"none\"", "--aptopt=Acquire::Retries \"3\"", "--dpkgopt=force-unsafe-io"}
	for _, p := range r.Exclude {
		args = append(args, "--dpkgopt=path-exclude="+p)
	}
	for _, p := range r.Include {
		args = append(args, "--dpkgopt=path-include="+p)
	}
	for _, o := range hostAptOptions(ctx) {
		args = append(args, "--aptopt="+o)
	}
	name := filepath.Base(setup)
	args = append(args,
		"--customize-hook=copy-in "+shellQuote(setup)+" /tmp",
		`--customize-hook=chroot "$1" /bin/sh /tmp/`+shellQuote(name),
		`--customize-hook=rm "$1"/tmp/`+shellQuote(name),
		r.Suite, dir)
	args = append(args, aptSources(ctx, r)...)

	cmd := exec.CommandContext(ctx, tool, args...)
	// Its own group: a cancelled build ends apt and dpkg too.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	// A locale that the new system does not have makes perl complain.
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive",
		"SOURCE_DATE_EPOCH="+strconv.FormatInt(b.now().Unix(), 10))
	pr, pw := io.Pipe()
	cmd.Stdout, cmd.Stderr = pw, pw
	watch := newWatcher(rep)
	done := make(chan struct{})
	go func() {
		defer close(done)
		sc := bufio.NewScanner(pr)
		sc.Buffer(nil, 1<<20)
		sc.Split(splitLines)
		for sc.Scan() {
			watch.line(sc.Text())
		}
		_, _ = io.Copy(io.Discard, pr) // a line too long must not block the program
	}()
	// Pdeathsig is bound to the thread that starts the child.
	runtime.LockOSThread()
	err = cmd.Run()
	runtime.UnlockOSThread()
	pw.Close()
	<-done
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return buildError("make the base system with mmdebstrap", err, watch.tail)
	}
	return nil
}

// splitLines splits at newlines and carriage returns, which progress bars use.
func splitLines(data []byte, eof bool) (int, []byte, error) {
	for i, c := range data {
		if c == '\n' || c == '\r' {
			return i + 1, data[:i], nil
		}
	}
	if eof && len(data) > 0 {
		return len(data), data, nil
	}
	return 0, nil, nil
}

func debianArch() string {
	if runtime.GOARCH == "386" {
		return "i386"
	}
	return runtime.GOARCH // amd64, arm64, riscv64, ppc64el differs and is not supported
}

func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// The steps of a build.
const (
	stepLists = iota + 1
	stepEssential
	stepPackages
	stepSetup
	stepImage
	stepAgent
	stepVerify
)

var buildSteps = []string{"reading package lists", "installing the essential system", "installing packages",
	"setting up the system", "making the image", "adding the agent", "verifying: boot, command, file"}

// watcher makes progress out of what mmdebstrap, apt and dpkg print.
type watcher struct {
	rep             *reporter
	total           int
	fetched, staged int
	set             int
	tail            []string
}

// tailLines is how much of the output an error shows.
const tailLines = 40

var newlyInstalled = regexp.MustCompile(`(\d+) newly installed`)

func newWatcher(rep *reporter) *watcher { return &watcher{rep: rep} }

func (w *watcher) line(s string) {
	s = strings.TrimRight(s, " \t")
	if s == "" {
		return
	}
	if w.tail = append(w.tail, s); len(w.tail) > tailLines {
		w.tail = w.tail[1:]
	}
	w.rep.line(s)
	enter := func(step int) {
		if w.rep.step == step {
			return
		}
		w.rep.begin(step)
		w.total, w.fetched, w.staged, w.set = 0, 0, 0, 0
	}
	switch {
	case strings.HasPrefix(s, "I: running apt-get update"):
		enter(stepLists)
	case strings.HasPrefix(s, "I: downloading packages with apt"):
		enter(stepEssential)
	case strings.HasPrefix(s, "I: installing remaining packages"):
		enter(stepPackages)
	case strings.HasPrefix(s, "I: running special hook"), strings.HasPrefix(s, "I: running --customize-hook"):
		enter(stepSetup)
	}
	if w.rep.step != stepEssential && w.rep.step != stepPackages {
		return
	}
	switch {
	case newlyInstalled.MatchString(s):
		w.total, _ = strconv.Atoi(newlyInstalled.FindStringSubmatch(s)[1])
	case strings.HasPrefix(s, "Get:"):
		w.fetched++
		w.rep.count(w.fetched, w.total, "packages fetched")
	case strings.HasPrefix(s, "Unpacking "):
		w.staged++
		w.rep.count(w.staged, w.total, "packages unpacked")
	case strings.HasPrefix(s, "Setting up "):
		w.set++
		w.rep.count(w.set, w.total, "packages set up")
	}
}

// buildError types a failed step; tail is the output of the program that
// failed.
func buildError(what string, err error, tail []string) error {
	var e *cay.Error
	if errors.As(err, &e) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%s: %w", what, err)
	}
	out := &cay.Error{Code: cay.CodeTemplateBuild, Layer: cay.LayerTemplate,
		Message: "could not " + what + ": " + err.Error(), Fix: "see the last lines of its output below and in the log", Err: err}
	if errors.Is(err, syscall.ENOSPC) {
		out.Code, out.Fix = cay.CodeDiskFull, "free space on the file system of the data directory"
	}
	if len(tail) > 0 {
		text := strings.Join(tail, "\n")
		out.Detail = map[string]string{"output": text}
		// The first error names the cause; what follows it is mostly noise.
		if i := slices.IndexFunc(tail, func(s string) bool { return strings.HasPrefix(s, "E: ") || strings.HasPrefix(s, "Err:") }); i >= 0 {
			out.Message += " (" + tail[i] + ")"
		}
		for _, c := range []struct{ pattern, fix string }{
			{"No space left on device", "free space on the file system of the data directory"},
			{"Could not resolve", "the mirror's name does not resolve: check the host's name servers, or set a proxy or a mirror for apt"},
			{"Unable to locate package", "a package of the recipe is not in the suite: correct the recipe's list"},
			{"NO_PUBKEY", "install the keys of the suite: apt-get install debian-archive-keyring"},
			{"Failed to fetch", "the mirror cannot be reached: check the network, apt's proxy settings, or try again"},
			{"Could not connect", "the mirror cannot be reached: check the network, apt's proxy settings, or try again"},
		} {
			if strings.Contains(text, c.pattern) {
				out.Fix = c.fix
				if c.pattern == "No space left on device" {
					out.Code = cay.CodeDiskFull
				}
				break
			}
		}
	}
	return out
}
