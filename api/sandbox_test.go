package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
)

func TestCreateGetListKill(t *testing.T) {
	f := newFixture(t)
	f.s.Domain = "sbx.example"
	a := f.want(201, f.request("POST", "/sandboxes", `{"templateID":"base","timeout":300,"secure":true,"autoPause":false,
		"allow_internet_access":true,"metadata":{"a":"b"},"envVars":{"X":"1"},"unknownField":{"x":1}}`))
	var s gen.Sandbox
	a.decode(t, &s)
	id := cay.SandboxID(s.SandboxID)
	want := gen.Sandbox{TemplateID: string(f.base), SandboxID: s.SandboxID, ClientID: "6532622b", EnvdVersion: "0.6.13",
		Alias: optional("base"), Domain: optional("sbx.example"), EnvdAccessToken: optional(AccessToken(testSeed, id).Reveal())}
	if d := cmp.Diff(want, s); d != "" {
		t.Error(d)
	}
	if got := AccessToken(testSeed, id).Reveal(); len(got) != 64 || strings.Trim(got, "0123456789abcdef") != "" {
		t.Errorf("access token %q, want 64 hex digits", got)
	}
	c := f.node.configs[id]
	if c.AccessToken.Reveal() != *s.EnvdAccessToken || c.TrafficToken != "" || !c.Egress.Open() || c.EnvVars["X"] != "1" || c.TeamID != f.team.ID {
		t.Errorf("the node got %+v", c)
	}

	var d gen.SandboxDetail
	f.want(200, f.request("GET", "/sandboxes/"+s.SandboxID, "")).decode(t, &d)
	if d.State != gen.Running || d.EndAt.Sub(d.StartedAt) != 300*time.Second || (*d.Metadata)["a"] != "b" ||
		d.AllowInternetAccess == nil || !*d.AllowInternetAccess || d.Lifecycle.OnTimeout != gen.Kill || d.CpuCount != 2 || d.DiskSizeMB != 1024 {
		t.Errorf("detail %+v", d)
	}
	// The form of old clients.
	f.want(200, f.request("GET", "/sandboxes/"+s.SandboxID+"-6532622b", ""))
	f.want(400, f.request("GET", "/sandboxes/"+s.SandboxID+"-a-b", ""))

	var list []gen.ListedSandbox
	f.want(200, f.request("GET", "/sandboxes?metadata=a%3Db", "")).decode(t, &list)
	if len(list) != 1 || list[0].SandboxID != s.SandboxID {
		t.Errorf("list %+v", list)
	}
	f.want(200, f.request("GET", "/sandboxes?metadata=a%3Dc", "")).decode(t, &list)
	if len(list) != 0 {
		t.Errorf("list with another label: %+v", list)
	}

	k := f.want(204, f.request("DELETE", "/sandboxes/"+s.SandboxID, ""))
	if k.body != "" {
		t.Errorf("kill answered %q", k.body)
	}
	if f.node.has(id) {
		t.Error("the sandbox runs after an answered kill")
	}
	rec := f.record(id)
	if rec.State != cay.StateEnded || rec.EndReason != cay.EndRequest || rec.EndedAt.IsZero() {
		t.Errorf("record %+v", rec)
	}
	for _, r := range [][2]string{{"DELETE", ""}, {"GET", ""}, {"POST", "/timeout"}, {"POST", "/connect"}, {"POST", "/refreshes"}} {
		body := ""
		if r[1] == "/timeout" || r[1] == "/connect" {
			body = `{"timeout":10}`
		}
		e := f.problem(f.want(404, f.request(r[0], "/sandboxes/"+s.SandboxID+r[1], body)))
		if *e.ErrorCode != string(cay.CodeSandboxNotFound) {
			t.Errorf("%v: %s", r, *e.ErrorCode)
		}
	}
}

