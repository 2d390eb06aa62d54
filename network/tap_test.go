package network

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// packet is what a tap saw.
type packet struct {
	src, dst netip.Addr
	proto    byte
	dport    uint16 // of TCP and UDP
	opens    bool   // a segment that asks for a connection
}

func (p packet) String() string {
	return fmt.Sprintf("%s > %s proto %d port %d", p.src, p.dst, p.proto, p.dport)
}

// tap records every packet that comes in by a link: all protocols, before any
// firewall of that namespace.
type tap struct {
	fd   int
	mu   sync.Mutex
	seen []packet
	done chan struct{}
}

// newTap watches the link, in the namespace of ns, until the test ends.
func newTap(t testing.TB, ns *os.File, link string) *tap {
	t.Helper()
	w := &tap{done: make(chan struct{})}
	err := inFile(ns, func() error {
		l, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20_000})
		return unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: l.Index})
	})
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	go func() {
		defer close(w.done)
		buf := make([]byte, 65536)
		for {
			n, from, err := unix.Recvfrom(w.fd, buf, 0)
			if err != nil {
				select {
				case <-stop:
					return
				default:
					continue
				}
			}
			ll, ok := from.(*unix.SockaddrLinklayer)
			if !ok || ll.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			if p, ok := parse(buf[:n], ll.Protocol == htons(unix.ETH_P_IPV6)); ok {
				w.mu.Lock()
				w.seen = append(w.seen, p)
				w.mu.Unlock()
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-w.done; unix.Close(w.fd) })
	return w
}

func htons(n uint16) uint16 { return n<<8 | n>>8 }

func parse(b []byte, v6 bool) (packet, bool) {
	var p packet
	head := 40
	if v6 {
		if len(b) < head {
			return p, false
		}
		p.src, p.dst, p.proto = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40])), b[6]
	} else {
		if len(b) < 20 || b[0]>>4 != 4 {
			return p, false // ARP and the like
		}
		p.src, p.dst, p.proto = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), b[9]
		head = int(b[0]&15) * 4
	}
	if (p.proto == unix.IPPROTO_TCP || p.proto == unix.IPPROTO_UDP) && len(b) >= head+4 {
		p.dport = binary.BigEndian.Uint16(b[head+2:])
		p.opens = p.proto == unix.IPPROTO_TCP && len(b) >= head+14 && b[head+13]&0x12 == 0x02
	}
	return p, true
}

// ownLink tells what the machine itself says to neighbours, once its uplink has
// an address of IPv6.
func ownLink(p packet) bool {
	return p.src.Is6() && p.dst.IsMulticast() && (p.src.IsUnspecified() || p.src.IsLinkLocalUnicast()) && p.src != netip.MustParseAddr("fe80::1")
}

// take returns what was seen since the last call, and forgets it.
func (w *tap) take() []packet {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.seen
	w.seen = nil
	return out
}

// await waits until a packet to the marker has been seen, and returns all
// others before it.
func (w *tap) await(t testing.TB, marker netip.AddrPort) []packet {
	t.Helper()
	var out []packet
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		seen := w.take()
		for i, p := range seen {
			if p.dst == marker.Addr() && p.dport == marker.Port() {
				return append(out, seen[:i]...)
			}
		}
		out = append(out, seen...)
	}
	t.Fatalf("the marker to %s never came; before it: %v", marker, out)
	return nil
}

// shout sends to a destination whatever a guest can: a TCP SYN, a datagram, a
// ping and a packet of SCTP, from the calling thread's namespace. It waits for
// nothing.
func shout(to netip.AddrPort) {
	a := to.Addr()
	family, icmp := unix.AF_INET, unix.IPPROTO_ICMP
	var sa unix.Sockaddr
	if a.Is4() {
		sa = &unix.SockaddrInet4{Port: int(to.Port()), Addr: a.As4()}
	} else { // ::ffff:1.2.3.4 too: the same destination through an IPv6 socket
		sa = &unix.SockaddrInet6{Port: int(to.Port()), Addr: a.As16()}
		family, icmp = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	echo := []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0}
	for _, s := range []struct{ kind, proto int }{
		{unix.SOCK_STREAM, 0}, {unix.SOCK_DGRAM, 0}, {unix.SOCK_RAW, icmp}, {unix.SOCK_RAW, unix.IPPROTO_SCTP},
	} {
		fd, err := unix.Socket(family, s.kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, s.proto)
		if err != nil {
			continue
		}
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
		if s.kind == unix.SOCK_STREAM {
			unix.Connect(fd, sa)
			defer unix.Close(fd) // not at once: that would take the SYN back
			continue
		}
		unix.Sendto(fd, echo, 0, sa)
		unix.Close(fd)
	}
}

// forge sends a datagram with a source address of the caller's choice.
func forge(src netip.Addr, dst netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	b := make([]byte, 36)
	b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	s, d := src.As4(), dst.Addr().As4()
	copy(b[12:], s[:])
	copy(b[16:], d[:])
	binary.BigEndian.PutUint16(b[20:], 4444)
	binary.BigEndian.PutUint16(b[22:], dst.Port())
	binary.BigEndian.PutUint16(b[24:], 16)
	return unix.Sendto(fd, b, 0, &unix.SockaddrInet4{Addr: d})
}
