package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay/internal/keyring"
)

// newRotateCmd is the part of `cay secret` that needs the file of keys.
func newRotateCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "rotate",
		Short: "Encrypt secrets under a new key from now on",
		Long: `Makes a new key, under which a running server encrypts every secret within ten
minutes. Older keys stay in the file: backups of the data directory may need
them. Run it on the server's machine.`,
		Example: "  cay secret rotate",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.settings(cmd)
			if err != nil {
				return err
			}
			d := dataDir(cfg.DataDir)
			if _, err := os.Stat(d.keysFile()); errors.Is(err, fs.ErrNotExist) {
				return errDataDir(cfg.DataDir, fmt.Errorf("it has no keys of secrets: %w", err))
			}
			ring, err := keyring.Open(d.keysFile(), time.Now)
			if err != nil {
				return err
			}
			id, err := ring.Add()
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.out, id)
			return err
		},
	}
}
