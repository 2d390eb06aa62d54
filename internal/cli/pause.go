package cli

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/operator"
)

func (c *CLI) pauseCmd() *cobra.Command {
	var disk bool
	cmd := c.each(&cobra.Command{
		Use:   "pause SANDBOX...",
		Short: "Save sandboxes and stop them; they use no memory then",
		Long: `Saves sandboxes and stops them. The ID of each is printed when it is on disk; one
that cannot be saved runs on. A paused sandbox has no end.`,
		Example: "  cay sandbox pause i1a2b3c4d5e6f7g8h9j0k\n  cay sandbox pause --disk-only ID",
	}, func(ctx context.Context, client *Client, id string) error { return client.Pause(ctx, id, !disk) })
	cmd.ValidArgsFunction = c.sandboxIDs
	cmd.Flags().BoolVar(&disk, "disk-only", false, "save the files alone, and start anew from them")
	return cmd
}

// Pause saves a sandbox and stops it.
func (c *Client) Pause(ctx context.Context, id string, memory bool) error {
	r, err := c.api.PauseSandboxWithResponse(ctx, id, api.PauseSandboxJSONRequestBody{Memory: &memory})
	if err != nil {
		return c.unreachable(err)
	}
	return answered(r.HTTPResponse, r.JSONDefault, http.StatusNoContent)
}

func (c *CLI) resumeCmd() *cobra.Command {
	var seconds int32
	var cold bool
	cmd := c.each(&cobra.Command{
		Use:     "resume SANDBOX...",
		Short:   "Start paused sandboxes where they were",
		Example: "  cay sandbox resume i1a2b3c4d5e6f7g8h9j0k\n  cay sandbox resume --cold --timeout 3600 ID",
	}, func(ctx context.Context, client *Client, id string) error {
		return client.Resume(ctx, id, seconds, cold)
	})
	cmd.ValidArgsFunction = c.sandboxIDs
	cmd.Flags().Int32VarP(&seconds, "timeout", "t", 300, "seconds that it lives from then on")
	cmd.Flags().BoolVar(&cold, "cold", false, "start from the files alone, though the memory was saved")
	return cmd
}

// Resume starts a paused sandbox; one that runs lives at least for the time.
func (c *Client) Resume(ctx context.Context, id string, seconds int32, cold bool) error {
	body := api.ConnectSandboxV2JSONRequestBody{Timeout: &seconds}
	if cold {
		body.Memory = new(bool)
	}
	r, err := c.api.ConnectSandboxV2WithResponse(ctx, id, body)
	if err != nil {
		return c.unreachable(err)
	}
	if r.StatusCode() == http.StatusOK {
		return nil
	}
	return answered(r.HTTPResponse, r.JSONDefault, http.StatusCreated)
}

func (c *CLI) forkCmd() *cobra.Command {
	var count, seconds int32
	cmd := &cobra.Command{
		Use:   "fork SANDBOX",
		Short: "Make copies of a running sandbox",
		Long: `Makes copies of a running sandbox, which goes on. Each has its memory and its
files as they are now, and an identity of its own. The ID of each is printed.`,
		Example:           "  cay sandbox fork --count 4 i1a2b3c4d5e6f7g8h9j0k",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.firstSandboxID,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			r, err := client.api.ForkSandboxWithResponse(cmd.Context(), args[0], api.ForkSandboxJSONRequestBody{Count: &count, Timeout: &seconds})
			if err != nil {
				return client.unreachable(err)
			}
			forks, err := body(r.JSON201, r.HTTPResponse, r.JSONDefault, http.StatusCreated)
			if err != nil {
				return err
			}
			// What keeps one from being made mostly keeps others, too: the reason is
			// told once.
			var why *cay.Error
			failed := 0
			for _, f := range forks {
				if f.Sandbox != nil {
					fmt.Fprintln(c.Out, f.Sandbox.SandboxID)
				} else if failed++; f.Error != nil && why == nil {
					why = told(f.Error)
				}
			}
			if why == nil {
				return nil
			}
			why.Message = fmt.Sprintf("%d of %d forks were not made: %s", failed, len(forks), why.Message)
			return why
		},
	}
	cmd.Flags().Int32VarP(&count, "count", "n", 1, "how many")
	cmd.Flags().Int32VarP(&seconds, "timeout", "t", 300, "seconds that each lives")
	return cmd
}

