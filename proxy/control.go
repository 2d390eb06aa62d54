package proxy

import (
	"net/url"
	"slices"
	"strings"
)

// Ports of envd. The public one is the E2B contract's; the control one is
// Cay's own and answers the orchestrator only.
const (
	envdPort    = 49983
	controlPort = 49982
)

// controlRoutes are envd's internal routes of the contract (section 2.5). Our
// envd serves them on the control port alone; the proxy refuses them as well,
// so that a template with another envd is no way in.
var controlRoutes = []string{"init", "freeze", "unfreeze", "collapse", "fsfreeze", "fsthaw", "upgrade"}

// reserved reports whether a path on envd's public port spells a control
// route. It errs on the side of refusing: no public route of envd has a
// segment of such a name (file names are in the query), so a path with one
// anywhere, however encoded, is refused.
func reserved(path string) bool {
	for range 4 { // a decoder behind us may decode once more than we think
		if reservedOnce(path) {
			return true
		}
		next, err := url.PathUnescape(path)
		if err != nil || next == path {
			return false
		}
		path = next
	}
	return true // no honest client encodes five times
}

func reservedOnce(path string) bool {
	for seg := range strings.FieldsFuncSeq(path, func(r rune) bool { return r == '/' || r == '\\' }) {
		seg, _, _ = strings.Cut(seg, ";")
		seg = strings.TrimFunc(seg, func(r rune) bool { return r <= ' ' || r == 0x7f || r == 0xa0 || r == '.' })
		if slices.Contains(controlRoutes, strings.ToLower(seg)) {
			return true
		}
	}
	return false
}
