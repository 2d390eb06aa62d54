package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay/envd"
)

func TestCommandLine(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, c := range []struct {
		args     []string
		status   int
		out, err string
	}{
		{[]string{"-version"}, 0, envd.Version + "\n", ""},
		{[]string{"-help"}, 0, "", "Example, on a machine of your own:"},
		{[]string{"-nonsense"}, 2, "", "see envd -help"},
		{[]string{"file"}, 2, "", `unexpected argument "file"`},
		{[]string{"-token-fd=999"}, 1, "", "reading the control token from descriptor 999"},
		{[]string{"-public", taken.Addr().String()}, 1, "", "opening the public port: "},
		{[]string{"-public", "127.0.0.1:0", "-control", taken.Addr().String()}, 1, "", "opening the control port: "},
	} {
		var out, errw bytes.Buffer
		status := run(t.Context(), c.args, &out, &errw)
		if status != c.status || out.String() != c.out || !strings.Contains(errw.String(), c.err) {
			t.Errorf("envd %v: status %d, %q, %q", c.args, status, out.String(), errw.String())
		}
	}
}

func TestReadToken(t *testing.T) {
	pass := func(text string) int {
		rd, wr, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(wr, text)
		wr.Close()
		fd, err := syscall.Dup(int(rd.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		rd.Close()
		return fd
	}
	fd := pass("secret\n")
	if got, err := readToken(fd); got != "secret" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := syscall.Dup(fd); err == nil {
		t.Error("the descriptor stays open: children would inherit it")
	}
	if _, err := readToken(pass("\n")); err == nil {
		t.Error("an empty token is taken")
	}
	if got, err := readToken(-1); got != "" || err != nil {
		t.Errorf("got %q, %v without a descriptor", got, err)
	}
}

// TestServe starts the daemon as a person would, asks both ports, and stops it.
func TestServe(t *testing.T) {
	public, control := freeAddr(t), freeAddr(t)
	ctx, cancel := context.WithCancel(t.Context())
	var errw bytes.Buffer
	status := make(chan int, 1)
	go func() {
		status <- run(ctx, []string{"-public", public, "-control", control, "-build", "b1"}, io.Discard, &errw)
	}()
	get := func(url string) int {
		end := time.Now().Add(10 * time.Second)
		for tick := time.NewTicker(5 * time.Millisecond); ; <-tick.C {
			resp, err := http.Get(url)
			if err == nil {
				resp.Body.Close()
				return resp.StatusCode
			}
			if time.Now().After(end) {
				t.Fatal(err)
			}
		}
	}
	for url, want := range map[string]int{
		"http://" + public + "/health":    http.StatusNoContent,
		"http://" + public + "/init":      http.StatusNotFound,
		"http://" + control + "/identity": http.StatusUnauthorized, // nobody has the token
	} {
		if got := get(url); got != want {
			t.Errorf("%s: %d, want %d", url, got, want)
		}
	}
	cancel()
	if got := <-status; got != 0 {
		t.Errorf("status %d: %s", got, errw.String())
	}
}

// TestListenTakesOver: a listener of another process is served, and stays open
// when the daemon ends.
func TestListenTakesOver(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	early, err := net.Dial("tcp", l.Addr().String()) // nobody serves yet
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	ctx, cancel := context.WithCancel(t.Context())
	status := make(chan int, 1)
	go func() {
		status <- run(ctx, []string{"-public-fd", fmt.Sprint(fd), "-control", "127.0.0.1:0"}, io.Discard, io.Discard)
	}()
	io.WriteString(early, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(early), nil)
	if err != nil || resp.StatusCode != http.StatusNoContent {
		t.Errorf("%v, %v", resp, err)
	}
	cancel()
	if got := <-status; got != 0 {
		t.Errorf("status %d", got)
	}
	late, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatalf("the port closed with the daemon: %v", err)
	}
	late.Close()
	if _, err := listen(t.Context(), 999, ""); err == nil {
		t.Error("a descriptor that is not open is a listener")
	}
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return fmt.Sprint(l.Addr())
}
