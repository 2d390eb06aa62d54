package template

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// Event is one piece of news from a build.
type Event struct {
	Step, Steps int // 1-based
	Title       string
	// Done and Total count Unit; Total is 0 while it is unknown.
	Done, Total int
	Unit        string
	// Elapsed is since the step began; End marks the step's last event.
	Elapsed time.Duration
	End     bool
	// Line is a line of a program's output. Such an event has nothing else
	// but its step.
	Line string
}

// String is the event as one line for people: "[3/7] installing packages: 142
// of 505 packages, 41 s".
func (e Event) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "[%d/%d] %s", e.Step, e.Steps, e.Title)
	sep := ": "
	if e.Done > 0 || e.Total > 0 {
		if e.Total > 0 {
			fmt.Fprintf(&b, "%s%d of %d %s", sep, e.Done, e.Total, e.Unit)
		} else {
			fmt.Fprintf(&b, "%s%d %s", sep, e.Done, e.Unit)
		}
		sep = ", "
	}
	if e.End || e.Elapsed >= time.Second {
		fmt.Fprintf(&b, "%s%.1f s", sep, e.Elapsed.Seconds())
	}
	return b.String()
}

// Printer returns a handler that writes events to w: on a terminal one line
// per step that is rewritten as it goes, else a line when a step begins, ends,
// and every ten seconds between. With verbose, programs' output too.
func Printer(w io.Writer, terminal, verbose bool) func(Event) {
	var mu sync.Mutex
	var last time.Duration
	var step, width int
	return func(e Event) {
		mu.Lock()
		defer mu.Unlock()
		if e.Line != "" {
			if verbose {
				fmt.Fprintf(w, "      %s\n", e.Line)
			}
			return
		}
		text := e.String()
		if terminal && !verbose {
			pad := max(width-len(text), 0)
			width = len(text)
			fmt.Fprintf(w, "\r%s%s", text, strings.Repeat(" ", pad))
			if e.End {
				fmt.Fprintln(w)
				width = 0
			}
			return
		}
		if e.Step != step || e.End || e.Elapsed-last >= 10*time.Second {
			fmt.Fprintln(w, text)
			step, last = e.Step, e.Elapsed
		}
		if e.End {
			last = 0
		}
	}
}

// reporter gives a build's events their step, clock and rate.
type reporter struct {
	to    func(Event)
	now   func() time.Time
	steps []string

	step        int
	began, sent time.Time
	ev          Event
}

// begin ends the running step and starts the next one.
func (r *reporter) begin(step int) {
	r.end()
	r.step, r.began = step, r.now()
	r.sent = r.began
	r.ev = Event{Step: step, Steps: len(r.steps), Title: r.steps[step-1]}
	r.send(r.ev)
}

func (r *reporter) end() {
	if r.step == 0 {
		return
	}
	r.ev.Elapsed, r.ev.End = r.now().Sub(r.began), true
	r.send(r.ev)
	r.step = 0
}

// count reports progress, at most five times a second.
func (r *reporter) count(done, total int, unit string) {
	r.ev.Done, r.ev.Total, r.ev.Unit = done, total, unit
	now := r.now()
	if now.Sub(r.sent) < 200*time.Millisecond {
		return
	}
	r.sent = now
	r.ev.Elapsed = now.Sub(r.began)
	r.send(r.ev)
}

func (r *reporter) line(s string) {
	r.send(Event{Step: r.ev.Step, Steps: r.ev.Steps, Line: s})
}

func (r *reporter) send(e Event) {
	if r.to != nil {
		r.to(e)
	}
}
