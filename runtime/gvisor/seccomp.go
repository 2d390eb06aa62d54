package gvisor

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sync"
	"gvisor.dev/gvisor/runsc/boot/filter"
	_ "gvisor.dev/gvisor/runsc/fsgofer/filter" // for the linknames below

	_ "unsafe" // for go:linkname
)

// gVisor's build system compiles the engine's system call filters ahead of
// time; its Go module does not, and every sandbox would spend some 20 ms on
// compiling the same two thousand instructions, and its gofer 5 ms more. These
// are the variables that its build system would fill, the sandbox's and the
// gofer's.
//
//go:linkname precompiledPrograms gvisor.dev/gvisor/runsc/boot/filter.precompiledPrograms
var precompiledPrograms map[string]precompiledseccomp.Program

//go:linkname registerPrecompiledProgramsOnce gvisor.dev/gvisor/runsc/boot/filter.registerPrecompiledProgramsOnce
var registerPrecompiledProgramsOnce sync.Once

//go:linkname goferPrograms gvisor.dev/gvisor/runsc/fsgofer/filter.precompiledPrograms
var goferPrograms map[string]precompiledseccomp.Program

//go:linkname registerGoferProgramsOnce gvisor.dev/gvisor/runsc/fsgofer/filter.registerPrecompiledProgramsOnce
var registerGoferProgramsOnce sync.Once

// compiledFilters is the content of seccomp_*.json, which
//
//	go test ./runtime/gvisor -run TestSeccompIsCurrent -update
//
// writes. It is data rather than Go so that the compiler need not read it and
// its review is a digest.
type compiledFilters struct {
	Engine   string            `json:"engine"`   // EngineVersion it was compiled from
	Programs []compiledProgram `json:"programs"` // of sandboxes
	Gofer    []compiledProgram `json:"gofer"`
}

type compiledProgram struct {
	Name string           `json:"name"`
	Vars map[string][]int `json:"vars"` // where a variable's value goes, in words
	Code string           `json:"code"` // little-endian 32-bit words, base64
}

func encodeProgram(p precompiledseccomp.Program) compiledProgram {
	code := make([]byte, 0, 4*len(p.Bytecode32))
	for _, w := range p.Bytecode32 {
		code = binary.LittleEndian.AppendUint32(code, w)
	}
	return compiledProgram{Name: p.Name, Vars: p.VarOffsets, Code: base64.StdEncoding.EncodeToString(code)}
}

// decodeFilters reads filters of this engine, of sandboxes or of gofers. Those of
// another engine are refused: they would be too wide or too narrow.
func decodeFilters(data []byte, gofer bool) (map[string]precompiledseccomp.Program, error) {
	if len(data) == 0 {
		return nil, errors.New("no filters were compiled for this architecture")
	}
	var f compiledFilters
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("decoding the filters: %w", err)
	}
	if f.Engine != EngineVersion {
		return nil, fmt.Errorf("the filters are of engine %s", f.Engine)
	}
	m, programs := map[string]precompiledseccomp.Program{}, f.Programs
	if gofer {
		programs = f.Gofer
	}
	for _, p := range programs {
		code, err := base64.StdEncoding.DecodeString(p.Code)
		if err != nil || len(code)%8 != 0 || len(code) == 0 {
			return nil, fmt.Errorf("the filter %q is malformed: %w", p.Name, err)
		}
		words := make([]uint32, len(code)/4)
		for i := range words {
			words[i] = binary.LittleEndian.Uint32(code[4*i:])
		}
		for v, offsets := range p.Vars {
			for _, o := range offsets {
				if o < 0 || o >= len(words) {
					return nil, fmt.Errorf("the filter %q has variable %s at word %d of %d", p.Name, v, o, len(words))
				}
			}
		}
		m[p.Name] = precompiledseccomp.Program{Name: p.Name, Bytecode32: words, VarOffsets: p.Vars}
	}
	return m, nil
}

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
	if of == noFilters {
		return
	}
	programs, err := decodeFilters(seccompData, of == goferFilters)
	switch {
	case err != nil:
	case of == goferFilters:
		registerGoferProgramsOnce.Do(func() { goferPrograms = programs })
	default:
		registerPrecompiledProgramsOnce.Do(func() { precompiledPrograms = programs })
	}
}

// seccompPrecompiled reports whether sandboxes of this process's binary start
// with compiled filters.
func seccompPrecompiled() bool { return len(filter.ListPrecompiled()) > 0 }
