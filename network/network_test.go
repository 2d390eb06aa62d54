package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

func netParse(s string) (net.IP, *net.IPNet, error) { return net.ParseCIDR(s) }

// again returns a pool over the same directories, as a new process would.
func again(p *Pool) *Pool {
	return &Pool{Tag: p.Tag, NamespaceDir: p.NamespaceDir, StateDir: p.StateDir, Warm: p.Warm, Size: p.Size}
}

// leftovers lists what the host holds of a pool.
func leftovers(t testing.TB, p *Pool) []string {
	t.Helper()
	var out []string
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Name, p.linkPrefix()) {
			out = append(out, "link "+l.Name)
		}
	}
	entries, _ := os.ReadDir(p.NamespaceDir)
	for _, e := range entries {
		out = append(out, "namespace "+e.Name())
	}
	tables, err := tableNames()
	if err != nil {
		t.Fatal(err)
	}
	if tables[p.tableName()] {
		out = append(out, "table "+p.tableName())
		open, err := openSlots(&nftables.Conn{}, p)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range open {
			out = append(out, "element "+l)
		}
	}
	return out
}

func indexes(p *Pool, of ...state) []int {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := []int{}
	for i, s := range p.slots {
		if slices.Contains(of, s) {
			out = append(out, i)
		}
	}
	slices.Sort(out)
	return out
}

