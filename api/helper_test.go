package api

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/go-chi/chi/v5"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/operator"
	"github.com/cayhq/cay/internal/keyring"
	"github.com/cayhq/cay/store"
	"github.com/cayhq/cay/store/sqlite"
)

// fakeNode is a machine in memory. The hooks, where set, run first.
type fakeNode struct {
	refreshed  []cay.TeamID // whose network limits were put in force
	refreshErr error
	onCreate   func(ctx context.Context, c cay.SandboxConfig) error
	onKill     func(ctx context.Context, id cay.SandboxID, r cay.EndReason) error
	onConsole  func(id cay.SandboxID) []cay.ConsoleLine
	onEgress   func(id cay.SandboxID) error
	now        func() time.Time

	mu       sync.Mutex
	live     map[cay.SandboxID]cay.NodeSandbox
	configs  map[cay.SandboxID]cay.SandboxConfig
	kills    []cay.SandboxEnd
	refusals []cay.EgressRefusal
	starting map[cay.SandboxID]context.CancelCauseFunc
	ends     chan cay.SandboxEnd
	fakeSnapshots
}

func newFakeNode() *fakeNode {
	return &fakeNode{now: time.Now, live: map[cay.SandboxID]cay.NodeSandbox{}, configs: map[cay.SandboxID]cay.SandboxConfig{},
		starting: map[cay.SandboxID]context.CancelCauseFunc{}, ends: make(chan cay.SandboxEnd, 1000), fakeSnapshots: newFakeSnapshots()}
}

func (n *fakeNode) Create(ctx context.Context, c cay.SandboxConfig) (cay.NodeSandbox, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	n.mu.Lock()
	n.configs[c.ID] = c
	n.starting[c.ID] = cancel
	n.mu.Unlock()
	var err error
	if n.onCreate != nil {
		err = n.onCreate(ctx, c)
	}
	if n.afterCreate != nil {
		defer func() {
			if err == nil {
				n.afterCreate()
			}
		}()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.starting, c.ID)
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return cay.NodeSandbox{}, err
	}
	if _, twice := n.live[c.ID]; twice {
		return cay.NodeSandbox{}, &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerPlacement, Message: "exists"}
	}
	how, err := n.from(c)
	if err != nil {
		return cay.NodeSandbox{}, err
	}
	s := cay.NodeSandbox{Restored: how.restored, Degraded: how.degraded, ID: c.ID, ExecutionID: cay.NewExecutionID(), TeamID: c.TeamID, Template: c.Template, Build: c.Build,
		Resources: c.Resources, State: cay.StateRunning, StartedAt: n.now(), Deadline: c.Deadline, EnvdVersion: "0.6.13", Egress: c.Egress,
		Host: cay.SandboxOnHost{Runtime: "fake", Address: "10.0.0.2"}}
	n.live[c.ID] = s
	return s, nil
}

func (n *fakeNode) Kill(ctx context.Context, id cay.SandboxID, reason cay.EndReason) error {
	if n.onKill != nil {
		if err := n.onKill(ctx, id, reason); err != nil {
			return err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if cancel := n.starting[id]; cancel != nil {
		cancel(errKilledInStart)
		return nil
	}
	s, ok := n.live[id]
	if !ok {
		return &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerRuntime, Message: "not here"}
	}
	delete(n.live, id)
	e := cay.SandboxEnd{ID: id, ExecutionID: s.ExecutionID, Reason: reason, At: n.now()}
	n.kills = append(n.kills, e)
	n.ends <- e
	return nil
}

// die ends a sandbox from inside.
func (n *fakeNode) die(id cay.SandboxID, reason cay.EndReason, message string) {
	n.mu.Lock()
	s := n.live[id]
	delete(n.live, id)
	n.mu.Unlock()
	n.ends <- cay.SandboxEnd{ID: id, ExecutionID: s.ExecutionID, Reason: reason, Message: message, At: n.now()}
}

func (n *fakeNode) SetDeadline(_ context.Context, id cay.SandboxID, t time.Time) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	s, ok := n.live[id]
	if !ok {
		return &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerRuntime, Message: "not here"}
	}
	s.Deadline = t
	n.live[id] = s
	return nil
}

