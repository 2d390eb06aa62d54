// Command engine is gVisor and its supervisor, without the rest of Cay. `make
// build` puts it into cay, and the server runs it from a file of its data
// directory.
//
// Every sandbox is a process of this program, beside one of cmd/gofer that this
// one holds, and a start of one executes it four times. As a part of cay, each of them would initialise the server's
// libraries too, and keep them in memory.
package main

import (
	"context"
	"embed"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
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
	flags := flag.NewFlagSet("engine", flag.ContinueOnError)
	dir := flags.String("dir", "", "the runtime's directory")
	if len(args) == 0 || args[0] != "supervise" {
		return fmt.Errorf("the server starts this program as `engine supervise --dir DIR`")
	}
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	if *dir == "" || flags.NArg() > 0 {
		return fmt.Errorf("want supervise --dir DIR")
	}
	gofer, err := goferFS.ReadFile("gofer/gofer")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading the file server's program: %w", err)
	}
	s := gvisor.Supervisor{Dir: *dir, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Gofer: gofer}
	return s.Run(context.Background())
}

// goferFS holds the program of file servers. `make build` puts it there first; a
// plain `go build` leaves it out.
//
//go:embed gofer
var goferFS embed.FS
