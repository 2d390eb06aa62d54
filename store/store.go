// Package store is the contract of the durable record: teams, keys, templates,
// builds, sandboxes, snapshots and secrets. It is the truth about what was promised to clients;
// nodes are the truth about what runs.
//
// Package storetest holds the proof that an adapter keeps the contract.
package store

import (
	"context"
	"time"

	"github.com/cayhq/cay"
)

// Store keeps the record.
//
// Every method is safe for concurrent use and atomic: after a nil return the
// change survives a kill -9 of the process, after an error nothing changed. It
// also survives a loss of power, but for three that tell a client nothing yet:
// AddSandbox (the update that follows it makes both last), TouchKey and
// PruneSandboxes.
//
// Methods that take a team see that team's objects only: another team's object
// is the same error as an absent one. An object for a team that does not exist
// is cay.CodeNotFound. Instants are kept to the microsecond in UTC, later
// digits are cut off. An empty map or slice comes back as nil. A list's
// limit of 0 is all.
//
// Errors are *cay.Error; a full disk is cay.CodeDiskFull, a store that does not
// answer, or a context that ends, is cay.CodeStoreUnavailable, never "not
// found".
type Store interface {
	// Open connects and brings the schema to this build's version. A schema
	// of a newer build is cay.CodeDataDirInvalid and stays untouched.
	Open(ctx context.Context) error
	// Close may be called twice and after a failed Open.
	Close() error

	Teams
	Keys
	Templates
	Sandboxes
	Snapshots
	Secrets
}

// Teams are the tenants.
type Teams interface {
	// PutTeam inserts a team, or replaces its name, slug and limits. A slug
	// that another team has is cay.CodeConflict.
	PutTeam(ctx context.Context, t cay.Team) error
	// Team returns a team; an unknown one is cay.CodeNotFound.
	Team(ctx context.Context, id cay.TeamID) (cay.Team, error)
	// ListTeams returns every team, oldest first.
	ListTeams(ctx context.Context) ([]cay.Team, error)
}

// KeyID names an API key (a UUID). It is no secret.
type KeyID string

// Key is an API key as it is kept: without the key.
type Key struct {
	ID   KeyID
	Team cay.TeamID
	Name string
	// Hash is the keyed hash of the key, 32 bytes; whoever holds the pepper
	// makes it.
	Hash []byte
	// Prefix, Suffix and Length let a person recognise a key: the first and
	// last characters of its random part, and how long that part is.
	Prefix, Suffix string
	Length         int
	CreatedAt      time.Time
	LastUsed       time.Time // zero: never; kept to the minute
}

// Keys are the credentials of teams.
type Keys interface {
	// AddKey inserts a key. The same ID or hash twice is cay.CodeConflict.
	AddKey(ctx context.Context, k Key) error
	// FindKey returns the key with the hash and its team; an unknown hash is
	// cay.CodeKeyNotFound.
	FindKey(ctx context.Context, hash []byte) (Key, cay.Team, error)
	// ListKeys returns a team's keys, oldest first.
	ListKeys(ctx context.Context, team cay.TeamID) ([]Key, error)
	// RenameKey changes a key's name; an unknown one is cay.CodeKeyNotFound.
	RenameKey(ctx context.Context, team cay.TeamID, id KeyID, name string) error
	// DeleteKey removes a key for good; an unknown one is cay.CodeKeyNotFound.
	DeleteKey(ctx context.Context, team cay.TeamID, id KeyID) error
	// TouchKey records a use, if it is later than the one recorded. It may be
	// late or lost; an unknown key is no error.
	TouchKey(ctx context.Context, id KeyID, at time.Time) error
}

// DefaultTag is the tag of a template reference that names none.
const DefaultTag = "default"

// Template is a named line of builds.
type Template struct {
	ID   cay.TemplateID
	Team cay.TeamID
	// Name is the template's own name within its team, "base".
	Name      string
	Public    bool // other teams may use it
	CreatedAt time.Time
	UpdatedAt time.Time
	// LastSpawnedAt is when a sandbox was last made of it, SpawnCount how often;
	// AddSandbox counts. Zero: never.
	LastSpawnedAt time.Time
	SpawnCount    int64
	BuildCount    int64
	// Current is the build of the default tag.
	Current Build
}

// Build is one finished, verified build. Its manifest in the artefact store is
// the truth; this row says which template it belongs to.
type Build struct {
	ID          cay.BuildID
	Template    cay.TemplateID
	Resources   cay.Resources
	EnvdVersion string
	CreatedAt   time.Time
}

// TemplateRef is a parsed template reference, [namespace/]name[:tag], or an ID.
type TemplateRef struct {
	// Namespace is a team's slug; empty is the caller's own, then public ones.
	Namespace string
	// Name is a template's name or its ID.
	Name string
	Tag  string // empty is DefaultTag
}

