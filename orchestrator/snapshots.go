package orchestrator

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/killpoint"
)

// snapshots keeps the memory and the manifests of snapshots in one directory;
// their disks are with the disks, under the snapshot's ID.
//
//	<dir>/<id>/manifest.json   written last
//	<dir>/<id>/disk.check      the checksum of a large disk, made later
//	<dir>/<id>/secrets.json    mode 0600: the control token of the saved envd
//	<dir>/<id>/memory/…        what the engine wrote; absent for a disk alone
//	<dir>/<id>.new/            in the making
type snapshots struct{ dir string }

const (
	manifestName = "manifest.json"
	secretsName  = "secrets.json"
	memoryName   = "memory"
	newSuffix    = ".new"
)

// snapshotSecrets are what only the node may know of a snapshot.
type snapshotSecrets struct {
	ControlToken string `json:"controlToken"`
}

func (s snapshots) path(id cay.SnapshotID, elem ...string) string {
	return filepath.Join(append([]string{s.dir, string(id)}, elem...)...)
}

func validSnapshotID(id cay.SnapshotID) error {
	if len(id) == 21 && id[0] == 's' && strings.Trim(string(id), "abcdefghijklmnopqrstuvwxyz0123456789") == "" {
		return nil
	}
	return &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerStorage,
		Message: fmt.Sprintf("the snapshot ID %q is malformed", id), Fix: "copy it from `cay snapshot list`"}
}

// free reports whether a snapshot may be made under the ID.
func (s snapshots) free(id cay.SnapshotID) error {
	if err := validSnapshotID(id); err != nil {
		return err
	}
	if _, err := os.Lstat(s.path(id)); err == nil {
		return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerStorage,
			Message: fmt.Sprintf("snapshot %s exists already", id), Fix: "use another ID"}
	}
	return nil
}

