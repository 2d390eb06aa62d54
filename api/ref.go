package api

import (
	"regexp"
	"strings"

	"github.com/cayhq/cay/store"
)

// The grammar of template references (e2b.md 1.4).
var (
	nameForm = regexp.MustCompile(`^[a-z0-9_-]{1,128}$`)
	tagForm  = regexp.MustCompile(`^[a-z0-9_.-]{1,128}$`)
	uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
)

// parseTemplateRef parses [namespace/]name[:tag], or an ID. Case and outer
// space don't matter.
func parseTemplateRef(text string) (store.TemplateRef, error) {
	const fix = "write [namespace/]name[:tag] with letters, digits, - and _, as in base or my-team/python:v2"
	var ref store.TemplateRef
	rest := strings.ToLower(strings.TrimSpace(text))
	if ns, after, ok := strings.Cut(rest, "/"); ok {
		if !nameForm.MatchString(ns) {
			return ref, invalid("the template reference %q has the malformed namespace %q", fix, text, ns)
		}
		ref.Namespace, rest = ns, after
	}
	if name, tag, ok := strings.Cut(rest, ":"); ok {
		if !tagForm.MatchString(tag) || uuidForm.MatchString(tag) {
			return ref, invalid("the template reference %q has the malformed tag %q", fix, text, tag)
		}
		ref.Tag, rest = tag, name
	}
	if !nameForm.MatchString(rest) {
		return ref, invalid("the template reference %q has the malformed name %q", fix, text, rest)
	}
	ref.Name = rest
	return ref, nil
}
