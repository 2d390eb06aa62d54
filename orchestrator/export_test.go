package orchestrator

import (
	"context"
	"os"
	"path/filepath"

	"github.com/cayhq/cay"
)

// Restamp makes the stamp of a snapshot's disk the one that the disk has now, as
// if nothing had written to it.
func (o *Orchestrator) Restamp(id cay.SnapshotID) error {
	m, sec, err := o.snapshots.load(id)
	if err != nil {
		return err
	}
	saved, err := o.Disks.FindSaved(string(id))
	if err != nil {
		return err
	}
	now, err := stamp(saved.File)
	if err != nil {
		return err
	}
	now.Check = m.Disk.Check
	m.Disk = now
	dir := o.snapshots.path(id)
	if err := os.Rename(dir, dir+newSuffix); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir+newSuffix, memoryName), 0o700); err != nil {
		return err
	}
	return o.snapshots.commit(m, sec, func(string) error { return nil })
}

// CheckLarge makes the checksum of one disk, at once.
func (o *Orchestrator) CheckLarge(ctx context.Context, id cay.SnapshotID) error {
	m, _, err := o.snapshots.load(id)
	if err != nil {
		return err
	}
	return o.checkOne(ctx, m, nil)
}

// CheckOf is the checksum of a sparse file.
func CheckOf(path string) (string, error) { return checkOf(context.Background(), path, nil) }

// MeasureMemory describes the files of the memory of a snapshot, and CheckMemory
// compares them with that, below dir.
func MeasureMemory(dir string, id cay.SnapshotID) ([]cay.SnapshotPart, error) {
	return measure(context.Background(), snapshots{dir}.path(id, memoryName))
}

func CheckMemory(dir string, m cay.Snapshot) error {
	return snapshots{dir}.checkMemory(context.Background(), m)
}
