package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay/internal/gen/api"
)

func (c *CLI) secretCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "secret",
		Short: "Keep values that rules put into sandboxes' requests",
		Long: `A secret is a value that the rules of a sandbox's network put into the headers of
its requests, outside the sandbox: write ${e2b.secrets.NAME} in a header of a
rule. The server keeps values encrypted and never shows one.`,
		Example: `  cay secret create openai-key < key.txt
  cay secret list
  pass show openai | cay secret update openai-key`,
	}
	cmd.AddCommand(c.secretCreateCmd(), c.secretListCmd(), c.secretUpdateCmd(), c.secretDeleteCmd())
	return cmd
}

// maxSecretInput bounds what is read for a value; the server's own bound is
// lower, and its answer names it.
const maxSecretInput = 1 << 20

// secretValue reads a value from standard input: a line without echo from a
// terminal, else everything but one line end. It is no argument, because other
// users of the machine see those.
func (c *CLI) secretValue() (string, error) {
	if c.InTerm != nil {
		return c.typed()
	}
	b, err := io.ReadAll(io.LimitReader(c.In, maxSecretInput))
	if err != nil {
		return "", fmt.Errorf("reading the value from standard input: %w", err)
	}
	return strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r"), nil
}

// typed reads a line from the terminal without showing it.
func (c *CLI) typed() (string, error) {
	fmt.Fprint(c.Err, "Value (it is not shown): ")
	restore, err := c.InTerm.Raw()
	if err != nil {
		return "", fmt.Errorf("hiding what is typed: %w", err)
	}
	defer func() {
		restore()
		fmt.Fprintln(c.Err)
	}()
	var line []byte
	b := make([]byte, 1)
	for len(line) < maxSecretInput {
		if _, err := c.In.Read(b); err != nil {
			return "", fmt.Errorf("reading the value: %w", err)
		}
		switch b[0] {
		case '\r', '\n':
			return string(line), nil
		case 3, 4: // ^C, ^D
			return "", errors.New("no value was given: interrupted")
		case 8, 0x7f:
			line = line[:max(0, len(line)-1)]
		default:
			line = append(line, b[0])
		}
	}
	return "", errors.New("the value is too long")
}

func addMetadata(cmd *cobra.Command, m *map[string]string) {
	cmd.Flags().StringToStringVar(m, "metadata", nil, "labels, as KEY=VALUE")
}

func (c *CLI) secretCreateCmd() *cobra.Command {
	var out *format
	var metadata map[string]string
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Keep a value, read from standard input, and print the secret's ID",
		Example: `  cay secret create openai-key            # asks for the value
  cay secret create openai-key < key.txt
  cay secret create --metadata owner=ci deploy-token < token`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			value, err := c.secretValue()
			if err != nil {
				return err
			}
			in := api.CreateSecretJSONRequestBody{Name: args[0], Value: value}
			if len(metadata) > 0 {
				in.Metadata = (*api.SecretMetadata)(&metadata)
			}
			r, err := client.api.CreateSecretWithResponse(cmd.Context(), in, client.forTeam)
			if err != nil {
				return client.unreachable(err)
			}
			s, err := body(r.JSON201, r.HTTPResponse, r.JSONDefault, http.StatusCreated)
			if err != nil {
				return err
			}
			return c.printSecret(*out, "Made", s)
		},
	}
	out = addOutput(cmd)
	addMetadata(cmd, &metadata)
	return cmd
}

func (c *CLI) printSecret(out format, did string, s api.Secret) error {
	if out == asJSON {
		return WriteJSON(c.Out, s)
	}
	fmt.Fprintf(c.Err, "%s the secret %s, version %d. In a rule: ${e2b.secrets.%s}\n", did, s.Name, s.CurrentVersion, s.Name)
	_, err := fmt.Fprintln(c.Out, s.SecretID)
	return err
}

func (c *CLI) secretUpdateCmd() *cobra.Command {
	var out *format
	var metadata map[string]string
	cmd := &cobra.Command{
		Use:   "update SECRET",
		Short: "Replace a secret's value by one read from standard input",
		Long: `Replaces the value of a secret, named by its name or ID. The next request of a
sandbox whose rules use it has the new value; the old one is gone.`,
		Example:           "  cay secret update openai-key < key.txt",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.secretNames,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			value, err := c.secretValue()
			if err != nil {
				return err
			}
			in := api.UpdateSecretJSONRequestBody{Value: value}
			if cmd.Flags().Changed("metadata") {
				in.Metadata = (*api.SecretMetadata)(&metadata)
			}
			r, err := client.api.UpdateSecretWithResponse(cmd.Context(), args[0], in, client.forTeam)
			if err != nil {
				return client.unreachable(err)
			}
			s, err := body(r.JSON200, r.HTTPResponse, r.JSONDefault, http.StatusOK)
			if err != nil {
				return err
			}
			return c.printSecret(*out, "Updated", s)
		},
	}
	out = addOutput(cmd)
	addMetadata(cmd, &metadata)
	return cmd
}

func (c *CLI) secretListCmd() *cobra.Command {
	return listing[api.Secret]{
		fetch:  (*Client).secrets,
		none:   "There are no secrets; `cay secret create` makes one.",
		header: "NAME\tSECRET ID\tVERSION\tMADE\tUPDATED",
		row: func(s api.Secret) []string {
			return []string{s.Name, s.SecretID, fmt.Sprint(s.CurrentVersion), ago(c.now().Sub(s.CreatedAt)) + " ago", ago(c.now().Sub(s.UpdatedAt)) + " ago"}
		},
		id: func(s api.Secret) string { return s.SecretID },
	}.command(c, &cobra.Command{
		Use:     "list",
		Short:   "List secrets, without their values",
		Example: "  cay secret list\n  cay secret list -o json",
	})
}

// secrets returns every secret of the team.
func (c *Client) secrets(ctx context.Context) ([]api.Secret, error) {
	return pages(func(token *string) ([]api.Secret, http.Header, error) {
		r, err := c.api.ListSecretsWithResponse(ctx, &api.ListSecretsParams{NextToken: token}, c.forTeam)
		if err != nil {
			return nil, nil, c.unreachable(err)
		}
		page, err := body(r.JSON200, r.HTTPResponse, r.JSONDefault, http.StatusOK)
		return page, r.HTTPResponse.Header, err
	})
}

func (c *CLI) secretDeleteCmd() *cobra.Command {
	return c.deletes(&cobra.Command{
		Use:               "delete SECRET...",
		Short:             "Delete secrets for good",
		Long:              "Deletes secrets by their names or IDs. Requests of sandboxes whose rules use one\nfail from then on, with a text that names it.",
		Example:           "  cay secret delete openai-key",
		ValidArgsFunction: c.secretNames,
	}, func(ctx context.Context, client *Client, ref string) error {
		r, err := client.api.DeleteSecretWithResponse(ctx, ref, client.forTeam)
		if err != nil {
			return client.unreachable(err)
		}
		return answered(r.HTTPResponse, r.JSONDefault, http.StatusNoContent)
	})
}

// secretNames completes the names of secrets.
func (c *CLI) secretNames(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return completing(c, (*Client).secrets,
		func(s api.Secret) (string, string) { return s.Name, s.SecretID })(cmd, args, word)
}