// Templates are what sandboxes are made of.
type Templates interface {
	// PublishBuild makes a finished build the one of the template's default
	// tag, making the template if the team has none of that name. The
	// manifest's template ID and public are used for a new template; an
	// existing one keeps its own, and its ID is returned. Publishing the
	// current build again changes nothing. A build or template ID that belongs
	// to another template is cay.CodeConflict.
	PublishBuild(ctx context.Context, team cay.TeamID, public bool, m cay.Manifest) (cay.TemplateID, error)
	// FindTemplate resolves a reference for a team: its own templates before
	// public ones, an ID before a name, the oldest of public namesakes. Current
	// is the build of the reference's tag. Nothing found, only another team's
	// private template, or no such tag is cay.CodeTemplateNotFound.
	FindTemplate(ctx context.Context, team cay.TeamID, ref TemplateRef) (Template, error)
	// TemplateExists reports whether any team has a template that the
	// reference names, with its tag, so that "not yours" can be told from "not
	// there".
	TemplateExists(ctx context.Context, ref TemplateRef) (bool, error)
	// ListTemplates returns a team's templates and the public ones, newest
	// first by CreatedAt, at most limit beginning after the cursor. Current is
	// the build of the default tag.
	ListTemplates(ctx context.Context, team cay.TeamID, after Cursor, limit int) ([]Template, error)
	// ListBuilds returns a template's builds, newest first.
	ListBuilds(ctx context.Context, id cay.TemplateID, after Cursor, limit int) ([]Build, error)
	// SetTemplatePublic changes who may use a template of the team; an unknown
	// one is cay.CodeTemplateNotFound.
	SetTemplatePublic(ctx context.Context, team cay.TeamID, id cay.TemplateID, public bool) error
	// DeleteTemplate removes a template of the team with its builds' rows; an
	// unknown one is cay.CodeTemplateNotFound, one with live sandboxes or
	// snapshots cay.CodeConflict.
	DeleteTemplate(ctx context.Context, team cay.TeamID, id cay.TemplateID) error
}

// Cursor is a place in a list ordered by time and then ID, both in the list's
// direction: the time and ID of the last object seen. The zero value is the
// beginning. The object need not exist any more.
type Cursor struct {
	At time.Time
	ID string
}

// Sandbox is the record of a sandbox, from the moment its ID may be told to a
// client until long after its end.
type Sandbox struct {
	ID       cay.SandboxID
	Team     cay.TeamID
	Template cay.TemplateID
	Alias    string // the template's name when the sandbox was made
	Build    cay.BuildID
	Node     cay.NodeID
	State    cay.SandboxState

	Resources   cay.Resources
	EnvdVersion string
	Metadata    map[string]string
	// Secure sandboxes answer to their access token only.
	Secure bool
	// AllowInternet is nil if the creator did not say.
	AllowInternet *bool
	// Options holds the rest of the creator's wishes as JSON, in the API's own
	// form: lifecycle, network and so on.
	Options []byte

	CreatedAt time.Time
	StartedAt time.Time // CreatedAt until it runs; orders lists
	// Deadline is when the sandbox ends by itself.
	Deadline time.Time
	// MaxDeadline is the latest deadline that the team's limits allow.
	MaxDeadline time.Time

	// Execution is the run under way, or the last one; empty while the node
	// has not told it.
	Execution cay.ExecutionID
	// Snapshot is what is being made of the sandbox while it is pausing or
	// snapshotting, and what it consists of while it is paused or resuming.
	// SnapshotMemory tells that it has the memory, PausedAt when it was made.
	Snapshot       cay.SnapshotID
	SnapshotMemory bool
	PausedAt       time.Time
	// Origin is the snapshot that the sandbox was first made from, and Parent
	// the sandbox that one was of; neither need exist any more.
	Origin cay.SnapshotID
	Parent cay.SandboxID
	// History is what became of the sandbox, oldest first, as far as its owner
	// keeps it.
	History []Happening

	// EndedAt is set when State is cay.StateEnded, and only then. So is
	// EndReason, which a sandbox in cay.StateKilling may have already.
	EndedAt    time.Time
	EndReason  cay.EndReason
	EndMessage string
}

// Happening is something that became of a sandbox.
type Happening struct {
	At      time.Time     `json:"at"`
	Type    cay.EventType `json:"type"`
	Message string        `json:"message"` // a sentence for people
}

// SandboxFilter selects live sandboxes.
type SandboxFilter struct {
	Team     cay.TeamID         // empty: every team, for operators
	States   []cay.SandboxState // empty: every one
	Metadata map[string]string  // every pair must match
	Template cay.TemplateID     // empty: any
	// StartedAfter is inclusive; zero: any.
	StartedAfter time.Time
	Ascending    bool // by StartedAt; default newest first
	After        Cursor
	Limit        int
}

