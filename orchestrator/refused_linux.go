package orchestrator

import (
	"errors"
	"syscall"
)

// isRefused tells a closed port (the network path works, nothing listens yet)
// from a path that does not work.
func isRefused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }
