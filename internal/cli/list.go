package cli

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
)

// listing is a command that lists things.
type listing[T any] struct {
	fetch  func(*Client, context.Context) ([]T, error)
	none   string // what is said when there are none
	header string
	row    func(T) []string
	id     func(T) string // what --quiet prints; nil is the first cell
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
		list, err := l.fetch(client, cmd.Context())
		if err != nil {
			return err
		}
		if *out == asJSON {
			return WriteJSON(c.Out, append([]T{}, list...)) // [] and not null
		}
		if quiet {
			for _, v := range list {
				fmt.Fprintln(c.Out, l.idOf(v))
			}
			return nil
		}
		if len(list) == 0 {
			fmt.Fprintln(c.Err, l.none)
			return nil
		}
		var rows [][]string
		for _, v := range list {
			rows = append(rows, l.row(v))
		}
		return writeTable(c.Out, l.header, rows)
	}
	return cmd
}

func (l listing[T]) idOf(v T) string {
	if l.id != nil {
		return l.id(v)
	}
	return l.row(v)[0]
}

// pages returns all of a list that the server gives out in pages. ask asks for
// the page of a token; nil is the first.
func pages[T any](ask func(token *string) ([]T, http.Header, error)) ([]T, error) {
	var all []T
	for token := (*string)(nil); ; {
		page, header, err := ask(token)
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		next := header.Get("X-Next-Token")
		if next == "" {
			return all, nil
		}
		token = &next
	}
}

// each makes a command that does one thing with each of its arguments, and
// prints each with which it was done.
func (c *CLI) each(cmd *cobra.Command, do func(context.Context, *Client, string) error) *cobra.Command {
	return c.loop(cmd, do, func(arg string) { fmt.Fprintln(c.Out, arg) })
}

// deletes makes a command that deletes what its arguments name.
func (c *CLI) deletes(cmd *cobra.Command, do func(context.Context, *Client, string) error) *cobra.Command {
	cmd.Aliases = []string{"rm"}
	return c.loop(cmd, do, func(arg string) { fmt.Fprintln(c.Err, "Deleted "+arg) })
}

// loop makes a command that does one thing with each of its arguments and tells
// of each with which it was done. What fails is told at the end; a server that
// does not answer ends it.
func (c *CLI) loop(cmd *cobra.Command, do func(context.Context, *Client, string) error, done func(string)) *cobra.Command {
	cmd.Args = cobra.MinimumNArgs(1)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		client, err := c.connect(cmd)
		if err != nil {
			return err
		}
		var errs []error
		for _, a := range args {
			switch err := do(cmd.Context(), client, a); {
			case err == nil:
				done(a)
			case cay.CodeOf(err) == cay.CodeNotRunning, cmd.Context().Err() != nil:
				return errors.Join(append(errs, err)...)
			default:
				errs = append(errs, err)
			}
		}
		return errors.Join(errs...)
	}
	return cmd
}

// completionTime bounds the wait of somebody who has pressed the tab key.
const completionTime = 2 * time.Second

// completing completes names of things that the server lists, but for those
// that stand on the command line already.
func completing[T any](c *CLI, fetch func(*Client, context.Context) ([]T, error), item func(T) (name, about string)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		client, err := c.connect(cmd)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), completionTime)
		defer cancel()
		list, err := fetch(client, ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var out []cobra.Completion
		for _, v := range list {
			if name, about := item(v); !slices.Contains(args, name) {
				out = append(out, cobra.CompletionWithDesc(name, about))
			}
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}