func (n *fakeNode) SetEgress(_ context.Context, id cay.SandboxID, e cay.Egress) error {
	if n.onEgress != nil {
		if err := n.onEgress(id); err != nil {
			return err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s, ok := n.live[id]
	if !ok {
		return &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerRuntime, Message: "not here"}
	}
	s.Egress = e
	n.live[id] = s
	c := n.configs[id]
	c.Egress = e
	n.configs[id] = c
	return nil
}

func (n *fakeNode) RefreshTeam(_ context.Context, id cay.TeamID) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refreshed = append(n.refreshed, id)
	return n.refreshErr
}

func (n *fakeNode) EgressLog(_ context.Context, id cay.SandboxID, seq uint64) ([]cay.EgressRefusal, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.live[id]; !ok {
		return nil, &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerRuntime, Message: "not here"}
	}
	var out []cay.EgressRefusal
	for _, r := range n.refusals {
		if r.Seq > seq {
			out = append(out, r)
		}
	}
	return out, nil
}

func (n *fakeNode) Get(_ context.Context, id cay.SandboxID) (cay.NodeSandbox, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s, ok := n.live[id]
	if !ok {
		return s, &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerRuntime, Message: "not here"}
	}
	return s, nil
}

func (n *fakeNode) List(context.Context) ([]cay.NodeSandbox, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Collect(maps.Values(n.live)), nil
}

func (n *fakeNode) Console(_ context.Context, id cay.SandboxID) ([]cay.ConsoleLine, error) {
	if n.onConsole == nil {
		return nil, nil
	}
	return n.onConsole(id), nil
}

func (n *fakeNode) Trace(context.Context, cay.SandboxID) ([]cay.StartStep, error) {
	return []cay.StartStep{{Name: "boot", Layer: cay.LayerRuntime, Took: 1500 * time.Microsecond}}, nil
}

func (n *fakeNode) Watch(ctx context.Context, f func(cay.SandboxEnd)) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-n.ends:
			f(e)
		}
	}
}

func (n *fakeNode) Info(context.Context) (cay.NodeInfo, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return cay.NodeInfo{ID: "local", Version: "test", Runtime: "fake", CPUs: 2, MemoryBytes: 1 << 30, Sandboxes: len(n.live)}, nil
}

func (n *fakeNode) killed(id cay.SandboxID) []cay.EndReason {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []cay.EndReason
	for _, k := range n.kills {
		if k.ID == id {
			out = append(out, k.Reason)
		}
	}
	return out
}

func (n *fakeNode) has(id cay.SandboxID) bool {
	_, err := n.Get(context.Background(), id)
	return err == nil
}

// fixture is a control plane with two teams; team has the templates base
// (public) and own, other has theirs.
type fixture struct {
	t       *testing.T
	s       *Server
	node    *fakeNode
	store   store.Store
	dir     string // of the store and the keys of secrets
	handler http.Handler
	team    cay.Team
	other   cay.Team
	key     string
	foreign string
	base    cay.TemplateID
	theirs  cay.TemplateID
	log     *bytes.Buffer
}

const (
	testAdmin  = "admin-token"
	testPepper = cay.Secret("pepper")
	testSeed   = cay.Secret("seed")
)

// emptyDatabase is the file of a database that has all its tables and no rows:
// to make them takes longer than most tests.
var emptyDatabase = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "cay-api-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "cay.db")
	st := sqlite.New(path)
	if err := errors.Join(st.Open(context.Background()), st.Close()); err != nil {
		return nil, err
	}
	return os.ReadFile(path)
})

