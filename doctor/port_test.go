package doctor

import (
	"net"
	"os"
	"strings"
	"testing"
	"testing/fstest"
)

// sockets are lines as the kernel prints them.
const (
	tcpHeader = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
	// 127.0.0.1:3000
	tcpLoopback = "   0: 0100007F:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0 100 0 0 10 0\n"
	// 0.0.0.0:3001
	tcpAny = "   1: 00000000:0BB9 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 222 1 0 100 0 0 10 0\n"
	// 127.0.0.1:3002, established: not a listener
	tcpBusy = "   2: 0100007F:0BBA 0100007F:C000 01 00000000:00000000 00:00000000 00000000     0        0 333 1 0 100 0 0 10 0\n"
	// 10.0.0.5:3003, whose process is not visible
	tcpForeign = "   3: 0500000A:0BBB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 999 1 0 100 0 0 10 0\n"
	// [::]:3004
	tcp6Any = "   0: 00000000000000000000000000000000:0BBC 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 444 1 0 100 0 0 10 0\n"
	// [::1]:3005
	tcp6Loopback = "   1: 00000000000000000000000001000000:0BBD 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 555 1 0 100 0 0 10 0\n"
	// [::ffff:127.0.0.1]:3006
	tcp6Mapped = "   2: 0000000000000000FFFF00000100007F:0BBE 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 666 1 0 100 0 0 10 0\n"
)

func socketLink(inode string) *fstest.MapFile {
	return &fstest.MapFile{Mode: os.ModeSymlink | 0o777, Data: []byte("socket:[" + inode + "]")}
}

func TestPortHolder(t *testing.T) {
	proc := fstest.MapFS{
		"net/tcp":     {Data: []byte(tcpHeader + tcpLoopback + tcpAny + tcpBusy + tcpForeign)},
		"net/tcp6":    {Data: []byte(tcpHeader + tcp6Any + tcp6Loopback + tcp6Mapped + "short line\n")},
		"9/fd/0":      {Mode: os.ModeSymlink | 0o777, Data: []byte("/dev/null")},
		"9/fd/3":      socketLink("111"),
		"9/cmdline":   {Data: []byte("python3\x00-m\x00http.server\x00")},
		"10/fd/3":     socketLink("111"), // a child that inherited it
		"10/cmdline":  {Data: []byte("child\x00")},
		"20/fd/7":     socketLink("222"),
		"20/comm":     {Data: []byte("nginx\n")},
		"20/cmdline":  {Data: nil},
		"30/fd/7":     socketLink("444"),
		"30/cmdline":  {Data: []byte("caddy\x00run")},
		"40/fd/1":     socketLink("555"),
		"40/fd/2":     socketLink("666"),
		"40/fd/3":     socketLink("333"),
		"40/cmdline":  {Data: []byte("node")},
		"self/status": {Data: []byte("x")},
	}
	tests := []struct {
		addr string
		pid  int
		cmd  string
	}{
		{"127.0.0.1:3000", 9, "python3 -m http.server"},
		{"0.0.0.0:3000", 9, "python3 -m http.server"}, // every address includes loopback
		{":3000", 9, "python3 -m http.server"},
		{"[::]:3000", 9, "python3 -m http.server"},
		{"10.0.0.5:3000", 0, ""}, // another address of the machine is free
		{"127.0.0.1:3001", 20, "nginx"},
		{"10.0.0.5:3001", 20, "nginx"},
		{"127.0.0.1:3002", 0, ""}, // a connection is no listener
		{"10.0.0.5:3003", 0, ""},  // its process cannot be seen
		{"127.0.0.1:3004", 30, "caddy run"},
		{"[::1]:3005", 40, "node"},
		{"127.0.0.1:3005", 0, ""},
		{"127.0.0.1:3006", 40, "node"},
		{"127.0.0.1:3999", 0, ""},
		{"127.0.0.1", 0, ""},
		{"127.0.0.1:http", 0, ""},
		{"127.0.0.1:70000", 0, ""},
	}
	for _, tt := range tests {
		t.Run(tt.addr, func(t *testing.T) {
			pid, cmd, ok := portHolder(proc, tt.addr)
			if pid != tt.pid || cmd != tt.cmd || ok != (tt.pid != 0) {
				t.Errorf("portHolder(%q) = %d, %q, %v; want %d, %q", tt.addr, pid, cmd, ok, tt.pid, tt.cmd)
			}
		})
	}
	if _, _, ok := portHolder(fstest.MapFS{}, "127.0.0.1:3000"); ok {
		t.Error("a machine without /proc/net: found a holder")
	}
}

// The kernel's own tables agree with what the parser expects.
func TestPortHolderOfThisProcess(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", ":0"} {
		l, err := net.Listen("tcp", listen)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		pid, cmd, ok := PortHolder("127.0.0.1:" + port)
		if !ok || pid != os.Getpid() || !strings.Contains(cmd, "doctor.test") {
			t.Errorf("listener on %s: PortHolder = %d, %q, %v; want this process, %d", listen, pid, cmd, ok, os.Getpid())
		}
	}
}

func FuzzParseSocketAddr(f *testing.F) {
	f.Add("0100007F:0BB8")
	f.Add("00000000000000000000000001000000:0BBD")
	f.Add(":")
	f.Fuzz(func(t *testing.T, s string) {
		a, ok := parseSocketAddr(s)
		if ok && !a.IsValid() {
			t.Errorf("parseSocketAddr(%q) = %v, true", s, a)
		}
	})
}
