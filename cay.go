// Package cay is the vocabulary of the system: identifiers, states, errors,
// build manifests and the node contract. It imports the standard library only,
// so that every other package may import it.
//
// Rules that hold everywhere:
//
//   - Identifiers are types, never bare strings.
//   - A secret is a [Secret]: it redacts itself when printed, marshalled or logged.
//   - A failure a person may meet is an [*Error]: code, layer, message, fix.
//   - Clocks are injected; a deadline is a wall-clock instant in UTC.
//   - Sizes carry their unit in the name (MemoryMB is mebibytes).
package cay

import (
	"crypto/rand"
	"fmt"
	"log/slog"
)

// Version is the version of this build of Cay. The Makefile stamps it.
var Version = "0.0.0-dev"

// Commit is the git commit of this build. The Makefile stamps it.
var Commit = "unknown"

// Secret is a string that must not appear in logs, errors, JSON or a debugger's
// casual print. Use [Secret.Reveal] at the one place where the value is needed.
type Secret string

const redacted = "[redacted]"

// Reveal returns the value.
func (s Secret) Reveal() string { return string(s) }

// String implements [fmt.Stringer] without the value.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return redacted
}

// GoString implements [fmt.GoStringer] without the value.
func (s Secret) GoString() string { return fmt.Sprintf("cay.Secret(%q)", s.String()) }

// MarshalText implements [encoding.TextMarshaler] without the value; so JSON
// holds the redaction. A record that must persist a secret stores Reveal().
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue implements [slog.LogValuer] without the value.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

const idAlphabet = "abcdefghijklmnopqrstuvwxyz0123456789"

// randomID returns n characters of [a-z0-9] from the system's random source,
// without modulo bias.
func randomID(n int) string {
	out := make([]byte, 0, n)
	buf := make([]byte, 2*n)
	for len(out) < n {
		rand.Read(buf) // never fails: crypto/rand aborts the program instead
		for _, b := range buf {
			if b < 252 && len(out) < n { // 252 = 7*36
				out = append(out, idAlphabet[b%36])
			}
		}
	}
	return string(out)
}

// validID reports whether s is n characters of [a-z0-9].
func validID(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}