func TestAdopt(t *testing.T) {
	first := testPool(t, "adopt", func(p *Pool) { p.Warm = 2 })
	kept, shut, dropped := acquire(t, first, true), acquire(t, first, false), acquire(t, first, true)
	eventually(t, "a full pool", func() bool { return first.Stats().Ready == 2 })
	for _, s := range []Slot{kept, shut, dropped} {
		serve(t, openFile(t, s.NetNS), "0.0.0.0:49983")
	}
	serve(t, world, publicAddr.String()+":80")
	talk, err := net.Dial("tcp4", kept.Addr.String()+":49983")
	if err != nil {
		t.Fatal(err)
	}
	defer talk.Close()
	for range 2 { // Close may be called twice
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := first.Acquire(t.Context(), cay.Egress{}); cay.CodeOf(err) != cay.CodeShuttingDown {
		t.Errorf("Acquire on a closed pool: %v", err)
	}

	second := again(first)
	if err := second.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	want := []int{kept.Index, shut.Index, dropped.Index}
	slices.Sort(want)
	if got := indexes(second, unowned); !cmp.Equal(got, want) {
		t.Errorf("found slots %v, want %v", got, want)
	}
	for _, s := range []Slot{kept, shut} {
		for range 2 {
			if got, err := second.Adopt(t.Context(), s.Index); err != nil || got != s {
				t.Errorf("Adopt: got %v, %v, want %v", got, err, s)
			}
		}
	}
	if _, err := second.Adopt(t.Context(), 77); cay.CodeOf(err) != cay.CodeNetworkUnavailable {
		t.Errorf("adopting a slot that never was: %v", err)
	}
	if err := second.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	want = []int{kept.Index, shut.Index}
	slices.Sort(want)
	if got := indexes(second, taken); !cmp.Equal(got, want) {
		t.Errorf("after Sweep slots %v are in use, want %v", got, want)
	}

	// A connection that was open all the time, and both policies.
	io.WriteString(talk, "still")
	b := make([]byte, 64)
	talk.SetReadDeadline(time.Now().Add(3 * time.Second))
	for got := ""; !strings.HasSuffix(got, "still"); {
		n, err := talk.Read(b)
		if err != nil {
			t.Fatalf("the connection from before does not work: %v, got %q", err, got)
		}
		got += string(b[:n])
	}
	public := func(s Slot) error {
		return in(t, s.NetNS, func() error { _, err := ask(t.Context(), "tcp4", publicAddr.String()+":80"); return err })
	}
	if err := public(kept); err != nil {
		t.Errorf("the adopted slot lost the internet: %v", err)
	}
	if err := public(shut); err == nil {
		t.Error("the adopted slot without internet reaches it")
	}
	if _, err := ask(t.Context(), "tcp4", dropped.Addr.String()+":49983"); err == nil {
		t.Error("the swept slot is still there")
	}
}

func TestAdoptDamaged(t *testing.T) {
	first := testPool(t, "dam")
	noLink, noName := acquire(t, first, true), acquire(t, first, true)
	l, err := first.host.LinkByName(first.link(noLink.Index))
	if err != nil {
		t.Fatal(err)
	}
	if err := first.host.LinkDel(l); err != nil {
		t.Fatal(err)
	}
	if err := unpin(noName.NetNS); err != nil {
		t.Fatal(err)
	}
	first.Close()
	second := again(first)
	if err := second.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	for _, s := range []Slot{noLink, noName} {
		if _, err := second.Adopt(t.Context(), s.Index); cay.CodeOf(err) != cay.CodeNetworkUnavailable {
			t.Errorf("adopting a damaged slot: %v", err)
		}
		if err := second.Release(t.Context(), s.Index); err != nil {
			t.Error(err)
		}
	}
}

func TestReleaseCutsOffAndWaitsForProcesses(t *testing.T) {
	p := testPool(t, "busy", func(p *Pool) { p.Size = 1 })
	s := acquire(t, p, true)
	serve(t, openFile(t, s.NetNS), "0.0.0.0:49983")
	guest := exec.Command("sleep", "1000")
	if err := in(t, s.NetNS, guest.Start); err != nil {
		t.Fatal(err)
	}
	err := p.Release(t.Context(), s.Index)
	var typed *cay.Error
	if !errors.As(err, &typed) || typed.Code != cay.CodeNetworkUnavailable || typed.Detail["pids"] != fmt.Sprintf("[%d]", guest.Process.Pid) {
		t.Errorf("releasing a slot with a process in it: %v", err)
	}
	if _, err := net.DialTimeout("tcp4", s.Addr.String()+":49983", 50*time.Millisecond); err == nil {
		t.Error("the slot is still reachable")
	}
	if _, err := p.Acquire(t.Context(), cay.Egress{}); cay.CodeOf(err) != cay.CodeNoSlot {
		t.Errorf("the only slot was given out with a process in it: %v", err)
	}
	guest.Process.Kill()
	guest.Wait()
	eventually(t, "the slot is free", func() bool {
		_, err := p.Acquire(t.Context(), cay.Egress{})
		return err == nil
	})
	for range 2 { // unknown or repeated is no error
		if err := p.Release(t.Context(), 9); err != nil {
			t.Error(err)
		}
	}
}

// TestReuseIsClean takes the same index twice and looks for anything of the
// first life in the second.
func TestReuseIsClean(t *testing.T) {
	p := testPool(t, "reuse")
	s := acquire(t, p, false)
	was := inodeOf(s.NetNS)
	serve(t, openFile(t, s.NetNS), "0.0.0.0:49983")
	old, err := net.Dial("tcp4", s.Addr.String()+":49983")
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	io.WriteString(old, "x")
	// What gVisor does to the namespace it takes over, and worse.
	if err := in(t, s.NetNS, func() error {
		return sysctl("ipv4/conf/eth0/disable_policy", "1")
	}); err != nil {
		t.Fatal(err)
	}
	if err := p.Release(t.Context(), s.Index); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the index is free", func() bool { return len(indexes(p, removed)) == 0 })
	flows, err := p.host.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		if (addrFilter{s.Addr: true}).MatchConntrackFlow(f) {
			t.Errorf("the host remembers %v", f)
		}
	}
	p.mu.Lock()
	p.next = s.Index
	p.mu.Unlock()
	second := acquire(t, p, true)
	if second != s {
		t.Fatalf("got slot %v, want the same index as %v", second, s)
	}
	if inodeOf(second.NetNS) == was {
		t.Error("the namespace is the old one")
	}
	serve(t, openFile(t, second.NetNS), "0.0.0.0:49983")
	serve(t, world, publicAddr.String()+":80")
	if err := in(t, second.NetNS, func() error { _, err := ask(t.Context(), "tcp4", publicAddr.String()+":80"); return err }); err != nil {
		t.Errorf("the former policy is in force: %v", err)
	}
	guest := newTap(t, openFile(t, second.NetNS), eth0)
	_, err = io.WriteString(old, "for the former guest")
	if err == nil { // a kernel that does not end sockets sends it, and is told
		old.SetReadDeadline(time.Now().Add(3 * time.Second))
		_, err = io.Copy(io.Discard, old)
	}
	if !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("the former guest's connection: got %v, want it ended", err)
	}
	if got, err := ask(t.Context(), "udp4", second.Addr.String()+":49983"); err != nil || !strings.HasSuffix(got, "hello") {
		t.Errorf("the new guest: %q, %v", got, err)
	}
	for _, seen := range guest.take() {
		if seen.proto == unix.IPPROTO_TCP {
			t.Errorf("the new guest got a packet of the former one's connection: %s", seen)
		}
	}
}

func TestNoSlot(t *testing.T) {
	p := testPool(t, "full", func(p *Pool) { p.Size, p.Warm = 2, 5 })
	acquire(t, p, true)
	b := acquire(t, p, true)
	_, err := p.Acquire(t.Context(), cay.Egress{})
	if want := "all 2 network slots of this node are in use [network/no_network_slot] — end sandboxes, or raise the number of network slots"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if err := p.Release(t.Context(), b.Index); err != nil {
		t.Fatal(err)
	}
	acquire(t, p, true)
}

