package main

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
)

// Names of what pauses, resumes and forks are measured by. A resume and a fork
// end with the first byte that the guest answers through the proxy.
const (
	pauseBareRun   = "bare runsc run --detach, the command, beside pauses"
	pauseBareReady = "bare runsc run --detach, to envd's answer, beside pauses"
	pauseBareDisk  = "1 GiB written to the host's disk and synced, beside pauses"

	pauseIdle      = "pause, idle guest"
	pauseClean     = "pause to cgroup gone, idle guest"
	pauseSmall     = "pause, 64 MB dirty"
	pauseLarge     = "pause, 256 MB dirty"
	pauseFlushed   = "pause, 1 GiB written back"
	pauseWritten   = "pause, 1 GiB just written"
	resumeIdle     = "resume, idle guest"
	resumeSmall    = "resume, 64 MB dirty"
	resumeLarge    = "resume, 256 MB dirty"
	resumeAllSmall = "resume to all memory read, 64 MB dirty"
	resumeAllLarge = "resume to all memory read, 256 MB dirty"
	resumeFlushed  = "resume, 1 GiB written back"
	resumeWritten  = "resume, 1 GiB just written"
	forkOne        = "fork, idle guest"
	forkMany       = "20 forks at once, to the last one's first byte"

	// A guest's clocks run on while it is paused, so what it sees of a pause is
	// the time until it is resumed, and has no limit of its own.
	heldIdle     = "frozen by a snapshot, idle guest"
	heldSmall    = "frozen by a snapshot, 64 MB dirty"
	stoppedIdle  = "longest tick over pause and resume, idle guest"
	stoppedSmall = "longest tick over pause and resume, 64 MB dirty"
	heldNot      = "longest tick without either"

	pausedProcesses = "paused sandbox, processes"
	pausedMemory    = "paused sandbox, memory of processes and cgroup"
	pausedGrowth    = "paused sandbox, growth of server and supervisor"
)

var pauseSection = section{"pause", []string{pauseIdle, pauseClean, pauseSmall, pauseLarge, pauseFlushed, pauseWritten,
	resumeIdle, resumeSmall, resumeLarge, resumeAllSmall, resumeAllLarge, resumeFlushed, resumeWritten, forkOne, forkMany,
	heldIdle, heldSmall, stoppedIdle, stoppedSmall, heldNot, pauseBareRun, pauseBareReady, pauseBareDisk}}

// Sizes of what guests have written to before a pause.
const (
	smallMB   = 64
	largeMB   = 256
	manyForks = 20
	parked    = 10 // paused sandboxes that are looked at together
)

// pauseTargets are what pauses, resumes and forks are held to.
func pauseTargets(o outcome) []Target {
	var out []Target
	add := func(name string, value, limit float64, unit string, required bool) {
		v := round(value)
		out = append(out, Target{Name: name, Value: v, Limit: limit, Unit: unit, Met: v <= limit, Required: required})
	}
	ratio := func(a, b string, limit float64) {
		x, okx := o.series[a]
		y, oky := o.series[b]
		if okx && oky && y.P50 > 0 {
			add(a+" ÷ "+b, x.P50/y.P50, limit, "×", true)
		}
	}
	// more is what a costs beyond b, for each of per.
	more := func(name, a, b string, per, limit float64, unit string, required bool) {
		x, okx := o.series[a]
		y, oky := o.series[b]
		if okx && oky {
			add(name, (x.P50-y.P50)/per, limit, unit, required)
		}
	}
	frozen := func(name string, dirtyMB float64) {
		if s, ok := o.series[name]; ok {
			add(name+": p50", s.P50, round(100+0.3*dirtyMB), s.Unit, true)
		}
	}
	ratio(pauseIdle, pauseBareReady, 0.7)
	frozen(heldIdle, 0)
	frozen(heldSmall, smallMB)
	ratio(resumeIdle, pauseBareReady, 0.5)
	more("resume, for each MB dirty", resumeLarge, resumeSmall, largeMB-smallMB, 1.2, "ms/MB", true)
	// What is written back may not cost again. What is not yet has to be, before
	// the pause is durable: nothing that a server does makes that free.
	more(pauseFlushed+" − idle", pauseFlushed, pauseIdle, 1, 150, "ms", true)
	more(resumeFlushed+" − idle", resumeFlushed, resumeIdle, 1, 150, "ms", true)
	more(pauseWritten+" − idle", pauseWritten, pauseIdle, 1, 150, "ms", false)
	more(resumeWritten+" − idle", resumeWritten, resumeIdle, 1, 150, "ms", false)
	if disk, ok := o.series[pauseBareDisk]; ok && disk.P50 > 0 {
		more("("+pauseWritten+" − idle) ÷ "+pauseBareDisk, pauseWritten, pauseIdle, disk.P50, 0.25, "×", false)
	}
	ratio(forkOne, resumeIdle, 1.2)
	ratio(forkMany, forkOne, 12)
	for _, name := range []string{pausedProcesses, pausedMemory} {
		if f, ok := o.figures[name]; ok {
			add(name, f.Value, 0, f.Unit, true)
		}
	}
	return out
}

