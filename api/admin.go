package api

import (
	"context"
	"fmt"
	"sync"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/store"
)

// adminHandlers serves what the public contract has for operators.
type adminHandlers struct{ *Server }

// clusterID is the constant cluster of one control plane.
const clusterID = "00000000-0000-0000-0000-000000000000"

// Health implements the generated interface.
func (s adminHandlers) Health(context.Context, gen.HealthRequestObject) (gen.HealthResponseObject, error) {
	if s.draining.Load() {
		return nil, errShuttingDown
	}
	return gen.Health204Response{}, nil
}

// KillTeamSandboxes implements the generated interface.
func (s adminHandlers) KillTeamSandboxes(ctx context.Context, r gen.KillTeamSandboxesRequestObject) (gen.KillTeamSandboxesResponseObject, error) {
	team, err := s.Store.Team(ctx, cay.TeamID(r.TeamID))
	if err != nil {
		return nil, err
	}
	rows, err := s.Store.ListSandboxes(ctx, store.SandboxFilter{Team: team.ID})
	if err != nil {
		return nil, err
	}
	var out gen.KillTeamSandboxes200JSONResponse
	var mu sync.Mutex
	var wg sync.WaitGroup
	room := make(chan struct{}, killAtOnce)
	for _, row := range rows {
		wg.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			err := s.life.kill(ctx, team.ID, row.ID, cay.EndRequest, "an operator ended every sandbox of the team")
			mu.Lock()
			defer mu.Unlock()
			switch cay.CodeOf(err) {
			case "":
				out.KilledCount++
			case cay.CodeSandboxNotFound: // it ended meanwhile
			default:
				s.Log.Error("ending every sandbox of a team", "sandbox", row.ID, "error", err)
				out.FailedCount++
			}
		})
	}
	wg.Wait()
	return out, nil
}

// killAtOnce bounds the kills of one call.
const killAtOnce = 16

// RunningSandboxCounts implements the generated interface.
func (s adminHandlers) RunningSandboxCounts(ctx context.Context, _ gen.RunningSandboxCountsRequestObject) (gen.RunningSandboxCountsResponseObject, error) {
	rows, err := s.Store.ListSandboxes(ctx, store.SandboxFilter{States: []cay.SandboxState{cay.StateRunning}})
	if err != nil {
		return nil, err
	}
	out := gen.RunningSandboxCounts200JSONResponse{}
	for _, r := range rows {
		out[string(r.Team)]++
	}
	return out, nil
}

// CreateTeamAPIKey implements the generated interface.
func (s adminHandlers) CreateTeamAPIKey(ctx context.Context, r gen.CreateTeamAPIKeyRequestObject) (gen.CreateTeamAPIKeyResponseObject, error) {
	team, err := s.Store.Team(ctx, cay.TeamID(r.TeamID))
	if err != nil {
		return nil, err
	}
	k, err := s.createKey(ctx, team.ID, r.Body.Name)
	return gen.CreateTeamAPIKey201JSONResponse(k), err
}

// DeleteTeamAPIKey implements the generated interface.
func (s adminHandlers) DeleteTeamAPIKey(ctx context.Context, r gen.DeleteTeamAPIKeyRequestObject) (gen.DeleteTeamAPIKeyResponseObject, error) {
	team, err := s.Store.Team(ctx, cay.TeamID(r.TeamID))
	if err != nil {
		return nil, err
	}
	if err := s.Store.DeleteKey(ctx, team.ID, store.KeyID(r.ApiKeyID)); err != nil {
		return nil, noKey(err, r.ApiKeyID)
	}
	return gen.DeleteTeamAPIKey204Response{}, nil
}

// ListNodes implements the generated interface.
func (s adminHandlers) ListNodes(ctx context.Context, r gen.ListNodesRequestObject) (gen.ListNodesResponseObject, error) {
	if r.Params.ClusterID != nil && *r.Params.ClusterID != clusterID {
		return gen.ListNodes200JSONResponse{}, nil
	}
	n, err := s.node(ctx)
	if err != nil {
		return nil, err
	}
	return gen.ListNodes200JSONResponse{n}, nil
}

// GetNode implements the generated interface.
func (s adminHandlers) GetNode(ctx context.Context, r gen.GetNodeRequestObject) (gen.GetNodeResponseObject, error) {
	n, err := s.node(ctx)
	if err != nil {
		return nil, err
	}
	if n.Id != r.NodeID || r.Params.ClusterID != nil && *r.Params.ClusterID != clusterID {
		return nil, &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerPlacement,
			Message: fmt.Sprintf("there is no node '%s'", r.NodeID), Fix: "see GET /nodes for those there are"}
	}
	return gen.GetNode200JSONResponse{Id: n.Id, Version: n.Version, Commit: n.Commit, ServiceInstanceID: n.ServiceInstanceID,
		ClusterID: n.ClusterID, MachineInfo: n.MachineInfo, Status: n.Status, StatusChangedAt: n.StatusChangedAt,
		SandboxCount: n.SandboxCount, Metrics: n.Metrics, CreateSuccesses: n.CreateSuccesses, CreateFails: n.CreateFails}, nil
}

// node describes the machine. What is not measured is 0 or empty, as the
// document says.
func (s adminHandlers) node(ctx context.Context) (gen.Node, error) {
	info, err := s.Node.Info(ctx)
	if err != nil {
		return gen.Node{}, err
	}
	rows, err := s.Store.ListSandboxes(ctx, store.SandboxFilter{States: []cay.SandboxState{cay.StateStarting, cay.StateRunning}})
	if err != nil {
		return gen.Node{}, err
	}
	m := gen.NodeMetrics{CpuCount: uint32(info.CPUs), MemoryTotalBytes: uint64(info.MemoryBytes), Disks: []gen.DiskMetrics{}}
	for _, r := range rows {
		m.AllocatedCPU += uint32(r.Resources.CPUs)
		m.AllocatedMemoryBytes += uint64(r.Resources.MemoryMB) << 20
	}
	return gen.Node{Id: string(info.ID), Version: info.Version, Commit: cay.Commit, ServiceInstanceID: string(info.ID), ClusterID: clusterID,
		Status: gen.NodeStatusReady, StatusChangedAt: s.life.began.UTC(), SandboxCount: uint32(info.Sandboxes), Metrics: m,
		CreateSuccesses: uint64(s.made.Load()), CreateFails: uint64(s.failed.Load()), SandboxStartingCount: s.life.startsUnderWay()}, nil
}
