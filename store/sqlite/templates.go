package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"math"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/sqlite"
	"github.com/cayhq/cay/store"
)

func build(r gen.Build) store.Build {
	return store.Build{ID: cay.BuildID(r.ID), Template: cay.TemplateID(r.TemplateID), EnvdVersion: r.EnvdVersion,
		Resources: resources(r.Cpus, r.MemoryMb, r.DiskMb), CreatedAt: instant(r.CreatedAt)}
}

func resources(cpus, memory, disk int64) cay.Resources {
	return cay.Resources{CPUs: int(cpus), MemoryMB: int(memory), DiskMB: int(disk)}
}

func template(r gen.ListTemplatesRow) store.Template {
	return store.Template{ID: cay.TemplateID(r.Template.ID), Team: cay.TeamID(r.Template.TeamID),
		Name: r.Template.Name, Public: r.Template.Public,
		CreatedAt: instant(r.Template.CreatedAt), UpdatedAt: instant(r.Template.UpdatedAt),
		LastSpawnedAt: instant(r.Template.LastSpawnedAt), SpawnCount: r.Template.SpawnCount,
		BuildCount: r.BuildCount, Current: build(r.Build)}
}

func noTemplate(name string) error {
	return &cay.Error{Code: cay.CodeTemplateNotFound, Layer: cay.LayerTemplate,
		Message: "template '" + name + "' not found", Fix: "list the templates with `cay template list`"}
}

func tagOf(ref store.TemplateRef) string {
	if ref.Tag == "" {
		return store.DefaultTag
	}
	return ref.Tag
}

// PublishBuild implements [store.Templates].
func (s *Store) PublishBuild(ctx context.Context, t cay.TeamID, public bool, m cay.Manifest) (cay.TemplateID, error) {
	var id string
	err := s.write(ctx, "publish the build", flushed, func(ctx context.Context, q *gen.Queries) (err error) {
		now := micros(s.Now())
		id, err = q.TemplateByName(ctx, gen.TemplateByNameParams{TeamID: string(t), Name: m.Name})
		if errors.Is(err, sql.ErrNoRows) {
			id = string(m.Template)
			err = q.AddTemplate(ctx, gen.AddTemplateParams{ID: id, TeamID: string(t), Name: m.Name, Public: public, Now: now})
		}
		if err != nil {
			return err
		}
		fresh, err := q.AddBuild(ctx, gen.AddBuildParams{ID: string(m.Build), TemplateID: id,
			Cpus: int64(m.Resources.CPUs), MemoryMb: int64(m.Resources.MemoryMB), DiskMb: int64(m.Resources.DiskMB),
			EnvdVersion: m.EnvdVersion, CreatedAt: micros(m.CreatedAt)})
		if err != nil {
			return err
		}
		if fresh == 0 {
			owner, err := q.BuildTemplate(ctx, string(m.Build))
			if err != nil {
				return err
			}
			if owner != id {
				return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerTemplate,
					Message: "build " + string(m.Build) + " belongs to another template",
					Fix:     "build the template anew: every build has an ID of its own"}
			}
			current, err := q.TaggedBuild(ctx, gen.TaggedBuildParams{TemplateID: id, Tag: store.DefaultTag})
			if err != nil || current == string(m.Build) {
				return err
			}
		}
		if err := q.PutTag(ctx, gen.PutTagParams{TemplateID: id, Tag: store.DefaultTag, BuildID: string(m.Build)}); err != nil {
			return err
		}
		return q.TouchTemplate(ctx, gen.TouchTemplateParams{Now: now, ID: id})
	})
	if err != nil {
		return "", err
	}
	return cay.TemplateID(id), nil
}

