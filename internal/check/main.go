// Command check runs everything that must pass before a commit, quick things
// first, and counts what it ran. `make test` is this.
//
// A skipped test is a failure, unless skips.go has a reason for it: what does
// not run proves nothing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	nightly := flag.Bool("nightly", false, "more seeds, repetitions and fuzzing")
	only := flag.String("only", "", "run only these stages, separated by commas")
	flag.Parse()
	if signal.Ignored(syscall.SIGHUP) {
		// Under nohup: what we start would inherit that, and tests of
		// terminals would wait for a hang-up that nobody gets. A handler is
		// not inherited.
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c := &check{out: os.Stdout, nightly: *nightly, now: time.Now}
	if err := c.run(ctx, c.stages(), *only); err != nil {
		fmt.Fprintln(os.Stderr, "check:", err)
		stop()
		os.Exit(1)
	}
}

// check is one run.
type check struct {
	out     io.Writer
	nightly bool
	now     func() time.Time
	tally   Tally
}

// stage is one thing that must pass.
type stage struct {
	name string
	does string
	run  func(context.Context) error
	// more: the stages after it are worth running even if it fails.
	more bool
}

// errFailed is a failure that was shown already.
var errFailed = errors.New("failed")

// run runs the stages in their order and prints a line for each at the end,
// what failed once more, and the count of tests in the last line.
func (c *check) run(ctx context.Context, stages []stage, only string) error {
	if only != "" {
		names := strings.Split(only, ",")
		for _, n := range names {
			if !slices.ContainsFunc(stages, func(s stage) bool { return s.name == n }) {
				return fmt.Errorf("there is no stage %q", n)
			}
		}
		stages = slices.DeleteFunc(stages, func(s stage) bool { return !slices.Contains(names, s.name) })
	}
	var lines, failed []string
	began := c.now()
	for _, s := range stages {
		if ctx.Err() != nil {
			break
		}
		fmt.Fprintf(c.out, "\n=== %s: %s\n", s.name, s.does)
		start := c.now()
		err := s.run(ctx)
		word := "ok"
		if err != nil {
			word = "FAILED"
			failed = append(failed, s.name)
			if !errors.Is(err, errFailed) {
				fmt.Fprintln(c.out, err)
			}
		}
		lines = append(lines, fmt.Sprintf("%-10s %-7s %7.1fs  %s", s.name, word, c.now().Sub(start).Seconds(), s.does))
		if err != nil && !s.more {
			break
		}
	}
	fmt.Fprintf(c.out, "\n=== summary, %s in all\n%s\n", c.now().Sub(began).Round(time.Second), strings.Join(lines, "\n"))
	c.tally.explain(c.out)
	c.tally.digest(c.out)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(c.out, "interrupted")
	case len(failed) > 0:
		fmt.Fprintf(c.out, "failed: %s\n", strings.Join(failed, ", "))
	}
	fmt.Fprintln(c.out, c.tally.String())
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case len(failed) > 0:
		return errors.New(strings.Join(failed, ", ") + " failed")
	}
	return nil
}
