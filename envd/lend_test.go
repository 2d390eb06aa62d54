package envd

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The first long transfers have large buffers, all others small ones, and what
// is given back is there again.
func TestLendBuffer(t *testing.T) {
	for range 2 {
		var got []int
		var backs []func()
		for range 8 {
			buf, back := lendBuffer(true)
			got, backs = append(got, len(buf)>>10), append(backs, back)
		}
		if d := cmp.Diff([]int{1024, 1024, 256, 256, 256, 256, 128, 128}, got); d != "" {
			t.Errorf("KiB of buffers (-want +got):\n%s", d)
		}
		for _, back := range backs {
			back()
		}
	}
	buf, back := lendBuffer(false)
	defer back()
	if len(buf) != copyBuffer {
		t.Errorf("a short transfer has %d bytes", len(buf))
	}
}

// Files around the sizes of the buffers go up and come down as they are, whole
// and in part.
func TestSizesOfTransfers(t *testing.T) {
	g := newFileGuest(t)
	data := make([]byte, 3<<20+17)
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(data) // never fails
	for _, n := range []int{copyBuffer - 1, copyBuffer, copyBuffer + 1, 1 << 20, 1<<20 + copyBuffer, len(data)} {
		want := string(data[:n])
		body, kind := form([2]string{"f", want})
		for name, up := range map[string]func() (int, string){
			"octet-stream": func() (int, string) { return g.put(g.url("path", "f"), bytes.NewReader(data[:n])) },
			"form":         func() (int, string) { return g.put(g.url(), body, "Content-Type", kind) },
		} {
			if code, text := up(); code != 200 {
				t.Fatal(name, n, code, text)
			}
			if code, got, _ := g.get(g.url("path", "f"), "Accept-Encoding", "identity"); code != 200 || got != want {
				t.Errorf("%s: of %d bytes, %d came back as they were: %v", name, n, len(got), got == want)
			}
		}
		for _, span := range [][2]int{{1, n - 2}, {n / 2, n - 1}, {0, 9}} {
			h := fmt.Sprintf("bytes=%d-%d", span[0], span[1])
			if code, got, _ := g.get(g.url("path", "f"), "Range", h); code != 206 || got != want[span[0]:span[1]+1] {
				t.Errorf("%s of %d bytes: %d, %d bytes", h, n, code, len(got))
			}
		}
		if code, got, h := g.get(g.url("path", "f"), "Range", "bytes=0-99,200-299"); code != 206 ||
			!strings.HasPrefix(h.Get("Content-Type"), "multipart/byteranges") || !strings.Contains(got, want[200:300]) {
			t.Errorf("two ranges of %d bytes: %d %s", n, code, h.Get("Content-Type"))
		}
	}
	g.leftovers(g.home)
}
