package main

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

// stages lists what is done, quickest first as far as one needs another.
func (c *check) stages() []stage {
	unit, engine, program := []string{"-timeout", "15m"}, []string{"-timeout", "15m"}, []string{"-p", "2", "-timeout", "20m"}
	if c.nightly {
		unit, engine, program = []string{"-timeout", "60m", "-count", "5"}, []string{"-timeout", "60m", "-count", "3"}, []string{"-p", "1", "-timeout", "80m", "-count", "1"}
	}
	out := []stage{
		{name: "format", does: "gofmt changes nothing", run: c.format},
		{name: "rules", does: "the rules of the architecture", run: func(ctx context.Context) error {
			return c.goTest(ctx, noRace, "./internal/lint", "./internal/check")
		}},
		{name: "generated", does: "internal/gen is what its sources make", run: func(ctx context.Context) error {
			return c.command(ctx, "make", "check-generated")
		}},
		{name: "build", does: "bin/cay and bin/envd", run: func(ctx context.Context) error {
			return c.command(ctx, "make", "build")
		}},
		{name: "budget", does: "static binaries within their sizes", run: c.budget},
		{name: "vet", does: "go vet", run: func(ctx context.Context) error {
			return c.command(ctx, "go", "vet", "./...")
		}},
		{name: "lint", does: "the linters of .golangci.yml", run: func(ctx context.Context) error {
			return c.command(ctx, "make", "lint")
		}},
		{name: "unit", does: "packages without the engine, with the race detector", more: true, run: func(ctx context.Context) error {
			p, err := packages(ctx)
			if err != nil {
				return err
			}
			return c.goTest(ctx, race, append(unit, p.unit...)...)
		}},
		{name: "engine", does: "packages with the engine", more: true, run: func(ctx context.Context) error {
			p, err := packages(ctx)
			if err != nil {
				return err
			}
			return c.goTest(ctx, noRace, append(engine, p.engine...)...)
		}},
		{name: "program", does: "the whole program, on machines of its own", more: true, run: func(ctx context.Context) error {
			p, err := packages(ctx)
			if err != nil {
				return err
			}
			return c.goTest(ctx, noRace, append(program, p.program...)...)
		}},
	}
	if c.nightly {
		out = append(out, stage{name: "fuzz", does: "every fuzz target for a minute", more: true, run: c.fuzz})
	}
	return out
}

// Whether to use the race detector, which needs cgo, with which gVisor cannot
// start itself.
const (
	race   = true
	noRace = false
)

// start prepares a command of which nothing is left when ctx ends.
func start(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	return cmd
}

// command runs a command whose output is for people.
func (c *check) command(ctx context.Context, name string, args ...string) error {
	cmd := start(ctx, name, args...)
	cmd.Stdout = c.out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return nil
}

// goTest runs `go test` and counts.
func (c *check) goTest(ctx context.Context, race bool, args ...string) error {
	all := []string{"test", "-json"}
	cgo := "CGO_ENABLED=0"
	if race {
		all = append(all, "-race")
		cgo = "CGO_ENABLED=1"
	}
	cmd := start(ctx, "go", append(all, args...)...)
	cmd.Env = append(os.Environ(), cgo)
	if c.nightly {
		cmd.Env = append(cmd.Env, "CAY_NIGHTLY=1")
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("running go test: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("running go test: %w", err)
	}
	ok, rerr := c.tally.read(out, c.out)
	if rerr != nil {
		_, _ = io.Copy(io.Discard, out) // go test must not block on what nobody reads
	}
	err = cmd.Wait()
	switch {
	case rerr != nil:
		return fmt.Errorf("reading what go test says: %w", rerr)
	case !ok:
		return errFailed
	case err != nil:
		return fmt.Errorf("go test: %w", err)
	}
	return nil
}

// format: gofmt would change nothing.
func (c *check) format(ctx context.Context) error {
	files, err := start(ctx, "git", "ls-files", "-co", "--exclude-standard", "*.go").Output()
	if err != nil {
		return fmt.Errorf("listing the source: %w", err)
	}
	names := slices.DeleteFunc(strings.Fields(string(files)), func(f string) bool {
		_, err := os.Stat(f)
		return err != nil // removed, and not committed yet
	})
	out, err := start(ctx, "gofmt", append([]string{"-l"}, names...)...).Output()
	if err != nil {
		return fmt.Errorf("running gofmt: %w", err)
	}
	if len(out) > 0 {
		return fmt.Errorf("gofmt -w would change:\n%s", out)
	}
	return nil
}

// budgets are the largest sizes of the binaries, in bytes.
var budgets = map[string]int64{"bin/cay": 110 << 20, "bin/envd": 12 << 20}

func (c *check) budget(context.Context) error {
	for _, name := range []string{"bin/cay", "bin/envd"} {
		size, err := staticSize(name)
		if err != nil {
			return err
		}
		fmt.Fprintf(c.out, "%s: %.1f of %d MiB\n", name, float64(size)/(1<<20), budgets[name]>>20)
		if size > budgets[name] {
			return fmt.Errorf("%s is larger than its budget", name)
		}
	}
	return nil
}

// staticSize returns the size of a program that needs no loader.
func staticSize(name string) (int64, error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, fmt.Errorf("measuring a binary: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("measuring a binary: %w", err)
	}
	e, err := elf.NewFile(f)
	if err != nil {
		return 0, fmt.Errorf("reading %s: %w", name, err)
	}
	for _, p := range e.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			return 0, fmt.Errorf("%s is not static: a sandbox and a bare machine have no loader for it", name)
		}
	}
	return st.Size(), nil
}

// groups are the packages that have tests, by how they are tested.
type groups struct{ unit, engine, program []string }

// packages asks go which packages there are and which link gVisor.
func packages(ctx context.Context) (groups, error) {
	cmd := start(ctx, "go", "list", "-test", "-f", `{{.ImportPath}}{{range .Deps}} {{.}}{{end}}`, "./...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		return groups{}, fmt.Errorf("listing the packages: %w", err)
	}
	return group(out), nil
}

// module is the path of the module, with a slash.
const module = "github.com/cayhq/cay/"

// group sorts the test programs that `go list -test` names, each on a line
// with its dependencies.
func group(list []byte) groups {
	var g groups
	for line := range bytes.Lines(list) {
		f := strings.Fields(string(line))
		if len(f) == 0 || !strings.HasSuffix(f[0], ".test") {
			continue
		}
		pkg := strings.TrimSuffix(f[0], ".test")
		in := strings.TrimPrefix(pkg, module)
		switch {
		case in == "internal/lint" || in == "internal/check":
			// stage rules
		case strings.HasPrefix(in, "test/"):
			g.program = append(g.program, pkg)
		case slices.ContainsFunc(f, func(d string) bool { return strings.HasPrefix(d, "gvisor.dev/") }):
			g.engine = append(g.engine, pkg)
		default:
			g.unit = append(g.unit, pkg)
		}
	}
	return g
}
