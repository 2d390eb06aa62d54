package api

import (
	"context"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
)

// maxMetricIDs is how many sandboxes may be asked about at once (e2b.md 1.4).
const maxMetricIDs = 100

// errNoMetrics is the answer where nothing measures.
var errNoMetrics = absent("metrics of sandboxes", "run top or free in them")

// SandboxMetrics implements the generated interface.
func (s sandboxHandlers) SandboxMetrics(ctx context.Context, r gen.SandboxMetricsRequestObject) (gen.SandboxMetricsResponseObject, error) {
	if s.Metrics == nil {
		return nil, errNoMetrics
	}
	rec, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	if rec.State == cay.StateEnded {
		return nil, errNoSandbox(rec.ID)
	}
	var from, to time.Time
	if r.Params.Start != nil {
		from = time.Unix(*r.Params.Start, 0)
	}
	if r.Params.End != nil {
		to = time.Unix(*r.Params.End, 0).Add(time.Second - 1) // the whole second
	}
	if !from.IsZero() && !to.IsZero() && to.Before(from) {
		return nil, invalid("end is before start", "send seconds since 1970, start first")
	}
	out := gen.SandboxMetrics200JSONResponse{}
	points, err := s.Metrics.Metrics(ctx, rec.ID, from, to)
	if err != nil && cay.CodeOf(err) != cay.CodeSandboxNotFound { // one that does not run has none
		return nil, err
	}
	for _, p := range points {
		out = append(out, metric(p))
	}
	return out, nil
}

// ListSandboxMetrics implements the generated interface. Sandboxes that are not
// the caller's, or not running, are left out.
func (s sandboxHandlers) ListSandboxMetrics(ctx context.Context, r gen.ListSandboxMetricsRequestObject) (gen.ListSandboxMetricsResponseObject, error) {
	if s.Metrics == nil {
		return nil, errNoMetrics
	}
	ids := r.Params.SandboxIds
	if len(ids) > maxMetricIDs {
		return nil, invalid("sandbox_ids has %d sandboxes, and may have %d", "ask in several calls", len(ids), maxMetricIDs)
	}
	out := gen.ListSandboxMetrics200JSONResponse{Sandboxes: map[string]gen.SandboxMetric{}}
	for _, ref := range ids {
		rec, err := s.find(ctx, ref)
		switch cay.CodeOf(err) {
		case "":
		case cay.CodeSandboxNotFound:
			continue
		default:
			return nil, err
		}
		p, err := s.Metrics.LastMetric(ctx, rec.ID)
		switch cay.CodeOf(err) {
		case "":
			out.Sandboxes[string(rec.ID)] = metric(p)
		case cay.CodeSandboxNotFound: // it does not run
		default:
			return nil, err
		}
	}
	return out, nil
}

func metric(p cay.Metric) gen.SandboxMetric {
	return gen.SandboxMetric{Timestamp: p.At, TimestampUnix: p.At.Unix(), CpuCount: int32(p.CPUs), CpuUsedPct: float32(p.CPUPercent),
		MemUsed: p.MemoryUsed, MemTotal: p.MemoryTotal, MemCache: p.MemoryCached, DiskUsed: p.DiskUsed, DiskTotal: p.DiskTotal}
}
