package main

import (
	"os"

	"github.com/cayhq/cay/internal/cli"
)

// exit prints the error of a command, if any, and returns the exit status.
func (a *app) exit(err error) int { return cli.Exit(a.err, a.colour(), err) }

// colour reports whether errors may be coloured: on a terminal, unless
// NO_COLOR (no-color.org) says otherwise.
func (a *app) colour() bool {
	return isTerminal(a.err) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}
