package main

import (
	"fmt"
	"io"
	"regexp"
	"strings"
	"unicode/utf8"
)

// The bounds of the digest. A build server may show no more than the last
// forty lines of a log, and the digest is to be among them as far as it can.
const (
	digestLines = 30  // in all, as far as each failure has minDigest
	maxDigest   = 15  // of one failure
	minDigest   = 2   // of one failure
	maxLine     = 300 // bytes of one line
)

// failure is a test that failed, or a package that did outside of one.
type failure struct{ name, output string }

// noise is what says nothing about why a test failed: the frame that the
// testing package prints, and what a server logs.
var noise = regexp.MustCompile(`^(=== (RUN|PAUSE|CONT|NAME) |--- (FAIL|PASS|SKIP): |FAIL\b|\{"time":|time=\d{4}-|\S+\.go:\d+: the server said:|$)`)

// digest returns the lines of a failed test's output that tell why, at most
// limit of them: the first, where Go puts an assertion, and the last, where
// Python does.
func digest(output string, limit int) []string {
	var all []string
	for line := range strings.Lines(output) {
		line = strings.TrimRight(line, "\r\n\t ")
		if noise.MatchString(strings.TrimLeft(line, "\t ")) {
			continue
		}
		all = append(all, cut(line))
	}
	if len(all) <= limit {
		return all
	}
	tail := limit / 2
	head := limit - tail - 1 // and a line for what is left out
	out := append([]string{}, all[:head]...)
	out = append(out, fmt.Sprintf("[%d lines]", len(all)-head-tail))
	return append(out, all[len(all)-tail:]...)
}

// cut shortens a line to maxLine bytes. The end stays: there are figures.
func cut(line string) string {
	if len(line) <= maxLine {
		return line
	}
	const gap = " […] "
	head, tail := maxLine*2/3, len(line)-(maxLine-maxLine*2/3-len(gap))
	for !utf8.RuneStart(line[head]) {
		head--
	}
	for tail < len(line) && !utf8.RuneStart(line[tail]) {
		tail++
	}
	return line[:head] + gap + line[tail:]
}

// digest lists every failed test once more, in few lines. A test that failed
// only because one of its subtests did is left out.
func (t *Tally) digest(w io.Writer) {
	var own []failure
	for i, f := range t.failures {
		below := false
		for _, other := range t.failures[:i] { // subtests end first
			below = below || strings.HasPrefix(other.name, f.name+"/")
		}
		if !below || len(digest(f.output, maxDigest)) > 0 {
			own = append(own, f)
		}
	}
	if len(own) == 0 {
		return
	}
	limit := min(max(digestLines/len(own)-1, minDigest), maxDigest)
	fmt.Fprintln(w, "\n=== what failed; the whole output is above")
	for _, f := range own {
		fmt.Fprintln(w, "FAIL   "+f.name)
		for _, line := range digest(f.output, limit) {
			fmt.Fprintln(w, "    "+line)
		}
	}
}
