// Package gvisor runs guests on gVisor, linked into this binary and
// re-executed from it. DESIGN.md says why it is built so.
//
// Three kinds of process take part, all of them this binary:
//
//   - the server holds a [Runtime], a client without state;
//   - one supervisor per directory ([Supervise]) owns the instances, and
//     outlives the server;
//   - gVisor's own processes (sandbox, gofer) and the short-lived launcher that
//     creates them, told apart by argv[0] ([Dispatch]).
package gvisor

import (
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/google/subcommands"

	"gvisor.dev/gvisor/runsc/cli"
	"gvisor.dev/gvisor/runsc/cmd"
	"gvisor.dev/gvisor/runsc/cmd/sentry/sentrycmd"
	"gvisor.dev/gvisor/runsc/cmd/util"

	"github.com/cayhq/cay/internal/prelude"
)

// arg0Launch is argv[0] of the launcher.
const arg0Launch = "cay-launch"

// arg0Gofer is argv[0] that gVisor gives its gofer.
const arg0Gofer = "runsc-gofer"

// arg0Exe is argv[0] of the helpers that gVisor starts without a name.
const arg0Exe = "/proc/self/exe"

// Dispatch turns the process into a gVisor process, and never returns, when
// argv[0] says so: "runsc" (with the usual commands, as a yardstick and for
// debugging), "runsc-…", the launcher, and the helpers gVisor starts. Otherwise
// it returns at once. It must be the first statement of main.
func Dispatch() {
	name := filepath.Base(os.Args[0])
	switch {
	case name == arg0Launch:
		debug.SetGCPercent(-1) // it ends before there is much to collect
		prepareEngine(noFilters)
		os.Exit(launchMain())
	case name == arg0Speak:
		prepareEngine(noFilters)
		os.Exit(speakMain())
	case name == "runsc":
		prepareEngine(noFilters)
		cli.Run(nil, commands(true), []subcommands.Command{})
	case os.Args[0] == arg0Exe || strings.HasPrefix(name, "runsc"):
		collectLate(prelude.RootSocket(os.Args) != "" && prelude.IsSandbox(os.Args))
		filters := sandboxFilters
		if name == arg0Gofer {
			filters = goferFilters
		}
		prepareEngine(filters)
		if prelude.IsSandbox(os.Args) {
			os.Args = shortBoot(os.Args)
		}
		cli.Run(nil, commands(false), []subcommands.Command{})
	default:
		return
	}
	os.Exit(128) // cli.Run exits by itself
}

// commands returns gVisor's commands: those it runs on itself, and with user
// those of a person or a benchmark.
func commands(user bool) map[util.SubCommand]string {
	const internal, people = "internal use only", ""
	m := map[util.SubCommand]string{
		new(sentrycmd.Boot):   internal,
		new(sentrycmd.Umount): internal,
		new(cmd.Gofer):        internal,
	}
	if !user {
		return m
	}
	for _, c := range []util.SubCommand{
		new(cmd.Checkpoint), new(cmd.Create), new(cmd.Debug), new(cmd.Delete), new(cmd.Events),
		new(cmd.Exec), new(cmd.Kill), new(cmd.List), new(cmd.PS), new(cmd.Pause), new(cmd.Restore),
		new(cmd.Resume), new(cmd.Run), new(cmd.Start), new(cmd.State), new(cmd.Wait),
	} {
		m[c] = people
	}
	return m
}
