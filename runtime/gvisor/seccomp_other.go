//go:build !amd64

package gvisor

// seccompData is empty where nobody has compiled the filters yet: run
// TestSeccompIsCurrent with -update on such a machine.
var seccompData []byte
