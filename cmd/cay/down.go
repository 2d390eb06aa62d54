package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/settings"
)

func newDownCmd(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop the server and end its sandboxes",
		Long: `Stops the server of a data directory, ends every sandbox, and takes away what
Cay put on this machine: processes, namespaces, firewall rules, mounts. The
data directory keeps templates, keys and history.

To stop the server alone and keep the sandboxes, send it SIGTERM.`,
		Example: "  cay down\n  cay down --data-dir /srv/cay",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.settings(cmd)
			if err != nil {
				return err
			}
			return a.down(cmd.Context(), cfg)
		},
	}
	return cmd
}

// stopWait is how long a server may take to stop before it is killed.
const stopWait = 15 * time.Second

// down stops the server and then does the cleaning itself, with the server's
// own parts. So it works the same when the server is gone already.
func (a *app) down(ctx context.Context, cfg settings.Settings) error {
	if os.Geteuid() != 0 {
		return &cay.Error{Code: cay.CodePrivilege, Layer: cay.LayerHost,
			Message: "cay down needs root, as the server did", Fix: "run it as root, for example with sudo"}
	}
	d := dataDir(cfg.DataDir)
	if _, err := os.Stat(d.credentialsFile()); errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(a.err, "Nothing to stop: %s was never used by Cay.\n", d)
		return nil
	}
	if err := a.stopServer(ctx, d); err != nil {
		return err
	}
	d, unlock, err := openDataDir(cfg.DataDir)
	if err != nil {
		return err
	}
	defer unlock()
	log, err := newLogger(cfg, io.Discard)
	if err != nil {
		return err
	}
	cfg.PoolSize = 0
	h := newHost(d, cfg, log, nil)
	st, err := openStore(ctx, d)
	if err != nil {
		return err
	}
	defer st.Close()
	if err := h.open(ctx); err != nil {
		return errors.Join(err, h.close())
	}
	n, err := h.shutdown(ctx)
	if err != nil {
		return err
	}
	if err := endAll(ctx, st, cay.EndShutdown, "the operator stopped Cay with `cay down`"); err != nil {
		return err
	}
	_ = os.Remove(d.serverFile()) // a missing file is what we want
	_ = os.Remove(d.pidFile())
	fmt.Fprintf(a.err, "Stopped. %d sandboxes ended.\n", n)
	return nil
}

// shutdown ends every guest and removes everything Cay put on the host. It
// returns how many sandboxes ended.
func (h *host) shutdown(ctx context.Context) (int, error) {
	running, err := h.orch.List(ctx)
	if err != nil {
		return 0, err
	}
	err = errors.Join(h.orch.Shutdown(ctx), h.orch.Close())
	// Each of these has its own objects; one that fails must not keep the
	// others from going.
	err = errors.Join(err, h.rt.Shutdown(ctx), h.nets.Destroy(ctx), h.disks.Release(ctx))
	return len(running), errors.Join(err, h.close())
}

// stopServer ends the server process of a data directory, if there is one.
func (a *app) stopServer(ctx context.Context, d dataDir) error {
	pid := d.readPID()
	if pid <= 0 {
		return nil
	}
	if free, err := lockFree(d); err != nil || free {
		return err // the file is left from a crash; the process is somebody else's
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("finding the server's process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	fmt.Fprintf(a.err, "Stopping the server (pid %d)…\n", pid)
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("stopping the server's process %d: %w", pid, err)
		}
		if ended, err := waitPidfd(ctx, fd, stopWait); err != nil || ended {
			return err
		}
	}
	return &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerHost,
		Message: fmt.Sprintf("the server's process %d does not end, even killed", pid),
		Fix:     "it hangs in the kernel: look at /proc/" + fmt.Sprint(pid) + "/stack"}
}

// lockFree reports whether no server holds the data directory's lock.
func lockFree(d dataDir) (bool, error) {
	_, unlock, err := openDataDir(string(d))
	if cay.CodeOf(err) == cay.CodeDataDirLocked {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	unlock()
	return true, nil
}

// waitPidfd waits until a process has ended.
func waitPidfd(ctx context.Context, fd int, limit time.Duration) (bool, error) {
	until := time.Now().Add(limit)
	for {
		left := time.Until(until)
		if left <= 0 {
			return false, nil
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(min(left, 100*time.Millisecond).Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return false, fmt.Errorf("waiting for the server's process: %w", err)
		}
		if n > 0 {
			return true, nil
		}
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
	}
}
