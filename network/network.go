// Package network gives each sandbox a network of its own: a slot, made of two
// namespaces, three links and a firewall, over netlink and without helper
// programs.
//
// A guest always sees itself as 169.254.0.21 behind 169.254.0.22. A router
// namespace around it translates to the slot's own address, by which this
// machine, and nobody else, reaches the guest. Outwards a guest reaches of
// the public internet what its [cay.Egress] says; never the machine itself,
// another guest, or a special address (see [Refused]). Two walls enforce this:
// one in the slot's router namespace, one in the host's. DESIGN.md draws it.
//
// A slot is used once. Given back, it is cut off, proven empty and removed;
// its index then serves a slot built anew.
//
// The package keeps no record of slots: the host's namespaces and links are
// the record, so a process killed at any instant is followed by one that sees,
// adopts or removes everything.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/wholefile"
)

// DefaultCIDR is the range out of which servers of one machine take blocks.
var DefaultCIDR = netip.MustParsePrefix("10.193.0.0/16")

// DefaultSize and DefaultWarm are the figures of a pool that is told none.
const (
	DefaultSize = 1024
	DefaultWarm = 8
)

// Pool makes slots ahead and hands them out. Set the fields, then Open. The
// methods are safe for concurrent use. All of it happens in the network
// namespace that the process is in, "the host".
type Pool struct {
	// Tag tells this pool's objects from those of other servers of the
	// machine: 1 to 8 lower-case letters and digits, in every name.
	Tag string
	// NamespaceDir is where namespaces get their names; /run/netns makes them
	// visible to ip-netns(8).
	NamespaceDir string
	// StateDir is a directory that all servers of the machine share and that
	// does not survive a reboot. It holds who uses which addresses.
	StateDir string
	// CIDR is the range to take a block from; zero is DefaultCIDR. A block is
	// a sixteenth of it, at most 2,048 slots.
	CIDR netip.Prefix
	// RefusalDir keeps what was refused to guests, over the process: a file for
	// each slot in use, at most 2 MB. Empty keeps nothing.
	RefusalDir string
	// Refuse are further destinations no guest reaches.
	Refuse []netip.Prefix
	// Limits are those of each slot.
	Limits Limits
	// Size bounds the slots in use; 0 is DefaultSize.
	Size int
	// Warm is how many slots to hold ready; 0 is DefaultWarm, negative none.
	Warm int
	Now  func() time.Time // nil is time.Now
	Log  *slog.Logger     // nil discards

	mu      sync.Mutex
	open    bool
	block   netip.Prefix
	special []span // what no guest reaches, whatever its policy
	mtu     int
	six     bool // slots get IPv6
	host    *netlink.Handle
	group   uint16    // of the host's log; 0 if the kernel has none
	ears    *listener // to that group
	slots   map[int]state
	tenants map[int]*tenant // of slots that are taken
	next    int             // where to look for a free index: the longest unused comes first
	last    time.Time       // when a slot was taken
	changed chan struct{}   // closed at the next change of a state; nil when nobody waits
	kick    chan struct{}
	// refusing says that there is a refusal which is in memory only.
	refusing chan struct{}

	teamTurn sync.Mutex          // one change of the teams' rules at a time
	teams    map[cay.TeamID]team // of which the host's table knows; guarded by teamTurn

	stop context.CancelFunc
	done sync.WaitGroup
}

// state is what the pool does with an index. An index without one is free.
type state int

const (
	building state = iota + 1 // for a caller of Acquire
	warming                   // for nobody yet
	ready
	taken
	unowned // found at Open, not adopted yet
	leaving // somebody is removing it
	stuck   // removing it did not work; the filler tries again
	removed // gone, but the host remembers it; the filler makes it forget
)

var validTag = regexp.MustCompile(`^[a-z0-9]{1,8}$`)

