package envd

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// Tables as the kernel and gVisor write them.
const (
	tcpTable = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0000000000000000 100 0 0 10 0
   1: 00000000:C33F 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12346 1 0000000000000000 100 0 0 10 0
   2: 0100007F:1F90 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 12347 1 0000000000000000 20 4 30 10 -1
   3: 3500007F:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000   101        0 12348 1 0000000000000000 100 0 0 10 5
`
	tcp6Table = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000001000000:0BB8 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0000000000000000 100 0 0 10 0
   1: 0000000000000000FFFF00000100007F:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0000000000000000 100 0 0 10 0
   2: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 3 1 0000000000000000 100 0 0 10 0
`
)

func TestListening(t *testing.T) {
	for _, c := range []struct {
		table string
		want  []string
	}{
		{tcpTable, []string{"127.0.0.1:8080", "0.0.0.0:49983", "127.0.0.53:53"}},
		{tcp6Table, []string{"[::1]:3000", "127.0.0.1:80", "[::]:22"}},
		{"", nil},
		{"   0: 0100007F:1F90 00000000:0000", nil},
		{"   0: 0100007F:0000 00000000:0000 0A", nil},
		{"   0: 0100007F1F90 00000000:0000 0A", nil},
		{"   0: 0100007G:1F90 00000000:0000 0A", nil},
	} {
		var got []string
		for at := range listening(c.table) {
			got = append(got, at.String())
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%.40q: %s", c.table, diff)
		}
	}
}

func FuzzListening(f *testing.F) {
	f.Add(tcpTable)
	f.Add(tcp6Table)
	f.Fuzz(func(t *testing.T, s string) {
		n := 0
		for at := range listening(s) {
			if !at.IsValid() || at.Port() == 0 || at.Addr().Is4In6() {
				t.Errorf("got %v", at)
			}
			n++
		}
		if n > strings.Count(s, "\n")+1 {
			t.Errorf("%d addresses in %d lines", n, strings.Count(s, "\n"))
		}
	})
}

// fakeNet is a directory that stands for /proc.
type fakeNet struct {
	t   testing.TB
	dir string
}

func newFakeNet(t testing.TB) fakeNet {
	t.Helper()
	n := fakeNet{t, t.TempDir()}
	must(t, os.Mkdir(filepath.Join(n.dir, "net"), 0o755))
	n.set()
	return n
}

// set makes the table say that somebody listens on these addresses.
func (n fakeNet) set(at ...netip.AddrPort) {
	n.t.Helper()
	text := "  sl  local_address\n"
	for i, a := range at {
		b := a.Addr().As4()
		text += fmt.Sprintf("%4d: %02X%02X%02X%02X:%04X 00000000:0000 0A 0 0\n", i, b[3], b[2], b[1], b[0], a.Port())
	}
	must(n.t, os.WriteFile(filepath.Join(n.dir, "net", "tcp"), []byte(text), 0o644))
}

// newForwarder runs one for a fake table.
func newForwarder(t testing.TB, n fakeNet, own netip.Addr) *processes {
	t.Helper()
	ps := newProcesses(slog.New(slog.DiscardHandler))
	f := &forwarder{log: ps.log, procs: ps, proc: n.dir, alone: func() bool { return true },
		addrs: func() []netip.Addr { return []netip.Addr{own} }}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { f.run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	return ps
}

func TestForward(t *testing.T) {
	// The part of the loopback that stands for the guest's own address.
	own := netip.MustParseAddr("127.9.8.7")
	server, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	defer server.Close()
	go func() { // says what it was told, backwards, after the end of input
		for {
			c, err := server.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, _ := io.ReadAll(c)
				for i, j := 0, len(b)-1; i < j; i, j = i+1, j-1 {
					b[i], b[j] = b[j], b[i]
				}
				c.Write(b)
			}()
		}
	}()
	local := server.Addr().(*net.TCPAddr).AddrPort()
	outside := netip.AddrPortFrom(own, local.Port()).String()
	n := newFakeNet(t)
	ps := newForwarder(t, n, own)

	if c, err := net.Dial("tcp4", outside); err == nil {
		c.Close()
		t.Fatal("reachable before anybody listens")
	}
	n.set(local)
	ps.stir()
	var c net.Conn
	eventually(t, "the port is reachable", func() bool { c, err = net.Dial("tcp4", outside); return err == nil })
	defer c.Close()

	// The end of one direction is passed on alone, and large data whole.
	text := strings.Repeat("0123456789", 100_000)
	go func() { io.WriteString(c, text); c.(*net.TCPConn).CloseWrite() }()
	b, err := io.ReadAll(c)
	must(t, err)
	if want := strings.Repeat("9876543210", 100_000); string(b) != want {
		t.Errorf("got %d bytes back of %d", len(b), len(want))
	}

	// Whoever wants the port on all addresses gets it, and open connections
	// live on.
	open, err := net.Dial("tcp4", outside)
	must(t, err)
	defer open.Close()
	_, err = io.WriteString(open, "abc")
	must(t, err)
	n.set()
	ps.stir()
	var all net.Listener
	eventually(t, "the port is free", func() bool { all, err = net.Listen("tcp4", outside); return err == nil })
	must(t, open.(*net.TCPConn).CloseWrite())
	if b, err := io.ReadAll(open); string(b) != "cba" {
		t.Errorf("an open connection gave %q, %v", b, err)
	}
	// While somebody has it, it is left alone; then it is taken again.
	n.set(local)
	ps.stir()
	all.Close()
	ps.stir()
	eventually(t, "the port is reachable again", func() bool {
		c, err := net.Dial("tcp4", outside)
		if err != nil {
			return false
		}
		defer c.Close()
		io.WriteString(c, "xy")
		c.(*net.TCPConn).CloseWrite()
		b, _ := io.ReadAll(c)
		return string(b) == "yx"
	})
}

