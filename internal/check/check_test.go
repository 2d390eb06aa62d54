package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/lint"
)

// testLog is what go test -json says of a package with a pass, a failure, a
// subtest and two skips.
const testLog = `{"Action":"start","Package":"github.com/cayhq/cay/template"}
{"Action":"run","Package":"github.com/cayhq/cay/template","Test":"TestA"}
{"Action":"output","Package":"github.com/cayhq/cay/template","Test":"TestA","Output":"noise\n"}
{"Action":"pass","Package":"github.com/cayhq/cay/template","Test":"TestA/sub","Elapsed":0}
{"Action":"pass","Package":"github.com/cayhq/cay/template","Test":"TestA","Elapsed":7}
{"Action":"output","Package":"github.com/cayhq/cay/template","Test":"TestRealBase","Output":"why\n"}
{"Action":"skip","Package":"github.com/cayhq/cay/template","Test":"TestRealBase","Elapsed":0}
`

func TestTally(t *testing.T) {
	for _, c := range []struct {
		name, log string
		want      Tally
		ok        bool
		says      []string
		never     string
	}{
		{name: "passed, with an allowed skip", ok: true, want: Tally{Passed: 2, Skipped: 1},
			log:   testLog + `{"Action":"pass","Package":"github.com/cayhq/cay/template","Elapsed":1.5}`,
			says:  []string{"ok     template                                     1.5s  2 tests", "       template.TestA                               7.0s\n"},
			never: "noise"},
		{name: "a skip without a reason", want: Tally{Passed: 2, Skipped: 2},
			log: testLog + `{"Action":"output","Package":"github.com/cayhq/cay/template","Test":"TestB","Output":"needs root\n"}
{"Action":"skip","Package":"github.com/cayhq/cay/template","Test":"TestB"}
{"Action":"pass","Package":"github.com/cayhq/cay/template"}`,
			says: []string{"SKIP   template.TestB\n    needs root"}},
		{name: "an input that a fuzz target skips", ok: true, want: Tally{Passed: 2, Skipped: 2},
			log: testLog + `{"Action":"skip","Package":"github.com/cayhq/cay/template","Test":"FuzzX/seed#5"}
{"Action":"pass","Package":"github.com/cayhq/cay/template"}`},
		{name: "a skipped fuzz target", want: Tally{Passed: 2, Skipped: 2},
			log: testLog + `{"Action":"skip","Package":"github.com/cayhq/cay/template","Test":"FuzzX"}
{"Action":"pass","Package":"github.com/cayhq/cay/template"}`},
		{name: "a failed test", want: Tally{Passed: 2, Failed: 1, Skipped: 1},
			log: testLog + `{"Action":"output","Package":"github.com/cayhq/cay/template","Test":"TestB","Output":"x_test.go:3: got 1, want 2\n"}
{"Action":"fail","Package":"github.com/cayhq/cay/template","Test":"TestB"}
{"Action":"fail","Package":"github.com/cayhq/cay/template","Elapsed":2}`,
			says: []string{"FAIL   template.TestB\n    x_test.go:3: got 1, want 2", "2 tests passed, 1 did not"}},
		{name: "a package that does not compile", want: Tally{Failed: 1},
			log: `{"ImportPath":"github.com/cayhq/cay/api","Action":"build-output","Output":"api/x.go:1: undefined: y\n"}
{"ImportPath":"github.com/cayhq/cay/api","Action":"build-fail"}
{"Action":"fail","Package":"github.com/cayhq/cay/api","FailedBuild":"github.com/cayhq/cay/api"}`,
			says: []string{"api/x.go:1: undefined: y", "FAIL   api does not compile"}},
		{name: "a package that dies in a test", want: Tally{Failed: 1},
			log: `{"Action":"output","Package":"github.com/cayhq/cay/api","Test":"TestX","Output":"panic: boom\n"}
{"Action":"output","Package":"github.com/cayhq/cay/api","Output":"exit status 2\n"}
{"Action":"fail","Package":"github.com/cayhq/cay/api"}`,
			says: []string{"FAIL   api outside of a test\n    exit status 2", "in TestX:\n    panic: boom"}},
		{name: "a package without tests", ok: true, log: `{"Action":"skip","Package":"github.com/cayhq/cay/templates"}`},
		{name: "text that is no event", ok: true, log: "go: downloading x\n", says: []string{"go: downloading x"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got Tally
			var out strings.Builder
			ok, err := got.read(strings.NewReader(c.log), &out)
			if err != nil {
				t.Fatal(err)
			}
			got.reasons, got.failures = nil, nil
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(Tally{})); diff != "" || ok != c.ok {
				t.Errorf("ok = %v, tally (-want +got):\n%s", ok, diff)
			}
			for _, s := range c.says {
				if !strings.Contains(out.String(), s) {
					t.Errorf("the output lacks %q:\n%s", s, &out)
				}
			}
			if c.never != "" && strings.Contains(out.String(), c.never) {
				t.Errorf("the output has %q:\n%s", c.never, &out)
			}
		})
	}
}

