package gvisor

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
)

// clock is a clock that stands still.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

// bareConsole is a console without its pipe.
func bareConsole(t *testing.T) (*console, *clock) {
	t.Helper()
	ck := &clock{time.Unix(1_000_000, 0).UTC()}
	log := filepath.Join(t.TempDir(), "log")
	cur, err := os.Create(log + ".0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cur.Close() })
	return &console{log: log, now: ck.now, cur: cur, tokens: consoleBurst, filled: ck.t}, ck
}

func (c *console) texts(t *testing.T) []string {
	t.Helper()
	lines, _, err := c.lines()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range lines {
		out = append(out, l.Text)
	}
	return out
}

func TestConsoleLines(t *testing.T) {
	long := strings.Repeat("y", consoleLine)
	for name, tc := range map[string]struct {
		writes []string
		want   []string
	}{
		"whole":     {[]string{"a\nb\n"}, []string{"a", "b"}},
		"in parts":  {[]string{"hel", "lo\nwo", "rld\n"}, []string{"hello", "world"}},
		"unended":   {[]string{"$ "}, []string{"$ "}},
		"empty":     {[]string{"\n\na\n\n"}, []string{"a"}},
		"returns":   {[]string{"a\r\nb\r\n"}, []string{"a", "b"}},
		"long":      {[]string{long + "rest\n"}, []string{long, "rest"}},
		"not UTF-8": {[]string{"\xff\xfea\n"}, []string{"\uFFFDa"}},
		"NUL":       {[]string{"a\x00b\n"}, []string{"a\x00b"}},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := bareConsole(t)
			for _, w := range tc.writes {
				c.take([]byte(w))
			}
			if d := cmp.Diff(tc.want, c.texts(t)); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			if d := cmp.Diff(tc.want, c.texts(t)); d != "" {
				t.Errorf("reading changed the console, -want +got:\n%s", d)
			}
		})
	}
}

func TestConsoleGoesOnAfterReading(t *testing.T) {
	c, _ := bareConsole(t)
	c.take([]byte("hel"))
	if d := cmp.Diff([]string{"hel"}, c.texts(t)); d != "" {
		t.Error(d)
	}
	c.take([]byte("lo\n"))
	if d := cmp.Diff([]string{"hello"}, c.texts(t)); d != "" {
		t.Error(d)
	}
}

// TestConsoleRate drops what comes too fast, says so, and recovers.
func TestConsoleRate(t *testing.T) {
	c, ck := bareConsole(t)
	chunk := bytes.Repeat([]byte("0123456789abcde\n"), 4096) // 64 KiB
	dropped := 0
	for range 64 {
		if c.take(chunk) {
			dropped++
		}
	}
	if want := 64 - consoleBurst/len(chunk); dropped != want {
		t.Errorf("%d of 64 chunks dropped; want %d", dropped, want)
	}
	ck.t = ck.t.Add(time.Second)
	c.take([]byte("back\n"))
	texts := c.texts(t)
	want := []string{fmt.Sprintf("[cay: %d bytes of console output dropped]", dropped*len(chunk)), "back"}
	if d := cmp.Diff(want, texts[len(texts)-2:]); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if _, n, _ := c.lines(); n != int64(dropped*len(chunk)) {
		t.Errorf("the counter says %d", n)
	}
}

// TestConsoleIsBounded writes for long and looks at the disk.
func TestConsoleIsBounded(t *testing.T) {
	c, ck := bareConsole(t)
	n := 0
	for range 200 {
		ck.t = ck.t.Add(time.Second)
		for range 1000 {
			c.take(fmt.Appendf(nil, "line %d\n", n))
			n++
		}
	}
	var size int64
	for _, f := range []string{".0", ".1"} {
		fi, err := os.Stat(c.log + f)
		if err != nil {
			t.Fatal(err)
		}
		size += fi.Size()
	}
	if size > consoleMax || size < consoleHalf {
		t.Errorf("the log has %d bytes; want %d to %d", size, consoleHalf, consoleMax)
	}
	texts := c.texts(t)
	if got := texts[len(texts)-1]; got != fmt.Sprint("line ", n-1) {
		t.Errorf("the last line is %q", got)
	}
	for i := range texts[1:] {
		var a, b int
		fmt.Sscanf(texts[i], "line %d", &a)
		fmt.Sscanf(texts[i+1], "line %d", &b)
		if b != a+1 {
			t.Fatalf("a gap between %q and %q", texts[i], texts[i+1])
		}
	}
}

