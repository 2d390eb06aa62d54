package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/operator"
)

func (c *CLI) networkCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "network",
		Short: "See and change what a sandbox may reach",
		Example: `  cay sandbox network show ID
  cay sandbox network set ID --deny 0.0.0.0/0 --allow 'api.example.com' --allow 203.0.113.0/24`,
	}
	cmd.AddCommand(c.networkShowCmd(), c.networkSetCmd())
	return cmd
}

func (c *CLI) networkShowCmd() *cobra.Command {
	var out *format
	cmd := &cobra.Command{
		Use:               "show SANDBOX",
		Short:             "Show what a sandbox may reach, and how it is reached",
		Example:           "  cay sandbox network show i1a2b3c4d5e6f7g8h9j0k\n  cay sandbox network show ID -o json > network.json",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.firstSandboxID,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			s, err := client.Sandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			n := s.Network
			if n == nil {
				n = &api.SandboxNetworkConfig{}
			}
			if *out == asJSON {
				// What `set --file` takes, and how ports are reached.
				return WriteJSON(c.Out, struct {
					api.SandboxNetworkConfig
					AllowInternetAccess *bool `json:"allow_internet_access,omitempty"`
				}{*n, s.AllowInternetAccess})
			}
			return writePairs(c.Out, networkPairs(n, s.AllowInternetAccess))
		},
	}
	out = addOutput(cmd)
	return cmd
}

// networkPairs is a network configuration for people.
func networkPairs(n *api.SandboxNetworkConfig, internet *bool) [][2]string {
	reach := "open"
	if internet != nil && !*internet || slices.Contains(n.DenyOut, "0.0.0.0/0") {
		reach = "refused, but for what is allowed"
	} else if len(n.DenyOut) > 0 {
		reach = "open, but for what is denied"
	}
	pairs := [][2]string{{"Internet", reach}, {"Denied", strings.Join(n.DenyOut, ", ")}, {"Allowed", strings.Join(n.AllowOut, ", ")}}
	for _, name := range slices.Sorted(maps.Keys(n.Rules)) {
		var set []string
		for _, r := range n.Rules[name] {
			if r.Transform != nil {
				set = append(set, slices.Sorted(maps.Keys(r.Transform.Headers))...)
			}
		}
		pairs = append(pairs, [2]string{"Rule", name + " sets " + strings.Join(set, ", ")})
	}
	if p := n.EgressProxy; p != nil {
		who := ""
		if p.Username != nil && *p.Username != "" {
			who = " as " + *p.Username
		}
		pairs = append(pairs, [2]string{"Proxy", "SOCKS5 " + p.Address + who})
	}
	ports := "open to everybody"
	if n.AllowPublicTraffic != nil && !*n.AllowPublicTraffic {
		ports = "guarded by a token"
	}
	return append(pairs, [2]string{"Ports", ports})
}

func (c *CLI) networkSetCmd() *cobra.Command {
	var allow, deny []string
	var shut bool
	var file string
	cmd := &cobra.Command{
		Use:   "set SANDBOX",
		Short: "Change what a running sandbox may reach",
		Long: `Replaces all that a sandbox may reach; what is not given is cleared, and without
any flag everything is open again. It is in force at once, for connections that
are open too. A file holds JSON as PUT /sandboxes/{id}/network takes it, with
rules and a proxy; - is standard input.`,
		Example: `  cay sandbox network set ID --no-internet
  cay sandbox network set ID --deny 0.0.0.0/0 --allow '*.example.com' --allow 203.0.113.7
  cay sandbox network set ID --file network.json
  cay sandbox network set ID`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.firstSandboxID,
		RunE: func(cmd *cobra.Command, args []string) error {
			u := api.SandboxNetworkUpdateConfig{AllowOut: allow, DenyOut: deny}
			if shut {
				no := false
				u.AllowInternetAccess = &no
			}
			if file != "" {
				var err error
				if u, err = c.readNetwork(file); err != nil {
					return err
				}
			}
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			if err := client.SetNetwork(cmd.Context(), args[0], u); err != nil {
				return err
			}
			fmt.Fprintln(c.Out, args[0])
			return nil
		},
	}
	cmd.Flags().StringArrayVar(&allow, "allow", nil, "an address, a range or a name that is open although it is denied; may be repeated")
	cmd.Flags().StringArrayVar(&deny, "deny", nil, "an address or a range that is refused; may be repeated")
	cmd.Flags().BoolVar(&shut, "no-internet", false, "the same as --deny 0.0.0.0/0")
	cmd.Flags().StringVarP(&file, "file", "f", "", "read all of it from a file of JSON")
	for _, other := range []string{"allow", "deny", "no-internet"} {
		cmd.MarkFlagsMutuallyExclusive("file", other)
	}
	return cmd
}