// Open claims a block of addresses, puts the firewall in force, finds the
// slots an earlier process left, and starts to fill the pool. Slots found are
// neither used nor removed until [Pool.Adopt], [Pool.Release] or [Pool.Sweep]
// says which. Guests keep running undisturbed.
func (p *Pool) Open(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open {
		return nil
	}
	if err := p.check(); err != nil {
		return err
	}
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
	if err != nil {
		return fail("opening netlink", err)
	}
	p.host = host
	group, log := p.hearHost()
	p.group = group
	if err := p.prepare(); err != nil {
		host.Close()
		if log != nil {
			err = errors.Join(err, log.Close())
		}
		return err
	}
	if log != nil {
		p.ears = listen(log, p.noteHost)
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	p.stop, p.kick, p.open = stop, make(chan struct{}, 1), true
	p.refusing = make(chan struct{}, 1)
	p.done.Go(func() { p.fill(run) })
	p.done.Go(func() { p.keepRefusals(run) })
	p.wake()
	return nil
}

func (p *Pool) check() error {
	bad := func(format string, a ...any) error {
		return &cay.Error{Code: cay.CodeConfigInvalid, Layer: cay.LayerNetwork,
			Message: "the sandbox network: " + fmt.Sprintf(format, a...), Fix: "correct the setting"}
	}
	c := p.cidr()
	switch {
	case !validTag.MatchString(p.Tag):
		return bad("tag %q is not 1 to 8 lower-case letters and digits", p.Tag)
	case p.NamespaceDir == "" || p.StateDir == "":
		return bad("the directories for namespaces and for state are not set")
	case !c.IsValid() || !c.Addr().Is4() || c != c.Masked() || c.Bits() < 8 || c.Bits() > 24 || !c.Addr().IsPrivate():
		return bad("the range of addresses %s is not a range of private IPv4 addresses with 8 to 24 bits of prefix", c)
	}
	return nil
}

// prepare does the parts of Open that may have to be undone by closing host.
func (p *Pool) prepare() error {
	if err := makeNamespaceDir(p.NamespaceDir); err != nil {
		return fail("making the directory of namespaces", err)
	}
	p.mtu = mtu(p.host)
	six, err := hasIPv6(p.host)
	if err != nil {
		return fail("looking at the host's IPv6", err)
	}
	p.six = six && p.mtu >= leastMTU6
	p.special = spans(append(append(Refused(), p.Refuse...), p.cidr()))
	var open []string
	err = p.take(func() (err error) {
		now := &nftables.Conn{}
		if open, err = openSlots(now, p); err == nil {
			p.teams, err = readTeams(now, p)
		}
		if err != nil {
			return fmt.Errorf("reading the firewall: %w", err)
		}
		c, err := nftIn(nil)
		if err != nil {
			return err
		}
		if err := hostFirewall(c, p, open); err != nil {
			return fmt.Errorf("loading the firewall: %w", err)
		}
		return nil
	})
	if err != nil {
		return fail("preparing the host", err)
	}
	found, err := p.found()
	if err != nil {
		return fail("looking for slots", err)
	}
	p.slots, p.tenants = map[int]state{}, map[int]*tenant{}
	for i := range found {
		p.slots[i] = unowned
	}
	if err := p.prepareRefusals(found); err != nil {
		return fail("opening the directory of refusals", err)
	}
	// What was removed when the earlier process ended, the host remembers yet.
	for _, link := range open {
		if i, err := strconv.Atoi(strings.TrimPrefix(link, p.linkPrefix())); err == nil && !found[i] {
			p.slots[i] = removed
		}
	}
	for _, t := range p.teams {
		for i := range t.slots {
			if !found[i] {
				p.slots[i] = removed
			}
		}
	}
	return nil
}

// Close stops filling the pool and removes the slots nobody has. Slots in use
// stay, and so do the firewall and the claim on addresses; see [Pool.Destroy].
func (p *Pool) Close() error {
	p.mu.Lock()
	if !p.open {
		p.mu.Unlock()
		return nil
	}
	p.open = false
	p.stop()
	p.tell()
	p.mu.Unlock()
	p.done.Wait() // also for calls under way, which may still use the host

	var errs []error
	var gone []int
	for i, s := range p.slots {
		switch s {
		case ready, stuck:
			errs = append(errs, p.remove(i))
			gone = append(gone, i)
		case removed:
			gone = append(gone, i)
		}
	}
	errs = append(errs, p.forget(gone))
	for i, t := range p.tenants {
		p.vacate(i)
		p.keep(i, t)
	}
	if p.ears != nil {
		p.ears.close()
		p.ears = nil
	}
	p.host.Close()
	return fail("closing the pool", errors.Join(errs...))
}

// Acquire returns a clean slot with a policy in force: one made ahead, or else
// one made now. Errors are no_network_slot, network_unavailable and
// missing_privilege.
func (p *Pool) Acquire(ctx context.Context, e cay.Egress) (Slot, error) {
	leave, err := p.enter()
	if err != nil {
		return Slot{}, err
	}
	defer leave()
	if err := ctx.Err(); err != nil {
		return Slot{}, err
	}
	index, made, err := p.pick(ctx)
	if err != nil {
		return Slot{}, err
	}
	if !made {
		if err := p.make(index, taken, policyOf(e)); err != nil {
			return Slot{}, err
		}
	} else if !e.Open() {
		if err := p.enforce(index, policyOf(e)); err != nil {
			p.dispose(index)
			return Slot{}, fail("setting the policy of a slot", err)
		}
	}
	if err := ctx.Err(); err != nil {
		p.dispose(index)
		return Slot{}, err
	}
	p.wake()
	p.settle(index, policyOf(e), false)
	return p.slot(index), nil
}

// Adopt claims a slot that an earlier process handed out and that its guest
// still uses; its policy stays in force until [Pool.SetPolicy]. Listeners in
// its router are gone, and to be opened again. network_unavailable says that
// the slot is not, or no longer wholly, there.
func (p *Pool) Adopt(_ context.Context, index int) (Slot, error) {
	leave, err := p.enter()
	if err != nil {
		return Slot{}, err
	}
	defer leave()
	p.mu.Lock()
	switch p.slots[index] {
	case taken:
		p.mu.Unlock()
		return p.slot(index), nil
	case unowned:
	default:
		p.mu.Unlock()
		return Slot{}, fail(fmt.Sprintf("adopting slot %d", index), errors.New("there is no such slot"))
	}
	if err := p.whole(index); err != nil {
		p.mu.Unlock()
		return Slot{}, fail(fmt.Sprintf("adopting slot %d", index), err)
	}
	p.slots[index] = taken
	p.mu.Unlock()
	p.settle(index, policy{}, true)
	return p.slot(index), nil
}

// Release gives a slot back, whoever holds it; an unknown one is no error. At
// its return the slot reaches nothing and nothing reaches it. If processes are
// still in it, that is an error, the index stays out of use, and the pool
// tries again by itself until they are gone.
func (p *Pool) Release(_ context.Context, index int) error {
	leave, err := p.enter()
	if err != nil {
		return err
	}
	defer leave()
	p.mu.Lock()
	switch p.slots[index] {
	case taken, unowned:
		p.slots[index] = leaving
		p.mu.Unlock()
		return p.finish(index)
	default: // free, never handed out, or on its way
		p.mu.Unlock()
		return nil
	}
}

// Sweep removes the slots that Open found and nobody adopted.
func (p *Pool) Sweep(ctx context.Context) error {
	leave, err := p.enter()
	if err != nil {
		return err
	}
	defer leave()
	p.mu.Lock()
	var gone []int
	for i, s := range p.slots {
		if s == unowned {
			p.slots[i] = leaving
			gone = append(gone, i)
		}
	}
	p.mu.Unlock()
	var errs []error
	for _, i := range gone {
		errs = append(errs, p.finish(i))
	}
	return errors.Join(errs...)
}

// Destroy closes the pool and removes all of it from the host: every slot,
// those in use included, the firewall and the claim, and restores IP
// forwarding if this machine's pools had changed it. It works on a pool that
// was never opened too.
func (p *Pool) Destroy(ctx context.Context) error {
	if err := p.check(); err != nil {
		return err
	}
	closed := p.Close()
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
	if err != nil {
		return fail("opening netlink", err)
	}
	defer host.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.host = host
	if err := makeNamespaceDir(p.NamespaceDir); err != nil {
		return fail("opening the directory of namespaces", err)
	}
	found, err := p.found()
	if err != nil {
		return fail("looking for slots", err)
	}
	errs := []error{closed}
	for i := range found {
		errs = append(errs, p.remove(i), wholefile.Remove(p.refusalFile(i)))
	}
	if err := errors.Join(errs...); err != nil {
		return fail("removing the slots", err) // the firewall stays while a slot does
	}
	p.slots, p.teams = nil, nil
	if err := dropTable(&nftables.Conn{}, p.tableName()); err != nil {
		return fail("removing the firewall", err)
	}
	return fail("giving back the addresses", p.giveBack())
}

// Block returns the addresses of this pool's slots.
func (p *Pool) Block() netip.Prefix {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.block
}

// Stats tells how many slots are in use and ready, and how many could not be
// cleaned because processes are still in them.
type Stats struct{ InUse, Ready, Stuck int }

// Stats returns the figures of now.
func (p *Pool) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	var s Stats
	for _, st := range p.slots {
		switch st {
		case taken, unowned:
			s.InUse++
		case ready:
			s.Ready++
		case stuck:
			s.Stuck++
		}
	}
	return s
}

