// Package catalog is the contract of the live table: which sandbox is on which
// node, and where there. The orchestrator writes it, the proxy reads it.
//
// The catalog is a cache of what nodes know: losing it loses no sandbox.
package catalog

import (
	"context"
	"errors"
	"net/netip"

	"github.com/cayhq/cay"
)

// ErrNotFound is returned by Get for a sandbox that no node runs.
// Any other error means the catalog cannot answer, which is never "not found".
var ErrNotFound = errors.New("catalog: no such sandbox")

// Route says where a sandbox is reached. It names the execution, so that a
// reused address can never answer for another sandbox.
type Route struct {
	Sandbox   cay.SandboxID
	Execution cay.ExecutionID
	Node      cay.NodeID
	// Addr is the address on Node at which the guest's ports are reached.
	Addr netip.Addr
	// TrafficToken guards every port but envd's; empty leaves them open.
	TrafficToken cay.Secret
	// Ingress says how requests reach those ports. It is not to be changed.
	Ingress cay.Ingress
}

// Catalog maps sandboxes to routes.
type Catalog interface {
	// Put inserts or replaces the route of a sandbox.
	Put(ctx context.Context, r Route) error
	// Get returns the route, or ErrNotFound.
	Get(ctx context.Context, id cay.SandboxID) (Route, error)
	// Delete removes the route if it is still that execution's; a newer
	// execution's route stays. Deleting an absent route is no error.
	Delete(ctx context.Context, id cay.SandboxID, e cay.ExecutionID) error
	// List returns every route, in no order.
	List(ctx context.Context) ([]Route, error)
}
