package api

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/cayhq/cay"
)

// The model: what a client may see of a sandbox, if each operation on it took
// place at one instant between its request and its answer.

// modelState is a sandbox in the model.
type modelState struct {
	life  modelLife
	value int // what it was told last
	// due: its deadline has passed, so that it is paused at any time from now.
	// doomed: its guest was ended from outside, which the node tells at any time.
	// killing: a kill has begun, and goes on by itself. From then on a client is
	// told that the sandbox is not there, or that it is going; the guest runs
	// until the end.
	due, doomed, killing bool
}

type modelLife byte

const (
	modelRunning modelLife = iota
	modelPaused
	modelEnded
)

// modelCall is what a client did.
type modelCall struct {
	box  cay.SandboxID
	what string
	arg  int
}

// modelAnswer is what came of it.
type modelAnswer struct {
	status int
	// unknown: the server died meanwhile, so that it may have had its effect.
	unknown bool
	state   string // as told
	value   int    // as read
}

// become adds what a sandbox may have become by itself.
func (s modelState) become() []modelState {
	all := []modelState{s}
	add := func(n modelState) {
		for _, have := range all {
			if have == n {
				return
			}
		}
		all = append(all, n)
	}
	for i := 0; i < len(all); i++ {
		switch n := all[i]; {
		case n.life == modelEnded:
		default:
			if n.killing || n.doomed && n.life == modelRunning {
				add(modelState{life: modelEnded, killing: n.killing})
			}
			if n.due && n.life == modelRunning {
				n.life, n.doomed = modelPaused, false
				add(n)
			}
		}
	}
	return all
}

// after returns what a sandbox may be after a call that had this answer: nothing
// if it cannot have had it.
func (s modelState) after(c modelCall, a modelAnswer) []modelState {
	same := []modelState{s}
	only := func(ok bool, next modelState) []modelState {
		if !ok {
			return nil
		}
		return []modelState{next}
	}
	runs := s.life == modelRunning
	serves := runs && !s.killing
	paused, resumed, ended := s, s, modelState{life: modelEnded, killing: s.killing}
	paused.life, paused.doomed = modelPaused, false
	resumed.life, resumed.due, resumed.doomed = modelRunning, false, false
	if runs {
		resumed.doomed = s.doomed // only extended
	}
	// What every call may be answered.
	switch {
	case a.status == 404 && c.what != "die":
		return only(s.life == modelEnded || s.killing, s)
	case a.status == 409:
		return only(s.life != modelEnded || s.killing, s)
	case a.status >= 500 && !a.unknown && c.what != "kill":
		return same
	}
	failed := a.status >= 500
	switch c.what {
	case "pause":
		if failed && runs {
			return []modelState{s, paused}
		}
		if failed {
			return same
		}
		return only(serves, paused)
	case "connect":
		switch {
		case failed && s.life == modelEnded:
			return same
		case failed:
			return []modelState{s, resumed}
		case a.status == 201:
			return only(s.life == modelPaused && !s.killing, resumed)
		}
		return only(serves, resumed)
	case "snapshot", "fork":
		return only(failed || serves, s)
	case "timeout":
		due := s
		due.due = true
		if failed {
			return []modelState{s, due}
		}
		return only(serves, due)
	case "kill": // it begins
		killing := s
		killing.killing = true
		if failed {
			return []modelState{s, killing}
		}
		return []modelState{killing}
	case "killed":
		return only(s.killing, ended)
	case "die":
		doomed := s
		doomed.doomed = true
		return only(runs, doomed)
	case "get":
		switch a.state {
		case "running":
			return only(serves, s)
		default: // also while it is being paused, or resumed, and that fails
			return only(s.life != modelEnded && !s.killing, s)
		}
	case "write":
		s.value = c.arg
		return only(runs, s)
	case "read":
		return only(runs && a.value == s.value, s)
	}
	panic("the model does not know " + c.what)
}

var sandboxModel = porcupine.NondeterministicModel{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		of := map[cay.SandboxID][]porcupine.Operation{}
		for _, o := range history {
			box := o.Input.(modelCall).box
			of[box] = append(of[box], o)
		}
		var out [][]porcupine.Operation
		for _, ops := range of {
			out = append(out, ops)
		}
		return out
	},
	Init: func() []any { return []any{modelState{}} },
	Step: func(state, input, output any) []any {
		var out []any
		for _, s := range state.(modelState).become() {
			for _, n := range s.after(input.(modelCall), output.(modelAnswer)) {
				out = append(out, n)
			}
		}
		return out
	},
	DescribeOperation: func(input, output any) string {
		c, a := input.(modelCall), output.(modelAnswer)
		return fmt.Sprintf("%s %d → %+v", c.what, c.arg, a)
	},
}