// TestSmallBlock takes and gives back every slot of the smallest range without
// ever being told that there is none: not while the filler makes the last one,
// and not while the host forgets the last one's former life.
func TestSmallBlock(t *testing.T) {
	p := testPool(t, "small", func(p *Pool) { p.CIDR, p.Warm = netip.MustParsePrefix("10.77.1.0/24"), 2 })
	var held []Slot
	for range p.room() {
		held = append(held, acquire(t, p, true))
	}
	if _, err := p.Acquire(t.Context(), cay.Egress{}); cay.CodeOf(err) != cay.CodeNoSlot {
		t.Errorf("one more than all: %v", err)
	}
	for i := range 20 {
		s := &held[i%len(held)]
		if err := p.Release(t.Context(), s.Index); err != nil {
			t.Fatal(err)
		}
		*s = acquire(t, p, true)
	}
}

// TestPatience: the filler leaves a boot alone, unless slots get few.
func TestPatience(t *testing.T) {
	p := &Pool{Warm: 4, last: time.Now()}
	for ready, waits := range map[int]bool{0: false, 1: false, 2: true, 3: true} {
		if d := p.patience(ready); (d > 0) != waits || d > refillAfter {
			t.Errorf("with %d ready right after one was taken it waits %v", ready, d)
		}
	}
	p.last = time.Now().Add(-refillAfter)
	if d := p.patience(3); d > 0 {
		t.Errorf("long after one was taken it waits %v", d)
	}
}

