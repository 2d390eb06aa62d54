package cli

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/operator"
)

// upgradesAtATime bounds `upgrade --all`: each is work for this machine.
const upgradesAtATime = 4

// upgraded is a line of `cay sandbox upgrade`.
type upgraded struct {
	operator.EnvdUpgrade
	Error string `json:"error"` // empty if envd is the server's now
}

func (c *CLI) upgradeCmd() *cobra.Command {
	var all bool
	var out *format
	cmd := &cobra.Command{
		Use:   "upgrade SANDBOX...",
		Short: "Give running sandboxes the envd of this version of Cay",
		Long: `Replaces the daemon in running sandboxes, of any team, by the one of the server.
After an upgrade of Cay they keep the one they were started with until then.

Processes, terminals and their output go on, and so do watchers that are polled.
Streams end with "unavailable", and clients connect again. Transfers under way
are waited for, up to half a minute. A sandbox whose daemon cannot be replaced
keeps the one it has.`,
		Example: `  cay sandbox upgrade i1a2b3c4d5e6f7g8h9j0k
  cay sandbox upgrade --all
  cay sandbox upgrade --all -o json | jq '.[] | select(.error != "")'`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case all && len(args) > 0:
				return errors.New("--all takes no sandboxes beside it")
			case !all && len(args) == 0:
				return errors.New("name the sandboxes, or say --all")
			}
			return nil
		},
		ValidArgsFunction: c.sandboxIDs,
		RunE: func(cmd *cobra.Command, ids []string) error {
			client, err := c.connect(cmd)
			if err == nil && all {
				ids, err = client.running(cmd.Context())
			}
			if err != nil {
				return err
			}
			return c.upgrade(cmd.Context(), client, ids, all, *out)
		},
	}
	out = addOutput(cmd)
	cmd.Flags().BoolVarP(&all, "all", "a", false, "every sandbox that runs")
	return cmd
}

// running lists the sandboxes that run, of every team.
func (c *Client) running(ctx context.Context) (ids []string, err error) {
	r, err := c.operator.ListSandboxesWithResponse(ctx, &operator.ListSandboxesParams{State: []operator.SandboxState{operator.Running}})
	if err != nil {
		return nil, c.unreachable(err)
	}
	list, err := body(r.JSON200, r.HTTPResponse, fault(r.JSONDefault), http.StatusOK)
	for _, s := range list {
		if s.State == operator.Running {
			ids = append(ids, s.SandboxID)
		}
	}
	return ids, err
}

// upgrade replaces the envd of sandboxes, some at a time, and says in their
// order what became of each. One that ends meanwhile needs none.
func (c *CLI) upgrade(ctx context.Context, client *Client, ids []string, all bool, out format) error {
	done := make([]upgraded, len(ids))
	errs := make([]error, len(ids))
	slots := make(chan struct{}, upgradesAtATime)
	var wg sync.WaitGroup
	for i, id := range ids {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			done[i], errs[i] = client.upgrade(ctx, id)
		})
	}
	wg.Wait()
	rows, list := [][]string{}, []upgraded{}
	for i, u := range done {
		result := "replaced in " + (time.Duration(u.TookMs * float64(time.Millisecond))).Round(time.Millisecond).String()
		switch err := errs[i]; {
		case all && cay.CodeOf(err) == cay.CodeSandboxNotFound:
			errs[i] = nil
			continue
		case err != nil:
			result = "failed"
		case !u.Changed:
			result = "had it already"
		}
		rows, list = append(rows, []string{ids[i], u.Version, result}), append(list, u)
	}
	var err error
	switch {
	case out == asJSON:
		err = WriteJSON(c.Out, list)
	case len(rows) > 0:
		err = writeTable(c.Out, "SANDBOX ID\tENVD\tRESULT", rows)
	default:
		fmt.Fprintln(c.Err, "No sandboxes run.")
	}
	return errors.Join(append(errs, err)...)
}

func (c *Client) upgrade(ctx context.Context, id string) (upgraded, error) {
	u := upgraded{EnvdUpgrade: operator.EnvdUpgrade{SandboxID: id}}
	r, err := c.operator.UpgradeSandboxWithResponse(ctx, id)
	if err != nil {
		err = c.unreachable(err)
	} else {
		var got operator.EnvdUpgrade
		if got, err = body(r.JSON200, r.HTTPResponse, fault(r.JSONDefault), http.StatusOK); err == nil {
			u.EnvdUpgrade = got
		}
	}
	var e *cay.Error
	if errors.As(err, &e) {
		u.Error = e.Message
	} else if err != nil {
		u.Error = err.Error()
	}
	return u, err
}
