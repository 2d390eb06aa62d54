package main

import (
	"os"
	"strings"
	"syscall"

	"github.com/cayhq/cay/internal/killpoint"
)

// killpointEnv names a file for tests of crashes. Its words are pairs: "kill"
// and a point of package killpoint at which the server kills itself, "fail" and
// a point whose operation fails with EIO. The server appends the points it
// passes to the same name with ".passed".
const killpointEnv = "CAY_KILLPOINT_FILE"

// killpoints returns the hook of a server under test; nil without a file.
func killpoints() killpoint.Hook {
	file := os.Getenv(killpointEnv)
	if file == "" {
		return nil
	}
	return func(point string) error {
		if f, err := os.OpenFile(file+".passed", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err == nil {
			_, _ = f.WriteString(point + "\n") // a test that misses it fails
			_ = f.Close()
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return nil //nolint:nilerr // nothing is armed
		}
		words := strings.Fields(string(b))
		for i := 0; i+1 < len(words); i += 2 {
			switch {
			case words[i+1] != point:
			case words[i] == "kill":
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {} // the signal is on its way
			case words[i] == "fail":
				return syscall.EIO
			}
		}
		return nil
	}
}
