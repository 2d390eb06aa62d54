package cay_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"regexp"
	"strings"
	"testing"

	"github.com/cayhq/cay"
)

// TestSecret prints a secret in every way that happens by accident.
func TestSecret(t *testing.T) {
	const value = "canary-7f3a"
	s := cay.Secret(value)
	r := struct{ Token cay.Secret }{s}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "token", s, "record", r)
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "token", s, "record", &r)
	asJSON, err := json.Marshal(map[string]any{"a": s, "b": r})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"%v": fmt.Sprintf("%v", s), "Sprint": fmt.Sprint(s), "%q": fmt.Sprintf("%q", s), "%#v": fmt.Sprintf("%#v", s),
		"%+v of a struct": fmt.Sprintf("%+v", r), "%#v of a struct": fmt.Sprintf("%#v", r),
		"error": fmt.Errorf("with %v", s).Error(), "JSON": string(asJSON), "log": log.String(),
	} {
		if strings.Contains(text, value) {
			t.Errorf("%s shows the secret: %s", name, text)
		}
	}
	if s.Reveal() != value {
		t.Errorf("Reveal = %q", s.Reveal())
	}
	if got := fmt.Sprint(cay.Secret("")); got != "" {
		t.Errorf("an absent secret prints %q: it must look absent", got)
	}
}

func TestNewIDs(t *testing.T) {
	for name, c := range map[string]struct {
		make func() string
		form string
	}{
		"sandbox":   {func() string { return string(cay.NewSandboxID()) }, `^i[a-z0-9]{20}$`},
		"execution": {func() string { return string(cay.NewExecutionID()) }, `^x[a-z0-9]{16}$`},
		"template":  {func() string { return string(cay.NewTemplateID()) }, `^[a-z0-9]{20}$`},
	} {
		form := regexp.MustCompile(c.form)
		seen, letters := map[string]bool{}, map[rune]bool{}
		for range 1000 {
			id := c.make()
			if !form.MatchString(id) {
				t.Fatalf("%s ID %q is not %s", name, id, c.form)
			}
			if seen[id] {
				t.Fatalf("%s ID %q came twice", name, id)
			}
			seen[id] = true
			for _, r := range id[1:] {
				letters[r] = true
			}
		}
		if len(letters) != 36 {
			t.Errorf("%s IDs use %d of 36 characters", name, len(letters))
		}
	}
}

func TestParseSandboxID(t *testing.T) {
	for in, want := range map[string]cay.SandboxID{
		"i1a2b3c4d5e6f7g8h9j0k":          "i1a2b3c4d5e6f7g8h9j0k",
		"i1a2b3c4d5e6f7g8h9j0k-00000000": "i1a2b3c4d5e6f7g8h9j0k",
		"a":                              "a",
		"":                               "", "A": "", "a-": "", "-a": "", "a-b-c": "", "a/b": "", "a.b": "", "..": "", "a\x00": "", "é": "", "a b": "",
		strings.Repeat("a", 64): cay.SandboxID(strings.Repeat("a", 64)),
		strings.Repeat("a", 65): "",
	} {
		got, err := cay.ParseSandboxID(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("ParseSandboxID(%q) = %q, %v; want %q", in, got, err, want)
		}
		if err != nil && cay.CodeOf(err) != cay.CodeInvalidRequest {
			t.Errorf("ParseSandboxID(%q): the code is %s", in, cay.CodeOf(err))
		}
	}
}

func TestError(t *testing.T) {
	e := &cay.Error{Code: cay.CodeDiskFull, Layer: cay.LayerStorage, Message: "the disk is full", Fix: "free some space", Err: fs.ErrExist}
	const want = "the disk is full [storage/disk_full] — free some space: file already exists"
	if e.Error() != want {
		t.Errorf("Error() = %q, want %q", e.Error(), want)
	}
	wrapped := fmt.Errorf("making a disk: %w", fmt.Errorf("cloning: %w", e))
	if !errors.Is(wrapped, fs.ErrExist) {
		t.Error("the cause is lost")
	}
	if !errors.Is(wrapped, &cay.Error{Code: cay.CodeDiskFull}) {
		t.Error("errors.Is does not match by code")
	}
	if errors.Is(wrapped, &cay.Error{Code: cay.CodeDiskUnavailable}) {
		t.Error("errors.Is matches another code")
	}
	for _, c := range []struct {
		err  error
		want cay.Code
	}{{nil, ""}, {wrapped, cay.CodeDiskFull}, {fs.ErrExist, cay.CodeInternal},
		{&cay.Error{Code: cay.CodeConflict, Err: e}, cay.CodeConflict}} {
		if got := cay.CodeOf(c.err); got != c.want {
			t.Errorf("CodeOf(%v) = %q, want %q", c.err, got, c.want)
		}
	}
	if i := cay.InfoOf("no such code"); i.Code != cay.CodeInternal || i.Status != 500 {
		t.Errorf("InfoOf an unknown code = %+v", i)
	}
}

func TestSandboxStateMoves(t *testing.T) {
	all := cay.SandboxStates()
	for _, from := range all {
		if !from.May(from) {
			t.Errorf("%s may not stay", from)
		}
		if from == cay.StateEnded {
			for _, to := range all {
				if to != from && from.May(to) {
					t.Errorf("ended may become %s", to)
				}
			}
			continue
		}
		if from != cay.StateKilling && !from.May(cay.StateKilling) {
			t.Errorf("%s cannot be killed", from)
		}
		seen := map[cay.SandboxState]bool{from: true}
		for todo := []cay.SandboxState{from}; len(todo) > 0; todo = todo[1:] {
			for _, to := range all {
				if todo[0].May(to) && !seen[to] {
					seen[to] = true
					todo = append(todo, to)
				}
			}
		}
		if !seen[cay.StateEnded] {
			t.Errorf("%s never ends", from)
		}
		if seen[cay.StateStarting] && from != cay.StateStarting {
			t.Errorf("%s comes back to starting", from)
		}
	}
	for _, c := range []struct{ from, to cay.SandboxState }{
		{"", cay.StateRunning}, {cay.StateStarting, cay.StatePausing}, {cay.StateRunning, cay.StatePaused}, {cay.StateRunning, cay.StateResuming},
		{cay.StatePaused, cay.StateRunning}, {cay.StateSnapshotting, cay.StatePausing}, {cay.StateKilling, cay.StateRunning}, {cay.StateKilling, cay.StatePaused},
	} {
		if c.from.May(c.to) {
			t.Errorf("%q may become %q", c.from, c.to)
		}
	}
	if cay.StatePaused.Holds() || cay.StateEnded.Holds() || !cay.StatePausing.Holds() || cay.StatePausing.Runs() || !cay.StateSnapshotting.Runs() {
		t.Error("what holds a place, and what runs, is wrong")
	}
}
