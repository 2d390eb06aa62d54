package api

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/store"
)

// mortal is a store, and the way to the node, as one run of the server has
// them: when the run is over, nothing of it has an effect any more, as after
// kill -9.
type mortal struct {
	store.Store
	dead *atomic.Bool
}

type mortalNode struct {
	*fakeNode
	run mortal
}

func (m mortal) over() error {
	if m.dead.Load() {
		return &cay.Error{Code: cay.CodeStoreUnavailable, Layer: cay.LayerStorage, Message: "the server is dead"}
	}
	return nil
}

func (m mortal) UpdateSandbox(ctx context.Context, id cay.SandboxID, f func(*store.Sandbox) error) (store.Sandbox, error) {
	if err := m.over(); err != nil {
		return store.Sandbox{}, err
	}
	return m.Store.UpdateSandbox(ctx, id, f)
}

func (m mortal) AdmitSandbox(ctx context.Context, id cay.SandboxID, n int, f func(*store.Sandbox) error) (store.Sandbox, error) {
	if err := m.over(); err != nil {
		return store.Sandbox{}, err
	}
	return m.Store.AdmitSandbox(ctx, id, n, f)
}

func (m mortal) AddSnapshot(ctx context.Context, s store.Snapshot) error {
	if err := m.over(); err != nil {
		return err
	}
	return m.Store.AddSnapshot(ctx, s)
}

func (m mortalNode) Create(ctx context.Context, c cay.SandboxConfig) (cay.NodeSandbox, error) {
	if err := m.run.over(); err != nil {
		return cay.NodeSandbox{}, err
	}
	return m.fakeNode.Create(m.of(ctx), c)
}

func (m mortalNode) Kill(ctx context.Context, id cay.SandboxID, r cay.EndReason) error {
	if err := m.run.over(); err != nil {
		return err
	}
	return m.fakeNode.Kill(m.of(ctx), id, r)
}

func (m mortalNode) DeleteSnapshot(ctx context.Context, id cay.SnapshotID) error {
	if err := m.run.over(); err != nil {
		return err
	}
	return m.fakeNode.DeleteSnapshot(ctx, id)
}

// runKey finds the run that a call to the node is of.
type runKey struct{}

func (m mortalNode) of(ctx context.Context) context.Context {
	return context.WithValue(ctx, runKey{}, m.run.dead)
}

// Save ends, as the run it is of, with an error that leaves open how it went.
func (m mortalNode) Save(ctx context.Context, id cay.SandboxID, q cay.SaveRequest) (cay.Snapshot, error) {
	if err := m.run.over(); err != nil {
		return cay.Snapshot{}, err
	}
	s, err := m.fakeNode.Save(m.of(ctx), id, q)
	if m.run.dead.Load() {
		return cay.Snapshot{}, errShuttingDown
	}
	return s, err
}

// Eight clients do what they like with five sandboxes, while calls to the node
// fail, guests die and the server is killed. What a guest was told it has is a
// register: whoever reads it reads the last write, over every pause and resume.
// In the end each sandbox is in a state that agrees with the node, and ended
// only if somebody ended it.
func TestModel(t *testing.T) {
	seeds, ops := 3, 60
	if n, err := strconv.Atoi(os.Getenv("CAY_MODEL_OPS")); err == nil {
		ops = n
	}
	first := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("CAY_MODEL_SEED"), 10, 64); err == nil {
		first, seeds = s, 1
	}
	for i := range seeds {
		seed := first + uint64(i)
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Logf("seed: CAY_MODEL_SEED=%d CAY_MODEL_OPS=%d", seed, ops)
			inBubble(t, func(t *testing.T, f *fixture) { model(t, f, seed, ops) })
		})
	}
}

type modelled struct {
	mu     sync.Mutex // a write or a read of the guest at a time
	id     cay.SandboxID
	value  int
	killed atomic.Bool // a kill was acknowledged
	ended  atomic.Bool // somebody may have ended it
}

