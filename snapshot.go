package cay

import (
	"context"
	"io"
	"time"
)

// SnapshotID names a snapshot of a sandbox: "s" and 20 characters of [a-z0-9].
type SnapshotID string

// NewSnapshotID returns a fresh random ID.
func NewSnapshotID() SnapshotID { return SnapshotID("s" + randomID(20)) }

// StartMode says how a sandbox gets going from a snapshot.
type StartMode string

// The modes.
const (
	// StartAuto restores the memory, and starts cold with the reason recorded
	// when there is none or none that fits.
	StartAuto StartMode = "auto"
	// StartRestore restores the memory or fails.
	StartRestore StartMode = "restore"
	// StartCold starts from the root file system alone.
	StartCold StartMode = "cold"
)

// SnapshotFormat is the number of the snapshot manifest's format. A reader
// refuses a number it does not know.
const SnapshotFormat = 2

// Snapshot is the manifest of a sandbox as it was at one instant. It is written
// last and atomically: a snapshot without a manifest does not exist.
type Snapshot struct {
	Format    int         `json:"format"`
	ID        SnapshotID  `json:"id"`
	CreatedAt time.Time   `json:"createdAt"`
	Sandbox   SandboxID   `json:"sandbox"`
	Execution ExecutionID `json:"execution"`
	Team      TeamID      `json:"team"`
	Template  TemplateID  `json:"template"`
	Build     BuildID     `json:"build"`
	Resources Resources   `json:"resources"`
	// EnvdVersion is that of the envd in the memory.
	EnvdVersion string `json:"envdVersion"`
	// Envd is the envd in the memory, and on the disk; empty: that of the build.
	// EnvdOther is one that may be there in its place, for a replacement of it
	// was under way.
	Envd      Digest `json:"envd,omitempty"`
	EnvdOther Digest `json:"envdOther,omitempty"`
	// Parent is the snapshot the sandbox was made from, if any. A snapshot is
	// whole without its parent.
	Parent SnapshotID `json:"parent,omitempty"`
	// Runtime and RuntimeVersion name the engine that wrote the memory and the
	// only one that can restore it.
	Runtime        string `json:"runtime"`
	RuntimeVersion string `json:"runtimeVersion"`
	// Engine names that engine's program, which the node keeps for as long as
	// a snapshot needs it. It is empty where the engine has no file of its own.
	Engine string `json:"engine,omitempty"`
	// Transient says that the snapshot was for starts right after it: it need
	// not survive a power cut, and its content was never compared with anything.
	Transient bool `json:"transient,omitempty"`
	// Memory lists the files of the memory; none means that only the disk was
	// saved.
	Memory []SnapshotPart `json:"memory,omitempty"`
	Disk   SnapshotPart   `json:"disk"`
}

// SnapshotPart is one file of a snapshot.
type SnapshotPart struct {
	Name      string `json:"name"`
	SizeBytes int64  `json:"sizeBytes"`
	// Digest is of the content. A disk has none: see Stamp.
	Digest Digest `json:"digest,omitempty"`
	// Stamp changes with every write to the file, by whomever: its inode, size
	// and times. Of a disk it is compared before each use.
	Stamp string `json:"stamp,omitempty"`
	// Check is a checksum of the content, compared before each use. A disk that
	// holds too much to be read in the time that a resume may take has none
	// here: the node makes it later, and keeps it beside the manifest.
	Check string `json:"check,omitempty"`
}

// SaveRequest says how to save a sandbox.
type SaveRequest struct {
	// Snapshot is the ID of the snapshot to make.
	Snapshot SnapshotID
	// Memory is false to save the disk alone.
	Memory bool
	// Pause ends the sandbox's run once the snapshot is whole.
	Pause bool
	// Transient is for a snapshot that sandboxes are started from at once, and
	// which is deleted then: it need not survive a power cut. What is read a
	// moment after it was written is not compared with a checksum.
	Transient bool
	// Healthy refuses the save with CodeGuestUnresponsive unless the guest's
	// daemon answers. A save without memory needs that in any case.
	Healthy bool
}

// Snapshots is what the control plane needs of a machine that keeps sandboxes
// as snapshots, beside [Node]. A sandbox is started from one by
// [SandboxConfig.From].
//
// Every method is safe for concurrent use. Errors are [*Error].
type Snapshots interface {
	// Save makes a snapshot of a running sandbox. After a nil error the
	// snapshot is whole and survives a power cut; with Pause the sandbox does
	// not run any more and may be started again, the rest of its run is removed
	// behind it, and Watch reports its end as EndPaused. After an error
	// the sandbox runs on as before and there is no snapshot; CodeShuttingDown
	// alone leaves open which of the two it is, and the next run of the node
	// settles it. Unknown sandboxes are CodeSandboxNotFound, one with another
	// operation under way is CodeSandboxTransition.
	Save(ctx context.Context, id SandboxID, q SaveRequest) (Snapshot, error)

	// Snapshots returns every whole snapshot, in no order.
	Snapshots(ctx context.Context) ([]Snapshot, error)

	// DeleteSnapshot removes a snapshot; an unknown one is no error. Sandboxes
	// made from it are whole without it.
	DeleteSnapshot(ctx context.Context, id SnapshotID) error

	// VerifySnapshot reads a snapshot and returns CodeSnapshotCorrupt with the
	// damaged part, if there is one.
	VerifySnapshot(ctx context.Context, id SnapshotID) error
}

// Archives is what a machine that keeps snapshots may offer beside [Snapshots]:
// to give one away as a single file, and to take one in.
type Archives interface {
	// OpenArchive returns a whole snapshot as an archive, and the archive's exact
	// size. It reads the snapshot as it is now, also if it is deleted meanwhile.
	// An unknown one is CodeNotFound. Reading it returns CodeSnapshotCorrupt when
	// a part is not what the manifest says.
	OpenArchive(ctx context.Context, id SnapshotID) (io.ReadCloser, int64, error)

	// ReceiveArchive makes the snapshot id of an archive: all of it, verified, or
	// nothing. accept is asked before anything but the manifest is read; its
	// error is returned. template is the name that the snapshot's template had.
	// A damaged or truncated archive is CodeSnapshotCorrupt, one of another
	// engine or format CodeSnapshotIncompatible, and one of a build that is not
	// here CodeTemplateNotFound.
	ReceiveArchive(ctx context.Context, id SnapshotID, r io.Reader, accept func(m Snapshot, template string) error) (Snapshot, error)
}
