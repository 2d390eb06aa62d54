package cli

import (
	"context"
	"flag"
	"fmt"
	"net/http/httptest"
	"os"
	"os/signal"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/settings"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"cay": func() { os.Exit(program()) }})
}

// program is the commands of this package as a program of their own. Where the
// server is, the environment says.
func program() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	cay.Version, cay.Commit = "0.1.0", "abc123"
	c := &CLI{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Engine: "v0.0.0-1", InTerm: FileTerminal(os.Stdin),
		Now: func() time.Time { return fakeNow },
		Settings: func(cmd *cobra.Command) (settings.Settings, error) {
			flags := map[string]string{}
			if f := cmd.Flags().Lookup("data-dir"); f != nil && f.Changed {
				flags["data-dir"] = f.Value.String()
			}
			return settings.Load(settings.Sources{Flags: flags})
		},
		Locate: func(dir string) (Server, error) {
			if os.Getenv("FAKE_API") == "" {
				return Server{}, NotRunning(dir, "")
			}
			return Server{DataDir: dir, PID: 4242, Version: "0.1.0", APIURL: os.Getenv("FAKE_API"), ProxyURL: os.Getenv("FAKE_PROXY"),
				TeamID: fakeTeam, APIKey: fakeKey, AdminToken: fakeAdmin}, nil
		}}
	root := c.Root()
	Finish(root)
	return Exit(os.Stderr, false, root.ExecuteContext(ctx))
}

var update = flag.Bool("update", false, "rewrite the golden texts in testdata/script")

// The scripts show what a user sees: data on standard output, words on
// standard error, the exit status.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script", UpdateScripts: *update,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// status N CMD: the exit status is N.
			"status": func(ts *testscript.TestScript, neg bool, args []string) {
				err := ts.Exec(args[1], args[2:]...)
				got := "0"
				if err != nil {
					got = fmt.Sprint(exitStatus(err))
				}
				if got != args[0] {
					ts.Fatalf("exit status %s, want %s (%v)", got, args[0], err)
				}
			},
		},
		Setup: func(env *testscript.Env) error {
			f := newFakeServer()
			api, proxy := httptest.NewServer(f.apiHandler()), httptest.NewServer(f.proxyHandler())
			env.Defer(api.Close)
			env.Defer(proxy.Close)
			env.Setenv("FAKE_API", api.URL)
			env.Setenv("FAKE_PROXY", proxy.URL)
			return nil
		},
	})
}

func exitStatus(err error) int {
	if e, ok := err.(interface{ ExitCode() int }); ok {
		return e.ExitCode()
	}
	return -1
}