// Sandboxes are what was promised to clients.
type Sandboxes interface {
	// AddSandbox records a new sandbox. If limit of the team's sandboxes hold a
	// place already (cay.SandboxState.Holds), the error is
	// cay.CodeTooManySandboxes; count and insert are one step, and a limit of 0
	// allows none. The same ID twice is cay.CodeConflict; a template that lacks
	// the build, or is gone, is cay.CodeTemplateNotFound.
	AddSandbox(ctx context.Context, s Sandbox, limit int) error
	// FindSandbox returns the record, also of an ended sandbox, until it is
	// pruned. An empty team finds any team's. An unknown one is
	// cay.CodeSandboxNotFound.
	FindSandbox(ctx context.Context, team cay.TeamID, id cay.SandboxID) (Sandbox, error)
	// UpdateSandbox reads the record, lets change alter it, writes it and
	// returns what it wrote, in one step. An error of change is returned as it
	// is, and nothing is written. change must be quick, must not use the store,
	// and leaves ID, Team, Template, Alias, Build, Origin, Parent and CreatedAt alone. The
	// record of an ended sandbox is final: an alteration is cay.CodeConflict.
	// An unknown sandbox is cay.CodeSandboxNotFound.
	UpdateSandbox(ctx context.Context, id cay.SandboxID, change func(*Sandbox) error) (Sandbox, error)
	// AdmitSandbox is UpdateSandbox for a change that makes the sandbox hold a
	// place of its team's limit. If it did not and limit others do, the error
	// is cay.CodeTooManySandboxes and nothing is written.
	AdmitSandbox(ctx context.Context, id cay.SandboxID, limit int, change func(*Sandbox) error) (Sandbox, error)
	// ListSandboxes returns live (not ended) sandboxes, ordered by StartedAt.
	ListSandboxes(ctx context.Context, f SandboxFilter) ([]Sandbox, error)
	// CountSandboxes returns how many sandboxes in the states a team has; no
	// state is every live one, an empty team every team.
	CountSandboxes(ctx context.Context, team cay.TeamID, states ...cay.SandboxState) (int, error)
	// MoveDeadlines adds a step to Deadline and MaxDeadline of every sandbox in
	// one of the states, in one step, and returns how many those are.
	MoveDeadlines(ctx context.Context, step time.Duration, states ...cay.SandboxState) (int, error)
	// PruneSandboxes removes the records of sandboxes that ended before t, and
	// returns how many.
	PruneSandboxes(ctx context.Context, t time.Time) (int, error)
}

// Snapshot is the record of a snapshot that a client asked for. What it is made
// of is with the node; its manifest there is the truth about it.
type Snapshot struct {
	ID       cay.SnapshotID
	Team     cay.TeamID
	Sandbox  cay.SandboxID // whose it is; it may be gone
	Template cay.TemplateID
	Alias    string // the template's name when the sandbox was made
	Build    cay.BuildID
	// Name and Tag are what the client called it; both or neither.
	Name, Tag   string
	Resources   cay.Resources
	EnvdVersion string
	Memory      bool // it has the memory
	CreatedAt   time.Time
	// Options is what sandboxes made from it take along, opaque to the store.
	Options []byte
}

// SnapshotFilter selects snapshots.
type SnapshotFilter struct {
	Team    cay.TeamID    // empty: every team, for operators
	Sandbox cay.SandboxID // empty: any
	Name    string        // empty: any
	Tag     string        // empty: any
	After   Cursor
	Limit   int
}

// Snapshots are what clients keep of sandboxes.
type Snapshots interface {
	// AddSnapshot records a snapshot. Its name and tag are taken from the
	// team's snapshot that had them, if any. The same ID twice, or a name that
	// a template of the team has, is cay.CodeConflict; a template that lacks
	// the build, or is gone, is cay.CodeTemplateNotFound.
	AddSnapshot(ctx context.Context, s Snapshot) error
	// FindSnapshot resolves a reference among the team's snapshots: an ID
	// (which has the tag DefaultTag only) before a name. Nothing found is
	// cay.CodeNotFound.
	FindSnapshot(ctx context.Context, team cay.TeamID, ref TemplateRef) (Snapshot, error)
	// ListSnapshots returns snapshots, newest first by CreatedAt.
	ListSnapshots(ctx context.Context, f SnapshotFilter) ([]Snapshot, error)
	// DeleteSnapshot removes the record of a snapshot of the team; an unknown
	// one is cay.CodeNotFound.
	DeleteSnapshot(ctx context.Context, team cay.TeamID, id cay.SnapshotID) error
}
