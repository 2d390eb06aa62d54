package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/sqlite"
	"github.com/cayhq/cay/store"
)

func secret(r gen.Secret) (store.Secret, error) {
	n := store.Secret{ID: cay.SecretID(r.ID), Team: cay.TeamID(r.TeamID), Name: r.Name, Version: r.Version,
		CreatedAt: instant(r.CreatedAt), UpdatedAt: instant(r.UpdatedAt)}
	if r.Metadata == "{}" {
		return n, nil
	}
	if err := json.Unmarshal([]byte(r.Metadata), &n.Metadata); err != nil {
		return store.Secret{}, internal("the metadata of secret " + r.ID + " is recorded in a wrong form: " + err.Error())
	}
	return n, nil
}

func sealed(r gen.Secret) store.Sealed { return store.Sealed{Key: r.KeyID, Data: r.Value} }

func noSecret(ref string) error {
	return &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerStorage,
		Message: "secret " + ref + " not found", Fix: "list the team's secrets with `cay secret list`"}
}

// AddSecret implements [store.Secrets].
func (s *Store) AddSecret(ctx context.Context, n store.Secret, v store.Sealed) error {
	meta, err := metadataJSON(n.Metadata)
	if err != nil {
		return err
	}
	return s.write(ctx, "record the secret", flushed, func(ctx context.Context, q *gen.Queries) error {
		return q.AddSecret(ctx, gen.AddSecretParams{ID: string(n.ID), TeamID: string(n.Team), Name: n.Name, Version: n.Version,
			Metadata: meta, KeyID: v.Key, Value: v.Data, CreatedAt: micros(n.CreatedAt), UpdatedAt: micros(n.UpdatedAt)})
	})
}

// FindSecret implements [store.Secrets].
func (s *Store) FindSecret(ctx context.Context, t cay.TeamID, ref string) (n store.Secret, v store.Sealed, err error) {
	err = s.read("look up the secret", func(q *gen.Queries) error {
		r, err := findSecret(ctx, q, t, ref)
		if err != nil {
			return err
		}
		v = sealed(r)
		n, err = secret(r)
		return err
	})
	if err != nil {
		return store.Secret{}, store.Sealed{}, err
	}
	return n, v, nil
}

func findSecret(ctx context.Context, q *gen.Queries, t cay.TeamID, ref string) (gen.Secret, error) {
	r, err := q.FindSecret(ctx, gen.FindSecretParams{TeamID: string(t), Ref: ref})
	if errors.Is(err, sql.ErrNoRows) {
		return r, noSecret(ref)
	}
	return r, err
}

// UpdateSecret implements [store.Secrets].
func (s *Store) UpdateSecret(ctx context.Context, t cay.TeamID, ref string, seal func(*store.Secret) (store.Sealed, error)) (n store.Secret, err error) {
	err = s.write(ctx, "record the secret's new version", flushed, func(ctx context.Context, q *gen.Queries) error {
		r, err := findSecret(ctx, q, t, ref)
		if err != nil {
			return err
		}
		if n, err = secret(r); err != nil {
			return err
		}
		n.Version++
		v, err := seal(&n)
		if err != nil {
			return err
		}
		meta, err := metadataJSON(n.Metadata)
		if err != nil {
			return err
		}
		return q.SetSecret(ctx, gen.SetSecretParams{ID: r.ID, Version: n.Version, Metadata: meta,
			KeyID: v.Key, Value: v.Data, UpdatedAt: micros(n.UpdatedAt)})
	})
	if err != nil {
		return store.Secret{}, err
	}
	n.UpdatedAt = instant(micros(n.UpdatedAt))
	return n, nil
}

// ListSecrets implements [store.Secrets].
func (s *Store) ListSecrets(ctx context.Context, t cay.TeamID, after store.Cursor, limit int) (out []store.Secret, err error) {
	err = s.read("list the secrets", func(q *gen.Queries) error {
		rows, err := q.ListSecrets(ctx, gen.ListSecretsParams{TeamID: string(t), AfterAt: before(after), AfterID: after.ID, Max: atMost(limit)})
		for _, r := range rows {
			n, err := secret(r)
			if err != nil {
				return err
			}
			out = append(out, n)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// DeleteSecret implements [store.Secrets].
func (s *Store) DeleteSecret(ctx context.Context, t cay.TeamID, ref string) error {
	return s.write(ctx, "delete the secret", flushed, func(ctx context.Context, q *gen.Queries) error {
		n, err := q.DeleteSecret(ctx, gen.DeleteSecretParams{TeamID: string(t), Ref: ref})
		return touched(n, err, noSecret(ref))
	})
}

// resealAtOnce is how many values are replaced in one transaction.
const resealAtOnce = 64

// ResealSecrets implements [store.Secrets].
func (s *Store) ResealSecrets(ctx context.Context, key string, reseal func(store.Secret, store.Sealed) (store.Sealed, error)) error {
	var failed []error
	after := ""
	for more := true; more; {
		err := s.write(ctx, "seal the secrets anew", flushed, func(ctx context.Context, q *gen.Queries) error {
			rows, err := q.SecretsNotUnder(ctx, gen.SecretsNotUnderParams{KeyID: key, AfterID: after, Max: resealAtOnce})
			if err != nil {
				return err
			}
			more = len(rows) == resealAtOnce
			for _, r := range rows {
				after = r.ID
				v, err := resealed(r, key, reseal)
				if err != nil {
					failed = append(failed, err)
					continue
				}
				if _, err := q.ResealSecret(ctx, gen.ResealSecretParams{ID: r.ID, Version: r.Version, KeyID: v.Key, Value: v.Data}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return errors.Join(failed...)
}

func resealed(r gen.Secret, key string, reseal func(store.Secret, store.Sealed) (store.Sealed, error)) (store.Sealed, error) {
	n, err := secret(r)
	if err != nil {
		return store.Sealed{}, err
	}
	v, err := reseal(n, sealed(r))
	if err == nil && v.Key != key {
		err = internal("secret " + r.ID + " was sealed anew under another key than was asked for")
	}
	return v, err
}
