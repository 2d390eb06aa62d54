package envd

import (
	"context"
	"log/slog"
)

// forwarder makes services on the guest's loopback reachable from outside.
type forwarder struct {
	log   *slog.Logger
	procs *processes
	proc  string // where /proc is
}

// run works until ctx ends.
func (f *forwarder) run(ctx context.Context) {
	<-ctx.Done()
}
