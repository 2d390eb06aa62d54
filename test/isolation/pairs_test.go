package isolation

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/test/program"
)

// pairsEnv has this test binary be the program that forges packets, in a
// sandbox. Its value is the job's file.
const pairsEnv = "CAY_ISOLATION_PAIRS"

// pairsJob says whom a guest sends to, and in whose names besides its own.
type pairsJob struct {
	To, As []netip.Addr
	Own    netip.Addr // the guest's
}

// marker is the port of a datagram that the guest sends to the internet when it
// has sent everything.
const marker = 9

// pairsMain sends to each destination what a guest can, with its own source and
// with forged ones, and what is addressed to everybody on a link. It prints how
// many packets its kernel took.
func pairsMain(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var job pairsJob
	if err := json.Unmarshal(b, &job); err != nil {
		return err
	}
	raw, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return fmt.Errorf("a raw socket: %w", err)
	}
	echo, err := (&icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: 1, Data: []byte(pingData)}}).Marshal(nil)
	if err != nil {
		return err
	}
	var sent struct{ Own, Forged, Frames int }
	took := func(n *int, err error) {
		if err == nil {
			*n++
		}
	}
	for _, to := range job.To {
		for _, protocol := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP} {
			for _, as := range append([]netip.Addr{job.Own}, job.As...) {
				n := &sent.Forged
				if as == job.Own {
					n = &sent.Own
				}
				took(n, unix.Sendto(raw, forged(protocol, as, to, echo), 0, &unix.SockaddrInet4{Addr: to.As4()}))
			}
		}
	}
	if err := everybody(func(err error) { took(&sent.Frames, err) }); err != nil {
		return err
	}
	c, err := net.Dial("udp", netip.AddrPortFrom(program.Public, marker).String())
	if err != nil {
		return err
	}
	if _, err := c.Write([]byte("done")); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(sent)
}

// forged is a packet that opens a connection, a datagram or an echo request.
func forged(protocol byte, from, to netip.Addr, echo []byte) []byte {
	payload := echo
	switch protocol {
	case unix.IPPROTO_TCP:
		payload = make([]byte, 20)
		payload[12], payload[13], payload[14] = 5<<4, 0x02, 0xff
	case unix.IPPROTO_UDP:
		payload = make([]byte, 16)
		payload[5] = 16
	}
	if protocol != unix.IPPROTO_ICMP {
		payload[0], payload[1], payload[2], payload[3] = 0x10, 0x92, byte(port>>8), byte(port&0xff)
	}
	if protocol == unix.IPPROTO_TCP {
		sum := checksum(slices.Concat(from.AsSlice(), to.AsSlice(), []byte{0, protocol, 0, byte(len(payload))}, payload))
		payload[16], payload[17] = byte(sum>>8), byte(sum)
	}
	head := make([]byte, 20, 20+len(payload))
	head[0], head[3], head[8], head[9] = 0x45, byte(20+len(payload)), 64, protocol
	copy(head[12:], from.AsSlice())
	copy(head[16:], to.AsSlice())
	sum := checksum(head)
	head[10], head[11] = byte(sum>>8), byte(sum)
	return append(head, payload...)
}

// checksum is that of RFC 1071, of an even number of bytes.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// everybody sends what is for all on a link: ARP that claims the gateway's
// address, a neighbour solicitation, and datagrams to groups and broadcasts.
func everybody(took func(error)) error {
	l, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	frames, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return fmt.Errorf("a packet socket: %w", err)
	}
	gateway, own := netip.MustParseAddr("169.254.0.22"), netip.MustParseAddr("169.254.0.21")
	arp := slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, 2}, l.HardwareAddr, gateway.AsSlice(), []byte{0, 0, 0, 0, 0, 0}, own.AsSlice())
	nd := slices.Concat([]byte{0x60, 0, 0, 0, 0, 8, 58, 255}, netip.MustParseAddr("fe80::1").AsSlice(), netip.MustParseAddr("ff02::1").AsSlice(), []byte{135, 0, 0, 0, 0, 0, 0, 0})
	for etherType, b := range map[uint16][]byte{unix.ETH_P_ARP: arp, unix.ETH_P_IPV6: nd} {
		sa := &unix.SockaddrLinklayer{Protocol: etherType<<8 | etherType>>8, Ifindex: l.Index, Halen: 6, Addr: [8]byte{255, 255, 255, 255, 255, 255}}
		took(unix.Sendto(frames, b, 0, sa))
	}
	c, err := net.ListenPacket("udp4", ":0")
	if err != nil {
		return err
	}
	for _, to := range []string{"255.255.255.255", "169.254.0.23", "224.0.0.1", "224.0.0.251", "239.255.255.250"} {
		_, _ = c.WriteTo([]byte("everybody"), &net.UDPAddr{IP: net.ParseIP(to), Port: port}) // the guest's kernel may refuse it
	}
	return nil
}

