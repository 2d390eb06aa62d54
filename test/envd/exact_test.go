package envd

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	fs "github.com/cayhq/cay/internal/gen/envd/filesystem"
	"github.com/cayhq/cay/test/program"
)

// maxEnvd is the most memory that envd may take whatever goes through it, in
// MiB, with the pages of its program.
const maxEnvd = 32

// noise is what `openssl enc -aes-128-ctr` makes of zeros with a key of zeros:
// bytes that both sides can make fast, and that no compression helps.
func noise() cipher.Stream {
	block, err := aes.NewCipher(make([]byte, 16))
	if err != nil {
		panic(err) // the key has a length that AES knows
	}
	return cipher.NewCTR(block, make([]byte, 16))
}

// noiseReader reads n bytes of noise and sums them.
type noiseReader struct {
	s    cipher.Stream
	left int64
	sum  hash.Hash
}

func newNoise(n int64) *noiseReader { return &noiseReader{noise(), n, sha256.New()} }

func (r *noiseReader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), r.left)]
	clear(p)
	r.s.XORKeyStream(p, p)
	r.sum.Write(p)
	r.left -= int64(len(p))
	return len(p), nil
}

// noiseCommand prints n bytes of it.
func noiseCommand(n int64) string {
	return fmt.Sprintf("head -c %d /dev/zero | openssl enc -aes-128-ctr -K %032d -iv %032d -nosalt", n, 0, 0)
}

// Everything a process writes reaches a reader that is slow, in order and once;
// while the reader pauses the process waits, and envd hoards nothing.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	size := int64(program.Sized(300<<20, 10_000_000_000))
	b := newBox(t, program.Start(t, program.Options{}), time.Hour)
	st, _, err := b.start(t.Context(), "", shell(noiseCommand(size)))
	if err != nil {
		t.Fatal(err)
	}
	want, got, n := noise(), sha256.New(), int64(0)
	sum := sha256.New()
	pauses, most := 0, 0.0
	end, err := ended(st, func(p []byte) {
		got.Write(p)
		clear(p)
		want.XORKeyStream(p, p)
		sum.Write(p)
		before := n
		n += int64(len(p))
		if pauses < 3 && before/(20<<20) != n/(20<<20) { // every 20 MiB
			pauses++
			written := func() string {
				return b.root(t, `awk '/^wchar/ {print $2}' /proc/$(pgrep -x openssl)/io`)
			}
			was := ""
			program.Eventually(t, 20*time.Second, func() string {
				now := written()
				if now != was {
					was = now
					return "the process goes on writing, though nobody reads"
				}
				return ""
			})
			if ahead, err := strconv.ParseInt(strings.TrimSpace(was), 10, 64); err != nil || ahead-n > 64<<20 {
				t.Errorf("the process is %d bytes ahead of its reader, %v", ahead-n, err)
			}
			// Nothing of what the reader has not taken is kept, or it would be
			// tens of MiB more with every pause.
			m := b.envdMemory(t)
			most = max(most, m)
			if m > maxEnvd {
				t.Errorf("while its reader pauses, envd has %.1f MiB", m)
			}
		}
	})
	if err != nil || end.GetExitCode() != 0 {
		t.Fatalf("after %d bytes: %v, %v", n, end, err)
	}
	if n != size || !bytes.Equal(got.Sum(nil), sum.Sum(nil)) {
		t.Errorf("%d of %d bytes came, with the sum %x, want %x", n, size, got.Sum(nil), sum.Sum(nil))
	}
	if pauses == 0 {
		t.Error("the reader was never slow")
	}
	t.Logf("while its reader paused, envd had %.1f MiB at most", most)
}

// watchMemory asks for envd's memory until stop is called, which returns the
// most.
func watchMemory(t *testing.T, b *box) (stop func() float64) {
	ctx, cancel := context.WithCancel(t.Context())
	most, done := 0.0, make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			r, err := b.Exec(ctx, "root", `awk '/^VmRSS/ {print $2}' /proc/$(pgrep -x envd)/status`)
			if err != nil {
				return // the end of the test
			}
			kb, _ := strconv.Atoi(strings.TrimSpace(r.Stdout))
			most = max(most, float64(kb)/1024)
			select {
			case <-ctx.Done():
			case <-time.After(300 * time.Millisecond):
			}
		}
	}()
	return func() float64 { cancel(); <-done; return most }
}

