package api

import (
	"context"
	"fmt"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/operator"
)

// ListTeams implements the generated interface.
func (s operatorHandlers) ListTeams(ctx context.Context, _ operator.ListTeamsRequestObject) (operator.ListTeamsResponseObject, error) {
	teams, err := s.Store.ListTeams(ctx)
	if err != nil {
		return nil, err
	}
	out := make(operator.ListTeams200JSONResponse, len(teams))
	for i, t := range teams {
		out[i] = teamRow(t)
	}
	return out, nil
}

// SetTeamLimits implements the generated interface.
func (s operatorHandlers) SetTeamLimits(ctx context.Context, r operator.SetTeamLimitsRequestObject) (operator.SetTeamLimitsResponseObject, error) {
	// The client may go: what is on record is to be in force.
	ctx, stop := detached(ctx, recordTimeout)
	defer stop()
	s.teams.Lock() // reading and writing are two calls
	defer s.teams.Unlock()
	t, err := s.Store.Team(ctx, cay.TeamID(r.TeamID))
	if err != nil {
		return nil, err
	}
	for _, f := range []struct {
		to   *int
		from *int
	}{
		{&t.Limits.ConcurrentSandboxes, r.Body.Sandboxes}, {&t.Limits.MaxLengthHours, r.Body.Hours},
		{&t.Limits.Network.Connections, r.Body.Connections}, {&t.Limits.Network.PerSecond, r.Body.ConnectionsPerSecond},
		{&t.Limits.Network.Mbit, r.Body.Mbit},
	} {
		if f.from != nil {
			*f.to = *f.from
		}
	}
	if err := s.Store.PutTeam(ctx, t); err != nil {
		return nil, err
	}
	if err := s.Node.RefreshTeam(ctx, t.ID); err != nil {
		// They are on record, for sandboxes and nodes to come; the same call
		// again tries again.
		return nil, fmt.Errorf("putting the network limits of team %s in force: %w", t.ID, err)
	}
	return operator.SetTeamLimits200JSONResponse(teamRow(t)), nil
}

func teamRow(t cay.Team) operator.Team {
	l := t.Limits
	return operator.Team{TeamID: string(t.ID), Name: t.Name, Slug: t.Slug, Limits: operator.TeamLimits{
		Sandboxes: l.ConcurrentSandboxes, Hours: l.MaxLengthHours,
		Connections: l.Network.Connections, ConnectionsPerSecond: l.Network.PerSecond, Mbit: l.Network.Mbit}}
}
