package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// Tally counts tests, subtests included. A package that fails outside of a
// test, because it does not compile or panics, counts as one failure.
type Tally struct {
	Passed, Failed, Skipped int

	reasons  []string // of the skips
	failures []failure
}

// String returns "N passed, N failed, N skipped".
func (t *Tally) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", t.Passed, t.Failed, t.Skipped)
}

// explain lists the skips.
func (t *Tally) explain(w io.Writer) {
	for _, r := range t.reasons {
		fmt.Fprintln(w, r)
	}
}

// slow is from how many seconds on a test has a line of its own, so that one
// sees that something happens.
const slow = 5

// event is a line of `go test -json`.
type event struct {
	Action      string
	Package     string
	ImportPath  string // of a build
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

// read counts the events of one `go test -json`. It writes a line for each
// package, and the output of what failed. It reports whether nothing failed.
func (t *Tally) read(r io.Reader, w io.Writer) (bool, error) {
	type key struct{ pkg, test string }
	output := map[key]*strings.Builder{}
	count := map[string]int{}
	failures := map[string]int{}
	ok := true
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadBytes('\n')
		if len(line) == 0 && err != nil {
			if err == io.EOF {
				return ok, nil
			}
			return false, err
		}
		var e event
		if json.Unmarshal(line, &e) != nil {
			// go itself writes plain text when it cannot go on
			fmt.Fprintf(w, "%s", line)
			continue
		}
		pkg := strings.TrimPrefix(e.Package, module)
		k := key{pkg, e.Test}
		name := pkg + "." + e.Test
		switch e.Action {
		case "output":
			if output[k] == nil {
				output[k] = &strings.Builder{}
			}
			output[k].WriteString(e.Output)
		case "build-output":
			k := key{test: e.ImportPath} // a package is no test's
			if output[k] == nil {
				output[k] = &strings.Builder{}
			}
			output[k].WriteString(e.Output)
			fmt.Fprint(w, e.Output)
		case "pass":
			delete(output, k)
			if e.Test != "" {
				t.Passed++
				count[pkg]++
				if e.Elapsed >= slow && !strings.Contains(e.Test, "/") {
					fmt.Fprintf(w, "       %-40s %7.1fs\n", name, e.Elapsed)
				}
				continue
			}
			fmt.Fprintf(w, "ok     %-40s %7.1fs  %d tests\n", pkg, e.Elapsed, count[pkg])
		case "skip":
			text := output[k]
			delete(output, k)
			if e.Test == "" {
				continue // a package without tests
			}
			t.Skipped++
			why, allow := maySkip(pkg, e.Test)
			if allow {
				t.reasons = append(t.reasons, fmt.Sprintf("skipped %s: %s", name, why))
				continue
			}
			ok = false
			failures[pkg]++
			t.fail(name+" was skipped", text)
			t.reasons = append(t.reasons, fmt.Sprintf("SKIPPED %s, which internal/check/skips.go has no reason for", name))
			fmt.Fprintf(w, "SKIP   %s\n%s", name, indent(text))
		case "fail":
			ok = false
			text := output[k]
			delete(output, k)
			switch {
			case e.Test != "":
				t.Failed++
				failures[pkg]++
				t.fail(name, text)
				fmt.Fprintf(w, "FAIL   %s\n%s", name, indent(text))
			case failures[pkg] > 0:
				fmt.Fprintf(w, "FAIL   %-40s %7.1fs  %d tests passed, %d did not\n", pkg, e.Elapsed, count[pkg], failures[pkg])
			default:
				t.Failed++
				why := "outside of a test"
				if e.FailedBuild != "" {
					why = "does not compile"
				}
				fmt.Fprintf(w, "FAIL   %s %s\n%s", pkg, why, indent(text))
				if e.FailedBuild != "" {
					text = output[key{test: e.FailedBuild}]
				}
				t.fail(pkg+" "+why, text)
				// What ran when the program died says where.
				for other, text := range output {
					if other.pkg == pkg {
						t.fail(pkg+"."+other.test, text)
						fmt.Fprintf(w, "  in %s:\n%s", other.test, indent(text))
					}
				}
			}
		}
	}
}

// fail remembers a failure for the end.
func (t *Tally) fail(name string, output *strings.Builder) {
	f := failure{name: name}
	if output != nil {
		f.output = output.String()
	}
	t.failures = append(t.failures, f)
}

func indent(b *strings.Builder) string {
	if b == nil {
		return ""
	}
	var out strings.Builder
	for line := range strings.Lines(b.String()) {
		out.WriteString("    " + line)
	}
	return out.String()
}
