package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// options say how long a run takes.
type options struct {
	rounds   int           // of the interleaved measurements
	heavy    int           // of those, rounds of pauses that take seconds
	idle     int           // sandboxes that do nothing
	restarts int           // of the server
	rest     time.Duration // from the making of idle sandboxes to their measurement
	watch    time.Duration // of idle sandboxes' processors
	sustain  time.Duration // of creates and kills without a pause
	transfer int64         // bytes of a file that goes in and out
	only     string        // the part to measure; empty is all
}

var (
	full  = options{rounds: 100, heavy: 10, idle: 50, restarts: 5, rest: 5 * time.Second, watch: 20 * time.Second, sustain: 15 * time.Second, transfer: 1 << 30}
	quick = options{rounds: 10, heavy: 3, idle: 50, restarts: 2, rest: 2 * time.Second, watch: 5 * time.Second, sustain: 5 * time.Second, transfer: 128 << 20}
)

// Parts that can be measured alone: the daemon in a sandbox, starts without a
// pool beside their yardsticks, idle sandboxes, the proxy, connections outwards, and
// pauses, resumes and forks.
const (
	partEnvd  = "envd"
	partStart = "start"
	partIdle  = "idle"
	partProxy = "proxy"
	partOut   = "egress"
	partPause = "pause"
)

var alone = []string{partEnvd, partStart, partIdle, partProxy, partOut, partPause}

// run is one run of the benchmark.
type run struct {
	options
	repo, work string
	cay, envd  string    // the programs
	say        io.Writer // progress

	book    book
	figures map[string]Figure

	cold, pool *subject
	yard       *yard
}

// subject is a server with what talks to it.
type subject struct {
	*server
	*client
	sdk    *sdk
	groups guestGroups
	// Names of the series.
	create, http, byHand, load, rate string
}

// poolSize is the default of the product.
const poolSize = 2

func (r *run) note(format string, a ...any) { fmt.Fprintf(r.say, format+"\n", a...) }

// measure does everything, and leaves nothing on the host.
func (r *run) measure(ctx context.Context) (err error) {
	// What was begun is ended also after an interruption.
	clean := context.WithoutCancel(ctx)
	module, err := installSDK(ctx, r.repo)
	if err != nil {
		return err
	}
	image := findImage(r.repo)
	r.cold = r.subject("a", 0)
	r.cold.create, r.cold.http, r.cold.byHand, r.cold.load, r.cold.rate = createCold, httpCold, sdkCold, loadCold, rateCold
	defer func() { err = r.cold.explain(errors.Join(err, r.cold.end())) }()
	if image == "" {
		r.note("building the base template, which takes minutes")
	} else {
		r.note("making the base template of %s", image)
	}
	if err := r.cold.up(ctx, image); err != nil {
		return err
	}
	if r.only != "" {
		return r.measurePart(ctx, module)
	}
	r.note("restarting the server %d times", r.restarts)
	for range r.restarts {
		if err := r.cold.signal(syscall.SIGTERM); err != nil {
			return err
		}
		if err := r.cold.up(ctx, ""); err != nil {
			return err
		}
		r.book.took(upEmpty, r.cold.ready)
	}
	if image == "" {
		if image, err = largestFile(filepath.Join(r.cold.dir, "blobs")); err != nil {
			return err
		}
	}
	r.pool = r.subject("b", poolSize)
	r.pool.create, r.pool.http, r.pool.byHand, r.pool.load, r.pool.rate = createPool, httpPool, sdkPool, loadPool, ratePool
	defer func() { err = r.pool.explain(errors.Join(err, r.pool.end())) }()
	if err := r.pool.up(ctx, image); err != nil {
		return err
	}
	for _, t := range []*subject{r.cold, r.pool} {
		if err := t.connect(r.repo, module); err != nil {
			return err
		}
	}
	defer func() { err = errors.Join(err, r.yard.close(clean)) }()
	if err := r.yard.open(ctx, r.cold.dir); err != nil {
		return fmt.Errorf("preparing the yardstick: %w", err)
	}
	if err := r.interleave(ctx); err != nil {
		return err
	}
	if err := r.measureEnvd(ctx); err != nil {
		return err
	}
	if err := r.measureProxy(ctx); err != nil {
		return err
	}
	if err := r.measureEgress(ctx); err != nil {
		return err
	}
	if err := r.measurePause(ctx); err != nil {
		return err
	}
	for _, t := range []*subject{r.cold, r.pool} {
		if err := r.sustained(ctx, t); err != nil {
			return err
		}
	}
	if err := r.pool.end(); err != nil { // its waiting guests are not to be in the next figures
		return err
	}
	if err := r.idleCost(ctx); err != nil {
		return err
	}
	for name, path := range map[string]string{sizeCay: r.cay, sizeEnvd: r.envd} {
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		r.figures[name] = Figure{round(float64(st.Size()) / 1e6), "MB"}
	}
	return nil
}