func TestCreateDefaults(t *testing.T) {
	f := newFixture(t)
	for _, tt := range []struct {
		path    string
		seconds time.Duration
		secure  bool
	}{{"/sandboxes", 15, false}, {"/v2/sandboxes", 300, true}} {
		var s gen.Sandbox
		f.want(201, f.request("POST", tt.path, `{"templateID":"base"}`)).decode(t, &s)
		rec := f.record(cay.SandboxID(s.SandboxID))
		if got := rec.Deadline.Sub(rec.StartedAt); got != tt.seconds*time.Second {
			t.Errorf("%s: lives %v, want %d s", tt.path, got, tt.seconds)
		}
		if (s.EnvdAccessToken != nil) != tt.secure {
			t.Errorf("%s: access token %v, want secure=%v", tt.path, s.EnvdAccessToken, tt.secure)
		}
		if s.TrafficAccessToken != nil || s.Domain != nil {
			t.Errorf("%s: traffic token or domain in %+v", tt.path, s)
		}
	}
}

func TestTrafficToken(t *testing.T) {
	f := newFixture(t)
	var s gen.Sandbox
	f.want(201, f.request("POST", "/v2/sandboxes", `{"templateID":"base","network":{"allowPublicTraffic":false}}`)).decode(t, &s)
	id := cay.SandboxID(s.SandboxID)
	if s.TrafficAccessToken == nil || *s.TrafficAccessToken != trafficToken(testSeed, id).Reveal() || f.node.configs[id].TrafficToken.Reveal() != *s.TrafficAccessToken {
		t.Errorf("traffic token %v", s.TrafficAccessToken)
	}
	if *s.TrafficAccessToken == *s.EnvdAccessToken {
		t.Error("traffic token and access token are the same")
	}
	f.want(200, f.request("POST", "/v2/sandboxes/"+s.SandboxID+"/connect", "")).decode(t, &s)
	if s.EnvdAccessToken == nil || s.TrafficAccessToken == nil {
		t.Error("connect answers without tokens")
	}
}

func TestInternet(t *testing.T) {
	f := newFixture(t)
	for body, want := range map[string]bool{
		`"allow_internet_access":false`: false,
		`"allow_internet_access":true`:  true,
		`"network":{}`:                  true,
		`"network":{"allowOut":[],"denyOut":[],"allowPublicTraffic":true}`:        true,
		`"network":{"denyOut":["0.0.0.0/0"]}`:                                     false,
		`"network":{"denyOut":["10.0.0.0/8","0.0.0.0/0"]}`:                        false,
		`"network":{"allowOut":["0.0.0.0/0"],"denyOut":["0.0.0.0/0"]}`:            true,
		`"network":{"rules":{}},"mcp":{"x":{"y":1}},"iam":{},"autoPause":false`:   true,
		`"volumeMounts":[],"autoResume":{"enabled":false},"autoPauseMemory":true`: true,
		`"mcp":null,"metadata":{},"envVars":{}`:                                   true,
	} {
		id := f.create(`{"templateID":"base",` + body + `}`)
		if got := f.node.configs[id].Egress.Open(); got != want {
			t.Errorf("%s: internet %v, want %v", body, got, want)
		}
		f.want(204, f.request("DELETE", "/sandboxes/"+string(id), ""))
	}
}

