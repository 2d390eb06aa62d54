package main

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/envd"
	"github.com/cayhq/cay/orchestrator"
	"github.com/cayhq/cay/template"
)

// guestFS holds the binaries that run inside sandboxes, and the packed one that
// runs sandboxes. `make build` puts them there first; a plain `go build` leaves
// them out.
//
//go:embed guest
var guestFS embed.FS

// guestBinary returns one of the embedded guest binaries, "envd" or "init".
func guestBinary(name string) ([]byte, error) {
	b, err := guestFS.ReadFile("guest/" + name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &cay.Error{Code: cay.CodeTemplateIncomplete, Layer: cay.LayerTemplate,
			Message: "this cay was built without its guest binaries (" + name + " is missing), so it can verify no template",
			Fix:     "build it with `make build`"}
	}
	return b, err
}

// envdEnv names another program to give to running sandboxes than the envd that
// is embedded, for tests.
const envdEnv = "CAY_ENVD"

// envdForGuests is the envd that running sandboxes can be given: the one that
// new ones have. A cay without guest binaries has none.
func envdForGuests() (orchestrator.Agent, error) {
	program := func() ([]byte, error) { return guestBinary("envd") }
	if path := os.Getenv(envdEnv); path != "" {
		program = func() ([]byte, error) { return os.ReadFile(path) }
	}
	b, err := program()
	switch {
	case cay.CodeOf(err) == cay.CodeTemplateIncomplete:
		return orchestrator.Agent{}, nil
	case err != nil:
		return orchestrator.Agent{}, fmt.Errorf("reading the envd for sandboxes: %w", err)
	}
	return orchestrator.Agent{Version: envd.Version, Digest: template.DigestBytes(b), Program: program}, nil
}
