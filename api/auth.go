package api

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"net/http"

	"github.com/getkin/kin-openapi/openapi3"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

// caller is who makes a request.
type caller struct {
	team  cay.Team // zero for the operator acting for no team
	key   string   // the API key as it was sent; empty for the operator
	admin bool
}

func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(keyCaller).(caller)
	return c
}

// accepts says which credentials an operation takes.
type accepts struct{ key, team, admin bool }

// The names of the security schemes in spec.
const (
	schemeKey   = "ApiKeyAuth"
	schemeAdmin = "AdminToken"
	schemeTeam  = "TeamID"
)

// acceptsOf reads the security requirements of an operation.
func acceptsOf(doc *openapi3.T, op *openapi3.Operation) accepts {
	reqs := doc.Security
	if op.Security != nil {
		reqs = *op.Security
	}
	var a accepts
	for _, r := range reqs {
		_, key := r[schemeKey]
		_, admin := r[schemeAdmin]
		_, team := r[schemeTeam]
		a.key = a.key || key
		a.team = a.team || admin && team
		a.admin = a.admin || admin && !team
	}
	return a
}

func (a accepts) anyone() bool { return a == accepts{} }

func unauthorized(message, fix string) error {
	return &cay.Error{Code: cay.CodeUnauthorized, Layer: cay.LayerAuth, Message: message, Fix: fix}
}

// authenticate finds out who calls.
func (s *Server) authenticate(r *http.Request, a accepts) (caller, error) {
	key, admin, team := r.Header.Get("X-API-Key"), r.Header.Get("X-Admin-Token"), r.Header.Get("X-Team-ID")
	switch {
	case a.anyone():
		return caller{}, nil
	case admin != "" && (a.admin || a.team):
		return s.authenticateAdmin(r.Context(), a, admin, cay.TeamID(team))
	case key != "" && a.key:
		return s.authenticateKey(r.Context(), key)
	case key != "":
		return caller{}, unauthorized("this call is for the operator: an API key is not enough",
			"send the admin token in X-Admin-Token"+andTeam(a))
	case !a.key:
		return caller{}, unauthorized("the admin token is missing", "send it in X-Admin-Token"+andTeam(a)+"; it is in credentials.json of the data directory")
	case r.Header.Get("Authorization") != "":
		return caller{}, unauthorized("the API key is missing: Authorization is not read",
			"send the key in X-API-Key (E2B_API_KEY for the SDKs)")
	}
	return caller{}, unauthorized("the API key is missing", "send it in X-API-Key (E2B_API_KEY for the SDKs); `cay env` shows one")
}

func andTeam(a accepts) string {
	if a.team && !a.admin {
		return ", and the team it is for in X-Team-ID"
	}
	return ""
}

func (s *Server) authenticateAdmin(ctx context.Context, a accepts, token string, team cay.TeamID) (caller, error) {
	want, got := sha256.Sum256([]byte(s.AdminToken.Reveal())), sha256.Sum256([]byte(token))
	if s.AdminToken == "" || subtle.ConstantTimeCompare(want[:], got[:]) != 1 {
		return caller{}, unauthorized("the admin token is wrong", "copy it from credentials.json of the data directory")
	}
	c := caller{admin: true}
	switch {
	case a.team && team != "":
		t, err := s.Store.Team(ctx, team)
		if err != nil {
			return caller{}, err
		}
		c.team = t
	case !a.admin:
		return caller{}, unauthorized("the admin token alone does not say for which team the call is",
			"send the team's ID in X-Team-ID, or use one of its API keys")
	}
	return c, nil
}

func (s *Server) authenticateKey(ctx context.Context, key string) (caller, error) {
	hash, err := HashKey(s.Pepper, key)
	if err != nil {
		return caller{}, err
	}
	k, team, err := s.Store.FindKey(ctx, hash)
	if cay.CodeOf(err) == cay.CodeKeyNotFound || err == nil && !hmac.Equal(k.Hash, hash) {
		return caller{}, unauthorized("the API key is unknown, or it was deleted",
			"see `cay key list`, or make one with `cay key create`")
	}
	if err != nil {
		return caller{}, err
	}
	s.used(k)
	return caller{team: team, key: key}, nil
}

// used notes the use of a key, once a minute; it may be lost.
func (s *Server) used(k store.Key) {
	now := s.Now().UTC()
	if now.Sub(k.LastUsed) < touchEvery {
		return
	}
	select {
	case s.touches <- touch{k.ID, now}:
	default: // many at once: the next one comes within the minute
	}
}
