package orchestrator_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/orchestrator"
)

// damaged is a way to damage the content of a file. It returns what the file
// holds then, and what was done.
func damaged(b []byte, luck *rand.Rand) ([]byte, string) {
	out := bytes.Clone(b)
	switch at := luck.IntN(len(b)); luck.IntN(8) {
	case 0:
		return out[:at], fmt.Sprintf("cut off at byte %d", at)
	case 1:
		return append(out, byte(luck.IntN(256))), "a byte longer"
	case 2:
		end := min(len(b), at+512)
		clear(out[at:end])
		if !bytes.Equal(out, b) {
			return out, fmt.Sprintf("emptied from byte %d to %d", at, end)
		}
		fallthrough
	default:
		bit := luck.IntN(8)
		out[at] ^= 1 << bit
		return out, fmt.Sprintf("bit %d of byte %d flipped", bit, at)
	}
}

// Flipped bits and lost ends, anywhere in a snapshot: each is seen before the
// snapshot is used, and the answer names the part. On the disk it is seen twice:
// by the stamp, which every write changes, and by the content, when a bit turns
// in a file that nobody has written to.
func TestEveryDamageIsSeen(t *testing.T) {
	rounds := 200
	if os.Getenv("CAY_NIGHTLY") == "1" {
		rounds = 1000
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	synctest.Test(t, func(t *testing.T) {
		luck := rand.New(rand.NewPCG(seed, 1))
		w := newWorld()
		w.bulk = make([]byte, 70_000)
		for i := range w.bulk {
			w.bulk[i] = byte(luck.IntN(256))
		}
		o, dir := open(t, w, 0)
		defer o.Close()
		mustCreate(t, o, "i1")
		snap := cay.NewSnapshotID()
		if _, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: snap, Memory: true, Pause: true}); err != nil {
			t.Fatal(err)
		}
		home := filepath.Join(o.SnapshotDir, string(snap))
		parts := []struct{ name, path string }{
			{"manifest.json", filepath.Join(home, "manifest.json")}, {"secrets.json", filepath.Join(home, "secrets.json")},
			{"pages", filepath.Join(home, "memory", "pages")}, {"bulk", filepath.Join(home, "memory", "bulk")},
			{string(snap) + ".img", disks{w}.saved(string(snap))},
		}
		const theDisk = 4
		seen := func(what, part string) {
			t.Helper()
			_, err := o.Create(t.Context(), from("i1", snap, cay.StartAuto))
			var e *cay.Error
			if !errors.As(err, &e) || e.Code != cay.CodeSnapshotCorrupt || e.Detail["part"] != part {
				t.Fatalf("%s, %s: a start: %v", part, what, err)
			}
			if err := o.VerifySnapshot(t.Context(), snap); !errors.As(err, &e) || e.Code != cay.CodeSnapshotCorrupt || e.Detail["part"] != part {
				t.Fatalf("%s, %s: VerifySnapshot: %v", part, what, err)
			}
		}
		write := func(path string, b []byte) {
			t.Helper()
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for range rounds {
			n := luck.IntN(len(parts))
			part := parts[n]
			whole, err := os.ReadFile(part.path)
			if err != nil {
				t.Fatal(err)
			}
			bad, what := damaged(whole, luck)
			write(part.path, bad)
			if n == theDisk && len(bad) == len(whole) && luck.IntN(2) == 0 { // else the size tells
				if err := o.Restamp(snap); err != nil {
					t.Fatal(err)
				}
				what += ", with its stamp as it was"
			}
			seen(what, part.name)
			write(part.path, whole)
			if n == theDisk {
				if err := o.Restamp(snap); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, part := range parts {
			if err := os.Rename(part.path, part.path+".away"); err != nil {
				t.Fatal(err)
			}
			if part.name == "pages" || part.name == "bulk" {
				// A memory that is not there is known to be lost: with policy auto
				// it starts cold, and says so.
				if err := o.VerifySnapshot(t.Context(), snap); cay.CodeOf(err) != cay.CodeSnapshotCorrupt || !strings.Contains(err.Error(), part.name) {
					t.Errorf("without %s: %v", part.name, err)
				}
			} else {
				seen("gone", part.name)
			}
			if err := os.Rename(part.path+".away", part.path); err != nil {
				t.Fatal(err)
			}
		}
		if err := o.Restamp(snap); err != nil { // a rename changes a stamp
			t.Fatal(err)
		}
		// As it was, it is whole.
		if err := o.VerifySnapshot(t.Context(), snap); err != nil {
			t.Fatal(err)
		}
		if s, err := o.Create(t.Context(), from("i1", snap, cay.StartRestore)); err != nil || !s.Restored {
			t.Fatalf("%+v, %v", s, err)
		}
		if err := o.Kill(t.Context(), "i1", cay.EndRequest); err != nil {
			t.Fatal(err)
		}
		wantClean(t, w, dir)
	})
}

// A disk that holds much has no checksum at its save. It gets one later, which
// counts from then on.
func TestLargeDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.bulk = bytes.Repeat([]byte("much"), 9<<20)
		o, _ := open(t, w, 0)
		defer o.Close()
		mustCreate(t, o, "i1")
		snap := cay.NewSnapshotID()
		m, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: snap})
		if err != nil || m.Disk.Check != "" {
			t.Fatalf("%+v, %v", m.Disk, err)
		}
		verify := func(want cay.Code, part string) {
			t.Helper()
			if err := o.VerifySnapshot(t.Context(), snap); cay.CodeOf(err) != want || err != nil && !strings.Contains(err.Error(), part) {
				t.Errorf("VerifySnapshot: %v; want %q of %s", err, want, part)
			}
		}
		verify("", "")
		if err := o.CheckLarge(t.Context(), snap); err != nil {
			t.Fatal(err)
		}
		verify("", "")
		file := disks{w}.saved(string(snap))
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte("M"), 20<<20); err != nil {
			t.Fatal(err)
		}
		verify(cay.CodeSnapshotCorrupt, string(snap))
		if err := o.CheckLarge(t.Context(), snap); cay.CodeOf(err) != cay.CodeSnapshotCorrupt {
			t.Errorf("a changed disk got a checksum: %v", err)
		}
		check := filepath.Join(o.SnapshotDir, string(snap), "disk.check")
		sum, err := os.ReadFile(check)
		if err != nil {
			t.Fatal(err)
		}
		if err := o.Restamp(snap); err != nil {
			t.Fatal(err)
		}
		verify(cay.CodeSnapshotCorrupt, "its content is not what was saved") // by its content
		if _, err := f.WriteAt([]byte("m"), 20<<20); err != nil {
			t.Fatal(err)
		}
		if err := o.Restamp(snap); err != nil {
			t.Fatal(err)
		}
		verify("", "")
		sum[7] ^= 4
		if err := os.WriteFile(check, sum, 0o600); err != nil {
			t.Fatal(err)
		}
		verify(cay.CodeSnapshotCorrupt, "disk.check")
	})
}