// measurePart measures what was asked for alone, with the server without a pool.
func (r *run) measurePart(ctx context.Context, module string) (err error) {
	if err := r.cold.connect(r.repo, module); err != nil {
		return err
	}
	switch r.only {
	case partEnvd:
		return r.measureEnvd(ctx)
	case partIdle:
		return r.idleCost(ctx)
	case partProxy:
		return r.measureProxy(ctx)
	case partOut:
		return r.measureEgress(ctx)
	}
	defer func() { err = errors.Join(err, r.yard.close(context.WithoutCancel(ctx))) }()
	if err := r.yard.open(ctx, r.cold.dir); err != nil {
		return fmt.Errorf("preparing the yardstick: %w", err)
	}
	if r.only == partPause {
		return r.measurePause(ctx)
	}
	return r.interleave(ctx)
}

func (r *run) subject(name string, pool int) *subject {
	dir := filepath.Join(r.work, name)
	return &subject{server: &server{bin: r.cay, dir: dir, pool: pool}, groups: groupsOf(dir)}
}

// connect makes the clients of a server that is ready.
func (t *subject) connect(repo, module string) (err error) {
	t.client = newClient(t.server)
	t.sdk, err = startSDK(repo, module, t.server)
	return err
}

// end is for a subject in any state, and may be repeated.
func (t *subject) end() error {
	var err error
	if t.client != nil {
		t.client.close()
	}
	if t.sdk != nil {
		err = t.sdk.close()
		t.sdk = nil
	}
	if t.cmd != nil {
		err = errors.Join(err, t.down())
		t.cmd = nil
	}
	return err
}

// explain adds to an error what the server said last.
func (t *subject) explain(err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return err
	}
	return fmt.Errorf("%w\nlast lines of the server of %s:\n%s", err, t.dir, t.log.tail())
}

// interleave takes every measurement in turn, in another order each round, so
// that a busy moment of the machine meets all of them alike.
func (r *run) interleave(ctx context.Context) error {
	const warmUps = 2
	order := rand.New(rand.NewPCG(1, 2)) // the same in every run
	for i := range r.rounds + warmUps {
		b := r.book
		if i < warmUps {
			b = book{} // caches fill, programs are compiled
		} else if n := i - warmUps; n%10 == 0 {
			r.note("round %d of %d", n, r.rounds)
		}
		all := []func() error{
			func() error { return measureNative(ctx, r.envd, b) },
			func() error { return r.yard.measure(ctx, b) },
			func() error { return r.cold.byHTTP(ctx, b) },
		}
		if r.only == "" {
			all = append(all,
				func() error { return r.pool.byHTTP(ctx, b) },
				func() error { return r.cold.bySDK(b) },
				func() error { return r.pool.bySDK(b) })
		}
		if err := r.shuffled(ctx, order, all); err != nil {
			return err
		}
	}
	return nil
}

