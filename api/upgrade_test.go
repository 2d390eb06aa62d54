package api

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/operator"
)

const otherEnvd = cay.Digest("sha256:f")

// UpgradeEnvd gives a sandbox an envd of another version, unless that is told to
// fail.
func (n *fakeNode) UpgradeEnvd(_ context.Context, id cay.SandboxID) (cay.EnvdUpgrade, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s, ok := n.live[id]
	switch {
	case !ok:
		return cay.EnvdUpgrade{}, &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerRuntime, Message: "not here"}
	case s.Envd == "broken":
		return cay.EnvdUpgrade{}, &cay.Error{Code: cay.CodeEnvdUpgrade, Layer: cay.LayerEnvd, Message: "it ended at once", Fix: "look at its console"}
	}
	u := cay.EnvdUpgrade{Changed: s.Envd != otherEnvd, FromVersion: s.EnvdVersion, FromDigest: s.Envd, Version: "0.7.0", Digest: otherEnvd, Took: 1500 * time.Microsecond}
	s.Envd, s.EnvdVersion, s.EnvdOutdated = u.Digest, u.Version, false
	n.live[id] = s
	return u, nil
}

func TestUpgradeOfEnvd(t *testing.T) {
	f := newFixture(t)
	admin := []string{"X-API-Key", "", "X-Admin-Token", testAdmin}
	id := f.create(`{"templateID":"base"}`)
	path := "/operator/v1/sandboxes/" + string(id)
	set := func(d cay.Digest) {
		f.node.mu.Lock()
		defer f.node.mu.Unlock()
		s := f.node.live[id]
		s.Envd, s.EnvdOutdated = d, true
		f.node.live[id] = s
	}
	f.want(401, f.request("POST", path+"/upgrade", ""))
	set("broken")
	if a := f.want(409, f.request("POST", path+"/upgrade", "", admin...)); !strings.Contains(a.body, `"error_code":"envd_upgrade_failed"`) || !strings.Contains(a.body, `"layer":"envd"`) {
		t.Errorf("a failure is told as %s", a.body)
	}
	var in operator.SandboxInspection
	f.want(200, f.request("GET", path, "", admin...)).decode(t, &in)
	if !in.Node.EnvdOutdated || in.Node.EnvdDigest != "broken" || in.Record.EnvdVersion != "0.6.13" {
		t.Errorf("before: %+v, %+v", in.Node, in.Record)
	}
	set("sha256:e")
	var u operator.EnvdUpgrade
	f.want(200, f.request("POST", path+"/upgrade", "", admin...)).decode(t, &u)
	want := operator.EnvdUpgrade{SandboxID: string(id), Changed: true, FromVersion: "0.6.13", FromDigest: "sha256:e", Version: "0.7.0", Digest: "sha256:f", TookMs: 1.5}
	if u != want {
		t.Errorf("%+v, want %+v", u, want)
	}
	// Clients go by the version that it has now.
	f.want(200, f.request("GET", path, "", admin...)).decode(t, &in)
	if in.Node.EnvdOutdated || in.Record.EnvdVersion != "0.7.0" || f.info(id).EnvdVersion != "0.7.0" {
		t.Errorf("after: %+v, %+v", in.Node, in.Record)
	}
	f.want(200, f.request("POST", path+"/upgrade", "", admin...)).decode(t, &u)
	if u.Changed {
		t.Errorf("once more: %+v", u)
	}
	f.want(204, f.request("POST", sandboxPath(id, "/pause"), ""))
	if a := f.want(409, f.request("POST", path+"/upgrade", "", admin...)); !strings.Contains(a.body, "is paused") {
		t.Errorf("a paused one: %s", a.body)
	}
	f.want(404, f.request("POST", "/operator/v1/sandboxes/"+string(cay.NewSandboxID())+"/upgrade", "", admin...))
}
