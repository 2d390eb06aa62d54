package orchestrator

import (
	"context"
	"net"
	"net/netip"
	"os"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/disk"
	"github.com/cayhq/cay/network"
)

// Slots is what the orchestrator needs of the network mechanism.
type Slots interface {
	// Acquire returns a clean slot whose egress policy is in force.
	Acquire(ctx context.Context, e cay.Egress) (network.Slot, error)
	// Adopt claims a slot that a record of an earlier run of the server names.
	Adopt(ctx context.Context, index int) (network.Slot, error)
	// SetPolicy changes the egress policy of a slot in use.
	SetPolicy(ctx context.Context, index int, e cay.Egress) error
	// LimitTeam puts limits in force for the slots of a team together, and
	// counts slots in use among them; others are ignored.
	LimitTeam(ctx context.Context, id cay.TeamID, l cay.NetworkLimits, slots ...int) error
	// Divert opens the sockets to which a policy with names turns what the
	// guest opens. Whoever has them closes them before Release.
	Divert(ctx context.Context, index int) (network.Diverted, error)
	// Dial opens a connection outwards for those who serve the sockets.
	Dial(ctx context.Context, index int, to netip.AddrPort) (net.Conn, error)
	// Refusals returns what was refused to the guest of a slot after a number.
	Refusals(ctx context.Context, index int, seq uint64) ([]cay.EgressRefusal, error)
	// NoteRefusal adds one that was not the network's.
	NoteRefusal(index int, r cay.EgressRefusal)
	// Release gives a slot back, whoever holds it; an unknown one is no error.
	Release(ctx context.Context, index int) error
	// Sweep removes every slot that was neither acquired nor adopted.
	Sweep(ctx context.Context) error
}

// Disks is what the orchestrator needs of the disk mechanism.
type Disks interface {
	Create(ctx context.Context, s disk.Spec) (disk.Root, error)
	// Remove takes a root directory away with everything written to it; an
	// unknown one is no error.
	Remove(ctx context.Context, id string) error
	// List returns the IDs found on the host, half-made ones included.
	List(ctx context.Context) ([]string, error)

	// Usage returns how many bytes the guest has written, and may write.
	Usage(id string) (used, total int64, err error)

	// Flush begins to write back what a disk holds.
	Flush(id string) error
	// Clone takes what a disk holds, for Keep; nothing writes to it meanwhile.
	Clone(ctx context.Context, id, name string) error
	// Keep makes the clone a saved disk, which survives a power cut if durable.
	Keep(ctx context.Context, name string, durable bool) (disk.Saved, error)
	// Receive makes a saved disk of what fill writes.
	Receive(ctx context.Context, name string, fill func(*os.File) error) (disk.Saved, error)
	FindSaved(name string) (disk.Saved, error)
	// RemoveSaved removes a saved disk, or its clone; an unknown one is no error.
	RemoveSaved(ctx context.Context, name string) error
	ListSaved(ctx context.Context) ([]string, error)
}

// Engines keeps the programs of engines: the present one, and earlier ones for
// the guests and the snapshots that need them.
type Engines interface {
	// List returns the names of the programs that are there.
	List() ([]string, error)
	// Remove takes one away; an unknown one is no error. Processes that run it
	// keep it.
	Remove(name string) error
}

// Builds finds builds on this machine.
type Builds interface {
	// Open returns the manifest of a build and the files of its layers,
	// lowest first. Errors are template_not_found, template_incomplete,
	// template_invalid, object_corrupt.
	Open(ctx context.Context, b cay.BuildID) (cay.Manifest, []disk.Layer, error)
}

// Streams is told of routes that are gone, so that open connections to a guest
// end at once instead of hanging. The proxy of the same process implements it.
type Streams interface {
	Cut(id cay.SandboxID, e cay.ExecutionID)
}
