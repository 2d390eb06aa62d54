// Package cli holds the commands that talk to a server: they find it through
// the data directory, and use the API as any client does. The program that
// contains them adds those that need the server's own parts.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/settings"
)

// Server says where the server of a data directory listens, and what lets us
// in.
type Server struct {
	DataDir   string
	PID       int
	Version   string
	StartedAt time.Time
	APIURL    string
	ProxyURL  string

	TeamID     cay.TeamID
	APIKey     cay.Secret
	AdminToken cay.Secret
}

// CLI is what the commands share. Set the fields, then call Root.
type CLI struct {
	In       io.Reader
	Out, Err io.Writer
	// InTerm is the terminal that In is; nil when it is none.
	InTerm Terminal
	// OutTerm says that Out is a terminal; Colour that Err may be coloured.
	OutTerm, Colour bool
	// Term is the kind of terminal (TERM).
	Term string
	// Engine is the engine's version, for `version`.
	Engine string

	// Settings loads what a server of this command line would run with.
	Settings func(*cobra.Command) (settings.Settings, error)
	// Locate finds the server of a data directory. No server is
	// cay.CodeNotRunning.
	Locate func(dataDir string) (Server, error)
	Now    func() time.Time // nil is time.Now
}

func (c *CLI) now() time.Time {
	if c.Now == nil {
		return time.Now()
	}
	return c.Now()
}

// Root returns the root command with the commands of this package. Its caller
// adds its own, then calls [Finish].
func (c *CLI) Root() *cobra.Command {
	root := &cobra.Command{
		Use:   "cay",
		Short: "A sandbox cloud on your own machine",
		Long: `Cay gives AI agents isolated Linux machines, over the API that the E2B
clients already speak.

Start the cloud with "cay up", paste the three lines it prints into the shell
of your program, and use the official E2B SDKs as they are.`,
		Example: `  cay up                       # start, in the foreground
  eval "$(cay env)"            # let the E2B SDKs and CLI find it
  cay sandbox list
  cay doctor                   # when something is wrong`,
		Version:       cay.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noSuchCommand,
		RunE:          func(cmd *cobra.Command, _ []string) error { return c.overview(cmd) },
	}
	root.SetVersionTemplate("cay {{.Version}}\n")
	root.PersistentFlags().String("data-dir", "", "directory that holds everything Cay keeps (default /var/lib/cay) [$CAY_DATA_DIR]")
	root.SetIn(c.In)
	root.SetOut(c.Out)
	root.SetErr(c.Err)
	root.CompletionOptions.HiddenDefaultCmd = false
	root.AddCommand(c.statusCmd(), c.envCmd(), c.versionCmd(), c.configCmd(), c.keyCmd(), c.teamCmd(), c.secretCmd(), c.sandboxCmd(), c.snapshotCmd(), c.templateCmd(), c.egressCmd())
	return root
}

// Finish prepares a whole tree of commands: wrong command lines become
// [*UsageError], and a group without a subcommand shows its help.
func Finish(root *cobra.Command) {
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return &UsageError{cmd.CommandPath(), err} })
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		cmd.SuggestionsMinimumDistance = 2
		if cmd.HasSubCommands() && cmd.RunE == nil && cmd.Run == nil {
			cmd.Args = noSuchCommand
			cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		}
		if check := cmd.Args; check != nil {
			cmd.Args = func(cmd *cobra.Command, args []string) error {
				if err := check(cmd, args); err != nil {
					return &UsageError{cmd.CommandPath(), err}
				}
				return nil
			}
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(root)
}

// UsageError is a wrong command line.
type UsageError struct {
	Command string // "cay sandbox exec"
	Err     error
}

// Error says what is wrong and where the right form is.
func (e *UsageError) Error() string {
	return fmt.Sprintf("%s: %v\nSee `%s --help`.", e.Command, e.Err, e.Command)
}

// Unwrap returns what is wrong.
func (e *UsageError) Unwrap() error { return e.Err }

// ExitError ends the program with a status and prints nothing: everything was
// said already, or the status is that of a command in a sandbox.
type ExitError struct{ Status int }

// Error implements error.
func (e *ExitError) Error() string { return fmt.Sprintf("exit status %d", e.Status) }

// noSuchCommand refuses arguments where a subcommand belongs, and says which
// one may have been meant.
func noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	text := fmt.Sprintf("there is no command %q", args[0])
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		text += "; did you mean " + strings.Join(near, " or ") + "?"
	}
	return errors.New(text)
}

// dataDir is the data directory of a command line.
func (c *CLI) dataDir(cmd *cobra.Command) (string, error) {
	s, err := c.Settings(cmd)
	if err != nil {
		return "", err
	}
	return s.DataDir, nil
}

// server finds the server of a command line.
func (c *CLI) server(cmd *cobra.Command) (Server, error) {
	dir, err := c.dataDir(cmd)
	if err != nil {
		return Server{}, err
	}
	return c.Locate(dir)
}

// connect returns a client of the command line's server.
func (c *CLI) connect(cmd *cobra.Command) (*Client, error) {
	s, err := c.server(cmd)
	if err != nil {
		return nil, err
	}
	return NewClient(s)
}

// overview is `cay` alone: the state in a line, and what to do next.
func (c *CLI) overview(cmd *cobra.Command) error {
	dir, err := c.dataDir(cmd)
	if err != nil {
		return err
	}
	s, err := c.Locate(dir)
	flag := ""
	if dir != settings.Table[0].Default {
		flag = " --data-dir " + dir
	}
	next := []string{"cay up" + flag, "start the sandbox cloud", "cay doctor" + flag, "check this machine", "cay --help", "every command"}
	switch {
	case cay.CodeOf(err) == cay.CodeNotRunning:
		fmt.Fprintf(c.Out, "Cay %s: %s.\n\n", cay.Version, messageOf(err))
	case err != nil:
		return err
	default:
		fmt.Fprintf(c.Out, "Cay %s runs at %s (pid %d, data directory %s).\n\n", s.Version, s.APIURL, s.PID, dir)
		next = []string{`eval "$(cay env` + flag + `)"`, "let the E2B SDKs and CLI find it", "cay sandbox list" + flag, "what runs",
			"cay status" + flag, "the server and its machine", "cay --help", "every command"}
	}
	width := 0
	for i := 0; i < len(next); i += 2 {
		width = max(width, len(next[i]))
	}
	for pair := range slices.Chunk(next, 2) {
		fmt.Fprintf(c.Out, "  %-*s  # %s\n", width, pair[0], pair[1])
	}
	return nil
}

func messageOf(err error) string {
	var e *cay.Error
	if errors.As(err, &e) {
		return e.Message
	}
	return err.Error()
}

// sandboxIDs completes the IDs of running sandboxes.
func (c *CLI) sandboxIDs(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return completing(c, func(client *Client, ctx context.Context) ([]api.ListedSandbox, error) {
		return client.Sandboxes(ctx, nil)
	},
		func(s api.ListedSandbox) (string, string) { return s.SandboxID, templateOf(s.Alias, s.TemplateID) })(cmd, args, word)
}

// firstSandboxID completes one sandbox ID.
func (c *CLI) firstSandboxID(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return c.sandboxIDs(cmd, args, word)
}
