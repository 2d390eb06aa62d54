package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/envd/process"
	"github.com/cayhq/cay/internal/gen/envd/process/processconnect"
)

// Size is that of a terminal, in characters.
type Size struct{ Cols, Rows uint16 }

// Terminal is the terminal that a person sits at.
type Terminal interface {
	// Raw makes every key stroke go to us; restore undoes it.
	Raw() (restore func(), err error)
	Size() (Size, error)
	// Resized calls f when the size has changed, until stop is called.
	Resized(f func()) (stop func())
}

func (c *CLI) execCmd() *cobra.Command {
	var interactive, tty bool
	var user, dir string
	var env []string
	cmd := &cobra.Command{
		Use:     "exec [flags] SANDBOX -- COMMAND [ARG...]",
		Aliases: []string{"ex"},
		Short:   "Run a command in a sandbox",
		Long: `Runs a command in a sandbox, shows what it prints, and ends with its exit code.
A command that a signal ended gives 128 and the signal's number. Interrupting
ends the command in the sandbox too. With -t and no command it is a login shell.`,
		Example: `  cay sandbox exec ID -- python3 -c 'print(6*7)'
  cay sandbox exec -it ID -- bash
  tar c src | cay sandbox exec -i ID -- tar x -C /home/user
  cay sandbox exec -u root -w /root -e DEBUG=1 ID -- make install`,
		Args: func(cmd *cobra.Command, args []string) error {
			_, _, err := execArgs(args, tty)
			if err == nil && tty && c.InTerm == nil {
				err = errors.New("-t needs a terminal on standard input")
			}
			return err
		},
		ValidArgsFunction: c.firstSandboxID,
		RunE: func(cmd *cobra.Command, args []string) error {
			id, command, err := execArgs(args, tty)
			if err != nil {
				return err
			}
			envs, err := environment(env)
			if err != nil {
				return &UsageError{cmd.CommandPath(), err}
			}
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			s, err := client.Sandbox(cmd.Context(), id)
			if err != nil {
				return err
			}
			g := guest{id: s.SandboxID, user: user}
			if s.EnvdAccessToken != nil {
				g.token = *s.EnvdAccessToken
			}
			x := &execution{cli: c, guest: g, rpc: client.processes(g), tty: tty, stdin: interactive || tty}
			config := &process.ProcessConfig{Cmd: command[0], Args: command[1:], Envs: envs}
			if dir != "" {
				config.Cwd = &dir
			}
			status, err := x.run(cmd.Context(), config)
			if err != nil {
				return err
			}
			if status != 0 {
				return &ExitError{status}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the sandbox is the command's
	f.BoolVarP(&interactive, "interactive", "i", false, "give the command our standard input")
	f.BoolVarP(&tty, "tty", "t", false, "give the command a terminal")
	f.StringVarP(&user, "user", "u", "", "run as this user (default the template's)")
	f.StringVarP(&dir, "workdir", "w", "", "run in this directory (default the user's home)")
	f.StringArrayVarP(&env, "env", "e", nil, "set a variable, as NAME=value")
	return cmd
}

// execArgs takes sandbox and command apart.
func execArgs(args []string, tty bool) (id string, command []string, err error) {
	if len(args) == 0 {
		return "", nil, errors.New("name a sandbox")
	}
	id, command = args[0], args[1:]
	if len(command) > 0 && command[0] == "--" {
		command = command[1:]
	}
	if len(command) == 0 {
		if !tty {
			return "", nil, errors.New("name a command after the sandbox, as in: cay sandbox exec " + id + " -- ls")
		}
		command = []string{"/bin/bash", "-i", "-l"}
	}
	return id, command, nil
}

func environment(pairs []string) (map[string]string, error) {
	m := map[string]string{}
	for _, p := range pairs {
		name, value, found := strings.Cut(p, "=")
		if !found || name == "" {
			return nil, fmt.Errorf("-e %q is not NAME=value", p)
		}
		m[name] = value
	}
	return m, nil
}

// How long an interrupted command may take to end before it is killed, and
// after that before we leave.
const (
	graceOfInterrupt = 5 * time.Second
	graceOfKill      = 2 * time.Second
)

// execution is one command in a sandbox.
type execution struct {
	cli        *CLI
	guest      guest
	rpc        processconnect.ProcessClient
	tty, stdin bool
}

// run starts the command, carries its streams, and returns its exit code as a
// shell would say it.
func (x *execution) run(ctx context.Context, config *process.ProcessConfig) (int, error) {
	req := &process.StartRequest{Process: config, Stdin: &x.stdin}
	if x.tty {
		restore, err := x.cli.InTerm.Raw()
		if err != nil {
			return 0, fmt.Errorf("preparing the terminal: %w", err)
		}
		defer restore()
		size, err := x.cli.InTerm.Size()
		if err != nil {
			return 0, fmt.Errorf("asking for the terminal's size: %w", err)
		}
		if size.Cols == 0 || size.Rows == 0 { // a terminal that nobody looks at
			size = Size{Cols: 80, Rows: 24}
		}
		req.Pty = ptyOf(size)
		config.Envs = withTerm(config.Envs, x.cli.Term)
	}
	// The stream goes on when the user interrupts: it brings the end.
	live, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stream, err := x.rpc.Start(live, connect.NewRequest(req))
	if err != nil {
		return 0, guestError(x.guest.id, err)
	}
	defer stream.Close()
	for stream.Receive() {
		ev := stream.Msg().GetEvent()
		switch {
		case ev.GetStart() != nil:
			stop := x.attend(ctx, live, cancel, ev.GetStart().GetPid())
			defer stop()
		case ev.GetData() != nil:
			if err := x.show(ev.GetData()); err != nil {
				return 0, fmt.Errorf("writing the command's output: %w", err)
			}
		case ev.GetEnd() != nil:
			return exitCode(ev.GetEnd())
		}
	}
	if ctx.Err() != nil {
		return 128 + int(syscall.SIGINT), nil
	}
	if err := stream.Err(); err != nil {
		return 0, guestError(x.guest.id, err)
	}
	return 0, &cay.Error{Code: cay.CodeEnvdUnreachable, Layer: cay.LayerEnvd,
		Message: fmt.Sprintf("sandbox %s closed the stream before the command ended", x.guest.id),
		Fix:     "the sandbox may have ended; see `cay sandbox inspect " + x.guest.id + "`"}
}

func (x *execution) show(d *process.ProcessEvent_DataEvent) error {
	out := x.cli.Out
	b := d.GetStdout()
	switch {
	case d.GetStderr() != nil:
		out, b = x.cli.Err, d.GetStderr()
	case d.GetPty() != nil:
		b = d.GetPty()
	}
	_, err := out.Write(b)
	return err
}

// attend carries input, the terminal's size and the user's interrupt to a
// started command.
func (x *execution) attend(ctx, live context.Context, abandon func(), pid uint32) (stop func()) {
	sel := &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}
	if x.stdin {
		// It ends with its input or with us: a read from a terminal cannot be
		// broken off.
		go x.feed(live, sel)
	}
	stopResize := func() {}
	if x.tty {
		stopResize = x.cli.InTerm.Resized(func() {
			if size, err := x.cli.InTerm.Size(); err == nil {
				_, _ = x.rpc.Update(live, connect.NewRequest(&process.UpdateRequest{Process: sel, Pty: ptyOf(size)})) // the next one corrects it
			}
		})
	}
	stopInterrupt := context.AfterFunc(ctx, func() {
		for _, s := range []struct {
			signal process.Signal
			grace  time.Duration
		}{{process.Signal_SIGNAL_SIGTERM, graceOfInterrupt}, {process.Signal_SIGNAL_SIGKILL, graceOfKill}} {
			_, _ = x.rpc.SendSignal(live, connect.NewRequest(&process.SendSignalRequest{Process: sel, Signal: s.signal})) // it may have ended
			t := time.NewTimer(s.grace)
			select {
			case <-live.Done():
				t.Stop()
				return
			case <-t.C:
			}
		}
		abandon()
	})
	return func() { stopResize(); stopInterrupt() }
}

// feed carries standard input, in order, and its end.
func (x *execution) feed(ctx context.Context, sel *process.ProcessSelector) {
	buf := make([]byte, 32<<10)
	for {
		n, err := x.cli.In.Read(buf)
		if n > 0 {
			in := &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: buf[:n]}}
			if x.tty {
				in.Input = &process.ProcessInput_Pty{Pty: buf[:n]}
			}
			if _, err := x.rpc.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: sel, Input: in})); err != nil {
				return // it has ended, or does not read: its output tells
			}
		}
		if errors.Is(err, io.EOF) && !x.tty {
			_, _ = x.rpc.CloseStdin(ctx, connect.NewRequest(&process.CloseStdinRequest{Process: sel})) // as above
		}
		if err != nil {
			return
		}
	}
}

func ptyOf(s Size) *process.PTY {
	return &process.PTY{Size: &process.PTY_Size{Cols: uint32(s.Cols), Rows: uint32(s.Rows)}}
}

// withTerm tells the command what kind of terminal it has.
func withTerm(env map[string]string, term string) map[string]string {
	if term == "" {
		term = "xterm-256color"
	}
	out := map[string]string{"TERM": term}
	maps.Copy(out, env)
	return out
}

// exitCode is how a shell would tell of an end.
func exitCode(e *process.ProcessEvent_EndEvent) (int, error) {
	if e.GetExited() {
		return int(e.GetExitCode()), nil
	}
	name, _, _ := strings.Cut(strings.TrimPrefix(e.GetStatus(), "signal: "), " (core dumped)")
	for s := syscall.Signal(1); s < 65; s++ {
		if s.String() == name {
			return 128 + int(s), nil
		}
	}
	why := e.GetStatus()
	if e.GetError() != "" {
		why = e.GetError()
	}
	return 0, &cay.Error{Code: cay.CodeEnvdUnreachable, Layer: cay.LayerGuest,
		Message: "the command's end is not known: " + why, Fix: "look at the sandbox with `cay sandbox inspect`"}
}
