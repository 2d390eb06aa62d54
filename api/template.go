package api

import (
	"context"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/store"
)

// templateHandlers serves what is about templates that are built already.
type templateHandlers struct{ *Server }

// ListTemplates implements the generated interface.
func (s templateHandlers) ListTemplates(ctx context.Context, r gen.ListTemplatesRequestObject) (gen.ListTemplatesResponseObject, error) {
	if err := ownTeam(ctx, r.Params.TeamID); err != nil {
		return nil, err
	}
	out := gen.ListTemplates200JSONResponse{}
	for after := (store.Cursor{}); ; {
		rows, err := s.Store.ListTemplates(ctx, callerOf(ctx).team.ID, after, defaultLimit)
		if err != nil {
			return nil, err
		}
		page, err := s.templates(ctx, rows)
		if err != nil {
			return nil, err
		}
		out = append(out, page...)
		if len(rows) < defaultLimit {
			return out, nil
		}
		after = templateCursor(rows[len(rows)-1])
	}
}

// ListTemplatesV2 implements the generated interface.
func (s templateHandlers) ListTemplatesV2(ctx context.Context, r gen.ListTemplatesV2RequestObject) (gen.ListTemplatesV2ResponseObject, error) {
	if err := ownTeam(ctx, r.Params.TeamID); err != nil {
		return nil, err
	}
	after, err := parseCursor(r.Params.NextToken, false)
	if err != nil {
		return nil, err
	}
	limit := pageLimit(r.Params.Limit)
	rows, err := s.Store.ListTemplates(ctx, callerOf(ctx).team.ID, after, limit+1)
	if err != nil {
		return nil, err
	}
	var out gen.ListTemplatesV2200JSONResponse
	rows, out.Headers.XNextToken = page(rows, limit, false, templateCursor)
	out.Body, err = s.templates(ctx, rows)
	return out, err
}

func templateCursor(t store.Template) store.Cursor {
	return store.Cursor{At: t.CreatedAt, ID: string(t.ID)}
}

// ownTeam refuses a team that is not the caller's, whether it exists or not.
func ownTeam(ctx context.Context, team *string) error {
	if team == nil || *team == "" || cay.TeamID(*team) == callerOf(ctx).team.ID {
		return nil
	}
	return &cay.Error{Code: cay.CodeForbidden, Layer: cay.LayerAuth,
		Message: "the team that the request names is not that of the credential",
		Fix:     "leave the team out, or use a credential of that team"}
}

// GetTemplate implements the generated interface.
func (s templateHandlers) GetTemplate(ctx context.Context, r gen.GetTemplateRequestObject) (gen.GetTemplateResponseObject, error) {
	t, err := s.find(ctx, r.TemplateID)
	if err != nil {
		return nil, err
	}
	after, err := parseCursor(r.Params.NextToken, false)
	if err != nil {
		return nil, err
	}
	limit := pageLimit(r.Params.Limit)
	builds, err := s.Store.ListBuilds(ctx, t.ID, after, limit+1)
	if err != nil {
		return nil, err
	}
	var out gen.GetTemplate200JSONResponse
	builds, out.Headers.XNextToken = page(builds, limit, false, func(b store.Build) store.Cursor {
		return store.Cursor{At: b.CreatedAt, ID: string(b.ID)}
	})
	names, err := s.names(ctx, t)
	if err != nil {
		return nil, err
	}
	out.Body = gen.TemplateWithBuilds{TemplateID: string(t.ID), Public: t.Public, Aliases: []string{t.Name}, Names: names,
		CreatedAt: t.CreatedAt, UpdatedAt: t.UpdatedAt, LastSpawnedAt: instant(t.LastSpawnedAt), SpawnCount: t.SpawnCount,
		Builds: make([]gen.TemplateBuild, len(builds))}
	for i, b := range builds {
		disk, at := int32(b.Resources.DiskMB), b.CreatedAt
		out.Body.Builds[i] = gen.TemplateBuild{BuildID: string(b.ID), Status: gen.TemplateBuildStatusReady, CreatedAt: at, UpdatedAt: at,
			FinishedAt: &at, CpuCount: int32(b.Resources.CPUs), MemoryMB: int32(b.Resources.MemoryMB), DiskSizeMB: &disk,
			EnvdVersion: optional(b.EnvdVersion)}
	}
	return out, nil
}

// GetTemplateAlias implements the generated interface. Names are one space for
// all teams, so a name that is taken is told from one that is free.
func (s templateHandlers) GetTemplateAlias(ctx context.Context, r gen.GetTemplateAliasRequestObject) (gen.GetTemplateAliasResponseObject, error) {
	t, err := s.find(ctx, r.Alias)
	if err == nil {
		return gen.GetTemplateAlias200JSONResponse{TemplateID: string(t.ID), Public: t.Public}, nil
	}
	if cay.CodeOf(err) != cay.CodeTemplateNotFound {
		return nil, err
	}
	ref, rerr := parseTemplateRef(r.Alias)
	if rerr != nil {
		return nil, rerr
	}
	exists, xerr := s.Store.TemplateExists(ctx, ref)
	if xerr != nil {
		return nil, xerr
	}
	if exists {
		return nil, &cay.Error{Code: cay.CodeForbidden, Layer: cay.LayerTemplate,
			Message: "the template '" + r.Alias + "' exists and is not your team's", Fix: "choose another name"}
	}
	return nil, err
}

