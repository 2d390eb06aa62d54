package isolation

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/test/program"
)

// packet is what a tap tells packets apart by. What the kernel cannot address
// to IP, such as ARP, has no addresses and its EtherType as port.
type packet struct {
	from, to netip.Addr
	protocol int    // of IP
	port     uint16 // of the destination, for TCP and UDP
	opens    bool   // TCP: asks for a connection. ICMP: asks for an echo
}

func (p packet) String() string {
	return fmt.Sprintf("%s > %s protocol %d port %d", p.from, p.to, p.protocol, p.port)
}

// tap counts every packet that comes in by a link, of all protocols, before any
// firewall of that namespace sees it.
type tap struct {
	mu   sync.Mutex
	seen map[packet]int
}

// newTap watches a link of the network that in leads to, until the test ends.
func newTap(t testing.TB, in func(func() error) error, link string) *tap {
	t.Helper()
	w := &tap{seen: map[packet]int{}}
	fd := -1
	err := in(func() error {
		l, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		all := uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20) // else packets are lost sooner
		_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000})
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Index})
	})
	if err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for buf := make([]byte, 1<<16); ; {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && err == nil && ll.Pkttype != unix.PACKET_OUTGOING {
				p := dissect(buf[:n], ll.Protocol)
				w.mu.Lock()
				w.seen[p]++
				w.mu.Unlock()
				continue
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-done; unix.Close(fd) })
	return w
}

// dissect reads the head of a packet. EtherType is in the network's order.
func dissect(b []byte, etherType uint16) (p packet) {
	var rest []byte
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		p.from, p.to, p.protocol = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), int(b[9])
		rest = b[min(len(b), int(b[0]&15)*4):]
	case len(b) >= 40 && b[0]>>4 == 6:
		p.from, p.to, p.protocol = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40])), int(b[6])
		rest = b[40:]
	default:
		p.port = etherType<<8 | etherType>>8
		return p
	}
	switch {
	case (p.protocol == unix.IPPROTO_TCP || p.protocol == unix.IPPROTO_UDP) && len(rest) >= 4:
		p.port = binary.BigEndian.Uint16(rest[2:])
		p.opens = p.protocol == unix.IPPROTO_TCP && len(rest) > 13 && rest[13]&0x12 == 0x02
	case p.protocol == unix.IPPROTO_ICMP || p.protocol == unix.IPPROTO_ICMPV6:
		p.opens = len(rest) > 0 && (rest[0] == 8 || rest[0] == 128)
	}
	return p
}

// take returns what was seen since the last call, and how often.
func (w *tap) take() map[packet]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.seen
	w.seen = map[packet]int{}
	return out
}

// inNetOf leads to the network namespace of a process.
func inNetOf(t testing.TB, pid int) func(func() error) error {
	t.Helper()
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return program.InNamespace(ns)
}

// wallsDown takes away what a server's firewall judges packets by: its own
// table in the machine's network, and those of the routers of its sandboxes.
// Addresses are translated as before.
func wallsDown(t *testing.T, server *program.Server) {
	t.Helper()
	flush := func(c *nftables.Conn) {
		tables, err := c.ListTables()
		if err != nil {
			t.Fatal(err)
		}
		for _, table := range tables {
			if !strings.HasPrefix(table.Name, "cay") {
				continue
			}
			for _, chain := range []string{"first", "input", "forward"} {
				c.FlushChain(&nftables.Chain{Name: chain, Table: table})
			}
		}
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	flush(&nftables.Conn{})
	names, err := os.ReadDir("/run/netns")
	if err != nil {
		t.Fatal(err)
	}
	routers := 0
	for _, n := range names {
		if !strings.Contains(n.Name(), program.HostTag(server.Dir)) || !strings.HasSuffix(n.Name(), "r") {
			continue
		}
		ns, err := os.Open("/run/netns/" + n.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // a sandbox's that has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		c, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
		if err != nil {
			t.Fatal(err)
		}
		flush(c)
		ns.Close()
		routers++
	}
	if routers == 0 {
		t.Fatal("no router of a sandbox was found")
	}
}

// sorted is for messages: the packets of a tap, without how often.
func sorted(seen map[packet]int) []packet {
	return slices.SortedFunc(maps.Keys(seen), func(a, b packet) int { return strings.Compare(a.String(), b.String()) })
}
