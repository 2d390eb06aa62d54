package cay

import (
	"context"
	"time"
)

// Metric is what a sandbox used at one instant, as its machine sees it: the
// guest is not asked, so that looking costs it nothing.
type Metric struct {
	At   time.Time
	CPUs int
	// CPUPercent of one CPU since the instant before; 200 is two whole ones.
	CPUPercent float64
	// Bytes. MemoryUsed counts the engine too and no page cache.
	MemoryUsed, MemoryTotal, MemoryCached int64
	DiskUsed, DiskTotal                   int64
}

// Metrics is what the control plane needs of a machine that measures its
// sandboxes, beside [Node].
type Metrics interface {
	// Metrics returns what is known of a running sandbox between two instants,
	// both included, oldest first; a zero instant is no bound. Points are some
	// seconds apart and kept for an hour or so. Unknown sandboxes are
	// CodeSandboxNotFound.
	Metrics(ctx context.Context, id SandboxID, from, to time.Time) ([]Metric, error)
	// LastMetric returns the newest point alone.
	LastMetric(ctx context.Context, id SandboxID) (Metric, error)
}
