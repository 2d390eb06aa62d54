package main

import (
	"os"
	"strings"
	"unsafe"
)

// wipe overwrites a secret in the memory that the kernel laid this program's
// environment into, where /proc/1/environ and every tool would still find it,
// and removes it from the environment. It reports whether the secret is gone.
//
// The kernel puts the strings of the environment right after those of the
// arguments, and Go's os.Args are views of the latter. Nothing is overwritten
// but an exact copy of the secret.
func wipe(secret string) bool {
	if secret == "" {
		return true
	}
	size := 0
	for _, kv := range os.Environ() {
		size += len(kv) + 1
	}
	os.Unsetenv(envToken)
	if len(os.Args) == 0 {
		return false
	}
	last := os.Args[len(os.Args)-1]
	start := unsafe.Add(unsafe.Pointer(unsafe.StringData(last)), len(last)+1)
	env := unsafe.Slice((*byte)(start), size)
	i := strings.Index(unsafe.String((*byte)(start), size), envToken+"="+secret)
	if i < 0 {
		return false
	}
	clear(env[i : i+len(envToken)+1+len(secret)])
	return true
}
