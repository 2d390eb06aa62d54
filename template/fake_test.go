package template

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob/blobtest"
)

// fakeNode runs nothing. It loads the build as a real node would.
type fakeNode struct {
	cay.Node
	blobs    *blobtest.Memory
	failWith error

	mu      sync.Mutex
	live    map[cay.SandboxID]cay.SandboxConfig
	created int
	// sawVisible is set when the build could be seen before it was verified.
	sawVisible bool
}

func (n *fakeNode) Create(ctx context.Context, c cay.SandboxConfig) (cay.NodeSandbox, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, err := LoadCandidate(ctx, n.blobs, c.Build); err != nil {
		return cay.NodeSandbox{}, err
	}
	if _, err := Load(ctx, n.blobs, c.Build); err == nil {
		n.sawVisible = true
	}
	if n.failWith != nil {
		return cay.NodeSandbox{}, n.failWith
	}
	n.created++
	if n.live == nil {
		n.live = map[cay.SandboxID]cay.SandboxConfig{}
	}
	n.live[c.ID] = c
	return cay.NodeSandbox{ID: c.ID, Build: c.Build}, nil
}

func (n *fakeNode) Kill(_ context.Context, id cay.SandboxID, _ cay.EndReason) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.live, id)
	return nil
}

func (n *fakeNode) Console(context.Context, cay.SandboxID) ([]cay.ConsoleLine, error) {
	return []cay.ConsoleLine{{Text: "last words"}}, nil
}

func (n *fakeNode) Info(context.Context) (cay.NodeInfo, error) {
	return cay.NodeInfo{Runtime: "gvisor", RuntimeVersion: "v1"}, nil
}

type fakeProber struct{ err error }

func (p fakeProber) Probe(context.Context, cay.NodeSandbox, cay.Secret) error { return p.err }

type fakeRegistry struct {
	refs map[string]Ref
	fail error
}

func (r *fakeRegistry) Current(_ context.Context, name string) (Ref, error) {
	ref, ok := r.refs[name]
	if !ok {
		return Ref{}, &cay.Error{Code: cay.CodeTemplateNotFound, Layer: cay.LayerTemplate, Message: "no template " + name}
	}
	return ref, nil
}

func (r *fakeRegistry) Publish(_ context.Context, m cay.Manifest) error {
	if r.fail != nil {
		return r.fail
	}
	if r.refs == nil {
		r.refs = map[string]Ref{}
	}
	r.refs[m.Name] = Ref{m.Template, m.Build}
	return nil
}

var errBroken = errors.New("broken")

func elf(s string) []byte { return []byte("\x7fELF" + strings.Repeat(s, 100)) }

type rig struct {
	*Builder
	blobs    *blobtest.Memory
	node     *fakeNode
	registry *fakeRegistry
	events   *[]Event
}

func newRig(t *testing.T) rig {
	t.Helper()
	blobs := &blobtest.Memory{}
	node, reg := &fakeNode{blobs: blobs}, &fakeRegistry{}
	var events []Event
	return rig{blobs: blobs, node: node, registry: reg, events: &events, Builder: &Builder{
		Blobs: blobs, Node: node, Registry: reg, Prober: fakeProber{}, Dir: t.TempDir(),
		Agent:    Agent{Init: elf("init"), Envd: elf("envd"), EnvdVersion: "0.6.13"},
		Progress: func(e Event) { events = append(events, e) },
		Now:      func() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) },
	}}
}

const recipeJSON = `{"name":"base","suite":"bookworm","components":["main"],"mirrors":["http://m/debian"],
"packages":"p","setup":"s","defaults":{"user":"user"},"resources":{"cpus":1,"memoryMB":512,"diskMB":1024}}`

func testRecipe(t *testing.T) Recipe {
	t.Helper()
	r, err := ReadRecipe(fstest.MapFS{
		"r/recipe.json": {Data: []byte(recipeJSON)},
		"r/p":           {Data: []byte("bash\n")},
		"r/s":           {Data: []byte("#!/bin/sh\ntrue\n")},
	}, "r")
	if err != nil {
		t.Fatal(err)
	}
	return r
}
