package cli

import (
	"fmt"
	"net/http"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/operator"
	"github.com/cayhq/cay/internal/settings"
)

// statusJSON is `cay status -o json`.
type statusJSON struct {
	Running  bool             `json:"running"`
	DataDir  string           `json:"dataDir"`
	PID      int              `json:"pid,omitempty"`
	APIURL   string           `json:"apiURL,omitempty"`
	ProxyURL string           `json:"proxyURL,omitempty"`
	Server   *operator.Status `json:"server,omitempty"`
}

func (c *CLI) statusCmd() *cobra.Command {
	var out *format
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the server, its machine and what runs",
		Long: `Shows whether the server of the data directory runs, where it listens, and how
many sandboxes there are. The exit status is 1 when it does not run.`,
		Example: "  cay status\n  cay status -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := c.dataDir(cmd)
			if err != nil {
				return err
			}
			s, err := c.Locate(dir)
			if cay.CodeOf(err) == cay.CodeNotRunning && *out == asJSON {
				if err := WriteJSON(c.Out, statusJSON{DataDir: dir}); err != nil {
					return err
				}
				return &ExitError{1}
			}
			if err != nil {
				return err
			}
			client, err := NewClient(s)
			if err != nil {
				return err
			}
			r, err := client.operator.StatusWithResponse(cmd.Context())
			if err != nil {
				return client.unreachable(err)
			}
			st, err := body(r.JSON200, r.HTTPResponse, fault(r.JSONDefault), http.StatusOK)
			if err != nil {
				return err
			}
			if *out == asJSON {
				return WriteJSON(c.Out, statusJSON{Running: true, DataDir: dir, PID: s.PID, APIURL: s.APIURL, ProxyURL: s.ProxyURL, Server: &st})
			}
			return c.printStatus(s, dir, st)
		},
	}
	out = addOutput(cmd)
	return cmd
}

func (c *CLI) printStatus(s Server, dir string, st operator.Status) error {
	n := st.Node
	running := fmt.Sprintf("%d running", st.Sandboxes.Running)
	if st.Sandboxes.Starting > 0 {
		running += fmt.Sprintf(", %d starting", st.Sandboxes.Starting)
	}
	if st.Sandboxes.Killing > 0 {
		running += fmt.Sprintf(", %d ending", st.Sandboxes.Killing)
	}
	return writePairs(c.Out, [][2]string{
		{"Server", fmt.Sprintf("running for %s (version %s, pid %d)", ago(c.now().Sub(st.StartedAt)), st.Version, s.PID)},
		{"Data", dir},
		{"API", s.APIURL},
		{"Proxy", s.ProxyURL},
		{"Machine", fmt.Sprintf("%s: %d CPUs, %.1f GiB", n.Id, n.Cpus, float64(n.MemoryBytes)/(1<<30))},
		{"Engine", n.Runtime + " " + n.RuntimeVersion},
		{"Sandboxes", fmt.Sprintf("%s; %d booted ahead", running, n.PoolReady)},
		{"Made", fmt.Sprintf("%d since the start, %d failed", st.CreateSuccesses, st.CreateFails)},
	})
}

func (c *CLI) envCmd() *cobra.Command {
	var out *format
	cmd := &cobra.Command{
		Use:   "env",
		Short: "Print the variables that point the E2B SDKs and CLI here",
		Long: `Prints three shell commands that point the official E2B SDKs and CLI at this
server. They hold an API key: do not print them where others read.`,
		Example: "  eval \"$(cay env)\"\n  cay env -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := c.server(cmd)
			if err != nil {
				return err
			}
			vars := [][2]string{{"E2B_API_KEY", s.APIKey.Reveal()}, {"E2B_API_URL", s.APIURL}, {"E2B_SANDBOX_URL", s.ProxyURL}}
			if *out == asJSON {
				m := map[string]string{}
				for _, v := range vars {
					m[v[0]] = v[1]
				}
				return WriteJSON(c.Out, m)
			}
			for _, v := range vars {
				if _, err := fmt.Fprintf(c.Out, "export %s=%s\n", v[0], v[1]); err != nil {
					return err
				}
			}
			if c.OutTerm {
				fmt.Fprintln(c.Err, `# For this shell: eval "$(cay env)"`)
			}
			return nil
		},
	}
	out = addOutput(cmd)
	return cmd
}

// versionJSON is `cay version -o json`.
type versionJSON struct {
	Version string `json:"version"`
	Commit  string `json:"commit"`
	Engine  string `json:"engine"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

func (c *CLI) versionCmd() *cobra.Command {
	var out *format
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Show the version of this program and of its engine",
		Example: "  cay version\n  cay version -o json",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := versionJSON{cay.Version, cay.Commit, c.Engine, runtime.Version(), runtime.GOOS, runtime.GOARCH}
			if *out == asJSON {
				return WriteJSON(c.Out, v)
			}
			return writePairs(c.Out, [][2]string{{"cay", v.Version}, {"commit", v.Commit}, {"gvisor", v.Engine},
				{"go", v.Go}, {"platform", v.OS + "/" + v.Arch}})
		},
	}
	out = addOutput(cmd)
	return cmd
}

func (c *CLI) configCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "config",
		Short:   "Look at the settings",
		Long:    "Settings come from defaults, <data-dir>/config.yaml, the environment and flags;\na later one wins.",
		Example: "  cay config show --origin",
	}
	var out *format
	var origin bool
	show := &cobra.Command{
		Use:     "show",
		Short:   "Show every setting that `cay up` would use",
		Example: "  cay config show\n  cay config show --origin\n  cay config show -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := c.Settings(cmd)
			if err != nil {
				return err
			}
			values := s.Values()
			if *out == asJSON {
				return WriteJSON(c.Out, values)
			}
			header := "SETTING\tVALUE"
			if origin {
				header += "\tORIGIN"
			}
			rows := make([][]string, len(values))
			for i, v := range values {
				rows[i] = []string{v.Name, v.Value}
				if origin {
					rows[i] = append(rows[i], string(v.Origin))
				}
			}
			return writeTable(c.Out, header, rows)
		},
	}
	out = addOutput(show)
	show.Flags().BoolVar(&origin, "origin", false, "also where each value comes from")
	cmd.AddCommand(show)
	return cmd
}

// Starting is the error for a server that is not ready yet.
func Starting(dataDir string, pid int) error {
	return &cay.Error{Code: cay.CodeNotRunning, Layer: cay.LayerHost,
		Message: fmt.Sprintf("the server of the data directory %s (pid %d) is not ready yet", dataDir, pid),
		Fix:     "wait for its ready line: the first start builds the base template, which takes minutes",
		Detail:  map[string]string{"dataDir": dataDir, "pid": fmt.Sprint(pid)}}
}

// NotRunning is the error for a data directory without a server.
func NotRunning(dataDir, why string) error {
	up := "cay up"
	if dataDir != settings.Table[0].Default {
		up += " --data-dir " + dataDir
	}
	return &cay.Error{Code: cay.CodeNotRunning, Layer: cay.LayerHost,
		Message: fmt.Sprintf("no server runs for the data directory %s%s", dataDir, why),
		Fix:     "start it with `" + up + "`, or name the data directory of a running one with --data-dir",
		Detail:  map[string]string{"dataDir": dataDir}}
}