func newFixture(t *testing.T) *fixture {
	t.Helper()
	ctx := context.Background()
	dir := t.TempDir()
	empty, err := emptyDatabase()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "cay.db")
	if err := os.WriteFile(path, empty, 0o600); err != nil {
		t.Fatal(err)
	}
	st := sqlite.New(path)
	if err := st.Open(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	f := &fixture{t: t, node: newFakeNode(), store: st, dir: dir, log: &bytes.Buffer{},
		team:  cay.Team{ID: "11111111-1111-4111-8111-111111111111", Name: "One", Slug: "one", Limits: cay.TeamLimits{ConcurrentSandboxes: 20, MaxLengthHours: 24}},
		other: cay.Team{ID: "22222222-2222-4222-8222-222222222222", Name: "Two", Slug: "two", Limits: cay.TeamLimits{ConcurrentSandboxes: 20, MaxLengthHours: 1}},
		key:   "e2b_" + strings.Repeat("1a", 20), foreign: "e2b_" + strings.Repeat("2b", 20)}
	for i, team := range []cay.Team{f.team, f.other} {
		if err := st.PutTeam(ctx, team); err != nil {
			t.Fatal(err)
		}
		key := []string{f.key, f.foreign}[i]
		hash, err := HashKey(testPepper, key)
		if err != nil {
			t.Fatal(err)
		}
		k := store.Key{ID: store.KeyID(strings.Replace(string(team.ID), "-4", "-5", 1)), Team: team.ID, Name: "first", Hash: hash, CreatedAt: time.Now().UTC()}
		k.Prefix, k.Suffix, k.Length = MaskKey(key)
		if err := st.AddKey(ctx, k); err != nil {
			t.Fatal(err)
		}
	}
	f.base = f.publish(f.team, "base", true)
	f.publish(f.team, "own", false)
	f.theirs = f.publish(f.other, "theirs", false)
	f.serve(nil)
	return f
}

func (f *fixture) publish(team cay.Team, name string, public bool) cay.TemplateID {
	f.t.Helper()
	id, err := f.store.PublishBuild(context.Background(), team.ID, public, cay.Manifest{Format: cay.ManifestFormat,
		Build: cay.BuildID("aaaaaaaa-0000-4000-8000-0000000000" + string("0123456789abcdef"[len(name)]) + team.Slug[:1]), Template: cay.NewTemplateID(), Name: name,
		CreatedAt: time.Now().UTC(), EnvdVersion: "0.6.13", Resources: cay.Resources{CPUs: 2, MemoryMB: 512, DiskMB: 1024}})
	if err != nil {
		f.t.Fatal(err)
	}
	return id
}

// serve makes a new server over the same store and node, as a restart does.
func (f *fixture) serve(now func() time.Time) {
	ring, err := keyring.Open(filepath.Join(f.dir, "keys.json"), time.Now)
	if err != nil {
		f.t.Fatal(err)
	}
	f.s = &Server{Store: f.store, Node: f.node, Snapshots: f.node, Sealer: ring, Pepper: testPepper, Seed: testSeed, AdminToken: testAdmin, Now: now,
		Log: slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelWarn}))}
	f.handler = checked(f.t, f.s.Handler())
}

// run starts the background work; the returned function stops it.
func (f *fixture) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.s.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			f.t.Errorf("Run: %v", err)
		}
	}
}

// answer is a response with its body read.
type answer struct {
	status int
	header http.Header
	body   string
}

func (a answer) decode(t *testing.T, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(a.body), into); err != nil {
		t.Fatalf("answer %d %q: %v", a.status, a.body, err)
	}
}

// request makes a request with the team's key, unless headers say otherwise.
func (f *fixture) request(method, path, body string, headers ...string) answer {
	return f.requestCtx(context.Background(), method, path, body, headers...)
}

func (f *fixture) requestCtx(ctx context.Context, method, path, body string, headers ...string) answer {
	var rd io.Reader
	if body != "" {
		rd = chunked{strings.NewReader(body)}
	}
	r := httptest.NewRequestWithContext(ctx, method, path, rd)
	r.Header.Set("X-API-Key", f.key)
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(headers); i += 2 {
		if headers[i+1] == "" {
			r.Header.Del(headers[i])
		} else {
			r.Header.Set(headers[i], headers[i+1])
		}
	}
	w := httptest.NewRecorder()
	f.handler.ServeHTTP(w, r)
	return answer{w.Code, w.Result().Header, w.Body.String()}
}

