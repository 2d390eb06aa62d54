package program

import (
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) { Bare(m) }

// The machine's internet answers at addresses of both families, and what a
// process leaves behind has a parent.
func TestMachine(t *testing.T) {
	if os.Getpid() > 50 {
		t.Errorf("the tests run as process %d: not in a machine of their own", os.Getpid())
	}
	for _, a := range []netip.Addr{Public, netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("2a00:1450::1")} {
		var l net.Listener
		if err := InWorld(func() (err error) {
			l, err = net.Listen("tcp", net.JoinHostPort(a.String(), "0"))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			c, err := l.Accept()
			if err == nil {
				io.WriteString(c, "hello")
				c.Close()
			}
		}()
		c, err := net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
			t.Errorf("%s said %q, %v", a, b, err)
		}
		c.Close()
	}

	out, err := exec.Command("sh", "-c", "sleep 0.1 >/dev/null 2>&1 & echo $!").Output()
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	Eventually(t, 5*time.Second, func() string {
		if _, err := os.Stat("/proc/" + strconv.Itoa(pid)); err == nil {
			return "the orphan has not been reaped"
		}
		return ""
	})
}
