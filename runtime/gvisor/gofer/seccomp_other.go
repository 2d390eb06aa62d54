//go:build !amd64

package gofer

// seccompData is empty where nobody has compiled the filter yet.
var seccompData []byte
