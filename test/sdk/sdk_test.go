package sdk

import (
	"testing"

	"github.com/cayhq/cay/test/program"
)

// scenarios are those that each client goes through, in order.
var scenarios = []string{
	"create", "stdout and stderr", "output as it comes", "much output", "exit code", "exit by signal", "unknown command",
	"background", "list commands", "kill a command", "connect to a command", "stdin", "environment",
	"working directory", "user", "command timeout", "python and node",
	"write and read", "bytes", "many files", "list files", "file info", "move", "remove",
	"info", "set timeout", "list with metadata and pages", "connect", "kill", "kill during a command", "the end comes",
	"wrong key", "unknown template",
}

func TestMain(m *testing.M) { program.Main(m, Install) }

// Each client goes through every scenario.
func TestClients(t *testing.T) {
	server := program.Start(t, program.Options{Pool: 2})
	for _, c := range Clients {
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			c.Exercise(t, server, scenarios)
		})
	}
}