// ticker looks at the clocks about every millisecond, and keeps the longest
// time between two looks. It holds as many MB of noise as it is told. Its answer
// to /gap is that time in milliseconds; to /read, it reads a byte of every page;
// to /dirty, it writes one. Each answer, and each look whether it is there,
// begins the measurement anew.
const ticker = `import os, socket, sys, time
n, v, data = int(sys.argv[1]) * 1000000, 0, bytearray()
while len(data) < n: data += os.urandom(1000000)
def now(): return time.clock_gettime(time.CLOCK_MONOTONIC), time.clock_gettime(time.CLOCK_BOOTTIME)
l = socket.create_server(("0.0.0.0", 7004))
l.setblocking(False)
last, gap = now(), 0
while True:
    t = now()
    gap, last = max(gap, t[0] - last[0], t[1] - last[1]), t
    try: c = l.accept()[0]
    except BlockingIOError:
        time.sleep(0.001)
        continue
    c.settimeout(10)
    asked, text = c.recv(65536).split(b" "), "%.3f" % (gap * 1000)
    path = asked[1] if len(asked) > 1 else b""
    if path == b"/read": text = str(sum(data[::4096]))
    if path == b"/dirty":
        v = (v + 1) % 256
        data[::4096] = bytes([v]) * len(data[::4096])
    if path: c.sendall(("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)).encode())
    c.close()
    last, gap = now(), 0
`

const (
	tickerPort = 7004
	envdPort   = 49983
)

// noise writes 1 GiB that does not compress, and leaves the node three seconds
// to write it back if asked to.
const noise = `import os, sys, time
b = os.urandom(1 << 20)
with open("/home/user/written", "wb") as f:
    for _ in range(1024): f.write(b)
if sys.argv[1] == "back": time.sleep(3)
`

func (c *client) sandboxCall(ctx context.Context, b box, version, what string, body, into any) error {
	return c.do(ctx, http.MethodPost, c.api+version+"/sandboxes/"+url.PathEscape(b.ID)+what, c.keyed(), body, into)
}

func (c *client) pause(ctx context.Context, b box) error {
	return c.sandboxCall(ctx, b, "", "/pause", struct{}{}, nil)
}

func (c *client) resume(ctx context.Context, b box) error {
	return c.sandboxCall(ctx, b, "/v2", "/connect", map[string]any{"timeout": 3600}, nil)
}

// snapshot takes one of a sandbox that runs on, and removes it.
func (c *client) snapshot(ctx context.Context, b box) error {
	var s struct {
		ID string `json:"snapshotID"`
	}
	if err := c.sandboxCall(ctx, b, "", "/snapshots", struct{}{}, &s); err != nil {
		return err
	}
	return c.do(ctx, http.MethodDelete, c.api+"/templates/"+url.PathEscape(s.ID), c.keyed(), nil, nil)
}

// fork makes as many forks as asked for, or fails. What it has made it returns
// in every case.
func (c *client) fork(ctx context.Context, b box, count int) ([]box, error) {
	var results []struct {
		Sandbox *box
		Error   *struct{ Message string }
	}
	if err := c.sandboxCall(ctx, b, "", "/fork", map[string]any{"timeout": 3600, "count": count}, &results); err != nil {
		return nil, err
	}
	var out []box
	var err error
	for _, r := range results {
		switch {
		case r.Sandbox != nil:
			out = append(out, *r.Sandbox)
		case r.Error != nil:
			err = errors.Join(err, errors.New("a fork failed: "+r.Error.Message))
		}
	}
	if err == nil && len(out) != count {
		err = fmt.Errorf("%d forks were asked for, %d were made", count, len(out))
	}
	return out, err
}

