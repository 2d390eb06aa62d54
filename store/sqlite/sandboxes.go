package sqlite

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/sqlite"
	"github.com/cayhq/cay/store"
)

// asJSON is v as the queries compare it: without HTML escapes.
func asJSON(v any) (string, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return "", fmt.Errorf("encoding: %w", err)
	}
	return string(bytes.TrimSuffix(b.Bytes(), []byte("\n"))), nil
}

func metadataJSON(m map[string]string) (string, error) {
	if len(m) == 0 {
		return "{}", nil
	}
	return asJSON(m)
}

func statesJSON(states []cay.SandboxState) (string, error) {
	if len(states) == 0 {
		return "[]", nil
	}
	return asJSON(states)
}

func sandboxRow(sb store.Sandbox) (gen.Sandbox, error) {
	metadata, err := metadataJSON(sb.Metadata)
	if err != nil {
		return gen.Sandbox{}, err
	}
	options := sb.Options
	if len(options) == 0 {
		options = nil
	}
	history := "[]"
	if len(sb.History) > 0 {
		kept := slices.Clone(sb.History)
		for i := range kept {
			kept[i].At = kept[i].At.UTC().Truncate(time.Microsecond)
		}
		if history, err = asJSON(kept); err != nil {
			return gen.Sandbox{}, err
		}
	}
	return gen.Sandbox{
		ID: string(sb.ID), TeamID: string(sb.Team), TemplateID: string(sb.Template), Alias: sb.Alias,
		BuildID: string(sb.Build), NodeID: string(sb.Node), State: string(sb.State),
		Cpus: int64(sb.Resources.CPUs), MemoryMb: int64(sb.Resources.MemoryMB), DiskMb: int64(sb.Resources.DiskMB),
		EnvdVersion: sb.EnvdVersion, Metadata: metadata, Secure: sb.Secure, AllowInternet: sb.AllowInternet, Options: options,
		CreatedAt: micros(sb.CreatedAt), StartedAt: micros(sb.StartedAt),
		Deadline: micros(sb.Deadline), MaxDeadline: micros(sb.MaxDeadline),
		EndedAt: micros(sb.EndedAt), EndReason: string(sb.EndReason), EndMessage: sb.EndMessage,
		Execution: string(sb.Execution), Snapshot: string(sb.Snapshot), SnapshotMemory: sb.SnapshotMemory, PausedAt: micros(sb.PausedAt),
		Origin: string(sb.Origin), Parent: string(sb.Parent), History: history,
	}, nil
}

func sandbox(r gen.Sandbox) (store.Sandbox, error) {
	sb := store.Sandbox{
		ID: cay.SandboxID(r.ID), Team: cay.TeamID(r.TeamID), Template: cay.TemplateID(r.TemplateID), Alias: r.Alias,
		Build: cay.BuildID(r.BuildID), Node: cay.NodeID(r.NodeID), State: cay.SandboxState(r.State),
		Resources: resources(r.Cpus, r.MemoryMb, r.DiskMb), EnvdVersion: r.EnvdVersion,
		Secure: r.Secure, AllowInternet: r.AllowInternet, Options: r.Options,
		CreatedAt: instant(r.CreatedAt), StartedAt: instant(r.StartedAt),
		Deadline: instant(r.Deadline), MaxDeadline: instant(r.MaxDeadline),
		EndedAt: instant(r.EndedAt), EndReason: cay.EndReason(r.EndReason), EndMessage: r.EndMessage,
		Execution: cay.ExecutionID(r.Execution), Snapshot: cay.SnapshotID(r.Snapshot), SnapshotMemory: r.SnapshotMemory, PausedAt: instant(r.PausedAt),
		Origin: cay.SnapshotID(r.Origin), Parent: cay.SandboxID(r.Parent),
	}
	if r.History != "[]" {
		if err := json.Unmarshal([]byte(r.History), &sb.History); err != nil {
			return store.Sandbox{}, internal("the history of sandbox " + r.ID + " is recorded in a wrong form: " + err.Error())
		}
	}
	if r.Metadata == "{}" {
		return sb, nil
	}
	if err := json.Unmarshal([]byte(r.Metadata), &sb.Metadata); err != nil {
		return store.Sandbox{}, internal("the metadata of sandbox " + r.ID + " is recorded in a wrong form: " + err.Error())
	}
	return sb, nil
}

func noSandbox(id cay.SandboxID) error {
	return &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerAPI,
		Message: "sandbox " + string(id) + " not found", Fix: "list the team's sandboxes with `cay sandbox list`"}
}

