package api

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/operator"
	"github.com/cayhq/cay/store"
)

// archivePaths are those whose bodies are as large as a sandbox: they are not
// bounded in size or time, once it is known that the operator asks.
const archivePaths = "/operator/v1/archives"

// archivePage is how many builds are looked at in one step.
const archivePage = 100

// unbounded reports whether a request may take as long as it wants: also a
// replacement of envd, which the node bounds.
func unbounded(r *http.Request) bool {
	return strings.HasPrefix(r.URL.Path, archivePaths) || strings.HasPrefix(r.URL.Path, "/operator/v1/sandboxes/") && strings.HasSuffix(r.URL.Path, "/upgrade")
}

// unbind lifts the connection's deadlines.
func unbind(w http.ResponseWriter) error {
	c := http.NewResponseController(w)
	err := errors.Join(c.SetReadDeadline(time.Time{}), c.SetWriteDeadline(time.Time{}))
	if errors.Is(err, http.ErrNotSupported) {
		return nil // a writer without a connection has none
	}
	return err
}

func (s operatorHandlers) archives() (cay.Archives, error) {
	a, ok := s.Snapshots.(cay.Archives)
	if !ok {
		return nil, absent("moving snapshots in archives", "use a node that keeps snapshots")
	}
	return a, nil
}

// ExportSnapshot implements the generated interface.
func (s operatorHandlers) ExportSnapshot(ctx context.Context, r operator.ExportSnapshotRequestObject) (operator.ExportSnapshotResponseObject, error) {
	a, err := s.archives()
	if err != nil {
		return nil, err
	}
	body, size, err := a.OpenArchive(ctx, cay.SnapshotID(r.SnapshotID))
	if err != nil {
		return nil, err
	}
	return operator.ExportSnapshot200ApplicationxTarResponse{Body: body, ContentLength: size}, nil
}

// ImportSnapshot implements the generated interface. What a crash leaves between
// the node's part and the record is an orphan.
func (s operatorHandlers) ImportSnapshot(ctx context.Context, r operator.ImportSnapshotRequestObject) (operator.ImportSnapshotResponseObject, error) {
	a, err := s.archives()
	if err != nil {
		return nil, err
	}
	team, err := s.Store.Team(ctx, cay.TeamID(r.Params.TeamID))
	if err != nil {
		return nil, err
	}
	row := store.Snapshot{ID: cay.NewSnapshotID(), Team: team.ID}
	if r.Params.Name != nil {
		if row.Name, row.Tag, err = snapshotName(team, *r.Params.Name); err != nil {
			return nil, err
		}
		if row.Name != "" && s.taken(ctx, team, row.Name) { // known before all of it is sent
			return nil, errTaken(row.Name)
		}
	}
	defer s.life.pin(row.ID)()
	m, err := a.ReceiveArchive(ctx, row.ID, r.Body, func(m cay.Snapshot, template string) error {
		t, err := s.templateOf(ctx, team, m, template)
		row.Template, row.Alias = t.ID, t.Name
		return err
	})
	if err != nil {
		// The answer reaches only who has sent everything.
		_, _ = io.Copy(io.Discard, r.Body)
		return nil, err
	}
	m.Team = team.ID
	row.Sandbox, row.Build, row.Resources = m.Sandbox, m.Build, m.Resources
	row.EnvdVersion, row.Memory, row.CreatedAt = m.EnvdVersion, len(m.Memory) > 0, s.life.now()
	keep, stop := detached(ctx, recordTimeout)
	defer stop()
	if err := s.Store.AddSnapshot(keep, row); err != nil {
		s.life.discard(row.ID)
		return nil, err
	}
	names := []string{}
	if row.Name != "" {
		names = []string{row.Name + ":" + row.Tag}
	}
	return operator.ImportSnapshot201JSONResponse(snapshotRow(m, "client", names)), nil
}

// templateOf finds the template, and in it the build, that a snapshot was made
// from, among those of the team.
func (s operatorHandlers) templateOf(ctx context.Context, team cay.Team, m cay.Snapshot, name string) (store.Template, error) {
	t, err := s.Store.FindTemplate(ctx, team.ID, store.TemplateRef{Name: string(m.Template)})
	if cay.CodeOf(err) == cay.CodeTemplateNotFound {
		t, err = s.Store.FindTemplate(ctx, team.ID, store.TemplateRef{Name: name})
	}
	for after := (store.Cursor{}); err == nil; {
		var builds []store.Build
		if builds, err = s.Store.ListBuilds(ctx, t.ID, after, archivePage); err != nil {
			break
		}
		for _, b := range builds {
			if b.ID == m.Build {
				return t, nil
			}
			after = store.Cursor{At: b.CreatedAt, ID: string(b.ID)}
		}
		if len(builds) < archivePage {
			err = &cay.Error{Code: cay.CodeTemplateNotFound}
		}
	}
	if cay.CodeOf(err) == cay.CodeTemplateNotFound {
		return t, &cay.Error{Code: cay.CodeTemplateNotFound, Layer: cay.LayerTemplate,
			Message: "the snapshot in the archive was made from build " + string(m.Build) + " of template " + name + ", which team " + team.Slug + " does not have",
			Fix:     "import it for a team that has the template, or on a server that has this very build"}
	}
	return t, err
}
