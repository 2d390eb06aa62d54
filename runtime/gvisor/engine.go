package gvisor

import (
	"fmt"
	"io"
	"log/slog"

	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/flag"
	_ "gvisor.dev/gvisor/runsc/version" // for the linkname below

	"github.com/cayhq/cay/runtime/gvisor/gofer"

	_ "unsafe" // for go:linkname
)

// EngineVersion is the version of the gVisor module that is linked in. It is a
// constant rather than a stamp of the build, so that every build has it; a test
// holds it and go.mod together. A memory snapshot restores only into the very
// version that wrote it, so manifests keep it.
const EngineVersion = gofer.EngineVersion

// revision tells engines apart that do not fit each other though gVisor is the
// same, as after a change of what a guest is given. The linker may set it.
var revision string

// Version returns the version of the engine in this build: gVisor's, and after
// a "+" our own revision where there is one.
func Version() string {
	if revision == "" {
		return EngineVersion
	}
	return EngineVersion + "+" + revision
}

// engineVersion is gVisor's own variable, which a plain `go build` leaves at
// "VERSION_MISSING": with that, its check that a snapshot fits compares nothing.
//
//go:linkname engineVersion gvisor.dev/gvisor/runsc/version.version
var engineVersion string

// prepareEngine sets what gVisor takes from its own build system. Every process
// that runs gVisor code calls it first.
func prepareEngine(filters filtersOf) {
	engineVersion = Version()
	registerSeccomp(filters)
}

// enginePlatform is how the engine intercepts system calls: systrap needs no hardware
// support, so that it works on any machine, virtual ones included.
const enginePlatform = "systrap"

// engineFlags are the flags of every gVisor process of an instance whose
// directory is d. The bare `runsc` of a benchmark takes the same.
func engineFlags(d layout, debugDir string) []string {
	f := []string{
		"--root=" + d.engineRoot,
		"--shared-root=" + d.shared,
		"--panic-log=" + d.panicLog,
		"--platform=" + enginePlatform,
		// The guest's disk is a real file system made by the caller, and only
		// the guest writes to it.
		"--overlay2=none",
		"--file-access=exclusive",
		// The engine opens no host file by itself: so it runs as nobody without
		// capabilities, and the gofer opens files for it.
		"--directfs=false",
		"--host-uds=none",
		"--network=sandbox",
		// sudo and ping work in a guest; the guest's root is root of nothing.
		"--allow-suid",
		"--net-raw",
		"--in-sandbox-cgroup=v2",
		"--host-settings=ignore",
		// The helpers are this binary. From a date in 2026 the default policy
		// refuses that.
		"--sidecar-usage-policy=LEGACY_DEPRECATED_SLOW_EMBEDDED_FALLBACK",
	}
	if debugDir != "" {
		f = append(f, "--debug", "--debug-log="+debugDir+"/")
	}
	return f
}

// engineConfig parses flags as a gVisor command line would be.
func engineConfig(flags []string) (*config.Config, error) {
	fs := flag.NewFlagSet("runsc", flag.ContinueOnError)
	config.RegisterFlags(fs)
	if err := fs.Parse(flags); err != nil {
		return nil, fmt.Errorf("parsing the engine's flags: %w", err)
	}
	conf, err := config.NewFromFlags(fs)
	if err != nil {
		return nil, fmt.Errorf("checking the engine's flags: %w", err)
	}
	return conf, nil
}

// discardLogger is the logger of those who gave none.
var discardLogger = slog.New(slog.DiscardHandler)

// silenceEngineLog drops gVisor's log in this process: it would go to standard
// error, which in a launcher is the guest's console.
func silenceEngineLog() {
	log.SetTarget(log.GoogleEmitter{Writer: &log.Writer{Next: io.Discard}})
}