func TestCreateRefusals(t *testing.T) {
	f := newFixture(t)
	for _, tt := range []struct {
		body   string
		status int
		says   string
	}{
		{`{}`, 400, `the field "templateID" is missing`},
		{`{"templateID":5}`, 400, `the field "templateID" is wrong: value must be a string`},
		{`{"templateID":"base","timeout":0}`, 400, `timeout must be at least 1 second`},
		{`{"templateID":"base","timeout":-1}`, 400, `the field "timeout"`},
		{`{"templateID":"base","timeout":1.5}`, 400, `the field "timeout"`},
		{`{"templateID":"base","timeout":99999999999}`, 400, `the field "timeout"`},
		{`{"templateID":"base","timeout":86401}`, 400, `24 hours`},
		{`{"templateID":"base","metadata":{"a":1}}`, 400, `the field "metadata.a"`},
		{`{"templateID":"base","envVars":{"A=B":"1"}}`, 400, `envVars has the name "A=B"`},
		{`{"templateID":"base","envVars":{"A":"\u0000"}}`, 400, `envVars.A`},
		{`{"templateID":"no/such/thing"}`, 400, `template reference`},
		{`{"templateID":"base:11111111-1111-4111-8111-111111111111"}`, 400, `malformed tag`},
		{`{"templateID":""}`, 400, `malformed name`},
		{`{"templateID":"missing"}`, 404, `template 'missing' not found`},
		{`{"templateID":"theirs"}`, 404, `template 'theirs' not found`},
		{`{"templateID":"two/theirs"}`, 404, `template 'two/theirs' not found`},
		{`{"templateID":"base:nope"}`, 404, `template 'base:nope' not found`},
		{`{"templateID":"base","autoPauseMemory":false}`, 400, `autoPauseMemory`},
		{`{"templateID":"base","autoPause":true,"autoPauseMemory":false,"autoResume":{"enabled":true}}`, 400, `autoResume.enabled`},
		{`{"templateID":"base","volumeMounts":[{"name":"v","path":"/data"}]}`, 501, `volumeMounts`},
		{`{"templateID":"base","volumeMounts":[{"name":"v","path":"data"}]}`, 400, `volumeMounts.0.path`},
		{`{"templateID":"base","volumeMounts":[{"name":"v","path":"/data/../x"}]}`, 400, `volumeMounts.0.path`},
		{`{"templateID":"base","volumeMounts":[{"name":"v","path":"/d"},{"name":"w","path":"/d"}]}`, 400, `used twice`},
		{`{"templateID":"base","iam":{"tokens":{"a":{"audience":"x","tokenType":"JWT-SVID"}}}}`, 501, `iam`},
		{`{"templateID":"base","iam":{"tokens":{"a":{"audience":"x","tokenType":"other"}}}}`, 400, `tokenType`},
		{`{"templateID":"base","iam":{"tokens":{"a":{"audience":"","tokenType":"JWT-SVID"}}}}`, 400, `audience`},
		{`{"templateID":"base","network":{"denyOut":["example.com"]}}`, 400, `network.denyOut has "example.com"`},
		{`{"templateID":"base","network":{"allowOut":["example.com"]}}`, 400, `Add 0.0.0.0/0 to network.denyOut`},
		{`{"templateID":"base","network":{"maskRequestHost":"bücher.de"}}`, 400, `network.maskRequestHost is "bücher.de"`},
		{`{"templateID":"base","network":{"maskRequestHost":"a b"}}`, 400, `network.maskRequestHost`},
		{`{"templateID":"base","network":{"maskRequestHost":"a\u000d\u000aX-Evil: 1"}}`, 400, `network.maskRequestHost`},
		{`{"templateID":"base","network":{"httpsPorts":[443,49983]}}`, 400, `network.httpsPorts has 49983`},
		{`{"templateID":"base","network":{"httpsPorts":[0]}}`, 400, `network.httpsPorts`},
		{`{"templateID":"base","network":{"httpsPorts":[65536]}}`, 400, `network.httpsPorts`},
		{`{"templateID":"base","network":{"httpsPorts":["443"]}}`, 400, `network.httpsPorts`},
		{`{"templateID":"base"`, 400, `the request body is not JSON`},
		{`[]`, 400, `object`},
		{``, 400, `the request has no body`},
	} {
		a := f.want(tt.status, f.request("POST", "/v2/sandboxes", tt.body))
		if e := f.problem(a); !strings.Contains(e.Message, tt.says) {
			t.Errorf("%s: %q does not say %q", tt.body, e.Message, tt.says)
		}
	}
	e := f.problem(f.want(400, f.request("POST", "/sandboxes", `{"templateID":"base","network":{"allowPublicTraffic":false}}`)))
	if !strings.Contains(e.Message, "allowPublicTraffic") {
		t.Error(e.Message)
	}
	if len(f.node.configs) != 0 {
		t.Errorf("%d refused creates reached the node", len(f.node.configs))
	}
	// The other team may live an hour.
	f.want(400, f.request("POST", "/sandboxes", `{"templateID":"base","timeout":3601}`, "X-API-Key", f.foreign))
	f.want(201, f.request("POST", "/sandboxes", `{"templateID":"base","timeout":3600}`, "X-API-Key", f.foreign))
}

