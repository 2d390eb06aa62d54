package api

import (
	"context"
	"encoding/base64"
	"errors"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/store"
)

// defaultLimit is the length of a page when the client doesn't say.
const defaultLimit = 100

// The states that clients ask for, as the record has them.
var (
	runningStates = []cay.SandboxState{cay.StateRunning, cay.StateSnapshotting}
	pausedStates  = []cay.SandboxState{cay.StatePausing, cay.StatePaused, cay.StateResuming}
)

// ListSandboxes implements the generated interface.
func (s sandboxHandlers) ListSandboxes(ctx context.Context, r gen.ListSandboxesRequestObject) (gen.ListSandboxesResponseObject, error) {
	f := store.SandboxFilter{Team: callerOf(ctx).team.ID, States: runningStates}
	var err error
	if f.Metadata, err = parseMetadata(r.Params.Metadata); err != nil {
		return nil, err
	}
	rows, err := s.Store.ListSandboxes(ctx, f)
	if err != nil {
		return nil, err
	}
	return gen.ListSandboxes200JSONResponse(listAll(rows)), nil
}

// ListSandboxesV2 implements the generated interface.
func (s sandboxHandlers) ListSandboxesV2(ctx context.Context, r gen.ListSandboxesV2RequestObject) (gen.ListSandboxesV2ResponseObject, error) {
	p := r.Params
	f := store.SandboxFilter{Team: callerOf(ctx).team.ID,
		Ascending: p.Order != nil && *p.Order == gen.Asc}
	var err error
	if f.Metadata, err = parseMetadata(p.Metadata); err != nil {
		return nil, err
	}
	if p.StartedAfter != nil {
		f.StartedAfter = p.StartedAfter.UTC()
	}
	if f.After, err = parseCursor(p.NextToken, f.Ascending); err != nil {
		return nil, err
	}
	out := gen.ListSandboxesV2200JSONResponse{Body: []gen.ListedSandbox{}}
	running := len(p.State) == 0 || slices.Contains(p.State, gen.Running)
	if running {
		f.States = append(f.States, runningStates...)
	}
	if len(p.State) == 0 || slices.Contains(p.State, gen.Paused) {
		f.States = append(f.States, pausedStates...)
	}
	if p.Template != nil && *p.Template != "" {
		if f.Template, err = s.templateFilter(ctx, *p.Template); err != nil {
			return nil, err
		}
		if f.Template == "" {
			if running {
				out.Headers.XTotalRunning = new(int)
			}
			return out, nil
		}
	}
	if running {
		total, err := s.total(ctx, f)
		if err != nil {
			return nil, err
		}
		out.Headers.XTotalRunning = &total
	}
	limit := pageLimit(p.Limit)
	f.Limit = limit + 1 // one more says whether there is a next page
	rows, err := s.Store.ListSandboxes(ctx, f)
	if err != nil {
		return nil, err
	}
	rows, out.Headers.XNextToken = page(rows, limit, f.Ascending, func(sb store.Sandbox) store.Cursor {
		return store.Cursor{At: sb.StartedAt, ID: string(sb.ID)}
	})
	out.Body = listAll(rows)
	return out, nil
}

// total counts the running sandboxes that match, over all pages.
func (s sandboxHandlers) total(ctx context.Context, f store.SandboxFilter) (int, error) {
	f.States = runningStates
	if len(f.Metadata) == 0 && f.Template == "" && f.StartedAfter.IsZero() {
		return s.Store.CountSandboxes(ctx, f.Team, f.States...)
	}
	f.After = store.Cursor{}
	rows, err := s.Store.ListSandboxes(ctx, f)
	return len(rows), err
}

// templateFilter returns the template that a filter names; empty if there is
// none.
func (s sandboxHandlers) templateFilter(ctx context.Context, text string) (cay.TemplateID, error) {
	ref, err := parseTemplateRef(text)
	if err != nil {
		return "", err
	}
	if ref.Tag != "" {
		return "", invalid("the parameter \"template\" has the tag %q, and sandboxes cannot be told apart by tag", "leave the tag out", ref.Tag)
	}
	t, err := s.Store.FindTemplate(ctx, callerOf(ctx).team.ID, ref)
	if cay.CodeOf(err) == cay.CodeTemplateNotFound {
		return "", nil
	}
	return t.ID, err
}

func listAll(rows []store.Sandbox) []gen.ListedSandbox {
	out := make([]gen.ListedSandbox, len(rows))
	for i, r := range rows {
		out[i] = listed(r)
	}
	return out
}

func pageLimit(p *int32) int {
	if p == nil {
		return defaultLimit
	}
	return int(*p)
}

// page cuts rows, of which one more than limit was asked for, to a page, and
// returns the token of the next one, if there is one. at is a row's place.
func page[T any](rows []T, limit int, ascending bool, at func(T) store.Cursor) ([]T, *string) {
	if len(rows) <= limit {
		return rows, nil
	}
	rows = rows[:limit]
	token := formatCursor(at(rows[limit-1]), ascending)
	return rows, &token
}

// parseMetadata parses the metadata filter. The clients encode keys and values,
// join them, and encode the whole; the query parser has decoded once (e2b.md
// 1.4, List v2).
func parseMetadata(text *string) (map[string]string, error) {
	if text == nil || *text == "" {
		return nil, nil
	}
	const fix = "send key=value pairs joined by &, keys and values URL encoded"
	whole, err := url.QueryUnescape(*text)
	if err != nil {
		return nil, invalid("the parameter \"metadata\" is not URL encoded: %v", fix, err)
	}
	out := map[string]string{}
	for _, pair := range strings.Split(whole, "&") {
		k, v, ok := strings.Cut(pair, "=")
		if !ok || strings.Contains(v, "=") {
			return nil, invalid("the parameter \"metadata\" has the part %q, which is not key=value", fix, pair)
		}
		key, err1 := url.QueryUnescape(k)
		value, err2 := url.QueryUnescape(v)
		if err := errors.Join(err1, err2); err != nil {
			return nil, invalid("the parameter \"metadata\" is not URL encoded: %v", fix, err)
		}
		out[key] = value
	}
	return out, nil
}

// formatCursor writes a place in a list as a client carries it: opaque, and
// bound to the order of the list.
func formatCursor(c store.Cursor, ascending bool) string {
	text := c.At.UTC().Format(time.RFC3339Nano) + "__" + c.ID
	if ascending {
		text += "__asc"
	}
	return base64.URLEncoding.EncodeToString([]byte(text))
}

// parseCursor reads what [formatCursor] wrote.
func parseCursor(token *string, ascending bool) (store.Cursor, error) {
	if token == nil || *token == "" {
		return store.Cursor{}, nil
	}
	const fix = "send the X-Next-Token of the page before, with the same filters"
	b, err := base64.URLEncoding.DecodeString(*token)
	if err != nil {
		return store.Cursor{}, invalid("the parameter \"nextToken\" is not a token of this server", fix)
	}
	parts := strings.Split(string(b), "__")
	if asc := len(parts) == 3 && parts[2] == "asc"; len(parts) == 2 || asc {
		if asc != ascending {
			return store.Cursor{}, invalid("the parameter \"nextToken\" is of a list in the other order", fix)
		}
		at, err := time.Parse(time.RFC3339Nano, parts[0])
		if err == nil && parts[1] != "" {
			return store.Cursor{At: at.UTC(), ID: parts[1]}, nil
		}
	}
	return store.Cursor{}, invalid("the parameter \"nextToken\" is not a token of this server", fix)
}
