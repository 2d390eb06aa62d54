// Package templates holds the recipes of the stock templates.
package templates

import "embed"

// Files has one directory per template, named after it, each with a
// recipe.json and what that names. Package template reads it.
//
//go:embed base
var Files embed.FS
