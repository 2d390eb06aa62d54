package gvisor

import (
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"time"

	_ "gvisor.dev/gvisor/pkg/sentry/seccheck" // for the linkname below
	"gvisor.dev/gvisor/pkg/sync"
	"gvisor.dev/gvisor/runsc/specutils"

	"github.com/cayhq/cay/internal/prelude"

	_ "unsafe" // for go:linkname
)

// seccheckOnce guards gVisor's registration of some eight hundred points that a
// trace session could ask for.
//
//go:linkname seccheckOnce gvisor.dev/gvisor/pkg/sentry/seccheck.initOnce
var seccheckOnce sync.Once

// shortFlag is the flag that makes a sandbox go the short way, with what its
// boot command is told in addition.
func shortFlag(boot ...string) string {
	return strings.Join(append([]string{prelude.Mark}, boot...), ",")
}

// shortBoot prepares a sandbox process that goes the short way, and returns its
// command line.
//
// gVisor's own way for a sandbox that runs as nobody is to execute itself a
// second time, which is how the capabilities it needed for its root directory
// go from all of its threads. It has another for sandboxes that keep some
// capabilities: to take them from each thread in place. That one, given an
// empty list of what to keep, is the short way. Its costly part was done by
// package prelude.
func shortBoot(args []string) []string {
	specutils.ExePath = prelude.SelfExe
	seccheckOnce.Do(func() {}) // we configure no trace sessions
	at := slices.Index(args, "boot")
	if at < 0 {
		return args
	}
	var extra []string
	for _, a := range args[:at] {
		if opts, ok := strings.CutPrefix(a, prelude.Mark); ok {
			for o := range strings.SplitSeq(strings.TrimPrefix(opts, ","), ",") {
				if o != "" && !strings.HasPrefix(o, prelude.GoferOption) && !strings.HasPrefix(o, prelude.RootOption) {
					extra = append(extra, "--"+o)
				}
			}
		}
	}
	if prelude.Trimmed {
		extra = append(extra, "--apply-caps=true")
	}
	last := len(args) - 1 // the container's ID; of two equal flags the later one counts
	return slices.Concat(args[:last], extra, args[last:])
}

const (
	// startTakes is longer than an engine process takes to start.
	startTakes = 2 * time.Second
	// startHeap is more than it allocates meanwhile.
	startHeap = 48 << 20
)

// collectLate keeps the garbage collector out of the start of an engine process,
// where processors are what lacks, and afterwards returns what the start needed:
// most sandboxes are idle most of the time. One that is started ahead of its
// guest starts in two steps, with a rest of any length between them.
func collectLate(ahead bool) {
	percent := debug.SetGCPercent(-1)
	limit := debug.SetMemoryLimit(startHeap)
	go func() {
		if ahead {
			awaitUse(time.NewTicker(restEvery).C, allocated, debug.FreeOSMemory)
		}
		time.Sleep(startTakes)
		debug.SetMemoryLimit(limit)
		debug.SetGCPercent(percent)
		debug.FreeOSMemory()
	}()
}

const (
	restEvery = time.Second
	// restsBelow is more than an engine without a guest allocates in restEvery.
	restsBelow = 64 << 10
	// usedAbove is less than a guest takes to restore.
	usedAbove = 1 << 20
)

// awaitUse returns when a process that rests is put to use, by what it has
// allocated at each tick. When it begins to rest it calls rests.
func awaitUse(tick <-chan time.Time, allocated func() uint64, rests func()) {
	last, resting := allocated(), false
	for range tick {
		now := allocated()
		switch {
		case resting && now-last > usedAbove:
			return
		case resting: // since it began to
		case now-last < restsBelow:
			rests()
			last, resting = allocated(), true
		default:
			last = now
		}
	}
}

// allocated is how many bytes the process has allocated on its heap so far.
func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
