package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/operator"
)

func (c *CLI) sandboxCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "sandbox",
		Aliases: []string{"sbx"},
		Short:   "Look at sandboxes, run commands in them, end them",
		Example: `  cay sandbox list
  cay sandbox exec -it ID -- bash
  cay sandbox logs -f ID
  cay sandbox kill --all`,
	}
	cmd.AddCommand(c.listCmd(), c.infoCmd(), c.execCmd(), c.logsCmd(), c.killCmd(), c.inspectCmd(),
		c.pauseCmd(), c.resumeCmd(), c.forkCmd(), c.snapshotOfCmd(), c.treeCmd(), c.explainCmd(), c.networkCmd(), c.upgradeCmd())
	return cmd
}

// metadataQuery writes labels as the API reads them: each word escaped twice,
// as pairs joined by &.
func metadataQuery(m map[string]string) string {
	twice := func(s string) string { return url.QueryEscape(url.QueryEscape(s)) }
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		pairs = append(pairs, twice(k)+"="+twice(m[k]))
	}
	return strings.Join(pairs, "&")
}

func templateOf(alias *string, id string) string {
	if alias != nil && *alias != "" {
		return *alias
	}
	return id
}

func labels(m map[string]string) string {
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		pairs = append(pairs, k+"="+m[k])
	}
	return strings.Join(pairs, ", ")
}

func (c *CLI) listCmd() *cobra.Command {
	var metadata map[string]string
	cmd := listing[api.ListedSandbox]{
		fetch: func(client *Client, ctx context.Context) ([]api.ListedSandbox, error) {
			return client.Sandboxes(ctx, metadata)
		},
		none:   "No sandboxes run.",
		header: "SANDBOX ID\tTEMPLATE\tSTATE\tCPUS\tMEMORY\tSTARTED\tENDS\tMETADATA",
		row: func(s api.ListedSandbox) []string {
			meta := ""
			if s.Metadata != nil {
				meta = labels(*s.Metadata)
			}
			return []string{s.SandboxID, templateOf(s.Alias, s.TemplateID), string(s.State), fmt.Sprint(s.CpuCount),
				fmt.Sprintf("%d MiB", s.MemoryMB), ago(c.now().Sub(s.StartedAt)) + " ago", c.ends(s.State, s.EndAt), meta}
		},
	}.command(c, &cobra.Command{
		Use:   "list",
		Short: "List sandboxes, running and paused",
		Example: `  cay sandbox list
  cay sandbox list --metadata user=alice
  cay sandbox kill $(cay sandbox list -q --metadata ci=1)`,
	})
	cmd.Flags().StringToStringVarP(&metadata, "metadata", "m", nil, "only those with these labels, as key=value")
	return cmd
}

// ends says when a sandbox ends; a paused one does not.
func (c *CLI) ends(state api.SandboxState, at time.Time) string {
	if state == api.Paused {
		return "paused " + ago(c.now().Sub(at)) + " ago"
	}
	return "in " + ago(at.Sub(c.now()))
}

func (c *CLI) infoCmd() *cobra.Command {
	var out *format
	cmd := &cobra.Command{
		Use:               "info SANDBOX",
		Aliases:           []string{"in"},
		Short:             "Show a sandbox as its owner sees it",
		Example:           "  cay sandbox info i1a2b3c4d5e6f7g8h9j0k",
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
			if *out == asJSON {
				return WriteJSON(c.Out, s)
			}
			meta, internet, guarded := "", "", "by a token"
			if s.Metadata != nil {
				meta = labels(*s.Metadata)
			}
			if s.AllowInternetAccess != nil && !*s.AllowInternetAccess {
				internet = "refused"
			}
			if s.EnvdAccessToken == nil {
				guarded = "no: anybody who knows the ID may use it"
			}
			return writePairs(c.Out, [][2]string{{"Sandbox", s.SandboxID}, {"State", string(s.State)}, {"Template", templateOf(s.Alias, s.TemplateID)},
				{"Limits", fmt.Sprintf("%d CPUs, %d MiB memory, %d MiB disk", s.CpuCount, s.MemoryMB, s.DiskSizeMB)},
				{"Started", instant(s.StartedAt)}, {"Ends", fmt.Sprintf("%s (%s)", instant(s.EndAt), c.ends(s.State, s.EndAt))},
				{"Metadata", meta}, {"Internet", internet}, {"Guarded", guarded}, {"envd", s.EnvdVersion}})
		},
	}
	out = addOutput(cmd)
	return cmd
}

