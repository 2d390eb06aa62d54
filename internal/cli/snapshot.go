package cli

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay/internal/gen/operator"
)

func (c *CLI) snapshotCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot",
		Short: "Look at snapshots of sandboxes, check, move and delete them",
		Example: `  cay sandbox snapshot --name warm:v2 ID     # make one
  cay snapshot list
  cay snapshot verify ID
  cay snapshot export ID warm.cay
  cay snapshot import warm.cay --name warm:v2
  cay snapshot delete warm:v2`,
	}
	cmd.AddCommand(c.snapshotListCmd(), c.snapshotVerifyCmd(), c.snapshotDeleteCmd(), c.snapshotExportCmd(), c.snapshotImportCmd())
	return cmd
}

// Snapshots returns every snapshot on the machine.
func (c *Client) Snapshots(ctx context.Context) ([]operator.Snapshot, error) {
	r, err := c.operator.ListSnapshotsWithResponse(ctx)
	if err != nil {
		return nil, c.unreachable(err)
	}
	return body(r.JSON200, r.HTTPResponse, fault(r.JSONDefault), http.StatusOK)
}

func (c *CLI) snapshotListCmd() *cobra.Command {
	return listing[operator.Snapshot]{
		fetch:  (*Client).Snapshots,
		none:   "There are no snapshots; `cay sandbox snapshot` makes one, and so does a pause.",
		header: "SNAPSHOT\tSANDBOX\tOWNER\tNAMES\tMEMORY\tENGINE\tMADE",
		row: func(s operator.Snapshot) []string {
			memory := "-"
			if s.MemoryBytes > 0 {
				memory = mebibytes(s.MemoryBytes)
			}
			return []string{s.SnapshotID, s.SandboxID, s.Owner, strings.Join(s.Names, ", "), memory,
				s.Runtime + " " + s.RuntimeVersion, ago(c.now().Sub(s.CreatedAt)) + " ago"}
		},
	}.command(c, &cobra.Command{
		Use:   "list",
		Short: "List the snapshots on this machine, those that paused sandboxes consist of included",
		Long: `Lists the snapshots on this machine. The owner is "client" for one that was asked
for, "sandbox" for what a paused sandbox consists of, and "none" for one that
nobody knows, which is removed after ten minutes.`,
		Example: "  cay snapshot list\n  cay snapshot list -o json",
	})
}

func mebibytes(n int64) string { return fmt.Sprintf("%d MiB", n>>20) }

func (c *CLI) snapshotVerifyCmd() *cobra.Command {
	cmd := c.each(&cobra.Command{
		Use:     "verify SNAPSHOT...",
		Short:   "Read snapshots and compare them with their manifests",
		Long:    "Reads every byte of snapshots. The ID of each that is whole is printed; of\nanother, the part that is damaged is named.",
		Example: "  cay snapshot verify s1a2b3c4d5e6f7g8h9j0k\n  cay snapshot verify $(cay snapshot list -q)",
	}, func(ctx context.Context, client *Client, ref string) error {
		id, err := client.snapshotID(ctx, ref)
		if err != nil {
			return err
		}
		r, err := client.operator.VerifySnapshotWithResponse(ctx, id)
		if err != nil {
			return client.unreachable(err)
		}
		return answered(r.HTTPResponse, fault(r.JSONDefault), http.StatusNoContent)
	})
	cmd.ValidArgsFunction = c.snapshotIDs
	return cmd
}

func (c *CLI) snapshotDeleteCmd() *cobra.Command {
	cmd := c.each(&cobra.Command{
		Use:     "delete SNAPSHOT...",
		Aliases: []string{"rm"},
		Short:   "Delete snapshots that were asked for; sandboxes made from them stay",
		Example: "  cay snapshot delete s1a2b3c4d5e6f7g8h9j0k\n  cay snapshot delete warm:v2",
	}, func(ctx context.Context, client *Client, id string) error {
		r, err := client.api.DeleteTemplateWithResponse(ctx, id)
		if err != nil {
			return client.unreachable(err)
		}
		return answered(r.HTTPResponse, r.JSONDefault, http.StatusNoContent)
	})
	cmd.ValidArgsFunction = c.snapshotIDs
	return cmd
}

// snapshotID finds the ID of what `cay sandbox snapshot` has printed, or of what
// the list shows as a name.
func (c *Client) snapshotID(ctx context.Context, ref string) (string, error) {
	name, tag, tagged := strings.Cut(ref[strings.LastIndex(ref, "/")+1:], ":")
	if !tagged {
		tag = "default"
	}
	all, err := c.Snapshots(ctx)
	if err != nil {
		return "", err
	}
	for _, s := range all {
		if s.SnapshotID == name && tag == "default" || slices.Contains(s.Names, name+":"+tag) {
			return s.SnapshotID, nil
		}
	}
	return ref, nil // the server says what is wrong with it
}

// snapshotIDs completes the IDs of snapshots.
func (c *CLI) snapshotIDs(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return completing(c, (*Client).Snapshots,
		func(s operator.Snapshot) (string, string) { return s.SnapshotID, strings.Join(s.Names, ", ") })(cmd, args, word)
}
