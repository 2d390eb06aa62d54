package cay

import (
	"context"
	"time"
)

// NodeID names a machine that runs sandboxes.
type NodeID string

// Node is what the control plane and the template builder need of one machine.
// In `cay up` it is *orchestrator.Orchestrator; in a cluster it is rpc.Client.
//
// Every method is safe for concurrent use. Errors are [*Error] with the layer
// that failed. A context that ends abandons the wait; it never leaves a
// half-made sandbox: Create that returns an error has removed, or will remove
// within 10 s, everything it made.
type Node interface {
	// Create starts a sandbox and returns when its envd has taken its
	// configuration and the guest has proved that it is the build asked for.
	// The same ID twice is CodeConflict.
	Create(ctx context.Context, c SandboxConfig) (NodeSandbox, error)

	// Kill ends a sandbox. When it returns, the proxy answers 502 for it and
	// no process of it runs; other host objects go within 10 s. Unknown ID is
	// CodeSandboxNotFound.
	Kill(ctx context.Context, id SandboxID, reason EndReason) error

	// SetDeadline records a new deadline with the sandbox. Unknown ID is
	// CodeSandboxNotFound.
	SetDeadline(ctx context.Context, id SandboxID, t time.Time) error

	// SetEgress changes what a sandbox may reach, and keeps that with it. It is
	// in force at the return, also for connections that are open. Unknown ID is
	// CodeSandboxNotFound.
	SetEgress(ctx context.Context, id SandboxID, e Egress) error

	// RefreshTeam puts the network limits that a team has now in force for its
	// sandboxes, after they have changed. A team without sandboxes is no error.
	RefreshTeam(ctx context.Context, id TeamID) error

	// EgressLog returns what was refused to a sandbox after the refusal with
	// the number seq (0: all that is remembered), in their order, also for a
	// sandbox that ended less than an hour ago. The numbers begin anew with
	// each run of the sandbox; a restart of the node goes on with them.
	EgressLog(ctx context.Context, id SandboxID, seq uint64) ([]EgressRefusal, error)

	// Get returns a live sandbox. Unknown or ended is CodeSandboxNotFound.
	Get(ctx context.Context, id SandboxID) (NodeSandbox, error)

	// List returns every live sandbox, in no order.
	List(ctx context.Context) ([]NodeSandbox, error)

	// Console returns the last lines of the guest's console, oldest first,
	// also for a sandbox that ended less than an hour ago.
	Console(ctx context.Context, id SandboxID) ([]ConsoleLine, error)

	// Trace returns the timed steps of the sandbox's start, and after them those
	// of its last pause or snapshot, also for a sandbox that ended or was paused
	// less than an hour ago.
	Trace(ctx context.Context, id SandboxID) ([]StartStep, error)

	// Watch calls f for every sandbox that ends, until ctx ends. Ends that
	// happened while nobody watched are delivered first (those the node still
	// remembers). f must not block for long.
	Watch(ctx context.Context, f func(SandboxEnd)) error

	// Info describes the machine.
	Info(ctx context.Context) (NodeInfo, error)
}

// EnvdUpgrader is what a machine may offer beside [Node]: to give a sandbox that
// runs the envd of this version of Cay.
type EnvdUpgrader interface {
	// UpgradeEnvd replaces the envd of a sandbox, whose processes go on, and
	// returns when the other one answers. After an error the one before runs
	// on, or what runs is found out: Get tells. What it is given already is no
	// error. Unknown sandboxes are CodeSandboxNotFound, one with another
	// operation under way is CodeSandboxTransition.
	UpgradeEnvd(ctx context.Context, id SandboxID) (EnvdUpgrade, error)
}

// EnvdUpgrade tells what became of a sandbox's envd.
type EnvdUpgrade struct {
	Changed              bool
	FromVersion, Version string
	FromDigest, Digest   Digest
	Took                 time.Duration
}

// SandboxEnd tells that a sandbox has ended, and why.
type SandboxEnd struct {
	ID          SandboxID
	ExecutionID ExecutionID
	Reason      EndReason
	Message     string // a sentence for people
	// Snapshot is what the sandbox was saved as, with EndPaused.
	Snapshot SnapshotID
	At       time.Time
}

// ConsoleLine is one line the guest's PID 1, envd or kernel wrote.
type ConsoleLine struct {
	At   time.Time
	Text string
}

// NodeInfo describes a machine that runs sandboxes.
type NodeInfo struct {
	ID             NodeID
	Version        string
	Runtime        string
	RuntimeVersion string
	CPUs           int
	MemoryBytes    int64
	Sandboxes      int
	PoolReady      int // sandboxes booted ahead
}
