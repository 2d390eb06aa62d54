package cli

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay/internal/gen/api"
)

func (c *CLI) templateCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "template",
		Aliases: []string{"tpl"},
		Short:   "Look at templates",
		Long:    "A template is what sandboxes are made of: a root file system, defaults and\nlimits. `cay up` builds the base template.",
		Example: "  cay template list\n  cay template info base",
	}
	cmd.AddCommand(c.templateListCmd(), c.templateInfoCmd())
	return cmd
}

// templates returns the templates the team may use.
func (c *CLI) templates(cmd *cobra.Command) ([]api.Template, *Client, error) {
	client, err := c.connect(cmd)
	if err != nil {
		return nil, nil, err
	}
	r, err := client.api.ListTemplatesWithResponse(cmd.Context(), &api.ListTemplatesParams{}) //nolint:staticcheck // SA1019: the one call that gives all of them at once
	if err != nil {
		return nil, nil, client.unreachable(err)
	}
	list, err := body(r.JSON200, r.HTTPResponse, r.JSONDefault, http.StatusOK)
	return list, client, err
}

func (c *CLI) templateListCmd() *cobra.Command {
	var out *format
	var quiet bool
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List templates",
		Example: "  cay template list\n  cay template list -q",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ts, _, err := c.templates(cmd)
			if err != nil {
				return err
			}
			if *out == asJSON {
				return WriteJSON(c.Out, ts)
			}
			var rows [][]string
			for _, t := range ts {
				if quiet {
					fmt.Fprintln(c.Out, t.TemplateID)
					continue
				}
				rows = append(rows, []string{t.TemplateID, strings.Join(t.Aliases, ", "), string(t.BuildStatus), fmt.Sprint(t.CpuCount),
					fmt.Sprintf("%d MiB", t.MemoryMB), fmt.Sprintf("%d MiB", t.DiskSizeMB), ago(c.now().Sub(t.UpdatedAt)) + " ago"})
			}
			if quiet {
				return nil
			}
			return writeTable(c.Out, "TEMPLATE ID\tNAME\tBUILD\tCPUS\tMEMORY\tDISK\tUPDATED", rows)
		},
	}
	out = addOutput(cmd)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "IDs only")
	return cmd
}

func (c *CLI) templateInfoCmd() *cobra.Command {
	var out *format
	cmd := &cobra.Command{
		Use:     "info TEMPLATE",
		Short:   "Show a template and its builds",
		Long:    "Shows a template, named by ID or name, and its builds.",
		Example: "  cay template info base",
		Args:    cobra.ExactArgs(1),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			var names []cobra.Completion
			if ts, _, err := c.templates(cmd); err == nil && len(args) == 0 {
				for _, t := range ts {
					names = append(names, t.Aliases...)
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			ts, client, err := c.templates(cmd)
			if err != nil {
				return err
			}
			id := args[0]
			for _, t := range ts {
				for _, name := range append(t.Aliases, t.Names...) {
					if name == args[0] {
						id = t.TemplateID
					}
				}
			}
			r, err := client.api.GetTemplateWithResponse(cmd.Context(), id, &api.GetTemplateParams{})
			if err != nil {
				return client.unreachable(err)
			}
			t, err := body(r.JSON200, r.HTTPResponse, r.JSONDefault, http.StatusOK)
			if err != nil {
				return err
			}
			if *out == asJSON {
				return WriteJSON(c.Out, t)
			}
			if err := writePairs(c.Out, [][2]string{{"Template", t.TemplateID}, {"Name", strings.Join(t.Aliases, ", ")},
				{"Made", instant(t.CreatedAt)}, {"Updated", instant(t.UpdatedAt)}, {"Sandboxes made", fmt.Sprint(t.SpawnCount)}}); err != nil {
				return err
			}
			var rows [][]string
			for _, b := range t.Builds {
				envd := ""
				if b.EnvdVersion != nil {
					envd = *b.EnvdVersion
				}
				rows = append(rows, []string{b.BuildID, string(b.Status), fmt.Sprint(b.CpuCount), fmt.Sprintf("%d MiB", b.MemoryMB), envd, instant(b.CreatedAt)})
			}
			fmt.Fprintln(c.Out)
			return writeTable(c.Out, "BUILD ID\tSTATUS\tCPUS\tMEMORY\tENVD\tMADE", rows)
		},
	}
	out = addOutput(cmd)
	return cmd
}
