package doctor

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// Colours of a terminal (ECMA-48 SGR).
const (
	green  = "\x1b[32m"
	yellow = "\x1b[33m"
	red    = "\x1b[31m"
	dim    = "\x1b[2m"
	plain  = "\x1b[0m"
)

var colourOf = map[Verdict]string{OK: green, Warn: yellow, Fail: red, Skip: dim}

// Print writes the report for people: a line for each check, the repair under
// what is not well, and a summary. colour is for terminals.
func (r Report) Print(w io.Writer, colour bool) error {
	paint := func(c, s string) string {
		if !colour || s == "" {
			return s
		}
		return c + s + plain
	}
	width := 0
	for _, res := range r.Results {
		width = max(width, len(res.Title))
	}
	var b strings.Builder
	area := ""
	for _, res := range r.Results {
		if a := res.Area(); a != area {
			if area != "" {
				b.WriteByte('\n')
			}
			area = a
			fmt.Fprintf(&b, "%s\n", area)
		}
		verdict := paint(colourOf[res.Verdict], fmt.Sprintf("%-4s", res.Verdict))
		evidence := res.Evidence
		if res.Verdict == Skip {
			evidence = paint(dim, evidence)
		}
		fmt.Fprintf(&b, "  %s  %-*s  %s\n", verdict, width, res.Title, evidence)
		for _, s := range res.Steps {
			line := fmt.Sprintf("%-8s %s", s.Name, s.Took.Round(100*time.Microsecond))
			if s.Error != "" {
				line += "  " + s.Error
			}
			fmt.Fprintf(&b, "        %*s  %s\n", width, "", line)
		}
		if res.Repair != "" {
			fmt.Fprintf(&b, "        %*s  %s %s\n", width, "", paint(colourOf[res.Verdict], "fix:"), res.Repair)
		}
	}
	fmt.Fprintf(&b, "\n%s\n", r.summary())
	_, err := io.WriteString(w, b.String())
	return err
}

func (r Report) summary() string {
	var parts []string
	for _, v := range []struct {
		verdict   Verdict
		one, many string
	}{{OK, "ok", "ok"}, {Warn, "warning", "warnings"}, {Fail, "failure", "failures"}, {Skip, "skipped", "skipped"}} {
		switch n := r.Count(v.verdict); n {
		case 0:
		case 1:
			parts = append(parts, "1 "+v.one)
		default:
			parts = append(parts, fmt.Sprintf("%d %s", n, v.many))
		}
	}
	return fmt.Sprintf("%d checks in %s: %s", len(r.Results), r.Took.Round(time.Millisecond), strings.Join(parts, ", "))
}
