package api

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/operator"
)

func TestDocumentsAreValid(t *testing.T) {
	for name, load := range map[string]func() (*openapi3.T, error){"openapi.yaml": gen.GetSpec, "operator.yaml": operator.GetSpec} {
		doc, err := load()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := doc.Validate(t.Context()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for n, s := range doc.Components.Schemas {
			if len(s.Value.Properties) > 0 && !s.Value.Type.Is("object") {
				t.Errorf("%s: schema %s has properties and no type: object", name, n)
			}
		}
	}
}

// Bodies that satisfy the documents, for the calls that need one.
var goodBody = map[string]string{
	"ImportSnapshot": `x`,
	"CreateSandbox":  `{"templateID":"theirs"}`, "CreateSandboxV2": `{"templateID":"theirs"}`,
	"ConnectSandbox": `{"timeout":1}`, "SetSandboxTimeout": `{"timeout":1}`, "UpdateSandboxNetwork": `{}`, "CreateSnapshot": `{}`,
	"CreateTemplateV3": `{"name":"x"}`, "CreateTemplateV2": `{"alias":"x"}`, "CreateTemplate": `{"dockerfile":"FROM x"}`,
	"RebuildTemplate": `{"dockerfile":"FROM x"}`, "UpdateTemplate": `{"public":true}`, "UpdateTemplateV2": `{"public":true}`,
	"StartTemplateBuildV2": `{"fromImage":"debian","fromImageRegistry":{"type":"registry","username":"u","password":"p"},"steps":[{"type":"RUN","args":["x"],"forceUpload":true}]}`,
	"AssignTemplateTags":   `{"target":"own:a","tags":["b"]}`, "DeleteTemplateTags": `{"name":"own","tags":["b"]}`,
	"SetNodeStatus": `{"status":"draining"}`, "CreateTeamAPIKey": `{"name":"x"}`, "CreateAccessToken": `{"name":"x"}`,
	"CreateAPIKey": `{"name":"x"}`, "UpdateAPIKey": `{"name":"x"}`, "CreateVolume": `{"name":"x"}`,
	"CreateSecret": `{"name":"x","value":"y"}`, "UpdateSecret": `{"value":"y"}`,
	"SetTeamLimits": `{"hours":24}`,
}

// What another team gets where it is not the 404 of an object that the path
// names, nor the 501 of what the build doesn't have.
var foreignStatus = map[string]int{
	"Health": 204, "ListTeams": 200, "ListSandboxes": 200, "ListSandboxesV2": 200, "ListSnapshots": 200,
	"ListTemplates": 200, "ListTemplatesV2": 200, "GetTemplateAlias": 403,
	"CreateSandbox": 404, "CreateSandboxV2": 404, // of this team's private template
	"ListSecrets": 200, "CreateSecret": 201,
}

// Every route of both documents, with no key, a bad key, an unknown key and
// another team's key. A route that is added without an expectation here fails.
func TestEveryRoute(t *testing.T) {
	f := newFixture(t)
	sandbox := string(f.create(`{"templateID":"own"}`))
	theirKeys, err := f.store.ListKeys(t.Context(), f.team.ID)
	if err != nil {
		t.Fatal(err)
	}
	absentOps := []string{"TeamMetrics", "TeamMetricsMax", "ListSandboxMetrics", "SandboxMetrics", "CreateTemplateV3", "CreateTemplateV2", "GetTemplateFiles", "CreateTemplate", "RebuildTemplate", "StartTemplateBuild",
		"StartTemplateBuildV2", "TemplateBuildStatus", "TemplateBuildLogs", "AssignTemplateTags", "DeleteTemplateTags", "SetNodeStatus",
		"CancelTeamBuilds", "CreateAccessToken", "DeleteAccessToken", "ListVolumes", "CreateVolume", "GetVolume", "DeleteVolume"}
	fill := strings.NewReplacer("{sandboxID}", sandbox, "{templateID}", "one%2Fown", "{alias}", "one%2Fown", "{teamID}", string(f.team.ID),
		"{apiKeyID}", string(theirKeys[0].ID), "{buildID}", "aaaaaaaa-0000-4000-8000-000000000001", "{hash}", strings.Repeat("a", 64),
		"{nodeID}", "local", "{accessTokenID}", "x", "{volumeID}", "v", "{secretID}", "s", "{snapshotID}", "s00000000000000000000")
	query := map[string]string{"TeamMetricsMax": "?metric=concurrent_sandboxes", "ListSandboxMetrics": "?sandbox_ids=a,b"}
	n := 0
	for _, load := range []func() (*openapi3.T, error){gen.GetSpec, operator.GetSpec} {
		doc := mustDocument(load())
		for path, item := range doc.Paths.Map() {
			for method, op := range item.Operations() {
				n++
				a := acceptsOf(doc, op)
				id := op.OperationID
				url := fill.Replace(path) + query[id]
				body := strings.ReplaceAll(goodBody[id], "theirs", "one/own")
				if op.RequestBody != nil && op.RequestBody.Value.Required && body == "" {
					t.Errorf("%s needs a body: add one to this test", id)
				}
				for name, headers := range map[string][]string{
					"no credential": {"X-API-Key", ""},
					"malformed key": {"X-API-Key", "x"},
					"unknown key":   {"X-API-Key", "e2b_" + strings.Repeat("9", 40)},
					"wrong token":   {"X-API-Key", "", "X-Admin-Token", "wrong", "X-Team-ID", string(f.team.ID)},
				} {
					want := 401
					if a.anyone() {
						want = 204
					}
					res := f.request(method, url, body, headers...)
					if res.status != want {
						t.Errorf("%s %s with %s: %d, want %d: %s", method, path, name, res.status, want, res.body)
					}
					if want == 401 && f.problem(res).Message == "" {
						t.Errorf("%s %s with %s: no message", method, path, name)
					}
				}
				want, known := foreignStatus[id]
				switch {
				case !a.key && !a.anyone():
					want = 401 // for the operator only
				case slices.Contains(absentOps, id):
					want = 501
				case !known && strings.Contains(path, "{"):
					want = 404
				case !known:
					t.Errorf("%s %s (%s): say in this test what another team gets", method, path, id)
				}
				res := f.request(method, url, body, "X-API-Key", f.foreign)
				if res.status != want {
					t.Errorf("%s %s with another team's key: %d, want %d: %s", method, path, res.status, want, res.body)
				}
				if want == 501 {
					e := f.problem(res)
					if *e.ErrorCode != string(cay.CodeNotImplemented) || !strings.Contains(e.Message, "this build of Cay") || e.Fix == nil {
						t.Errorf("%s %s: %s", method, path, res.body)
					}
				}
				if strings.Contains(res.body, sandbox) && want == 200 {
					t.Errorf("%s %s shows another team's sandbox: %s", method, path, res.body)
				}
			}
		}
	}
	if n < 70 {
		t.Errorf("only %d routes were tried", n)
	}
	if !f.node.has(cay.SandboxID(sandbox)) {
		t.Error("the sandbox did not survive other teams")
	}
}

func TestUnknownPathsAndMethods(t *testing.T) {
	f := newFixture(t)
	for _, tt := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/", 404}, {"GET", "/v9/sandboxes", 404}, {"GET", "/sandboxes/", 404}, {"POST", "/sandboxes/a/b/c", 404}, {"GET", "/%2e%2e/etc", 404},
		{"PATCH", "/sandboxes", 405}, {"PUT", "/v2/sandboxes", 405}, {"POST", "/health", 405}, {"GET", "/sandboxes/x/pause", 405},
	} {
		e := f.problem(f.want(tt.status, f.request(tt.method, tt.path, "")))
		if !strings.Contains(e.Message, "path") {
			t.Errorf("%s %s: %s", tt.method, tt.path, e.Message)
		}
	}
}