// killsAtATime bounds `kill --all`.
const killsAtATime = 8

func (c *CLI) killCmd() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:     "kill SANDBOX...",
		Aliases: []string{"kl"},
		Short:   "End sandboxes",
		Long: `Ends sandboxes at once, with everything in them. The ID of each is printed when
nothing of it runs any more.`,
		Example: `  cay sandbox kill i1a2b3c4d5e6f7g8h9j0k
  cay sandbox kill --all`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case all && len(args) > 0:
				return errors.New("--all takes no sandboxes beside it")
			case !all && len(args) == 0:
				return errors.New("name the sandboxes to end, or say --all")
			}
			return nil
		},
		ValidArgsFunction: c.sandboxIDs,
		RunE: func(cmd *cobra.Command, ids []string) error {
			client, err := c.connect(cmd)
			if err != nil {
				return err
			}
			if all {
				list, err := client.Sandboxes(cmd.Context(), nil)
				if err != nil {
					return err
				}
				for _, s := range list {
					ids = append(ids, s.SandboxID)
				}
			}
			return c.kill(cmd.Context(), client, ids, all)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "end every sandbox of the team")
	return cmd
}

// kill ends sandboxes side by side and prints each that is gone. One that ends
// by itself meanwhile is what --all wanted.
func (c *CLI) kill(ctx context.Context, client *Client, ids []string, all bool) error {
	errs := make([]error, len(ids))
	slots := make(chan struct{}, killsAtATime)
	var print sync.Mutex
	var wg sync.WaitGroup
	for i, id := range ids {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			err := client.Kill(ctx, id)
			if all && cay.CodeOf(err) == cay.CodeSandboxNotFound {
				return
			}
			if errs[i] = err; err == nil {
				print.Lock()
				defer print.Unlock()
				fmt.Fprintln(c.Out, id)
			}
		})
	}
	wg.Wait()
	if all && len(ids) == 0 {
		fmt.Fprintln(c.Err, "No sandboxes run.")
	}
	return errors.Join(errs...)
}

// inspection is `cay sandbox inspect -o json`.
type inspection struct {
	Record  operator.SandboxRecord `json:"record"`
	Node    *operator.NodeSandbox  `json:"node"`
	Trace   []operator.StartStep   `json:"trace"`
	Console []operator.ConsoleLine `json:"console"`
}

func (c *CLI) inspectCmd() *cobra.Command {
	var out *format
	var lines int
	cmd := &cobra.Command{
		Use:   "inspect SANDBOX",
		Short: "Show all that is known of a sandbox, host objects included",
		Long: `Shows what the operator can know: the record, also of a sandbox that ended in the
last seven days and why it did; the objects on this machine that belong to it;
how long each step of its start took; and the last lines of its console.`,
		Example:           "  cay sandbox inspect i1a2b3c4d5e6f7g8h9j0k\n  cay sandbox inspect -o json ID | jq .node.host",
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
			if *out == asJSON {
				return WriteJSON(c.Out, in)
			}
			return c.printInspection(in, lines)
		},
	}
	out = addOutput(cmd)
	cmd.Flags().IntVarP(&lines, "lines", "n", 20, "how many of the last lines of the console")
	return cmd
}

// inspect asks for the record, the trace and the console. The node forgets the
// latter two some time after a sandbox's end; then they are empty.
func (c *Client) inspect(ctx context.Context, id string) (inspection, error) {
	in := inspection{Trace: []operator.StartStep{}, Console: []operator.ConsoleLine{}}
	r, err := c.operator.InspectSandboxWithResponse(ctx, id)
	if err != nil {
		return in, c.unreachable(err)
	}
	both, err := body(r.JSON200, r.HTTPResponse, fault(r.JSONDefault), http.StatusOK)
	if err != nil {
		return in, err
	}
	in.Record, in.Node = both.Record, both.Node
	trace, err := c.operator.TraceSandboxWithResponse(ctx, id)
	if err != nil {
		return in, c.unreachable(err)
	}
	if trace.StatusCode() != http.StatusNotFound {
		if in.Trace, err = body(trace.JSON200, trace.HTTPResponse, fault(trace.JSONDefault), http.StatusOK); err != nil {
			return in, err
		}
	}
	console, err := c.operator.SandboxConsoleWithResponse(ctx, id)
	if err != nil {
		return in, c.unreachable(err)
	}
	if console.StatusCode() != http.StatusNotFound {
		in.Console, err = body(console.JSON200, console.HTTPResponse, fault(console.JSONDefault), http.StatusOK)
	}
	return in, err
}

