package cli

import (
	"net/http"

	"github.com/cayhq/cay/internal/gen/operator"
)

// upgradeHandler replaces the envd of the guarded sandbox, once; the open one
// cannot have another.
func (f *fakeServer) upgradeHandler(m *http.ServeMux, admin func(http.HandlerFunc) http.HandlerFunc) {
	m.HandleFunc("POST /operator/v1/sandboxes/{id}/upgrade", admin(func(w http.ResponseWriter, r *http.Request) {
		switch id := r.PathValue("id"); {
		case !f.has(id):
			noSandbox(w, id)
		case id == open:
			refuse(w, 409, "envd_upgrade_failed", "envd", "envd was not replaced: the other envd ended at once", "the sandbox runs on")
		default:
			u := operator.EnvdUpgrade{SandboxID: id, Changed: !f.upgraded, FromVersion: "0.6.12", FromDigest: "sha256:e", Version: "0.6.13", Digest: "sha256:f", TookMs: 412.5}
			f.upgraded = true
			reply(w, 200, u)
		}
	}))
}
