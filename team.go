package cay

// TeamID names a team, the owner of keys, templates and sandboxes (a UUID).
type TeamID string

// Team is a tenant and its limits.
type Team struct {
	ID   TeamID
	Name string
	// Slug is the namespace of the team's template names.
	Slug   string
	Limits TeamLimits
}

// TeamLimits bound what one team may do. Zero is not "unlimited", but in
// Network: every limit is set when the team is made.
type TeamLimits struct {
	ConcurrentSandboxes int // starting and running together
	MaxLengthHours      int // the longest life of a sandbox
	Network             NetworkLimits
}

// NetworkLimits bound what all sandboxes of a team do together on one machine,
// beside the limits of each. 0 is no bound.
type NetworkLimits struct {
	Connections int // that guests have open, at once
	PerSecond   int // new ones, after a burst of twice as many
	// Mbit bounds what goes into the guests, and what comes out of them, in
	// 10^6 bits a second each, what the proxy carries included, after a burst of
	// a little more than a second's worth.
	Mbit int
}

// The largest bounds of [NetworkLimits] that the kernel can hold.
const (
	MaxTeamConnections = 1_000_000
	MaxTeamMbit        = 100_000
)

// DefaultTeamLimits are those of the generated team of one machine.
var DefaultTeamLimits = TeamLimits{ConcurrentSandboxes: 200, MaxLengthHours: 24}

// SecretID names a secret of a team: "sec_" and 20 characters of [a-z0-9]. The
// ID itself is none.
type SecretID string

// SecretIDPrefix is what every [SecretID] begins with, and no name of a secret.
const SecretIDPrefix = "sec_"

// NewSecretID returns a fresh random ID.
func NewSecretID() SecretID { return SecretID(SecretIDPrefix + randomID(20)) }
