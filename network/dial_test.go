package network

import (
	"errors"
	"net/netip"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDialLeavesNothing proves that many dials at once get there, and that what
// was made ahead for them goes with the slot.
func TestDialLeavesNothing(t *testing.T) {
	p := testPool(t, "spare")
	descriptors := func() int {
		t.Helper()
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	for range 2 {
		before := descriptors()
		s, err := p.Acquire(t.Context(), named)
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for range 3 * socketsAtOnce {
			all.Go(func() {
				// Nobody listens: an end of the other side would be ours, too.
				c, err := p.Dial(t.Context(), s.Index, netip.AddrPortFrom(publicAddr, 81))
				if !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("%v, %v", c, err)
				}
			})
		}
		all.Wait()
		if n := len(p.tenants[s.Index].spare.all[unix.AF_INET]); n > socketsAtOnce {
			t.Errorf("%d sockets are kept ready", n)
		}
		if err := p.Release(t.Context(), s.Index); err != nil {
			t.Fatal(err)
		}
		if _, err := p.Dial(t.Context(), s.Index, netip.AddrPortFrom(publicAddr, 80)); err == nil {
			t.Error("a slot that was given back dials")
		}
		eventually(t, "as many descriptors as before", func() bool { return descriptors() <= before+1 })
	}
}
