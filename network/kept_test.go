package network

import (
	"bytes"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cayhq/cay"
)

// refusalTo makes a refusal of a minute.
func refusalTo(minute, host int) cay.EgressRefusal {
	return cay.EgressRefusal{First: time.Date(2026, 3, 1, 12, minute, 0, 0, time.UTC), Protocol: "tcp", Rule: "0.0.0.0/0", Reason: "denied",
		Destination: netip.AddrPortFrom(netip.AddrFrom4([4]byte{8, 8, byte(host >> 8), byte(host)}), 443)}
}

var sameRefusals = cmpopts.EquateComparable(netip.AddrPort{})

// reloaded is the log of the next process.
func reloaded(t *testing.T, l *refusalLog) *refusalLog {
	t.Helper()
	next := &refusalLog{path: l.path}
	if err := next.load(); err != nil {
		t.Fatal(err)
	}
	return next
}

// TestKeptRefusals proves that a log which is taken in again is the same: in
// its order, with its numbers and counts, and goes on from there.
func TestKeptRefusals(t *testing.T) {
	l := &refusalLog{path: filepath.Join(t.TempDir(), "1.jsonl")}
	query := cay.EgressRefusal{First: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), Protocol: "dns", Name: "a\xff.example", Rule: "names"}
	for i, r := range []cay.EgressRefusal{refusalTo(1, 1), refusalTo(2, 2), query, refusalTo(3, 1), refusalTo(4, 3)} {
		l.add(r)
		if i%2 == 1 {
			if err := l.save(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := l.save(); err != nil {
		t.Fatal(err)
	}
	next := reloaded(t, l)
	want := l.after(0)
	if got := next.after(0); len(got) != 4 || got[1].Name != "a\uFFFD.example" {
		t.Fatalf("taken in: %+v", got)
	} else {
		got[1].Name = query.Name // JSON is UTF-8
		if d := cmp.Diff(want, got, sameRefusals); d != "" {
			t.Error(d)
		}
	}
	next.add(refusalTo(9, 2))
	if got := next.after(5); len(got) != 1 || got[0].Seq != 6 || got[0].Count != 2 || !got[0].First.Equal(refusalTo(2, 2).First) {
		t.Errorf("it goes on with %+v", got)
	}
	if err := next.save(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(next.after(0), reloaded(t, next).after(0), sameRefusals); d != "" {
		t.Error(d)
	}
}

// TestKeptHalfLine kills a process in the middle of what it writes: the next
// one has all that was whole, and writes a file that is whole.
func TestKeptHalfLine(t *testing.T) {
	l := &refusalLog{path: filepath.Join(t.TempDir(), "1.jsonl")}
	for i := range 3 {
		l.add(refusalTo(i, i))
	}
	if err := l.save(); err != nil {
		t.Fatal(err)
	}
	all, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; n < len(all); n += 7 {
		if err := os.WriteFile(l.path, all[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		next := reloaded(t, l)
		whole := bytes.Count(all[:n], []byte("\n"))
		if got := next.after(0); len(got) != whole {
			t.Fatalf("of %d bytes it has %d refusals, want %d", n, len(got), whole)
		}
		next.add(refusalTo(9, 9))
		if err := next.save(); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(next.after(0), reloaded(t, next).after(0), sameRefusals); d != "" {
			t.Fatalf("after %d bytes: %s", n, d)
		}
	}
}

// TestKeptIsBounded proves that neither a guest that tries one address for ever
// nor one that tries all makes the file grow.
func TestKeptIsBounded(t *testing.T) {
	l := &refusalLog{path: filepath.Join(t.TempDir(), "1.jsonl")}
	most := int64(0)
	for i := range 20 * maxRefusals {
		l.add(refusalTo(0, i*(i%2)))
		if i%97 == 0 {
			if err := l.save(); err != nil {
				t.Fatal(err)
			}
			fi, err := os.Stat(l.path)
			if err != nil {
				t.Fatal(err)
			}
			most = max(most, fi.Size())
		}
	}
	if err := l.save(); err != nil {
		t.Fatal(err)
	}
	if most > 2<<20 {
		t.Errorf("the file grew to %d bytes", most)
	}
	if d := cmp.Diff(l.after(0), reloaded(t, l).after(0), sameRefusals); d != "" {
		t.Error(d)
	}
	if err := l.end(); err != nil {
		t.Fatal(err)
	}
	l.add(refusalTo(0, 7))
	if err := l.save(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(l.path); err == nil {
		t.Error("a log that has ended is written")
	}
}

// TestRefusalsSurvive proves that what was refused is known to the next
// process, under the same numbers, that a slot's next life begins without, and
// that no file is left.
func TestRefusalsSurvive(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "refused")
	p := testPool(t, "kept", func(p *Pool) { p.RefusalDir, p.Size = dir, 1 })
	s := acquire(t, p, false)
	knock := func(port uint16) {
		in(t, s.NetNS, func() error { shoutUDP(netip.AddrPortFrom(publicAddr, port)); return nil })
	}
	knock(1000)
	before := refusals(t, p, s, func(all []cay.EgressRefusal) bool { return len(all) == 1 })
	p.NoteRefusal(s.Index, cay.EgressRefusal{First: before[0].First, Protocol: "dns", Name: "x.example", Rule: "names", Reason: "no"})
	before = refusals(t, p, s, func(all []cay.EgressRefusal) bool { return len(all) == 2 })
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	for _, stray := range []string{"7.jsonl", "x"} {
		if err := os.WriteFile(filepath.Join(dir, stray), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Adopt(t.Context(), s.Index); err != nil {
		t.Fatal(err)
	}
	after, err := p.Refusals(t.Context(), s.Index, 0)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, after, sameRefusals); d != "" {
		t.Error(d)
	}
	knock(1001)
	refusals(t, p, s, func(all []cay.EgressRefusal) bool { return len(all) == 3 && all[2].Seq == before[1].Seq+1 })
	if got := fileNames(t, dir); len(got) != 1 {
		t.Errorf("there are %v", got)
	}
	if err := p.Release(t.Context(), s.Index); err != nil {
		t.Fatal(err)
	}
	if got := fileNames(t, dir); len(got) != 0 {
		t.Errorf("after the slot was given back there are %v", got)
	}
	s = acquire(t, p, false)
	if all, err := p.Refusals(t.Context(), s.Index, 0); err != nil || len(all) != 0 {
		t.Errorf("a new slot begins with %+v, %v", all, err)
	}
}

func fileNames(t *testing.T, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}
