// Command init is PID 1 of every sandbox. It prepares what the kernel left to
// do, starts envd and starts it again when it ends, and reaps the processes
// that lost their parent. It never ends: its end would be the sandbox's.
//
// A guest's number of processors says what it may use, and never changes: its
// cgroups need not be asked at the start and every second after it.
//
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0
package main

import (
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/disposition"
)

// Names of the environment that the node gives to PID 1.
const (
	envToken    = "CAY_CONTROL_TOKEN"
	envBuild    = "CAY_BUILD"
	envInstance = "CAY_INSTANCE"
	envPIDs     = "CAY_PIDS"
)

// noProfile is in the environment of envd: the table of a profile that nobody
// asks for is 1.4 MB, and made before its main begins.
const noProfile = "GODEBUG=memprofilerate=0"

const usage = `cay-init is PID 1 of a sandbox; the node starts it.

  cay-init [flags]

Example, in a namespace of its own:

  CAY_CONTROL_TOKEN=secret unshare --pid --fork --mount --mount-proc cay-init -envd ./envd -cgroup ""

Flags:
`

// say writes a line to the console.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "cay-init: "+format+"\n", args...)
}

func main() {
	flag.Usage = func() { fmt.Fprint(flag.CommandLine.Output(), usage); flag.PrintDefaults() }
	envd := flag.String("envd", "/usr/bin/envd", "`path` of the daemon to keep running")
	root := flag.String("cgroup", "/sys/fs/cgroup", "`directory` of the cgroup v2 hierarchy; empty: make no groups")
	flag.Parse()
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "cay-init must be the first process of a sandbox (PID 1); see cay-init -help")
		os.Exit(2)
	}
	// It is executed in the root directory.
	if abs, err := filepath.Abs(*envd); err == nil {
		*envd = abs
	}
	debug.SetGCPercent(20)
	// Before the rest: whoever asks envd from now on waits for its answer,
	// rather than being refused and asking again.
	listeners, err := openPorts(envdPorts)
	if err != nil {
		say("envd opens its ports itself: %v", err)
	}
	// A signal to PID 1 has no effect inside a sandbox, whatever it is: the
	// sandbox is ended from outside. Handlers, unlike ignoring, are not
	// inherited by children.
	signal.Notify(make(chan os.Signal)) //nolint:staticcheck // SA1017: nobody receives, and nothing shall be kept
	if err := disposition.IgnoreRest(); err != nil {
		say("some signals may end PID 1: %v", err)
	}

	token := os.Getenv(envToken)
	if !wipe(token) {
		say("the control token stays in the environment of PID 1")
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		say("memory stays readable for tools: %v", err)
	}
	for _, err := range mountMissing() {
		say("%v", err)
	}
	args := []string{*envd, "-system", "-build=" + os.Getenv(envBuild), "-instance=" + os.Getenv(envInstance)}
	if *root != "" {
		pids, err := strconv.Atoi(os.Getenv(envPIDs))
		if err != nil || pids < 0 {
			pids = 0
		}
		dir, err := makeGroups(*root, pids)
		if err != nil {
			say("users' processes share the group of envd, and their number is not limited: %v", err)
		} else {
			args = append(args, "-cgroup="+dir)
		}
	}
	path := os.Getenv("PATH")
	if path == "" {
		path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	k := keeper{path: *envd, args: args, env: []string{"PATH=" + path, noProfile}, token: token, listeners: listeners,
		store: &store{procs: map[uint32]*kept{}, envd: -1}, now: time.Now, sleep: time.Sleep}
	if fd, err := unix.MemfdCreate("envd", unix.MFD_CLOEXEC); err != nil {
		say("an envd that is started again will have lost its configuration: %v", err)
	} else {
		k.state = os.NewFile(uintptr(fd), "envd")
	}
	for {
		k.once()
	}
}
