package gvisor

import (
	"encoding/json"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/seccomp"
	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	"gvisor.dev/gvisor/runsc/boot/filter"
	filterconfig "gvisor.dev/gvisor/runsc/boot/filter/config"
	goferfilter "gvisor.dev/gvisor/runsc/fsgofer/filter"
	goferconfig "gvisor.dev/gvisor/runsc/fsgofer/filter/config"
	"gvisor.dev/gvisor/runsc/version"

	"github.com/cayhq/cay/runtime/gvisor/gofer"
)

func TestEngineVersionIsGoMods(t *testing.T) {
	mod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^\s*gvisor\.dev/gvisor (\S+)`).FindSubmatch(mod)
	if m == nil || string(m[1]) != EngineVersion {
		t.Fatalf("go.mod has gVisor %q, EngineVersion is %q: change the constant, then run TestSeccompIsCurrent with -update", m, EngineVersion)
	}
	prepareEngine(sandboxFilters)
	if got := version.Version(); got != EngineVersion {
		t.Errorf("the engine calls itself %q; the linkname is broken", got)
	}
}

// TestSeccompIsCurrent compiles the filter as the engine would without ours,
// and compares. With -update it writes ours: half a minute, for gVisor compiles
// every variant to get at one.
func TestSeccompIsCurrent(t *testing.T) {
	if builtWithCgo {
		t.Skip("the filters are those of a binary without cgo: run with CGO_ENABLED=0")
	}
	opt := engineFilter(t)
	if *update {
		writeSeccomp(t, opt.ConfigKey())
		return
	}
	if len(seccompData) == 0 {
		t.Skipf("no filters are committed for %s", runtime.GOARCH)
	}
	ours, err := gofer.DecodeFilters(seccompData)
	if err != nil {
		t.Fatalf("%v: run this test with -update", err)
	}
	opt.ControllerFD = 7
	got, err := ours[opt.ConfigKey()].RenderInstructions(opt.Vars())
	if err != nil {
		t.Fatal(err)
	}
	rules, deny := filterconfig.Rules(opt)
	p := &seccomp.Program{Options: filterconfig.SeccompOptions(opt),
		RuleSets: []seccomp.RuleSet{{Rules: deny}, {Rules: rules, Action: seccomp.Allow}}}
	want, _, err := p.Build()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Errorf("the committed filter has %d instructions and differs from the engine's %d: run this test with -update", len(got), len(want))
	}

	if ours, err = gofer.Filters(); err != nil {
		t.Fatal(err)
	}
	file := goferconfig.Options{}
	if got, err = ours[file.ConfigKey()].RenderInstructions(file.Vars()); err != nil {
		t.Fatal(err)
	}
	rules, deny = goferconfig.Rules(file)
	p = &seccomp.Program{RuleSets: []seccomp.RuleSet{{Rules: deny}, {Rules: rules, Action: seccomp.Allow}}}
	if want, _, err = p.Build(); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Errorf("the gofer's committed filter has %d instructions and differs from the engine's %d: run this test with -update", len(got), len(want))
	}
}

func writeSeccomp(t *testing.T, key string) {
	t.Helper()
	pick := func(all []precompiledseccomp.Program, err error, key string) precompiledseccomp.Program {
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(all, func(p precompiledseccomp.Program) bool { return p.Name == key })
		if i < 0 {
			t.Fatalf("gVisor does not compile the filter %s", key)
		}
		return all[i]
	}
	all, err := filterconfig.PrecompiledPrograms()
	p := pick(all, err, key)
	repairPID(t, &p)
	write := func(path string, p precompiledseccomp.Program) {
		data, err := json.MarshalIndent(gofer.CompiledFilters{Engine: EngineVersion, Programs: []gofer.CompiledProgram{gofer.EncodeProgram(p)}}, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, append(data, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("seccomp_"+runtime.GOARCH+".json", p)
	all, err = goferconfig.PrecompiledPrograms()
	write("gofer/seccomp_"+runtime.GOARCH+".json", pick(all, err, goferconfig.Options{}.ConfigKey()))
}

// repairPID makes a variable of the PID that systrap's rule for
// rt_tgsigqueueinfo takes from the process that compiles it (filters.go of that
// package), which for an ordinary build is the process that runs: the engine,
// being another, would be killed at its first such call. The engine's own PID
// is a variable already, which only other rules use, and those of systrap
// replace.
func repairPID(t *testing.T, p *precompiledseccomp.Program) {
	t.Helper()
	const low, high = "self_pid_low32bits", "self_pid_high32bits"
	if len(p.VarOffsets[low]) > 0 || len(p.VarOffsets[high]) > 0 {
		t.Fatalf("gVisor has come to use its variable %s: look at its rules again", low)
	}
	pid := uint32(os.Getpid())
	var at []int
	for i, w := range p.Bytecode32 {
		if w == pid {
			at = append(at, i)
		}
	}
	if len(at) != 1 || pid < 5000 {
		t.Fatalf("PID %d is at %v: want one place, and a number that is nothing else; run again", pid, at)
	}
	p.VarOffsets[low] = at
}

// engineFilter is the filter that engineFlags ask for.
func engineFilter(t *testing.T) filterconfig.Options {
	t.Helper()
	conf, err := engineConfig(engineFlags(home("/d").instance("x"), ""))
	if err != nil {
		t.Fatal(err)
	}
	c, err := platform.Lookup(conf.Platform)
	if err != nil {
		t.Fatal(err)
	}
	return filterconfig.Options{Platform: c.PrecompiledSeccompInfo()[0], HostFilesystem: conf.DirectFS}
}

func TestSeccompIsRegistered(t *testing.T) {
	if len(seccompData) == 0 {
		t.Skipf("no filters are committed for %s", runtime.GOARCH)
	}
	prepareEngine(sandboxFilters)
	if _, ok := filter.GetPrecompiled(engineFilter(t).ConfigKey()); !ok {
		t.Errorf("the engine does not find its filter; it has %q", filter.ListPrecompiled())
	}
	prepareEngine(goferFilters)
	if _, ok := goferfilter.GetPrecompiled(goferconfig.Options{}.ConfigKey()); !ok {
		t.Errorf("the gofer does not find its filter; it has %q", goferfilter.ListPrecompiled())
	}
}

func TestStaleSeccompIsRefused(t *testing.T) {
	good, err := json.Marshal(gofer.CompiledFilters{Engine: EngineVersion, Programs: []gofer.CompiledProgram{{Name: "x", Vars: map[string][]int{"v": {1}}, Code: "AAAAAAAAAAA="}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := gofer.DecodeFilters(good); err != nil {
		t.Fatalf("good filters: %v", err)
	}
	for name, edit := range map[string][2]string{
		"other engine":        {EngineVersion, "v0.0.0-20200101000000-000000000000"},
		"variable out of it":  {`[1]`, `[2]`},
		"negative variable":   {`[1]`, `[-1]`},
		"not base64":          {"AAAAAAAAAAA=", "AAAA*AAAAAA="},
		"half an instruction": {"AAAAAAAAAAA=", "AAAAAA=="},
		"no code":             {"AAAAAAAAAAA=", ""},
	} {
		if _, err := gofer.DecodeFilters([]byte(strings.Replace(string(good), edit[0], edit[1], 1))); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := gofer.DecodeFilters(nil); err == nil {
		t.Error("nothing: accepted")
	}
}