// UpdateTemplate implements the generated interface.
func (s templateHandlers) UpdateTemplate(ctx context.Context, r gen.UpdateTemplateRequestObject) (gen.UpdateTemplateResponseObject, error) {
	if _, err := s.update(ctx, r.TemplateID, r.Body.Public); err != nil {
		return nil, err
	}
	return gen.UpdateTemplate200Response{}, nil
}

// UpdateTemplateV2 implements the generated interface.
func (s templateHandlers) UpdateTemplateV2(ctx context.Context, r gen.UpdateTemplateV2RequestObject) (gen.UpdateTemplateV2ResponseObject, error) {
	t, err := s.update(ctx, r.TemplateID, r.Body.Public)
	if err != nil {
		return nil, err
	}
	names, err := s.names(ctx, t)
	if err != nil {
		return nil, err
	}
	return gen.UpdateTemplateV2200JSONResponse{Names: names}, nil
}

func (s templateHandlers) update(ctx context.Context, ref string, public *bool) (store.Template, error) {
	t, err := s.findOwn(ctx, ref)
	if err != nil || public == nil {
		return t, err
	}
	err = s.Store.SetTemplatePublic(ctx, t.Team, t.ID, *public)
	if cay.CodeOf(err) == cay.CodeTemplateNotFound {
		err = errNoTemplate(ref)
	}
	return t, err
}

// DeleteTemplate implements the generated interface. Clients delete snapshots
// by it too.
func (s templateHandlers) DeleteTemplate(ctx context.Context, r gen.DeleteTemplateRequestObject) (gen.DeleteTemplateResponseObject, error) {
	t, err := s.findOwn(ctx, r.TemplateID)
	if cay.CodeOf(err) == cay.CodeTemplateNotFound {
		err = s.deleteSnapshot(ctx, r.TemplateID)
		if err == nil {
			return gen.DeleteTemplate204Response{}, nil
		}
	}
	if err != nil {
		return nil, err
	}
	switch err := s.Store.DeleteTemplate(ctx, t.Team, t.ID); cay.CodeOf(err) {
	case "":
		return gen.DeleteTemplate204Response{}, nil
	case cay.CodeTemplateNotFound:
		return nil, errNoTemplate(r.TemplateID)
	case cay.CodeConflict: // the public contract has 400 for it
		return nil, &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerTemplate,
			Message: "the template '" + r.TemplateID + "' has sandboxes that run or are paused, or snapshots", Fix: "remove them first; see `cay sandbox list` and `cay snapshot list`", Err: err}
	default:
		return nil, err
	}
}

// ListTemplateTags implements the generated interface.
func (s templateHandlers) ListTemplateTags(ctx context.Context, r gen.ListTemplateTagsRequestObject) (gen.ListTemplateTagsResponseObject, error) {
	t, err := s.find(ctx, r.TemplateID)
	if err != nil {
		return nil, err
	}
	return gen.ListTemplateTags200JSONResponse{{Tag: store.DefaultTag, BuildID: string(t.Current.ID), CreatedAt: t.Current.CreatedAt}}, nil
}

// find resolves a reference for the caller's team.
func (s templateHandlers) find(ctx context.Context, text string) (store.Template, error) {
	ref, err := parseTemplateRef(text)
	if err != nil {
		return store.Template{}, err
	}
	t, err := s.Store.FindTemplate(ctx, callerOf(ctx).team.ID, ref)
	if cay.CodeOf(err) == cay.CodeTemplateNotFound {
		return t, errNoTemplate(text)
	}
	return t, err
}

// findOwn resolves a reference to a template that the team may change.
func (s templateHandlers) findOwn(ctx context.Context, text string) (store.Template, error) {
	t, err := s.find(ctx, text)
	if err == nil && t.Team != callerOf(ctx).team.ID {
		return t, errNoTemplate(text)
	}
	return t, err
}

// templates is the wire form of a list.
func (s templateHandlers) templates(ctx context.Context, rows []store.Template) ([]gen.Template, error) {
	out := make([]gen.Template, len(rows))
	for i, t := range rows {
		names, err := s.names(ctx, t)
		if err != nil {
			return nil, err
		}
		b := t.Current
		out[i] = gen.Template{TemplateID: string(t.ID), BuildID: string(b.ID), BuildStatus: gen.TemplateBuildStatusReady,
			CpuCount: int32(b.Resources.CPUs), MemoryMB: int32(b.Resources.MemoryMB), DiskSizeMB: int32(b.Resources.DiskMB),
			EnvdVersion: b.EnvdVersion, Public: t.Public, Aliases: []string{t.Name}, Names: names,
			CreatedAt: t.CreatedAt, UpdatedAt: t.UpdatedAt, LastSpawnedAt: instant(t.LastSpawnedAt),
			SpawnCount: t.SpawnCount, BuildCount: int32(t.BuildCount)}
	}
	return out, nil
}

// names returns the full names of a template.
func (s templateHandlers) names(ctx context.Context, t store.Template) ([]string, error) {
	team := callerOf(ctx).team
	if t.Team != team.ID {
		var err error
		if team, err = s.Store.Team(ctx, t.Team); err != nil {
			return nil, err
		}
	}
	return []string{team.Slug + "/" + t.Name}, nil
}

// instant is nil for never.
func instant(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}
