package egress

import (
	"net/netip"
	"sync"
	"time"
)

// Bounds of what one sandbox's names may take.
const (
	maxPinned    = 4096 // names
	maxAddresses = 64   // of a name
)

// Bounds of how long an answer counts: a guest is told at most maxTTL, and may
// use an address for a while after the time it was told.
const (
	minPin = time.Minute
	maxTTL = time.Hour
	grace  = 30 * time.Second
)

// pins are the addresses that names resolved to for one sandbox.
type pins struct {
	mu sync.Mutex
	m  map[string]map[netip.Addr]time.Time // until when
}

// add remembers an answer with its TTL.
func (p *pins) add(name string, as []netip.Addr, ttl time.Duration, now time.Time) {
	until := now.Add(max(min(ttl, maxTTL), minPin) + grace)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.m == nil {
		p.m = map[string]map[netip.Addr]time.Time{}
	}
	set := p.m[name]
	if set == nil {
		if len(p.m) >= maxPinned {
			p.makeRoom(now)
		}
		set = map[netip.Addr]time.Time{}
		p.m[name] = set
	}
	for _, a := range as {
		if _, ok := set[a]; !ok && len(set) >= maxAddresses {
			dropSoonest(set)
		}
		set[a] = until
	}
}

// has reports whether a name resolved to an address, not too long ago.
func (p *pins) has(name string, a netip.Addr, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	until, ok := p.m[name][a]
	return ok && now.Before(until)
}

// makeRoom forgets the names whose time is up, and if these are few, others: a
// guest that asks for so many has them resolved again when it connects.
func (p *pins) makeRoom(now time.Time) {
	for name, set := range p.m {
		for a, until := range set {
			if !now.Before(until) {
				delete(set, a)
			}
		}
		if len(set) == 0 {
			delete(p.m, name)
		}
	}
	for name := range p.m {
		if len(p.m) <= maxPinned*7/8 {
			return
		}
		delete(p.m, name)
	}
}

func dropSoonest(set map[netip.Addr]time.Time) {
	var first netip.Addr
	for a, until := range set {
		if !first.IsValid() || until.Before(set[first]) {
			first = a
		}
	}
	delete(set, first)
}