// Of 20 sandboxes, each sends to each other one, by both its addresses, and to
// the internet, over TCP, UDP and ICMP, in its own name and in those of others.
// None arrives at a sandbox, and none leaves the machine in a false name. What is
// below IP the engine does not send for a guest, so package network tries it.
func TestAllPairs(t *testing.T) {
	const n = 20
	server := program.Start(t, program.Options{MemoryMB: 256})
	c := server.Client()
	boxes := make([]*program.Sandbox, n)
	var taps []*tap
	var own []netip.Addr
	for i := range boxes {
		boxes[i] = c.Make(t, 20*time.Minute, nil)
	}
	for _, a := range ends(t) {
		if netip.MustParsePrefix("10.193.0.0/16").Contains(a) {
			own = append(own, a)
		}
	}
	if len(own) < 2*n {
		t.Fatalf("the links of %d sandboxes have %d addresses", n, len(own))
	}
	wan := newTap(t, program.InWorld, "wan0")
	for _, s := range boxes {
		taps = append(taps, newTap(t, inNetOf(t, enginePID(t, server, s.ID)), "eth0"))
	}
	job, err := json.Marshal(pairsJob{To: append(own, program.Public, program.Uplink), Own: netip.MustParseAddr("169.254.0.21"),
		As: []netip.Addr{own[0], own[1], own[len(own)-1], program.Uplink, netip.MustParseAddr("169.254.0.22"), netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("127.0.0.1")}})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	places := make(chan struct{}, 4)
	for _, s := range boxes {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			err := settleIn(t.Context(), s)
			if err == nil {
				err = s.Write(t.Context(), "/tmp/job", job)
			}
			var r program.Result
			if err == nil {
				r, err = s.Exec(t.Context(), "root", pairsEnv+"=/tmp/job exec /home/user/guest")
			}
			var sent struct{ Own, Forged, Frames int }
			if err == nil {
				err = json.Unmarshal([]byte(r.Stdout), &sent)
			}
			if err != nil || sent.Own < len(own) || sent.Forged < len(own) || sent.Frames != 0 {
				t.Errorf("sandbox %s sent %+v: %v, %s", s.ID, sent, err, r)
			}
		})
	}
	wg.Wait()

	// The last word of each has arrived; then that of the machine, at each.
	left := map[packet]int{}
	program.Eventually(t, patience, func() string {
		for p, n := range wan.take() {
			left[p] += n
		}
		if done := left[packet{from: program.Uplink, to: program.Public, protocol: unix.IPPROTO_UDP, port: marker}]; done < n {
			return fmt.Sprintf("%d of %d sandboxes are done", done, n)
		}
		return ""
	})
	for _, p := range sorted(left) {
		if p.to.Is4() && p.from != program.Uplink && p.from != program.Private {
			t.Errorf("left the machine: %s", p)
		}
	}
	answered := 0
	for i, s := range boxes {
		if err := s.Answers(t.Context()); err != nil {
			t.Errorf("sandbox %s: %v", s.ID, err)
		}
		for _, p := range sorted(taps[i].take()) {
			switch {
			case p.from == netip.MustParseAddr("169.254.0.22") && (p.port == program.EnvdPort || p.port == program.EnvdPort-1):
				answered++ // the node speaks to the daemon
			case p.protocol == unix.IPPROTO_TCP && !p.opens, p.protocol == unix.IPPROTO_ICMP && !p.opens: // answers to what it sent itself
			default:
				t.Errorf("reached sandbox %d: %s", i, p)
			}
		}
	}
	if answered < n {
		t.Errorf("the taps of %d sandboxes have seen the node %d times", n, answered)
	}
	t.Logf("%d sandboxes, %d addresses of links, %d packets each with a forged source at most", n, len(own), 3*7*(len(own)+2))
}
