package envd

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"iter"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Pauses between two looks at the listening sockets. Servers open their port
// soon after they were started or said something, so the pause is short after
// each start, output and end of a process, and doubles while nothing happens:
// who takes long to open his port waits for at most as long again.
const (
	minScan = 100 * time.Millisecond
	maxScan = 20 * time.Second
)

// scanBuffer is the size of one read of a table. Each read costs the kernel a
// walk to where the one before ended.
const scanBuffer = 16 << 10

// maxForwards bounds the ports that are made reachable.
const maxForwards = 1024

// forwarder makes services on the guest's loopback reachable from outside: for
// every port on which somebody listens on 127.0.0.0/8 or ::1 only, it listens
// on the guest's own addresses and passes connections on. Every sandbox has
// one, so it must cost nothing while nothing happens: without activity, and
// without processes but envd and PID 1, it does not look.
type forwarder struct {
	log   *slog.Logger
	procs *processes
	proc  string // where /proc is

	// Tests set these; nil: the guest's own.
	addrs func() []netip.Addr
	alone func() bool

	open map[uint16]*forward
	wg   sync.WaitGroup
}

// forward is one port that is made reachable.
type forward struct {
	target    netip.Addr
	listeners []net.Listener
}

func (f *forward) close() {
	for _, l := range f.listeners {
		l.Close()
	}
}

// run works until ctx ends, and waits for its connections to end with it.
func (f *forwarder) run(ctx context.Context) {
	if f.addrs == nil {
		f.addrs = ownAddrs
	}
	if f.alone == nil {
		f.alone = func() bool { return f.procs.count() == 0 && onlyDaemons(f.proc) }
	}
	f.open = map[uint16]*forward{}
	defer func() {
		for _, fw := range f.open {
			fw.close()
		}
		f.wg.Wait()
	}()
	pause := minScan
	timer := time.NewTimer(pause) // an envd before this one may have left processes
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.procs.active:
			began := time.Now()
			if len(f.open) > 0 {
				// A server that ended, or is being started anew, may want its
				// port on all addresses: get out of its way.
				f.scan(ctx)
			}
			pause = minScan
			// However busy the guest is: a long table is not read so often
			// that reading it keeps a CPU busy.
			select {
			case <-ctx.Done():
				return
			case <-time.After(max(minScan, 50*time.Since(began))):
			}
		case <-timer.C:
		}
		f.scan(ctx)
		if len(f.open) == 0 && f.alone() {
			timer.Stop()
			continue // until somebody starts something
		}
		pause = min(2*pause, maxScan)
		timer.Reset(pause)
	}
}

// scan brings the open forwards in line with who listens now.
func (f *forwarder) scan(ctx context.Context) {
	want, others := map[uint16]netip.Addr{}, map[uint16]bool{}
	read := false
	for _, name := range []string{"tcp", "tcp6"} {
		table, err := readTable(f.proc + "/net/" + name)
		if err != nil {
			continue // a guest without IPv6
		}
		read = true
		for at := range listening(table) {
			switch _, ours := f.open[at.Port()]; {
			case !at.Addr().IsLoopback():
				others[at.Port()] = others[at.Port()] || !ours || at.Addr().IsUnspecified()
			case !want[at.Port()].IsValid(): // of several, one
				want[at.Port()] = at.Addr()
			}
		}
	}
	if !read {
		return
	}
	maps.DeleteFunc(want, func(port uint16, _ netip.Addr) bool {
		return others[port] || port == Port || port == ControlPort
	})
	for port, fw := range f.open {
		if want[port] != fw.target {
			fw.close()
			delete(f.open, port)
		}
	}
	var addrs []netip.Addr
	for port, target := range want {
		if f.open[port] != nil || len(f.open) >= maxForwards {
			continue
		}
		if addrs == nil {
			addrs = f.addrs()
		}
		if fw := f.forward(ctx, port, target, addrs); fw != nil {
			f.open[port] = fw
		}
	}
}

// forward opens a port on the guest's own addresses. It is nil if somebody has
// it already.
func (f *forwarder) forward(ctx context.Context, port uint16, target netip.Addr, addrs []netip.Addr) *forward {
	fw := &forward{target: target}
	for _, a := range addrs {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", netip.AddrPortFrom(a, port).String())
		if err != nil {
			if !errors.Is(err, unix.EADDRINUSE) {
				f.log.Debug("a port stays unreachable", "port", port, "addr", a, "err", err)
			}
			continue
		}
		fw.listeners = append(fw.listeners, l)
		f.wg.Go(func() { f.serve(ctx, l, netip.AddrPortFrom(target, port)) })
	}
	if len(fw.listeners) == 0 {
		return nil
	}
	f.log.Debug("a port on the loopback is reachable", "port", port, "target", target)
	return fw
}

