package orchestrator

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

const (
	// metricEvery is how often sandboxes are measured; upstream does it as
	// often (contract/e2b.md 1.4).
	metricEvery = 5 * time.Second
	// metricKept is how many points of a sandbox are kept: an hour.
	metricKept = 720
)

// meter keeps the measurements of running sandboxes. They go with the sandbox
// and with the server: they are for looking, not for billing.
type meter struct {
	mu sync.Mutex
	m  map[cay.ExecutionID]*series
}

type series struct {
	points []cay.Metric
	cpu    int64 // nanoseconds at the last point
}

var _ cay.Metrics = (*Orchestrator)(nil)

// Metrics implements [cay.Metrics]. A sandbox too young to have been measured
// is measured now.
func (o *Orchestrator) Metrics(ctx context.Context, id cay.SandboxID, from, to time.Time) ([]cay.Metric, error) {
	e, err := o.measured(ctx, id)
	if err != nil {
		return nil, err
	}
	return o.meter.between(e, from, to), nil
}

// LastMetric implements [cay.Metrics]. A sandbox too young to have been measured
// is measured now.
func (o *Orchestrator) LastMetric(ctx context.Context, id cay.SandboxID) (cay.Metric, error) {
	e, err := o.measured(ctx, id)
	if err != nil {
		return cay.Metric{}, err
	}
	p, ok := o.meter.last(e)
	if !ok {
		return p, errNotFound(id) // it ended meanwhile
	}
	return p, nil
}

// measured makes sure that a sandbox has a point, and names its run.
func (o *Orchestrator) measured(ctx context.Context, id cay.SandboxID) (cay.ExecutionID, error) {
	o.mu.Lock()
	g := o.bySbx[id]
	known := g != nil && g.rec.Phase != ending
	var rec record
	if known {
		rec = g.rec
	}
	o.mu.Unlock()
	if !known {
		return "", errNotFound(id)
	}
	if !o.meter.has(rec.Execution) {
		if err := o.measure(ctx, rec); err != nil {
			return "", err
		}
	}
	return rec.Execution, nil
}

// measureAll measures every running sandbox at intervals until ctx ends.
func (o *Orchestrator) measureAll(ctx context.Context) {
	t := time.NewTicker(metricEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		o.mu.Lock()
		var recs []record
		live := map[cay.ExecutionID]bool{}
		for _, g := range o.guests {
			if g.rec.Sandbox != "" && g.rec.Phase == running {
				recs = append(recs, g.rec)
			}
			live[g.rec.Execution] = true
		}
		o.mu.Unlock()
		o.meter.keepOnly(live)
		for _, r := range recs {
			if err := o.measure(ctx, r); err != nil && ctx.Err() == nil {
				o.log().Debug("a sandbox could not be measured", "sandbox", r.Sandbox, "error", err)
			}
		}
	}
}

// measure adds one point.
func (o *Orchestrator) measure(ctx context.Context, r record) error {
	st, err := o.Runtime.Stats(ctx, runtime.InstanceID(r.Execution))
	if err != nil {
		return err
	}
	used, total, err := o.Disks.Usage(string(r.Execution))
	if err != nil {
		return err
	}
	o.meter.add(r.Execution, st.CPUNanos, cay.Metric{At: o.now(), CPUs: r.Resources.CPUs,
		MemoryUsed: st.MemoryBytes, MemoryTotal: int64(r.Resources.MemoryMB) << 20, MemoryCached: st.MemoryCached,
		DiskUsed: used, DiskTotal: total}, r.BootedAt)
	return nil
}

func (m *meter) has(e cay.ExecutionID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.m[e] != nil
}

// add appends a point. The first one's share of the CPU is that since the boot.
func (m *meter) add(e cay.ExecutionID, cpu int64, p cay.Metric, booted time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.m == nil {
		m.m = map[cay.ExecutionID]*series{}
	}
	s := m.m[e]
	if s == nil {
		s = &series{}
		m.m[e] = s
	}
	since := booted
	if n := len(s.points); n > 0 {
		since = s.points[n-1].At
	}
	if took := p.At.Sub(since); took > 0 && cpu >= s.cpu {
		p.CPUPercent = 100 * float64(cpu-s.cpu) / float64(took.Nanoseconds())
	}
	s.cpu = cpu
	s.points = append(s.points, p)
	if n := len(s.points) - metricKept; n > 0 {
		s.points = slices.Delete(s.points, 0, n)
	}
}

func (m *meter) between(e cay.ExecutionID, from, to time.Time) []cay.Metric {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := []cay.Metric{}
	if s := m.m[e]; s != nil {
		for _, p := range s.points {
			if (from.IsZero() || !p.At.Before(from)) && (to.IsZero() || !p.At.After(to)) {
				out = append(out, p)
			}
		}
	}
	return out
}

// last is the newest point of a guest, if there is one.
func (m *meter) last(e cay.ExecutionID) (cay.Metric, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.m[e]
	if s == nil || len(s.points) == 0 {
		return cay.Metric{}, false
	}
	return s.points[len(s.points)-1], true
}

// keepOnly forgets guests that are gone.
func (m *meter) keepOnly(live map[cay.ExecutionID]bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for e := range m.m {
		if !live[e] {
			delete(m.m, e)
		}
	}
}
