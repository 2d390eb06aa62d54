package cli

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/api"
)

// followEvery is how often `logs -f` asks again.
const followEvery = 500 * time.Millisecond

// pageOfLogs is the API's largest page.
const pageOfLogs = 1000

func (c *CLI) logsCmd() *cobra.Command {
	var out *format
	var follow bool
	var tail int
	var level string
	cmd := &cobra.Command{
		Use:     "logs SANDBOX",
		Aliases: []string{"lg"},
		Short:   "Show what happened to a sandbox, and its console",
		Long: `Shows the log of a sandbox: its life, and what PID 1 and envd wrote. With
--follow it goes on until the sandbox ends.`,
		Example: `  cay sandbox logs i1a2b3c4d5e6f7g8h9j0k
  cay sandbox logs -f --level warn ID`,
		Args: func(cmd *cobra.Command, args []string) error {
			if level != "" && !api.LogLevel(level).Valid() {
				return fmt.Errorf("--level %q is not debug, info, warn or error", level)
			}
			return cobra.ExactArgs(1)(cmd, args)
		},
		ValidArgsFunction: c.firstSandboxID,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			f := &follower{client: client, id: args[0], level: level, tail: tail, print: func(e api.SandboxLogEntry) error {
				if *out == asJSON {
					return writeLine(c.Out, e)
				}
				_, err := fmt.Fprintf(c.Out, "%s  %-5s  %s\n", e.Timestamp.UTC().Format("2006-01-02 15:04:05.000"), e.Level, e.Message)
				return err
			}}
			if err := f.first(cmd.Context()); err != nil || !follow {
				return err
			}
			return f.follow(cmd.Context())
		},
	}
	out = addOutput(cmd)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the sandbox ends")
	cmd.Flags().IntVarP(&tail, "tail", "n", pageOfLogs, "begin with at most this many of the last records")
	cmd.Flags().StringVar(&level, "level", "", "only records at least this grave: debug, info, warn or error")
	return cmd
}

// follower prints the log of one sandbox, each record once.
type follower struct {
	client *Client
	id     string
	level  string
	tail   int
	print  func(api.SandboxLogEntry) error

	// last is the time of the newest record printed, and seen what was printed
	// of its millisecond: the API's cursor is no finer.
	last time.Time
	seen map[string]bool
}

func (f *follower) page(ctx context.Context, p api.SandboxLogsV2Params) ([]api.SandboxLogEntry, error) {
	if f.level != "" {
		level := api.LogLevel(f.level)
		p.Level = &level
	}
	r, err := f.client.api.SandboxLogsV2WithResponse(ctx, f.id, &p)
	if err != nil {
		return nil, f.client.unreachable(err)
	}
	page, err := body(r.JSON200, r.HTTPResponse, r.JSONDefault, http.StatusOK)
	return page.Logs, err
}

// first prints the last records there are.
func (f *follower) first(ctx context.Context) error {
	backward, limit := api.Backward, int32(min(max(f.tail, 0), pageOfLogs))
	if limit == 0 {
		return nil
	}
	es, err := f.page(ctx, api.SandboxLogsV2Params{Direction: &backward, Limit: &limit})
	if err != nil {
		return err
	}
	slices.Reverse(es)
	return f.show(es)
}

// next prints the records since, and reports how many the page had.
func (f *follower) next(ctx context.Context) (int, error) {
	forward, limit, cursor := api.Forward, int32(pageOfLogs), f.last.UnixMilli()
	p := api.SandboxLogsV2Params{Direction: &forward, Limit: &limit}
	if !f.last.IsZero() {
		p.Cursor = &cursor
	}
	es, err := f.page(ctx, p)
	if err != nil {
		return 0, err
	}
	return len(es), f.show(es)
}

func (f *follower) show(es []api.SandboxLogEntry) error {
	for _, e := range es {
		at := e.Timestamp.Truncate(time.Millisecond)
		switch {
		case at.Before(f.last):
			continue // a page begins with what was printed already
		case at.After(f.last):
			f.last, f.seen = at, map[string]bool{}
		}
		key := e.Timestamp.String() + string(e.Level) + e.Message
		if f.seen[key] {
			continue
		}
		f.seen[key] = true
		if err := f.print(e); err != nil {
			return err
		}
	}
	return nil
}

// follow prints new records until the sandbox has ended.
func (f *follower) follow(ctx context.Context) error {
	t := time.NewTicker(followEvery)
	defer t.Stop()
	for {
		// Asked before the records: what it wrote last is then among them.
		_, err := f.client.Sandbox(ctx, f.id)
		ended := cay.CodeOf(err) == cay.CodeSandboxNotFound
		if err != nil && !ended {
			return quiet(ctx, err)
		}
		if _, err := f.next(ctx); err != nil {
			if ended && cay.CodeOf(err) == cay.CodeSandboxNotFound {
				return nil
			}
			return quiet(ctx, err)
		}
		if ended {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// quiet is no error when the user has interrupted.
func quiet(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
