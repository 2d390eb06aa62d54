package main

import "fmt"

// exit prints the error of a command, if any, and returns the exit status.
func (a *app) exit(err error) int {
	if err == nil {
		return 0
	}
	fmt.Fprintln(a.err, err)
	return 1
}
