package network

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Limits are per slot. Their zero value is the defaults.
type Limits struct {
	// Connections bounds those a guest has open at once, because all share
	// the host's table of connections; 0 is [DefaultConnections].
	Connections int
	// PerSecond bounds the new ones, after a burst of twice as many; 0 is
	// [DefaultPerSecond].
	PerSecond int
	// Mbit bounds what goes into a guest, and what comes out of it, in 10^6
	// bits a second each, what the proxy carries included; 0 is no bound.
	Mbit int
}

// The limits of a slot that is told none.
const (
	DefaultConnections = 8192
	DefaultPerSecond   = 1000
)

func (l Limits) connections() uint32 {
	if l.Connections <= 0 {
		return DefaultConnections
	}
	return uint32(l.Connections)
}

func (l Limits) perSecond() uint64 {
	if l.PerSecond <= 0 {
		return DefaultPerSecond
	}
	return uint64(l.PerSecond)
}

const (
	// mostQueued is for how long packets may wait for their turn, in parts of
	// a second; more only makes a full link slow.
	mostQueued = 20
	// leastBurst lets the kernel hand over the largest packet it makes.
	leastBurst = 128 << 10
)

// slow bounds what a router's link sends. The guest's download is what the
// link towards it sends, its upload what the other one does.
func (l Limits) slow(h *netlink.Handle, links ...string) error {
	if l.Mbit <= 0 {
		return nil
	}
	rate := uint64(l.Mbit) * 1_000_000 / 8
	for _, name := range links {
		link, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		burst := uint32(max(rate/250, leastBurst)) // a tick's worth
		q := &netlink.Tbf{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			Rate: rate, Limit: uint32(max(rate/mostQueued, leastBurst)), Buffer: netlink.Xmittime(rate, burst)}
		if err := h.QdiscReplace(q); err != nil {
			if errors.Is(err, unix.ENOENT) {
				err = fmt.Errorf("%w (does the kernel have sch_tbf?)", err)
			}
			return fmt.Errorf("bounding the bandwidth of %s: %w", name, err)
		}
	}
	return nil
}
