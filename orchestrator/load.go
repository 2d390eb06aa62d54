package orchestrator

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// loads are the snapshots whose memory guests are still reading: they run, but a
// snapshot that goes too soon would end them.
type loads struct {
	mu sync.Mutex
	of map[cay.SnapshotID]*load
}

type load struct {
	guests int
	done   chan struct{} // closed when there are none any more
	err    error         // what one of them could not read
}

func (l *loads) begin(id cay.SnapshotID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of == nil {
		l.of = map[cay.SnapshotID]*load{}
	}
	now := l.of[id]
	if now == nil || now.guests == 0 {
		now = &load{done: make(chan struct{})}
		if was := l.of[id]; was != nil {
			now.err = was.err
		}
		l.of[id] = now
	}
	now.guests++
}

func (l *loads) end(id cay.SnapshotID, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.of[id]
	if err != nil {
		now.err = err
	}
	if now.guests--; now.guests == 0 {
		close(now.done)
		if now.err == nil {
			delete(l.of, id)
		}
	}
}

// wait returns when no guest reads from a snapshot, and the error of one that
// could not.
func (l *loads) wait(ctx context.Context, id cay.SnapshotID) error {
	l.mu.Lock()
	now := l.of[id]
	l.mu.Unlock()
	if now == nil {
		return nil
	}
	select {
	case <-now.done:
		return now.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// followLoad keeps the snapshot that a guest is restored from until the guest
// has all of its memory.
func (o *Orchestrator) followLoad(g *guest) {
	id, exec := g.rec.From, g.rec.Execution
	o.loads.begin(id)
	o.wg.Go(func() {
		err := o.loaded(runtime.InstanceID(exec))
		if err != nil {
			o.log().Error("a resumed sandbox could not read all of its memory; its snapshot is kept", "execution", exec, "snapshot", id, "error", err)
		}
		o.loads.end(id, err)
	})
}

// loaded asks the runtime until it knows, over restarts of its supervisor.
func (o *Orchestrator) loaded(id runtime.InstanceID) error {
	for {
		err := o.Runtime.Loaded(o.life, id)
		switch {
		case err == nil, o.life.Err() != nil, cay.CodeOf(err) == cay.CodeNotFound: // it was killed
			return nil
		case cay.CodeOf(err) == cay.CodeEngineFailed:
			return err
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-o.life.Done():
			return nil
		}
	}
}

// awaitLoads waits until a snapshot may be deleted. It refuses when a guest could
// not be restored from it to the end: the snapshot is all that is left of that
// one.
func (o *Orchestrator) awaitLoads(ctx context.Context, id cay.SnapshotID) error {
	err := o.loads.wait(ctx, id)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerStorage,
		Message: fmt.Sprintf("snapshot %s is kept, for a sandbox made from it could not read all of it: %v", id, err),
		Fix:     "look at the storage of the data directory; `cay snapshot export` copies the snapshot", Err: err}
}