func TestRequestIDs(t *testing.T) {
	f := newFixture(t)
	for sent, echoed := range map[string]bool{"abc-1.2_3": true, "": false, "a b": false, strings.Repeat("x", 65): false, "a\nb": false} {
		a := f.request("GET", "/v2/sandboxes", "", "X-Request-ID", sent)
		got := a.header.Get("X-Request-ID")
		if (got == sent) != echoed || got == "" || !echoed && !strings.HasPrefix(got, "req_") {
			t.Errorf("sent %q, got %q", sent, got)
		}
	}
}

func TestCORS(t *testing.T) {
	f := newFixture(t)
	a := f.want(204, f.request("OPTIONS", "/v2/sandboxes", "", "X-API-Key", "", "Origin", "https://a.b",
		"Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "x-api-key"))
	if a.header.Get("Access-Control-Allow-Origin") != "*" || a.header.Get("Access-Control-Allow-Credentials") != "" {
		t.Errorf("headers %v", a.header)
	}
	for _, h := range []string{"X-API-Key", "lang_version", "sdk_runtime", "X-Team-ID"} {
		if !strings.Contains(a.header.Get("Access-Control-Allow-Headers"), h) {
			t.Errorf("header %s is not allowed", h)
		}
	}
	a = f.request("GET", "/v2/sandboxes", "", "Origin", "https://a.b")
	if !strings.Contains(a.header.Get("Access-Control-Expose-Headers"), "X-Next-Token") {
		t.Errorf("headers %v", a.header)
	}
}

func TestBodies(t *testing.T) {
	f := newFixture(t)
	f.want(201, f.request("POST", "/v2/sandboxes", `{"templateID":"base"}`, "Content-Type", ""))
	f.want(201, f.request("POST", "/v2/sandboxes", `{"templateID":"base"}`, "Content-Type", "application/json; charset=utf-8"))
	e := f.problem(f.want(400, f.request("POST", "/v2/sandboxes", `templateID=base`, "Content-Type", "application/x-www-form-urlencoded")))
	if !strings.Contains(e.Message, "application/x-www-form-urlencoded") || !strings.Contains(e.Message, "application/json") {
		t.Error(e.Message)
	}
	big := fmt.Sprintf(`{"templateID":"base","envVars":{"A":%q}}`, strings.Repeat("x", maxBody))
	e = f.problem(f.want(400, f.request("POST", "/v2/sandboxes", big)))
	if !strings.Contains(e.Message, "larger than 4194304 bytes") {
		t.Error(e.Message)
	}
	f.want(201, f.request("POST", "/v2/sandboxes", fmt.Sprintf(`{"templateID":"base","envVars":{"A":%q}}`, strings.Repeat("x", 1<<20))))
	// Hostile shapes are refused, never a 5xx.
	for _, body := range []string{strings.Repeat("[", 100_000), `{"templateID":"base","metadata":` + strings.Repeat(`{"a":`, 10_000) + `1` + strings.Repeat("}", 10_000) + `}`,
		"{\"templateID\":\"\xff\"}", `{"templateID":null}`, `{"templateID":"base","timeout":1e309}`, `{"templateID":"base","timeout":NaN}`, `null`, `"x"`, "\x00"} {
		if a := f.request("POST", "/v2/sandboxes", body); a.status != 400 {
			t.Errorf("%.40q: %d %.200s", body, a.status, a.body)
		}
	}
}

// Over a real connection: HTTP/1.1, a chunked request, empty answers without
// chunks, and a shutdown that lets requests finish and rolls back long ones.
func TestServe(t *testing.T) {
	f := newFixture(t)
	entered, slow := make(chan struct{}), make(chan struct{})
	f.node.onCreate = func(ctx context.Context, _ cay.SandboxConfig) error {
		select {
		case entered <- struct{}{}:
			<-slow
		default:
		}
		return ctx.Err()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- f.s.Serve(ctx, l) }()
	base := "http://" + l.Addr().String()
	do := func(method, path, body string) (*http.Response, string) {
		r, err := http.NewRequestWithContext(t.Context(), method, base+path, chunked{strings.NewReader(body)})
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-API-Key", f.key)
		r.Header.Set("Content-Type", "application/json")
		res, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Errorf("%s %s: %v", method, path, err)
			return nil, ""
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Error(err)
		}
		return res, string(b)
	}
	res, body := do("POST", "/v2/sandboxes", `{"templateID":"base"}`)
	if res.StatusCode != 201 {
		t.Fatal(body)
	}
	if res, _ = do("GET", "/health", ""); res.StatusCode != 204 || len(res.TransferEncoding) != 0 {
		t.Errorf("health %d %v", res.StatusCode, res.TransferEncoding)
	}
	if res, _ = do("PATCH", "/templates/own", `{"public":false}`); res.StatusCode != 200 || res.ContentLength != 0 {
		t.Errorf("a success without a body: %d, length %d", res.StatusCode, res.ContentLength)
	}
	if got := rawStatus(t, l.Addr().String(), "GET /v2/sandboxes HTTP/1.1\r\nHost: x\r\n\r\n"); !strings.Contains(got, "401") {
		t.Errorf("raw request: %q", got)
	}

	finished := make(chan int, 1)
	go func() {
		<-entered
		stop() // while a create is under way
		time.AfterFunc(50*time.Millisecond, func() { close(slow) })
	}()
	go func() {
		res, _ := do("POST", "/v2/sandboxes", `{"templateID":"base"}`)
		finished <- res.StatusCode
	}()
	if got := <-finished; got != 201 {
		t.Errorf("the create that was under way: %d", got)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
		t.Error("the port is open after Serve")
	}
}

func rawStatus(t *testing.T, addr, request string) string {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return line
}

func TestShutdownRollsBack(t *testing.T) {
	f := newFixture(t)
	base, cancel := context.WithCancelCause(t.Context())
	f.node.onCreate = func(ctx context.Context, _ cay.SandboxConfig) error {
		cancel(errShuttingDown)
		<-ctx.Done()
		return context.Cause(ctx)
	}
	f.s.draining.Store(true)
	f.requestCtx(base, "POST", "/v2/sandboxes", `{"templateID":"base"}`)
	for id := range f.node.configs {
		if rec := f.record(id); rec.State != cay.StateEnded || rec.EndMessage != errShuttingDown.Message {
			t.Errorf("record %s %q", rec.State, rec.EndMessage)
		}
	}
	f.want(503, f.request("GET", "/health", ""))
}

func TestStoreFailure(t *testing.T) {
	f := newFixture(t)
	if err := f.store.Close(); err != nil {
		t.Fatal(err)
	}
	a := f.request("GET", "/v2/sandboxes", "")
	if e := f.problem(a); a.status == 404 || a.status == 401 || a.status < 500 {
		t.Errorf("a closed store is answered as %d %s: unknown is never \"not found\"", a.status, e.Message)
	}
}

func FuzzTemplateRef(f *testing.F) {
	for _, s := range []string{"base", "a/b:c", " A ", "a/b/c", ":", "/", "a:b:c", "base:11111111-1111-4111-8111-111111111111"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		ref, err := parseTemplateRef(text)
		if err != nil {
			if cay.CodeOf(err) != cay.CodeInvalidRequest {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		again := ref.Name
		if ref.Namespace != "" {
			again = ref.Namespace + "/" + again
		}
		if ref.Tag != "" {
			again += ":" + ref.Tag
		}
		if got, err := parseTemplateRef(again); err != nil || got != ref {
			t.Errorf("%q is %+v, and %q is %+v, %v", text, ref, again, got, err)
		}
	})
}

func FuzzCursor(f *testing.F) {
	f.Add("", false)
	f.Add("MjAyNi0xMS0yNFQxNTozNDowMFpfX2lhYmM=", false)
	f.Fuzz(func(t *testing.T, token string, ascending bool) {
		c, err := parseCursor(&token, ascending)
		if err != nil {
			if cay.CodeOf(err) != cay.CodeInvalidRequest {
				t.Errorf("%q: %v", token, err)
			}
			return
		}
		if token == "" {
			return
		}
		again := formatCursor(c, ascending)
		if got, err := parseCursor(&again, ascending); err != nil || !got.At.Equal(c.At) || got.ID != c.ID {
			t.Errorf("%q is %+v, written again %+v, %v", token, c, got, err)
		}
		if _, err := parseCursor(&again, !ascending); err == nil {
			t.Errorf("%q is taken in the other order", again)
		}
	})
}

func FuzzMetadata(f *testing.F) {
	for _, s := range []string{"a=b", "a%20b=c%26d&x=", "=", "&", "a=b=c", "%zz=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		m, err := parseMetadata(&text)
		if err != nil && cay.CodeOf(err) != cay.CodeInvalidRequest {
			t.Errorf("%q: %v", text, err)
		}
		if err == nil && text != "" && len(m) == 0 {
			t.Errorf("%q filters nothing", text)
		}
	})
}