func TestCancelled(t *testing.T) {
	p := testPool(t, "gone")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Acquire(ctx, cay.Egress{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if s := p.Stats(); s.InUse != 0 {
		t.Errorf("%+v", s)
	}
}

// TestTwoServers proves that servers of one machine neither collide nor take
// each other's setting away.
func TestTwoServers(t *testing.T) {
	forwarding := func() string {
		v, err := readSysctl(forwardSysctl)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if err := sysctl(forwardSysctl, "0"); err != nil {
		t.Fatal(err)
	}
	a := testPool(t, "one")
	b := testPool(t, "two", func(p *Pool) { p.NamespaceDir, p.StateDir = a.NamespaceDir, a.StateDir })
	if a.Block().Overlaps(b.Block()) {
		t.Errorf("both have addresses of %s and %s", a.Block(), b.Block())
	}
	sa, sb := acquire(t, a, true), acquire(t, b, true)
	tap := newTap(t, openFile(t, sb.NetNS), eth0)
	in(t, sa.NetNS, func() error { shout(netip.AddrPortFrom(sb.Addr, 49983)); return nil })
	c, err := net.Dial("udp4", sb.Addr.String()+":9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("marker"))
	if seen := tap.await(t, netip.AddrPortFrom(guestAddr, 9)); len(seen) > 0 {
		t.Errorf("a guest of one server reached one of the other: %v", seen)
	}
	if err := a.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if forwarding() != "1" {
		t.Error("the end of one server took forwarding from the other")
	}
	if got, err := ask(t.Context(), "tcp4", sb.Addr.String()+":1"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("the other server's slot: %q, %v", got, err)
	}
	if err := b.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if forwarding() != "0" {
		t.Error("forwarding was not restored")
	}
	for _, p := range []*Pool{a, b} {
		if left := leftovers(t, p); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
	}
	if files, _ := filepath.Glob(filepath.Join(a.StateDir, "*.json")); len(files) > 0 {
		t.Errorf("left over: %v", files)
	}
}

// TestStaleClaim proves that a server removed without Destroy does not hold
// its addresses for ever.
func TestStaleClaim(t *testing.T) {
	a := testPool(t, "stale")
	block := a.Block()
	a.Close()
	if err := dropTable(&nftables.Conn{}, a.tableName()); err != nil {
		t.Fatal(err)
	}
	b := testPool(t, "fresh", func(p *Pool) { p.StateDir = a.StateDir })
	if b.Block() != block {
		t.Errorf("got %s, want the abandoned %s", b.Block(), block)
	}
}

func TestBlockAvoidsHost(t *testing.T) {
	p := testPool(t, "avoid", func(p *Pool) { p.CIDR = netip.MustParsePrefix("192.168.0.0/16") })
	if p.Block().Contains(secondAddr) {
		t.Errorf("the block %s holds the host's address %s", p.Block(), secondAddr)
	}
}

func TestSettings(t *testing.T) {
	for name, p := range map[string]*Pool{
		"no tag":         {NamespaceDir: "/x", StateDir: "/x"},
		"long tag":       {Tag: "abcdefghi", NamespaceDir: "/x", StateDir: "/x"},
		"tag with a dot": {Tag: "a.b", NamespaceDir: "/x", StateDir: "/x"},
		"no directories": {Tag: "a"},
		"public range":   {Tag: "a", NamespaceDir: "/x", StateDir: "/x", CIDR: netip.MustParsePrefix("8.8.0.0/16")},
		"IPv6 range":     {Tag: "a", NamespaceDir: "/x", StateDir: "/x", CIDR: netip.MustParsePrefix("fd00::/16")},
		"unmasked range": {Tag: "a", NamespaceDir: "/x", StateDir: "/x", CIDR: netip.MustParsePrefix("10.1.2.3/16")},
	} {
		if err := p.Open(t.Context()); cay.CodeOf(err) != cay.CodeConfigInvalid {
			t.Errorf("%s: got %v", name, err)
		}
		if err := p.Close(); err != nil {
			t.Errorf("Close after a failed Open: %v", err)
		}
	}
}

func TestMissingPrivilege(t *testing.T) {
	dir := t.TempDir()
	err := onThread(func() error {
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&head, &none[0]); err != nil {
			t.Error(err)
		}
		return (&Pool{Tag: "priv", NamespaceDir: dir, StateDir: dir}).Open(t.Context())
	})
	if cay.CodeOf(err) != cay.CodePrivilege || !strings.Contains(err.Error(), "run Cay as root") {
		t.Errorf("got %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

const victimDir = "CAY_NETWORK_TEST_VICTIM"

// victim is a server that takes and gives back slots until it is killed.
func victim(dir string) {
	p := &Pool{Tag: "victim", NamespaceDir: filepath.Join(dir, "netns"), StateDir: filepath.Join(dir, "state"), Warm: 2,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	ctx := context.Background()
	if err := p.Open(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := p.Sweep(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Stdout.WriteString("ready\n")
	for n := 0; ; n++ {
		e := cay.Egress{}
		if n%2 == 0 {
			e = closed
		}
		s, err := p.Acquire(ctx, e)
		if err == nil && n%3 > 0 {
			err = p.Release(ctx, s.Index)
		}
		if err != nil && cay.CodeOf(err) != cay.CodeNoSlot {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

// TestKilled kills a server at many instants; the next one always opens,
// sweeps everything, and gives out working slots.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	p := &Pool{Tag: "victim", NamespaceDir: filepath.Join(dir, "netns"), StateDir: filepath.Join(dir, "state"), Warm: -1}
	t.Cleanup(func() { unix.Unmount(p.NamespaceDir, unix.MNT_DETACH) })
	for i := range 12 {
		c := exec.Command("/proc/self/exe")
		c.Env = append(os.Environ(), victimDir+"="+dir)
		c.Stderr = os.Stderr
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i*7) * time.Millisecond) // another instant each time
		c.Process.Kill()
		c.Wait()
	}
	if err := p.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the host forgot", func() bool { return len(indexes(p, removed, leaving, unowned, stuck)) == 0 })
	if left := leftovers(t, p); !cmp.Equal(left, []string{"table cay-victim"}) {
		t.Errorf("after Sweep: %v", left)
	}
	s := acquire(t, p, true)
	serve(t, openFile(t, s.NetNS), "0.0.0.0:49983")
	if _, err := ask(t.Context(), "tcp4", s.Addr.String()+":49983"); err != nil {
		t.Error(err)
	}
	if err := p.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := leftovers(t, p); len(left) > 0 {
		t.Errorf("after Destroy: %v", left)
	}
}

// TestDestroyUnopened removes what a killed server left, as `cay down` does
// when no server runs.
func TestDestroyUnopened(t *testing.T) {
	p := testPool(t, "dead")
	acquire(t, p, true)
	p.Close()
	if err := again(p).Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := leftovers(t, p); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// TestMany takes 200 slots from four callers at once, checks some, and gives
// all back.
func TestMany(t *testing.T) {
	p := testPool(t, "many", func(p *Pool) { p.Warm = 8 })
	const n = 200
	began := time.Now()
	slots := make([]Slot, n)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := w; i < n; i += 4 {
				var err error
				if slots[i], err = p.Acquire(t.Context(), cay.Egress{}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	made := time.Since(began)
	seen := map[netip.Addr]bool{}
	for _, s := range slots {
		if seen[s.Addr] {
			t.Errorf("%s was given out twice", s.Addr)
		}
		seen[s.Addr] = true
	}
	for _, s := range []Slot{slots[0], slots[n/2], slots[n-1]} {
		serve(t, openFile(t, s.NetNS), "0.0.0.0:49983")
		if _, err := ask(t.Context(), "tcp4", s.Addr.String()+":49983"); err != nil {
			t.Error(err)
		}
	}
	began = time.Now()
	for w := range 4 {
		wg.Go(func() {
			for i := w; i < n; i += 4 {
				if err := p.Release(t.Context(), slots[i].Index); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d slots: taken in %v (%v each), given back in %v (%v each)", n, made, made/n, time.Since(began), time.Since(began)/n)
}
