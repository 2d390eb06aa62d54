package sqlite

import (
	"cmp"
	"context"
	"database/sql"
	"errors"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/sqlite"
	"github.com/cayhq/cay/store"
)

func snapshot(r gen.Snapshot) store.Snapshot {
	return store.Snapshot{ID: cay.SnapshotID(r.ID), Team: cay.TeamID(r.TeamID), Sandbox: cay.SandboxID(r.SandboxID),
		Template: cay.TemplateID(r.TemplateID), Alias: r.Alias, Build: cay.BuildID(r.BuildID), Name: r.Name, Tag: r.Tag,
		Resources: resources(r.Cpus, r.MemoryMb, r.DiskMb), EnvdVersion: r.EnvdVersion, Memory: r.Memory, CreatedAt: instant(r.CreatedAt), Options: r.Options}
}

func noSnapshot(name string) error {
	return &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerStorage,
		Message: "snapshot " + name + " not found", Fix: "list the team's snapshots with `cay snapshot list`"}
}

// AddSnapshot implements [store.Snapshots].
func (s *Store) AddSnapshot(ctx context.Context, n store.Snapshot) error {
	if (n.Name == "") != (n.Tag == "") {
		return internal("snapshot " + string(n.ID) + " would be recorded with a name or a tag alone")
	}
	options := n.Options
	if len(options) == 0 {
		options = nil
	}
	return s.write(ctx, "record the snapshot", flushed, func(ctx context.Context, q *gen.Queries) error {
		if n.Name != "" {
			taken, err := q.NameTaken(ctx, gen.NameTakenParams{TeamID: string(n.Team), Name: n.Name})
			if err == nil && taken {
				return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerStorage,
					Message: "a template of the team is called " + n.Name + " already", Fix: "give the snapshot another name"}
			}
			if err != nil {
				return err
			}
			if err := q.Unname(ctx, gen.UnnameParams{TeamID: string(n.Team), Name: n.Name, Tag: n.Tag}); err != nil {
				return err
			}
		}
		err := q.AddSnapshot(ctx, gen.AddSnapshotParams{ID: string(n.ID), TeamID: string(n.Team), SandboxID: string(n.Sandbox),
			TemplateID: string(n.Template), Alias: n.Alias, BuildID: string(n.Build), Name: n.Name, Tag: n.Tag,
			Cpus: int64(n.Resources.CPUs), MemoryMb: int64(n.Resources.MemoryMB), DiskMb: int64(n.Resources.DiskMB),
			EnvdVersion: n.EnvdVersion, Memory: n.Memory, CreatedAt: micros(n.CreatedAt), Options: options})
		if err != nil {
			return err
		}
		has, err := q.HasBuild(ctx, gen.HasBuildParams{ID: string(n.Build), TemplateID: string(n.Template)})
		if err == nil && !has {
			return noTemplate(string(n.Template))
		}
		return err
	})
}

// FindSnapshot implements [store.Snapshots].
func (s *Store) FindSnapshot(ctx context.Context, t cay.TeamID, ref store.TemplateRef) (n store.Snapshot, err error) {
	err = s.read("look up the snapshot", func(q *gen.Queries) error {
		r, err := q.FindSnapshot(ctx, gen.FindSnapshotParams{TeamID: string(t), Namespace: ref.Namespace,
			Name: ref.Name, Tag: cmp.Or(ref.Tag, store.DefaultTag)})
		if errors.Is(err, sql.ErrNoRows) {
			return noSnapshot(ref.Name)
		}
		n = snapshot(r.Snapshot)
		return err
	})
	if err != nil {
		return store.Snapshot{}, err
	}
	return n, nil
}

// ListSnapshots implements [store.Snapshots].
func (s *Store) ListSnapshots(ctx context.Context, f store.SnapshotFilter) (out []store.Snapshot, err error) {
	err = s.read("list the snapshots", func(q *gen.Queries) error {
		rows, err := q.ListSnapshots(ctx, gen.ListSnapshotsParams{TeamID: string(f.Team), SandboxID: string(f.Sandbox),
			Name: f.Name, Tag: f.Tag, AfterAt: before(f.After), AfterID: f.After.ID, Max: atMost(f.Limit)})
		for _, r := range rows {
			out = append(out, snapshot(r))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// DeleteSnapshot implements [store.Snapshots].
func (s *Store) DeleteSnapshot(ctx context.Context, t cay.TeamID, id cay.SnapshotID) error {
	return s.write(ctx, "delete the snapshot", flushed, func(ctx context.Context, q *gen.Queries) error {
		n, err := q.DeleteSnapshot(ctx, gen.DeleteSnapshotParams{ID: string(id), TeamID: string(t)})
		return touched(n, err, noSnapshot(string(id)))
	})
}