// checkEnd refuses a record whose end and state contradict each other.
func checkEnd(sb store.Sandbox) error {
	ended := sb.State == cay.StateEnded
	reasonMayBe := sb.State == cay.StateKilling || ended != (sb.EndReason == "")
	if ended == sb.EndedAt.IsZero() || !reasonMayBe {
		return internal(fmt.Sprintf("sandbox %s would be recorded as %q with end %v and reason %q", sb.ID, sb.State, sb.EndedAt, sb.EndReason))
	}
	return nil
}

// AddSandbox implements [store.Sandboxes]. It is not flushed: nobody has been
// told the ID, and the update that says "running" is.
func (s *Store) AddSandbox(ctx context.Context, sb store.Sandbox, limit int) error {
	if err := checkEnd(sb); err != nil {
		return err
	}
	r, err := sandboxRow(sb)
	if err != nil {
		return s.fail("record the sandbox", err)
	}
	return s.write(ctx, "record the sandbox", unflushed, func(ctx context.Context, q *gen.Queries) error {
		if err := room(ctx, q, r.TeamID, limit); err != nil {
			return err
		}
		if err := q.AddSandbox(ctx, gen.AddSandboxParams(r)); err != nil {
			return err
		}
		n, err := q.CountSpawn(ctx, gen.CountSpawnParams{At: r.CreatedAt, ID: r.TemplateID, BuildID: r.BuildID})
		return touched(n, err, noTemplate(r.TemplateID))
	})
}

// room refuses one more sandbox than the team may have.
func room(ctx context.Context, q *gen.Queries, team string, limit int) error {
	held, err := q.CountHeld(ctx, team)
	if err != nil || held < int64(limit) {
		return err
	}
	return &cay.Error{Code: cay.CodeTooManySandboxes, Layer: cay.LayerQuota,
		Message: fmt.Sprintf("the team has %d sandboxes, and its limit is %d", held, limit),
		Fix:     "kill or pause a sandbox that is not needed, or raise the team's limit"}
}

// FindSandbox implements [store.Sandboxes].
func (s *Store) FindSandbox(ctx context.Context, t cay.TeamID, id cay.SandboxID) (sb store.Sandbox, err error) {
	err = s.read("look up the sandbox", func(q *gen.Queries) error {
		sb, err = find(ctx, q, t, id)
		return err
	})
	return sb, err
}

func find(ctx context.Context, q *gen.Queries, t cay.TeamID, id cay.SandboxID) (store.Sandbox, error) {
	r, err := q.FindSandbox(ctx, gen.FindSandboxParams{ID: string(id), TeamID: string(t)})
	if errors.Is(err, sql.ErrNoRows) {
		return store.Sandbox{}, noSandbox(id)
	}
	if err != nil {
		return store.Sandbox{}, err
	}
	return sandbox(r)
}

// UpdateSandbox implements [store.Sandboxes]. A change that alters nothing is
// not written.
func (s *Store) UpdateSandbox(ctx context.Context, id cay.SandboxID, change func(*store.Sandbox) error) (store.Sandbox, error) {
	return s.update(ctx, id, change, func(context.Context, *gen.Queries, gen.Sandbox, store.Sandbox) error { return nil })
}

// AdmitSandbox implements [store.Sandboxes].
func (s *Store) AdmitSandbox(ctx context.Context, id cay.SandboxID, limit int, change func(*store.Sandbox) error) (store.Sandbox, error) {
	return s.update(ctx, id, change, func(ctx context.Context, q *gen.Queries, old gen.Sandbox, sb store.Sandbox) error {
		if cay.SandboxState(old.State).Holds() || !sb.State.Holds() {
			return nil
		}
		return room(ctx, q, old.TeamID, limit)
	})
}

func (s *Store) update(ctx context.Context, id cay.SandboxID, change func(*store.Sandbox) error,
	admit func(context.Context, *gen.Queries, gen.Sandbox, store.Sandbox) error) (store.Sandbox, error) {
	var out store.Sandbox
	var refused error
	err := s.write(ctx, "record the sandbox's change", flushed, func(ctx context.Context, q *gen.Queries) error {
		r, err := q.FindSandbox(ctx, gen.FindSandboxParams{ID: string(id)})
		if errors.Is(err, sql.ErrNoRows) {
			return noSandbox(id)
		}
		if err != nil {
			return err
		}
		sb, err := sandbox(r)
		if err != nil {
			return err
		}
		if refused = change(&sb); refused != nil {
			return refused
		}
		if err := admit(ctx, q, r, sb); err != nil {
			return err
		}
		out, err = s.replace(ctx, q, r, sb)
		return err
	})
	if refused != nil {
		return store.Sandbox{}, refused
	}
	return out, err
}

