package api

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/operator"
)

func TestKeys(t *testing.T) {
	a, b := NewKey(), NewKey()
	if a == b || !strings.HasPrefix(a, "e2b_") || len(a) != 44 {
		t.Fatalf("keys %q, %q", a, b)
	}
	h1, err1 := HashKey("p1", a)
	h2, err2 := HashKey("p2", a)
	h3, err3 := HashKey("p1", a)
	if err1 != nil || err2 != nil || err3 != nil || bytes.Equal(h1, h2) || !bytes.Equal(h1, h3) || len(h1) != 32 {
		t.Errorf("hashes %x %x %x", h1, h2, h3)
	}
	for _, bad := range []string{"", "e2b_", "e2b_" + strings.Repeat("a", 39), "e2b_" + strings.Repeat("a", 41), "e2b_" + strings.Repeat("A", 40), "sk_" + strings.Repeat("a", 41)} {
		if _, err := HashKey("p", bad); cay.CodeOf(err) != cay.CodeUnauthorized {
			t.Errorf("HashKey(%q): %v", bad, err)
		} else if bad != "" && len(bad) > 5 && strings.Contains(err.Error(), bad) {
			t.Errorf("the error repeats the key: %v", err)
		}
	}
	if p, s, n := MaskKey("e2b_0123456789012345678901234567890123456789"); p != "01" || s != "6789" || n != 40 {
		t.Errorf("mask %q %q %d", p, s, n)
	}
}

// The tokens of sandboxes may never change: clients hold them. The values are
// those of another implementation of HMAC-SHA-256.
func TestTokensAreStable(t *testing.T) {
	if got, want := AccessToken("seed", "iabc").Reveal(), "93177cdf2a0b174da49cc7f94199bbdfbbbd0aa2573cd6a15cec8e669f58ae0b"; got != want {
		t.Errorf("access token %s, want %s", got, want)
	}
	if got, want := trafficToken("seed", "iabc").Reveal(), "ebd7c80002d6f4864a21810a2762694d82c2624df0310fcf914e4974a0856a4f"; got != want {
		t.Errorf("traffic token %s, want %s", got, want)
	}
}

func TestAuthentication(t *testing.T) {
	f := newFixture(t)
	team, other := string(f.team.ID), string(f.other.ID)
	for _, tt := range []struct {
		name    string
		path    string
		headers []string
		status  int
		says    string
	}{
		{"key", "/v2/sandboxes", nil, 200, ""},
		{"no key", "/v2/sandboxes", []string{"X-API-Key", ""}, 401, "the API key is missing. Send it in X-API-Key"},
		{"bearer", "/v2/sandboxes", []string{"X-API-Key", "", "Authorization", "Bearer x"}, 401, "Authorization is not read"},
		{"malformed", "/v2/sandboxes", []string{"X-API-Key", "e2b_xyz"}, 401, "malformed"},
		{"unknown", "/v2/sandboxes", []string{"X-API-Key", NewKey()}, 401, "the API key is unknown, or it was deleted"},
		{"operator for a team", "/v2/sandboxes", []string{"X-API-Key", "", "X-Admin-Token", testAdmin, "X-Team-ID", team}, 200, ""},
		{"operator for no team", "/v2/sandboxes", []string{"X-API-Key", "", "X-Admin-Token", testAdmin}, 401, "X-Team-ID"},
		{"operator for an unknown team", "/v2/sandboxes", []string{"X-API-Key", "", "X-Admin-Token", testAdmin, "X-Team-ID", "nope"}, 404, ""},
		{"wrong operator", "/v2/sandboxes", []string{"X-Admin-Token", "no", "X-Team-ID", team}, 401, "the admin token is wrong"},
		{"key and a foreign team", "/v2/sandboxes", []string{"X-Team-ID", other}, 200, ""},
		{"key for the operator's", "/nodes", nil, 401, "an API key is not enough"},
		{"nothing for the operator's", "/nodes", []string{"X-API-Key", ""}, 401, "the admin token is missing"},
		{"operator", "/nodes", []string{"X-API-Key", "", "X-Admin-Token", testAdmin}, 200, ""},
		{"operator with a wrong token", "/nodes", []string{"X-Admin-Token", testAdmin + "x"}, 401, "the admin token is wrong"},
		{"keys need a team", "/api-keys", []string{"X-API-Key", "", "X-Admin-Token", testAdmin}, 401, "X-Team-ID"},
		{"keys by key", "/api-keys", nil, 401, "and the team it is for in X-Team-ID"},
		{"operator API", "/operator/v1/status", []string{"X-API-Key", "", "X-Admin-Token", testAdmin}, 200, ""},
		{"operator API by key", "/operator/v1/status", nil, 401, "an API key is not enough"},
		{"health", "/health", []string{"X-API-Key", ""}, 204, ""},
	} {
		a := f.want(tt.status, f.request("GET", tt.path, "", tt.headers...))
		if tt.status >= 400 {
			if e := f.problem(a); !strings.Contains(e.Message, tt.says) {
				t.Errorf("%s: %q does not say %q", tt.name, e.Message, tt.says)
			}
		}
	}
	// Who may not come in learns nothing about the request either.
	f.want(401, f.request("POST", "/v2/sandboxes", `{"timeout":"x"}`, "X-API-Key", ""))
	f.want(401, f.request("GET", "/v2/sandboxes?limit=x", "", "X-API-Key", ""))
	// Without a token of its own the server takes none.
	f.s.AdminToken = ""
	f.want(401, f.request("GET", "/nodes", "", "X-API-Key", "", "X-Admin-Token", ""))
	f.want(401, f.request("GET", "/nodes", "", "X-Admin-Token", testAdmin))
}