// enter holds the pool open for a call.
func (p *Pool) enter() (leave func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.open {
		return nil, errNotOpen()
	}
	p.done.Add(1)
	return p.done.Done, nil
}

// pick takes a slot made ahead, or reserves an index to make one at. It waits
// if neither can be had but one is being made for nobody, or all that the
// block lacks is an index which the host still remembers.
func (p *Pool) pick(ctx context.Context) (index int, made bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.open {
		index = -1
		busy, coming, gone := 0, false, false
		for i, s := range p.slots {
			switch {
			case s == ready && (index < 0 || i < index):
				index = i
			case s == warming:
				coming = true
			case s == removed:
				gone = true
				continue
			}
			busy++
		}
		p.last = time.Now()
		if index >= 0 {
			p.slots[index] = taken
			return index, true, nil
		}
		if index, err = p.reserve(building); err == nil {
			return index, false, nil
		}
		if !coming && (!gone || busy >= p.size()) {
			return 0, false, err
		}
		if p.changed == nil {
			p.changed = make(chan struct{})
		}
		changed := p.changed
		p.mu.Unlock()
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case <-changed:
			err = nil
		}
		p.mu.Lock()
		if err != nil {
			return 0, false, err
		}
	}
	return 0, false, errNotOpen()
}

// reserve takes a free index for a slot to be built, if the pool may have one
// more. The caller holds the lock.
func (p *Pool) reserve(s state) (int, error) {
	busy := 0
	for _, s := range p.slots {
		if s != removed {
			busy++
		}
	}
	if busy >= p.size() {
		return 0, errNoSlot(p.size())
	}
	room := p.room()
	for range room {
		i := p.next
		p.next = (p.next + 1) % room
		if _, used := p.slots[i]; !used {
			p.slots[i] = s
			return i, nil
		}
	}
	return 0, errNoSlot(p.size())
}