func (s *Store) replace(ctx context.Context, q *gen.Queries, old gen.Sandbox, sb store.Sandbox) (store.Sandbox, error) {
	r, err := sandboxRow(sb)
	if err != nil {
		return store.Sandbox{}, err
	}
	if r.ID != old.ID || r.TeamID != old.TeamID || r.TemplateID != old.TemplateID ||
		r.Alias != old.Alias || r.BuildID != old.BuildID || r.Origin != old.Origin || r.Parent != old.Parent || r.CreatedAt != old.CreatedAt {
		return store.Sandbox{}, internal("a change of sandbox " + old.ID + " would alter what identifies it")
	}
	if reflect.DeepEqual(old, r) {
		return sandbox(r)
	}
	if old.State == string(cay.StateEnded) {
		return store.Sandbox{}, &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerAPI,
			Message: "sandbox " + old.ID + " has ended (" + old.EndReason + "); its record is final", Fix: "create a new sandbox"}
	}
	if err := checkEnd(sb); err != nil {
		return store.Sandbox{}, err
	}
	err = q.UpdateSandbox(ctx, gen.UpdateSandboxParams{
		NodeID: r.NodeID, State: r.State, Cpus: r.Cpus, MemoryMb: r.MemoryMb, DiskMb: r.DiskMb, EnvdVersion: r.EnvdVersion,
		Metadata: r.Metadata, Secure: r.Secure, AllowInternet: r.AllowInternet, Options: r.Options,
		StartedAt: r.StartedAt, Deadline: r.Deadline, MaxDeadline: r.MaxDeadline,
		EndedAt: r.EndedAt, EndReason: r.EndReason, EndMessage: r.EndMessage,
		Execution: r.Execution, Snapshot: r.Snapshot, SnapshotMemory: r.SnapshotMemory, PausedAt: r.PausedAt, History: r.History, ID: r.ID,
	})
	if err != nil {
		return store.Sandbox{}, err
	}
	return sandbox(r)
}

// ListSandboxes implements [store.Sandboxes].
func (s *Store) ListSandboxes(ctx context.Context, f store.SandboxFilter) ([]store.Sandbox, error) {
	metadata, err := metadataJSON(f.Metadata)
	if err != nil {
		return nil, s.fail("list the sandboxes", err)
	}
	states, err := statesJSON(f.States)
	if err != nil {
		return nil, s.fail("list the sandboxes", err)
	}
	p := gen.ListSandboxesDownParams{
		TeamID: string(f.Team), TemplateID: string(f.Template), States: states, Metadata: metadata,
		StartedAfter: math.MinInt64, AfterAt: before(f.After), AfterID: f.After.ID, Max: atMost(f.Limit),
	}
	if !f.StartedAfter.IsZero() {
		p.StartedAfter = micros(f.StartedAfter)
	}
	var out []store.Sandbox
	err = s.read("list the sandboxes", func(q *gen.Queries) error {
		var rows []gen.Sandbox
		var err error
		if f.Ascending {
			if f.After == (store.Cursor{}) {
				p.AfterAt = math.MinInt64
			}
			rows, err = q.ListSandboxesUp(ctx, gen.ListSandboxesUpParams(p))
		} else {
			rows, err = q.ListSandboxesDown(ctx, p)
		}
		if err != nil {
			return err
		}
		for _, r := range rows {
			sb, err := sandbox(r)
			if err != nil {
				return err
			}
			out = append(out, sb)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// CountSandboxes implements [store.Sandboxes].
func (s *Store) CountSandboxes(ctx context.Context, t cay.TeamID, states ...cay.SandboxState) (int, error) {
	in, err := statesJSON(states)
	if err != nil {
		return 0, s.fail("count the sandboxes", err)
	}
	var n int64
	err = s.read("count the sandboxes", func(q *gen.Queries) (err error) {
		if slices.Contains(states, cay.StateEnded) {
			n, err = q.CountAny(ctx, gen.CountAnyParams{TeamID: string(t), States: in})
		} else {
			n, err = q.CountLive(ctx, gen.CountLiveParams{TeamID: string(t), States: in})
		}
		return err
	})
	return int(n), err
}

// MoveDeadlines implements [store.Sandboxes].
func (s *Store) MoveDeadlines(ctx context.Context, step time.Duration, states ...cay.SandboxState) (int, error) {
	in, err := statesJSON(states)
	if err != nil {
		return 0, s.fail("move the deadlines", err)
	}
	var n int64
	err = s.write(ctx, "move the deadlines", flushed, func(ctx context.Context, q *gen.Queries) (err error) {
		n, err = q.MoveDeadlines(ctx, gen.MoveDeadlinesParams{Step: step.Microseconds(), States: in})
		return err
	})
	return int(n), err
}

// PruneSandboxes implements [store.Sandboxes].
func (s *Store) PruneSandboxes(ctx context.Context, t time.Time) (int, error) {
	var n int64
	err := s.write(ctx, "prune the record", unflushed, func(ctx context.Context, q *gen.Queries) (err error) {
		n, err = q.PruneSandboxes(ctx, micros(t))
		return err
	})
	return int(n), err
}
