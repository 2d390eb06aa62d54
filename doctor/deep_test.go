package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// stubTrial notes what is called; a stage named in fails returns its error.
type stubTrial struct {
	calls []string
	fails map[string]error
	clock *time.Time
}

func (s *stubTrial) stage(ctx context.Context, name string) error {
	s.calls = append(s.calls, name)
	*s.clock = s.clock.Add(12 * time.Millisecond)
	if name == "kill" && ctx.Err() != nil {
		return ctx.Err()
	}
	return s.fails[name]
}

func (s *stubTrial) Create(ctx context.Context) error  { return s.stage(ctx, "create") }
func (s *stubTrial) Command(ctx context.Context) error { return s.stage(ctx, "command") }
func (s *stubTrial) File(ctx context.Context) error    { return s.stage(ctx, "file") }
func (s *stubTrial) Kill(ctx context.Context) error    { return s.stage(ctx, "kill") }

func TestDeep(t *testing.T) {
	tests := []struct {
		name    string
		fails   map[string]error
		calls   string
		verdict Verdict
		has     string
		repair  string
	}{
		{"well", nil, "create command file kill", OK, "created, ran a command", ""},
		{"create fails", map[string]error{"create": errTyped}, "create kill", Fail, "create: the layer sha256:12 is gone", "build it again"},
		{"command fails", map[string]error{"command": errPlain}, "create command kill", Fail, "command: broken", "inspect"},
		{"kill fails", map[string]error{"kill": errPlain}, "create command file kill", Fail, "kill: broken", "inspect"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			clock := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
			s := &stubTrial{fails: tt.fails, clock: &clock}
			d := goodDoctor(t, goodMachine())
			d.Trial, d.Deep, d.Now = s, true, func() time.Time { return clock }
			res := find(t, d.Run(t.Context()), "deep.sandbox")
			if got := strings.Join(s.calls, " "); got != tt.calls {
				t.Errorf("stages %q, want %q", got, tt.calls)
			}
			if res.Verdict != tt.verdict || !strings.Contains(res.Evidence, tt.has) || !strings.Contains(res.Repair, tt.repair) {
				t.Errorf("%+v", res)
			}
			for i, s := range res.Steps {
				if s.Name != strings.Fields(tt.calls)[i] || s.Took != 12*time.Millisecond {
					t.Errorf("step %+v", s)
				}
			}
		})
	}
}

// A doctor that is interrupted still ends the sandbox it made.
func TestDeepInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	clock := time.Now()
	s := &stubTrial{clock: &clock}
	d := goodDoctor(t, goodMachine())
	d.Trial = s
	cancel()
	f := checkTrial(ctx, d)
	if len(s.calls) == 0 || s.calls[len(s.calls)-1] != "kill" || f.Steps[len(f.Steps)-1].Error != "" {
		t.Errorf("%v, %+v", s.calls, f)
	}
}

func TestDeepWithoutServer(t *testing.T) {
	d := goodDoctor(t, goodMachine())
	d.Deep = true
	digests := false
	d.Templates = func(_ context.Context, deep bool) ([]Template, error) {
		digests = deep
		return []Template{{Name: "base"}}, nil
	}
	r := d.Run(t.Context())
	if res := find(t, r, "deep.sandbox"); res.Verdict != Fail || !strings.Contains(res.Repair, "cay up") {
		t.Errorf("%+v", res)
	}
	if res := find(t, r, "template.builds"); !digests || !strings.Contains(res.Evidence, "every digest right") {
		t.Errorf("%+v", res)
	}
}

var sample = Report{Took: 1234 * time.Millisecond, Results: []Result{
	{ID: "host.kernel", Title: "kernel", Finding: ok("Linux 6.1.0")},
	{ID: "host.clock", Title: "clock", Finding: warn("not synchronised", "start a time service")},
	{ID: "network.ports", Title: "ports", Finding: fail("127.0.0.1:3000 is taken by process 7 (node)", "`kill 7`")},
	{ID: "network.slot", Title: "network of a sandbox", Finding: skip("needs root")},
	{ID: "deep.sandbox", Title: "a sandbox, used", Finding: Finding{Verdict: OK, Evidence: "works", Steps: []Step{
		{Name: "create", Took: 81230 * time.Microsecond}, {Name: "kill", Took: 9 * time.Millisecond, Error: "late"}}}},
}}

func TestPrint(t *testing.T) {
	const want = `host
  ok    kernel                Linux 6.1.0
  warn  clock                 not synchronised
                              fix: start a time service

network
  fail  ports                 127.0.0.1:3000 is taken by process 7 (node)
                              fix: ` + "`kill 7`" + `
  skip  network of a sandbox  needs root

deep
  ok    a sandbox, used       works
                              create   81.2ms
                              kill     9ms  late

5 checks in 1.234s: 2 ok, 1 warning, 1 failure, 1 skipped
`
	var b bytes.Buffer
	if err := sample.Print(&b, false); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
	b.Reset()
	if err := sample.Print(&b, true); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), red+"fail"+plain) || !strings.Contains(b.String(), green+"ok  "+plain) {
		t.Errorf("no colours in %q", b.String())
	}
}

func TestReportJSON(t *testing.T) {
	b, err := json.Marshal(sample)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"checks":[{"id":"host.kernel","title":"kernel","verdict":"ok","evidence":"Linux 6.1.0","tookNanos":0}`,
		`"repair":"start a time service"`, `"steps":[{"name":"create","tookNanos":81230000}`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("JSON lacks %s:\n%s", want, b)
		}
	}
}