// ask asks a service of a sandbox through the proxy, and tells when its answer
// began.
func (c *client) ask(ctx context.Context, b box, port int, path string) (first time.Time, text string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.proxy+path, nil)
	if err != nil {
		return first, "", err
	}
	req.Header = inside(b)
	req.Header.Set("E2b-Sandbox-Port", strconv.Itoa(port))
	resp, err := c.http.Do(req)
	if err != nil {
		return first, "", err
	}
	first = time.Now()
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("GET %s of port %d: %s: %s", path, port, resp.Status, bytes.TrimSpace(body))
	}
	return first, string(body), err
}

// health asks the daemon whether it is there.
func (c *client) health(ctx context.Context, b box) (time.Time, error) {
	first, _, err := c.ask(ctx, b, envdPort, "/health")
	return first, err
}

// gap asks the ticker for its longest tick, and tells when its answer began.
func (c *client) gap(ctx context.Context, b box) (ms float64, first time.Time, err error) {
	first, text, err := c.ask(ctx, b, tickerPort, "/gap")
	if err == nil {
		ms, err = strconv.ParseFloat(text, 64)
	}
	return ms, first, err
}

// isHeavy tells whether the n-th of some rounds is one of those, evenly spread,
// that also take what lasts for seconds.
func isHeavy(n, rounds, heavy int) bool { return n*heavy%rounds < heavy }

// measurePause takes pauses, resumes and forks in turn with the yardstick, in
// another order each round. The yard must be open.
func (r *run) measurePause(ctx context.Context) error {
	r.note("pause: %d rounds beside the yardstick, %d of them with memory, files and %d forks", r.rounds, min(r.heavy, r.rounds), manyForks)
	const warmUps = 1
	t := r.cold
	order := rand.New(rand.NewPCG(3, 4)) // the same in every run
	for i := range r.rounds + warmUps {
		n, b := i-warmUps, r.book
		if n < 0 {
			b = book{}
		}
		all := []func() error{
			func() error { return r.besidePauses(ctx, b) },
			func() error { return t.idlePause(ctx, b) },
		}
		if n >= 0 && isHeavy(n, r.rounds, r.heavy) {
			r.note("pause: round %d of %d", n, r.rounds)
			all = append(all,
				func() error {
					return t.tickingPause(ctx, b, 0, ticking{stopped: stoppedIdle, held: heldIdle, not: heldNot})
				},
				func() error {
					return t.tickingPause(ctx, b, smallMB, ticking{pause: pauseSmall, resume: resumeSmall, all: resumeAllSmall, stopped: stoppedSmall, held: heldSmall})
				},
				func() error {
					return t.tickingPause(ctx, b, largeMB, ticking{pause: pauseLarge, resume: resumeLarge, all: resumeAllLarge})
				},
				func() error { return t.writtenPause(ctx, b, "back", pauseFlushed, resumeFlushed) },
				func() error { return t.writtenPause(ctx, b, "later", pauseWritten, resumeWritten) },
				func() error { return r.writeBare(b) },
				func() error { return t.manyForks(ctx, b) })
		}
		if err := r.shuffled(ctx, order, all); err != nil {
			return err
		}
	}
	return r.pausedCost(ctx)
}

// besidePauses takes the yardstick into series of their own: other rounds than
// those of the creates.
func (r *run) besidePauses(ctx context.Context, b book) error {
	mine := book{}
	if err := r.yard.measure(ctx, mine); err != nil {
		return err
	}
	for from, to := range map[string]string{bareRun: pauseBareRun, bareReady: pauseBareReady} {
		for _, v := range mine[from].values {
			b.add(to, mine[from].unit, v)
		}
	}
	return nil
}

