// Package envd holds the daemon of sandboxes to its whole contract, section 2
// of e2b.md, through the real binary on gVisor: with the official clients, with
// large data, with many clients at once, with hostile guests and with nonsense.
package envd

import (
	"testing"

	"github.com/cayhq/cay/test/program"
	"github.com/cayhq/cay/test/sdk"
)

func TestMain(m *testing.M) { program.Main(m, sdk.Install) }

// scenarios are those that each client goes through, in order.
var scenarios = []string{
	"close stdin", "no stdin", "several readers", "split characters", "a tree is killed", "environment of commands",
	"pty", "pty resize", "pty jobs", "pty connect",
	"formats", "upload a stream", "gzip", "metadata", "hundreds of files in one write", "files of another user",
	"wrong uses of files", "a full disk", "watch", "watch recursively",
	"git", "signed urls", "hosts", "running and metrics",
}

// domain is that of the servers' sandboxes. It resolves nowhere: the tests say
// it in the Host header.
const domain = "sbx.example"

// Each official client uses everything it has for commands, terminals, files,
// watches, git and signed URLs.
func TestClients(t *testing.T) {
	t.Parallel()
	server := program.Start(t, program.Options{Pool: 1, Args: []string{"--domain", domain}})
	for _, c := range sdk.Clients {
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			c.Exercise(t, server, scenarios, "TEST_DOMAIN="+domain)
		})
	}
}