// shuffled takes measurements in a random order, each on a machine at rest.
func (r *run) shuffled(ctx context.Context, order *rand.Rand, all []func() error) error {
	order.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, f := range all {
		if err := r.settle(ctx); err != nil {
			return err
		}
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// settle waits until the servers have no work left of what was before: no
// guest but those of the pool, and processors at rest.
func (r *run) settle(ctx context.Context) error {
	const pause, limit = 40 * time.Millisecond, 15 * time.Second
	for _, t := range []*subject{r.cold, r.pool} {
		if t == nil {
			continue
		}
		for end := time.Now().Add(limit); ; {
			still, err := t.resting(ctx, pause)
			if err != nil {
				return err
			}
			if still {
				break
			}
			if time.Now().After(end) {
				return fmt.Errorf("the server of %s does not come to rest within %s", t.dir, limit)
			}
		}
	}
	return nil
}

// resting looks at a server for the given time.
func (t *subject) resting(ctx context.Context, d time.Duration) (bool, error) {
	n, err := t.groups.count()
	if err != nil || n != t.server.pool {
		time.Sleep(time.Millisecond)
		return false, err
	}
	if t.server.pool > 0 {
		if n, err = t.pooled(ctx); err != nil || n != t.server.pool {
			time.Sleep(time.Millisecond)
			return false, err
		}
	}
	guests, daemons, err := t.groups.busy()
	if err != nil {
		return false, err
	}
	time.Sleep(d)
	guestsNow, daemonsNow, err := t.groups.busy()
	// A tick of the clock is the least that can be seen of the daemons.
	return guestsNow-guests < d/10 && daemonsNow-daemons <= time.Second/ticks, err
}

// byHTTP measures a sandbox without an SDK.
func (t *subject) byHTTP(ctx context.Context, b book) error {
	began := time.Now()
	sbx, err := t.client.create(ctx, 2*time.Minute)
	if err != nil {
		return err
	}
	b.took(t.create, time.Since(began))
	hello, err := t.run(ctx, sbx, "/bin/bash", "-l", "-c", "echo hello")
	if err == nil && string(hello.out) != "hello\n" {
		err = fmt.Errorf("echo said %q", hello.out)
	}
	if err != nil {
		return errors.Join(err, t.kill(ctx, sbx))
	}
	b.took(t.http, hello.first.Sub(began))
	if t.server.pool == 0 {
		if err := t.calls(ctx, b, sbx); err != nil {
			return errors.Join(err, t.kill(ctx, sbx))
		}
	}
	began = time.Now()
	if err := t.kill(ctx, sbx); err != nil {
		return err
	}
	b.took(kill, time.Since(began))
	if t.server.pool > 0 {
		return nil
	}
	for {
		left, err := t.left()
		switch {
		case err != nil:
			return err
		case left == 0:
			b.took(killClean, time.Since(began))
			return nil
		case time.Since(began) > 10*time.Second:
			return errors.New("10 s after its kill a sandbox still has a cgroup or a disk")
		}
		time.Sleep(time.Millisecond / 2)
	}
}

// calls measures what a program does with a sandbox it has.
func (t *subject) calls(ctx context.Context, b book, sbx box) error {
	const each = 5
	for range each {
		began := time.Now()
		c, err := t.run(ctx, sbx, "/bin/true")
		if err != nil {
			return err
		}
		if c.code != 0 {
			return fmt.Errorf("true ended with %d", c.code)
		}
		b.took(runTrue, time.Since(began))
	}
	for range each {
		began := time.Now()
		if err := t.stat(ctx, sbx); err != nil {
			return err
		}
		b.took(call, time.Since(began))
	}
	steps, err := t.trace(ctx, sbx)
	for _, s := range steps {
		b.add(stepPrefix+s.Name, "ms", s.TookMs)
	}
	return err
}

// left counts cgroups and disks of guests.
func (t *subject) left() (int, error) {
	n, err := t.groups.count()
	if err != nil {
		return 0, err
	}
	entries, err := os.ReadDir(filepath.Join(t.dir, "disk", "disks"))
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "ready-") { // held for the next
			n++
		}
	}
	return n, err
}

func (t *subject) bySDK(b book) error {
	r, err := t.sdk.round()
	if err != nil {
		return err
	}
	b.add(t.byHand, "ms", r.First)
	for _, v := range r.Runs {
		b.add(sdkRun, "ms", v)
	}
	b.add(sdkKill, "ms", r.Kill)
	return nil
}

