package api

import (
	"context"
	"encoding/json"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/store"
)

// clientID is the constant that old clients expect (e2b.md 1.4).
const clientID = "6532622b"

// minRefresh is the least time that a refresh gives.
const minRefresh = 15 * time.Second

// GetSandbox implements the generated interface.
func (s sandboxHandlers) GetSandbox(ctx context.Context, r gen.GetSandboxRequestObject) (gen.GetSandboxResponseObject, error) {
	rec, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	if publicState[rec.State] == "" {
		return nil, errNoSandbox(rec.ID) // half made, or as good as gone
	}
	return gen.GetSandbox200JSONResponse(s.detail(rec)), nil
}

// KillSandbox implements the generated interface.
func (s sandboxHandlers) KillSandbox(ctx context.Context, r gen.KillSandboxRequestObject) (gen.KillSandboxResponseObject, error) {
	id, err := cay.ParseSandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	if err := s.life.kill(ctx, callerOf(ctx).team.ID, id, cay.EndRequest, ""); err != nil {
		return nil, err
	}
	return gen.KillSandbox204Response{}, nil
}

// SetSandboxTimeout implements the generated interface.
func (s sandboxHandlers) SetSandboxTimeout(ctx context.Context, r gen.SetSandboxTimeoutRequestObject) (gen.SetSandboxTimeoutResponseObject, error) {
	id, err := cay.ParseSandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	if r.Body == nil {
		return nil, invalid("the request has no body", `send a JSON object such as {"timeout": 300}`)
	}
	team := callerOf(ctx).team
	d := time.Duration(r.Body.Timeout) * time.Second
	if err := checkLength(team, d); err != nil {
		return nil, err
	}
	_, err = s.life.setDeadline(ctx, team.ID, id, func(_ *store.Sandbox, now time.Time) time.Time { return now.Add(d) })
	if err != nil {
		return nil, err
	}
	return gen.SetSandboxTimeout204Response{}, nil
}

// RefreshSandbox implements the generated interface.
func (s sandboxHandlers) RefreshSandbox(ctx context.Context, r gen.RefreshSandboxRequestObject) (gen.RefreshSandboxResponseObject, error) {
	id, err := cay.ParseSandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	d := minRefresh
	if r.Body != nil && r.Body.Duration != nil {
		d = max(d, time.Duration(*r.Body.Duration)*time.Second)
	}
	if _, err := s.extend(ctx, id, d); err != nil {
		return nil, err
	}
	return gen.RefreshSandbox204Response{}, nil
}

// extend makes a running sandbox of the caller live at least d from now on.
func (s sandboxHandlers) extend(ctx context.Context, id cay.SandboxID, d time.Duration) (store.Sandbox, error) {
	return s.life.setDeadline(ctx, callerOf(ctx).team.ID, id, func(rec *store.Sandbox, now time.Time) time.Time {
		if t := now.Add(d); t.After(rec.Deadline) {
			return t
		}
		return rec.Deadline
	})
}

// UpdateSandboxNetwork implements the generated interface. What is left out is
// cleared.
func (s sandboxHandlers) UpdateSandboxNetwork(ctx context.Context, r gen.UpdateSandboxNetworkRequestObject) (gen.UpdateSandboxNetworkResponseObject, error) {
	id, err := cay.ParseSandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	b := r.Body
	if b == nil {
		return nil, invalid("the request has no body", `send a JSON object such as {"denyOut": ["0.0.0.0/0"]}`)
	}
	wish := &gen.SandboxNetworkConfig{AllowOut: b.AllowOut, DenyOut: b.DenyOut, EgressProxy: b.EgressProxy, Rules: b.Rules}
	want, err := egress(wish, b.AllowInternetAccess)
	if err != nil {
		return nil, err
	}
	err = s.life.setEgress(ctx, callerOf(ctx).team.ID, id, want.egress, func(rec *store.Sandbox) error {
		o := s.options(*rec)
		if o.Network == nil {
			o.Network = &gen.SandboxNetworkConfig{}
		}
		n := o.Network
		n.AllowOut, n.DenyOut, n.EgressProxy, n.Rules = wish.AllowOut, wish.DenyOut, wish.EgressProxy, wish.Rules
		rec.AllowInternet = b.AllowInternetAccess
		rec.Options, err = json.Marshal(o)
		return err
	})
	if err != nil {
		return nil, err
	}
	return gen.UpdateSandboxNetwork204Response{}, nil
}

