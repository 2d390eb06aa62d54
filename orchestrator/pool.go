package orchestrator

import (
	"context"
	"time"

	"github.com/cayhq/cay"
)

// poolKey names guests that can stand in for one another.
type poolKey struct {
	build cay.BuildID
	res   cay.Resources
}

const (
	// hotFor is how long a build stays hot after it was last asked for.
	hotFor = 15 * time.Minute
	// hotMax bounds how many builds have a pool at once.
	hotMax = 4
	// fillRetry is the pause after a failed boot for the pool.
	fillRetry = 5 * time.Second
	// fillCheck is how often cold pools are looked for.
	fillCheck = time.Minute
)

// Warm declares a build hot, so that guests of it are booted ahead. The server
// calls it at start for the stock template; a create does it for every other.
func (o *Orchestrator) Warm(b cay.BuildID, r cay.Resources) {
	o.mu.Lock()
	o.heatLocked(poolKey{build: b, res: r})
	o.mu.Unlock()
	o.wake()
}

func (o *Orchestrator) heatLocked(k poolKey) {
	if o.PoolSize <= 0 || !o.open {
		return
	}
	o.hot[k] = o.now()
	for len(o.hot) > hotMax {
		var coldest poolKey
		for c, t := range o.hot {
			if coldest == (poolKey{}) || t.Before(o.hot[coldest]) {
				coldest = c
			}
		}
		delete(o.hot, coldest)
	}
}

func (o *Orchestrator) wake() {
	select {
	case o.kick <- struct{}{}:
	default:
	}
}

// claim takes a guest that was booted ahead, or returns nil. Its slot lets
// everything out until [Orchestrator.confine] says otherwise.
func (o *Orchestrator) claim(k poolKey, c cay.SandboxConfig) *guest {
	defer o.wake()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.heatLocked(k)
	var best *guest
	for _, g := range o.guests {
		if g.rec.Phase != pooled || g.rec.Sandbox != "" || (poolKey{g.rec.Build, g.rec.Resources}) != k {
			continue
		}
		if best == nil || g.rec.BootedAt.Before(best.rec.BootedAt) {
			best = g
		}
	}
	if best != nil {
		best.rec.Sandbox = c.ID // nobody else may claim it
	}
	return best
}

// fill keeps the pools at their size until ctx ends.
func (o *Orchestrator) fill(ctx context.Context) {
	if o.PoolSize <= 0 {
		return
	}
	tick := time.NewTicker(fillCheck)
	defer tick.Stop()
	for {
		pause := fillCheck
		for ctx.Err() == nil {
			k, ok := o.wanted()
			if !ok {
				break
			}
			if err := o.bootAhead(ctx, k); err != nil {
				if ctx.Err() == nil {
					o.log().Warn("a guest could not be booted ahead", "build", k.build, "error", err)
				}
				pause = fillRetry
				break
			}
		}
		o.drainCold()
		var retry <-chan time.Time
		if pause == fillRetry {
			retry = time.After(fillRetry)
		}
		select {
		case <-ctx.Done():
			return
		case <-o.kick:
			if retry != nil { // a wish does not shorten the pause after a failure
				select {
				case <-ctx.Done():
					return
				case <-retry:
				}
			}
		case <-tick.C:
		case <-retry:
		}
	}
}

// wanted returns a hot build whose pool is not full, if memory allows more.
func (o *Orchestrator) wanted() (poolKey, bool) {
	if o.MemoryAvailable != nil {
		if free, err := o.MemoryAvailable(); err == nil && free < 4*memoryReserve {
			return poolKey{}, false // under pressure the pool stops first
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.open {
		return poolKey{}, false
	}
	have := o.pooledLocked()
	for k := range o.hot {
		if len(have[k]) < o.PoolSize {
			return k, true
		}
	}
	return poolKey{}, false
}

func (o *Orchestrator) pooledLocked() map[poolKey][]*guest {
	have := map[poolKey][]*guest{}
	for _, g := range o.guests {
		if g.rec.Phase == pooled && g.rec.Sandbox == "" {
			k := poolKey{g.rec.Build, g.rec.Resources}
			have[k] = append(have[k], g)
		}
	}
	return have
}

func (o *Orchestrator) bootAhead(ctx context.Context, k poolKey) error {
	ctx, cancel := context.WithTimeoutCause(ctx, o.StartTimeout, &cay.Error{Code: cay.CodePlacementTimeout,
		Layer: cay.LayerPlacement, Message: "a guest booted ahead was not ready in time", Fix: "look at the machine's load"})
	defer cancel()
	m, layers, err := o.Builds.Open(ctx, k.build)
	if err != nil {
		o.mu.Lock()
		delete(o.hot, k) // the build is gone or broken: do not ask for ever
		o.mu.Unlock()
		return err
	}
	g, err := o.boot(ctx, boot{manifest: m, layers: layers, res: k.res})
	if err != nil {
		return err
	}
	o.mu.Lock()
	err = o.moveLocked(g, pooled)
	o.mu.Unlock()
	if err != nil {
		o.end(g, cay.EndStartFailed, err.Error())
		return err
	}
	select {
	case <-g.exited: // it died before watch() could see it pooled
		o.end(g, g.exit.Reason, g.exit.Message)
	default:
	}
	return nil
}

// drainCold ends pooled guests whose build is not hot any more.
func (o *Orchestrator) drainCold() {
	o.mu.Lock()
	for k, t := range o.hot {
		if o.now().Sub(t) > hotFor && len(o.hot) > 1 {
			delete(o.hot, k)
		}
	}
	var cold []*guest
	for k, gs := range o.pooledLocked() {
		if _, hot := o.hot[k]; !hot {
			cold = append(cold, gs...)
		} else if len(gs) > o.PoolSize {
			cold = append(cold, gs[o.PoolSize:]...)
		}
	}
	o.mu.Unlock()
	for _, g := range cold {
		o.end(g, cay.EndOrphan, "booted ahead and not needed")
	}
}
