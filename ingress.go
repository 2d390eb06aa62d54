package cay

import (
	"slices"
	"strconv"
	"strings"
)

// Ingress says how requests from outside reach the ports of a guest, envd's
// apart. It is fixed when the sandbox is created; contract/e2b.md ("Network
// config") is its source. The zero value passes requests as they come, over
// plain HTTP.
type Ingress struct {
	// MaskHost replaces the Host of a request, whose own goes to
	// X-Forwarded-Host: host[:port] in ASCII, where ${PORT} stands for the port
	// that was asked for. Empty leaves the Host.
	MaskHost string `json:"maskHost,omitempty"`
	// HTTPSPorts are those whose service in the guest speaks TLS, ascending.
	// Its certificate is not verified.
	HTTPSPorts []uint16 `json:"httpsPorts,omitempty"`
}

// Host returns the Host that a request for a port has in the guest, and whether
// it is another than the client's.
func (in Ingress) Host(port uint16) (host string, masked bool) {
	if in.MaskHost == "" {
		return "", false
	}
	return strings.ReplaceAll(in.MaskHost, "${PORT}", strconv.Itoa(int(port))), true
}

// TLS reports whether the service on a port speaks TLS.
func (in Ingress) TLS(port uint16) bool {
	_, found := slices.BinarySearch(in.HTTPSPorts, port)
	return found
}