// begin makes an empty directory for a snapshot in the making.
func (s snapshots) begin(id cay.SnapshotID, at func(step string) error) (memory string, err error) {
	dir := s.path(id) + newSuffix
	if err := at("directory.before-make"); err != nil {
		return "", storageError("make the directory of snapshot "+string(id), err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", storageError("clear the directory of snapshot "+string(id), err)
	}
	memory = filepath.Join(dir, memoryName)
	if err := os.MkdirAll(memory, 0o700); err != nil {
		return "", storageError("make the directory of snapshot "+string(id), err)
	}
	return memory, nil
}

// keepMemory makes the memory of a snapshot in the making durable. at is called
// first; its error is that of the step.
func (s snapshots) keepMemory(id cay.SnapshotID, at func(step string) error) error {
	memory := filepath.Join(s.path(id)+newSuffix, memoryName)
	err := at("memory.before-sync")
	var ents []os.DirEntry
	if err == nil {
		ents, err = os.ReadDir(memory)
	}
	if err == nil {
		paths := []string{memory}
		for _, e := range ents {
			paths = append(paths, filepath.Join(memory, e.Name()))
		}
		err = syncPaths(paths...)
	}
	if err != nil {
		return storageError("write the memory of snapshot "+string(id), err)
	}
	return nil
}

// commit makes a snapshot visible whose memory and disk are durable: everything
// is on disk before the manifest is, and the rename comes last. A transient one
// is not made durable. at is called before each step; its error is the step's.
// After an error the snapshot may be visible all the same.
func (s snapshots) commit(m cay.Snapshot, sec snapshotSecrets, at func(step string) error) error {
	dir := s.path(m.ID) + newSuffix
	sync := syncPaths
	if m.Transient {
		sync = func(...string) error { return nil }
	}
	do := func(step, what string, f func() error) error {
		err := at(step)
		if err == nil {
			err = f()
		}
		if err != nil {
			return storageError(what+" of snapshot "+string(m.ID), err)
		}
		return nil
	}
	if len(m.Memory) == 0 {
		if err := os.Remove(filepath.Join(dir, memoryName)); err != nil {
			return storageError("remove the empty memory of snapshot "+string(m.ID), err)
		}
	}
	paths := []string{dir}
	for _, f := range []struct {
		name, short string
		content     any
	}{{secretsName, "secrets", sec}, {manifestName, "manifest", m}} {
		b, err := json.MarshalIndent(f.content, "", "  ")
		if err != nil {
			return fmt.Errorf("encoding %s of snapshot %s: %w", f.name, m.ID, err)
		}
		path := filepath.Join(dir, f.name)
		if err := do(f.short+".before-write", "write "+f.name, func() error { return os.WriteFile(path, seal(append(b, '\n')), 0o600) }); err != nil {
			return err
		}
		paths = append(paths, path)
	}
	if err := do("directory.before-sync", "write the directory", func() error { return sync(paths...) }); err != nil {
		return err
	}
	if err := do("manifest.before-rename", "publish the manifest", func() error { return os.Rename(dir, s.path(m.ID)) }); err != nil {
		return err
	}
	if err := do("manifest.before-publish", "publish the manifest", func() error { return sync(s.dir) }); err != nil {
		return err
	}
	_ = at("manifest.after")
	return nil
}

// syncPaths syncs files and directories at the same time, for which the journal
// of their file system is written once.
func syncPaths(paths ...string) error {
	var eg errgroup.Group
	for _, p := range paths {
		eg.Go(func() error { return syncPath(p) })
	}
	return eg.Wait()
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func storageError(what string, err error) error {
	e := &cay.Error{Code: cay.CodeDiskUnavailable, Layer: cay.LayerStorage,
		Message: "could not " + what + ": " + err.Error(), Fix: "run `cay doctor`: its storage checks name the missing part", Err: err}
	if errors.Is(err, syscall.ENOSPC) {
		e.Code, e.Message = cay.CodeDiskFull, "no room is left to "+what
		e.Fix = "free space on the file system of the data directory; the sandbox runs on"
	}
	return e
}

// there reports whether a snapshot has a directory, whole or damaged.
func (s snapshots) there(id cay.SnapshotID) bool {
	_, err := os.Lstat(s.path(id))
	return !errors.Is(err, fs.ErrNotExist)
}

// abandon removes a snapshot in the making; one that is whole stays.
func (s snapshots) abandon(id cay.SnapshotID) error {
	return os.RemoveAll(s.path(id) + newSuffix)
}

// load reads a manifest. No manifest is CodeNotFound; one that cannot be used
// names why.
func (s snapshots) load(id cay.SnapshotID) (cay.Snapshot, snapshotSecrets, error) {
	var m cay.Snapshot
	var sec snapshotSecrets
	if err := validSnapshotID(id); err != nil {
		return m, sec, err
	}
	for _, f := range []struct {
		name string
		into any
	}{{manifestName, &m}, {secretsName, &sec}} {
		b, err := os.ReadFile(s.path(id, f.name))
		if errors.Is(err, fs.ErrNotExist) {
			if _, serr := os.Stat(s.path(id)); errors.Is(serr, fs.ErrNotExist) {
				return m, sec, &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerStorage,
					Message: fmt.Sprintf("no snapshot %s on this node", id), Fix: "`cay snapshot list` shows those there are"}
			}
		}
		if err == nil && f.name == manifestName {
			if n := formatOf(b); n != 0 && n != cay.SnapshotFormat {
				return m, sec, errFormat(id, n)
			}
		}
		if err == nil {
			b, err = unseal(b)
		}
		if err == nil {
			err = json.Unmarshal(b, f.into)
		}
		if err != nil {
			return m, sec, errCorrupt(id, f.name, err.Error(), err)
		}
	}
	switch {
	case m.Format != cay.SnapshotFormat:
		return m, sec, errFormat(id, m.Format)
	case m.ID != id || sec.ControlToken == "" || m.Disk.Name == "":
		return m, sec, errCorrupt(id, manifestName, "it is not complete", nil)
	}
	return m, sec, nil
}

// unsealedFormat is the last format of which files have no digest of themselves.
const unsealedFormat = 1

// formatOf is the format that a manifest says it has, as far as it can be
// believed: it is whole, or of a format in which nothing can tell. Else it is 0.
func formatOf(manifest []byte) int {
	var m struct {
		Format int `json:"format"`
	}
	b, err := unseal(manifest)
	whole := err == nil
	if !whole {
		b = manifest
	}
	if err := json.Unmarshal(b, &m); err != nil || !whole && m.Format > unsealedFormat {
		return 0
	}
	return m.Format
}

func errFormat(id cay.SnapshotID, n int) error {
	return &cay.Error{Code: cay.CodeSnapshotIncompatible, Layer: cay.LayerStorage,
		Message: fmt.Sprintf("snapshot %s has format %d; this build reads format %d", id, n, cay.SnapshotFormat),
		Fix:     "use the version of Cay that wrote it, or delete it"}
}

func errCorrupt(id cay.SnapshotID, part, why string, err error) error {
	return &cay.Error{Code: cay.CodeSnapshotCorrupt, Layer: cay.LayerStorage,
		Message: fmt.Sprintf("part %s of snapshot %s is damaged: %s", part, id, why),
		Fix:     "restore that part from a backup; when it is a part of the memory, a cold start (memory: false) uses the disk alone",
		Detail:  map[string]string{"snapshot": string(id), "part": part}, Err: err}
}

// list returns every whole snapshot, and an error per one that cannot be read.
func (s snapshots) list() ([]cay.Snapshot, []error) {
	ents, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, []error{fmt.Errorf("reading the snapshots: %w", err)}
	}
	var out []cay.Snapshot
	var errs []error
	for _, e := range ents {
		id := cay.SnapshotID(e.Name())
		if validSnapshotID(id) != nil {
			continue
		}
		m, _, err := s.load(id)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, m)
	}
	return out, errs
}

