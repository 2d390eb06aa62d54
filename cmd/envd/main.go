// Command envd is the daemon inside every sandbox; package envd says what it
// does. PID 1, cmd/init, starts it and starts it again when it ends.
//
// A guest's number of processors says what it may use, and never changes: its
// cgroups need not be asked at the start and every second after it.
//
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/cayhq/cay/envd"
	"github.com/cayhq/cay/internal/disposition"
	"github.com/cayhq/cay/internal/rawconn"
)

// An idle sandbox should cost little, so the heap is kept small: collected
// after growing by half, and the harder the nearer it comes to the limit. The
// limit is soft: it slows a daemon with very many streams, and stops none.
const (
	gcPercent   = 50
	memoryLimit = 16 << 20
)

// maxProcs is how many goroutines run at a time. Most of what envd does is to
// wait for calls of the system, which do not count. With a second one, each call
// of a client wakes threads that find nothing to do, and under gVisor that takes
// as long as the rest of the call.
const maxProcs = 1

const usage = `envd serves processes, files and watches of this sandbox.

  envd [flags]

Example, on a machine of your own:

  envd -public 127.0.0.1:49983 -control 127.0.0.1:49982 -token-fd 3 3<<<secret

Flags:
`

func main() {
	runtime.GOMAXPROCS(maxProcs)
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryLimit)
	if err := disposition.RestoreRest(); err != nil {
		fmt.Fprintln(os.Stderr, "envd: processes will ignore some signals:", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// options is the command line.
type options struct {
	public, control string
	publicFD        int
	controlFD       int
	tokenFD         int
	stateFD         int
	storeFD         int
	cgroup          string
	build, instance string
	system          bool
	verbose         bool
	version         bool
}

func parse(args []string, out io.Writer) (options, error) {
	var o options
	fs := flag.NewFlagSet("envd", flag.ContinueOnError)
	fs.SetOutput(out)
	fs.Usage = func() { fmt.Fprint(out, usage); fs.PrintDefaults() }
	fs.StringVar(&o.public, "public", fmt.Sprintf("0.0.0.0:%d", envd.Port), "`address` that clients reach through the proxy")
	fs.StringVar(&o.control, "control", fmt.Sprintf("0.0.0.0:%d", envd.ControlPort), "`address` that the node configures the sandbox by")
	fs.IntVar(&o.publicFD, "public-fd", -1, "`descriptor` of a listener that outlives this process, in place of -public")
	fs.IntVar(&o.controlFD, "control-fd", -1, "`descriptor` of a listener that outlives this process, in place of -control")
	fs.IntVar(&o.tokenFD, "token-fd", -1, "`descriptor` to read the control token from; without one, nobody can use the control address")
	fs.IntVar(&o.stateFD, "state-fd", -1, "`descriptor` of a file that outlives this process and keeps its configuration for the next")
	fs.IntVar(&o.storeFD, "store-fd", -1, "`descriptor` of the socket to PID 1, which holds for the next envd what processes are connected to")
	fs.StringVar(&o.cgroup, "cgroup", "", "cgroup v2 `directory` that users' processes are put into")
	fs.StringVar(&o.build, "build", "", "`ID` of the build that booted, for the node to compare")
	fs.StringVar(&o.instance, "instance", "", "`ID` of this boot, for the node to compare")
	fs.BoolVar(&o.system, "system", false, "this machine is a sandbox: let the node set its host name and clock, and make ports of its loopback reachable")
	fs.BoolVar(&o.verbose, "verbose", false, "log more")
	fs.BoolVar(&o.version, "version", false, "print the version of the protocol and exit")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	return o, nil
}

// maxToken bounds what is read as a token.
const maxToken = 4096

// readToken reads the control token from a descriptor, which it closes. So the
// token is in no environment and on no command line.
func readToken(fd int) (string, error) {
	if fd < 0 {
		return "", nil
	}
	f := os.NewFile(uintptr(fd), "token")
	if f == nil {
		return "", fmt.Errorf("descriptor %d is not valid", fd)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxToken))
	if err != nil {
		return "", fmt.Errorf("reading the control token from descriptor %d: %w", fd, err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return "", fmt.Errorf("descriptor %d holds no control token", fd)
	}
	return token, nil
}

// run is the whole program but for its exit: 0 after a signal, 1 after a
// failure, 2 for a wrong command line.
func run(ctx context.Context, args []string, out, errw io.Writer) int {
	o, err := parse(args, errw)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintf(errw, "envd: %v; see envd -help\n", err)
		return 2
	case o.version:
		fmt.Fprintln(out, envd.Version)
		return 0
	}
	if err := serve(ctx, o, errw); err != nil {
		fmt.Fprintln(errw, "envd:", err)
		return 1
	}
	return 0
}

// listen takes a listener over, or opens one at addr if fd is negative.
func listen(ctx context.Context, fd int, addr string) (net.Listener, error) {
	if fd < 0 {
		var lc net.ListenConfig
		return lc.Listen(ctx, "tcp", addr)
	}
	f := os.NewFile(uintptr(fd), "listener")
	if f == nil {
		return nil, fmt.Errorf("descriptor %d is not valid", fd)
	}
	defer f.Close() // the listener has a copy, which no child gets
	return net.FileListener(f)
}

func serve(ctx context.Context, o options, errw io.Writer) error {
	token, err := readToken(o.tokenFD)
	if err != nil {
		return err
	}
	var state *os.File
	if o.stateFD >= 0 {
		if state = os.NewFile(uintptr(o.stateFD), "state"); state == nil {
			return fmt.Errorf("descriptor %d is not valid", o.stateFD)
		}
		defer state.Close()
		syscall.CloseOnExec(o.stateFD) // no child may have it
	}
	var keeper *os.File
	if o.storeFD >= 0 {
		if keeper = os.NewFile(uintptr(o.storeFD), "keeper"); keeper == nil {
			return fmt.Errorf("descriptor %d is not valid", o.storeFD)
		}
		defer keeper.Close()
		syscall.CloseOnExec(o.storeFD)
	}
	public, err := listen(ctx, o.publicFD, o.public)
	if err != nil {
		return fmt.Errorf("opening the public port: %w", err)
	}
	control, err := listen(ctx, o.controlFD, o.control)
	if err != nil {
		public.Close()
		return fmt.Errorf("opening the control port: %w", err)
	}
	level := slog.LevelInfo
	if o.verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(errw, &slog.HandlerOptions{Level: level}))
	s := envd.New(envd.Config{Log: log, ControlToken: token, Build: o.build, Instance: o.instance, Cgroup: o.cgroup, State: state, Keeper: keeper, System: o.system})
	return s.Run(ctx, rawconn.Listener{Listener: public}, rawconn.Listener{Listener: control})
}
