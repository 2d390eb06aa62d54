package api

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/store"
)

// PauseSandbox implements the generated interface.
func (s sandboxHandlers) PauseSandbox(ctx context.Context, r gen.PauseSandboxRequestObject) (gen.PauseSandboxResponseObject, error) {
	id, err := cay.ParseSandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	q := cay.SaveRequest{Memory: true}
	if r.Body != nil {
		q.Memory = r.Body.Memory == nil || *r.Body.Memory
		q.Healthy = r.Body.RequireHealthyGuest != nil && *r.Body.RequireHealthyGuest
	}
	if err := s.life.pause(ctx, callerOf(ctx).team.ID, id, q, nil); err != nil {
		return nil, err
	}
	return gen.PauseSandbox204Response{}, nil
}

// ConnectSandbox implements the generated interface.
func (s sandboxHandlers) ConnectSandbox(ctx context.Context, r gen.ConnectSandboxRequestObject) (gen.ConnectSandboxResponseObject, error) {
	rec, resumed, err := s.connect(ctx, r.SandboxID, r.Body.Timeout, modeOf(r.Body.Memory))
	if err != nil {
		return nil, err
	}
	if resumed {
		return gen.ConnectSandbox201JSONResponse(s.sandbox(rec)), nil
	}
	return gen.ConnectSandbox200JSONResponse(s.sandbox(rec)), nil
}

// ConnectSandboxV2 implements the generated interface.
func (s sandboxHandlers) ConnectSandboxV2(ctx context.Context, r gen.ConnectSandboxV2RequestObject) (gen.ConnectSandboxV2ResponseObject, error) {
	seconds, mode := int32(defaultTimeoutV2), cay.StartAuto
	if r.Body != nil {
		mode = modeOf(r.Body.Memory)
		if r.Body.Timeout != nil {
			seconds = *r.Body.Timeout
		}
	}
	rec, resumed, err := s.connect(ctx, r.SandboxID, seconds, mode)
	if err != nil {
		return nil, err
	}
	if resumed {
		return gen.ConnectSandboxV2201JSONResponse(s.sandbox(rec)), nil
	}
	return gen.ConnectSandboxV2200JSONResponse(s.sandbox(rec)), nil
}

// ResumeSandbox implements the generated interface.
func (s sandboxHandlers) ResumeSandbox(ctx context.Context, r gen.ResumeSandboxRequestObject) (gen.ResumeSandboxResponseObject, error) {
	seconds, mode := int32(defaultTimeoutV1), cay.StartAuto
	if r.Body != nil {
		mode = modeOf(r.Body.Memory)
		if r.Body.Timeout != nil {
			seconds = *r.Body.Timeout
		}
	}
	rec, _, err := s.takeUp(ctx, r.SandboxID, seconds, mode, func(id cay.SandboxID) error {
		return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerAPI,
			Message: fmt.Sprintf("sandbox '%s' is running already", id), Fix: "connect to it"}
	})
	if err != nil {
		return nil, err
	}
	return gen.ResumeSandbox201JSONResponse(s.sandbox(rec)), nil
}

// modeOf is how a client wishes a paused sandbox to be started.
func modeOf(memory *bool) cay.StartMode {
	switch {
	case memory == nil:
		return cay.StartAuto
	case *memory:
		return cay.StartRestore
	}
	return cay.StartCold
}

// connect takes up a running sandbox, or resumes a paused one. The end of a
// running one is only ever moved later, so that two clients of one sandbox don't
// shorten each other's time.
func (s sandboxHandlers) connect(ctx context.Context, ref string, seconds int32, mode cay.StartMode) (store.Sandbox, bool, error) {
	return s.takeUp(ctx, ref, seconds, mode, nil)
}

