package network

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A connection that the host has closed, to a guest that takes nothing any
// more, ends with the slot and not a minute later.
func TestReleaseEndsSockets(t *testing.T) {
	p := testPool(t, "hangup")
	s := acquire(t, p, true)
	const port = 8000
	var l net.Listener
	if err := in(t, s.NetNS, func() (err error) {
		l, err = net.Listen("tcp4", netip.AddrPortFrom(guestAddr, port).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", netip.AddrPortFrom(s.Addr, port).String())
	if err != nil {
		t.Fatal(err)
	}
	c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for block := make([]byte, 1<<20); err == nil; { // nobody reads
		_, err = c.Write(block)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	c.Close()
	sockets := func() (n int) {
		t.Helper()
		all, err := netlink.SocketDiagTCP(unix.AF_INET)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			t.Fatal(err)
		}
		for _, k := range all {
			if a, _ := netip.AddrFromSlice(k.ID.Destination); a.Unmap() == s.Addr {
				n++
			}
		}
		return n
	}
	if sockets() == 0 {
		t.Fatal("the test leaves no socket, so it shows nothing")
	}
	if err := p.Release(context.WithoutCancel(t.Context()), s.Index); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no socket of the slot is left", func() bool { return sockets() == 0 })
}
