package orchestrator_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/disk"
	"github.com/cayhq/cay/orchestrator"
)

func (d disks) Receive(_ context.Context, name string, fill func(*os.File) error) (disk.Saved, error) {
	if err := errors.Join(d.err("receive"), os.MkdirAll(d.savedDir, 0o700)); err != nil {
		return disk.Saved{}, err
	}
	f, err := os.Create(d.saved(name))
	if err != nil {
		return disk.Saved{}, err
	}
	if err := errors.Join(fill(f), f.Close()); err != nil {
		return disk.Saved{}, errors.Join(err, os.Remove(f.Name()))
	}
	return d.FindSaved(name)
}

// baseBuilds are builds of the template base, and one that is not there.
type baseBuilds struct{ builds }

func (n baseBuilds) Open(ctx context.Context, b cay.BuildID) (cay.Manifest, []disk.Layer, error) {
	if b == "unknown" {
		return cay.Manifest{}, nil, &cay.Error{Code: cay.CodeTemplateNotFound, Layer: cay.LayerTemplate, Message: "no such build"}
	}
	m, layers, err := n.builds.Open(ctx, b)
	m.Name = "base"
	return m, layers, err
}

// archived makes a sandbox and a snapshot of it, and returns its archive.
func archived(t *testing.T, o *orchestrator.Orchestrator, memory bool) (cay.Snapshot, []byte) {
	t.Helper()
	o.Builds = baseBuilds{}
	mustCreate(t, o, "i1")
	m, err := o.Save(t.Context(), "i1", cay.SaveRequest{Snapshot: cay.NewSnapshotID(), Memory: memory, Pause: true})
	if err != nil {
		t.Fatal(err)
	}
	r, size, err := o.OpenArchive(t.Context(), m.ID)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	if int64(len(b)) != size {
		t.Errorf("the archive has %d bytes; it was said to have %d", len(b), size)
	}
	return m, b
}

func anything(cay.Snapshot, string) error { return nil }

func TestArchive(t *testing.T) {
	for _, memory := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			o, dir := open(t, w, 0)
			defer o.Close()
			was, b := archived(t, o, memory)
			if err := o.DeleteSnapshot(t.Context(), was.ID); err != nil {
				t.Fatal(err)
			}
			id := cay.NewSnapshotID()
			m, err := o.ReceiveArchive(t.Context(), id, bytes.NewReader(b), func(m cay.Snapshot, template string) error {
				if m.ID != was.ID || template != "base" {
					t.Errorf("asked to accept %+v of template %q", m, template)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			want := was
			want.ID, want.Disk = id, m.Disk
			if m.Disk.SizeBytes != was.Disk.SizeBytes || m.Disk.Stamp == was.Disk.Stamp || m.Runtime != want.Runtime || m.Build != want.Build || len(m.Memory) != len(want.Memory) {
				t.Errorf("received %+v, want %+v", m, want)
			}
			wantSnapshots(t, o, w, id)
			s, err := o.Create(t.Context(), from("i2", id, ""))
			if err != nil || s.Restored != memory {
				t.Fatalf("a sandbox from it: %+v, %v", s, err)
			}
			// The ID is taken.
			if _, err := o.ReceiveArchive(t.Context(), id, bytes.NewReader(b), anything); cay.CodeOf(err) != cay.CodeConflict {
				t.Errorf("the same again: %v", err)
			}
			if err := o.Kill(t.Context(), "i2", cay.EndRequest); err != nil {
				t.Error(err)
			}
			wantClean(t, w, dir)
			wantSnapshots(t, o, w, id)
			if _, _, err := o.OpenArchive(t.Context(), cay.NewSnapshotID()); cay.CodeOf(err) != cay.CodeNotFound {
				t.Errorf("the archive of an unknown snapshot: %v", err)
			}
		})
	}
}

