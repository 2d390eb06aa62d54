// Package pause takes sandboxes through their whole life with the official
// clients and through the real binary on gVisor: pauses, resumes, snapshots,
// forks and traffic that wakes them.
package pause

import (
	"testing"

	"github.com/cayhq/cay/test/program"
	"github.com/cayhq/cay/test/sdk"
)

func TestMain(m *testing.M) { program.Main(m, sdk.Install) }

// scenarios are those that each client goes through, in order.
var scenarios = []string{
	"guests", "pause", "everything goes on", "ten pauses", "by ID alone", "without memory",
	"snapshots", "forks", "pause at the end", "traffic wakes it", "kill a paused one",
}

// Guests with a large array, an open port, a terminal, a database and a counter
// go through everything that each client has.
func TestClients(t *testing.T) {
	server := program.Start(t, program.Options{Pool: 1})
	for _, c := range sdk.Clients {
		// Those left out make the same calls, but for create and connect, which
		// test/sdk has.
		if c.Name == "js-2.45" || c.Name == "python-sync" && !program.Nightly() {
			continue
		}
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			c.Exercise(t, server, scenarios)
		})
	}
}