// takeUp resumes a paused sandbox, and extends the life of one that runs, unless
// refuse says why not. It waits out what others do with it.
func (s sandboxHandlers) takeUp(ctx context.Context, ref string, seconds int32, mode cay.StartMode,
	refuse func(cay.SandboxID) error) (rec store.Sandbox, resumed bool, err error) {
	id, err := cay.ParseSandboxID(ref)
	if err != nil {
		return rec, false, err
	}
	team, d := callerOf(ctx).team, time.Duration(seconds)*time.Second
	if err := checkLength(team, d); err != nil {
		return rec, false, err
	}
	wait, stop := context.WithTimeout(ctx, patience)
	defer stop()
	for {
		rec, err := s.find(ctx, string(id))
		if err != nil {
			return rec, false, err
		}
		switch {
		case rec.State == cay.StateEnded:
			return rec, false, errNoSandbox(id)
		case rec.State == cay.StateKilling:
			return rec, false, errTransition(id, rec.State)
		case rec.State.Runs() && refuse != nil:
			return rec, false, refuse(id)
		case rec.State.Runs():
			rec, err = s.extend(ctx, id, d)
			if code := cay.CodeOf(err); code != cay.CodeSandboxTransition && code != cay.CodeConflict {
				return rec, false, err
			}
			continue // it has just moved
		case rec.State == cay.StatePaused:
			rec, err = s.life.resume(ctx, team, id, d, mode)
			if !errors.Is(err, errBusy) {
				return rec, err == nil, resumeError(err)
			}
		}
		if wait.Err() != nil {
			return rec, false, errTransition(id, rec.State)
		}
		s.life.await(wait, id)
	}
}

// resumeError is [placeError] for a resume.
func resumeError(err error) error {
	switch cay.CodeOf(err) {
	case "", cay.CodeSandboxNotFound, cay.CodeNotImplemented:
		return err
	}
	return placeError(err)
}

// CreateSnapshot implements the generated interface.
func (s sandboxHandlers) CreateSnapshot(ctx context.Context, r gen.CreateSnapshotRequestObject) (gen.CreateSnapshotResponseObject, error) {
	id, err := cay.ParseSandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	team := callerOf(ctx).team
	var name, tag string
	if r.Body.Name != nil {
		if name, tag, err = snapshotName(team, *r.Body.Name); err != nil {
			return nil, err
		}
	}
	snap := store.Snapshot{ID: cay.NewSnapshotID(), Team: team.ID, Name: name, Tag: tag}
	q := cay.SaveRequest{Snapshot: snap.ID, Memory: r.Body.Memory == nil || *r.Body.Memory}
	_, err = s.snapshotWhenFree(ctx, team.ID, id, q, func(ctx context.Context, rec store.Sandbox, m cay.Snapshot) error {
		snap.Sandbox, snap.Template, snap.Alias, snap.Build = rec.ID, rec.Template, rec.Alias, rec.Build
		snap.Resources, snap.EnvdVersion, snap.Memory = rec.Resources, rec.EnvdVersion, len(m.Memory) > 0
		if m.EnvdVersion != "" {
			snap.EnvdVersion = m.EnvdVersion
		}
		snap.CreatedAt = s.life.now()
		var err error
		if snap.Options, err = json.Marshal(s.egressOf(rec)); err != nil {
			return err
		}
		return s.Store.AddSnapshot(ctx, snap)
	})
	switch cay.CodeOf(err) {
	case "":
		return gen.CreateSnapshot201JSONResponse(snapshotInfo(team, snap)), nil
	case cay.CodeConflict:
		if name != "" && errors.Is(err, &cay.Error{Code: cay.CodeConflict}) && s.taken(ctx, team, name) {
			return nil, errTaken(name)
		}
	}
	return nil, err
}

