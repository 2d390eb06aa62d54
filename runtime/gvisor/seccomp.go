package gvisor

import (
	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sync"
	"gvisor.dev/gvisor/runsc/boot/filter"

	"github.com/cayhq/cay/runtime/gvisor/gofer"

	_ "unsafe" // for go:linkname
)

// gVisor's build system compiles the engine's system call filters ahead of
// time; its Go module does not, and every sandbox would spend some 20 ms on
// compiling the same two thousand instructions. These are the variables that
// its build system would fill.
//
//go:linkname precompiledPrograms gvisor.dev/gvisor/runsc/boot/filter.precompiledPrograms
var precompiledPrograms map[string]precompiledseccomp.Program

//go:linkname registerPrecompiledProgramsOnce gvisor.dev/gvisor/runsc/boot/filter.registerPrecompiledProgramsOnce
var registerPrecompiledProgramsOnce sync.Once

// filtersOf says whose filters a process registers.
type filtersOf int

const (
	noFilters filtersOf = iota
	sandboxFilters
	goferFilters
)

// registerSeccomp gives the engine its compiled filters. Without usable ones it
// gives none, and the engine compiles them at each start: slower, as safe.
func registerSeccomp(of filtersOf) {
	switch of {
	case goferFilters:
		gofer.RegisterFilter()
	case sandboxFilters:
		if programs, err := gofer.DecodeFilters(seccompData); err == nil {
			registerPrecompiledProgramsOnce.Do(func() { precompiledPrograms = programs })
		}
	}
}

// seccompPrecompiled reports whether sandboxes of this process's binary start
// with compiled filters.
func seccompPrecompiled() bool { return len(filter.ListPrecompiled()) > 0 }
