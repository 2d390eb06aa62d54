// Package catalogtest proves that an adapter keeps the contract of package
// catalog, and holds a table for the tests of others.
package catalogtest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
)

// Run runs the suite. open is called once per subtest and returns an empty
// catalog that lives until the subtest ends.
func Run(t *testing.T, open func(t *testing.T) catalog.Catalog) {
	for _, c := range []struct {
		name string
		f    func(t *testing.T, c catalog.Catalog)
	}{
		{"absent", absent},
		{"round trip", roundTrip},
		{"replace", replace},
		{"delete", deletes},
		{"delete of an old execution", deleteOld},
		{"list", list},
		{"cancelled is never not found", cancelled},
		{"concurrent", concurrent},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, open(t)) })
	}
}

func route(n int, e string) catalog.Route {
	return catalog.Route{
		Sandbox:      cay.SandboxID(fmt.Sprintf("i%020d", n)),
		Execution:    cay.ExecutionID(e),
		Node:         "n1",
		Addr:         netip.AddrFrom4([4]byte{127, 1, byte(n >> 8), byte(n)}),
		TrafficToken: cay.Secret(fmt.Sprintf("token-%d", n)),
		Ingress:      cay.Ingress{MaskHost: "localhost:${PORT}", HTTPSPorts: []uint16{443, uint16(1000 + n)}},
	}
}

var same = cmpopts.EquateComparable(netip.Addr{})

func put(t *testing.T, c catalog.Catalog, r catalog.Route) {
	t.Helper()
	if err := c.Put(t.Context(), r); err != nil {
		t.Fatalf("Put(%s): %v", r.Sandbox, err)
	}
}

func want(t *testing.T, c catalog.Catalog, r catalog.Route) {
	t.Helper()
	got, err := c.Get(t.Context(), r.Sandbox)
	if err != nil {
		t.Fatalf("Get(%s): %v", r.Sandbox, err)
	}
	if d := gocmp.Diff(r, got, same); d != "" {
		t.Fatalf("Get(%s) (-want +got):\n%s", r.Sandbox, d)
	}
}

func wantAbsent(t *testing.T, c catalog.Catalog, id cay.SandboxID) {
	t.Helper()
	if r, err := c.Get(t.Context(), id); !errors.Is(err, catalog.ErrNotFound) {
		t.Fatalf("Get(%s) = %+v, %v; want ErrNotFound", id, r, err)
	}
}

func absent(t *testing.T, c catalog.Catalog) {
	wantAbsent(t, c, "i0")
	if err := c.Delete(t.Context(), "i0", "x0"); err != nil {
		t.Fatalf("deleting an absent route: %v", err)
	}
	if l, err := c.List(t.Context()); err != nil || len(l) != 0 {
		t.Fatalf("List of an empty catalog = %v, %v", l, err)
	}
}

func roundTrip(t *testing.T, c catalog.Catalog) {
	r := route(1, "x1")
	put(t, c, r)
	want(t, c, r)
	open := route(2, "x2")
	open.TrafficToken = ""
	open.Addr = netip.MustParseAddr("fd00::2")
	put(t, c, open)
	want(t, c, open)
	want(t, c, r)
}

func replace(t *testing.T, c catalog.Catalog) {
	put(t, c, route(1, "x1"))
	r := route(1, "x2")
	r.Addr = netip.MustParseAddr("127.9.9.9")
	put(t, c, r)
	want(t, c, r)
}

func deletes(t *testing.T, c catalog.Catalog) {
	a, b := route(1, "x1"), route(2, "x2")
	put(t, c, a)
	put(t, c, b)
	for range 2 {
		if err := c.Delete(t.Context(), a.Sandbox, a.Execution); err != nil {
			t.Fatal(err)
		}
	}
	wantAbsent(t, c, a.Sandbox)
	want(t, c, b)
}

