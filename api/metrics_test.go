package api

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
)

// measuredNode has two points of each of its sandboxes. It counts those that it
// was asked for.
type measuredNode struct {
	*fakeNode
	asked *int
}

func (n measuredNode) LastMetric(ctx context.Context, id cay.SandboxID) (cay.Metric, error) {
	asked := *n.asked
	all, err := n.Metrics(ctx, id, time.Time{}, time.Time{})
	*n.asked = asked
	if err != nil {
		return cay.Metric{}, err
	}
	*n.asked++
	return all[len(all)-1], nil
}

func (n measuredNode) Metrics(_ context.Context, id cay.SandboxID, from, to time.Time) ([]cay.Metric, error) {
	if !n.has(id) {
		return nil, &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerRuntime, Message: "not here"}
	}
	var out []cay.Metric
	for i := range 2 {
		p := cay.Metric{At: time.Unix(int64(1000+5*i), 0).UTC(), CPUs: 2, CPUPercent: 12.5, MemoryUsed: 1, MemoryTotal: 2, MemoryCached: 3, DiskUsed: 4, DiskTotal: 5}
		if (from.IsZero() || !p.At.Before(from)) && (to.IsZero() || !p.At.After(to)) {
			out = append(out, p)
			*n.asked++
		}
	}
	return out, nil
}

func TestMetrics(t *testing.T) {
	f := newFixture(t)
	asked := 0
	f.s.Metrics = measuredNode{f.node, &asked}
	id := string(f.create(`{"templateID":"base"}`))
	for query, want := range map[string]int{"": 2, "?start=1001": 1, "?end=1000": 1, "?start=1000&end=1005": 2, "?start=2000": 0} {
		var got []gen.SandboxMetric
		f.want(200, f.request("GET", "/sandboxes/"+id+"/metrics"+query, "")).decode(t, &got)
		if len(got) != want {
			t.Errorf("%q: %d points, want %d", query, len(got), want)
		}
		if query == "" && (got[0].TimestampUnix != 1000 || got[0].CpuCount != 2 || got[0].CpuUsedPct != 12.5 || got[0].MemUsed != 1 ||
			got[0].MemTotal != 2 || got[0].MemCache != 3 || got[0].DiskUsed != 4 || got[0].DiskTotal != 5) {
			t.Errorf("the first point: %+v", got[0])
		}
	}
	f.want(400, f.request("GET", "/sandboxes/"+id+"/metrics?start=5&end=4", ""))
	f.want(404, f.request("GET", "/sandboxes/"+string(cay.NewSandboxID())+"/metrics", ""))
	f.want(404, f.request("GET", "/sandboxes/"+id+"/metrics", "", "X-API-Key", f.foreign))

	// Of several: another team's and an unknown one are left out alike.
	var all gen.SandboxesWithMetrics
	asked = 0
	f.want(200, f.request("GET", fmt.Sprintf("/sandboxes/metrics?sandbox_ids=%s,%s", id, cay.NewSandboxID()), "")).decode(t, &all)
	if len(all.Sandboxes) != 1 || all.Sandboxes[id].TimestampUnix != 1005 {
		t.Errorf("the latest of several: %+v", all)
	}
	if asked != 1 {
		t.Errorf("the node was asked for %d points, to give one", asked)
	}
	f.want(200, f.request("GET", "/sandboxes/metrics?sandbox_ids="+id, "", "X-API-Key", f.foreign)).decode(t, &all)
	f.want(400, f.request("GET", "/sandboxes/metrics?sandbox_ids="+strings.Repeat(id+",", 100)+id, ""))

	f.want(204, f.request("DELETE", "/sandboxes/"+id, ""))
	f.want(404, f.request("GET", "/sandboxes/"+id+"/metrics", ""))
}
