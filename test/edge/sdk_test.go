package edge

import (
	"testing"

	"github.com/cayhq/cay/test/program"
	"github.com/cayhq/cay/test/sdk"
)

var scenarios = []string{"use a sandbox", "getHost", "downloadUrl", "uploadUrl", "end"}

// With E2B_DOMAIN alone the official clients use HTTPS for everything. Without
// a domain, with the two URLs, what getHost gives works over plain HTTP where
// *.localhost leads to this machine, and what downloadUrl and uploadUrl give as
// it is.
func TestClients(t *testing.T) {
	e := startEdge(t)
	bare := program.Start(t, program.Options{})
	for _, c := range sdk.Clients {
		if c.Name == "python-async" || c.Name == "js-2.45" && !program.Nightly() {
			continue // the same calls and addresses
		}
		t.Run(c.Name, func(t *testing.T) {
			t.Run("domain", func(t *testing.T) {
				c.Exercise(t, e.Server, scenarios, "EDGE_MODE=domain", "E2B_DOMAIN="+domain, "NODE_EXTRA_CA_CERTS="+e.caFile, "SSL_CERT_FILE="+e.caFile)
			})
			t.Run("URLs", func(t *testing.T) { c.Exercise(t, bare, scenarios, "EDGE_MODE=urls") })
		})
	}
}
