package proxy

import (
	"net/url"
	"path"
	"slices"
	"strings"
	"testing"
)

func TestReserved(t *testing.T) {
	for _, p := range []string{
		"/init", "/init/", "//init", "///init//", "/./init", "/files/../init", "/init/../files", "/x/%2e%2e/init",
		"/%69nit", "/%2569nit", "/%252569nit", "/init%00", "/init%20", "/ init", "/init;v=1", "/Init", "/INIT", `\init`, `/files\..\init`,
		"/%2finit", "/%5cinit", "/init.", "/init%2f", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw", "/upgrade",
		"/%25252525252569nit", "/\tinit", "/init\x7f", "/init%c2%a0",
	} {
		// As in a request, the server has decoded once; but also if it had not.
		if !reserved(p) {
			t.Errorf("reserved(%q) = false", p)
		}
		if once, err := url.PathUnescape(p); err == nil && !reserved(once) {
			t.Errorf("reserved(%q), decoded from %q, = false", once, p)
		}
	}
	for _, p := range []string{
		"", "/", "*", "/health", "/files", "/files/compose", "/metrics", "/envs", "/process.Process/Start",
		"/process.Process/SendInput", "/filesystem.Filesystem/WatchDir", "/initialise", "/reinit", "/100%", "/a%zz",
	} {
		if reserved(p) {
			t.Errorf("reserved(%q) = true", p)
		}
	}
}

// What any plain reader of the path would take for a control route must be
// refused, however the path is spelled.
func FuzzReserved(f *testing.F) {
	for _, p := range []string{"/init", "//init/", "/%69nit", "/a/../freeze", "/x/%2e%2e/upgrade", "/%252e/init"} {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p string) {
		read := p
		for range 3 {
			clean := strings.ToLower(path.Clean("/" + strings.ReplaceAll(read, `\`, "/")))
			if slices.Contains(controlRoutes, strings.TrimPrefix(clean, "/")) && !reserved(p) {
				t.Fatalf("reserved(%q) = false, but it reads as %q", p, clean)
			}
			next, err := url.PathUnescape(read)
			if err != nil {
				return
			}
			read = next
		}
	})
}
