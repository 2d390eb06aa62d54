package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/sqlite"
	"github.com/cayhq/cay/store"
)

func team(r gen.Team) cay.Team {
	return cay.Team{ID: cay.TeamID(r.ID), Name: r.Name, Slug: r.Slug, Limits: cay.TeamLimits{
		ConcurrentSandboxes: int(r.ConcurrentSandboxes), MaxLengthHours: int(r.MaxLengthHours),
		Network: cay.NetworkLimits{Connections: int(r.NetworkConnections), PerSecond: int(r.NetworkPerSecond), Mbit: int(r.NetworkMbit)}}}
}

func key(r gen.Key) store.Key {
	return store.Key{ID: store.KeyID(r.ID), Team: cay.TeamID(r.TeamID), Name: r.Name, Hash: r.Hash,
		Prefix: r.Prefix, Suffix: r.Suffix, Length: int(r.Length),
		CreatedAt: instant(r.CreatedAt), LastUsed: instant(r.LastUsed)}
}

var errKey = &cay.Error{Code: cay.CodeKeyNotFound, Layer: cay.LayerAuth,
	Message: "the API key does not exist", Fix: "list the team's keys with `cay key list`"}

// PutTeam implements [store.Teams].
func (s *Store) PutTeam(ctx context.Context, t cay.Team) error {
	return s.write(ctx, "record the team", flushed, func(ctx context.Context, q *gen.Queries) error {
		n := t.Limits.Network
		return q.PutTeam(ctx, gen.PutTeamParams{ID: string(t.ID), Name: t.Name, Slug: t.Slug,
			ConcurrentSandboxes: int64(t.Limits.ConcurrentSandboxes), MaxLengthHours: int64(t.Limits.MaxLengthHours),
			NetworkConnections: int64(n.Connections), NetworkPerSecond: int64(n.PerSecond), NetworkMbit: int64(n.Mbit)})
	})
}

// Team implements [store.Teams].
func (s *Store) Team(ctx context.Context, id cay.TeamID) (cay.Team, error) {
	var r gen.Team
	err := s.read("find the team", func(q *gen.Queries) (err error) {
		r, err = q.Team(ctx, string(id))
		if errors.Is(err, sql.ErrNoRows) {
			return &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerAuth, Message: "there is no team " + string(id)}
		}
		return err
	})
	if err != nil {
		return cay.Team{}, err
	}
	return team(r), nil
}

// ListTeams implements [store.Teams].
func (s *Store) ListTeams(ctx context.Context) ([]cay.Team, error) {
	var rows []gen.Team
	err := s.read("list the teams", func(q *gen.Queries) (err error) {
		rows, err = q.ListTeams(ctx)
		return err
	})
	return each(rows, team), err
}

// AddKey implements [store.Keys].
func (s *Store) AddKey(ctx context.Context, k store.Key) error {
	if len(k.Hash) != 32 {
		return internal("the hash of an API key is not 32 bytes long")
	}
	return s.write(ctx, "record the API key", flushed, func(ctx context.Context, q *gen.Queries) error {
		return q.AddKey(ctx, gen.AddKeyParams{ID: string(k.ID), TeamID: string(k.Team), Name: k.Name, Hash: k.Hash,
			Prefix: k.Prefix, Suffix: k.Suffix, Length: int64(k.Length),
			CreatedAt: micros(k.CreatedAt), LastUsed: micros(k.LastUsed.Truncate(time.Minute))})
	})
}

// FindKey implements [store.Keys].
func (s *Store) FindKey(ctx context.Context, hash []byte) (store.Key, cay.Team, error) {
	var r gen.FindKeyRow
	err := s.read("look up the API key", func(q *gen.Queries) (err error) {
		r, err = q.FindKey(ctx, hash)
		if errors.Is(err, sql.ErrNoRows) {
			return errKey
		}
		return err
	})
	if err != nil {
		return store.Key{}, cay.Team{}, err
	}
	return key(r.Key), team(r.Team), nil
}

// ListKeys implements [store.Keys].
func (s *Store) ListKeys(ctx context.Context, id cay.TeamID) ([]store.Key, error) {
	var rows []gen.Key
	err := s.read("list the API keys", func(q *gen.Queries) (err error) {
		rows, err = q.ListKeys(ctx, string(id))
		return err
	})
	return each(rows, key), err
}

// RenameKey implements [store.Keys].
func (s *Store) RenameKey(ctx context.Context, t cay.TeamID, id store.KeyID, name string) error {
	return s.write(ctx, "rename the API key", flushed, func(ctx context.Context, q *gen.Queries) error {
		n, err := q.RenameKey(ctx, gen.RenameKeyParams{Name: name, ID: string(id), TeamID: string(t)})
		return touched(n, err, errKey)
	})
}

// DeleteKey implements [store.Keys].
func (s *Store) DeleteKey(ctx context.Context, t cay.TeamID, id store.KeyID) error {
	return s.write(ctx, "delete the API key", flushed, func(ctx context.Context, q *gen.Queries) error {
		n, err := q.DeleteKey(ctx, gen.DeleteKeyParams{ID: string(id), TeamID: string(t)})
		return touched(n, err, errKey)
	})
}

// TouchKey implements [store.Keys]. It writes at most once a minute for a key,
// so every request may call it.
func (s *Store) TouchKey(ctx context.Context, id store.KeyID, at time.Time) error {
	minute := micros(at.Truncate(time.Minute))
	var last int64
	err := s.read("look up the API key", func(q *gen.Queries) (err error) {
		last, err = q.KeyLastUsed(ctx, string(id))
		if errors.Is(err, sql.ErrNoRows) {
			last = minute
			return nil
		}
		return err
	})
	if err != nil || last >= minute {
		return err
	}
	return s.write(ctx, "record the use of the API key", unflushed, func(ctx context.Context, q *gen.Queries) error {
		return q.TouchKey(ctx, gen.TouchKeyParams{At: minute, ID: string(id)})
	})
}

// touched turns "no row" into absent.
func touched(rows int64, err, absent error) error {
	if err == nil && rows == 0 {
		return absent
	}
	return err
}

func each[R, T any](rows []R, f func(R) T) []T {
	var out []T
	for _, r := range rows {
		out = append(out, f(r))
	}
	return out
}
