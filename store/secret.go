package store

import (
	"context"
	"time"

	"github.com/cayhq/cay"
)

// Secret is the record of a secret: what a client may see of it, which is
// everything but the value.
type Secret struct {
	ID   cay.SecretID
	Team cay.TeamID
	// Name is lower-case and unique within the team; it never looks like an ID.
	Name string
	// Version counts the values there were, from 1.
	Version   int64
	Metadata  map[string]string
	CreatedAt time.Time
	UpdatedAt time.Time // when the present value was set
}

// Sealed is the encrypted value of a secret. The store cannot read it.
type Sealed struct {
	Key  string // names the key of the ring that opens it
	Data []byte
}

// Secrets are what clients keep for the headers of egress rules. The store
// keeps the present value of each, and none that was replaced.
type Secrets interface {
	// AddSecret records a secret with its first value. The same ID, or a name
	// that the team has, is cay.CodeConflict.
	AddSecret(ctx context.Context, s Secret, v Sealed) error
	// FindSecret returns the secret of the team with the ID or name, and its
	// value; an unknown one is cay.CodeNotFound.
	FindSecret(ctx context.Context, team cay.TeamID, ref string) (Secret, Sealed, error)
	// UpdateSecret makes the next version of a secret: seal gets the record
	// with the new Version, may alter Metadata and UpdatedAt, and returns the
	// value; the record is written and returned, in one step. An error of
	// seal is returned as it is, and nothing is written. seal must be quick and
	// must not use the store. An unknown secret is cay.CodeNotFound.
	UpdateSecret(ctx context.Context, team cay.TeamID, ref string, seal func(*Secret) (Sealed, error)) (Secret, error)
	// ListSecrets returns a team's secrets, newest first by CreatedAt.
	ListSecrets(ctx context.Context, team cay.TeamID, after Cursor, limit int) ([]Secret, error)
	// DeleteSecret removes a secret with its value; an unknown one is
	// cay.CodeNotFound.
	DeleteSecret(ctx context.Context, team cay.TeamID, ref string) error
	// ResealSecrets gives to reseal every value, of any team, that is not
	// sealed under the key, and replaces it; the version stays. A value for
	// which reseal has an error stays as it is; the errors are returned
	// together. reseal must be quick and must not use the store.
	ResealSecrets(ctx context.Context, key string, reseal func(Secret, Sealed) (Sealed, error)) error
}
