// Command gofer is gVisor's file server, without the rest of gVisor. `make
// build` puts it into the engine, which runs it beside each sandbox.
package main

import (
	"os"

	"github.com/cayhq/cay/runtime/gvisor/gofer"
)

func main() { os.Exit(gofer.Main(os.Args)) }
