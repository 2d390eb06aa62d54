package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/cli"
	"github.com/cayhq/cay/runtime/gvisor"
)

// client puts the commands that talk to a server together.
func (a *app) client() *cli.CLI {
	c := &cli.CLI{In: a.in, Out: a.out, Err: a.err,
		OutTerm: isTerminal(a.out), Colour: a.colour(), Term: os.Getenv("TERM"),
		Engine: gvisor.Version(), Settings: a.settings, Locate: locate}
	if f, ok := a.in.(*os.File); ok {
		c.InTerm = cli.FileTerminal(f)
	}
	return c
}

// locate finds the running server of a data directory.
func locate(path string) (cli.Server, error) {
	d := dataDir(path)
	info, err := d.readServer()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if pid := d.starting(); pid > 0 {
			return cli.Server{}, cli.Starting(path, pid)
		}
		return cli.Server{}, cli.NotRunning(path, "")
	case errors.Is(err, fs.ErrPermission):
		return cli.Server{}, errNotReadable(path, err)
	case err != nil:
		return cli.Server{}, &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerHost,
			Message: fmt.Sprintf("the file %s cannot be read: %v", d.serverFile(), err), Fix: "restart the server, which writes it anew; sandboxes stay", Err: err}
	case !alive(info.PID):
		return cli.Server{}, cli.NotRunning(path, fmt.Sprintf(": process %d has ended without stopping in order; its sandboxes still run", info.PID))
	}
	creds, err := d.readCredentials()
	if errors.Is(err, fs.ErrPermission) {
		return cli.Server{}, errNotReadable(path, err)
	}
	if err != nil {
		return cli.Server{}, fmt.Errorf("reading the credentials: %w", err)
	}
	return cli.Server{DataDir: path, PID: info.PID, Version: info.Version, StartedAt: info.StartedAt, APIURL: info.APIURL, ProxyURL: info.ProxyURL,
		TeamID: cay.TeamID(creds.TeamID), APIKey: cay.Secret(creds.APIKey), AdminToken: cay.Secret(creds.AdminToken)}, nil
}

// starting returns the process of a server that is not ready yet, or 0.
func (d dataDir) starting() int {
	pid := d.readPID()
	if _, err := os.Stat(d.serverFile()); err == nil || !alive(pid) {
		return 0
	}
	if free, err := lockFree(d); err != nil || free {
		return 0 // a file left by a crash, whose number another process has now
	}
	return pid
}

func errNotReadable(path string, err error) error {
	return &cay.Error{Code: cay.CodePrivilege, Layer: cay.LayerHost,
		Message: fmt.Sprintf("the data directory %s keeps its credentials from this user (%d)", path, os.Geteuid()),
		Fix:     "run the command as the server's user, for example with sudo", Err: err}
}

// alive reports whether a process runs, whoever owns it. One that has ended
// and that its parent has not asked for (a zombie, state Z) does not.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// "pid (name) state …"; the name may hold anything (proc_pid_stat(5)).
	i := strings.LastIndex(string(b), ") ")
	return i >= 0 && i+2 < len(b) && b[i+2] != 'Z' && b[i+2] != 'X'
}
