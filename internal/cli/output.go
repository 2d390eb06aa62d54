package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
)

// format is the value of --output.
type format string

const (
	asTable format = "table"
	asJSON  format = "json"
)

// String, Set and Type implement pflag.Value.
func (f *format) String() string { return string(*f) }

func (f *format) Set(v string) error {
	switch format(v) {
	case asTable, asJSON:
		*f = format(v)
		return nil
	}
	return fmt.Errorf("want %s or %s", asTable, asJSON)
}

func (*format) Type() string { return "format" }

// addOutput gives a command the flag --output.
func addOutput(cmd *cobra.Command) *format {
	f := asTable
	cmd.Flags().VarP(&f, "output", "o", "table or json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]cobra.Completion{"table", "json"}, cobra.ShellCompDirectiveNoFileComp)) // the flag exists
	return &f
}

// WriteJSON writes a value, indented, as the data of a command.
func WriteJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// writeTable writes rows under a header, in columns.
func writeTable(w io.Writer, header string, rows [][]string) error {
	lines := []string{header}
	for _, r := range rows {
		lines = append(lines, strings.Join(r, "\t"))
	}
	return writeColumns(w, lines)
}

// writePairs writes names and values; an empty value leaves its line out.
func writePairs(w io.Writer, pairs [][2]string) error {
	var lines []string
	for _, p := range pairs {
		if p[1] != "" {
			lines = append(lines, p[0]+"\t"+p[1])
		}
	}
	return writeColumns(w, lines)
}

// writeColumns aligns the parts of lines that tabs separate. No line ends in
// blanks.
func writeColumns(w io.Writer, lines []string) error {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	for _, l := range lines {
		fmt.Fprintln(t, l)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	var out strings.Builder
	for line := range strings.Lines(b.String()) {
		out.WriteString(strings.TrimRight(line, " \n") + "\n")
	}
	_, err := io.WriteString(w, out.String())
	return err
}

// ago is a duration for people, in its two largest units.
func ago(d time.Duration) string {
	switch d = d.Round(time.Second); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%02dh", int(d.Hours())/24, int(d.Hours())%24)
}

func instant(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// Exit prints the error of a command, if any, and returns the exit status: 0,
// 1 for a failure, 2 for a wrong command line, and what an [*ExitError] says.
func Exit(w io.Writer, colour bool, err error) int {
	var exit *ExitError
	var usage *UsageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.Status
	case errors.As(err, &usage):
		fmt.Fprintln(w, usage.Error())
		return 2
	case isUsage(err):
		fmt.Fprintf(w, "cay: %v\nSee `cay --help`.\n", err)
		return 2
	}
	PrintError(w, colour, err)
	return 1
}

// isUsage finds cobra's own complaints about a command line, which have no
// type.
func isUsage(err error) bool {
	for _, start := range []string{"unknown command ", "required flag(s) ", "if any flags in the group ", "at least one of the flags in the group "} {
		if strings.HasPrefix(err.Error(), start) {
			return true
		}
	}
	return false
}

// PrintError writes an error for people: what failed and why, then what to do,
// then the names for a report. Errors that were joined follow each other.
func PrintError(w io.Writer, colour bool, err error) {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			PrintError(w, colour, e)
		}
		return
	}
	paint := func(code, s string) string {
		if !colour {
			return s
		}
		return "\x1b[" + code + "m" + s + "\x1b[0m"
	}
	const red, bold, dim = "31", "1", "2"
	var e *cay.Error
	if !errors.As(err, &e) {
		fmt.Fprintf(w, "%s %v\n", paint(red, "error:"), err)
		return
	}
	message := e.Message
	// What was being done when it failed, where a caller has said so.
	if doing, found := strings.CutSuffix(err.Error(), e.Error()); found {
		message = doing + message
	}
	fmt.Fprintf(w, "%s %s\n", paint(red, "error:"), message)
	if e.Fix != "" {
		fmt.Fprintf(w, "%s %s\n", paint(bold, "fix:"), e.Fix)
	}
	names := fmt.Sprintf("%s/%s", e.Layer, e.Code)
	if id := e.Detail[detailRequest]; id != "" {
		names += " " + id
	}
	fmt.Fprintln(w, paint(dim, "["+names+"]"))
}

// writeLine writes a value as one line of JSON, for streams of records.
func writeLine(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
