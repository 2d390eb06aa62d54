package orchestrator

import (
	"context"
	"time"

	"github.com/cayhq/cay"
)

const (
	// growthEvery is how often the disks of running guests are looked at, as
	// long as they are few: a disk takes as long for what was written in that
	// time alone.
	growthEvery = 100 * time.Millisecond
	// looksPerSecond bounds how many disks are looked at. As many as that are a
	// hundredth of a processor: 50 idle sandboxes take 0.060 % each with ten looks
	// a second, and 0.037 % with one (bench -only idle, runs in turn).
	looksPerSecond = 500
	// growthMin is what a disk must have grown by, in bytes, to be written
	// back: what is less costs a save a few milliseconds.
	growthMin = 8 << 20
	// flushAgain is how long a disk is left alone that could not be written
	// back.
	flushAgain = time.Second
)

// ahead is what is known of one disk that is written back ahead.
type ahead struct {
	used  int64     // bytes, when last written back
	after time.Time // not before
}

// flushGrown writes back the disks of guests that write much, while they run,
// one at a time, until ctx ends: a save waits for what is not written back
// yet, and the kernel by itself would leave it for half a minute. What a guest
// overwrites in place does not make its disk grow and waits for the kernel, or
// for the save.
func (o *Orchestrator) flushGrown(ctx context.Context) {
	disks := map[cay.ExecutionID]*ahead{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(max(growthEvery, time.Duration(len(disks))*time.Second/looksPerSecond)):
		}
		o.mu.Lock()
		live := make(map[cay.ExecutionID]bool, len(o.guests))
		for _, g := range o.guests {
			live[g.rec.Execution] = g.rec.Phase == running
		}
		o.mu.Unlock()
		for e := range disks {
			if _, ok := live[e]; !ok {
				delete(disks, e)
			}
		}
		for e, runs := range live {
			d := disks[e]
			if d == nil {
				d = &ahead{}
				disks[e] = d
			}
			if runs && ctx.Err() == nil && !o.now().Before(d.after) {
				o.flushIfGrown(e, d)
			}
		}
	}
}

// flushIfGrown writes one disk back if that is worth it.
func (o *Orchestrator) flushIfGrown(e cay.ExecutionID, d *ahead) {
	used, _, err := o.Disks.Usage(string(e))
	if err != nil {
		return // it is going away, or a save will tell
	}
	d.used = min(d.used, used) // it was emptied
	if used-d.used < growthMin {
		return
	}
	if err := o.Disks.Flush(string(e)); err != nil {
		o.log().Debug("a disk could not be written back ahead", "execution", e, "error", err)
		d.after = o.now().Add(flushAgain)
		return
	}
	d.used = used
}

const (
	// flushesMax bounds how often a save writes a disk back before it stops the
	// guest, which goes on writing meanwhile.
	flushesMax = 4
	// flushShort is what little takes to be written back. That much longer the
	// guest may stand still.
	flushShort = 20 * time.Millisecond
)

// flushMost writes a disk back, again as long as a running guest has written
// much meanwhile: what is left is written while it stands still.
func (o *Orchestrator) flushMost(e cay.ExecutionID) error {
	for range flushesMax {
		began := o.now()
		if err := o.Disks.Flush(string(e)); err != nil {
			return err
		}
		if o.now().Sub(began) <= flushShort {
			break
		}
	}
	return nil
}
