package cli

import (
	"context"
	"fmt"
	"net/http"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay/internal/gen/api"
)

func (c *CLI) keyCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Manage API keys",
		Long: `API keys let clients in. Each belongs to the team of this server. The server
keeps only a hash: a key is shown once, when it is made.`,
		Example: "  cay key create ci\n  cay key list\n  cay key delete 0b6fd2a6-…",
	}
	cmd.AddCommand(c.keyCreateCmd(), c.keyListCmd(), c.keyDeleteCmd())
	return cmd
}

func (c *CLI) keyCreateCmd() *cobra.Command {
	var out *format
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make an API key and print it, this once",
		Long:  "Makes an API key and prints it on standard output. It cannot be shown again.",
		Example: `  cay key create ci
  export E2B_API_KEY=$(cay key create laptop)`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			r, err := client.api.CreateAPIKeyWithResponse(cmd.Context(), api.CreateAPIKeyJSONRequestBody{Name: args[0]}, client.forTeam)
			if err != nil {
				return client.unreachable(err)
			}
			key, err := body(r.JSON201, r.HTTPResponse, r.JSONDefault, http.StatusCreated)
			if err != nil {
				return err
			}
			if *out == asJSON {
				return WriteJSON(c.Out, key)
			}
			fmt.Fprintf(c.Err, "Made the key %q (%s). Keep it: it is not shown again.\n", key.Name, key.Id)
			_, err = fmt.Fprintln(c.Out, key.Key)
			return err
		},
	}
	out = addOutput(cmd)
	return cmd
}

// keys returns every API key of the team.
func (c *Client) keys(ctx context.Context) ([]api.TeamAPIKey, error) {
	r, err := c.api.ListAPIKeysWithResponse(ctx, c.forTeam)
	if err != nil {
		return nil, c.unreachable(err)
	}
	return body(r.JSON200, r.HTTPResponse, r.JSONDefault, http.StatusOK)
}

func (c *CLI) keyListCmd() *cobra.Command {
	return listing[api.TeamAPIKey]{
		fetch:  (*Client).keys,
		none:   "There are no API keys; `cay key create` makes one.",
		header: "KEY ID\tNAME\tKEY\tMADE\tLAST USED",
		row: func(k api.TeamAPIKey) []string {
			used := "never"
			if k.LastUsed != nil {
				used = ago(c.now().Sub(*k.LastUsed)) + " ago"
			}
			return []string{k.Id, k.Name, masked(k.Mask), ago(c.now().Sub(k.CreatedAt)) + " ago", used}
		},
	}.command(c, &cobra.Command{
		Use:     "list",
		Short:   "List API keys",
		Example: "  cay key list\n  cay key list -o json",
	})
}

func masked(m api.IdentifierMaskingDetails) string {
	return m.Prefix + m.MaskedValuePrefix + "…" + m.MaskedValueSuffix
}

func (c *CLI) keyDeleteCmd() *cobra.Command {
	return c.deletes(&cobra.Command{
		Use:     "delete KEY-ID...",
		Short:   "Delete API keys for good",
		Long:    "Deletes API keys by their IDs, as `cay key list` shows them. Clients that use\none are refused from then on; running sandboxes stay.",
		Example: "  cay key delete $(cay key list -q | tail -1)",
		ValidArgsFunction: completing(c, (*Client).keys,
			func(k api.TeamAPIKey) (string, string) { return k.Id, k.Name }),
	}, func(ctx context.Context, client *Client, id string) error {
		r, err := client.api.DeleteAPIKeyWithResponse(ctx, id, client.forTeam)
		if err != nil {
			return client.unreachable(err)
		}
		return answered(r.HTTPResponse, r.JSONDefault, http.StatusNoContent)
	})
}
