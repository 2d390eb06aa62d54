package gvisor

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/cayhq/cay/runtime"
)

// Bare is a guest run by gVisor's own command line, with the flags and the spec
// a [Runtime] would use and the same program: the yardstick of benchmarks. No
// supervisor knows of it, and nothing is done ahead or in another way than
// gVisor does it by itself.
type Bare struct {
	// Exe is the program; "" is the one we are.
	Exe string

	home  home
	spec  runtime.Spec
	flags []string
	l     layout
}

// NewBare writes the bundle of a guest below dir, a directory of its own.
func NewBare(dir string, s runtime.Spec) (*Bare, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("finding the directory: %w", err)
	}
	b := &Bare{home: home(dir), spec: s, l: home(dir).instance(s.ID)}
	b.flags = engineFlags(b.l, "")
	if err := checkSpec(s, b.l); err != nil {
		return nil, err
	}
	for _, d := range []string{b.l.engineRoot, b.home.shared()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("making the bundle: %w", err)
		}
	}
	if err := keepTmpOnDisk(s.RootFS); err != nil {
		return nil, err
	}
	if err := writeSpec(ociSpec(s, b.l), b.l); err != nil {
		return nil, err
	}
	return b, nil
}

// command is `runsc FLAGS args…`.
func (b *Bare) command(ctx context.Context, args ...string) *exec.Cmd {
	exe := b.Exe
	if exe == "" {
		exe = arg0Exe
	}
	cmd := exec.CommandContext(ctx, exe, append(append([]string{}, b.flags...), args...)...)
	cmd.Args[0] = "runsc"
	return cmd
}

// Run is `runsc run --detach`; it returns when the guest runs. The guest's
// output goes to out.
func (b *Bare) Run(ctx context.Context, out *os.File) error {
	cmd := b.command(ctx, "run", "--detach", "--bundle", b.l.dir, string(b.spec.ID))
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("runsc run: %w", err)
	}
	return nil
}

// Exec is `runsc exec`: it returns when the program in the guest has ended.
func (b *Bare) Exec(ctx context.Context, args ...string) error {
	if out, err := b.command(ctx, append([]string{"exec", string(b.spec.ID)}, args...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("runsc exec: %w: %s", err, out)
	}
	return nil
}

// Delete is `runsc delete --force`.
func (b *Bare) Delete(ctx context.Context) error {
	if out, err := b.command(ctx, "delete", "--force", string(b.spec.ID)).CombinedOutput(); err != nil {
		return fmt.Errorf("runsc delete: %w: %s", err, out)
	}
	return nil
}

// Close removes the bundle and what gVisor shares between the guests of dir.
func (b *Bare) Close() error {
	(&Supervisor{home: b.home, log: discardLogger}).cleanHost()
	return os.RemoveAll(b.l.dir)
}