// TestParseConsoleTakesAnything and the next are random rather than fuzz
// targets: gVisor's ring-0 code does not link when instrumented.
func TestParseConsoleTakesAnything(t *testing.T) {
	rnd := seeded(t)
	for range 2000 {
		data := randomBytes(rnd, 200, "0123456789 \n-x\xff")
		for _, l := range parseConsole(data) {
			if strings.Contains(l.Text, "\n") {
				t.Fatalf("of %q a line holds a line end: %q", data, l.Text)
			}
		}
	}
}

// TestConsoleKeepsWhatIsWritten writes random text in random pieces; what is
// read back is what was written, without empty lines.
func TestConsoleKeepsWhatIsWritten(t *testing.T) {
	rnd := seeded(t)
	for range 200 {
		data := randomBytes(rnd, 3*consoleLine, "abc defg\nh")
		c, _ := bareConsole(t)
		for rest := data; len(rest) > 0; {
			n := min(1+rnd.IntN(2000), len(rest))
			c.take(rest[:n])
			rest = rest[n:]
		}
		var want []string
		for line := range strings.SplitSeq(string(data), "\n") {
			for ; len(line) > consoleLine; line = line[consoleLine:] {
				want = append(want, line[:consoleLine])
			}
			if line != "" {
				want = append(want, line)
			}
		}
		if d := cmp.Diff(want, c.texts(t)); d != "" {
			t.Fatalf("-want +got:\n%s", d)
		}
	}
}

func seeded(t *testing.T) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func randomBytes(rnd *rand.Rand, most int, alphabet string) []byte {
	out := make([]byte, rnd.IntN(most))
	for i := range out {
		out[i] = alphabet[rnd.IntN(len(alphabet))]
	}
	return out
}

func TestParseFields(t *testing.T) {
	got := parseFields("oom_kill_disable 0\nunder_oom 0\noom_kill 3\nbad\nx y\nbig 99999999999999999999\n")
	if d := cmp.Diff(map[string]int64{"oom_kill_disable": 0, "under_oom": 0, "oom_kill": 3}, got); d != "" {
		t.Error(d)
	}
}

func TestHostPIDs(t *testing.T) {
	for _, tc := range []struct {
		guest   int
		machine int64
		want    int64
	}{{64, 32768, 448}, {1024, 32768, 3328}, {100000, 32768, 8192}, {1024, 4194304, 3328}} {
		if got := hostPIDs(tc.guest, tc.machine); got != tc.want {
			t.Errorf("hostPIDs(%d, %d) = %d; want %d", tc.guest, tc.machine, got, tc.want)
		}
	}
}

func TestProcess(t *testing.T) {
	self, err := openProcess(processID{PID: os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	defer self.close()
	if !self.alive() || self.Start == 0 {
		t.Errorf("this process: alive %v, start %d", self.alive(), self.Start)
	}
	again, err := openProcess(self.processID)
	if err != nil {
		t.Errorf("the same process again: %v", err)
	}
	again.close()
	if _, err := openProcess(processID{PID: os.Getpid(), Start: self.Start + 1}); err == nil {
		t.Error("a process of another start time was accepted: a reused PID")
	}
	if _, err := openProcess(processID{}); err == nil {
		t.Error("PID 0 was accepted")
	}
}

func TestRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "instance.json")
	want := record{Format: recordFormat, ID: "x1", Engine: "v", Boot: "b", State: "running", CreatedAt: time.Unix(5, 0).UTC(),
		Labels: map[string]string{"a": "b"}, Sentry: processID{1, 2}, Gofer: processID{3, 4}}
	if err := want.save(path); err != nil {
		t.Fatal(err)
	}
	got, err := loadRecord(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for _, bad := range []string{"", "{", "[]", `{"format":99}`} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := loadRecord(path); err == nil {
			t.Errorf("the record %q was accepted", bad)
		}
	}
}

func TestWireErrorKeepsItsParts(t *testing.T) {
	want := &cay.Error{Code: cay.CodeDiskFull, Layer: cay.LayerStorage, Message: "m", Fix: "f", Detail: map[string]string{"k": "v"}, Err: os.ErrExist}
	var got *cay.Error
	if got, _ = toWire(fmt.Errorf("creating: %w", want)).err().(*cay.Error); got == nil {
		t.Fatal("no *cay.Error")
	}
	if got.Err == nil || got.Err.Error() != os.ErrExist.Error() {
		t.Errorf("cause %v", got.Err)
	}
	got.Err, want.Err = nil, nil
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