// make builds the slot of a reserved index and gives it a state.
func (p *Pool) make(index int, then state, pol policy) error {
	if err := p.build(index, pol); err != nil {
		p.dispose(index)
		return fail("making a slot", err)
	}
	p.mark(index, then)
	return nil
}

// dispose removes a slot that nobody got.
func (p *Pool) dispose(index int) {
	p.mark(index, leaving)
	if err := p.finish(index); err != nil {
		p.log().Warn("a network slot could not be removed yet", "slot", index, "err", err)
	}
}

// finish removes a slot that the caller has put in state leaving.
func (p *Pool) finish(index int) error {
	p.endRefusals(index)
	p.vacate(index)
	err := p.remove(index)
	if err != nil {
		p.mark(index, stuck)
	} else {
		p.mark(index, removed)
	}
	p.wake()
	return fail(fmt.Sprintf("removing slot %d", index), err)
}

// forget ends the host's memory of removed slots: its rules' and its table of
// connections. For many at once, because the kernel walks the whole table each
// time. Nothing depends on when it happens: an index is free only after it.
func (p *Pool) forget(indexes []int) error {
	if len(indexes) == 0 {
		return nil
	}
	var links []string
	f := addrFilter{}
	for _, i := range indexes {
		links = append(links, p.link(i))
		a := p.addresses(i)
		f[a.host], f[a.slot], f[a.host6], f[a.slot6] = true, true, true, true
	}
	if err := p.deny(links...); err != nil {
		return fmt.Errorf("closing the host's rules: %w", err)
	}
	if err := p.leaveTeams(indexes); err != nil {
		return fmt.Errorf("ending the counts of teams: %w", err)
	}
	families := []netlink.InetFamily{unix.AF_INET}
	if p.six {
		families = append(families, unix.AF_INET6)
	}
	for _, family := range families {
		if _, err := p.host.ConntrackDeleteFilters(netlink.ConntrackTable, family, f); err != nil {
			return fmt.Errorf("ending tracked connections: %w", err)
		}
	}
	if err := hangUp(f); err != nil {
		return fmt.Errorf("ending the host's own connections: %w", err)
	}
	return nil
}

// hangUpTries is how often the host's sockets are read when they change
// meanwhile.
const hangUpTries = 3

// hangUp ends what the host has open to addresses where nobody is any more. Of
// a socket that its owner has closed, the kernel would go on sending the rest,
// unanswered, for a minute.
func hangUp(f addrFilter) error {
	for try := 1; ; try++ {
		all, err := netlink.SocketDiagTCP(unix.AF_INET)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil // a kernel that cannot: it takes the minute
		}
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
		for _, s := range all {
			local, _ := netip.AddrFromSlice(s.ID.Source)
			remote, _ := netip.AddrFromSlice(s.ID.Destination)
			if !f[local.Unmap()] && !f[remote.Unmap()] {
				continue
			}
			err := netlink.SocketDestroy(&net.TCPAddr{IP: s.ID.Source, Port: int(s.ID.SourcePort)},
				&net.TCPAddr{IP: s.ID.Destination, Port: int(s.ID.DestinationPort)})
			if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) {
				return err
			}
		}
		if err == nil || try == hangUpTries {
			return nil
		}
	}
}