func TestRun(t *testing.T) {
	var ran []string
	pass := func(name string) stage {
		return stage{name: name, does: "x", run: func(context.Context) error { ran = append(ran, name); return nil }}
	}
	fail := func(name string, more bool) stage {
		return stage{name: name, does: "x", more: more, run: func(context.Context) error { ran = append(ran, name); return errors.New("because") }}
	}
	for _, c := range []struct {
		name   string
		stages []stage
		only   string
		ran    string
		err    string
	}{
		{name: "all pass", stages: []stage{pass("a"), pass("b")}, ran: "a b"},
		{name: "stops at a failure", stages: []stage{fail("a", false), pass("b")}, ran: "a", err: "a failed"},
		{name: "goes on where that helps", stages: []stage{fail("a", true), pass("b"), fail("c", true)}, ran: "a b c", err: "a, c failed"},
		{name: "only some", stages: []stage{pass("a"), pass("b"), pass("c")}, only: "a,c", ran: "a c"},
		{name: "only an unknown one", stages: []stage{pass("a")}, only: "b", err: `there is no stage "b"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			ran = nil
			var out strings.Builder
			k := &check{out: &out, now: func() time.Time { return time.Unix(0, 0) }}
			err := k.run(t.Context(), c.stages, c.only)
			if got := strings.Join(ran, " "); got != c.ran {
				t.Errorf("ran %q, want %q", got, c.ran)
			}
			if c.err == "" && err != nil || c.err != "" && (err == nil || err.Error() != c.err) {
				t.Errorf("error %v, want %q", err, c.err)
			}
			if !strings.HasPrefix(c.err, "there is") && !strings.HasSuffix(out.String(), "\n0 passed, 0 failed, 0 skipped\n") {
				t.Errorf("the last line is not the count:\n%s", &out)
			}
			if strings.Contains(c.err, "failed") && !strings.Contains(out.String(), "because") {
				t.Errorf("the reason is not shown:\n%s", &out)
			}
		})
	}
}

func TestRunInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	k := &check{out: io.Discard, now: time.Now}
	err := k.run(ctx, []stage{{name: "a", run: func(context.Context) error { cancel(); return nil }}, {name: "b"}}, "")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want that of the context", err)
	}
}

func TestGroup(t *testing.T) {
	got := group([]byte(`github.com/cayhq/cay fmt
github.com/cayhq/cay/api.test github.com/cayhq/cay/store
github.com/cayhq/cay/runtime/gvisor.test gvisor.dev/gvisor/pkg/log
github.com/cayhq/cay/runtime/gvisor gvisor.dev/gvisor/pkg/log
github.com/cayhq/cay/test/life.test fmt
github.com/cayhq/cay/internal/lint.test fmt
`))
	want := groups{unit: []string{module + "api"}, engine: []string{module + "runtime/gvisor"}, program: []string{module + "test/life"}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(groups{})); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
}

func TestFuzzTargets(t *testing.T) {
	tree, err := lint.Load(fstest.MapFS{"p/x_test.go": {Data: []byte("package p\nfunc FuzzX(f *testing.F) {}\nfunc TestY(t *testing.T) {}\n")}})
	if err != nil {
		t.Fatal(err)
	}
	if got := fuzzTargets(tree); !cmp.Equal(got, []string{"p FuzzX"}) {
		t.Errorf("fuzzTargets = %q", got)
	}
}

func TestStaticSize(t *testing.T) {
	dir := t.TempDir()
	source, self := filepath.Join(dir, "main.go"), filepath.Join(dir, "main")
	if err := os.WriteFile(source, []byte("package main\nfunc main() {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", self, source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building a program: %v\n%s", err, out)
	}
	st, err := os.Stat(self)
	if err != nil {
		t.Fatal(err)
	}
	if size, err := staticSize(self); err != nil || size != st.Size() {
		t.Errorf("staticSize of a static program = %d, %v; want %d", size, err, st.Size())
	}
	if _, err := staticSize("/bin/sh"); err == nil || !strings.Contains(err.Error(), "not static") {
		t.Errorf("staticSize of a dynamic program: %v", err)
	}
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("no program"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := staticSize(text); err == nil {
		t.Error("staticSize of a text file: no error")
	}
}

// TestAllowed: a reason for a test that is gone hides the next one of its name.
func TestAllowed(t *testing.T) {
	tree, err := lint.Load(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	docs := map[string]string{}
	for name := range allowed {
		docs["internal/check/skips.go"] += "`" + name + "`\n" // subtests are cut off there
	}
	for _, f := range lint.CheckTests(tree, docs) {
		t.Error(f)
	}
}