func TestConcurrencyLimit(t *testing.T) {
	f := newFixture(t)
	f.team.Limits.ConcurrentSandboxes = 2
	if err := f.store.PutTeam(t.Context(), f.team); err != nil {
		t.Fatal(err)
	}
	f.create("")
	id := f.create("")
	a := f.want(429, f.request("POST", "/v2/sandboxes", `{"templateID":"base"}`))
	if e := f.problem(a); *e.ErrorCode != string(cay.CodeTooManySandboxes) {
		t.Errorf("%s", a.body)
	}
	f.want(204, f.request("DELETE", "/sandboxes/"+string(id), ""))
	f.create("")
}

func TestTimeouts(t *testing.T) {
	f := newFixture(t)
	id := f.create(`{"templateID":"base","timeout":1000}`)
	left := func() time.Duration { return time.Until(f.record(id).Deadline).Round(time.Second) }
	node := func() time.Duration { return time.Until(f.node.live[id].Deadline).Round(time.Second) }
	path := "/sandboxes/" + string(id)
	for _, tt := range []struct {
		path, body string
		status     int
		left       time.Duration
	}{
		{path + "/timeout", `{"timeout":500}`, 204, 500},
		{path + "/connect", `{"timeout":100}`, 200, 500}, // only ever later
		{path + "/connect", `{"timeout":600}`, 200, 600},
		{"/v2" + path + "/connect", ``, 200, 600}, // 300 by default
		{"/v2" + path + "/connect", `{}`, 200, 600},
		{"/v2" + path + "/connect", `{"timeout":700,"memory":false}`, 200, 700},
		{path + "/refreshes", `{"duration":800}`, 204, 800},
		{path + "/refreshes", `{}`, 204, 800},
		{path + "/refreshes", ``, 204, 800},
		{path + "/timeout", `{"timeout":5}`, 204, 5},
		{path + "/refreshes", `{"duration":1}`, 204, 15}, // at least 15
		{path + "/refreshes", `{"duration":3601}`, 400, 15},
		{path + "/timeout", `{"timeout":-1}`, 400, 15},
		{path + "/timeout", `{}`, 400, 15},
		{path + "/timeout", ``, 400, 15},
		{path + "/timeout", `{"timeout":86401}`, 400, 15},
		{path + "/connect", `{"timeout":86401}`, 400, 15},
		{path + "/connect", `{}`, 400, 15},
		{path + "/connect", ``, 400, 15},
		{path + "/timeout", `{"timeout":86400}`, 204, 86400},
	} {
		a := f.want(tt.status, f.request("POST", tt.path, tt.body))
		if got := left(); got != tt.left*time.Second {
			t.Errorf("%s %s: %v left, want %d s: %s", tt.path, tt.body, got, tt.left, a.body)
		}
		if got := node(); got != left() {
			t.Errorf("%s %s: the node has %v left, the record %v", tt.path, tt.body, got, left())
		}
	}
	if rec := f.record(id); rec.Deadline.After(rec.StartedAt.Add(24 * time.Hour)) {
		t.Errorf("the deadline %v is beyond the team's limit from %v", rec.Deadline, rec.StartedAt)
	}
}