// writeBare writes as much to the host's disk as noise does in a guest, and waits
// for the disk.
func (r *run) writeBare(b book) error {
	f, err := os.Create(filepath.Join(r.work, "written"))
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	block := make([]byte, 1<<20)
	crand.Read(block)
	began := time.Now()
	for range 1024 {
		if _, err := f.Write(block); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	b.took(pauseBareDisk, time.Since(began))
	return nil
}

// calm is how long a guest has done nothing before it is paused.
const calm = 300 * time.Millisecond

// guest makes a sandbox for f, and removes it.
func (t *subject) guest(ctx context.Context, f func(box) error) error {
	b, err := t.client.create(ctx, time.Hour)
	if err != nil {
		return err
	}
	_, err = t.health(ctx, b)
	if err == nil {
		err = f(b)
	}
	return errors.Join(err, t.kill(context.WithoutCancel(ctx), b))
}

// idlePause pauses, resumes and forks a guest that does nothing.
func (t *subject) idlePause(ctx context.Context, b book) error {
	return t.guest(ctx, func(sbx box) error {
		if err := pause(ctx, calm); err != nil {
			return err
		}
		began := time.Now()
		if err := t.client.pause(ctx, sbx); err != nil {
			return err
		}
		b.took(pauseIdle, time.Since(began))
		if err := t.waitGone(ctx); err != nil {
			return err
		}
		b.took(pauseClean, time.Since(began))
		if err := pause(ctx, calm); err != nil {
			return err
		}
		if err := t.resumed(ctx, b, sbx, resumeIdle); err != nil {
			return err
		}
		return t.timeForks(ctx, b, sbx, forkOne, 1)
	})
}

// timeForks takes the time to the first byte of the last fork that answers.
func (t *subject) timeForks(ctx context.Context, b book, sbx box, name string, count int) error {
	if err := pause(ctx, calm); err != nil {
		return err
	}
	began := time.Now()
	boxes, err := t.client.fork(ctx, sbx, count)
	if err == nil {
		firsts := make([]time.Time, len(boxes))
		var eg errgroup.Group
		for i := range boxes {
			eg.Go(func() (err error) {
				firsts[i], err = t.health(ctx, boxes[i])
				return err
			})
		}
		if err = eg.Wait(); err == nil {
			var last time.Time
			for _, at := range firsts {
				if at.After(last) {
					last = at
				}
			}
			b.took(name, last.Sub(began))
		}
	}
	return errors.Join(err, each(boxes, func(f *box) error { return t.kill(context.WithoutCancel(ctx), *f) }))
}

func (t *subject) manyForks(ctx context.Context, b book) error {
	return t.guest(ctx, func(sbx box) error { return t.timeForks(ctx, b, sbx, forkMany, manyForks) })
}

// waitGone waits until no guest has a cgroup.
func (t *subject) waitGone(ctx context.Context) error {
	for began := time.Now(); ; {
		n, err := t.groups.count()
		if err != nil || n == t.server.pool {
			return err
		}
		if time.Since(began) > 10*time.Second {
			return fmt.Errorf("10 s after a pause %d cgroups of guests are left", n)
		}
		if err := pause(ctx, time.Millisecond/2); err != nil {
			return err
		}
	}
}

// ticking are names of series of a guest with the ticker; what has none is
// not recorded.
type ticking struct{ pause, resume, all, stopped, held, not string }

// tickingPause looks at a guest with some memory written to: how long a
// snapshot and a pause stop it by its own clock, and what pause and resume take.
func (t *subject) tickingPause(ctx context.Context, b book, dirtyMB int, names ticking) error {
	record := func(name string, ms float64) {
		if name != "" {
			b.add(name, "ms", ms)
		}
	}
	took := func(name string, d time.Duration) { record(name, float64(d)/float64(time.Millisecond)) }
	return t.guest(ctx, func(sbx box) error {
		start, err := t.run(ctx, sbx, "/bin/bash", "-c", "setsid -f python3 -c '"+ticker+"' "+strconv.Itoa(dirtyMB)+
			" >/dev/null 2>&1; for i in $(seq 400); do (: </dev/tcp/127.0.0.1/7004) 2>/dev/null && exit 0; sleep 0.1; done; exit 1")
		if err == nil && start.code != 0 {
			err = fmt.Errorf("status %d", start.code)
		}
		if err != nil {
			return fmt.Errorf("starting the ticker: %w", err)
		}
		dirty := func() error {
			if err := pause(ctx, calm); err != nil {
				return err
			}
			_, _, err := t.ask(ctx, sbx, tickerPort, "/dirty")
			return err
		}
		if names.not != "" {
			if err := errors.Join(dirty(), pause(ctx, calm)); err != nil {
				return err
			}
			ms, _, err := t.gap(ctx, sbx)
			if err != nil {
				return err
			}
			record(names.not, ms)
		}
		if names.held != "" {
			if err := errors.Join(dirty(), t.client.snapshot(ctx, sbx)); err != nil {
				return err
			}
			ms, _, err := t.gap(ctx, sbx)
			if err != nil {
				return err
			}
			record(names.held, ms)
		}
		if err := dirty(); err != nil {
			return err
		}
		began := time.Now()
		if err := t.client.pause(ctx, sbx); err != nil {
			return err
		}
		took(names.pause, time.Since(began))
		began = time.Now()
		if err := t.client.resume(ctx, sbx); err != nil {
			return err
		}
		ms, first, err := t.gap(ctx, sbx)
		if err != nil {
			return err
		}
		took(names.resume, first.Sub(began))
		record(names.stopped, ms)
		if first, _, err = t.ask(ctx, sbx, tickerPort, "/read"); err != nil {
			return err
		}
		took(names.all, first.Sub(began))
		return nil
	})
}

// writtenPause pauses a guest that has written 1 GiB to its disk.
func (t *subject) writtenPause(ctx context.Context, b book, how, pauseName, resumeName string) error {
	return t.guest(ctx, func(sbx box) error {
		if err := t.write(ctx, sbx, how); err != nil {
			return fmt.Errorf("writing 1 GiB in a sandbox: %w", err)
		}
		began := time.Now()
		if err := t.client.pause(ctx, sbx); err != nil {
			return err
		}
		b.took(pauseName, time.Since(began))
		return t.resumed(ctx, b, sbx, resumeName)
	})
}

// resumed resumes a sandbox and records how long that takes to the first byte
// through the proxy.
func (t *subject) resumed(ctx context.Context, b book, sbx box, name string) error {
	began := time.Now()
	if err := t.client.resume(ctx, sbx); err != nil {
		return err
	}
	first, err := t.health(ctx, sbx)
	if err != nil {
		return err
	}
	b.took(name, first.Sub(began))
	return nil
}

func (t *subject) write(ctx context.Context, sbx box, how string) error {
	patient := *t.client
	longer := *t.client.http
	longer.Timeout = 5 * time.Minute // the disk of a busy machine takes its time
	patient.http = &longer
	got, err := patient.run(ctx, sbx, "/usr/bin/env", "python3", "-c", noise, how)
	if err == nil && got.code != 0 {
		err = fmt.Errorf("status %d", got.code)
	}
	return err
}

// pausedCost pauses some sandboxes and looks what is left of them on the host
// besides files.
func (r *run) pausedCost(ctx context.Context) error {
	t := r.cold
	if err := r.settle(ctx); err != nil {
		return err
	}
	r.note("pause: %d paused sandboxes, for %s", parked, r.rest)
	boxes := make([]box, parked)
	if err := each(boxes, func(b *box) (err error) {
		*b, err = t.client.create(ctx, time.Hour)
		return err
	}); err != nil {
		return err
	}
	running, err := t.hostShare()
	if err != nil {
		return err
	}
	if running.processes == 0 || running.memory == 0 {
		return fmt.Errorf("%d running sandboxes have %d processes and %.0f bytes: their cgroups were not found", parked, running.processes, running.memory)
	}
	if err := each(boxes, func(b *box) error { return t.client.pause(ctx, *b) }); err != nil {
		return err
	}
	// Not waitGone: what does not go is a figure, and no error.
	if err := pause(ctx, r.rest); err != nil {
		return err
	}
	paused, err := t.hostShare()
	if err != nil {
		return err
	}
	for name, f := range pausedFigures(running, paused, parked) {
		r.figures[name] = f
	}
	return each(boxes, func(b *box) error { return t.kill(ctx, *b) })
}

// share is what guests have of the host.
type share struct {
	processes      int
	memory, server float64 // bytes, of the guests, and of server and supervisor
}

func (t *subject) hostShare() (share, error) {
	c, err := t.groups.cost()
	if err != nil {
		return share{}, err
	}
	pids, err := t.groups.members()
	return share{processes: len(pids), memory: max(c.pss.sum(), c.cgroup), server: c.server}, err
}

// pausedFigures are what each of n paused sandboxes has, and by how much the
// server has grown since they ran.
func pausedFigures(running, paused share, n int) map[string]Figure {
	per := float64(n)
	return map[string]Figure{
		pausedProcesses: {round(float64(paused.processes) / per), ""},
		pausedMemory:    {round(paused.memory / 1e6 / per), "MB"},
		pausedGrowth:    {round(max(paused.server-running.server, 0) / 1e6 / per), "MB"},
	}
}
