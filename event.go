package cay

import "time"

// EventType names something that happened to a sandbox.
type EventType string

// The events of a sandbox's life.
const (
	EventCreated EventType = "sandbox.created"
	EventKilled  EventType = "sandbox.killed"
	EventUpdated EventType = "sandbox.updated"
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
