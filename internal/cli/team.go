package cli

import (
	"context"
	"fmt"
	"net/http"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/operator"
)

func (c *CLI) teamCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "team",
		Short:   "See and change what teams may do",
		Example: "  cay team list\n  cay team limits default --mbit 500 --connections 20000",
	}
	cmd.AddCommand(c.teamListCmd(), c.teamLimitsCmd())
	return cmd
}

// teams returns every team, oldest first.
func (c *Client) teams(ctx context.Context) ([]operator.Team, error) {
	r, err := c.operator.ListTeamsWithResponse(ctx)
	if err != nil {
		return nil, c.unreachable(err)
	}
	all, err := body(r.JSON200, r.HTTPResponse, fault(r.JSONDefault), http.StatusOK)
	return all, err
}

func (c *CLI) teamListCmd() *cobra.Command {
	return listing[operator.Team]{
		fetch:  (*Client).teams,
		none:   "There are no teams; `cay up` makes the first.",
		header: "TEAM ID\tSLUG\tSANDBOXES\tHOURS\tCONNECTIONS\tNEW A SECOND\tMBIT/S",
		row: func(t operator.Team) []string {
			l := t.Limits
			return []string{t.TeamID, t.Slug, strconv.Itoa(l.Sandboxes), strconv.Itoa(l.Hours),
				bound(l.Connections), bound(l.ConnectionsPerSecond), bound(l.Mbit)}
		},
	}.command(c, &cobra.Command{
		Use:     "list",
		Short:   "List teams with their limits",
		Example: "  cay team list\n  cay team list -o json",
	})
}

// bound is a limit for people; 0 is none.
func bound(n int) string {
	if n == 0 {
		return "-"
	}
	return strconv.Itoa(n)
}

func (c *CLI) teamLimitsCmd() *cobra.Command {
	var out *format
	var sandboxes, hours, connections, perSecond, mbit int
	cmd := &cobra.Command{
		Use:   "limits TEAM",
		Short: "Show or change what a team may do",
		Long: `Changes the limits of a team, named by its ID or slug, and shows them. What is not
given stays; without a flag nothing changes. The network's count all sandboxes of
the team on a machine together, beside the limits of each, and are in force at
once; 0 is no bound.`,
		Example: `  cay team limits default
  cay team limits default --connections 20000 --connections-per-second 2000 --mbit 500
  cay team limits default --mbit 0`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completing(c, (*Client).teams, func(t operator.Team) (string, string) { return t.Slug, t.Name }),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			t, err := client.team(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			var change operator.TeamLimitsChange
			given := false
			for flag, f := range map[string]struct {
				to   **int
				from *int
			}{
				"sandboxes": {&change.Sandboxes, &sandboxes}, "hours": {&change.Hours, &hours}, "connections": {&change.Connections, &connections},
				"connections-per-second": {&change.ConnectionsPerSecond, &perSecond}, "mbit": {&change.Mbit, &mbit},
			} {
				if cmd.Flags().Changed(flag) {
					*f.to, given = f.from, true
				}
			}
			if given {
				r, err := client.operator.SetTeamLimitsWithResponse(cmd.Context(), t.TeamID, change)
				if err != nil {
					return client.unreachable(err)
				}
				if t, err = body(r.JSON200, r.HTTPResponse, fault(r.JSONDefault), http.StatusOK); err != nil {
					return err
				}
			}
			if *out == asJSON {
				return WriteJSON(c.Out, t)
			}
			l := t.Limits
			return writePairs(c.Out, [][2]string{{"Team", t.TeamID}, {"Sandboxes", strconv.Itoa(l.Sandboxes)}, {"Hours", strconv.Itoa(l.Hours)},
				{"Connections", bound(l.Connections)}, {"New a second", bound(l.ConnectionsPerSecond)}, {"Mbit/s", bound(l.Mbit)}})
		},
	}
	out = addOutput(cmd)
	cmd.Flags().IntVar(&sandboxes, "sandboxes", 0, "sandboxes that start and run together")
	cmd.Flags().IntVar(&hours, "hours", 0, "the longest life of a sandbox")
	cmd.Flags().IntVar(&connections, "connections", 0, "connections that all sandboxes of the team on a machine have open")
	cmd.Flags().IntVar(&perSecond, "connections-per-second", 0, "new connections of all of them, after a burst of twice as many")
	cmd.Flags().IntVar(&mbit, "mbit", 0, "Mbit/s into all of them, and out of them")
	return cmd
}

// team returns the team of an ID or a slug.
func (c *Client) team(ctx context.Context, ref string) (operator.Team, error) {
	all, err := c.teams(ctx)
	if err != nil {
		return operator.Team{}, err
	}
	for _, t := range all {
		if t.TeamID == ref || t.Slug == ref {
			return t, nil
		}
	}
	return operator.Team{}, &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerAPI,
		Message: fmt.Sprintf("there is no team '%s'", ref), Fix: "see `cay team list` for those there are"}
}
