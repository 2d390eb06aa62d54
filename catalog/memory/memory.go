// Package memory keeps the catalog in this process: for one machine, where the
// orchestrator and the proxy share it. A restart empties it and the
// orchestrator fills it again from the guests it adopts.
package memory

import (
	"context"
	"sync"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
)

// Catalog is a [catalog.Catalog]. The zero value is empty and ready. It holds
// one entry per running sandbox, so its size is bounded by theirs.
type Catalog struct {
	mu     sync.RWMutex
	routes map[cay.SandboxID]catalog.Route
}

// New returns an empty catalog.
func New() *Catalog { return new(Catalog) }

// Put implements [catalog.Catalog].
func (c *Catalog) Put(ctx context.Context, r catalog.Route) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.routes == nil {
		c.routes = make(map[cay.SandboxID]catalog.Route)
	}
	c.routes[r.Sandbox] = r
	return nil
}

// Get implements [catalog.Catalog].
func (c *Catalog) Get(ctx context.Context, id cay.SandboxID) (catalog.Route, error) {
	if err := ctx.Err(); err != nil {
		return catalog.Route{}, err
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	r, ok := c.routes[id]
	if !ok {
		return catalog.Route{}, catalog.ErrNotFound
	}
	return r, nil
}

// Delete implements [catalog.Catalog].
func (c *Catalog) Delete(ctx context.Context, id cay.SandboxID, e cay.ExecutionID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.routes[id].Execution == e {
		delete(c.routes, id)
	}
	return nil
}

// List implements [catalog.Catalog].
func (c *Catalog) List(ctx context.Context) ([]catalog.Route, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	out := make([]catalog.Route, 0, len(c.routes))
	for _, r := range c.routes {
		out = append(out, r)
	}
	return out, nil
}