// TestForwardRefuses: nothing of the daemon's own, and no port that somebody
// serves on other addresses himself.
func TestForwardRefuses(t *testing.T) {
	n := newFakeNet(t)
	loop, wild, other := netip.MustParseAddr("127.0.0.1"), netip.IPv4Unspecified(), netip.MustParseAddr("10.0.0.5")
	n.set(netip.AddrPortFrom(loop, Port), netip.AddrPortFrom(loop, ControlPort),
		netip.AddrPortFrom(loop, 4001), netip.AddrPortFrom(wild, 4001),
		netip.AddrPortFrom(other, 4002), netip.AddrPortFrom(loop, 4002))
	asked := 0
	f := &forwarder{log: slog.New(slog.DiscardHandler), proc: n.dir, open: map[uint16]*forward{},
		addrs: func() []netip.Addr { asked++; return nil }}
	f.scan(t.Context())
	if asked != 0 || len(f.open) != 0 {
		t.Errorf("it wants to open a port: %v", f.open)
	}
}

// TestForwardTargetGone: a client of a port whose server refuses is refused.
func TestForwardTargetGone(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	local := l.Addr().(*net.TCPAddr).AddrPort()
	l.Close()
	own := netip.MustParseAddr("127.9.8.6")
	n := newFakeNet(t)
	n.set(local)
	ps := newForwarder(t, n, own)
	ps.stir()
	eventually(t, "the connection is reset", func() bool {
		c, err := net.Dial("tcp4", netip.AddrPortFrom(own, local.Port()).String())
		if err != nil {
			return false
		}
		defer c.Close()
		_, err = c.Read(make([]byte, 1))
		if err == nil || err == io.EOF {
			t.Fatalf("read: %v", err)
		}
		return strings.Contains(err.Error(), unix.ECONNRESET.Error())
	})
}

// TestForwardIdle: it does not look while nothing happens, and seldom while
// processes are silent.
func TestForwardIdle(t *testing.T) {
	for _, c := range []struct {
		alone    bool
		most     int // in an hour after one activity
		atLeast  int
		activity bool
	}{
		{alone: true, most: 1, atLeast: 1},
		{alone: true, activity: true, most: 3, atLeast: 1},
		{alone: false, activity: true, most: int(time.Hour/maxScan) + 10, atLeast: int(time.Hour/maxScan) - 10},
	} {
		n := newFakeNet(t)
		synctest.Test(t, func(t *testing.T) {
			scans := 0
			ps := newProcesses(slog.New(slog.DiscardHandler))
			f := &forwarder{log: ps.log, procs: ps, proc: n.dir,
				alone: func() bool { scans++; return c.alone }, addrs: func() []netip.Addr { return nil }}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() { f.run(ctx); close(done) }()
			if c.activity {
				ps.stir()
			}
			time.Sleep(time.Hour) // virtual
			cancel()
			<-done
			if scans < c.atLeast || scans > c.most {
				t.Errorf("alone %v, activity %v: %d looks in an hour, want %d to %d", c.alone, c.activity, scans, c.atLeast, c.most)
			}
		})
	}
}

// TestForwardBusy: a process that never stops talking is not a reason to look
// all the time.
func TestForwardBusy(t *testing.T) {
	n := newFakeNet(t)
	synctest.Test(t, func(t *testing.T) {
		scans := 0
		ps := newProcesses(slog.New(slog.DiscardHandler))
		f := &forwarder{log: ps.log, procs: ps, proc: n.dir, alone: func() bool { scans++; return false }, addrs: func() []netip.Addr { return nil }}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { f.run(ctx); close(done) }()
		for range 10_000 {
			ps.stir()
			time.Sleep(time.Millisecond) // virtual
		}
		cancel()
		<-done
		if most := int(10*time.Second/minScan) + 2; scans > most {
			t.Errorf("%d looks in 10 s, want at most %d", scans, most)
		}
	})
}

func TestOwnAddrs(t *testing.T) {
	for _, a := range ownAddrs() {
		if a.IsLoopback() || a.IsUnspecified() || a.Is4In6() {
			t.Errorf("%v is not an address of this machine for others", a)
		}
	}
}

func TestOnlyDaemons(t *testing.T) {
	dir := t.TempDir()
	for _, n := range []string{"1", "self", "net", fmt.Sprint(os.Getpid())} {
		must(t, os.Mkdir(filepath.Join(dir, n), 0o755))
	}
	if !onlyDaemons(dir) {
		t.Error("sees somebody else")
	}
	must(t, os.Mkdir(filepath.Join(dir, "4194303"), 0o755))
	if onlyDaemons(dir) {
		t.Error("does not see somebody else")
	}
}
