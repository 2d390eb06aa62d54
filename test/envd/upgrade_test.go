package envd

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "github.com/cayhq/cay/internal/gen/envd/process"
	"github.com/cayhq/cay/test/program"
)

// gathered is what a process wrote, over all the streams it took to read it.
type gathered struct {
	mu  sync.Mutex
	got bytes.Buffer
	end *pb.ProcessEvent_EndEvent
}

func (g *gathered) len() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.got.Len()
}

// add takes an event.
func (g *gathered) add(ev *pb.ProcessEvent) {
	g.mu.Lock()
	defer g.mu.Unlock()
	d := ev.GetData()
	g.got.Write(d.GetStdout())
	g.got.Write(d.GetPty())
	if e := ev.GetEnd(); e != nil {
		g.end = e
	}
}

// begin starts a process and reads until its stream ends, which over says.
func (b *box) begin(t *testing.T, g *gathered, req *pb.StartRequest) (number int, over chan error) {
	t.Helper()
	st, n, err := b.start(t.Context(), "", req)
	if err != nil {
		t.Fatal(err)
	}
	over = make(chan error, 1)
	go func() {
		for st.Receive() {
			g.add(st.Msg().GetEvent())
		}
		over <- st.Err()
	}()
	return n, over
}

// again reads on from a process, until the stream ends.
func (b *box) again(t *testing.T, g *gathered, number int) (over chan error) {
	t.Helper()
	st, err := b.proc.Connect(t.Context(), as("", &pb.ConnectRequest{Process: pid(number)}))
	if err != nil {
		t.Fatal(err)
	}
	over = make(chan error, 1)
	go func() {
		defer st.Close()
		for st.Receive() {
			g.add(st.Msg().GetEvent())
		}
		over <- st.Err()
	}()
	return over
}

func await(t *testing.T, over chan error) error {
	t.Helper()
	select {
	case err := <-over:
		return err
	case <-time.After(2 * time.Minute):
		t.Fatal("a stream does not end")
		return nil
	}
}

// envdPID is the number of the daemon.
func (b *box) envdPID(t *testing.T) string { return strings.TrimSpace(b.root(t, "pgrep -x envd")) }

// replaced waits until another envd than before runs, and answers.
func (b *box) replaced(t *testing.T, before string) {
	t.Helper()
	program.Eventually(t, time.Minute, func() string {
		r, err := b.Exec(t.Context(), "root", "pgrep -x envd")
		if err != nil {
			return err.Error()
		}
		if now := strings.TrimSpace(r.Stdout); now == "" || now == before {
			return "the envd before still runs"
		}
		return ""
	})
}

// Another program takes envd's place under a counter, a terminal and a stream,
// and none of them loses or repeats a byte; then envd is killed, and they go on.
func TestReplaced(t *testing.T) {
	const size = 10_000_000
	b := newBox(t, program.Start(t, program.Options{}), time.Hour)
	counter, terminal, bulk := &gathered{}, &gathered{}, &gathered{}
	counterPID, counterOver := b.begin(t, counter, shell("for i in $(seq 2000); do echo $i; sleep 0.01; done; exit 4"))
	terminalPID, terminalOver := b.begin(t, terminal, &pb.StartRequest{
		Process: &pb.ProcessConfig{Cmd: "/bin/bash", Args: []string{"--norc", "-i"}}, Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 80, Rows: 24}}})
	// In portions, so that it is under way whatever this machine's speed is.
	bulkPID, bulkOver := b.begin(t, bulk, shell(noiseCommand(size)+" | while head -c 500000 >/tmp/piece; [ -s /tmp/piece ]; do cat /tmp/piece; sleep 0.2; done"))
	program.Eventually(t, time.Minute, func() string {
		if counter.len() == 0 || bulk.len() < size/10 {
			return "there is little output yet"
		}
		return ""
	})

	before := b.envdPID(t)
	sum := b.root(t, "cp -p /usr/bin/envd /usr/bin/envd.new && echo >>/usr/bin/envd.new && mv /usr/bin/envd.new /usr/bin/envd && sha256sum </usr/bin/envd")
	b.root(t, "setsid -f sh -c 'sleep 0.3; kill -TERM "+before+"'")
	for name, over := range map[string]chan error{"counter": counterOver, "terminal": terminalOver, "bulk": bulkOver} {
		if err := await(t, over); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("the stream of %s ended with %v", name, err)
		}
	}
	if n := bulk.len(); n >= size {
		t.Errorf("all of %d bytes came before envd was replaced", n)
	}
	counterOver, terminalOver, bulkOver = b.again(t, counter, counterPID), b.again(t, terminal, terminalPID), b.again(t, bulk, bulkPID)
	b.replaced(t, before)
	if now := b.root(t, "sha256sum </proc/$(pgrep -x envd)/exe"); now != sum {
		t.Errorf("the program that runs has the sum %s, want %s", now, sum)
	}
	if err := await(t, bulkOver); err != nil || bulk.end.GetExitCode() != 0 {
		t.Errorf("the stream ended with %v, %v", bulk.end, err)
	}
	want := make([]byte, size)
	_, _ = io.ReadFull(newNoise(size), want) // it has that much
	if !bytes.Equal(bulk.got.Bytes(), want) {
		t.Errorf("%d bytes came, or others than the %d that were written", bulk.got.Len(), size)
	}

	// A crash takes what envd held in its hands, and nothing else.
	before = b.envdPID(t)
	b.root(t, "setsid -f sh -c 'sleep 0.3; kill -9 "+before+"'")
	_ = await(t, counterOver) // cut, in whatever words
	_ = await(t, terminalOver)
	b.replaced(t, before)
	atCrash := counter.len()
	counterOver, terminalOver = b.again(t, counter, counterPID), b.again(t, terminal, terminalPID)
	if _, err := b.proc.SendInput(t.Context(), as("", &pb.SendInputRequest{Process: pid(terminalPID),
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("echo $((6*7))x; exit 3\n")}}})); err != nil {
		t.Error(err)
	}
	if err := await(t, terminalOver); err != nil || terminal.end.GetExitCode() != 3 || !strings.Contains(terminal.got.String(), "42x") {
		t.Errorf("the terminal ended with %v, %v, and showed %q", terminal.end, err, terminal.got.String())
	}
	if err := await(t, counterOver); err != nil || counter.end.GetExitCode() != 4 {
		t.Errorf("the counter ended with %v, %v", counter.end, err)
	}
	var count strings.Builder
	for i := 1; i <= 2000; i++ {
		fmt.Fprintln(&count, i)
	}
	text := counter.got.String()
	if !strings.HasPrefix(count.String(), text[:atCrash]) {
		t.Errorf("up to the crash the counter's output is not what it wrote: %q", text[:atCrash])
	}
	if !strings.HasSuffix(count.String(), text[atCrash:]) {
		t.Errorf("after the crash the counter's output is not what it wrote: %q", text[atCrash:])
	}
}
