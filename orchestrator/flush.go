package orchestrator

import (
	"context"
	"time"

	"github.com/cayhq/cay"
)

const (
	// growthEvery is how often the disks of running guests are looked at.
	growthEvery = time.Second
	// growthMin is what a disk must have grown by, in bytes, to be written
	// back: what is less costs a save a few milliseconds.
	growthMin = 8 << 20
)

// flushGrown writes back the disks of guests that write much, while they run,
// one at a time, until ctx ends: a save waits for what is not written back
// yet, and the kernel by itself would leave it for half a minute. What a guest
// overwrites in place does not make its disk grow and waits for the kernel, or
// for the save.
func (o *Orchestrator) flushGrown(ctx context.Context) {
	t := time.NewTicker(growthEvery)
	defer t.Stop()
	flushed := map[cay.ExecutionID]int64{} // bytes used when last written back
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		o.mu.Lock()
		live := make(map[cay.ExecutionID]bool, len(o.guests))
		for _, g := range o.guests {
			live[g.rec.Execution] = g.rec.Phase == running
		}
		o.mu.Unlock()
		for e := range flushed {
			if _, ok := live[e]; !ok {
				delete(flushed, e)
			}
		}
		for e, runs := range live {
			if !runs || ctx.Err() != nil {
				continue
			}
			used, _, err := o.Disks.Usage(string(e))
			if err != nil {
				continue // it is going away, or a save will tell
			}
			if used < flushed[e] {
				flushed[e] = used // it was emptied
			}
			if used-flushed[e] < growthMin {
				continue
			}
			if err := o.Disks.Flush(string(e)); err != nil {
				o.log().Debug("a disk could not be written back ahead", "execution", e, "error", err)
				continue
			}
			flushed[e] = used
		}
	}
}