// snapshotName parses what a team calls a snapshot: nothing, name or name:tag,
// with or without its own namespace.
func snapshotName(team cay.Team, text string) (name, tag string, err error) {
	if text == "" {
		return "", "", nil
	}
	ref, err := parseTemplateRef(text)
	if err != nil {
		return "", "", err
	}
	if ref.Namespace != "" && ref.Namespace != team.Slug {
		return "", "", invalid("the name %q is in the namespace %q, and your team's is %q", "leave the namespace out", text, ref.Namespace, team.Slug)
	}
	return ref.Name, cmp.Or(ref.Tag, store.DefaultTag), nil
}

func errTaken(name string) error {
	return invalid("a template of your team is called %q already", "give the snapshot another name", name)
}

// taken reports whether a template of the team has the name.
func (s *Server) taken(ctx context.Context, team cay.Team, name string) bool {
	t, err := s.Store.FindTemplate(ctx, team.ID, store.TemplateRef{Namespace: team.Slug, Name: name})
	return err == nil && t.Team == team.ID
}

// snapshotWhenFree makes a snapshot as soon as nothing else is done with the
// sandbox.
func (s sandboxHandlers) snapshotWhenFree(ctx context.Context, team cay.TeamID, id cay.SandboxID, q cay.SaveRequest,
	keep func(context.Context, store.Sandbox, cay.Snapshot) error) (store.Sandbox, error) {
	wait, stop := context.WithTimeout(ctx, patience)
	defer stop()
	for {
		rec, err := s.life.snapshot(ctx, team, id, q, keep)
		free := !errors.Is(err, errBusy) && !errors.Is(err, &cay.Error{Code: cay.CodeSandboxTransition})
		if free {
			return rec, err
		}
		if err := s.life.busy(ctx, team, id); cay.CodeOf(err) != cay.CodeSandboxTransition || wait.Err() != nil {
			return rec, err
		}
		s.life.await(wait, id)
	}
}

// snapshotInfo is the wire form of a snapshot. Its ID is a template reference.
func snapshotInfo(team cay.Team, n store.Snapshot) gen.SnapshotInfo {
	if n.Name == "" {
		return gen.SnapshotInfo{SnapshotID: string(n.ID) + ":" + store.DefaultTag, Names: []string{}}
	}
	full := team.Slug + "/" + n.Name + ":" + n.Tag
	return gen.SnapshotInfo{SnapshotID: full, Names: []string{full}}
}

// ListSnapshots implements the generated interface.
func (s sandboxHandlers) ListSnapshots(ctx context.Context, r gen.ListSnapshotsRequestObject) (gen.ListSnapshotsResponseObject, error) {
	team := callerOf(ctx).team
	out := gen.ListSnapshots200JSONResponse{Body: []gen.SnapshotInfo{}}
	f := store.SnapshotFilter{Team: team.ID}
	var err error
	if r.Params.SandboxID != nil && *r.Params.SandboxID != "" {
		if f.Sandbox, err = cay.ParseSandboxID(*r.Params.SandboxID); err != nil {
			return nil, err
		}
	}
	if r.Params.Name != nil && *r.Params.Name != "" {
		ref, err := parseTemplateRef(*r.Params.Name)
		if err != nil {
			return nil, err
		}
		if ref.Namespace != "" && ref.Namespace != team.Slug {
			return out, nil
		}
		f.Name, f.Tag = ref.Name, ref.Tag
	}
	if f.After, err = parseCursor(r.Params.NextToken, false); err != nil {
		return nil, err
	}
	limit := pageLimit(r.Params.Limit)
	f.Limit = limit + 1
	rows, err := s.Store.ListSnapshots(ctx, f)
	if err != nil {
		return nil, err
	}
	rows, out.Headers.XNextToken = page(rows, limit, false, func(n store.Snapshot) store.Cursor {
		return store.Cursor{At: n.CreatedAt, ID: string(n.ID)}
	})
	for _, n := range rows {
		out.Body = append(out.Body, snapshotInfo(team, n))
	}
	return out, nil
}