// find returns the record of a sandbox of the caller's team.
func (s sandboxHandlers) find(ctx context.Context, ref string) (store.Sandbox, error) {
	id, err := cay.ParseSandboxID(ref)
	if err != nil {
		return store.Sandbox{}, err
	}
	rec, err := s.Store.FindSandbox(ctx, callerOf(ctx).team.ID, id)
	if cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return rec, errNoSandbox(id)
	}
	return rec, err
}

// options decodes the wishes on record. An unreadable one is a defect that must
// not hide the sandbox.
func (s *Server) options(rec store.Sandbox) options {
	var o options
	if len(rec.Options) == 0 {
		return o
	}
	if err := json.Unmarshal(rec.Options, &o); err != nil {
		s.Log.Error("the options of a sandbox cannot be read", "sandbox", rec.ID, "error", err)
	}
	return o
}

// sandbox is the creator's view.
func (s *Server) sandbox(rec store.Sandbox) gen.Sandbox {
	out := gen.Sandbox{TemplateID: string(rec.Template), SandboxID: string(rec.ID), ClientID: clientID,
		EnvdVersion: rec.EnvdVersion, Alias: optional(rec.Alias), Domain: optional(s.Domain)}
	if rec.Secure {
		out.EnvdAccessToken = optional(AccessToken(s.Seed, rec.ID).Reveal())
	}
	if n := s.options(rec).Network; n != nil && n.AllowPublicTraffic != nil && !*n.AllowPublicTraffic {
		out.TrafficAccessToken = optional(trafficToken(s.Seed, rec.ID).Reveal())
	}
	return out
}

// publicState is what clients are told of the states; what is missing they are
// not told of.
var publicState = map[cay.SandboxState]gen.SandboxState{
	cay.StateRunning: gen.Running, cay.StateSnapshotting: gen.Running,
	cay.StatePausing: gen.Paused, cay.StatePaused: gen.Paused, cay.StateResuming: gen.Paused,
}

// endAt is when a sandbox ends or, paused, when it was paused.
func endAt(rec store.Sandbox) time.Time {
	if publicState[rec.State] == gen.Paused {
		return rec.PausedAt
	}
	return rec.Deadline
}

// detail is the full view of a running or paused sandbox.
func (s *Server) detail(rec store.Sandbox) gen.SandboxDetail {
	o := s.options(rec)
	out := gen.SandboxDetail{TemplateID: string(rec.Template), Alias: optional(rec.Alias), SandboxID: string(rec.ID),
		ClientID: clientID, StartedAt: rec.StartedAt, EndAt: endAt(rec), EnvdVersion: rec.EnvdVersion,
		AllowInternetAccess: rec.AllowInternet, Domain: optional(s.Domain),
		CpuCount: int32(rec.Resources.CPUs), MemoryMB: int32(rec.Resources.MemoryMB), DiskSizeMB: int32(rec.Resources.DiskMB),
		Metadata: labels(rec.Metadata), State: publicState[rec.State], Network: shown(o.Network),
		Lifecycle: &gen.SandboxLifecycle{AutoResume: o.AutoResume, OnTimeout: gen.Kill}}
	if o.AutoPause {
		out.Lifecycle.OnTimeout = gen.Pause
	}
	if rec.Secure {
		out.EnvdAccessToken = optional(AccessToken(s.Seed, rec.ID).Reveal())
	}
	return out
}

// listed is the view of a running or paused sandbox in a list.
func listed(rec store.Sandbox) gen.ListedSandbox {
	return gen.ListedSandbox{TemplateID: string(rec.Template), Alias: optional(rec.Alias), SandboxID: string(rec.ID),
		ClientID: clientID, StartedAt: rec.StartedAt, EndAt: endAt(rec), EnvdVersion: rec.EnvdVersion,
		CpuCount: int32(rec.Resources.CPUs), MemoryMB: int32(rec.Resources.MemoryMB), DiskSizeMB: int32(rec.Resources.DiskMB),
		Metadata: labels(rec.Metadata), State: publicState[rec.State]}
}

// labels is always an object: clients read it without asking.
func labels(m map[string]string) *gen.SandboxMetadata {
	out := gen.SandboxMetadata{}
	for k, v := range m {
		out[k] = v
	}
	return &out
}

// optional is nil for the empty text.
func optional(text string) *string {
	if text == "" {
		return nil
	}
	return &text
}