// testimony is what the clients did, in an order that time would give.
type testimony struct {
	mu   sync.Mutex
	tick int64
	ops  []porcupine.Operation
}

func (h *testimony) now() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tick++
	return h.tick
}

// do carries out a call and records it. A call that says nothing is left out.
func (h *testimony) do(client int, c modelCall, f func() (a modelAnswer, counts bool)) modelAnswer {
	began := h.now()
	a, counts := f()
	ended := h.now()
	if counts {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: c, Output: a, Call: began, Return: ended})
		if c.what == "kill" && a.status == 204 { // it is two steps: it begins, and nothing is left
			c.what = "killed"
			h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: c, Output: a, Call: began, Return: ended})
		}
	}
	return a
}

// check fails the test if the history is not linearizable, with the first
// sandbox of which it is not.
func (h *testimony) check(t *testing.T) {
	t.Helper()
	model := sandboxModel.ToModel()
	for _, ops := range sandboxModel.Partition(h.ops) {
		res, info := porcupine.CheckOperationsVerbose(model, ops, 2*time.Minute)
		if res == porcupine.Ok {
			continue
		}
		t.Errorf("the history of sandbox %s (%d operations) is %s", ops[0].Input.(modelCall).box, len(ops), res)
		longest := 0
		for _, p := range info.PartialLinearizations()[0] {
			longest = max(longest, len(p))
		}
		t.Logf("at most %d of them can be put in a row; those around:", longest)
		for _, o := range ops[max(0, longest-12):min(len(ops), longest+12)] {
			t.Logf("  [%d %d] client %d: %s", o.Call, o.Return, o.ClientId, sandboxModel.DescribeOperation(o.Input, o.Output))
		}
		return
	}
}

// The model refuses what must not be.
func TestModelRefuses(t *testing.T) {
	at := int64(0)
	op := func(what string, arg int, a modelAnswer) porcupine.Operation {
		at += 2
		return porcupine.Operation{Input: modelCall{"i1", what, arg}, Output: a, Call: at, Return: at + 1}
	}
	ok, twice := modelAnswer{status: 204}, modelAnswer{status: 201}
	for name, tc := range map[string]struct {
		ops  []porcupine.Operation
		want bool
	}{
		"paused and resumed":             {[]porcupine.Operation{op("write", 3, ok), op("pause", 0, ok), op("connect", 0, twice), op("read", 0, modelAnswer{value: 3})}, true},
		"a write is lost":                {[]porcupine.Operation{op("write", 3, ok), op("pause", 0, ok), op("connect", 0, twice), op("read", 0, modelAnswer{value: 2})}, false},
		"paused twice":                   {[]porcupine.Operation{op("pause", 0, ok), op("pause", 0, ok)}, false},
		"resumed twice":                  {[]porcupine.Operation{op("pause", 0, ok), op("connect", 0, twice), op("connect", 0, twice)}, false},
		"a pause that failed counts":     {[]porcupine.Operation{op("pause", 0, modelAnswer{status: 500}), op("connect", 0, twice)}, false},
		"a pause of a server that died":  {[]porcupine.Operation{op("pause", 0, modelAnswer{status: 503, unknown: true}), op("connect", 0, twice)}, true},
		"it comes back after a kill":     {[]porcupine.Operation{op("kill", 0, ok), op("killed", 0, ok), op("get", 0, modelAnswer{status: 200, state: "paused"})}, false},
		"it runs after a kill":           {[]porcupine.Operation{op("kill", 0, ok), op("killed", 0, ok), op("write", 1, ok)}, false},
		"it comes back after a 404":      {[]porcupine.Operation{op("kill", 0, modelAnswer{status: 500}), op("get", 0, modelAnswer{status: 404}), op("connect", 0, modelAnswer{status: 200})}, false},
		"it is gone, and nobody did it":  {[]porcupine.Operation{op("pause", 0, ok), op("get", 0, modelAnswer{status: 404})}, false},
		"paused at its end":              {[]porcupine.Operation{op("timeout", 1, ok), op("connect", 0, twice)}, true},
		"paused, and not at its end":     {[]porcupine.Operation{op("timeout", 1, ok), op("connect", 0, modelAnswer{status: 200}), op("connect", 0, twice)}, false},
		"a late end of an earlier run":   {[]porcupine.Operation{op("die", 0, ok), op("pause", 0, ok), op("connect", 0, twice), op("get", 0, modelAnswer{status: 404})}, false},
		"a snapshot of a paused sandbox": {[]porcupine.Operation{op("pause", 0, ok), op("snapshot", 0, twice)}, false},
	} {
		model := sandboxModel.ToModel()
		if got := porcupine.CheckOperations(model, tc.ops); got != tc.want {
			t.Errorf("%s: linearizable %v, want %v", name, got, tc.want)
		}
	}
}
