// Command cay is the whole product in one static binary: the server of a
// sandbox cloud, its operator's tools, and the sandboxed engine itself.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
)

// app is what every command shares: the streams, so that a test can run a
// command, and the flags of the root.
type app struct {
	in  io.Reader
	out io.Writer // data
	err io.Writer // progress and errors

	dataDir string // --data-dir
}

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
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
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errw)
	return a.exit(root.ExecuteContext(ctx))
}

func newRootCmd(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "cay",
		Short: "A sandbox cloud on your own machine",
		Long: `Cay gives AI agents isolated Linux machines, over the API that the E2B
clients already speak.

Start the cloud with "cay up", paste the three lines it prints into the shell
of your program, and use the official E2B SDKs as they are.`,
		Example: `  cay up                       # start, in the foreground
  eval "$(cay env)"            # let the E2B SDKs and CLI find it
  cay sandbox list
  cay doctor                   # when something is wrong`,
		Version:       cay.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().StringVar(&a.dataDir, "data-dir", "", "directory that holds everything Cay keeps (default /var/lib/cay, or $CAY_DATA_DIR)")
	root.AddCommand(newUpCmd(a), newDownCmd(a), newSuperviseCmd(a))
	root.AddCommand(clientCommands(a)...)
	return root
}