// A damaged archive is refused and leaves nothing; or the damage is where
// nothing is, and what was received is right.
func TestDamagedArchive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, _ := open(t, w, 0)
		defer o.Close()
		was, b := archived(t, o, true)
		content := func(id cay.SnapshotID) map[string]string {
			out := map[string]string{}
			d, err := disks{w}.FindSaved(string(id))
			if err != nil {
				t.Fatal(err)
			}
			files := map[string]string{"disk": d.File}
			for _, p := range was.Memory {
				files[p.Name] = filepath.Join(o.SnapshotDir, string(id), "memory", p.Name)
			}
			for name, path := range files {
				c, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				out[name] = string(c)
			}
			return out
		}
		whole := content(was.ID)
		try := func(what string, damaged []byte, must bool) {
			id := cay.NewSnapshotID()
			_, err := o.ReceiveArchive(t.Context(), id, bytes.NewReader(damaged), anything)
			if err != nil {
				if code := cay.CodeOf(err); code != cay.CodeSnapshotCorrupt && code != cay.CodeSnapshotIncompatible && code != cay.CodeTemplateNotFound {
					t.Errorf("%s: %v", what, err)
				}
				wantSnapshots(t, o, w, was.ID)
				return
			}
			if must {
				t.Errorf("%s: received all the same", what)
			}
			if got := content(id); !maps.Equal(got, whole) {
				t.Errorf("%s: received %q", what, got)
			}
			if err := o.DeleteSnapshot(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		for n := 0; n < len(b); n += 128 {
			try("cut", b[:n], n < len(b)-1024-512) // what follows the last member is empty
		}
		for i := 0; i < len(b); i += 11 {
			damaged := slices.Clone(b)
			damaged[i] ^= 1 << (i % 8)
			try("a bit", damaged, false)
		}
		try("no tar", []byte(strings.Repeat("no tar ", 1000)), true)
		try("nothing", nil, true)
	})
}

func TestArchiveThatDoesNotFit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, _ := open(t, w, 0)
		defer o.Close()
		was, b := archived(t, o, true)
		for _, c := range []struct {
			name     string
			old, new string
			code     cay.Code
			says     string
		}{
			{"another engine", `"runtimeVersion":"1"`, `"runtimeVersion":"7"`, cay.CodeSnapshotIncompatible, "written by fake 7"},
			{"another format", `"format":1,"template"`, `"format":9,"template"`, cay.CodeSnapshotIncompatible, "format 9"},
			{"another build", `"build":"b1"`, `"build":"unknown"`, cay.CodeTemplateNotFound, "build unknown of template \"base\""},
			{"a path", `"memory":[{"name":"`, `"memory":[{"name":"/`, cay.CodeSnapshotCorrupt, ""},
		} {
			if !bytes.Contains(b, []byte(c.old)) {
				t.Fatalf("%s: the archive does not have %s", c.name, c.old)
			}
			changed := edit(t, b, c.old, c.new)
			_, err := o.ReceiveArchive(t.Context(), cay.NewSnapshotID(), bytes.NewReader(changed), anything)
			if cay.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v, want %s", c.name, err, c.code)
			}
		}
		refused := errors.New("not wanted")
		r := &counted{r: bytes.NewReader(b)}
		if _, err := o.ReceiveArchive(t.Context(), cay.NewSnapshotID(), r, func(cay.Snapshot, string) error { return refused }); !errors.Is(err, refused) {
			t.Errorf("refused: %v", err)
		}
		if r.n > 2048 {
			t.Errorf("%d bytes were read of an archive that is refused", r.n)
		}
		// A disk that cannot be written.
		w.setFail("receive", errors.New("no room"))
		if _, err := o.ReceiveArchive(t.Context(), cay.NewSnapshotID(), bytes.NewReader(b), anything); err == nil {
			t.Error("received without a disk")
		}
		wantSnapshots(t, o, w, was.ID)
	})
}

// edit changes a text in the first member of an archive.
func edit(t *testing.T, archive []byte, old, new string) []byte {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(archive))
	h, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	b = bytes.Replace(b, []byte(old), []byte(new), 1)
	h.Size = int64(len(b))
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if err := w.WriteHeader(h); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

type counted struct {
	r io.Reader
	n int
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += n
	return n, err
}
