package main

import "github.com/spf13/cobra"

// clientCommands returns the commands that talk to a server or look at the
// machine.
func clientCommands(a *app) []*cobra.Command { return nil }