func TestKeyUseIsRecorded(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		used := func() time.Time {
			keys, err := f.store.ListKeys(t.Context(), f.team.ID)
			if err != nil || len(keys) != 1 {
				t.Fatal(keys, err)
			}
			return keys[0].LastUsed
		}
		f.want(401, f.request("GET", "/v2/sandboxes", "", "X-API-Key", NewKey()))
		synctest.Wait()
		if !used().IsZero() {
			t.Errorf("used at %v before any use", used())
		}
		for range 3 {
			time.Sleep(10 * time.Minute)
			f.want(200, f.request("GET", "/v2/sandboxes", ""))
			synctest.Wait()
			if d := time.Since(used()); d < 0 || d > time.Minute {
				t.Errorf("used %v ago", d)
			}
		}
	})
}

func TestAPIKeys(t *testing.T) {
	f := newFixture(t)
	admin := []string{"X-API-Key", "", "X-Admin-Token", testAdmin, "X-Team-ID", string(f.team.ID)}
	var k gen.CreatedTeamAPIKey
	f.want(201, f.request("POST", "/api-keys", `{"name":" laptop "}`, admin...)).decode(t, &k)
	if k.Name != "laptop" || k.Mask.Prefix != "e2b_" || k.Mask.ValueLength != 40 || !strings.HasPrefix(k.Key[4:], k.Mask.MaskedValuePrefix) || !strings.HasSuffix(k.Key, k.Mask.MaskedValueSuffix) {
		t.Errorf("key %+v", k)
	}
	f.want(200, f.request("GET", "/v2/sandboxes", "", "X-API-Key", k.Key))
	f.want(202, f.request("PATCH", "/api-keys/"+k.Id, `{"name":"desk"}`, admin...))
	list := f.want(200, f.request("GET", "/api-keys", "", admin...))
	if !strings.Contains(list.body, `"desk"`) || strings.Contains(list.body, k.Key) {
		t.Errorf("list %s", list.body)
	}
	for _, name := range []string{"", " ", strings.Repeat("x", 129)} {
		f.want(400, f.request("POST", "/api-keys", fmt.Sprintf(`{"name":%q}`, name), admin...))
		f.want(400, f.request("PATCH", "/api-keys/"+k.Id, fmt.Sprintf(`{"name":%q}`, name), admin...))
	}
	theirs, err := f.store.ListKeys(t.Context(), f.other.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{string(theirs[0].ID), "no-such-key"} {
		f.want(404, f.request("DELETE", "/api-keys/"+id, "", admin...))
		f.want(404, f.request("PATCH", "/api-keys/"+id, `{"name":"x"}`, admin...))
	}
	f.want(204, f.request("DELETE", "/api-keys/"+k.Id, "", admin...))
	f.want(401, f.request("GET", "/v2/sandboxes", "", "X-API-Key", k.Key)) // at once

	f.want(201, f.request("POST", "/admin/teams/"+string(f.other.ID)+"/api-keys", `{"name":"x"}`, admin...)).decode(t, &k)
	f.want(200, f.request("GET", "/v2/sandboxes", "", "X-API-Key", k.Key))
	f.want(404, f.request("DELETE", "/admin/teams/"+string(f.team.ID)+"/api-keys/"+k.Id, "", admin...))
	f.want(204, f.request("DELETE", "/admin/teams/"+string(f.other.ID)+"/api-keys/"+k.Id, "", admin...))
	f.want(404, f.request("POST", "/admin/teams/nobody/api-keys", `{"name":"x"}`, admin...))
}

func TestTeams(t *testing.T) {
	f := newFixture(t)
	var teams []gen.Team
	f.want(200, f.request("GET", "/teams", "")).decode(t, &teams)
	if d := cmp.Diff([]gen.Team{{TeamID: string(f.team.ID), Name: "One", ApiKey: f.key, IsDefault: true}}, teams); d != "" {
		t.Error(d)
	}
	f.want(200, f.request("GET", "/teams", "", "X-API-Key", "", "X-Admin-Token", testAdmin)).decode(t, &teams)
	if len(teams) != 2 || teams[0].ApiKey != "" {
		t.Errorf("the operator sees %+v", teams)
	}
}

func TestAdmin(t *testing.T) {
	f := newFixture(t)
	admin := []string{"X-API-Key", "", "X-Admin-Token", testAdmin}
	f.create("")
	f.create("")
	f.want(201, f.request("POST", "/sandboxes", `{"templateID":"base"}`, "X-API-Key", f.foreign))
	var counts map[string]int
	f.want(200, f.request("GET", "/admin/sandboxes/running-counts", "", admin...)).decode(t, &counts)
	if d := cmp.Diff(map[string]int{string(f.team.ID): 2, string(f.other.ID): 1}, counts); d != "" {
		t.Error(d)
	}
	var nodes []gen.Node
	f.want(200, f.request("GET", "/nodes", "", admin...)).decode(t, &nodes)
	if len(nodes) != 1 || nodes[0].Id != "local" || nodes[0].SandboxCount != 3 || nodes[0].Metrics.AllocatedCPU != 6 || nodes[0].CreateSuccesses != 3 {
		t.Errorf("nodes %+v", nodes)
	}
	f.want(200, f.request("GET", "/nodes/local", "", admin...))
	f.want(404, f.request("GET", "/nodes/other", "", admin...))
	f.want(200, f.request("GET", "/nodes?clusterID=11111111-1111-4111-8111-111111111111", "", admin...))

	var res gen.AdminSandboxKillResult
	f.want(200, f.request("POST", "/admin/teams/"+string(f.team.ID)+"/sandboxes/kill", "", admin...)).decode(t, &res)
	if res.KilledCount != 2 || res.FailedCount != 0 || len(f.node.live) != 1 {
		t.Errorf("killed %+v, %d live", res, len(f.node.live))
	}
	f.want(404, f.request("POST", "/admin/teams/nobody/sandboxes/kill", "", admin...))
}

func TestOperator(t *testing.T) {
	f := newFixture(t)
	admin := []string{"X-API-Key", "", "X-Admin-Token", testAdmin}
	id := string(f.create(`{"templateID":"base","metadata":{"a":"b"}}`))
	f.want(201, f.request("POST", "/sandboxes", `{"templateID":"base"}`, "X-API-Key", f.foreign))
	f.node.onConsole = func(cay.SandboxID) []cay.ConsoleLine { return []cay.ConsoleLine{{At: time.Now(), Text: "up"}} }

	var st operator.Status
	f.want(200, f.request("GET", "/operator/v1/status", "", admin...)).decode(t, &st)
	if st.Teams != 2 || st.Sandboxes.Running != 2 || st.Node.Runtime != "fake" || st.CreateSuccesses != 2 {
		t.Errorf("status %+v", st)
	}
	var all []operator.SandboxRecord
	f.want(200, f.request("GET", "/operator/v1/sandboxes", "", admin...)).decode(t, &all)
	if len(all) != 2 {
		t.Errorf("%d sandboxes", len(all))
	}
	f.want(200, f.request("GET", "/operator/v1/sandboxes?state=running,starting&teamID="+string(f.team.ID), "", admin...)).decode(t, &all)
	if len(all) != 1 || all[0].SandboxID != id || all[0].Metadata["a"] != "b" {
		t.Errorf("sandboxes of the team %+v", all)
	}
	var in operator.SandboxInspection
	f.want(200, f.request("GET", "/operator/v1/sandboxes/"+id, "", admin...)).decode(t, &in)
	if in.Node == nil || in.Node.Host.Runtime != "fake" || in.Record.State != "running" || in.Record.EndedAt != nil || in.Record.EndReason != "" {
		t.Errorf("inspection %+v", in)
	}
	a := f.want(200, f.request("GET", "/operator/v1/sandboxes/"+id+"/trace", "", admin...))
	if want := `[{"error":"","layer":"runtime","name":"boot","operation":"start","tookMs":1.5}]`; strings.TrimSpace(a.body) != want {
		t.Errorf("trace %s, want %s", a.body, want)
	}
	if a = f.want(200, f.request("GET", "/operator/v1/sandboxes/"+id+"/console", "", admin...)); !strings.Contains(a.body, `"text":"up"`) {
		t.Errorf("console %s", a.body)
	}
	f.want(204, f.request("DELETE", "/operator/v1/sandboxes/"+id, "", admin...))
	f.want(404, f.request("DELETE", "/operator/v1/sandboxes/"+id, "", admin...))
	in = operator.SandboxInspection{}
	f.want(200, f.request("GET", "/operator/v1/sandboxes/"+id, "", admin...)).decode(t, &in)
	if in.Node != nil || in.Record.State != "ended" || in.Record.EndReason != "request" || in.Record.EndMessage != "an operator killed it" || in.Record.EndedAt == nil {
		t.Errorf("after the end: %+v", in)
	}
	for _, rest := range []string{"", "/trace", "/console"} {
		f.want(404, f.request("GET", "/operator/v1/sandboxes/"+string(cay.NewSandboxID())+rest, "", admin...))
	}
}

func TestTemplates(t *testing.T) {
	f := newFixture(t)
	var list []gen.Template
	f.want(200, f.request("GET", "/v2/templates", "")).decode(t, &list)
	if len(list) != 2 {
		t.Fatalf("templates %+v", list)
	}
	names := map[string]gen.Template{}
	for _, x := range list {
		names[x.Names[0]] = x
	}
	if d := cmp.Diff([]string{"one/base", "one/own"}, slices.Sorted(maps.Keys(names))); d != "" {
		t.Error(d)
	}
	if b := names["one/base"]; !b.Public || b.BuildStatus != gen.TemplateBuildStatusReady || b.CpuCount != 2 || b.EnvdVersion != "0.6.13" || b.CreatedBy != nil {
		t.Errorf("base %+v", b)
	}
	f.want(200, f.request("GET", "/templates?teamID="+string(f.team.ID), "")).decode(t, &list)
	if len(list) != 2 {
		t.Errorf("v1: %+v", list)
	}
	f.want(403, f.request("GET", "/templates?teamID="+string(f.other.ID), ""))
	f.want(403, f.request("GET", "/v2/templates?teamID=nobody", ""))
	// The other team sees its own and the public one, by its owner's name.
	f.want(200, f.request("GET", "/v2/templates", "", "X-API-Key", f.foreign)).decode(t, &list)
	got := []string{list[0].Names[0], list[1].Names[0]}
	slices.Sort(got)
	if d := cmp.Diff([]string{"one/base", "two/theirs"}, got); d != "" {
		t.Error(d)
	}
	// Pages.
	first := f.want(200, f.request("GET", "/v2/templates?limit=1", ""))
	second := f.want(200, f.request("GET", "/v2/templates?limit=1&nextToken="+first.header.Get("X-Next-Token"), ""))
	if first.header.Get("X-Next-Token") == "" || second.header.Get("X-Next-Token") != "" || first.body == second.body {
		t.Errorf("pages %s, %s", first.body, second.body)
	}

	var one gen.TemplateWithBuilds
	for _, ref := range []string{"own", "one%2Fown", "one%2Fown%3Adefault", names["one/own"].TemplateID, "OWN"} {
		f.want(200, f.request("GET", "/templates/"+ref, "")).decode(t, &one)
		if one.Names[0] != "one/own" || len(one.Builds) != 1 || one.Builds[0].BuildID != names["one/own"].BuildID {
			t.Errorf("%s: %+v", ref, one)
		}
	}
	f.want(404, f.request("GET", "/templates/theirs", ""))
	f.want(404, f.request("GET", "/templates/one/own", "")) // two segments are another path

	f.want(200, f.request("GET", "/templates/aliases/own", ""))
	f.want(403, f.request("GET", "/templates/aliases/two%2Ftheirs", ""))
	f.want(404, f.request("GET", "/templates/aliases/nobodys", ""))

	a := f.want(200, f.request("GET", "/templates/own/tags", ""))
	if !strings.Contains(a.body, `"tag":"default"`) {
		t.Error(a.body)
	}
	a = f.want(200, f.request("PATCH", "/v2/templates/own", `{"public":true}`))
	if strings.TrimSpace(a.body) != `{"names":["one/own"]}` {
		t.Error(a.body)
	}
	f.want(200, f.request("GET", "/templates/one%2Fown", "", "X-API-Key", f.foreign))
	f.want(200, f.request("PATCH", "/templates/own", `{"public":false}`))
	f.want(404, f.request("GET", "/templates/one%2Fown", "", "X-API-Key", f.foreign))
	f.want(404, f.request("PATCH", "/v2/templates/base", `{"public":false}`, "X-API-Key", f.foreign))
	f.want(404, f.request("DELETE", "/templates/base", "", "X-API-Key", f.foreign))

	id := f.create(`{"templateID":"own"}`)
	if e := f.problem(f.want(400, f.request("DELETE", "/templates/own", ""))); !strings.Contains(e.Message, "has sandboxes that run") {
		t.Error(e.Message)
	}
	f.want(204, f.request("DELETE", "/sandboxes/"+string(id), ""))
	f.want(204, f.request("DELETE", "/templates/own", ""))
	f.want(404, f.request("DELETE", "/templates/own", ""))
}

// An operator changes the limits of a team, one or all; the node is told, and a
// team that is not there, or a value that is none, changes nothing.
func TestTeamLimits(t *testing.T) {
	f := newFixture(t)
	admin := []string{"X-API-Key", "", "X-Admin-Token", testAdmin}
	url := "/operator/v1/teams/" + string(f.team.ID) + "/limits"
	var got operator.Team
	f.want(200, f.request("PATCH", url, `{"connections":1000,"connectionsPerSecond":50,"mbit":100}`, admin...)).decode(t, &got)
	want := operator.TeamLimits{Sandboxes: 20, Hours: 24, Connections: 1000, ConnectionsPerSecond: 50, Mbit: 100}
	if got.TeamID != string(f.team.ID) || got.Limits != want {
		t.Errorf("the team is %+v, want %+v", got, want)
	}
	f.want(200, f.request("PATCH", url, `{"mbit":0,"sandboxes":1}`, admin...))
	want.Mbit, want.Sandboxes = 0, 1
	for _, bad := range []string{`{"mbit":-1}`, `{"mbit":100001}`, `{"connections":1.5}`, `{"sandboxes":0}`, `{"hours":0}`, `{"mbit":"1"}`, ``} {
		f.want(400, f.request("PATCH", url, bad, admin...))
	}
	f.want(404, f.request("PATCH", "/operator/v1/teams/nobody/limits", `{"mbit":1}`, admin...))
	f.want(401, f.request("PATCH", url, `{"mbit":1}`))
	var all []operator.Team
	f.want(200, f.request("GET", "/operator/v1/teams", "", admin...)).decode(t, &all)
	if len(all) != 2 || all[0].Limits != want || all[1].Limits.Mbit != 0 {
		t.Errorf("the teams are %+v", all)
	}
	if d := cmp.Diff([]cay.TeamID{f.team.ID, f.team.ID}, f.node.refreshed); d != "" {
		t.Error(d)
	}
	// One sandbox is the limit now.
	f.create("")
	f.want(429, f.request("POST", "/sandboxes", `{"templateID":"base"}`))
	f.node.refreshErr = errors.New("no answer")
	f.want(500, f.request("PATCH", url, `{"mbit":5}`, admin...))
}
