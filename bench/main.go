// Command bench measures Cay: how long sandboxes take to be made, to answer and
// to go, and what they cost, beside yardsticks of the same run: gVisor's own
// command line with the same image and configuration, and envd as a process of
// this machine.
//
//	make bench                       about 20 minutes, as root
//	go run ./bench -quick            a few minutes: too short to promise anything
//
// It starts the real bin/cay on private data directories below /var/tmp, prints
// a table, and keeps the figures as JSON in bench/results. Times are taken with
// kept-alive connections on the loopback device.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/runtime/gvisor"
)

func main() {
	gvisor.Dispatch() // the yardstick is this binary
	isQuick := flag.Bool("quick", false, "take few rounds")
	rounds := flag.Int("rounds", 0, "how often to measure what is measured in turn (default 100; quick 10)")
	only := flag.String("only", "", "measure this part alone: "+strings.Join(alone, ", "))
	check := flag.Bool("check", false, "exit with status 3 if a promised figure is missed")
	results := flag.String("results", "", "directory for the JSON (default bench/results)")
	flag.Parse()
	o := full
	if *isQuick {
		o = quick
	}
	if *rounds > 0 {
		o.rounds = *rounds
	}
	if o.only = *only; o.only != "" && !slices.Contains(alone, o.only) {
		fmt.Fprintf(os.Stderr, "bench: there is no part %q to measure alone; there are %s\n", o.only, strings.Join(alone, ", "))
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	rep, err := bench(ctx, o, *isQuick, *results)
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	case *check && rep.missed() > 0:
		os.Exit(3)
	}
}

// workParent holds the data directories: on a disk, as they would be, and with
// a path short enough for the engine's sockets.
const (
	workParent = "/var/tmp"
	workPrefix = "cay-b-"
)

func bench(ctx context.Context, o options, isQuick bool, results string) (rep Report, err error) {
	began := time.Now()
	if os.Geteuid() != 0 {
		return rep, errors.New("sandboxes need root: run it with sudo")
	}
	repo, err := findRepo()
	if err != nil {
		return rep, err
	}
	if results == "" {
		results = filepath.Join(repo, "bench", "results")
	}
	r := &run{options: o, repo: repo, cay: filepath.Join(repo, "bin", "cay"), envd: filepath.Join(repo, "bin", "envd"),
		say: os.Stderr, book: book{}, figures: map[string]Figure{}}
	for _, bin := range []string{r.cay, r.envd} {
		if _, err := os.Stat(bin); err != nil {
			return rep, fmt.Errorf("the program to measure is missing, run `make build`: %w", err)
		}
	}
	if err := removeStale(ctx, r.cay); err != nil {
		return rep, fmt.Errorf("removing what a killed run left: %w", err)
	}
	rep = Report{Format: 1, At: began.UTC().Truncate(time.Second), Commit: findCommit(repo), Quick: isQuick}
	if rep.Machine, err = describeMachine(); err != nil {
		return rep, err
	}
	if rep.Load, err = measureLoad(); err != nil {
		return rep, err
	}
	rep.Versions = findVersions(r.cay, sdkVersion)
	r.work = filepath.Join(workParent, workPrefix+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(r.work, 0o711); err != nil {
		return rep, err
	}
	r.yard = newYard(filepath.Join(r.work, "y"), yardTag(os.Getpid()))
	if err := errors.Join(r.measure(ctx), removeWork(r.work)); err != nil {
		return rep, err
	}
	rep.Series, rep.Figures = r.book.summaries(), r.figures
	rep.Targets = judge(outcome{series: rep.Series, figures: rep.Figures, cores: rep.Machine.Cores})
	if rep.LoadEnd, err = loadAverage(); err != nil {
		return rep, err
	}
	rep.Took = round(time.Since(began).Seconds())
	path, err := rep.save(results)
	if err != nil {
		return rep, err
	}
	rep.print(os.Stdout)
	fmt.Printf("\nkept in %s\n", path)
	return rep, nil
}

// yardTag marks the network objects of the yardstick of a run.
func yardTag(pid int) string { return "b" + strconv.Itoa(pid%10_000_000) }

// removeStale removes what runs have left that were killed.
func removeStale(ctx context.Context, cay string) error {
	dirs, err := filepath.Glob(filepath.Join(workParent, workPrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), workPrefix))
		if err != nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue // somebody's own, or of a run under way
		}
		for _, name := range []string{"a", "b"} {
			if err := down(cay, filepath.Join(dir, name)); err != nil {
				return err
			}
		}
		y := newYard(filepath.Join(dir, "y"), yardTag(pid))
		if _, err := os.Stat(y.dir); err == nil {
			if err := y.close(ctx); err != nil {
				return err
			}
		}
		if err := removeWork(dir); err != nil {
			return err
		}
	}
	return nil
}

// removeWork removes the directories of a run, unless something is mounted
// there: through a mount, more than the directory would go.
func removeWork(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			return fmt.Errorf("%s is still mounted; unmount it and remove %s", f[4], dir)
		}
	}
	return os.RemoveAll(dir)
}

// findImage returns a system image for the base template: the user's, or the
// one that the whole-program tests keep; none if there is none.
func findImage(repo string) string {
	if image := os.Getenv(imageEnv); image != "" {
		return image
	}
	images, _ := filepath.Glob(filepath.Join(repo, ".cache", "base", "*.erofs")) // the pattern is well-formed
	newest, at := "", time.Time{}
	for _, path := range images {
		if st, err := os.Stat(path); err == nil && st.ModTime().After(at) {
			newest, at = path, st.ModTime()
		}
	}
	return newest
}

// largestFile returns the largest file below dir.
func largestFile(dir string) (path string, err error) {
	var size int64
	err = filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		st, err := e.Info()
		if err == nil && st.Size() > size {
			path, size = p, st.Size()
		}
		return err
	})
	if err == nil && path == "" {
		err = fmt.Errorf("%s holds no file", dir)
	}
	return path, err
}