func TestForeignIsAbsent(t *testing.T) {
	f := newFixture(t)
	id := string(f.create(""))
	absent := string(cay.NewSandboxID())
	normal := func(a answer, id string) string {
		e := f.problem(a)
		return strings.NewReplacer(id, "ID", *e.RequestID, "REQ").Replace(a.body)
	}
	for _, r := range [][3]string{
		{"GET", "/sandboxes/%s", ""}, {"DELETE", "/sandboxes/%s", ""}, {"POST", "/sandboxes/%s/timeout", `{"timeout":1}`},
		{"POST", "/sandboxes/%s/refreshes", ""}, {"POST", "/sandboxes/%s/connect", `{"timeout":1}`}, {"POST", "/v2/sandboxes/%s/connect", ""},
		{"GET", "/sandboxes/%s/logs", ""}, {"GET", "/v2/sandboxes/%s/logs", ""}, {"PUT", "/sandboxes/%s/network", `{}`},
	} {
		theirs := f.want(404, f.request(r[0], fmt.Sprintf(r[1], id), r[2], "X-API-Key", f.foreign))
		nobodys := f.want(404, f.request(r[0], fmt.Sprintf(r[1], absent), r[2], "X-API-Key", f.foreign))
		if d := cmp.Diff(normal(nobodys, absent), normal(theirs, id)); d != "" {
			t.Errorf("%s %s tells a foreign sandbox from an absent one: %s", r[0], r[1], d)
		}
		if a, b := len(theirs.header), len(nobodys.header); a != b {
			t.Errorf("%s %s: %d headers, %d for an absent one", r[0], r[1], a, b)
		}
	}
	if !f.node.has(cay.SandboxID(id)) || f.record(cay.SandboxID(id)).State != cay.StateRunning {
		t.Error("a foreign team changed the sandbox")
	}
}

func TestListV2(t *testing.T) {
	f := newFixture(t)
	var ids []string
	for i := range 7 {
		meta := map[string]string{"n": fmt.Sprint(i), "half": fmt.Sprint(i % 2)}
		if i == 3 {
			meta["a b"] = "c&d=é"
		}
		m, _ := json.Marshal(meta)
		ids = append(ids, string(f.create(fmt.Sprintf(`{"templateID":%q,"metadata":%s}`, []string{"base", "own"}[i%2], m))))
	}
	reversed := make([]string, len(ids))
	for i, id := range ids {
		reversed[len(ids)-1-i] = id
	}
	pages := func(query string) (got []string, totals []string) {
		next := ""
		for {
			a := f.want(200, f.request("GET", "/v2/sandboxes?"+query+next, ""))
			var page []gen.ListedSandbox
			a.decode(t, &page)
			for _, s := range page {
				got = append(got, s.SandboxID)
			}
			totals = append(totals, a.header.Get("X-Total-Running"))
			token := a.header.Get("X-Next-Token")
			if token == "" {
				return got, totals
			}
			next = "&nextToken=" + url.QueryEscape(token)
		}
	}
	// As the JavaScript client sends it: pairs encoded, joined, encoded again
	// by URLSearchParams, and again by the query serialiser.
	encoded := url.QueryEscape(url.QueryEscape(url.PathEscape("a b") + "=" + url.QueryEscape("c&d=é")))
	for _, tt := range []struct {
		query  string
		want   []string
		totals []string
	}{
		{"", reversed, []string{"7"}},
		{"limit=3", reversed, []string{"7", "7", "7"}},
		{"limit=7", reversed, []string{"7"}},
		{"limit=3&order=asc", ids, []string{"7", "7", "7"}},
		{"state=running", reversed, []string{"7"}},
		{"state=running,paused", reversed, []string{"7"}},
		{"state=paused", nil, []string{""}},
		{"metadata=half%3D1&order=asc&limit=2", []string{ids[1], ids[3], ids[5]}, []string{"3", "3"}},
		{"metadata=half%3D1%26n%3D5", []string{ids[5]}, []string{"1"}},
		{"metadata=" + encoded, []string{ids[3]}, []string{"1"}},
		{"template=own&order=asc", []string{ids[1], ids[3], ids[5]}, []string{"3"}},
		{"template=" + string(f.base) + "&order=asc", []string{ids[0], ids[2], ids[4], ids[6]}, []string{"4"}},
		{"template=theirs", nil, []string{"0"}},
		{"startedAfter=" + url.QueryEscape(f.record(cay.SandboxID(ids[4])).StartedAt.Format(time.RFC3339Nano)) + "&order=asc", ids[4:], []string{"3"}},
	} {
		got, totals := pages(tt.query)
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s: %s", tt.query, d)
		}
		if d := cmp.Diff(tt.totals, totals); d != "" {
			t.Errorf("%s: totals: %s", tt.query, d)
		}
	}
	asc := f.request("GET", "/v2/sandboxes?limit=1&order=asc", "").header.Get("X-Next-Token")
	for query, says := range map[string]string{
		"limit=0": "limit", "limit=101": "limit", "limit=x": "limit", "order=up": "order", "state=ended": "state",
		"nextToken=%21": "nextToken", "nextToken=aGFsbG8=": "nextToken", "nextToken=" + asc: "other order",
		"metadata=a": "key=value", "metadata=a%3Db%3Dc": "key=value", "metadata=%2525zz%3D1": "URL encoded",
		"template=base:tag": "tag", "template=a%2Fb%2Fc": "template reference", "startedAfter=yesterday": "startedAfter",
	} {
		if e := f.problem(f.want(400, f.request("GET", "/v2/sandboxes?"+query, ""))); !strings.Contains(e.Message, says) {
			t.Errorf("%s: %q does not say %q", query, e.Message, says)
		}
	}
}

