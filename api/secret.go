package api

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/store"
)

// Sealer encrypts the values of secrets, under one of several keys.
type Sealer interface {
	// Current names the key that Seal uses.
	Current() (string, error)
	// Seal encrypts a value. Context says what it is for.
	Seal(context string, value cay.Secret) (key string, sealed []byte, err error)
	// Open decrypts what Seal made, for the same context only.
	Open(context, key string, sealed []byte) (cay.Secret, error)
}

// Limits of secrets: those of the contract (e2b.md 1.4), but for the value's,
// which is ours.
const (
	maxSecretName   = 128
	maxSecretValue  = 64 << 10
	maxSecretLabels = 32
	maxLabelKey     = 128
	maxLabelValue   = 1024
	maxLabels       = 8192 // bytes of all of them
)

// resealEvery is how often values are looked for that an older key has sealed.
const resealEvery = 10 * time.Minute

var secretName = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,128}$`)

var errSecretsOff = &cay.Error{Code: cay.CodeForbidden, Layer: cay.LayerAPI,
	Message: "this server keeps no secrets", Fix: "ask its operator to start it with a file of keys"}

// secretHandlers serves what is about secrets.
type secretHandlers struct{ *Server }

// ListSecrets implements the generated interface.
func (s secretHandlers) ListSecrets(ctx context.Context, r gen.ListSecretsRequestObject) (gen.ListSecretsResponseObject, error) {
	if s.Sealer == nil {
		return nil, errSecretsOff
	}
	after, err := parseCursor(r.Params.NextToken, false)
	if err != nil {
		return nil, err
	}
	limit := pageLimit(r.Params.Limit)
	rows, err := s.Store.ListSecrets(ctx, callerOf(ctx).team.ID, after, limit+1) // one more says whether there is a next page
	if err != nil {
		return nil, err
	}
	out := gen.ListSecrets200JSONResponse{Body: []gen.Secret{}}
	rows, out.Headers.XNextToken = page(rows, limit, false, func(n store.Secret) store.Cursor {
		return store.Cursor{At: n.CreatedAt, ID: string(n.ID)}
	})
	for _, n := range rows {
		out.Body = append(out.Body, secretInfo(n))
	}
	return out, nil
}

// CreateSecret implements the generated interface.
func (s secretHandlers) CreateSecret(ctx context.Context, r gen.CreateSecretRequestObject) (gen.CreateSecretResponseObject, error) {
	if s.Sealer == nil {
		return nil, errSecretsOff
	}
	name := strings.ToLower(r.Body.Name)
	switch {
	case !secretName.MatchString(name):
		return nil, invalid("the field \"name\" must have 1 to %d letters, digits, hyphens and underscores", "choose such a name", maxSecretName)
	case strings.HasPrefix(name, cay.SecretIDPrefix):
		return nil, invalid("the field \"name\" begins with %s, as the IDs of secrets do", "choose another name", cay.SecretIDPrefix)
	}
	if err := checkSecretValue(r.Body.Value); err != nil {
		return nil, err
	}
	now := s.life.now()
	n := store.Secret{ID: cay.NewSecretID(), Team: callerOf(ctx).team.ID, Name: name, Version: 1, CreatedAt: now, UpdatedAt: now}
	var err error
	if n.Metadata, err = secretLabels(r.Body.Metadata); err != nil {
		return nil, err
	}
	v, err := s.seal(n, cay.Secret(r.Body.Value))
	if err != nil {
		return nil, err
	}
	err = s.Store.AddSecret(ctx, n, v)
	if cay.CodeOf(err) == cay.CodeConflict {
		return nil, &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerAPI,
			Message: fmt.Sprintf("the team has a secret %q already", name), Fix: "update it, or choose another name", Err: err}
	}
	if err != nil {
		return nil, err
	}
	return gen.CreateSecret201JSONResponse(secretInfo(n)), nil
}

// GetSecret implements the generated interface.
func (s secretHandlers) GetSecret(ctx context.Context, r gen.GetSecretRequestObject) (gen.GetSecretResponseObject, error) {
	if s.Sealer == nil {
		return nil, errSecretsOff
	}
	n, _, err := s.Store.FindSecret(ctx, callerOf(ctx).team.ID, strings.ToLower(r.SecretID))
	if err != nil {
		return nil, noSecret(err, r.SecretID)
	}
	return gen.GetSecret200JSONResponse(secretInfo(n)), nil
}

// UpdateSecret implements the generated interface.
func (s secretHandlers) UpdateSecret(ctx context.Context, r gen.UpdateSecretRequestObject) (gen.UpdateSecretResponseObject, error) {
	if s.Sealer == nil {
		return nil, errSecretsOff
	}
	if err := checkSecretValue(r.Body.Value); err != nil {
		return nil, err
	}
	meta, err := secretLabels(r.Body.Metadata)
	if err != nil {
		return nil, err
	}
	n, err := s.Store.UpdateSecret(ctx, callerOf(ctx).team.ID, strings.ToLower(r.SecretID), func(n *store.Secret) (store.Sealed, error) {
		n.UpdatedAt = s.life.now()
		if r.Body.Metadata != nil {
			n.Metadata = meta
		}
		return s.seal(*n, cay.Secret(r.Body.Value))
	})
	if err != nil {
		return nil, noSecret(err, r.SecretID)
	}
	return gen.UpdateSecret200JSONResponse(secretInfo(n)), nil
}

// DeleteSecret implements the generated interface.
func (s secretHandlers) DeleteSecret(ctx context.Context, r gen.DeleteSecretRequestObject) (gen.DeleteSecretResponseObject, error) {
	if s.Sealer == nil {
		return nil, errSecretsOff
	}
	if err := s.Store.DeleteSecret(ctx, callerOf(ctx).team.ID, strings.ToLower(r.SecretID)); err != nil {
		return nil, noSecret(err, r.SecretID)
	}
	return gen.DeleteSecret204Response{}, nil
}

// Secrets returns the values of secrets, for the node that puts them into
// requests. Nothing that a client can ask for returns one.
type Secrets struct {
	Store  store.Secrets
	Sealer Sealer
}

// Value returns the present value of a team's secret.
func (s Secrets) Value(ctx context.Context, team cay.TeamID, name string) (cay.Secret, error) {
	n, v, err := s.Store.FindSecret(ctx, team, strings.ToLower(name))
	if err != nil {
		return "", noSecret(err, name)
	}
	return s.Sealer.Open(sealedFor(n), v.Key, v.Data)
}

// resealSecrets has every value sealed under the newest key, now and whenever
// there is another.
func (s *Server) resealSecrets(ctx context.Context) {
	if s.Sealer == nil {
		return
	}
	tick := time.NewTicker(resealEvery)
	defer tick.Stop()
	for {
		if err := s.reseal(ctx); err != nil && ctx.Err() == nil {
			s.Log.Error("sealing the secrets under the newest key", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *Server) reseal(ctx context.Context) error {
	key, err := s.Sealer.Current()
	if err != nil {
		return err
	}
	return s.Store.ResealSecrets(ctx, key, func(n store.Secret, v store.Sealed) (store.Sealed, error) {
		value, err := s.Sealer.Open(sealedFor(n), v.Key, v.Data)
		if err != nil {
			return store.Sealed{}, fmt.Errorf("secret %s: %w", n.ID, err)
		}
		return s.seal(n, value)
	})
}

func (s *Server) seal(n store.Secret, value cay.Secret) (store.Sealed, error) {
	key, data, err := s.Sealer.Seal(sealedFor(n), value)
	return store.Sealed{Key: key, Data: data}, err
}

// sealedFor binds a value to its place: what is moved to another secret, team
// or version by somebody who can write to the store cannot be opened there.
func sealedFor(n store.Secret) string { return fmt.Sprintf("secret/%s/%s/%d", n.Team, n.ID, n.Version) }

// noSecret is the one answer for a secret that is not there or another team's.
func noSecret(err error, ref string) error {
	if cay.CodeOf(err) != cay.CodeNotFound {
		return err
	}
	return &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerAPI,
		Message: fmt.Sprintf("the team has no secret %q", ref), Fix: "see `cay secret list`"}
}

func checkSecretValue(v string) error {
	if v == "" || len(v) > maxSecretValue {
		return invalid("the field \"value\" must have 1 to %d bytes, and has %d", "send the value as it is used in a header", maxSecretValue, len(v))
	}
	return nil
}

func secretLabels(m *gen.SecretMetadata) (map[string]string, error) {
	if m == nil || len(*m) == 0 {
		return nil, nil
	}
	if len(*m) > maxSecretLabels {
		return nil, invalid("the field \"metadata\" has %d pairs, and may have %d", "send fewer", len(*m), maxSecretLabels)
	}
	total := 0
	for k, v := range *m {
		if k == "" || len(k) > maxLabelKey || len(v) > maxLabelValue {
			return nil, invalid("the field \"metadata\" takes keys of 1 to %d bytes and values of at most %d", "shorten the one called "+strconv.Quote(k[:min(len(k), maxLabelKey)]), maxLabelKey, maxLabelValue)
		}
		total += len(k) + len(v)
	}
	if total > maxLabels {
		return nil, invalid("the field \"metadata\" has %d bytes, and may have %d", "send less", total, maxLabels)
	}
	return *m, nil
}

func secretInfo(n store.Secret) gen.Secret {
	meta := gen.SecretMetadata{}
	for k, v := range n.Metadata {
		meta[k] = v
	}
	return gen.Secret{SecretID: string(n.ID), Name: n.Name, CurrentVersion: n.Version, Metadata: meta,
		CreatedAt: n.CreatedAt, UpdatedAt: n.UpdatedAt}
}
