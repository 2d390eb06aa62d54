package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Where in a router the kernel sends what a guest with a named policy opens.
const (
	StreamPort   = 1080 // its connections, to whatever port but 53
	ResolverPort = 53   // its connections and datagrams to port 53 of any address
)

// Diverted are the sockets in a slot's router that receive what the kernel
// does not decide about, see [cay.Egress.Named]. Only the guest reaches them.
// While they are closed the guest's connections are refused.
type Diverted struct {
	TCP    net.Listener
	DNS    net.PacketConn
	DNSTCP net.Listener
	// IPv6 says that the guest has it; the sockets are of both families then.
	IPv6 bool
}

// Close closes all three.
func (d Diverted) Close() error {
	var errs []error
	for _, c := range []interface{ Close() error }{d.TCP, d.DNS, d.DNSTCP} {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// Divert opens the sockets of a slot in use. The caller closes them before it
// releases the slot.
func (p *Pool) Divert(ctx context.Context, index int) (Diverted, error) {
	d := Diverted{IPv6: p.slotHas6(index)}
	err := p.inRouter(index, func() (err error) {
		tcp, udp, gateway := "tcp4", "udp4", gatewayAddr
		if d.IPv6 {
			tcp, udp, gateway = "tcp", "udp", netip.IPv6Unspecified()
		}
		at := func(port uint16) string { return netip.AddrPortFrom(gateway, port).String() }
		var l net.ListenConfig
		if d.TCP, err = l.Listen(ctx, tcp, at(StreamPort)); err != nil {
			return err
		}
		if d.DNSTCP, err = l.Listen(ctx, tcp, at(ResolverPort)); err != nil {
			return errors.Join(err, d.TCP.Close())
		}
		if d.DNS, err = l.ListenPacket(ctx, udp, at(ResolverPort)); err != nil {
			return errors.Join(err, d.TCP.Close(), d.DNSTCP.Close())
		}
		return nil
	})
	if err != nil {
		return Diverted{}, fail(fmt.Sprintf("listening in the router of slot %d", index), err)
	}
	return d, nil
}

// Destination tells where a guest sent a connection that [Diverted.TCP] or
// [Diverted.DNSTCP] accepted (SO_ORIGINAL_DST of linux/netfilter_ipv4.h).
func Destination(c net.Conn) (netip.AddrPort, error) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("%T is no connection of a guest", c)
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var sa unix.RawSockaddrInet6 // long enough for both
	four := (*unix.RawSockaddrInet4)(unsafe.Pointer(&sa))
	// IP6T_SO_ORIGINAL_DST of linux/netfilter_ipv6/ip6_tables.h has the same
	// number.
	level := unix.SOL_IPV6
	if a, ok := t.RemoteAddr().(*net.TCPAddr); ok && a.IP.To4() != nil {
		level = unix.SOL_IP
	}
	var errno unix.Errno
	err = raw.Control(func(fd uintptr) {
		size := uint32(unsafe.Sizeof(sa))
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(level), unix.SO_ORIGINAL_DST,
			uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)), 0)
	})
	if err != nil {
		return netip.AddrPort{}, err
	}
	if errno != 0 {
		return netip.AddrPort{}, os.NewSyscallError("getsockopt", errno)
	}
	addr := netip.AddrFrom16(sa.Addr)
	if level == unix.SOL_IP {
		addr = netip.AddrFrom4(four.Addr)
	}
	port := (*[2]byte)(unsafe.Pointer(&sa.Port)) // in network order, at the same place in both
	return netip.AddrPortFrom(addr, uint16(port[0])<<8|uint16(port[1])), nil
}

// Dial opens a TCP connection outwards from a slot's router, for the server
// that serves [Diverted]: both walls judge it as the guest's own. An address
// that is always refused is refused before anything is sent.
func (p *Pool) Dial(ctx context.Context, index int, to netip.AddrPort) (net.Conn, error) {
	a := to.Addr().Unmap()
	if !a.IsValid() || within(p.special, a) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(to), Err: os.NewSyscallError("connect", unix.ECONNREFUSED)}
	}
	fd, err := p.socket(index, family(a))
	if err != nil {
		return nil, err
	}
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(to.Port()), Addr: a.As16()}
	if a.Is4() {
		sa = &unix.SockaddrInet4{Port: int(to.Port()), Addr: a.As4()}
	}
	err = unix.Connect(fd, sa)
	f := os.NewFile(uintptr(fd), "tcp "+to.String())
	defer f.Close() // FileConn makes a copy
	if errors.Is(err, unix.EINPROGRESS) {
		err = connected(ctx, f)
	}
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	return net.FileConn(f)
}

// socketsAtOnce is how many sockets are made when one is needed: to make them
// takes a thread that goes to the router, which is more than a connection costs.
const socketsAtOnce = 8

// socket returns a TCP socket in a slot's router. Only that is done on a thread
// there: one for as long as somebody takes to answer is more than a guest may
// cost.
func (p *Pool) socket(index, family int) (int, error) {
	t, err := p.tenant(index)
	if err != nil {
		return 0, err
	}
	if fd, ok := t.spare.take(family); ok {
		return fd, nil
	}
	var made []int
	err = p.inRouter(index, func() error {
		for range socketsAtOnce {
			fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return os.NewSyscallError("socket", err)
			}
			made = append(made, fd)
		}
		return nil
	})
	if len(made) == 0 {
		return 0, err
	}
	t.spare.keep(family, made[1:])
	return made[0], nil
}

// spareSockets are sockets that nobody has used yet, by family. They are safe
// for concurrent use.
type spareSockets struct {
	mu    sync.Mutex
	ended bool
	all   map[int][]int
}

func (s *spareSockets) take(family int) (int, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.all[family])
	if n == 0 {
		return 0, false
	}
	fd := s.all[family][n-1]
	s.all[family] = s.all[family][:n-1]
	return fd, true
}

// keep takes possession of sockets; when enough are there, or none is wanted any
// more, it closes them.
func (s *spareSockets) keep(family int, fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, fd := range fds {
		if s.ended || len(s.all[family]) >= socketsAtOnce {
			_ = unix.Close(fd) // it was never used
			continue
		}
		if s.all == nil {
			s.all = map[int][]int{}
		}
		s.all[family] = append(s.all[family], fd)
	}
}

// end closes what is left: a socket holds its namespace.
func (s *spareSockets) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	for _, fds := range s.all {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}
	s.all = nil
}

// connected waits until a socket is connected that is about to be.
func connected(ctx context.Context, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if d, ok := ctx.Deadline(); ok {
		if err := f.SetDeadline(d); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetDeadline(time.Unix(1, 0)) }) // wakes the wait
	defer stop()
	var cerr error
	err = raw.Write(func(fd uintptr) bool {
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = os.NewSyscallError("connect", unix.Errno(code))
		}
		if err == nil {
			if _, err = unix.Getpeername(int(fd)); errors.Is(err, unix.ENOTCONN) {
				return false // woken for nothing
			}
		}
		cerr = err
		return true
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return err
	}
	return cerr
}

// inRouter runs f on a thread in the router of a slot in use.
func (p *Pool) inRouter(index int, f func() error) error {
	leave, err := p.enter()
	if err != nil {
		return err
	}
	defer leave()
	if _, err := p.tenant(index); err != nil {
		return err
	}
	ns, err := os.Open(p.routerNS(index))
	if err != nil {
		return err
	}
	defer ns.Close()
	return inNamespace(ns, f)
}