// chunked hides the length of a body, as the clients do.
type chunked struct{ io.Reader }

func (f *fixture) want(status int, a answer) answer {
	f.t.Helper()
	if a.status != status {
		f.t.Fatalf("status %d, want %d: %s", a.status, status, a.body)
	}
	return a
}

// create makes a sandbox and returns its ID.
func (f *fixture) create(body string) cay.SandboxID {
	f.t.Helper()
	a := f.want(201, f.request("POST", "/v2/sandboxes", cmp.Or(body, `{"templateID":"base"}`)))
	var s gen.Sandbox
	a.decode(f.t, &s)
	return cay.SandboxID(s.SandboxID)
}

func (f *fixture) record(id cay.SandboxID) store.Sandbox {
	f.t.Helper()
	rec, err := f.store.FindSandbox(context.Background(), "", id)
	if err != nil {
		f.t.Fatalf("record of %s: %v", id, err)
	}
	return rec
}

// problem decodes an error body, and checks what every one must have.
func (f *fixture) problem(a answer) gen.Error {
	f.t.Helper()
	var e gen.Error
	a.decode(f.t, &e)
	if int(e.Code) != a.status {
		f.t.Errorf("code %d in an answer of status %d", e.Code, a.status)
	}
	if e.RequestID == nil || *e.RequestID == "" || a.header.Get("X-Request-ID") != *e.RequestID || !strings.Contains(e.Message, "["+*e.RequestID+"]") {
		f.t.Errorf("request ID missing or different: header %q, body %s", a.header.Get("X-Request-ID"), a.body)
	}
	if e.ErrorCode == nil || *e.ErrorCode == "" || e.Layer == nil || *e.Layer == "" {
		f.t.Errorf("error_code or layer missing: %s", a.body)
	}
	return e
}

// checked holds every answer against the documents: an answer that violates
// them fails the test.
func checked(t *testing.T, next http.Handler) http.Handler {
	docs := map[string]*openapi3.T{"": mustDocument(gen.GetSpec()), "/operator": mustDocument(operator.GetSpec())}
	routes := chi.NewRouter()
	for _, doc := range docs {
		for path, item := range doc.Paths.Map() {
			for method := range item.Operations() {
				routes.MethodFunc(method, path, func(http.ResponseWriter, *http.Request) {})
			}
		}
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		defer func() {
			maps.Copy(w.Header(), rec.Header())
			w.WriteHeader(rec.Code)
			_, _ = w.Write(rec.Body.Bytes())
		}()
		if r.Context().Err() != nil {
			return // nobody reads it
		}
		path := r.URL.EscapedPath()
		rctx := chi.NewRouteContext()
		if !routes.Match(rctx, r.Method, path) {
			return
		}
		doc := docs[""]
		if strings.HasPrefix(path, "/operator/") {
			doc = docs["/operator"]
		}
		item := doc.Paths.Value(rctx.RoutePattern())
		in := &openapi3filter.ResponseValidationInput{
			RequestValidationInput: &openapi3filter.RequestValidationInput{Request: r,
				Route: &routers.Route{Spec: doc, Path: rctx.RoutePattern(), PathItem: item, Method: r.Method, Operation: item.GetOperation(r.Method)}},
			Status: rec.Code, Header: rec.Header(), Options: &openapi3filter.Options{IncludeResponseStatus: true}}
		in.SetBodyBytes(rec.Body.Bytes())
		if err := openapi3filter.ValidateResponse(context.Background(), in); err != nil {
			t.Errorf("%s %s answered %d outside its document: %v\nbody: %s", r.Method, r.URL, rec.Code, err, rec.Body)
		}
		if rec.Code >= 400 && rec.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s %s answered %d as %q, want JSON", r.Method, r.URL, rec.Code, rec.Header().Get("Content-Type"))
		}
		if rec.Code == http.StatusNoContent && rec.Body.Len() > 0 {
			t.Errorf("%s %s answered 204 with a body", r.Method, r.URL)
		}
	})
}