func (c *CLI) printInspection(in inspection, lines int) error {
	r := in.Record
	pairs := [][2]string{{"Sandbox", r.SandboxID}, {"State", string(r.State)}, {"Team", r.TeamID},
		{"Template", fmt.Sprintf("%s (%s, build %s)", r.Alias, r.TemplateID, r.BuildID)}, {"Node", r.NodeID},
		{"Limits", fmt.Sprintf("%d CPUs, %d MiB memory, %d MiB disk", r.Resources.Cpus, r.Resources.MemoryMB, r.Resources.DiskMB)},
		{"Metadata", labels(r.Metadata)}, {"Made", instant(r.CreatedAt)}}
	if r.EndedAt == nil {
		pairs = append(pairs, [2]string{"Ends", fmt.Sprintf("%s (in %s)", instant(r.EndAt), ago(r.EndAt.Sub(c.now())))})
	} else {
		pairs = append(pairs, [2]string{"Ended", instant(*r.EndedAt)}, [2]string{"Because", fmt.Sprintf("%s: %s", r.EndReason, r.EndMessage)})
	}
	if n := in.Node; n != nil {
		adopted := ""
		if n.Adopted {
			adopted = "yes: it survived a restart of the server"
		}
		pairs = append(pairs, [2]string{"Execution", n.ExecutionID}, [2]string{"Adopted", adopted},
			[2]string{"Engine", fmt.Sprintf("%s %s, process %d", n.Host.Runtime, n.Host.RuntimeVersion, n.Host.Pid)}, [2]string{"Container", n.Host.Container},
			[2]string{"Address", n.Host.Address}, [2]string{"Namespace", n.Host.Netns}, [2]string{"Root", n.Host.Rootfs}, [2]string{"Disk image", n.Host.DiskImage},
			[2]string{"envd", envdText(n)})
	}
	if err := writePairs(c.Out, pairs); err != nil {
		return err
	}
	if err := c.printTrace(in.Trace); err != nil {
		return err
	}
	tail := in.Console[max(0, len(in.Console)-max(0, lines)):]
	if len(tail) > 0 {
		fmt.Fprintf(c.Out, "\nCONSOLE (last %d of %d lines)\n", len(tail), len(in.Console))
		for _, l := range tail {
			fmt.Fprintf(c.Out, "%s  %s\n", l.Timestamp.UTC().Format("15:04:05.000"), l.Text)
		}
	}
	return nil
}

// envdText says which envd a sandbox has, and whether there is another.
func envdText(n *operator.NodeSandbox) string {
	text := n.EnvdVersion
	if n.EnvdDigest != "" {
		text += " (" + n.EnvdDigest[:min(len(n.EnvdDigest), len("sha256:")+12)] + ")"
	}
	if n.EnvdOutdated {
		text += "; this server has another one for it: `cay sandbox upgrade`"
	}
	return text
}

// printTrace prints the steps of a start and of what came after it, if they are
// known: a table for each operation.
func (c *CLI) printTrace(steps []operator.StartStep) error {
	for len(steps) > 0 {
		op := steps[0].Operation
		n := slices.IndexFunc(steps, func(s operator.StartStep) bool { return s.Operation != op })
		if n < 0 {
			n = len(steps)
		}
		fmt.Fprintln(c.Out)
		var rows [][]string
		var sum float64
		for _, s := range steps[:n] {
			sum += s.TookMs
			rows = append(rows, []string{s.Name, s.Layer, fmt.Sprintf("%.1f ms", s.TookMs), s.Error})
		}
		rows = append(rows, []string{"sum", "", fmt.Sprintf("%.1f ms", sum), ""})
		if err := writeTable(c.Out, strings.ToUpper(op)+"\tLAYER\tTOOK\tERROR", rows); err != nil {
			return err
		}
		steps = steps[n:]
	}
	return nil
}
