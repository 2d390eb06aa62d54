// Package runtime is the contract of a sandbox runtime: the thing that makes a
// guest out of a root directory, a network namespace and limits.
//
// An adapter (runtime/gvisor, later runtime/qemu and runtime/firecracker) knows
// nothing of teams, templates, deadlines or HTTP. Package runtimetest holds the
// proof that an adapter keeps the contract, and a fake for the tests of others.
package runtime

import (
	"context"
	"time"

	"github.com/cayhq/cay"
)

// InstanceID names one run of a guest on this machine. It is chosen by the
// caller, never reused, and appears in every host object of the run.
type InstanceID string

// Engine is one build of a runtime's engine.
type Engine struct {
	// Version decides what fits: a checkpoint can be restored by the version
	// that wrote it.
	Version string `json:"version"`
	// Program names the file of the engine's program. It is empty where the
	// engine is a part of the server.
	Program string `json:"program,omitempty"`
}

// Spec says what to run.
type Spec struct {
	ID InstanceID
	// Engine is the engine that the guest needs; zero is the runtime's own.
	// Another one is used for the whole life of the instance.
	Engine Engine `json:",omitzero"`
	// RootFS is a host directory that becomes the guest's root. The guest may
	// write to it; what bounds the writes is the file system under it.
	RootFS string
	// NetNS is the path of the network namespace whose links become the
	// guest's. The runtime may take the addresses off the links.
	NetNS string
	// Args is PID 1 of the guest and its arguments; Args[0] is a guest path.
	Args []string
	// Env is PID 1's whole environment, "NAME=value".
	Env      []string
	Hostname string
	Limits   Limits
	// Restore says that the instance is for a guest that was saved: it is to be
	// restored, and cannot be started. The runtime may have something ready for
	// it.
	Restore bool `json:",omitempty"`
	// Labels are kept with the instance and returned by Instances, so that a
	// caller that lost its memory can tell what an instance is.
	Labels map[string]string
}

// Limits bound one instance. All are hard and in force before the first
// instruction of the guest.
type Limits struct {
	CPUs        int   // CPU time per wall second
	MemoryBytes int64 // guest and engine together
	PIDs        int   // processes and threads inside the guest
}

// State is where an instance is.
type State string

// The states.
const (
	Created State = "created" // the engine is up, the guest has not run yet
	Running State = "running"
	Frozen  State = "frozen" // running, with every task of the guest stopped
	Exited  State = "exited"
)

// Exit says how an instance ended.
type Exit struct {
	Reason cay.EndReason // EndGuestExit, EndOOM, EndPIDs, EndEngineCrash or EndRequest
	// Code is PID 1's exit code, or 128+signal; -1 when nobody saw it.
	Code    int
	Message string
	At      time.Time
}

// Instance is one run of a guest.
type Instance struct {
	ID        InstanceID
	PID       int // the engine's main process on the host
	State     State
	CreatedAt time.Time
	Labels    map[string]string
	Exit      *Exit // set when State is Exited
}

// Stats are the figures of one instance, engine overhead included.
type Stats struct {
	CPUNanos     int64 // consumed since the start
	MemoryBytes  int64 // in use now, without reclaimable page cache
	MemoryCached int64
	PIDs         int // host tasks
}

// Info describes the runtime on this machine.
type Info struct {
	Name    string // "gvisor"
	Version string // the engine's version, as kept in manifests
	Program string // names the engine's program; "" when it has no file of its own
	// Platform and Detail are for people: "systrap", and what was chosen why.
	Platform string
	Detail   map[string]string
}

// Runtime starts and ends guests.
//
// Guests outlive the process that holds a Runtime: after a crash and a new
// Open, Instances returns them, and Kill, Wait and Console work on them.
//
// Every method is safe for concurrent use. Errors are *cay.Error with layer
// runtime, kernel, init, storage or network.
type Runtime interface {
	// Open connects to the machine's instances, starting what the runtime
	// needs to supervise them. Close lets go without ending any guest; it may
	// be called twice and after a failed Open.
	Open(ctx context.Context) error
	Close() error

	Info(ctx context.Context) (Info, error)

	// Create prepares an instance so that Start is fast: the engine process is
	// up and confined, the guest has not run. A failed Create leaves nothing.
	// An engine that is not there is cay.CodeSnapshotIncompatible.
	Create(ctx context.Context, s Spec) error

	// Start runs the guest of a created instance, but of one that is for Restore
	// (cay.CodeConflict). A failed Start leaves the
	// instance for Kill.
	Start(ctx context.Context, id InstanceID) error

	// Freeze stops every task of a running guest at one instant, and Thaw lets
	// them go on. Neither minds repetition. A frozen guest holds its memory and
	// its connections, and can be killed. Another state is cay.CodeConflict.
	Freeze(ctx context.Context, id InstanceID) error
	Thaw(ctx context.Context, id InstanceID) error

	// Checkpoint writes the memory of a frozen guest into dir, an empty
	// directory of the caller's. The guest stays frozen, also after an error,
	// which is cay.CodeCheckpointFailed or cay.CodeDiskFull. What the guest
	// wrote to its root directory is not in it: the caller keeps the directory
	// as it was while the guest was frozen.
	Checkpoint(ctx context.Context, id InstanceID, dir string) error

	// Restore runs a guest from a checkpoint, in place of Start. The instance's
	// spec must be that of the checkpointed guest; ID, RootFS, NetNS, Env,
	// Hostname, Limits and Labels may differ. The directory is only read, so
	// that many instances may be restored from one. When Restore returns the
	// guest runs, and parts of its memory may not have been read yet: the
	// directory must stay until Loaded has returned. A checkpoint of another version than the instance's engine is
	// cay.CodeSnapshotIncompatible. A failed Restore leaves the instance for
	// Kill.
	Restore(ctx context.Context, id InstanceID, dir string) error

	// Loaded returns when an instance has read all of the memory it is restored
	// from, or has ended; at once, for one that was started. An error but that of
	// the context says that some of it could not be read: the guest has seen
	// nothing wrong, and ends as by EndEngineCrash.
	Loaded(ctx context.Context, id InstanceID) error

	// Kill ends an instance and returns when its processes are gone and its
	// mounts, cgroups and files released. Unknown IDs and repeated calls are
	// no error.
	Kill(ctx context.Context, id InstanceID) error

	// Wait returns when the instance has ended, with the first cause the
	// runtime saw. Unknown IDs are cay.CodeNotFound. An exit is remembered
	// until Kill.
	Wait(ctx context.Context, id InstanceID) (Exit, error)

	// Instances returns every instance of this runtime's directory, checked
	// against the host: an instance whose process is gone is Exited.
	Instances(ctx context.Context) ([]Instance, error)

	// Console returns the last bytes (at most 1 MiB) the guest wrote to its
	// console, with the time of each line.
	Console(ctx context.Context, id InstanceID) ([]cay.ConsoleLine, error)

	Stats(ctx context.Context, id InstanceID) (Stats, error)

	// Shutdown ends every instance and the supervision itself. For `cay down`.
	Shutdown(ctx context.Context) error
}
