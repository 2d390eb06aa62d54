// Package blobtest proves that an adapter keeps the contract of package blob,
// and holds a store in memory for the tests of others.
package blobtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob"
)

// Run runs the suite. open is called once per subtest and returns an empty
// store that lives until the subtest ends.
func Run(t *testing.T, open func(t *testing.T) blob.Store) {
	for _, c := range []struct {
		name string
		f    func(t *testing.T, s blob.Store)
	}{
		{"round trip", roundTrip},
		{"replace", replace},
		{"missing", missing},
		{"keys", keys},
		{"list", list},
		{"failed put leaves nothing", failedPut},
		{"failed put leaves the old object", failedReplace},
		{"cancelled put", cancelledPut},
		{"delete", deletes},
		{"reader outlives delete", readerOutlives},
		{"concurrent", concurrent},
		{"local path", localPath},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, open(t)) })
	}
}

func content(n int, seed uint64) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(b)
	return b
}

func mustPut(t *testing.T, s blob.Store, k blob.Key, b []byte) {
	t.Helper()
	o, err := s.Put(t.Context(), k, bytes.NewReader(b))
	if err != nil {
		t.Fatalf("Put(%s): %v", k, err)
	}
	if o.Key != k || o.SizeBytes != int64(len(b)) {
		t.Fatalf("Put(%s) = %+v, want size %d", k, o, len(b))
	}
}

func read(s blob.Store, k blob.Key) ([]byte, error) {
	r, o, err := s.Open(context.Background(), k)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err == nil && int64(len(b)) != o.SizeBytes {
		return nil, fmt.Errorf("object says %d bytes, reader gave %d", o.SizeBytes, len(b))
	}
	return b, err
}