// serve passes connections on until the listener is closed. Those that are
// open then live on.
func (f *forwarder) serve(ctx context.Context, l net.Listener, target netip.AddrPort) {
	for {
		c, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of descriptors or memory: let some go first.
			select {
			case <-ctx.Done():
				return
			case <-time.After(minScan):
				continue
			}
		}
		f.wg.Go(func() { relay(ctx, c.(*net.TCPConn), target) })
	}
}

// relay joins a connection with a new one to target.
func relay(ctx context.Context, c *net.TCPConn, target netip.AddrPort) {
	defer c.Close()
	var d net.Dialer
	u, err := d.DialContext(ctx, "tcp", target.String())
	if err != nil {
		c.SetLinger(0) // refused, as it would have been by the server itself
		return
	}
	t := u.(*net.TCPConn)
	defer t.Close()
	stop := context.AfterFunc(ctx, func() { c.Close(); t.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { pipe(t, c) })
	wg.Go(func() { pipe(c, t) })
	wg.Wait()
}

// pipe copies one direction and passes its end on. A failure ends both
// directions with a reset, as it would have without us.
func pipe(dst, src *net.TCPConn) {
	if _, err := io.Copy(dst, src); err != nil {
		dst.SetLinger(0)
		src.SetLinger(0)
		dst.Close()
		src.Close()
		return
	}
	dst.CloseWrite()
}

func readTable(path string) (string, error) {
	t, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer t.Close()
	var b bytes.Buffer
	b.Grow(scanBuffer)
	_, err = b.ReadFrom(t)
	return b.String(), err
}

// stateListen is TCP_LISTEN of the kernel, as /proc/net/tcp writes it.
const stateListen = "0A"

// listening yields the addresses on which somebody listens, from a table of
// /proc/net (proc(5)).
func listening(table string) iter.Seq[netip.AddrPort] {
	return func(yield func(netip.AddrPort) bool) {
		for line := range strings.Lines(table) {
			// sl local remote state …
			f := strings.Fields(line)
			if len(f) < 4 || f[3] != stateListen {
				continue
			}
			if at, ok := parseAddr(f[1]); ok && !yield(at) {
				return
			}
		}
	}
}

// parseAddr reads an address of /proc/net: words of 32 bits, each in the byte
// order of the machine, in hexadecimal, and the port. All machines we run on
// have the lowest byte first.
func parseAddr(s string) (netip.AddrPort, bool) {
	a, p, ok := strings.Cut(s, ":")
	if !ok || len(p) != 4 || len(a) != 8 && len(a) != 32 {
		return netip.AddrPort{}, false
	}
	port, err := strconv.ParseUint(p, 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	b, err := hex.DecodeString(a)
	if err != nil {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(b); i += 4 {
		b[i], b[i+1], b[i+2], b[i+3] = b[i+3], b[i+2], b[i+1], b[i]
	}
	addr, ok := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), ok && port > 0
}

// ownAddrs are the guest's addresses that the outside can reach.
func ownAddrs() []netip.Addr {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var addrs []netip.Addr
	for _, a := range all {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		ip, ok := netip.AddrFromSlice(n.IP)
		ip = ip.Unmap()
		// An IPv6 link-local address needs a zone, and no proxy uses it; an
		// IPv4 one is what slots have.
		if ok && !ip.IsLoopback() && !(ip.Is6() && ip.IsLinkLocalUnicast()) {
			addrs = append(addrs, ip)
		}
	}
	return addrs
}

// onlyDaemons reports whether no process lives but PID 1 and this one.
func onlyDaemons(proc string) bool {
	d, err := os.Open(proc)
	if err != nil {
		return true
	}
	defer d.Close()
	self := os.Getpid()
	for {
		names, err := d.Readdirnames(256)
		for _, n := range names {
			if pid, perr := strconv.Atoi(n); perr == nil && pid != 1 && pid != self {
				return false
			}
		}
		if err != nil {
			return true
		}
	}
}