// addrFilter matches connections that one of the addresses is an end of.
type addrFilter map[netip.Addr]bool

// MatchConntrackFlow implements the library's filter.
func (f addrFilter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	for _, t := range []netlink.IPTuple{flow.Forward, flow.Reverse} {
		for _, ip := range [][]byte{t.SrcIP, t.DstIP} {
			if a, _ := netip.AddrFromSlice(ip); f[a.Unmap()] {
				return true
			}
		}
	}
	return false
}

// free makes indexes of removed slots usable again.
func (p *Pool) free(indexes []int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, i := range indexes {
		delete(p.slots, i)
	}
	p.tell()
}

func (p *Pool) mark(index int, s state) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.slots[index] = s
	p.tell()
}

// tell lets those who wait for a slot look again. The caller holds the lock.
func (p *Pool) tell() {
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

func (p *Pool) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// refillAfter is how long the filler leaves the processors to whoever took a
// slot, and now boots a guest, as long as half the slots are still ready.
const refillAfter = 250 * time.Millisecond

// patience is how long the filler waits before it makes a slot, with so many
// ready.
func (p *Pool) patience(ready int) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if 2*ready < p.warm() {
		return 0
	}
	return refillAfter - time.Since(p.last)
}

// retryAfter is the pause after a slot could not be made or removed.
const retryAfter = time.Second

// fill holds the pool full until ctx ends.
func (p *Pool) fill(ctx context.Context) {
	var last string
	for ctx.Err() == nil {
		p.mu.Lock()
		var again, gone []int
		warm := 0
		for i, s := range p.slots {
			switch s {
			case stuck:
				p.slots[i] = leaving
				again = append(again, i)
			case removed:
				gone = append(gone, i)
			case ready:
				warm++
			}
		}
		p.mu.Unlock()
		var err error
		for _, i := range again {
			err = errors.Join(err, p.finish(i))
		}
		if e := p.forget(gone); e != nil {
			err = errors.Join(err, fail("cleaning the host", e))
		} else {
			p.free(gone)
		}
		if err == nil && warm < p.warm() && ctx.Err() == nil {
			if d := p.patience(warm); d > 0 {
				p.rest(ctx, d, p.kick)
				continue
			}
			var index int
			p.mu.Lock()
			index, err = p.reserve(warming)
			p.mu.Unlock()
			if err == nil {
				if err = p.make(index, ready, policy{}); err == nil {
					continue
				}
			}
			if cay.CodeOf(err) == cay.CodeNoSlot { // not before one is released
				err = nil
			}
		}
		if err == nil {
			last = ""
			select {
			case <-ctx.Done():
				return
			case <-p.kick:
			}
			continue
		}
		if text := err.Error(); text != last {
			p.log().Warn("the pool of network slots is not full", "err", err)
			last = text
		}
		p.rest(ctx, retryAfter, nil) // a kick would bring the same error sooner
	}
}

// rest waits for a time, for the end of ctx, or for kick.
func (p *Pool) rest(ctx context.Context, d time.Duration, kick <-chan struct{}) {
	pause := time.NewTimer(d)
	defer pause.Stop()
	select {
	case <-ctx.Done():
	case <-pause.C:
	case <-kick:
	}
}

func (p *Pool) cidr() netip.Prefix {
	if !p.CIDR.IsValid() {
		return DefaultCIDR
	}
	return p.CIDR
}

// blockBits is the prefix of a block: a sixteenth of the range.
func (p *Pool) blockBits() int { return max(p.cidr().Bits()+4, 20) }

// block6 holds the addresses of the slots' links in IPv6.
func (p *Pool) block6() netip.Prefix {
	return netip.PrefixFrom(in6(p.block.Addr()), linkPrefix6.Bits()+p.block.Bits())
}

// room is how many slots the block has addresses for.
func (p *Pool) room() int { return 1 << (31 - p.blockBits()) }

func (p *Pool) size() int {
	if p.Size <= 0 {
		return min(DefaultSize, p.room())
	}
	return min(p.Size, p.room())
}

func (p *Pool) warm() int {
	if p.Warm == 0 {
		return DefaultWarm
	}
	return p.Warm
}

func (p *Pool) now() time.Time {
	if p.Now == nil {
		return time.Now()
	}
	return p.Now()
}

func (p *Pool) log() *slog.Logger {
	if p.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return p.Log
}