func wantContent(t *testing.T, s blob.Store, k blob.Key, want []byte) {
	t.Helper()
	got, err := read(s, k)
	if err != nil {
		t.Fatalf("reading %s: %v", k, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s holds %d bytes that differ from the %d put", k, len(got), len(want))
	}
}

func wantMissing(t *testing.T, s blob.Store, k blob.Key) {
	t.Helper()
	_, _, err := s.Open(t.Context(), k)
	checkMissing(t, "Open", k, err)
	_, err = s.Stat(t.Context(), k)
	checkMissing(t, "Stat", k, err)
}

func checkMissing(t *testing.T, op string, k blob.Key, err error) {
	t.Helper()
	var e *cay.Error
	if !errors.As(err, &e) || e.Code != cay.CodeObjectMissing {
		t.Fatalf("%s(%s) = %v, want %s", op, k, err, cay.CodeObjectMissing)
	}
	if e.Detail["key"] != string(k) {
		t.Fatalf("%s(%s): Detail[key] = %q", op, k, e.Detail["key"])
	}
}

func roundTrip(t *testing.T, s blob.Store) {
	for i, n := range []int{0, 1, 4095, 4096, 1<<20 + 7, 5 << 20} {
		k := blob.Key(fmt.Sprintf("layers/sha256/%d", i))
		b := content(n, uint64(i))
		mustPut(t, s, k, b)
		wantContent(t, s, k, b)
		o, err := s.Stat(t.Context(), k)
		if err != nil || o.SizeBytes != int64(n) || o.Key != k || o.Modified.IsZero() {
			t.Fatalf("Stat(%s) = %+v, %v", k, o, err)
		}
	}
}

func replace(t *testing.T, s blob.Store) {
	for i := range 5 {
		b := content(1000*(5-i), uint64(i))
		mustPut(t, s, "builds/x/manifest.json", b)
		wantContent(t, s, "builds/x/manifest.json", b)
	}
}

func missing(t *testing.T, s blob.Store) {
	wantMissing(t, s, "no/such/object")
	mustPut(t, s, "a/b", []byte("x"))
	wantMissing(t, s, "a")
	wantMissing(t, s, "a/b/c")
}

func keys(t *testing.T, s blob.Store) {
	for _, k := range []blob.Key{"", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "../x", "a/.", "a b", "a\x00", "ü",
		"a\\b", "a:b", blob.Key(strings.Repeat("a/", 300) + "a")} {
		if _, err := s.Put(t.Context(), k, strings.NewReader("x")); cay.CodeOf(err) != cay.CodeInvalidRequest {
			t.Errorf("Put(%q) = %v, want %s", k, err, cay.CodeInvalidRequest)
		}
		if _, err := s.Stat(t.Context(), k); cay.CodeOf(err) != cay.CodeInvalidRequest {
			t.Errorf("Stat(%q) = %v, want %s", k, err, cay.CodeInvalidRequest)
		}
		if err := s.Delete(t.Context(), k); cay.CodeOf(err) != cay.CodeInvalidRequest {
			t.Errorf("Delete(%q) = %v, want %s", k, err, cay.CodeInvalidRequest)
		}
	}
	for _, k := range []blob.Key{"a", "A-b_c.d/..e/f..", "...", blob.Key(strings.Repeat("k", 200))} {
		mustPut(t, s, k, []byte(k))
		wantContent(t, s, k, []byte(k))
	}
}

func list(t *testing.T, s blob.Store) {
	if got, err := s.List(t.Context(), ""); err != nil || len(got) != 0 {
		t.Fatalf("List of an empty store = %v, %v", got, err)
	}
	for _, k := range []blob.Key{"b/2", "a/1", "b/1", "b.x", "b-c/d", "b/1x/y", "c"} {
		mustPut(t, s, k, []byte(k))
	}
	for _, c := range []struct{ prefix, want string }{
		{"", "a/1 b-c/d b.x b/1 b/1x/y b/2 c"},
		{"b", "b-c/d b.x b/1 b/1x/y b/2"},
		{"b/", "b/1 b/1x/y b/2"},
		{"b/1", "b/1 b/1x/y"},
		{"zz", ""},
		{"zz/yy", ""},
	} {
		objs, err := s.List(t.Context(), c.prefix)
		if err != nil {
			t.Fatalf("List(%q): %v", c.prefix, err)
		}
		var got []string
		for _, o := range objs {
			got = append(got, string(o.Key))
			if o.SizeBytes != int64(len(o.Key)) {
				t.Errorf("List(%q): %s has size %d", c.prefix, o.Key, o.SizeBytes)
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("List(%q) = %q, want %q", c.prefix, got, c.want)
		}
	}
}

var errTorn = errors.New("the source broke off")

// torn gives n bytes and then an error.
func torn(n int) io.Reader {
	return io.MultiReader(bytes.NewReader(content(n, 9)), errReader{})
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errTorn }

func failedPut(t *testing.T, s blob.Store) {
	for _, n := range []int{0, 10, 3 << 20} {
		if _, err := s.Put(t.Context(), "a/b", torn(n)); !errors.Is(err, errTorn) {
			t.Fatalf("Put of a torn source = %v, want the source's error in the chain", err)
		}
		wantMissing(t, s, "a/b")
	}
	if got, err := s.List(t.Context(), ""); err != nil || len(got) != 0 {
		t.Fatalf("List after failed puts = %v, %v", got, err)
	}
}

func failedReplace(t *testing.T, s blob.Store) {
	old := content(70_000, 1)
	mustPut(t, s, "a/b", old)
	if _, err := s.Put(t.Context(), "a/b", torn(1<<20)); err == nil {
		t.Fatal("Put of a torn source succeeded")
	}
	wantContent(t, s, "a/b", old)
}

func cancelledPut(t *testing.T, s blob.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Put(ctx, "a/b", bytes.NewReader(content(1<<20, 1))); !errors.Is(err, context.Canceled) {
		t.Fatalf("Put with an ended context = %v", err)
	}
	wantMissing(t, s, "a/b")
}

func deletes(t *testing.T, s blob.Store) {
	if err := s.Delete(t.Context(), "no/such"); err != nil {
		t.Fatalf("Delete of an absent object: %v", err)
	}
	mustPut(t, s, "a/b/c", []byte("1"))
	mustPut(t, s, "a/b/d", []byte("2"))
	if err := s.Delete(t.Context(), "a/b"); err != nil {
		t.Fatalf("Delete of a prefix: %v", err)
	}
	wantContent(t, s, "a/b/c", []byte("1"))
	for range 2 {
		if err := s.Delete(t.Context(), "a/b/c"); err != nil {
			t.Fatal(err)
		}
	}
	wantMissing(t, s, "a/b/c")
	wantContent(t, s, "a/b/d", []byte("2"))
	if err := s.Delete(t.Context(), "a/b/d"); err != nil {
		t.Fatal(err)
	}
	mustPut(t, s, "a/b", []byte("now an object")) // the prefix is free again
	wantContent(t, s, "a/b", []byte("now an object"))
}

func readerOutlives(t *testing.T, s blob.Store) {
	want := content(3<<20, 4)
	mustPut(t, s, "a", want)
	r, _, err := s.Open(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	head := make([]byte, 100)
	if _, err := io.ReadFull(r, head); err != nil {
		t.Fatal(err)
	}
	mustPut(t, s, "a", []byte("other"))
	if err := s.Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(append(head, rest...), want) {
		t.Fatalf("a reader of a replaced and deleted object gave other bytes (%v)", err)
	}
}

// concurrent has writers, readers and deleters on few keys; a reader must see
// one whole version or none.
func concurrent(t *testing.T, s blob.Store) {
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 25 {
				k := blob.Key(fmt.Sprintf("dir%d/obj", i%3))
				b := content(1000+i*997, uint64(w*100+i))
				sum := sha256.Sum256(b)
				if _, err := s.Put(context.Background(), k, io.MultiReader(bytes.NewReader(sum[:]), bytes.NewReader(b))); err != nil {
					t.Errorf("Put: %v", err)
				}
				if i%5 == 4 {
					if err := s.Delete(context.Background(), k); err != nil {
						t.Errorf("Delete: %v", err)
					}
				}
				if _, err := s.List(context.Background(), "dir"); err != nil {
					t.Errorf("List: %v", err)
				}
				got, err := read(s, k)
				if err != nil {
					if cay.CodeOf(err) != cay.CodeObjectMissing {
						t.Errorf("Open: %v", err)
					}
					continue
				}
				if len(got) < sha256.Size || [sha256.Size]byte(got[:sha256.Size]) != sha256.Sum256(got[sha256.Size:]) {
					t.Errorf("read a mixture of two versions")
				}
			}
		})
	}
	wg.Wait()
}

func localPath(t *testing.T, s blob.Store) {
	l, ok := s.(blob.Local)
	if !ok {
		t.Skip("not a blob.Local")
	}
	want := content(5000, 2)
	mustPut(t, s, "a/b", want)
	p, err := l.Path(t.Context(), "a/b")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(p); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the file at %s differs from the object (%v)", p, err)
	}
	_, err = l.Path(t.Context(), "a/none")
	checkMissing(t, "Path", "a/none", err)
}
