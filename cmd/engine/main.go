// Command engine is gVisor and its supervisor, without the rest of Cay. `make
// build` puts it into cay, and the server runs it from a file of its data
// directory.
//
// Every sandbox is two processes of this program, and a start of one executes
// it four times. As a part of cay, each of them would initialise the server's
// libraries too, and keep them in memory.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"

	"github.com/cayhq/cay/runtime/gvisor"
)

func main() {
	gvisor.Dispatch()
	if err := supervise(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "engine:", err)
		os.Exit(1)
	}
}

// supervise is the one command: supervise --dir DIR.
func supervise(args []string) error {
	// Not flag.CommandLine: that is gVisor's.
	fs := flag.NewFlagSet("engine", flag.ContinueOnError)
	dir := fs.String("dir", "", "the runtime's directory")
	if len(args) == 0 || args[0] != "supervise" {
		return fmt.Errorf("the server starts this program as `engine supervise --dir DIR`")
	}
	if err := fs.Parse(args[1:]); err != nil {
		return err
	}
	if *dir == "" || fs.NArg() > 0 {
		return fmt.Errorf("want supervise --dir DIR")
	}
	return gvisor.Supervise(context.Background(), *dir)
}
