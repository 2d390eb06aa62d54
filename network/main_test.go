package network

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

// inHost marks the run of the tests inside a host of their own.
const inHost = "CAY_NETWORK_TEST_HOST"

// dropLoopMounts detaches the file systems of other tests that a new mount
// namespace has too, so that their owners can unmount them for good.
func dropLoopMounts() error {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if w := strings.Fields(sc.Text()); len(w) > 1 && strings.HasPrefix(w[0], "/dev/loop") {
			if err := unix.Unmount(w[1], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("%s: %w", w[1], err)
			}
		}
	}
	return nil
}

// TestMain runs the tests in network and mount namespaces of their own: the
// machine's links, rules and settings are not touched.
func TestMain(m *testing.M) {
	if os.Getenv(inHost) == "" {
		c := exec.Command("/proc/self/exe", os.Args[1:]...)
		c.Env = append(os.Environ(), inHost+"=1")
		c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		var exit *exec.ExitError
		switch err := c.Run(); {
		case errors.As(err, &exit):
			os.Exit(max(exit.ExitCode(), 1))
		case err != nil:
			fmt.Fprintln(os.Stderr, "these tests need root:", err)
			os.Exit(1)
		}
		return
	}
	if slices.Contains(os.Args, "-test.fuzzworker") { // of the process that has the world
		os.Exit(m.Run())
	}
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if dir := os.Getenv(victimDir); dir != "" {
		victim(dir)
		return
	}
	if err := dropLoopMounts(); err != nil {
		fmt.Fprintln(os.Stderr, "letting go of the machine's mounts:", err)
		os.Exit(1)
	}
	if err := makeWorld(); err != nil {
		fmt.Fprintln(os.Stderr, "making the tests' host:", err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// The tests' host has one uplink. Behind it a namespace answers for every
// address there is, so that a refused destination is proven refused by us and
// not merely absent.
var (
	uplinkAddr = netip.MustParseAddr("93.184.215.2") // the host's own public address
	worldAddr  = netip.MustParseAddr("93.184.215.1")
	publicAddr = netip.MustParseAddr("93.184.216.34")
	secondAddr = netip.MustParseAddr("192.168.77.1") // the host's private address
	world      *os.File
)

func makeWorld() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if world, err = os.Open(threadNS); err != nil {
			return err
		}
		wh, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer wh.Close()
		v := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: "wan0", PeerNamespace: netlink.NsFd(int(world.Fd()))}
		v.Name = "wan"
		if err := h.LinkAdd(v); err != nil {
			return err
		}
		if err := bring(wh, "lo"); err != nil {
			return err
		}
		l, err := wh.LinkByName("wan0")
		if err != nil {
			return err
		}
		if err := wh.AddrAdd(l, &netlink.Addr{IPNet: netlink.NewIPNet(worldAddr.AsSlice())}); err != nil {
			return err
		}
		if err := wh.LinkSetUp(l); err != nil {
			return err
		}
		lo, err := wh.LinkByName("lo")
		if err != nil {
			return err
		}
		back := netlink.NewIPNet(uplinkAddr.AsSlice())
		if err := wh.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: back}); err != nil {
			return err
		}
		// Every address is one of the world's own.
		for _, all := range []string{"0.0.0.0/0", "::/0"} {
			_, dst, _ := netParse(all)
			if err := wh.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: dst, Type: unix.RTN_LOCAL,
				Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}); err != nil {
				return fmt.Errorf("making the world answer for %s: %w", all, err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := bring(h, "lo"); err != nil {
		return err
	}
	l, err := h.LinkByName("wan")
	if err != nil {
		return err
	}
	for _, a := range []netip.Addr{uplinkAddr, secondAddr} {
		if err := h.AddrAdd(l, &netlink.Addr{IPNet: netlink.NewIPNet(a.AsSlice())}); err != nil {
			return err
		}
	}
	if err := h.LinkSetUp(l); err != nil {
		return err
	}
	_, gw, _ := netParse(worldAddr.String() + "/32")
	if err := h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: gw, Scope: netlink.SCOPE_LINK}); err != nil {
		return err
	}
	return h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: worldAddr.AsSlice()})
}

// in runs f on a thread in the namespace at path.
func in(t testing.TB, path string, f func() error) error {
	t.Helper()
	ns, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	return inFile(ns, f)
}

func inFile(ns *os.File, f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

// testPool returns an open pool that the test destroys.
func testPool(t testing.TB, tag string, change ...func(*Pool)) *Pool {
	t.Helper()
	dir := t.TempDir()
	p := &Pool{Tag: tag, NamespaceDir: filepath.Join(dir, "netns"), StateDir: filepath.Join(dir, "state"), Warm: -1}
	for _, c := range change {
		c(p)
	}
	if err := p.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Destroy(t.Context()); err != nil {
			t.Errorf("Destroy: %v", err)
		}
		unix.Unmount(p.NamespaceDir, unix.MNT_DETACH)
	})
	return p
}

// closed lets nothing out.
var closed = cay.Egress{Deny: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}

func acquire(t testing.TB, p *Pool, internet bool) Slot {
	t.Helper()
	e := cay.Egress{}
	if !internet {
		e = closed
	}
	s, err := p.Acquire(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// eventually waits for a state of the kernel, which tells nobody when it
// comes.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not after 10 s: %s", what)
		}
	}
}
