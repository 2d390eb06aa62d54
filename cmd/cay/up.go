package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime/gvisor"
)

func newUpCmd(a *app) *cobra.Command {
	var background bool
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start the sandbox cloud on this machine",
		Long: `Starts API, proxy and orchestrator in one process. No configuration is needed:
a fresh data directory gets a team, an API key and the base template.

Sandboxes outlive the server. After a stop or a crash, the next "cay up" adopts
them with their processes, open ports and deadlines. "cay down" ends them.`,
		Example: `  cay up
  cay up --detach
  cay up --data-dir /srv/cay --api-addr 127.0.0.1:3000 --proxy-addr 127.0.0.1:3002
  cay up --api-addr 127.0.0.1:0 --proxy-addr 127.0.0.1:0   # pick free ports
  cay up --domain sbx.localhost --certificates local
  cay up --domain sbx.example.com --certificates acme --acme-dns rfc2136:192.0.2.1:53 --acme-dns-key /etc/cay/tsig.key --tls-addr :443`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if background {
				return a.upDetached(cmd)
			}
			rep, err := newReporter(a)
			if err != nil {
				return err
			}
			if err := a.up(cmd, rep); err != nil {
				rep.failed(err)
				return err
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&background, "detach", "d", false, "return when the server is ready, and leave it running")
	addServerFlags(cmd)
	return cmd
}

// upDetached runs the same command line without --detach in the background.
func (a *app) upDetached(cmd *cobra.Command) error {
	cfg, err := a.settings(cmd)
	if err != nil {
		return err
	}
	d := dataDir(cfg.DataDir)
	if err := os.MkdirAll(d.path("log"), 0o711); err != nil {
		return errDataDir(cfg.DataDir, err)
	}
	logFile := d.path("log", "server.log")
	info, err := a.detach(append([]string{"up"}, serverArgs(cfg)...), logFile)
	if err != nil {
		return err
	}
	creds, err := d.readCredentials()
	if err != nil {
		return err
	}
	printReady(a.out, info, creds)
	fmt.Fprintf(a.err, "The server runs in the background (pid %d, log %s). Stop it with: cay down --data-dir %s\n", info.PID, logFile, cfg.DataDir)
	return nil
}

// printReady prints what a user needs next: one line that says ready, and the
// exports that point the official clients here.
func printReady(w io.Writer, info serverInfo, c credentials) {
	https := ""
	if info.Domain != "" {
		https = " https=https://api." + info.Domain
	}
	fmt.Fprintf(w, "ready api=%s proxy=%s%s pid=%d version=%s\n", info.APIURL, info.ProxyURL, https, info.PID, info.Version)
	fmt.Fprintf(w, "export E2B_API_KEY=%s\nexport E2B_API_URL=%s\nexport E2B_SANDBOX_URL=%s\n", c.APIKey, info.APIURL, info.ProxyURL)
	if info.Domain == "" {
		return
	}
	fmt.Fprintf(w, "# Over HTTPS, with URLs of sandboxes, where *.%s leads here: E2B_DOMAIN instead of the two URLs.\n# export E2B_DOMAIN=%s\n",
		domainOnly(info.Domain), info.Domain)
	if info.CAFile != "" {
		fmt.Fprintf(w, "# Its certificates are this machine's own: `cay trust`, and for Node and Python\n# export NODE_EXTRA_CA_CERTS=%s SSL_CERT_FILE=%s\n", info.CAFile, info.CAFile)
	}
}

// up runs the server until a signal or a failure.
func (a *app) up(cmd *cobra.Command, rep *reporter) error {
	cfg, err := a.settings(cmd)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return &cay.Error{Code: cay.CodePrivilege, Layer: cay.LayerHost,
			Message: fmt.Sprintf("cay up needs root on this machine (it runs as user %d): sandboxes need namespaces, mounts and cgroups", os.Geteuid()),
			Fix:     "run it as root, for example with sudo"}
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	s, err := newServer(cfg, a.err, rep)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.open(ctx); err != nil {
		return err
	}
	printReady(rep.out, s.info, s.creds)
	if err := rep.ready(s.info); err != nil {
		return fmt.Errorf("telling the parent that the server is ready: %w", err)
	}
	err = s.wait(ctx)
	if errors.Is(err, context.Canceled) {
		return nil // a signal: sandboxes stay, the next `cay up` adopts them
	}
	return err
}

func newSuperviseCmd(a *app) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:     "supervise",
		Short:   "Own the engine processes of a data directory (started by cay up)",
		Example: "  cay supervise --dir /var/lib/cay/run/gvisor",
		Hidden:  true,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return gvisor.Supervise(cmd.Context(), dir)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "the runtime's directory")
	_ = cmd.MarkFlagRequired("dir") // the flag exists: it was defined a line above
	return cmd
}
