// Package doctor checks a machine and what Cay keeps on it. Each check says
// what it saw and, when that is wrong, the repair. Where it can, a check does
// the thing instead of looking at a file: it makes a network slot, opens the
// disks, and with Deep starts a sandbox and uses it.
//
// A check that something else than the machine can answer (the engine, the
// database, the templates) asks a function the caller supplies, so that doctor
// knows contracts only.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob"
	"github.com/cayhq/cay/disk"
	"github.com/cayhq/cay/runtime"
)

// Verdict is the outcome of a check.
type Verdict string

// The verdicts.
const (
	OK   Verdict = "ok"
	Warn Verdict = "warn" // Cay works, with a limit or a risk
	Fail Verdict = "fail" // sandboxes cannot work, or something is broken
	Skip Verdict = "skip" // could not be looked at, or does not apply
)

// Finding is what one check saw.
type Finding struct {
	Verdict  Verdict `json:"verdict"`
	Evidence string  `json:"evidence"`
	// Repair says what to do; empty when there is nothing to repair.
	Repair string `json:"repair,omitempty"`
	Steps  []Step `json:"steps,omitempty"`
}

// Step is one timed part of a check that does something.
type Step struct {
	Name  string        `json:"name"`
	Took  time.Duration `json:"tookNanos"`
	Error string        `json:"error,omitempty"`
}

// Result is a check's finding under its name.
type Result struct {
	ID    string `json:"id"` // "area.name", stable
	Title string `json:"title"`
	Finding
	Took time.Duration `json:"tookNanos"`
}

// Area is the part of the ID before the dot.
func (r Result) Area() string {
	area, _, _ := strings.Cut(r.ID, ".")
	return area
}

// Report is every result, in the order of the table of checks.
type Report struct {
	Results []Result      `json:"checks"`
	Took    time.Duration `json:"tookNanos"`
}

// Count returns how many checks had the verdict.
func (r Report) Count(v Verdict) int {
	n := 0
	for _, res := range r.Results {
		if res.Verdict == v {
			n++
		}
	}
	return n
}

// Server is the running server of the data directory.
type Server struct {
	PID int
	// Health asks the API whether it is well.
	Health func(context.Context) error
}

// Owned is what the records of the data directory name.
type Owned struct {
	Executions []string // engine instances and disks
	Slots      []int    // network slots
}

// EarlierEngine is an engine other than the present one, and who needs it.
type EarlierEngine struct {
	Program   string // the name of its program; empty if it never was a file
	Version   string // empty if nobody needs it
	Kept      bool   // its program is there
	Guests    []string
	Snapshots []string
}

// Template is the current build of a template, as far as a check of it got.
type Template struct {
	Name  string
	Build string
	Bytes int64
	// Err says what is wrong with the build: its manifest, a missing or
	// damaged layer.
	Err error
}

// Certificate is what the server shows to clients of HTTPS.
type Certificate struct {
	Issuer    string
	Left      time.Duration // until it ends
	Untrusted bool          // by this machine
}

// Trial drives one sandbox through its life, by the way clients take. The
// methods are called in this order; Kill also after a failure.
type Trial interface {
	Create(context.Context) error
	// Command runs a command and compares what it prints.
	Command(context.Context) error
	// File writes a file, reads it back and compares.
	File(context.Context) error
	Kill(context.Context) error
}

// Doctor looks at one data directory and the machine under it. [New] sets the
// functions that ask the machine; a nil function means that the checks which
// need it are skipped.
type Doctor struct {
	// Root is the machine's file tree as far as checks read it: proc, sys,
	// etc and run.
	Root     fs.FS
	PageSize int

	// DataDir is an absolute path; it need not exist yet.
	DataDir            string
	APIAddr, ProxyAddr string
	// TLSAddr is where HTTPS is; empty: nowhere.
	TLSAddr      string
	Domain       string
	CIDR         netip.Prefix
	ReserveBytes int64 // free space that new sandboxes leave
	MemoryMB     int   // of a sandbox of the base template

	// Server is nil when none is ready.
	Server *Server
	// Starting is the process of a server that is not ready yet; 0 is none.
	Starting int
	// What of the host belongs to the data directory.
	Tag          string // of namespaces, links and the firewall table
	NamespaceDir string
	InstanceDir  string // holds a directory for each engine instance
	CgroupParent string // path below each cgroup hierarchy

	// The machine.
	Space       func(dir string) (Space, error)
	ClockSynced func() (bool, error)
	Tables      func() ([]Table, error)
	LookPath    func(program string) (string, error)
	LookupHost  func(ctx context.Context, name string) ([]string, error)
	TrySlot     func(context.Context) (string, error)
	TryDisks    func(ctx context.Context, dir string) (disk.Capabilities, error)

	// The parts of the product.
	Engine  func(context.Context) (runtime.Info, error)
	Earlier func(context.Context) ([]EarlierEngine, error)
	// OtherEnvd returns the sandboxes that run with another envd than the one
	// that new ones get.
	OtherEnvd func(context.Context) ([]string, error)
	Store     func(context.Context) error
	Blobs     func(context.Context) (blob.Store, error)
	Owned     func(context.Context) (Owned, error)
	Templates func(ctx context.Context, digests bool) ([]Template, error)
	// Certificate makes a handshake with the server, for a sandbox of Domain.
	// An error is a handshake that fails, or a certificate for something else.
	Certificate func(context.Context) (Certificate, error)
	// Trial is nil when no server runs.
	Trial Trial

	// Deep also compares the digests of templates and starts a sandbox.
	Deep bool
	Now  func() time.Time // nil is time.Now
}

