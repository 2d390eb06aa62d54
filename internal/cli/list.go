package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
)

// listing is a command that lists things.
type listing[T any] struct {
	fetch  func(context.Context, *Client) ([]T, error)
	none   string // what is said when there are none
	header string
	row    func(T) []string // the first cell is what names the thing
}

// command completes a command: it prints a table, JSON, or what names each.
func (l listing[T]) command(c *CLI, cmd *cobra.Command) *cobra.Command {
	var quiet bool
	out := addOutput(cmd)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "IDs only")
	cmd.Aliases, cmd.Args = []string{"ls"}, cobra.NoArgs
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		client, err := c.connect(cmd)
		if err != nil {
			return err
		}
		list, err := l.fetch(cmd.Context(), client)
		if err != nil {
			return err
		}
		if *out == asJSON {
			return WriteJSON(c.Out, append([]T{}, list...)) // [] and not null
		}
		var rows [][]string
		for _, v := range list {
			rows = append(rows, l.row(v))
		}
		switch {
		case quiet:
			for _, r := range rows {
				fmt.Fprintln(c.Out, r[0])
			}
			return nil
		case len(rows) == 0:
			fmt.Fprintln(c.Err, l.none)
			return nil
		}
		return writeTable(c.Out, l.header, rows)
	}
	return cmd
}

// each makes a command that does one thing with each of its arguments, and
// prints each with which it was done.
func (c *CLI) each(cmd *cobra.Command, do func(context.Context, *Client, string) error) *cobra.Command {
	cmd.Args = cobra.MinimumNArgs(1)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		client, err := c.connect(cmd)
		if err != nil {
			return err
		}
		var errs []error
		for _, a := range args {
			if err := do(cmd.Context(), client, a); err != nil {
				errs = append(errs, err)
				continue
			}
			fmt.Fprintln(c.Out, a)
		}
		return errors.Join(errs...)
	}
	return cmd
}
