package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Report is a run, as it is kept.
type Report struct {
	Format   int                `json:"format"` // 1
	At       time.Time          `json:"at"`
	Commit   string             `json:"commit"`
	Quick    bool               `json:"quick"` // too few rounds for a promise
	Took     float64            `json:"tookSeconds"`
	Machine  Machine            `json:"machine"`
	Load     Load               `json:"load"`
	LoadEnd  float64            `json:"loadAverageAtEnd"` // with our own work
	Versions Versions           `json:"versions"`
	Targets  []Target           `json:"targets"`
	Figures  map[string]Figure  `json:"figures"`
	Series   map[string]Summary `json:"series"`
}

// save writes the report below dir, and returns its path.
func (r Report) save(dir string) (string, error) {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return "", err
	}
	name := r.At.Format("2006-01-02") + "-" + r.Commit
	if r.Quick {
		name += "-quick"
	}
	path := filepath.Join(dir, name+".json")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	return path, os.WriteFile(path, append(b, '\n'), 0o644)
}

// section is a part of the table of series.
type section struct {
	title string
	names []string
}

var sections = []section{
	{"Create", []string{createCold, createPool, httpCold, httpPool, sdkCold, sdkPool, loadCold, loadPool}},
	{"Work and end", []string{runTrue, sdkRun, call, kill, sdkKill, killClean}},
	envdSection,
	proxySection,
	egressSection,
	pauseSection,
	{"Server", []string{upEmpty}},
	{"Yardsticks of the same run", []string{bareRun, bareReady, bareExec, bareDelete, nativeReady}},
}

// figureRows are the single numbers, in the order of the table.
var figureRows = []string{rateCold, ratePool, idleMemory, idlePSS, idleSentry, idleGofer, idleStubs, idleGrowth, idleCgroup, idleHost, idleCPU, upFull,
	proxyRate, nginxRate, proxyRatio, proxyCPU, nginxCPU, streamCost,
	pausedProcesses, pausedMemory, pausedGrowth, sizeCay, sizeEnvd}

// print writes the report for people.
func (r Report) print(w io.Writer) {
	where := "machine"
	if r.Machine.Virtual {
		where = "virtual machine"
	}
	fmt.Fprintf(w, "Cay %s (%s) with gVisor %s\n", r.Versions.Cay, r.Commit, r.Versions.Engine)
	fmt.Fprintf(w, "%s: %s, %d cores, %d MB, %s, Linux %s\n", where, r.Machine.CPU, r.Machine.Cores, r.Machine.MemoryMB, r.Machine.OS, r.Machine.Kernel)
	fmt.Fprintf(w, "before the run: load %.2f, processors %.0f %% busy, %.0f %% stolen\n", r.Load.Average, r.Load.BusyPercent, r.Load.StealPercent)

	t := newTable("lrrrrrrl")
	t.row("", "n", "min", "p50", "p95", "p99", "max", "")
	for _, s := range append(sections, r.steps()) {
		t.title(s.title)
		for _, name := range s.names {
			if v, ok := r.Series[name]; ok {
				t.row(strings.TrimPrefix(name, stepPrefix), strconv.Itoa(v.N), number(v.Min), number(v.P50), number(v.P95), number(v.P99), number(v.Max), v.Unit)
			}
		}
	}
	t.write(w)

	t = newTable("lrl")
	for _, name := range figureRows {
		if f, ok := r.Figures[name]; ok {
			t.row(name, number(f.Value), f.Unit)
		}
	}
	t.write(w)

	t = newTable("lrlrll")
	for _, required := range []bool{true, false} {
		if required {
			t.title("Promised")
		} else {
			t.title("Striven for")
		}
		for _, x := range r.Targets {
			if x.Required != required {
				continue
			}
			sign, verdict := "≤", "met"
			if x.AtLeast {
				sign = "≥"
			}
			if !x.Met {
				verdict = "MISSED"
			}
			t.row(x.Name, number(x.Value), sign, number(x.Limit), x.Unit, verdict)
		}
	}
	t.write(w)
}

// stepPrefix begins the names of series of the server's own steps of a create.
const stepPrefix = "step of create, no pool: "

// steps are the parts of a start as the server reports them.
func (r Report) steps() section {
	s := section{title: "Steps of a create without a pool"}
	for _, name := range stepOrder {
		s.names = append(s.names, stepPrefix+name)
	}
	return s
}

// stepOrder is the order of the steps of a start; network and disk happen at
// the same time.
var stepOrder = []string{"queue", "network", "disk", "engine", "start", "ready", "init"}

// missed counts the promises that were not kept.
func (r Report) missed() int {
	n := 0
	for _, t := range r.Targets {
		if t.Required && !t.Met {
			n++
		}
	}
	return n
}

// number writes a figure with three digits that say something.
func number(v float64) string {
	switch size := math.Abs(v); {
	case size >= 100 || v == float64(int64(v)):
		return strconv.FormatFloat(v, 'f', 0, 64)
	case size >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case size >= 0.1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'f', 3, 64)
}

// table aligns columns: a letter for each, l or r.
type table struct {
	align string
	rows  [][]string // one cell: a title
	width []int
}

func newTable(align string) *table {
	return &table{align: align, width: make([]int, len(align))}
}

func (t *table) title(s string) { t.rows = append(t.rows, []string{s}) }

func (t *table) row(cells ...string) {
	for i, c := range cells {
		t.width[i] = max(t.width[i], utf8.RuneCountInString(c))
	}
	t.rows = append(t.rows, cells)
}

// write writes the table after an empty line. A title with nothing below it is
// left out.
func (t *table) write(w io.Writer) {
	fmt.Fprintln(w)
	for i, r := range t.rows {
		if len(r) == 1 {
			if i+1 < len(t.rows) && len(t.rows[i+1]) > 1 {
				fmt.Fprintln(w, r[0])
			}
			continue
		}
		var line strings.Builder
		for j, c := range r {
			line.WriteString("  ")
			pad := strings.Repeat(" ", t.width[j]-utf8.RuneCountInString(c))
			if t.align[j] == 'r' {
				c, pad = pad, c
			}
			line.WriteString(c + pad)
		}
		fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
	}
}