// check is a row of the table.
type check struct {
	id, title string
	run       func(context.Context, *Doctor) Finding
	// alone checks are timed or heavy: they run one after the other, when the
	// rest is done.
	alone bool
	// limit is how long the check may take; zero is limitOfCheck.
	limit time.Duration
}

const (
	limitOfCheck   = 10 * time.Second
	checksAtATime  = 8
	limitOfCleanup = 15 * time.Second
)

// checks is every check, in the order in which they are shown.
func checks() []check {
	var all []check
	for _, area := range [][]check{hostChecks, limitChecks, hardeningChecks, networkChecks, storageChecks, runtimeChecks, templateChecks, leftoverChecks} {
		all = append(all, area...)
	}
	return all
}

// Run does every check and returns the report. Checks that only look run side
// by side. A check that does not answer in its time fails; it is left behind.
func (d *Doctor) Run(ctx context.Context) Report {
	now := d.Now
	if now == nil {
		now = time.Now
	}
	began := now()
	all := checks()
	if d.Deep {
		all = append(all, trialCheck)
	}
	out := make([]Result, len(all))
	one := func(i int) {
		c := all[i]
		start := now()
		out[i] = Result{ID: c.id, Title: c.title, Finding: d.bounded(ctx, c)}
		out[i].Took = now().Sub(start)
	}
	var eg errgroup.Group
	eg.SetLimit(checksAtATime)
	for i, c := range all {
		if !c.alone {
			eg.Go(func() error { one(i); return nil })
		}
	}
	_ = eg.Wait() // the functions return no error
	for i, c := range all {
		if c.alone {
			one(i)
		}
	}
	return Report{Results: out, Took: now().Sub(began)}
}

func (d *Doctor) bounded(ctx context.Context, c check) Finding {
	limit := c.limit
	if limit == 0 {
		limit = limitOfCheck
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := make(chan Finding, 1)
	// A call into the kernel may hang for ever (a dead network file system);
	// then the goroutine stays until the program ends, which is soon.
	go func() { done <- c.run(ctx, d) }()
	var timer <-chan time.Time
	select {
	case f := <-done:
		return f
	case <-ctx.Done():
		// What watches ctx gets a moment to undo what it did and to say why.
		t := time.NewTimer(limitOfCleanup)
		defer t.Stop()
		timer = t.C
	}
	select {
	case f := <-done:
		return f
	case <-timer:
		return fail(fmt.Sprintf("no answer in %s", limit), "something below hangs; see `dmesg` and the state of the file systems")
	}
}

func ok(format string, a ...any) Finding {
	return Finding{Verdict: OK, Evidence: fmt.Sprintf(format, a...)}
}

func skip(format string, a ...any) Finding {
	return Finding{Verdict: Skip, Evidence: fmt.Sprintf(format, a...)}
}

func warn(evidence, repair string) Finding {
	return Finding{Verdict: Warn, Evidence: evidence, Repair: repair}
}

func fail(evidence, repair string) Finding {
	return Finding{Verdict: Fail, Evidence: evidence, Repair: repair}
}

// failed turns an error into a finding; a [*cay.Error] brings its own repair.
func failed(err error, repair string) Finding {
	evidence, fix := Explain(err)
	if fix == "" {
		fix = repair
	}
	return fail(evidence, fix)
}

// read returns a small file of the machine without the white space around it.
func (d *Doctor) read(name string) (string, error) {
	b, err := fs.ReadFile(d.Root, name)
	return strings.TrimSpace(string(b)), err
}

// number reads a file that holds one number.
func (d *Doctor) number(name string) (int64, bool) {
	s, err := d.read(name)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// field returns the value of a "name: value" line, as in proc_pid_status(5).
func field(text, name string) (string, bool) {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(v), true
		}
	}
	return "", false
}

// Capabilities by number (linux/capability.h).
const (
	capNetAdmin  = 12
	capSysPtrace = 19
	capSysAdmin  = 21
)

// capable reports whether this process has a capability.
func (d *Doctor) capable(number int) bool {
	status, err := d.read("proc/self/status")
	if err != nil {
		return false
	}
	v, _ := field(status, "CapEff")
	set, err := strconv.ParseUint(v, 16, 64)
	return err == nil && set&(1<<number) != 0
}

// needRoot makes a check skip itself where root alone may look: what cannot be
// read must not pass for what is not there.
func needRoot(run func(context.Context, *Doctor) Finding) func(context.Context, *Doctor) Finding {
	return func(ctx context.Context, d *Doctor) Finding {
		if !d.capable(capSysAdmin) {
			return skip("needs root")
		}
		return run(ctx, d)
	}
}

// existing returns the data directory, or the nearest directory above it that
// exists: there it will be made.
func (d *Doctor) existing() string {
	dir := d.DataDir
	for dir != "/" && dir != "." {
		if st, err := os.Stat(dir); err == nil && st.IsDir() {
			return dir
		}
		dir = parent(dir)
	}
	return dir
}

func parent(dir string) string {
	i := strings.LastIndexByte(strings.TrimRight(dir, "/"), '/')
	if i <= 0 {
		return "/"
	}
	return dir[:i]
}

// Explain returns an error's message and repair for people. An error that is
// not a [*cay.Error] is its own message.
func Explain(err error) (message, fix string) {
	if e, ok := asError(err); ok {
		return e.Message, e.Fix
	}
	return err.Error(), ""
}

func asError(err error) (*cay.Error, bool) {
	var e *cay.Error
	return e, errors.As(err, &e)
}
