package main

import (
	"embed"
	"errors"
	"io/fs"

	"github.com/cayhq/cay"
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
