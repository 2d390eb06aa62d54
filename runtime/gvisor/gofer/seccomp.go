package gofer

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sync"
	_ "gvisor.dev/gvisor/runsc/fsgofer/filter" // for the linknames below

	_ "unsafe" // for go:linkname
)

// EngineVersion is the version of the gVisor module that is linked in.
const EngineVersion = "v0.0.0-20260905035102-160fafc42237"

// gVisor's build system compiles its filters of system calls ahead of time; its
// Go module does not, and every file server would spend some 5 ms on it. These
// are the variables that its build system would fill.
//
//go:linkname precompiledPrograms gvisor.dev/gvisor/runsc/fsgofer/filter.precompiledPrograms
var precompiledPrograms map[string]precompiledseccomp.Program

//go:linkname registerPrecompiledProgramsOnce gvisor.dev/gvisor/runsc/fsgofer/filter.registerPrecompiledProgramsOnce
var registerPrecompiledProgramsOnce sync.Once

// CompiledFilters is the content of a seccomp_*.json, which
//
//	go test ./runtime/gvisor -run TestSeccompIsCurrent -update
//
// writes. It is data rather than Go so that the compiler need not read it and
// its review is a digest.
type CompiledFilters struct {
	Engine   string            `json:"engine"` // EngineVersion it was compiled from
	Programs []CompiledProgram `json:"programs"`
}

// CompiledProgram is a filter.
type CompiledProgram struct {
	Name string           `json:"name"`
	Vars map[string][]int `json:"vars"` // where a variable's value goes, in words
	Code string           `json:"code"` // little-endian 32-bit words, base64
}

// EncodeProgram is the reverse of [DecodeFilters], for one filter.
func EncodeProgram(p precompiledseccomp.Program) CompiledProgram {
	code := make([]byte, 0, 4*len(p.Bytecode32))
	for _, w := range p.Bytecode32 {
		code = binary.LittleEndian.AppendUint32(code, w)
	}
	return CompiledProgram{Name: p.Name, Vars: p.VarOffsets, Code: base64.StdEncoding.EncodeToString(code)}
}

// DecodeFilters reads filters of this engine. Those of another engine are
// refused: they would be too wide or too narrow.
func DecodeFilters(data []byte) (map[string]precompiledseccomp.Program, error) {
	if len(data) == 0 {
		return nil, errors.New("no filters were compiled for this architecture")
	}
	var f CompiledFilters
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("decoding the filters: %w", err)
	}
	if f.Engine != EngineVersion {
		return nil, fmt.Errorf("the filters are of engine %s", f.Engine)
	}
	m := map[string]precompiledseccomp.Program{}
	for _, p := range f.Programs {
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

// Filters returns the compiled filters of file servers.
func Filters() (map[string]precompiledseccomp.Program, error) { return DecodeFilters(seccompData) }

// RegisterFilter gives gVisor the compiled filter of file servers. Without a
// usable one it gives none, and gVisor compiles it at each start: slower, as
// safe.
func RegisterFilter() {
	if programs, err := Filters(); err == nil {
		registerPrecompiledProgramsOnce.Do(func() { precompiledPrograms = programs })
	}
}