func TestLogs(t *testing.T) { inBubble(t, testLogs) }

func testLogs(t *testing.T, f *fixture) {
	f.node.onCreate = func(context.Context, cay.SandboxConfig) error { time.Sleep(time.Second); return nil }
	id := f.create("")
	at := time.Now().UTC().Add(time.Second)
	f.node.onConsole = func(cay.SandboxID) []cay.ConsoleLine {
		return []cay.ConsoleLine{{At: at, Text: "init: up"}, {At: at.Add(time.Second), Text: "bad \xff byte"}}
	}
	f.node.die(id, cay.EndOOM, "the guest used more memory than its limit")
	defer f.run()()
	synctest.Wait()
	var v1 gen.SandboxLogs
	f.want(200, f.request("GET", "/sandboxes/"+string(id)+"/logs", "")).decode(t, &v1)
	var line struct{ Message, Level, Logger string }
	if err := json.Unmarshal([]byte(v1.Logs[0].Line), &line); err != nil || line.Message != "sandbox created from template base" || line.Logger != "lifecycle" {
		t.Errorf("line %q: %v", v1.Logs[0].Line, err)
	}
	messages := func(query string) (out []string) {
		var v2 gen.SandboxLogsV2Response
		f.want(200, f.request("GET", "/v2/sandboxes/"+string(id)+"/logs?"+query, "")).decode(t, &v2)
		for _, e := range v2.Logs {
			out = append(out, e.Message)
		}
		return out
	}
	ended := "sandbox ended: the guest used more memory than its limit"
	for query, want := range map[string][]string{
		"":                                       {"sandbox created from template base", "sandbox runs", ended, "init: up", "bad \uFFFD byte"},
		"direction=backward":                     {"bad \uFFFD byte", "init: up", ended, "sandbox runs", "sandbox created from template base"},
		"level=error":                            {ended},
		"search=init":                            {"init: up"},
		"limit=1":                                {"sandbox created from template base"},
		"limit=1&direction=backward":             {"bad \uFFFD byte"},
		fmt.Sprintf("cursor=%d", at.UnixMilli()): {"init: up", "bad \uFFFD byte"},
		fmt.Sprintf("cursor=%d&direction=backward&limit=1", at.UnixMilli()): {"init: up"},
	} {
		if d := cmp.Diff(want, messages(query)); d != "" {
			t.Errorf("%q: %s", query, d)
		}
	}
}
