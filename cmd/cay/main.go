// Command cay is the whole product in one static binary: the server of a
// sandbox cloud, its operator's tools, and the sandboxed engine itself.
package main

import (
	"context"
	"io"
	"math"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/cli"
	"github.com/cayhq/cay/runtime/gvisor"
)

// app is what every command shares: the streams, so that a test can run a
// command.
type app struct {
	in  io.Reader
	out io.Writer // data
	err io.Writer // progress and errors
}

func main() {
	gvisor.Dispatch() // the engine's processes are this binary, too
	closeInherited()
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// closeInherited has our children start without what the caller left open: a server
// outlives its caller, who may wait for the end of a pipe, and dash, which apt
// and mmdebstrap use, fails when descriptors below 10 are taken.
func closeInherited() {
	// Where the kernel lacks the call (before 5.11), they are passed on.
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
}

// run executes one command line and returns the exit status: 0 for success, 1
// for a failure, 2 for a wrong command line; `sandbox exec` passes on the exit
// code of the command it ran.
func run(args []string, in io.Reader, out, errw io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	a := &app{in: in, out: out, err: errw}
	root := newRootCmd(a)
	root.SetArgs(args)
	return a.exit(root.ExecuteContext(ctx))
}

func newRootCmd(a *app) *cobra.Command {
	root := a.client().Root()
	root.AddCommand(newUpCmd(a), newDownCmd(a), newDoctorCmd(a), newTrustCmd(a), newSuperviseCmd(a))
	for _, cmd := range root.Commands() {
		if cmd.Name() == "secret" {
			cmd.AddCommand(newRotateCmd(a))
		}
	}
	cli.Finish(root)
	return root
}
