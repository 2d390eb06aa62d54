package main

import (
	"io"
	"log/slog"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/settings"
)

// addServerFlags gives a command a flag for every setting of a server.
func addServerFlags(cmd *cobra.Command) {
	for _, t := range settings.Table {
		if t.Name == "data-dir" {
			continue // the root has it
		}
		doc := t.Doc
		if t.Default != "" {
			doc += " (default " + t.Default + ")"
		}
		cmd.Flags().String(t.Name, "", doc+" [$"+t.Env+"]")
	}
}

// settings loads what the command runs with.
func (a *app) settings(cmd *cobra.Command) (settings.Settings, error) {
	flags := map[string]string{}
	cmd.Flags().Visit(func(f *pflag.Flag) { flags[f.Name] = f.Value.String() })
	return settings.Load(settings.Sources{Flags: flags})
}

// serverArgs are the flags that give another process the same settings.
func serverArgs(s settings.Settings) []string {
	var args []string
	for _, v := range s.Values() {
		if v.Origin != settings.OriginDefault {
			args = append(args, "--"+v.Name+"="+v.Value)
		}
	}
	return args
}

// newLogger writes to w: JSON for machines, text for a terminal.
func newLogger(s settings.Settings, w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(s.LogLevel)); err != nil {
		return nil, &cay.Error{Code: cay.CodeConfigInvalid, Layer: cay.LayerHost,
			Message: "the log level " + s.LogLevel + " is unknown", Fix: "use debug, info, warn or error", Err: err}
	}
	opts := &slog.HandlerOptions{Level: level}
	if s.LogFormat == "json" || (s.LogFormat == "auto" && !isTerminal(w)) {
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return slog.New(slog.NewTextHandler(w, opts)), nil
}

// isTerminal reports whether w is a character device, as a terminal is.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}
