// Package lint keeps the rules of docs/architecture.md: who may import whom,
// what packages are called, how large they may grow, and that the words of the
// documentation are true of the code.
//
// It reads source text and compiles nothing, so that its test takes about a
// second. A rule that must be broken is broken in one of the tables of
// table.go, with a reason.
package lint

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

// ModulePath is the path of the module whose rules these are.
const ModulePath = "github.com/cayhq/cay"

// File is one Go file.
type File struct {
	Name  string // from the module's root, with slashes
	AST   *ast.File
	Lines int
	Test  bool // compiled by `go test` only
}

// Imports lists the paths that the file imports.
func (f *File) Imports() []string {
	out := make([]string, 0, len(f.AST.Imports))
	for _, s := range f.AST.Imports {
		p, err := strconv.Unquote(s.Path.Value)
		if err == nil { // the parser accepts only valid strings here
			out = append(out, p)
		}
	}
	return out
}

// Dir is one directory with Go files: a package and its tests.
type Dir struct {
	Path  string // from the module's root; "." is the root
	Files []*File
}

// Name returns the package's name: that of a file that is no test, if there is
// one.
func (d *Dir) Name() string {
	name := ""
	for _, f := range d.Files {
		if !f.Test {
			return f.AST.Name.Name
		}
		name = strings.TrimSuffix(f.AST.Name.Name, "_test")
	}
	return name
}

// Tree is the source of the module.
type Tree struct {
	Fset *token.FileSet
	Dirs []*Dir // in order of their paths
}

// skipped directories hold nothing that belongs to the module.
func skipped(fsys fs.FS, dir string) bool {
	base := path.Base(dir)
	if dir != "." && (strings.HasPrefix(base, ".") || strings.HasPrefix(base, "_")) {
		return true
	}
	if base == "testdata" || base == "node_modules" || dir == "bin" {
		return true
	}
	_, err := fs.Stat(fsys, path.Join(dir, "go.mod"))
	return dir != "." && err == nil // a module of its own
}

// Load parses every Go file of the module at fsys.
func Load(fsys fs.FS) (*Tree, error) {
	t := &Tree{Fset: token.NewFileSet()}
	dirs := map[string]*Dir{}
	err := fs.WalkDir(fsys, ".", func(p string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && skipped(fsys, p):
			return fs.SkipDir
		case e.IsDir() || !strings.HasSuffix(p, ".go"):
			return nil
		}
		src, err := fs.ReadFile(fsys, p)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(t.Fset, p, src, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return fmt.Errorf("parsing: %w", err)
		}
		dir := path.Dir(p)
		if dirs[dir] == nil {
			dirs[dir] = &Dir{Path: dir}
			t.Dirs = append(t.Dirs, dirs[dir])
		}
		dirs[dir].Files = append(dirs[dir].Files, &File{Name: p, AST: f,
			Lines: strings.Count(string(src), "\n"), Test: strings.HasSuffix(p, "_test.go")})
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(t.Dirs, func(a, b *Dir) int { return strings.Compare(a.Path, b.Path) })
	return t, nil
}

// inModule returns the path, from the module's root, of a package of ours.
func inModule(importPath string) (string, bool) {
	if importPath == ModulePath {
		return ".", true
	}
	return strings.CutPrefix(importPath, ModulePath+"/")
}

// isStandard reports whether an import path is the standard library's: such a
// path has no dot in its first element.
func isStandard(importPath string) bool {
	first, _, _ := strings.Cut(importPath, "/")
	return !strings.Contains(first, ".")
}