func model(t *testing.T, f *fixture, seed uint64, ops int) {
	var rmu sync.Mutex
	rng := rand.New(rand.NewPCG(seed, 1))
	pick := func(n int) int {
		rmu.Lock()
		defer rmu.Unlock()
		return rng.IntN(n)
	}
	var faults atomic.Bool
	// A node dies with its server: what was under way has no effect then.
	fault := func(ctx context.Context, code cay.Code) error {
		time.Sleep(time.Duration(pick(400)) * time.Millisecond)
		if dead, ok := ctx.Value(runKey{}).(*atomic.Bool); ok && dead.Load() {
			return errShuttingDown
		}
		if faults.Load() && pick(8) == 0 {
			return &cay.Error{Code: code, Layer: cay.LayerRuntime, Message: "a fault of the test"}
		}
		return nil
	}
	f.node.onCreate = func(ctx context.Context, _ cay.SandboxConfig) error { return fault(ctx, cay.CodeEngineFailed) }
	f.node.onSave = func(ctx context.Context, _ cay.SandboxID, _ cay.SaveRequest) error {
		return fault(ctx, cay.CodeCheckpointFailed)
	}
	f.node.onKill = func(ctx context.Context, _ cay.SandboxID, _ cay.EndReason) error {
		return fault(ctx, cay.CodeEngineUnavailable)
	}

	// The server can be killed and started again under the clients' feet.
	var handler atomic.Pointer[http.Handler]
	restart := make(chan struct{}, 1) // not a mutex: fake time goes on while it is held
	var dead *atomic.Bool
	var stop func()
	start := func() {
		dead = &atomic.Bool{}
		st := mortal{f.store, dead}
		node := mortalNode{f.node, st}
		f.s = &Server{Store: st, Node: node, Snapshots: node, Pepper: testPepper, Seed: testSeed, AdminToken: testAdmin, Log: f.s.Log}
		h := checked(t, f.s.Handler())
		handler.Store(&h)
		stop = f.run()
	}
	start()
	defer func() {
		stop()
		if t.Failed() {
			t.Logf("CAY_MODEL_SEED=%d; the log:\n%s", seed, f.log.String())
		}
	}()
	f.handler = *handler.Load()
	base := *f
	request := func(method, path, body string) answer {
		g := base
		g.handler = *handler.Load()
		return g.request(method, path, body)
	}

	boxes := make([]*modelled, 5)
	for i := range boxes {
		boxes[i] = &modelled{id: f.create(`{"templateID":"base","timeout":80000,"autoPause":true}`)}
	}
	faults.Store(true)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range ops {
				b := boxes[pick(len(boxes))]
				time.Sleep(time.Duration(pick(200)) * time.Millisecond)
				path := "/sandboxes/" + string(b.id)
				switch n := pick(100); {
				case n < 25:
					request("POST", path+"/pause", [2]string{"", `{"memory":true}`}[n%2])
				case n < 50:
					request("POST", path+"/connect", `{"timeout":70000}`)
				case n < 58:
					request("POST", path+"/snapshots", `{}`)
				case n < 62:
					var out []gen.SandboxForkResult
					if a := request("POST", path+"/fork", `{"count":2,"timeout":1}`); a.status == 201 {
						a.decode(t, &out)
					}
				case n < 66:
					request("POST", path+"/timeout", `{"timeout":1}`)
				case n == 66:
					b.ended.Store(true)
					if request("DELETE", path, "").status == 204 {
						b.killed.Store(true)
					}
				case n == 67 && pick(3) == 0:
					b.ended.Store(true)
					if f.node.has(b.id) {
						f.node.die(b.id, cay.EndOOM, "")
					}
				case n == 68:
					restart <- struct{}{}
					dead.Store(true)
					stop()
					start()
					<-restart
				case n < 85:
					b.mu.Lock()
					v := b.value + 1
					if f.node.write(b.id, v) {
						b.value = v
					}
					b.mu.Unlock()
				default:
					b.mu.Lock()
					if v, ok := f.node.read(b.id); ok && v != b.value {
						t.Errorf("sandbox %s has %d in its memory, and was told %d", b.id, v, b.value)
					}
					b.mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	faults.Store(false)
	time.Sleep(quarantineFor + 5*time.Minute)

	kept := []cay.SnapshotID{}
	for _, b := range boxes {
		rec := f.record(b.id)
		switch rec.State {
		case cay.StateRunning, cay.StatePaused:
			if b.killed.Load() {
				t.Errorf("the kill of %s was acknowledged, and it is %s", b.id, rec.State)
			}
			if runs := rec.State == cay.StateRunning; f.node.has(b.id) != runs {
				t.Errorf("%s is %s, and on the node: %v", b.id, rec.State, !runs)
			}
		case cay.StateEnded:
			if !b.ended.Load() || f.node.has(b.id) {
				t.Errorf("%s ended (%s, %s), and nobody ended it; on the node: %v", b.id, rec.EndReason, rec.EndMessage, f.node.has(b.id))
			}
		default:
			t.Errorf("%s is still %s", b.id, rec.State)
		}
	}
	paused, err := f.store.ListSandboxes(t.Context(), store.SandboxFilter{States: []cay.SandboxState{cay.StatePaused}}) // forks too
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range paused {
		kept = append(kept, s.Snapshot)
	}
	clients, err := f.store.ListSnapshots(t.Context(), store.SnapshotFilter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range clients {
		kept = append(kept, s.ID)
	}
	slices.Sort(kept)
	if got := f.node.snapshotIDs(); !slices.Equal(got, kept) {
		t.Errorf("snapshots on the node: %v\nsnapshots that are owned: %v", got, kept)
	}
	for _, b := range boxes {
		if f.record(b.id).State == cay.StateEnded {
			continue
		}
		if a := request("POST", "/sandboxes/"+string(b.id)+"/connect", `{"timeout":70000}`); a.status >= 300 {
			t.Errorf("the last connect: %d %s", a.status, a.body)
		} else if v, ok := f.node.read(b.id); !ok || v != b.value {
			t.Errorf("in the end sandbox %s has %d (%v) in its memory, and was told %d", b.id, v, ok, b.value)
		}
	}
	if s := f.log.String(); strings.Contains(s, "illegal move") {
		t.Error("an illegal move was tried")
	}
}