// A large file goes up and comes down as it was, and envd needs no more memory
// for it.
func TestLargeFile(t *testing.T) {
	t.Parallel()
	size := int64(program.Sized(256<<20, 4<<30))
	b := newBox(t, program.Start(t, program.Options{DiskMB: program.Sized(2560, 6144)}), time.Hour)
	stop := watchMemory(t, b)
	up := newNoise(size)
	resp, err := b.Request(t.Context(), http.MethodPost, program.EnvdPort, "/files?path=/home/user/large", "application/octet-stream", up)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	want := hex.EncodeToString(up.sum.Sum(nil))
	if got := strings.Fields(b.Out(t, "sha256sum /home/user/large"))[0]; got != want {
		t.Errorf("what went up has the sum %s, want %s", got, want)
	}
	resp, err = b.Request(t.Context(), http.MethodGet, program.EnvdPort, "/files?path="+url.QueryEscape("/home/user/large"), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	h := sha256.New()
	if n, err := io.Copy(h, resp.Body); err != nil || n != size || hex.EncodeToString(h.Sum(nil)) != want {
		t.Errorf("%d of %d bytes came down, with the sum %x, want %s: %v", n, size, h.Sum(nil), want, err)
	}
	if m := stop(); m == 0 || m > maxEnvd {
		t.Errorf("meanwhile envd had %.1f MiB, want at most %d", m, maxEnvd)
	} else {
		t.Logf("envd had %.1f MiB at most", m)
	}
}

// Each of 10,000 files, in directories that are made meanwhile, is reported
// once: to a stream and to a poll.
func TestWatchCountsAll(t *testing.T) {
	t.Parallel()
	const files, each = 10_000, 50
	b := newBox(t, program.Start(t, program.Options{}), 10*time.Minute)
	b.Out(t, "mkdir /tmp/count")
	stream, err := b.files.WatchDir(t.Context(), as("", &fs.WatchDirRequest{Path: "/tmp/count", Recursive: true}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if !stream.Receive() || stream.Msg().GetStart() == nil {
		t.Fatalf("the stream begins with %v, %v", stream.Msg(), stream.Err())
	}
	poll, err := b.files.CreateWatcher(t.Context(), as("", &fs.CreateWatcherRequest{Path: "/tmp/count", Recursive: true}))
	if err != nil {
		t.Fatal(err)
	}

	p, err := b.Start(t.Context(), "", fmt.Sprintf(`python3 - <<'X'
import os
for d in range(%d):
    os.makedirs(f"/tmp/count/{d %% 10}/{d}")
    for f in range(%d):
        open(f"/tmp/count/{d %% 10}/{d}/{f}", "w").close()
X
touch /tmp/count/end`, files/each, each))
	if err != nil {
		t.Fatal(err)
	}
	type counts map[string]int
	seen := func(c counts, e *fs.FilesystemEvent) (last bool) {
		if e.GetType() == fs.EventType_EVENT_TYPE_CREATE {
			c[e.GetName()]++
		}
		return e.GetName() == "end"
	}
	streamed, polled := counts{}, counts{}
	for stream.Receive() {
		if e := stream.Msg().GetFilesystem(); e != nil && seen(streamed, e) {
			break
		}
	}
	if err := stream.Err(); err != nil {
		t.Fatal(err)
	}
	for over := false; !over; {
		r, err := b.files.GetWatcherEvents(t.Context(), as("", &fs.GetWatcherEventsRequest{WatcherId: poll.Msg.GetWatcherId()}))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range r.Msg.GetEvents() {
			over = seen(polled, e) || over
		}
	}
	if _, err := p.Wait(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]counts{"stream": streamed, "poll": polled} {
		var twice, missing []string
		for d := range files / each {
			for f := range each {
				switch name := fmt.Sprintf("%d/%d/%d", d%10, d, f); c[name] {
				case 0:
					missing = append(missing, name)
				case 1:
				default:
					twice = append(twice, name)
				}
			}
		}
		if len(missing)+len(twice) > 0 {
			slices.Sort(missing)
			t.Errorf("%s: of %d files %d are missing (%v) and %d came twice (%v)", name, files,
				len(missing), missing[:min(len(missing), 5)], len(twice), twice[:min(len(twice), 5)])
		}
	}
}