// readNetwork reads a configuration. What `show` prints beside it is skipped.
func (c *CLI) readNetwork(path string) (api.SandboxNetworkUpdateConfig, error) {
	var u api.SandboxNetworkUpdateConfig
	var b []byte
	var err error
	if path == "-" {
		b, err = io.ReadAll(c.In)
	} else {
		b, err = os.ReadFile(path)
	}
	if err == nil {
		err = json.Unmarshal(b, &u)
	}
	if err != nil {
		return u, &cay.Error{Code: cay.CodeInvalidRequest, Layer: cay.LayerAPI,
			Message: fmt.Sprintf("the network configuration cannot be read from %s: %v", path, err),
			Fix:     "write JSON as `cay sandbox network show -o json` prints it", Err: err}
	}
	return u, nil
}

// SetNetwork replaces what a sandbox may reach.
func (c *Client) SetNetwork(ctx context.Context, id string, u api.SandboxNetworkUpdateConfig) error {
	r, err := c.api.UpdateSandboxNetworkWithResponse(ctx, id, u)
	if err != nil {
		return c.unreachable(err)
	}
	return answered(r.HTTPResponse, r.JSONDefault, http.StatusNoContent)
}

func (c *CLI) egressCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "egress",
		Short:   "See what was refused to sandboxes",
		Example: "  cay egress log -f ID",
	}
	cmd.AddCommand(c.egressLogCmd())
	return cmd
}

func (c *CLI) egressLogCmd() *cobra.Command {
	var out *format
	var follow bool
	cmd := &cobra.Command{
		Use:   "log SANDBOX",
		Short: "Show which connections of a sandbox were refused, and by which rule",
		Long: `Shows the destinations that were refused to a sandbox, oldest first: each once,
with how often and when last. With --follow it goes on until the sandbox ends, and
prints a destination again when it is refused again.`,
		Example:           "  cay egress log i1a2b3c4d5e6f7g8h9j0k\n  cay egress log -f -o json ID",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.firstSandboxID,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			show := func(r operator.EgressRefusal) error {
				if *out == asJSON {
					return writeLine(c.Out, r)
				}
				_, err := fmt.Fprintln(c.Out, refusalLine(r))
				return err
			}
			return client.followEgress(cmd.Context(), args[0], follow, show)
		},
	}
	out = addOutput(cmd)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the sandbox ends")
	return cmd
}

// refusalLine is a refusal for people.
func refusalLine(r operator.EgressRefusal) string {
	to := r.Destination
	switch {
	case to == "":
		to = r.Name
	case r.Name != "":
		to += " (" + r.Name + ")"
	}
	often := ""
	if r.Count > 1 {
		often = fmt.Sprintf("  %d times", r.Count)
	}
	return fmt.Sprintf("%s  %-4s  %s  by %s: %s%s", r.Last.UTC().Format("2006-01-02 15:04:05.000"), r.Protocol, to, r.Rule, r.Reason, often)
}

// followEgress prints what was refused to a sandbox and, to follow, what is,
// until it has ended.
func (c *Client) followEgress(ctx context.Context, id string, follow bool, show func(operator.EgressRefusal) error) error {
	t := time.NewTicker(followEvery)
	defer t.Stop()
	var after int64
	for {
		ended := !follow
		if follow {
			// Asked first: what was refused last is then among the rest.
			_, err := c.Sandbox(ctx, id)
			ended = cay.CodeOf(err) == cay.CodeSandboxNotFound
			if err != nil && !ended {
				return quiet(ctx, err)
			}
		}
		r, err := c.operator.SandboxEgressWithResponse(ctx, id, &operator.SandboxEgressParams{After: &after})
		if err != nil {
			return quiet(ctx, c.unreachable(err))
		}
		all, err := body(r.JSON200, r.HTTPResponse, fault(r.JSONDefault), http.StatusOK)
		if err != nil {
			return quiet(ctx, err)
		}
		for _, one := range all {
			after = one.Seq
			if err := show(one); err != nil {
				return err
			}
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