// FindTemplate implements [store.Templates].
func (s *Store) FindTemplate(ctx context.Context, t cay.TeamID, ref store.TemplateRef) (store.Template, error) {
	var r gen.TemplateAtTagRow
	err := s.read("look up the template", func(q *gen.Queries) error {
		found, err := q.ResolveTemplate(ctx, gen.ResolveTemplateParams{TeamID: string(t), Name: ref.Name, Namespace: ref.Namespace})
		if errors.Is(err, sql.ErrNoRows) {
			return noTemplate(ref.Name)
		}
		if err != nil {
			return err
		}
		r, err = q.TemplateAtTag(ctx, gen.TemplateAtTagParams{Tag: tagOf(ref), ID: found.ID})
		if errors.Is(err, sql.ErrNoRows) {
			return &cay.Error{Code: cay.CodeTemplateNotFound, Layer: cay.LayerTemplate,
				Message: "template '" + ref.Name + "' has no tag '" + tagOf(ref) + "'",
				Fix:     "leave the tag out, or list what there is with `cay template info " + ref.Name + "`"}
		}
		return err
	})
	if err != nil {
		return store.Template{}, err
	}
	return template(gen.ListTemplatesRow(r)), nil
}

// TemplateExists implements [store.Templates].
func (s *Store) TemplateExists(ctx context.Context, ref store.TemplateRef) (bool, error) {
	var ok bool
	err := s.read("look up the template", func(q *gen.Queries) (err error) {
		ok, err = q.TemplateExists(ctx, gen.TemplateExistsParams{Tag: tagOf(ref), Name: ref.Name, Namespace: ref.Namespace})
		return err
	})
	return ok, err
}

// ListTemplates implements [store.Templates].
func (s *Store) ListTemplates(ctx context.Context, t cay.TeamID, after store.Cursor, limit int) ([]store.Template, error) {
	var rows []gen.ListTemplatesRow
	err := s.read("list the templates", func(q *gen.Queries) (err error) {
		rows, err = q.ListTemplates(ctx, gen.ListTemplatesParams{Tag: store.DefaultTag, TeamID: string(t),
			AfterAt: before(after), AfterID: after.ID, Max: atMost(limit)})
		return err
	})
	return each(rows, template), err
}

// ListBuilds implements [store.Templates].
func (s *Store) ListBuilds(ctx context.Context, id cay.TemplateID, after store.Cursor, limit int) ([]store.Build, error) {
	var rows []gen.Build
	err := s.read("list the builds", func(q *gen.Queries) (err error) {
		rows, err = q.ListBuilds(ctx, gen.ListBuildsParams{TemplateID: string(id),
			AfterAt: before(after), AfterID: after.ID, Max: atMost(limit)})
		return err
	})
	return each(rows, build), err
}

// SetTemplatePublic implements [store.Templates].
func (s *Store) SetTemplatePublic(ctx context.Context, t cay.TeamID, id cay.TemplateID, public bool) error {
	return s.write(ctx, "change the template", flushed, func(ctx context.Context, q *gen.Queries) error {
		n, err := q.SetTemplatePublic(ctx, gen.SetTemplatePublicParams{Public: public, Now: micros(s.Now()), ID: string(id), TeamID: string(t)})
		return touched(n, err, noTemplate(string(id)))
	})
}

// DeleteTemplate implements [store.Templates].
func (s *Store) DeleteTemplate(ctx context.Context, t cay.TeamID, id cay.TemplateID) error {
	return s.write(ctx, "delete the template", flushed, func(ctx context.Context, q *gen.Queries) error {
		n, err := q.DeleteTemplate(ctx, gen.DeleteTemplateParams{ID: string(id), TeamID: string(t)})
		if err := touched(n, err, noTemplate(string(id))); err != nil {
			return err
		}
		// After the deletion, which is undone: a foreign template is not found,
		// whether it is in use or not.
		used, err := q.TemplateInUse(ctx, string(id))
		if err == nil && used {
			return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerTemplate,
				Message: "template " + string(id) + " has live sandboxes or snapshots", Fix: "remove them first"}
		}
		return err
	})
}

// before is the instant of a cursor in a list that goes back in time.
func before(c store.Cursor) int64 {
	if c == (store.Cursor{}) {
		return math.MaxInt64
	}
	return micros(c.At)
}
