package cay

import (
	"slices"
	"strings"
	"time"
)

// SandboxID names a sandbox for its whole life, over pauses and resumes:
// "i" and 20 characters of [a-z0-9] (contract/e2b.md 1.4). It is no secret.
type SandboxID string

// NewSandboxID returns a fresh random ID.
func NewSandboxID() SandboxID { return SandboxID("i" + randomID(20)) }

// ParseSandboxID accepts an ID and the old two-part form "<id>-<clientID>",
// of which it returns the first part. Anything else is [CodeInvalidRequest].
func ParseSandboxID(s string) (SandboxID, error) {
	head, tail, two := strings.Cut(s, "-")
	if !validID(head) || (two && (tail == "" || strings.Contains(tail, "-"))) {
		return "", &Error{Code: CodeInvalidRequest, Layer: LayerAPI,
			Message: "the sandbox ID is malformed: want lower-case letters and digits, as in i1a2b3c4d5e6f7g8h9j0k",
			Fix:     "copy the ID from the answer of the create call or from `cay sandbox list`"}
	}
	return SandboxID(head), nil
}

// ExecutionID names one run of a sandbox between start (or resume) and pause
// (or kill). Every host object of a sandbox carries it, so that an object of
// an earlier run is never taken for one of this run.
type ExecutionID string

// NewExecutionID returns a fresh random ID: "x" and 16 characters of [a-z0-9].
func NewExecutionID() ExecutionID { return ExecutionID("x" + randomID(16)) }

// SandboxState is where a sandbox is in its life.
type SandboxState string

// The states. api/DESIGN.md says what each means; [SandboxState.May]
// which moves there are.
const (
	StateStarting     SandboxState = "starting"     // being made, or made from a snapshot, for the first time
	StateRunning      SandboxState = "running"      // its guest answers
	StatePausing      SandboxState = "pausing"      // being saved, to stop then
	StatePaused       SandboxState = "paused"       // a snapshot is all there is of it
	StateResuming     SandboxState = "resuming"     // being started from that snapshot
	StateSnapshotting SandboxState = "snapshotting" // runs while a snapshot of it is made
	StateKilling      SandboxState = "killing"      // being taken away
	StateEnded        SandboxState = "ended"        // final; it has a reason
)

// moves is the whole life of a sandbox. Everything else is a defect.
var moves = map[SandboxState][]SandboxState{
	"":                {StateStarting},
	StateStarting:     {StateRunning, StateKilling, StateEnded},
	StateRunning:      {StatePausing, StateSnapshotting, StateKilling, StateEnded},
	StatePausing:      {StatePaused, StateRunning, StateKilling, StateEnded},
	StatePaused:       {StateResuming, StateKilling},
	StateResuming:     {StateRunning, StatePaused, StateKilling, StateEnded},
	StateSnapshotting: {StateRunning, StateKilling, StateEnded},
	StateKilling:      {StateEnded},
	StateEnded:        nil,
}

// SandboxStates returns every state, in the order of a life.
func SandboxStates() []SandboxState {
	return []SandboxState{StateStarting, StateRunning, StatePausing, StatePaused, StateResuming, StateSnapshotting, StateKilling, StateEnded}
}

// May reports whether a sandbox may move from one state to another. To stay is
// no move, and always allowed.
func (s SandboxState) May(to SandboxState) bool {
	return s == to || slices.Contains(moves[s], to)
}

// Runs reports whether a sandbox in this state has a guest that answers.
func (s SandboxState) Runs() bool { return s == StateRunning || s == StateSnapshotting }

// Holds reports whether a sandbox in this state takes a place of its team's
// limit: all but those that use no memory and no processor.
func (s SandboxState) Holds() bool { return s != StatePaused && s != StateEnded }

// EndReason says why a sandbox ended. Every sandbox ID that was ever returned
// ends in exactly one of these.
type EndReason string