func deleteOld(t *testing.T, c catalog.Catalog) {
	put(t, c, route(1, "x1"))
	now := route(1, "x2")
	put(t, c, now)
	if err := c.Delete(t.Context(), now.Sandbox, "x1"); err != nil {
		t.Fatal(err)
	}
	want(t, c, now)
}

func list(t *testing.T, c catalog.Catalog) {
	var all []catalog.Route
	for n := range 50 {
		r := route(n, fmt.Sprintf("x%d", n))
		all = append(all, r)
		put(t, c, r)
	}
	got, err := c.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(got, func(a, b catalog.Route) int { return cmp.Compare(a.Sandbox, b.Sandbox) })
	if d := gocmp.Diff(all, got, same); d != "" {
		t.Fatalf("List (-want +got):\n%s", d)
	}
}

func cancelled(t *testing.T, c catalog.Catalog) {
	put(t, c, route(1, "x1"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Get(ctx, route(1, "x1").Sandbox); errors.Is(err, catalog.ErrNotFound) {
		t.Fatal("Get with an ended context answers ErrNotFound for a route that exists")
	}
	if _, err := c.Get(ctx, "i0"); errors.Is(err, catalog.ErrNotFound) {
		t.Fatal("Get with an ended context claims to know that a route is absent")
	}
}

func concurrent(t *testing.T, c catalog.Catalog) {
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			for i := range 100 {
				r := route(n, fmt.Sprintf("x%d", i))
				if err := c.Put(t.Context(), r); err != nil {
					t.Error(err)
				}
				if got, err := c.Get(t.Context(), r.Sandbox); err != nil || !gocmp.Equal(got, r, same) {
					t.Errorf("Get after Put = %+v, %v", got, err)
				}
				if err := c.Delete(t.Context(), r.Sandbox, fmtExec(i-1)); err != nil {
					t.Error(err)
				}
				if _, err := c.List(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if l, err := c.List(t.Context()); err != nil || len(l) != 8 {
		t.Fatalf("List = %d routes, %v; want 8", len(l), err)
	}
}

func fmtExec(i int) cay.ExecutionID { return cay.ExecutionID(fmt.Sprintf("x%d", i)) }

// Table is a [catalog.Catalog] for the tests of others. The zero value is
// ready.
//
// Fail, if set, is asked before each operation ("put", "get", "delete",
// "list") and its error is returned, so that a test can break any step.
type Table struct {
	Fail func(op string) error

	mu     sync.Mutex
	routes map[cay.SandboxID]catalog.Route
}

var _ catalog.Catalog = (*Table)(nil)

func (t *Table) check(ctx context.Context, op string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if t.Fail == nil {
		return nil
	}
	return t.Fail(op)
}

// Put implements [catalog.Catalog].
func (t *Table) Put(ctx context.Context, r catalog.Route) error {
	if err := t.check(ctx, "put"); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.routes == nil {
		t.routes = map[cay.SandboxID]catalog.Route{}
	}
	t.routes[r.Sandbox] = r
	return nil
}

// Get implements [catalog.Catalog].
func (t *Table) Get(ctx context.Context, id cay.SandboxID) (catalog.Route, error) {
	if err := t.check(ctx, "get"); err != nil {
		return catalog.Route{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if r, ok := t.routes[id]; ok {
		return r, nil
	}
	return catalog.Route{}, catalog.ErrNotFound
}

// Delete implements [catalog.Catalog].
func (t *Table) Delete(ctx context.Context, id cay.SandboxID, e cay.ExecutionID) error {
	if err := t.check(ctx, "delete"); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.routes[id].Execution == e {
		delete(t.routes, id)
	}
	return nil
}

// List implements [catalog.Catalog].
func (t *Table) List(ctx context.Context) ([]catalog.Route, error) {
	if err := t.check(ctx, "list"); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]catalog.Route, 0, len(t.routes))
	for _, r := range t.routes {
		out = append(out, r)
	}
	return out, nil
}