// sustained creates and kills without a pause, twice as many at once as there
// are processors.
func (r *run) sustained(ctx context.Context, t *subject) error {
	if err := r.settle(ctx); err != nil {
		return err
	}
	r.note("%s, for %s", t.rate, r.sustain)
	var mu sync.Mutex
	n := 0
	began := time.Now()
	eg, ctx := errgroup.WithContext(ctx)
	for range 2 * runtime.NumCPU() {
		eg.Go(func() error {
			for time.Since(began) < r.sustain {
				start := time.Now()
				sbx, err := t.client.create(ctx, 2*time.Minute)
				if err != nil {
					return err
				}
				took := time.Since(start)
				if err := t.kill(ctx, sbx); err != nil {
					return err
				}
				mu.Lock()
				n++
				r.book.took(t.load, took)
				mu.Unlock()
			}
			return nil
		})
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	r.figures[t.rate] = Figure{round(float64(n) / time.Since(began).Seconds()), "/s"}
	return nil
}

// idleCost makes many sandboxes, lets them rest, and measures what they cost.
// Then it kills the server and looks whether the next one has them all.
func (r *run) idleCost(ctx context.Context) error {
	t := r.cold
	if err := r.waitEmpty(ctx); err != nil {
		return err
	}
	r.note("%d idle sandboxes, for %s", r.idle, r.rest+r.watch)
	before, err := t.groups.cost()
	if err != nil {
		return err
	}
	free, err := memory()
	if err != nil {
		return err
	}
	boxes := make([]box, r.idle)
	if err := each(boxes, func(b *box) (err error) {
		*b, err = t.client.create(ctx, time.Hour)
		return err
	}); err != nil {
		return err
	}
	if err := pause(ctx, r.rest); err != nil {
		return err
	}
	full, err := t.groups.cost()
	if err != nil {
		return err
	}
	left, err := memory()
	if err != nil {
		return err
	}
	guests, daemons, err := t.groups.busy() // again: to measure took some time
	if err != nil {
		return err
	}
	began := time.Now()
	if err := pause(ctx, r.watch); err != nil {
		return err
	}
	guestsNow, daemonsNow, err := t.groups.busy()
	if err != nil {
		return err
	}
	took := time.Since(began)
	if full.groups != r.idle {
		return fmt.Errorf("%d sandboxes have %d cgroups", r.idle, full.groups)
	}
	per := float64(r.idle)
	growth := max(full.server-before.server, 0) / per // less is the garbage of what was before
	mb := func(bytes float64) Figure { return Figure{round(bytes / 1e6), "MB"} }
	r.figures[idlePSS] = mb(full.pss.sum()/per + growth)
	r.figures[idleSentry], r.figures[idleGofer], r.figures[idleStubs] = mb(full.pss.sentry/per), mb(full.pss.gofer/per), mb(full.pss.stubs/per)
	r.figures[idleGrowth] = mb(growth)
	r.figures[idleCgroup] = mb(full.cgroup / per)
	r.figures[idleHost] = mb((free["MemAvailable"] - left["MemAvailable"]) / per)
	// Each count misses something that the other has: shared pages of programs
	// are in no guest's cgroup, the kernel's memory is in no process.
	r.figures[idleMemory] = mb(max(full.pss.sum(), full.cgroup)/per + growth)
	r.figures[idleCPU] = Figure{round(100 * (guestsNow - guests + daemonsNow - daemons).Seconds() / took.Seconds() / per), "% of a core"}

	if err := t.signal(syscall.SIGKILL); err != nil {
		return err
	}
	t.client.close()
	if err := t.up(ctx, ""); err != nil {
		return err
	}
	r.figures[upFull] = Figure{round(float64(t.ready) / float64(time.Millisecond)), "ms"}
	t.client = newClient(t.server)
	return each(boxes, func(b *box) error {
		return errors.Join(t.stat(ctx, *b), t.kill(ctx, *b))
	})
}

// waitEmpty waits for the end of the sandboxes before.
func (r *run) waitEmpty(ctx context.Context) error {
	for end := time.Now().Add(15 * time.Second); ; {
		still, err := r.cold.resting(ctx, 100*time.Millisecond)
		if err != nil || still {
			return err
		}
		if time.Now().After(end) {
			return errors.New("sandboxes that were killed are still there")
		}
	}
}

// each calls f for every box, some at a time.
func each(boxes []box, f func(*box) error) error {
	var eg errgroup.Group
	eg.SetLimit(2 * runtime.NumCPU())
	for i := range boxes {
		eg.Go(func() error { return f(&boxes[i]) })
	}
	return eg.Wait()
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
