package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/internal/wholefile"
	"github.com/cayhq/cay/runtime"
)

// end moves a guest to its end and removes it in the background. The first
// reason counts; later calls have no effect. g.left is closed when nobody reaches
// the guest any more, and g.gone when no process of it runs any more.
func (o *Orchestrator) end(g *guest, reason cay.EndReason, message string) {
	o.mu.Lock()
	if g.rec.Phase == ending {
		o.mu.Unlock()
		return
	}
	g.rec.EndReason, g.rec.EndMessage = reason, message
	if reason != cay.EndPaused {
		g.op = killpoint.Kill
	}
	if err := o.moveLocked(g, ending); err != nil {
		// The disk refuses the record. Kill all the same: the reconciler of a
		// later run finds a record that says running and an engine that is
		// gone, and removes the rest.
		o.log().Error("the record of an ending guest cannot be written", "execution", g.rec.Execution, "error", err)
		g.rec.Phase = ending
	}
	o.mu.Unlock()
	// Not bound to life: a removal that began is finished before Close returns.
	o.wg.Go(func() { o.remove(context.WithoutCancel(o.life), g) })
}

// remove takes away every host object of an ending guest. Each step may be
// repeated; a step that fails is tried again until it works or the server lets
// go, and then the next run's reconciler goes on with it.
func (o *Orchestrator) remove(ctx context.Context, g *guest) {
	id := g.rec.Execution
	sbx := g.rec.Sandbox
	refused := o.detach(ctx, g)
	if sbx != "" {
		o.Fault.Pass(g.op, "unroute.before")
		o.again("taking the sandbox out of the catalog", id, func() error { return o.Catalog.Delete(ctx, sbx, id) })
		o.Fault.Pass(g.op, "unroute.after")
		if o.Streams != nil {
			o.Streams.Cut(sbx, id)
		}
		o.keepPast(ctx, g, refused)
	}
	if g.rec.EndReason == cay.EndPaused {
		o.leave(g) // it may be resumed
	}
	close(g.left)
	o.Fault.Pass(g.op, "engine-gone.before")
	ending := o.now()
	if !o.again("ending the guest", id, func() error { return o.Runtime.Kill(ctx, runtime.InstanceID(id)) }) {
		return
	}
	o.Fault.Pass(g.op, "engine-gone.after")
	o.leave(g)
	o.mu.Lock()
	delete(o.guests, id)
	o.mu.Unlock()
	if g.rec.EndReason == cay.EndPaused {
		o.past.step(sbx, cay.StartStep{Op: string(killpoint.Pause), Name: "end", Layer: cay.LayerRuntime, Took: o.now().Sub(ending)})
	}
	close(g.gone)
	if sbx != "" {
		e := cay.SandboxEnd{ID: sbx, ExecutionID: id, Reason: g.rec.EndReason, Message: g.rec.EndMessage, At: o.now()}
		if e.Reason == cay.EndPaused {
			e.Snapshot = g.rec.Saving
		}
		o.ends.add(e)
		o.log().Info("sandbox ended", "sandbox", sbx, "execution", id, "reason", g.rec.EndReason, "message", g.rec.EndMessage)
	}
	o.Fault.Pass(g.op, "disk-gone.before")
	ok := o.again("removing the disk", id, func() error { return o.Disks.Remove(ctx, string(id)) })
	o.Fault.Pass(g.op, "disk-gone.after")
	if g.rec.Saving != "" {
		o.Fault.Pass(g.op, "half-gone.before")
		ok = o.again("removing half of a snapshot", id, func() error { return o.dropUnsaved(ctx, g.rec.Saving) }) && ok
		o.Fault.Pass(g.op, "half-gone.after")
	}
	if g.rec.Slot >= 0 {
		o.Fault.Pass(g.op, "network-gone.before")
		ok = o.again("releasing the network slot", id, func() error { return o.Slots.Release(ctx, g.rec.Slot) }) && ok
		o.Fault.Pass(g.op, "network-gone.after")
	}
	if ok {
		o.again("removing the record", id, func() error {
			if err := o.Fault.At(g.op, "record.before-remove"); err != nil {
				return err
			}
			return o.records.remove(id)
		})
		o.Fault.Pass(g.op, "record.gone")
	}
	o.lookAtEngines()
	o.wake()
}

// leave makes a guest one of no sandbox.
func (o *Orchestrator) leave(g *guest) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.bySbx[g.rec.Sandbox] == g {
		delete(o.bySbx, g.rec.Sandbox)
	}
}

// again repeats f until it works. It reports false when the server lets go
// first.
func (o *Orchestrator) again(what string, id cay.ExecutionID, f func() error) bool {
	pause := 20 * time.Millisecond
	for try := 1; ; try++ {
		err := f()
		if err == nil {
			return true
		}
		if try == 3 || try%20 == 0 {
			o.log().Error(what+" does not work, trying again", "execution", id, "try", try, "error", err)
		}
		select {
		case <-o.life.Done():
			if try > 3 {
				return false
			}
		case <-time.After(pause):
		}
		pause = min(2*pause, 5*time.Second)
	}
}

