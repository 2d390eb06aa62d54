package main

import "slices"

// Names of the series and figures that targets and the table speak of.
const (
	bareRun     = "bare runsc run --detach, the command"
	bareReady   = "bare runsc run --detach, to envd's answer"
	bareDelete  = "bare runsc delete --force"
	bareExec    = "bare runsc exec true"
	nativeReady = "native envd: fork, exec, answer"

	createCold = "create, no pool"
	createPool = "create, pool"
	httpCold   = "create to first output, HTTP, no pool"
	httpPool   = "create to first output, HTTP, pool"
	sdkCold    = "create to first output, SDK, no pool"
	sdkPool    = "create to first output, SDK, pool"
	kill       = "kill"
	killClean  = "kill to cgroup and disk gone"
	sdkKill    = "kill, SDK"
	runTrue    = "command: true"
	sdkRun     = "command: true, SDK"
	call       = "call: stat a file"

	upEmpty = "cay up, prepared directory"
	upFull  = "cay up after kill -9, with the idle sandboxes"

	idleMemory = "idle sandbox, memory"
	idlePSS    = "idle sandbox, PSS of all processes"
	idleSentry = "  of that the sentry"
	idleGofer  = "  of that the gofer"
	idleStubs  = "  of that the guest's own memory and code"
	idleGrowth = "  of that the growth of server and supervisor"
	idleCgroup = "idle sandbox, its cgroup without file cache"
	idleHost   = "idle sandbox, loss of the host's available memory"
	idleCPU    = "idle sandbox, CPU"

	loadCold = "create under sustained load, no pool"
	loadPool = "create under sustained load, pool"
	rateCold = "creates and kills a second, no pool"
	ratePool = "creates and kills a second, pool"

	sizeCay  = "size of cay"
	sizeEnvd = "size of envd"
)

// Target is a figure that a run is held against.
type Target struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	// Limit is the largest value that meets the target, or the smallest if
	// AtLeast.
	Limit   float64 `json:"limit"`
	AtLeast bool    `json:"atLeast,omitempty"`
	Unit    string  `json:"unit"`
	Met     bool    `json:"met"`
	// Required tells the figures that a release promises from those that it
	// strives for.
	Required bool `json:"required"`
}

// outcome is what a run measured, by name.
type outcome struct {
	series  map[string]Summary
	figures map[string]Figure
	cores   int
}

// Figure is a single number.
type Figure struct {
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
}

// judge holds an outcome against every target for which it has the figures.
func judge(o outcome) []Target {
	var out []Target
	add := func(t Target, ok bool) {
		if !ok {
			return
		}
		t.Value = round(t.Value)
		if t.AtLeast {
			t.Met = t.Value >= t.Limit
		} else {
			t.Met = t.Value <= t.Limit
		}
		out = append(out, t)
	}
	ratio := func(a, b string, factor float64, required bool) {
		x, okx := o.series[a]
		y, oky := o.series[b]
		if okx && oky && y.P50 > 0 {
			add(Target{Name: a + " ÷ " + b, Value: x.P50 / y.P50, Limit: factor, Unit: "×", Required: required}, true)
		}
	}
	tail := func(name string) {
		s, ok := o.series[name]
		if ok && s.P50 > 0 {
			add(Target{Name: name + ": p99 ÷ p50", Value: s.P99 / s.P50, Limit: 3, Unit: "×", Required: true}, true)
		}
	}
	median := func(name string, limit float64) {
		s, ok := o.series[name]
		add(Target{Name: name + ": p50", Value: s.P50, Limit: limit, Unit: s.Unit}, ok)
	}
	figure := func(name string, limit float64, required bool) {
		f, ok := o.figures[name]
		add(Target{Name: name, Value: f.Value, Limit: limit, Unit: f.Unit, Required: required}, ok)
	}
	// To the same point: a create ends when envd answers.
	ratio(createCold, bareReady, 0.8, true)
	ratio(createPool, bareReady, 0.45, true)
	tail(createCold)
	tail(createPool)
	figure(idleMemory, 16, true)
	figure(sizeCay, 110, true)
	figure(sizeEnvd, 12, true)
	if s, ok := o.series[upEmpty]; ok {
		add(Target{Name: upEmpty + ": slowest", Value: s.Max, Limit: 2000, Unit: s.Unit, Required: true}, true)
	}
	median(sdkPool, 15)
	median(createPool, 2)
	ratio(runTrue, bareExec, 1.5, false)
	median(call, 0.3)
	figure(idleCPU, 0.02, false)
	for _, name := range []string{rateCold, ratePool} {
		f, ok := o.figures[name]
		add(Target{Name: name + ", per core", Value: f.Value / float64(max(o.cores, 1)), Limit: 5, AtLeast: true, Unit: "/s"}, ok)
	}
	return slices.Concat(out, envdTargets(o), proxyTargets(o), egressTargets(o), pauseTargets(o))
}
