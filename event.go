package cay

import "time"

// EventType names something that happened to a sandbox.
type EventType string

// The events of a sandbox's life.
const (
	EventCreated EventType = "sandbox.created"
	EventKilled  EventType = "sandbox.killed"
	EventUpdated EventType = "sandbox.updated"
	EventPaused  EventType = "sandbox.paused"
	EventResumed EventType = "sandbox.resumed"
	// EventPauseFailed: it runs on.
	EventPauseFailed EventType = "sandbox.pause_failed"
	// EventResumeFailed: it stays paused.
	EventResumeFailed EventType = "sandbox.resume_failed"
	// EventDegraded: its memory was wished for and could not be restored.
	EventDegraded    EventType = "sandbox.restore_degraded"
	EventSnapshotted EventType = "sandbox.snapshotted"
)

// Event is one thing that happened, as history keeps it.
type Event struct {
	Type    EventType
	At      time.Time
	Team    TeamID
	Sandbox SandboxID
	Reason  EndReason // with EventKilled
	Message string
}
