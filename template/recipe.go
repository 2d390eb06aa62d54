package template

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"strings"

	"github.com/cayhq/cay"
)

// Recipe says how to make the image of a template from a Debian release.
type Recipe struct {
	Name  string `json:"name"`
	Suite string `json:"suite"` // Debian's code name, "bookworm"
	// Components and Mirrors are used when the host has no sources of its own
	// for the suite.
	Components []string `json:"components"`
	Mirrors    []string `json:"mirrors"`
	// Packages and Setup name files beside the recipe: a list of packages, one
	// a line, and a shell script that runs as root in the new system.
	Packages string `json:"packages"`
	Setup    string `json:"setup"`
	// Exclude and Include are dpkg's path-exclude and path-include patterns.
	Exclude []string `json:"exclude"`
	Include []string `json:"include"`

	Defaults  cay.Defaults  `json:"defaults"`
	Resources cay.Resources `json:"resources"`

	packages []string
	setup    []byte
}

var (
	// validName is the grammar of template names (contract/e2b.md, "Template
	// reference grammar").
	validName = regexp.MustCompile(`^[a-z0-9_-]{1,128}$`)
	// validPackage is Debian policy 5.6.1, with an architecture.
	validPackage = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+(:[a-z0-9-]+)?$`)
	validSuite   = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)
)

// ReadRecipe reads the recipe in a directory of files. An error is
// cay.CodeTemplateInvalid and names the file.
func ReadRecipe(files fs.FS, dir string) (Recipe, error) {
	bad := func(file string, err error) (Recipe, error) {
		return Recipe{}, &cay.Error{Code: cay.CodeTemplateInvalid, Layer: cay.LayerTemplate,
			Message: "the recipe's " + path.Join(dir, file) + " cannot be used: " + err.Error(),
			Fix:     "correct the file", Detail: map[string]string{"file": path.Join(dir, file)}, Err: err}
	}
	const main = "recipe.json"
	b, err := fs.ReadFile(files, path.Join(dir, main))
	if err != nil {
		return bad(main, err)
	}
	var r Recipe
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		return bad(main, err)
	}
	if err := r.check(); err != nil {
		return bad(main, err)
	}
	list, err := fs.ReadFile(files, path.Join(dir, r.Packages))
	if err != nil {
		return bad(r.Packages, err)
	}
	if r.packages, err = parsePackages(string(list)); err != nil {
		return bad(r.Packages, err)
	}
	if r.setup, err = fs.ReadFile(files, path.Join(dir, r.Setup)); err != nil {
		return bad(r.Setup, err)
	}
	// A script that was edited on another system, or by a tool that "escaped"
	// the first line, fails in ways that are hard to read.
	if !bytes.HasPrefix(r.setup, []byte("#!/bin/sh\n")) || bytes.ContainsRune(r.setup, '\r') {
		return bad(r.Setup, fmt.Errorf("want a script that starts with the line #!/bin/sh and has no carriage returns"))
	}
	return r, nil
}

func (r *Recipe) check() error {
	switch {
	case !validName.MatchString(r.Name):
		return fmt.Errorf("name %q is not made of a-z, 0-9, '-' and '_'", r.Name)
	case !validSuite.MatchString(r.Suite):
		return fmt.Errorf("suite %q is no Debian code name", r.Suite)
	case len(r.Components) == 0 || len(r.Mirrors) == 0:
		return fmt.Errorf("components and mirrors must not be empty")
	case r.Packages == "" || r.Setup == "":
		return fmt.Errorf("packages and setup must name files")
	case r.Defaults.User == "":
		return fmt.Errorf("defaults.user is empty")
	case r.Resources.CPUs < 1 || r.Resources.MemoryMB < 128 || r.Resources.DiskMB < 64:
		return fmt.Errorf("resources need at least 1 CPU, 128 MiB of memory and 64 MiB of disk")
	}
	for _, p := range append(r.Exclude, r.Include...) {
		if !strings.HasPrefix(p, "/") || strings.ContainsAny(p, "\n'\"") {
			return fmt.Errorf("path pattern %q is not absolute", p)
		}
	}
	return nil
}

// parsePackages reads a list of packages: one a line, '#' starts a comment.
func parsePackages(text string) ([]string, error) {
	var out []string
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		if !validPackage.MatchString(line) {
			return nil, fmt.Errorf("%q is no name of a Debian package", line)
		}
		out = append(out, line)
	}
	return out, nil
}
