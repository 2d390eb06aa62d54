package main

import (
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/certificate"
)

func newTrustCmd(a *app) *cobra.Command {
	var remove bool
	var domain string
	cmd := &cobra.Command{
		Use:   "trust",
		Short: "Have this machine trust the local certificate authority",
		Long: `Puts the authority that "cay up --certificates local" made into this machine's
store, and into that of the browsers of the user who called sudo. It vouches for
the names of its one domain and for no others. --remove takes that back.

Node and Python have stores of their own: the command prints what to set.`,
		Example: "  cay trust --domain sbx.localhost\n  cay trust --remove --domain sbx.localhost",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.settings(cmd)
			if err != nil {
				return err
			}
			if domain == "" {
				domain = cfg.Domain
			}
			if domain == "" {
				if info, err := dataDir(cfg.DataDir).readServer(); err == nil {
					domain = domainOnly(info.Domain)
				}
			}
			if domain == "" {
				return &cay.Error{Code: cay.CodeConfigInvalid, Layer: cay.LayerHost,
					Message: "no domain is set, and no server runs that has one", Fix: "name it, as in --domain sbx.localhost"}
			}
			if os.Geteuid() != 0 {
				return &cay.Error{Code: cay.CodePrivilege, Layer: cay.LayerHost,
					Message: "the machine's store of authorities belongs to root", Fix: "run it as root, for example with sudo"}
			}
			ca := dataDir(cfg.DataDir).authority(domain)
			t := &certificate.Trust{Root: "/", Home: callersHome()}
			if remove {
				return a.untrust(cmd, t, ca)
			}
			return a.trust(cmd, t, ca)
		},
	}
	cmd.Flags().BoolVar(&remove, "remove", false, "no longer trust it")
	cmd.Flags().StringVar(&domain, "domain", "", "the domain that the authority is for; empty is the server's")
	return cmd
}

func (a *app) trust(cmd *cobra.Command, t *certificate.Trust, ca *certificate.Authority) error {
	if err := ca.Open(cmd.Context()); err != nil { // made now if the server has not begun
		return err
	}
	done, err := t.Install(cmd.Context(), ca.File())
	if err != nil {
		return err
	}
	giveBack(t.Home, done.Browser)
	fmt.Fprintf(a.out, "This machine trusts Cay's authority for *.%s (%s).\n", ca.Domain, done.Store)
	if done.Browser != "" {
		fmt.Fprintf(a.out, "So do Chromium and what else reads %s.\n", done.Browser)
	}
	for _, n := range done.Notes {
		fmt.Fprintln(a.err, n)
	}
	fmt.Fprintf(a.out, "Node and Python need to be told:\nexport NODE_EXTRA_CA_CERTS=%s\nexport SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt\n", ca.File())
	return nil
}

func (a *app) untrust(cmd *cobra.Command, t *certificate.Trust, ca *certificate.Authority) error {
	done, err := t.Remove(cmd.Context(), ca.File(), ca.Domain)
	if err != nil {
		return err
	}
	giveBack(t.Home, done.Browser)
	if done.Store == "" && done.Browser == "" {
		fmt.Fprintf(a.out, "This machine did not trust an authority of Cay for *.%s.\n", ca.Domain)
		return nil
	}
	fmt.Fprintf(a.out, "This machine no longer trusts Cay's authority for *.%s.\n", ca.Domain)
	return nil
}

// callersHome is the home directory of who called sudo, or of root.
func callersHome() string {
	if name := os.Getenv("SUDO_USER"); name != "" {
		if u, err := user.Lookup(name); err == nil {
			return u.HomeDir
		}
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ""
	}
	return home
}

// giveBack has the owner of a home directory own the browsers' database in it,
// which root may have made.
func giveBack(home, db string) {
	st, err := os.Stat(home)
	if err != nil || db == "" {
		return
	}
	own, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return
	}
	// What cannot be given is root's, and the browser says so.
	_ = filepath.WalkDir(filepath.Join(home, ".pki"), func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			_ = os.Lchown(path, int(own.Uid), int(own.Gid))
		}
		return nil
	})
}