// The reasons.
const (
	EndRequest     EndReason = "request"      // a client killed it
	EndTimeout     EndReason = "timeout"      // its deadline passed
	EndOOM         EndReason = "oom"          // the guest used more memory than its limit
	EndPIDs        EndReason = "pids"         // the guest's processes exhausted the limit on host threads
	EndGuestExit   EndReason = "guest_exit"   // PID 1 of the guest ended
	EndEngineCrash EndReason = "engine_crash" // the engine process died
	EndStartFailed EndReason = "start_failed" // it never became ready
	EndNodeLost    EndReason = "node_lost"    // the machine restarted, or its objects are gone
	EndShutdown    EndReason = "shutdown"     // the operator ran `cay down`
	EndOrphan      EndReason = "orphan"       // no record owned it
	EndPaused      EndReason = "paused"       // it was saved; its ID lives on
)

// Resources are the limits of one sandbox.
type Resources struct {
	CPUs     int `json:"cpus"`     // virtual CPUs, >= 1
	MemoryMB int `json:"memoryMB"` // MiB of guest memory, engine overhead included, >= 128
	DiskMB   int `json:"diskMB"`   // MiB the guest may write, >= 64
}

// SandboxConfig is what the creator of a sandbox asked for and the node needs.
type SandboxConfig struct {
	ID        SandboxID
	TeamID    TeamID
	Template  TemplateID
	Build     BuildID
	Resources Resources
	// From is the snapshot to start from; empty is the build alone. Build and
	// Resources must be the snapshot's.
	From SnapshotID
	// Mode is how, with From; empty is StartAuto.
	Mode StartMode
	// EnvVars are visible to every process of the sandbox.
	EnvVars map[string]string
	// AccessToken guards envd; empty leaves envd open.
	AccessToken Secret
	// TrafficToken guards the other ports; empty leaves them open.
	TrafficToken Secret
	// Ingress says how requests reach the other ports.
	Ingress Ingress
	// Egress says what the sandbox may reach outside.
	Egress Egress
	// Deadline is recorded with the sandbox for the operator's eyes; the
	// control plane enforces it.
	Deadline time.Time
}

// NodeSandbox is a sandbox as its node sees it.
type NodeSandbox struct {
	ID          SandboxID    `json:"id"`
	ExecutionID ExecutionID  `json:"executionID"`
	TeamID      TeamID       `json:"teamID"`
	Template    TemplateID   `json:"template"`
	Build       BuildID      `json:"build"`
	Resources   Resources    `json:"resources"`
	State       SandboxState `json:"state"`
	StartedAt   time.Time    `json:"startedAt"`
	Deadline    time.Time    `json:"deadline"`
	EnvdVersion string       `json:"envdVersion"`
	// Envd is the envd that it has, if that is known. EnvdOutdated tells that the
	// node has another one for it ([EnvdUpgrader]).
	Envd         Digest `json:"envd,omitempty"`
	EnvdOutdated bool   `json:"envdOutdated,omitempty"`
	Egress       Egress `json:"egress"`  // without the proxy's password
	Adopted      bool   `json:"adopted"` // survived a restart of the server
	// Restored tells that its memory is that of a snapshot. Degraded says why
	// not, if that was wished for.
	Restored bool          `json:"restored,omitempty"`
	Degraded string        `json:"degraded,omitempty"`
	Host     SandboxOnHost `json:"host"`
}

// SandboxOnHost lists the host objects of a running sandbox, for `inspect`.
type SandboxOnHost struct {
	Runtime        string `json:"runtime"`        // "gvisor"
	RuntimeVersion string `json:"runtimeVersion"` // engine version
	Container      string `json:"container"`      // the engine's name for it
	PID            int    `json:"pid"`            // engine process
	Address        string `json:"address"`        // where the host reaches the guest
	NetNS          string `json:"netns"`          // network namespace of the guest
	RootFS         string `json:"rootfs"`         // mount that is the guest's root
	DiskImage      string `json:"diskImage"`      // file that holds what the guest wrote
}

// StartStep is one timed step of a start, or of the last save, kept so that a
// slow or failed one can be explained.
type StartStep struct {
	// Op is the operation, "pause" or "snapshot"; empty is the start.
	Op    string        `json:"op,omitempty"`
	Name  string        `json:"name"`
	Layer Layer         `json:"layer"`
	Took  time.Duration `json:"took"` // nanoseconds
	Error string        `json:"error,omitempty"`
}