// keepPast remembers what was said on the console, what was refused, and how the
// start went.
func (o *Orchestrator) keepPast(ctx context.Context, g *guest, refused []cay.EgressRefusal) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	lines, err := o.Runtime.Console(ctx, runtime.InstanceID(g.rec.Execution))
	if err != nil {
		lines = nil // the console of a dead engine is a courtesy
	}
	o.mu.Lock()
	steps := slices.Clone(g.rec.Steps)
	o.mu.Unlock()
	err = o.past.put(g.rec.Sandbox, pastGuest{console: lines[max(0, len(lines)-pastLines):], steps: steps, refused: refused})
	if err != nil {
		o.log().Warn("what was refused to an ended sandbox is not kept over a restart", "sandbox", g.rec.Sandbox, "error", err)
	}
}

// ends delivers the ends of sandboxes to watchers.
type ends struct {
	mu   sync.Mutex
	list []cay.SandboxEnd
	base int // how many were dropped from the front of list
	next int // the first that no watcher has taken
	more chan struct{}
}

// maxEnds bounds the memory of ends nobody watches.
const maxEnds = 10_000

func (e *ends) init() { e.more = make(chan struct{}) }

func (e *ends) add(s cay.SandboxEnd) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, s)
	if n := len(e.list) - maxEnds; n > 0 {
		e.list = slices.Delete(e.list, 0, n)
		e.base += n
	}
	close(e.more)
	e.more = make(chan struct{})
}

// watch calls f for every end from the first that nobody took.
func (e *ends) watch(ctx context.Context, f func(cay.SandboxEnd)) error {
	e.mu.Lock()
	at := e.next
	e.mu.Unlock()
	for {
		e.mu.Lock()
		at = max(at, e.base)
		batch := slices.Clone(e.list[min(at-e.base, len(e.list)):])
		more := e.more
		at += len(batch)
		e.next = max(e.next, at)
		e.mu.Unlock()
		for _, s := range batch {
			f(s)
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-more:
		}
	}
}

// past remembers ended sandboxes for an hour.
type past struct {
	now func() time.Time
	dir string // where refusals are kept over a restart; empty for nowhere
	mu  sync.Mutex
	m   map[cay.SandboxID]pastGuest
}

type pastGuest struct {
	console []cay.ConsoleLine
	steps   []cay.StartStep
	refused []cay.EgressRefusal
	at      time.Time
}

const (
	pastLines = 200
	pastFor   = time.Hour
	pastMax   = 1000
)

func (p *past) init(now func() time.Time) { p.now, p.m = now, map[cay.SandboxID]pastGuest{} }

func (p *past) put(id cay.SandboxID, g pastGuest) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	g.at = p.now()
	p.m[id] = g
	err := p.pruneLocked()
	if len(g.refused) == 0 || p.dir == "" {
		return errors.Join(err, p.dropFile(id))
	}
	b, jerr := json.Marshal(pastRefusals{At: g.at, Refused: g.refused})
	if jerr == nil {
		jerr = wholefile.Write(p.file(id), b, 0o600)
	}
	return errors.Join(err, jerr)
}

// pruneLocked forgets what is too old, and the oldest of too many.
func (p *past) pruneLocked() error {
	var errs []error
	var oldest cay.SandboxID
	for k, v := range p.m {
		if p.now().Sub(v.at) > pastFor {
			delete(p.m, k)
			errs = append(errs, p.dropFile(k))
		} else if oldest == "" || v.at.Before(p.m[oldest].at) {
			oldest = k
		}
	}
	if len(p.m) > pastMax {
		delete(p.m, oldest)
		errs = append(errs, p.dropFile(oldest))
	}
	return errors.Join(errs...)
}

// pastRefusals is what a file has of what was refused to an ended sandbox.
type pastRefusals struct {
	At      time.Time           `json:"at"`
	Refused []cay.EgressRefusal `json:"refused"`
}

const pastSuffix = ".json"

func (p *past) file(id cay.SandboxID) string { return filepath.Join(p.dir, string(id)+pastSuffix) }

func (p *past) dropFile(id cay.SandboxID) error {
	if p.dir == "" {
		return nil
	}
	return wholefile.Remove(p.file(id))
}

// load remembers what an earlier run has kept. A file that is none, or too old,
// is removed.
func (p *past) load() error {
	if p.dir == "" {
		return nil
	}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(p.dir)
	errs := []error{err}
	for _, e := range entries {
		id, _ := strings.CutSuffix(e.Name(), pastSuffix)
		var kept pastRefusals
		b, err := os.ReadFile(filepath.Join(p.dir, e.Name()))
		if err == nil {
			err = json.Unmarshal(b, &kept)
		}
		if err != nil || p.now().Sub(kept.At) > pastFor {
			errs = append(errs, os.Remove(filepath.Join(p.dir, e.Name())))
			continue
		}
		p.m[cay.SandboxID(id)] = pastGuest{refused: kept.Refused, at: kept.At}
	}
	return errors.Join(errs...)
}

// step adds a step to what is remembered of a sandbox.
func (p *past) step(id cay.SandboxID, s cay.StartStep) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if g, ok := p.m[id]; ok {
		g.steps = append(g.steps, s)
		p.m[id] = g
	}
}

func (p *past) get(id cay.SandboxID) (pastGuest, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	g, ok := p.m[id]
	if ok && p.now().Sub(g.at) > pastFor {
		delete(p.m, id)
		return pastGuest{}, false
	}
	return g, ok
}