// hide takes a snapshot out of sight, in one step: what is left of it is half of
// one, for abandon. An unknown one is no error.
func (s snapshots) hide(id cay.SnapshotID, h killpoint.Hook) error {
	if err := validSnapshotID(id); err != nil {
		return err
	}
	dir := s.path(id)
	err := h.At(killpoint.Drop, "snapshot.before-rename")
	if err == nil {
		err = os.Rename(dir, dir+newSuffix)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return storageError("remove snapshot "+string(id), err)
	}
	return nil
}

// dropHalf removes what a crash left in the making.
func (s snapshots) dropHalf(keep map[cay.SnapshotID]bool) error {
	ents, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("reading the snapshots: %w", err)
	}
	var errs []error
	for _, e := range ents {
		if id, half := strings.CutSuffix(e.Name(), newSuffix); half && !keep[cay.SnapshotID(id)] {
			errs = append(errs, os.RemoveAll(filepath.Join(s.dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// measure describes the files the engine wrote.
func measure(ctx context.Context, dir string) ([]cay.SnapshotPart, error) {
	ents, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	parts := make([]cay.SnapshotPart, len(ents))
	var eg errgroup.Group
	for i, e := range ents {
		eg.Go(func() (err error) {
			parts[i], err = measureFile(ctx, filepath.Join(dir, e.Name()))
			return err
		})
	}
	return parts, eg.Wait()
}

// sizesOf is measure without reading the files.
func sizesOf(dir string) ([]cay.SnapshotPart, error) {
	ents, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	parts := make([]cay.SnapshotPart, len(ents))
	for i, e := range ents {
		fi, err := e.Info()
		if err != nil {
			return nil, err
		}
		parts[i] = cay.SnapshotPart{Name: e.Name(), SizeBytes: fi.Size()}
	}
	return parts, nil
}

func measureFile(ctx context.Context, path string) (cay.SnapshotPart, error) {
	f, err := os.Open(path)
	if err != nil {
		return cay.SnapshotPart{}, err
	}
	defer f.Close()
	digest, check := sha256.New(), newBlockSums()
	size, buf := int64(0), make([]byte, readSize)
	for {
		if err := ctx.Err(); err != nil {
			return cay.SnapshotPart{}, err
		}
		n, err := io.ReadFull(f, buf)
		digest.Write(buf[:n])
		check.add(size, buf[:n])
		size += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return cay.SnapshotPart{}, fmt.Errorf("reading %s: %w", path, err)
		}
	}
	return cay.SnapshotPart{Name: filepath.Base(path), SizeBytes: size,
		Digest: cay.Digest("sha256:" + hex.EncodeToString(digest.Sum(nil))), Check: check.String()}, nil
}

// stamp identifies the content of a file by what the file system changes with
// every write.
func stamp(path string) (cay.SnapshotPart, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return cay.SnapshotPart{}, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return cay.SnapshotPart{}, fmt.Errorf("%s has no inode", path)
	}
	return cay.SnapshotPart{Name: filepath.Base(path), SizeBytes: fi.Size(),
		Stamp: fmt.Sprintf("%d-%d.%09d-%d.%09d-%d", st.Ino, st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec, st.Blocks)}, nil
}

// checkMemory reads the files of the memory and compares their checksums with
// the manifest, as before each start: several times as fast as the digests are.
// Where the manifest has none it compares the digests; of a transient snapshot,
// the sizes.
func (s snapshots) checkMemory(ctx context.Context, m cay.Snapshot) error {
	if !m.Transient && slices.ContainsFunc(m.Memory, func(p cay.SnapshotPart) bool { return p.Check == "" }) {
		return s.digestMemory(ctx, m)
	}
	var eg errgroup.Group
	for _, want := range m.Memory {
		eg.Go(func() error {
			path := s.path(m.ID, memoryName, want.Name)
			fi, err := os.Stat(path)
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return errCorrupt(m.ID, want.Name, "it is missing", nil)
			case err != nil:
				return errCorrupt(m.ID, want.Name, err.Error(), err)
			case fi.Size() != want.SizeBytes:
				return errCorrupt(m.ID, want.Name, fmt.Sprintf("it has %d bytes instead of %d", fi.Size(), want.SizeBytes), nil)
			}
			if m.Transient {
				return nil
			}
			return checkContent(ctx, m.ID, want.Name, path, want.Check)
		})
	}
	return eg.Wait()
}

// digestMemory compares the digests of the files of the memory with the manifest.
func (s snapshots) digestMemory(ctx context.Context, m cay.Snapshot) error {
	got, err := measure(ctx, s.path(m.ID, memoryName))
	if err != nil {
		if ctx.Err() != nil {
			return err
		}
		return errCorrupt(m.ID, memoryName, err.Error(), err)
	}
	for _, want := range m.Memory {
		i := slices.IndexFunc(got, func(p cay.SnapshotPart) bool { return p.Name == want.Name })
		switch {
		case i < 0:
			return errCorrupt(m.ID, want.Name, "it is missing", nil)
		case got[i].SizeBytes != want.SizeBytes:
			return errCorrupt(m.ID, want.Name, fmt.Sprintf("it has %d bytes instead of %d", got[i].SizeBytes, want.SizeBytes), nil)
		case got[i].Digest != want.Digest:
			return errCorrupt(m.ID, want.Name, "its digest is "+string(got[i].Digest)+" instead of "+string(want.Digest), nil)
		}
	}
	return nil
}

// checkDisk compares the saved disk with the manifest.
func checkDisk(m cay.Snapshot, file string) error {
	got, err := stamp(file)
	if err != nil {
		return errCorrupt(m.ID, m.Disk.Name, err.Error(), err)
	}
	if got.Name != m.Disk.Name || got.SizeBytes != m.Disk.SizeBytes || got.Stamp != m.Disk.Stamp {
		return errCorrupt(m.ID, m.Disk.Name, "it was changed since it was saved", nil)
	}
	return nil
}
