package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestDigest(t *testing.T) {
	numbers := func(from, to int) (out []string) {
		for i := from; i <= to; i++ {
			out = append(out, fmt.Sprint("    line ", i))
		}
		return out
	}
	server := strings.Repeat(`        {"time":"2026-11-24T18:23:30Z","level":"INFO","msg":"sandbox ended"}`+"\n"+
		`            time=2026-11-24T20:42:00.259Z level=INFO msg="supervisor up"`+"\n", 100)
	for _, c := range []struct {
		name, output string
		limit        int
		want         []string
	}{
		{name: "nothing", limit: 5},
		{name: "the frame of testing", limit: 5,
			output: "=== RUN   TestX\n=== PAUSE TestX\n=== CONT  TestX\n    x_test.go:3: got 1, want 2\n--- FAIL: TestX (0.00s)\n    --- FAIL: TestX/y (0.00s)\nFAIL\nFAIL\tx\t1s\n\n",
			want:   []string{"    x_test.go:3: got 1, want 2"}},
		{name: "the log of a server", limit: 5,
			output: "    x_test.go:3: got 1, want 2\n    server.go:110: the server said:\n" + server + "    server.go:113: it did not end\n",
			want:   []string{"    x_test.go:3: got 1, want 2", "    server.go:113: it did not end"}},
		{name: "as many lines as there may be", limit: 5, output: strings.Join(numbers(1, 5), "\n"), want: numbers(1, 5)},
		{name: "first and last", limit: 6, output: strings.Join(numbers(1, 9), "\n"),
			want: append(append(numbers(1, 2), "[4 lines]"), numbers(7, 9)...)},
		{name: "the least", limit: minDigest, output: strings.Join(numbers(1, 9), "\n"), want: []string{"[8 lines]", "    line 9"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, digest(c.output, c.limit)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestCut(t *testing.T) {
	for _, line := range []string{"", strings.Repeat("x", maxLine), strings.Repeat("x", 5000), strings.Repeat("✓", 5000), "a" + strings.Repeat("✓", 5000) + "want 3"} {
		got := cut(line)
		if len(got) > maxLine || !utf8.ValidString(got) {
			t.Errorf("cut of %d bytes has %d, valid: %v", len(line), len(got), utf8.ValidString(got))
		}
		if len(line) <= maxLine && got != line {
			t.Errorf("%q became %q", line, got)
		}
		if len(line) > 6 && !strings.HasSuffix(got, line[len(line)-6:]) {
			t.Errorf("the end of %q is missing in %q", line, got)
		}
	}
}

// A run of which only the end is seen says which tests failed and why.
func TestEndOfLog(t *testing.T) {
	var log strings.Builder
	put := func(action, test, output string) {
		b, err := json.Marshal(event{Action: action, Package: module + "test/envd", Test: test, Output: output})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&log, "%s\n", b)
	}
	const sub = "TestClients/python/watch"
	put("output", sub, "=== RUN   "+sub+"\n")
	put("output", sub, "    client.go:113: Traceback (most recent call last):\n")
	for range 100 {
		put("output", sub, "          File \"run.py\", line 547, in main\n")
	}
	put("output", sub, "        AssertionError: not within 5 s: "+strings.Repeat("FilesystemEvent ", 500)+"\n")
	put("fail", sub, "")
	put("fail", "TestClients/python", "")
	for range 1000 {
		put("output", "TestClients", "        {\"time\":\"2026-11-24T18:23:30Z\",\"msg\":\"sandbox ended\"}\n")
	}
	put("fail", "TestClients", "")
	put("output", "TestOther", "    x_test.go:3: got 1, want 2\n")
	put("fail", "TestOther", "")
	put("fail", "", "")

	var out strings.Builder
	k := &check{out: &out, now: func() time.Time { return time.Unix(0, 0) }}
	err := k.run(t.Context(), []stage{{name: "program", does: "x", run: func(context.Context) error {
		if _, err := k.tally.read(strings.NewReader(log.String()), k.out); err != nil {
			return err
		}
		return errFailed
	}}}, "")
	if err == nil {
		t.Error("no error")
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	tail := strings.Join(lines[len(lines)-40:], "\n")
	for _, want := range []string{
		"FAIL   test/envd." + sub + "\n        client.go:113: Traceback",
		"AssertionError: not within 5 s: Filesystem",
		"FAIL   test/envd.TestOther\n        x_test.go:3: got 1, want 2\n",
		"program    FAILED",
		"failed: program\n0 passed, 4 failed, 0 skipped",
	} {
		if !strings.Contains(tail, want) {
			t.Errorf("the last lines lack %q:\n%s", want, tail)
		}
	}
	_, end, _ := strings.Cut(tail, "=== what failed")
	if strings.Contains(end, "FAIL   test/envd.TestClients\n") || strings.Contains(end, `{"time":`) {
		t.Errorf("the digest lists a test whose subtest failed, or a server's log:\n%s", end)
	}
}

// What a package says that does not compile, or dies, is in the digest too.
func TestDigestOutsideOfTests(t *testing.T) {
	var got Tally
	ok, err := got.read(strings.NewReader(`{"ImportPath":"github.com/cayhq/cay/api [x.test]","Action":"build-output","Output":"api/x.go:1: undefined: y\n"}
{"ImportPath":"github.com/cayhq/cay/api [x.test]","Action":"build-fail"}
{"Action":"fail","Package":"github.com/cayhq/cay/api","FailedBuild":"github.com/cayhq/cay/api [x.test]"}
{"Action":"output","Package":"github.com/cayhq/cay/proxy","Test":"TestX","Output":"panic: boom\n"}
{"Action":"output","Package":"github.com/cayhq/cay/proxy","Output":"exit status 2\n"}
{"Action":"fail","Package":"github.com/cayhq/cay/proxy"}
{"Action":"output","Package":"github.com/cayhq/cay/store","Test":"TestY","Output":"    y_test.go:1: needs root\n"}
{"Action":"skip","Package":"github.com/cayhq/cay/store","Test":"TestY"}
`), new(strings.Builder))
	if err != nil || ok {
		t.Fatal(ok, err)
	}
	var out strings.Builder
	got.digest(&out)
	want := `
=== what failed; the whole output is above
FAIL   api does not compile
    api/x.go:1: undefined: y
FAIL   proxy outside of a test
    exit status 2
FAIL   proxy.TestX
    panic: boom
FAIL   store.TestY was skipped
        y_test.go:1: needs root
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
}