// deleteSnapshot removes a snapshot of the caller's team. The record goes first:
// what a crash leaves is an orphan.
func (s templateHandlers) deleteSnapshot(ctx context.Context, text string) error {
	ref, err := parseTemplateRef(text)
	if err != nil {
		return err
	}
	team := callerOf(ctx).team
	n, err := s.Store.FindSnapshot(ctx, team.ID, ref)
	if err == nil {
		s.Fault.Pass(killpoint.Drop, "api.row.before")
		err = s.Store.DeleteSnapshot(ctx, team.ID, n.ID)
		s.Fault.Pass(killpoint.Drop, "api.row.after")
	}
	if cay.CodeOf(err) == cay.CodeNotFound {
		return errNoTemplate(text)
	}
	if err != nil || s.Snapshots == nil {
		return err
	}
	keep, stop := detached(ctx, killTimeout)
	defer stop()
	return s.Snapshots.DeleteSnapshot(keep, n.ID)
}

// ForkSandbox implements the generated interface.
func (s sandboxHandlers) ForkSandbox(ctx context.Context, r gen.ForkSandboxRequestObject) (gen.ForkSandboxResponseObject, error) {
	id, err := cay.ParseSandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	team := callerOf(ctx).team
	seconds, count := int32(defaultTimeoutV1), 1
	if r.Body != nil && r.Body.Timeout != nil {
		seconds = *r.Body.Timeout
	}
	if r.Body != nil && r.Body.Count != nil {
		count = int(*r.Body.Count)
	}
	timeout, err := lifetime(team, seconds)
	if err != nil {
		return nil, err
	}
	if most := team.Limits.ConcurrentSandboxes; count >= most {
		return nil, invalid("count is %d, and with the sandbox itself the team's limit of %d would be passed", "ask for fewer forks", count, most)
	}
	snap := cay.NewSnapshotID()
	defer s.life.pin(snap)()
	src, err := s.snapshotWhenFree(ctx, team.ID, id, cay.SaveRequest{Snapshot: snap, Memory: true, Transient: true}, nil)
	if err != nil {
		return nil, err
	}
	s.Fault.Pass(killpoint.Fork, "api.saved")
	defer func() {
		s.Fault.Pass(killpoint.Fork, "api.discard")
		s.life.discard(snap)
	}()
	out := make(gen.ForkSandbox201JSONResponse, count)
	var wg sync.WaitGroup
	for i := range out {
		wg.Go(func() { out[i] = s.fork(ctx, team, src, snap, timeout) })
	}
	wg.Wait()
	return out, nil
}

// fork makes one sandbox from the snapshot of another: the same in everything
// but its identity.
func (s sandboxHandlers) fork(ctx context.Context, team cay.Team, src store.Sandbox, snap cay.SnapshotID, timeout time.Duration) gen.SandboxForkResult {
	rec := store.Sandbox{ID: cay.NewSandboxID(), Team: src.Team, Template: src.Template, Alias: src.Alias, Build: src.Build,
		Resources: src.Resources, EnvdVersion: src.EnvdVersion, Metadata: src.Metadata, Secure: src.Secure,
		AllowInternet: src.AllowInternet, Origin: snap, Parent: src.ID}
	opt := s.options(src)
	opt.Seconds = int32(timeout / time.Second)
	var err error
	if rec.Options, err = json.Marshal(opt); err == nil {
		var cfg cay.SandboxConfig
		if cfg, err = s.config(rec); err == nil {
			cfg.From, cfg.Mode = snap, cay.StartRestore
			rec, err = s.life.create(ctx, team, rec, cfg, timeout)
			s.Fault.Pass(killpoint.Fork, "api.made")
		}
	}
	if err != nil {
		s.failed.Add(1)
		e := s.explain(ctx, placeError(err))
		return gen.SandboxForkResult{Error: &e}
	}
	s.made.Add(1)
	made := s.sandbox(rec)
	return gen.SandboxForkResult{Sandbox: &made}
}