// A hole and what is empty are the same; a bit in a hole is not.
func TestChecksumOfASparseFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	sum := func() string {
		t.Helper()
		s, err := orchestrator.CheckOf(file)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if _, err := orchestrator.CheckOf(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	put := func(at int64, b []byte) {
		t.Helper()
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	nothing := sum()
	if err := f.Truncate(9<<20 + 17); err != nil {
		t.Fatal(err)
	}
	put(3<<20, []byte("data"))
	put(9<<20+10, []byte("the end"))
	first := sum()
	if first == nothing {
		t.Error("data is as good as nothing")
	}
	put(5<<20, make([]byte, 200_000))
	if sum() != first {
		t.Error("zeros differ from a hole")
	}
	for _, at := range []int64{0, 3<<20 - 1, 3<<20 + 2, 3<<20 + 70_000, 5<<20 + 100_000, 9<<20 + 16} {
		was := make([]byte, 1)
		if _, err := f.ReadAt(was, at); err != nil {
			t.Fatal(err)
		}
		put(at, []byte{was[0] ^ 0x10})
		if sum() == first {
			t.Errorf("a flipped bit in byte %d is not seen", at)
		}
		put(at, was)
		if sum() != first {
			t.Errorf("byte %d is as it was, and the checksum is not", at)
		}
	}
}

// The memory is compared by its checksums, and where the snapshot is of a build
// that made none, by its digests.
func TestDamagedMemory(t *testing.T) {
	dir, m := t.TempDir(), cay.Snapshot{ID: cay.NewSnapshotID()}
	memory := filepath.Join(dir, string(m.ID), "memory")
	if err := os.MkdirAll(memory, 0o700); err != nil {
		t.Fatal(err)
	}
	luck := rand.New(rand.NewPCG(5, 6))
	pages := make([]byte, 3<<20+17)
	for at := 2 << 20; at < len(pages); at++ {
		pages[at] = byte(luck.IntN(256))
	}
	files := map[string][]byte{"pages.img": pages, "checkpoint.img": []byte("state"), "empty.img": nil}
	put := func(name string, b []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(memory, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, b := range files {
		put(name, b)
	}
	var err error
	if m.Memory, err = orchestrator.MeasureMemory(dir, m.ID); err != nil || len(m.Memory) != len(files) {
		t.Fatalf("%+v, %v", m.Memory, err)
	}
	for _, p := range m.Memory {
		if sum, err := orchestrator.CheckOf(filepath.Join(memory, p.Name)); err != nil || p.Check != sum {
			t.Errorf("%s has checksum %s, and is saved with %s: %v", p.Name, sum, p.Check, err)
		}
	}
	old := m
	old.Memory = slices.Clone(m.Memory)
	for i := range old.Memory {
		old.Memory[i].Check = ""
	}
	for name, m := range map[string]cay.Snapshot{"checksums": m, "digests": old} {
		if err := orchestrator.CheckMemory(dir, m); err != nil {
			t.Errorf("%s of what was saved: %v", name, err)
		}
		for part, was := range files {
			for range 30 {
				now, what := []byte("more"), "longer"
				if len(was) > 0 {
					now, what = damaged(was, luck)
				}
				put(part, now)
				var e *cay.Error
				if err := orchestrator.CheckMemory(dir, m); !errors.As(err, &e) || e.Code != cay.CodeSnapshotCorrupt || e.Detail["part"] != part {
					t.Errorf("%s, %s %s: %v", name, part, what, err)
				}
			}
			if err := os.Remove(filepath.Join(memory, part)); err != nil {
				t.Fatal(err)
			}
			if err := orchestrator.CheckMemory(dir, m); cay.CodeOf(err) != cay.CodeSnapshotCorrupt {
				t.Errorf("%s, %s is missing: %v", name, part, err)
			}
			put(part, was)
		}
	}
}

// A transient snapshot is used at once: nothing of it is read beforehand, but a
// part that is not whole is seen.
func TestTransientSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, _ := open(t, w, 0)
		defer o.Close()
		mustCreate(t, o, "i1")
		snap := cay.NewSnapshotID()
		m, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: snap, Memory: true, Transient: true})
		if err != nil || !m.Transient || len(m.Memory) != 1 || m.Memory[0].SizeBytes == 0 || m.Memory[0].Digest != "" || m.Disk.Check != "" || m.Disk.Stamp == "" {
			t.Fatalf("%+v, %v", m, err)
		}
		if _, err := o.Create(t.Context(), from("i2", snap, cay.StartRestore)); err != nil {
			t.Error(err)
		}
		wantSnapshots(t, o, w, snap)
		file := filepath.Join(o.SnapshotDir, string(snap), "memory", m.Memory[0].Name)
		if err := os.Truncate(file, m.Memory[0].SizeBytes-1); err != nil {
			t.Fatal(err)
		}
		if _, err := o.Create(t.Context(), from("i3", snap, cay.StartRestore)); cay.CodeOf(err) != cay.CodeSnapshotCorrupt {
			t.Errorf("a start from a part of it: %v", err)
		}
		if err := o.VerifySnapshot(t.Context(), snap); cay.CodeOf(err) != cay.CodeSnapshotCorrupt {
			t.Errorf("a look at a part of it: %v", err)
		}
	})
}
