package main

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"os"
	"strings"

	"github.com/cayhq/cay/internal/lint"
)

// fuzz runs each fuzz target of the module. Their corpus runs with the tests.
func (c *check) fuzz(ctx context.Context) error {
	tree, err := lint.Load(os.DirFS("."))
	if err != nil {
		return err
	}
	var failed []error
	for _, target := range fuzzTargets(tree) {
		dir, name, _ := strings.Cut(target, " ")
		if err := c.command(ctx, "go", "test", "-run", "^$", "-fuzz", "^"+name+"$", "-fuzztime", "60s", "./"+dir); err != nil {
			failed = append(failed, fmt.Errorf("fuzzing %s: %w", target, err))
		}
	}
	return errors.Join(failed...)
}

// fuzzTargets lists "directory function".
func fuzzTargets(tree *lint.Tree) []string {
	var out []string
	for _, d := range tree.Dirs {
		for _, f := range d.Files {
			for _, decl := range f.AST.Decls {
				fn, ok := decl.(*ast.FuncDecl)
				if ok && f.Test && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "Fuzz") {
					out = append(out, d.Path+" "+fn.Name.Name)
				}
			}
		}
	}
	return out
}