func (c *CLI) snapshotOfCmd() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "snapshot SANDBOX",
		Short: "Keep a running sandbox as it is now, to make others from",
		Long: `Makes a snapshot of a running sandbox, which goes on. What is printed can be used
as the template of new sandboxes, with every client, and with cay snapshot.`,
		Example:           "  cay sandbox snapshot --name warm:v2 i1a2b3c4d5e6f7g8h9j0k",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.firstSandboxID,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			var q api.CreateSnapshotJSONRequestBody
			if name != "" {
				q.Name = &name
			}
			r, err := client.api.CreateSnapshotWithResponse(cmd.Context(), args[0], q)
			if err != nil {
				return client.unreachable(err)
			}
			made, err := body(r.JSON201, r.HTTPResponse, r.JSONDefault, http.StatusCreated)
			if err == nil {
				fmt.Fprintln(c.Out, made.SnapshotID)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "what to call it, as name or name:tag")
	return cmd
}

// records asks for the record of every live sandbox of every team.
func (c *Client) records(ctx context.Context) ([]operator.SandboxRecord, error) {
	r, err := c.operator.ListSandboxesWithResponse(ctx, &operator.ListSandboxesParams{})
	if err != nil {
		return nil, c.unreachable(err)
	}
	return body(r.JSON200, r.HTTPResponse, fault(r.JSONDefault), http.StatusOK)
}

func (c *CLI) treeCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "tree",
		Short:   "Show which sandboxes were made from which",
		Example: "  cay sandbox tree",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			all, err := client.records(cmd.Context())
			if err != nil {
				return err
			}
			if len(all) == 0 {
				fmt.Fprintln(c.Err, "No sandboxes run.")
				return nil
			}
			return writeTable(c.Out, "SANDBOX\tSTATE\tTEMPLATE\tMADE", tree(all, c.now()))
		},
	}
}

// tree makes rows of sandboxes, oldest first, each below that whose snapshot it
// was made from. A parent that is gone has a row all the same, since its children
// have it in common.
func tree(all []operator.SandboxRecord, now time.Time) [][]string {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b operator.SandboxRecord) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.SandboxID, b.SandboxID))
	})
	byID, children := map[string]operator.SandboxRecord{}, map[string][]string{}
	for _, r := range all {
		byID[r.SandboxID] = r
	}
	for _, r := range all {
		if _, there := byID[r.Parent]; !there && r.Parent != "" && children[r.Parent] == nil {
			children[""] = append(children[""], r.Parent)
		}
		children[r.Parent] = append(children[r.Parent], r.SandboxID)
	}
	var out [][]string
	var draw func(id string, depth int)
	draw = func(id string, depth int) {
		row := []string{strings.Repeat("  ", depth) + id, "gone", "", ""}
		if r, there := byID[id]; there {
			row = []string{row[0], string(r.State), r.Alias, ago(now.Sub(r.CreatedAt)) + " ago"}
		}
		out = append(out, row)
		for _, child := range children[id] {
			draw(child, depth+1)
		}
	}
	for _, id := range children[""] {
		draw(id, 0)
	}
	return out
}

func (c *CLI) explainCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "explain SANDBOX",
		Short: "Tell what became of a sandbox, and how long each step of its last start and pause took",
		Long: `Tells what became of a sandbox, from its making to its end, with the reason of
what failed; and each step of its last start or resume, and of its last pause or
snapshot, with the part of the system that did it and how long that took.`,
		Example:           "  cay sandbox explain i1a2b3c4d5e6f7g8h9j0k",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.firstSandboxID,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			in, err := client.inspect(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			r := in.Record
			rows := [][]string{{instant(r.CreatedAt), "sandbox.created", "from " + r.Alias}}
			if r.Parent != "" {
				rows[0][2] += ", with snapshot " + r.Origin + " of sandbox " + r.Parent
			}
			for _, h := range r.History {
				rows = append(rows, []string{instant(h.Timestamp), h.Type, h.Message})
			}
			if r.EndedAt != nil {
				rows = append(rows, []string{instant(*r.EndedAt), "sandbox.killed", r.EndReason + ": " + r.EndMessage})
			}
			if err := writeTable(c.Out, "AT\tWHAT\tHOW", rows); err != nil {
				return err
			}
			return c.printTrace(in.Trace)
		},
	}
}
