//go:build cgo

package gvisor

// builtWithCgo: the engine starts itself again in an empty root directory,
// where a dynamic loader is not to be found.
const builtWithCgo = true
