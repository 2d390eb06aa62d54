package cli

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"

	"github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/operator"
)

// networkHandlers answers what is about the network of sandboxes. The guarded
// one has a policy and a log; whoever follows the log ends it.
func (f *fakeServer) networkHandlers(m *http.ServeMux, team, admin func(http.HandlerFunc) http.HandlerFunc) {
	m.HandleFunc("PUT /sandboxes/{id}/network", team(func(w http.ResponseWriter, r *http.Request) {
		id := r.PathValue("id")
		if !f.has(id) {
			noSandbox(w, id)
			return
		}
		var u api.SandboxNetworkUpdateConfig
		if err := json.NewDecoder(r.Body).Decode(&u); err != nil || len(u.DenyOut) > 0 && u.DenyOut[0] == "example.com" {
			refuse(w, 400, "invalid_request", "api", `network.denyOut has "example.com": it takes IP addresses and ranges (CIDR), not names`, "deny 0.0.0.0/0")
			return
		}
		f.network = &api.SandboxNetworkConfig{AllowOut: u.AllowOut, DenyOut: u.DenyOut, EgressProxy: u.EgressProxy, Rules: u.Rules}
		f.internet = u.AllowInternetAccess
		w.WriteHeader(204)
	}))
	first := fakeNow.Add(-time.Minute)
	log := []operator.EgressRefusal{
		{Seq: 4, First: first, Last: fakeNow, Count: 4, Protocol: "tcp", Destination: "169.254.169.254:80", Rule: "always refused", Reason: "link local"},
		{Seq: 5, First: fakeNow, Last: fakeNow, Count: 1, Protocol: "icmp", Destination: "8.8.8.8", Rule: "0.0.0.0/0", Reason: "the sandbox's policy denies it"},
		{Seq: 6, First: fakeNow, Last: fakeNow, Count: 1, Protocol: "tls", Destination: "1.2.3.4:443", Name: "evil.example", Rule: "0.0.0.0/0", Reason: "the name is not allowed"},
		{Seq: 7, First: fakeNow, Last: fakeNow, Count: 1, Protocol: "dns", Name: "leak.example", Rule: "names", Reason: "the name is not allowed"},
	}
	m.HandleFunc("GET /operator/v1/sandboxes/{id}/egress", admin(func(w http.ResponseWriter, r *http.Request) {
		after, err := strconv.ParseInt(r.URL.Query().Get("after"), 10, 64)
		if err != nil || r.PathValue("id") != guarded {
			noSandbox(w, r.PathValue("id"))
			return
		}
		out := []operator.EgressRefusal{}
		for _, e := range log {
			if e.Seq > after {
				out = append(out, e)
			}
		}
		f.alive = nil
		reply(w, 200, out)
	}))
}
