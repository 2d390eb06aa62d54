package api

import (
	"context"
	"strings"

	"github.com/google/uuid"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/store"
)

// keyHandlers serves what is about teams and their API keys.
type keyHandlers struct{ *Server }

// maxKeyName is the length of a key's name at most.
const maxKeyName = 128

// ListTeams implements the generated interface.
func (s keyHandlers) ListTeams(ctx context.Context, _ gen.ListTeamsRequestObject) (gen.ListTeamsResponseObject, error) {
	c := callerOf(ctx)
	teams := []cay.Team{c.team}
	if c.admin && c.team.ID == "" {
		var err error
		if teams, err = s.Store.ListTeams(ctx); err != nil {
			return nil, err
		}
	}
	out := make(gen.ListTeams200JSONResponse, len(teams))
	for i, t := range teams {
		out[i] = gen.Team{TeamID: string(t.ID), Name: t.Name, ApiKey: c.key, IsDefault: i == 0}
	}
	return out, nil
}

// ListAPIKeys implements the generated interface.
func (s keyHandlers) ListAPIKeys(ctx context.Context, _ gen.ListAPIKeysRequestObject) (gen.ListAPIKeysResponseObject, error) {
	keys, err := s.Store.ListKeys(ctx, callerOf(ctx).team.ID)
	if err != nil {
		return nil, err
	}
	out := make(gen.ListAPIKeys200JSONResponse, len(keys))
	for i, k := range keys {
		out[i] = gen.TeamAPIKey{Id: string(k.ID), Name: k.Name, Mask: mask(k), CreatedAt: k.CreatedAt, LastUsed: instant(k.LastUsed)}
	}
	return out, nil
}

// CreateAPIKey implements the generated interface.
func (s keyHandlers) CreateAPIKey(ctx context.Context, r gen.CreateAPIKeyRequestObject) (gen.CreateAPIKeyResponseObject, error) {
	k, err := s.createKey(ctx, callerOf(ctx).team.ID, r.Body.Name)
	return gen.CreateAPIKey201JSONResponse(k), err
}

// UpdateAPIKey implements the generated interface.
func (s keyHandlers) UpdateAPIKey(ctx context.Context, r gen.UpdateAPIKeyRequestObject) (gen.UpdateAPIKeyResponseObject, error) {
	name, err := keyName(r.Body.Name)
	if err != nil {
		return nil, err
	}
	err = s.Store.RenameKey(ctx, callerOf(ctx).team.ID, store.KeyID(r.ApiKeyID), name)
	if err != nil {
		return nil, noKey(err, r.ApiKeyID)
	}
	return gen.UpdateAPIKey202Response{}, nil
}

// DeleteAPIKey implements the generated interface.
func (s keyHandlers) DeleteAPIKey(ctx context.Context, r gen.DeleteAPIKeyRequestObject) (gen.DeleteAPIKeyResponseObject, error) {
	err := s.Store.DeleteKey(ctx, callerOf(ctx).team.ID, store.KeyID(r.ApiKeyID))
	if err != nil {
		return nil, noKey(err, r.ApiKeyID)
	}
	return gen.DeleteAPIKey204Response{}, nil
}

// createKey makes a key for a team. Only this answer ever holds it.
func (s *Server) createKey(ctx context.Context, team cay.TeamID, name string) (gen.CreatedTeamAPIKey, error) {
	name, err := keyName(name)
	if err != nil {
		return gen.CreatedTeamAPIKey{}, err
	}
	key := NewKey()
	hash, err := HashKey(s.Pepper, key)
	if err != nil {
		return gen.CreatedTeamAPIKey{}, err
	}
	k := store.Key{ID: store.KeyID(uuid.NewString()), Team: team, Name: name, Hash: hash, CreatedAt: s.life.now()}
	k.Prefix, k.Suffix, k.Length = MaskKey(key)
	if err := s.Store.AddKey(ctx, k); err != nil {
		return gen.CreatedTeamAPIKey{}, err
	}
	return gen.CreatedTeamAPIKey{Id: string(k.ID), Key: key, Name: k.Name, Mask: mask(k), CreatedAt: k.CreatedAt}, nil
}

func keyName(name string) (string, error) {
	name = strings.TrimSpace(name)
	if name == "" || len(name) > maxKeyName {
		return "", invalid("the field \"name\" must have 1 to %d bytes, and has %d", "choose a name that says what the key is for", maxKeyName, len(name))
	}
	return name, nil
}

// noKey is the one answer for a key that is not there or another team's.
func noKey(err error, id string) error {
	if cay.CodeOf(err) != cay.CodeKeyNotFound {
		return err
	}
	return &cay.Error{Code: cay.CodeKeyNotFound, Layer: cay.LayerAuth,
		Message: "the team has no API key '" + id + "'", Fix: "see `cay key list` for the IDs"}
}

func mask(k store.Key) gen.IdentifierMaskingDetails {
	return gen.IdentifierMaskingDetails{Prefix: keyPrefix, ValueLength: k.Length, MaskedValuePrefix: k.Prefix, MaskedValueSuffix: k.Suffix}
}
