//go:build !cgo

package gvisor

const builtWithCgo = false
