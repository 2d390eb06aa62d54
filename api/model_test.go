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
// fail, guests die and the server is killed; a sandbox that has ended is replaced
// by another. The history of each is linearizable against the model: what a
// guest was told it has is a register, over every pause and resume. In the end
// each sandbox is in a state that agrees with the node, and ended only if
// somebody ended it.
func TestModel(t *testing.T) {
	seeds, ops := 2, 800
	if os.Getenv("CAY_NIGHTLY") == "1" {
		ops = 10_000 // the nightly run repeats it
	}
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
			// On a disk it would wait for that most of the time: no power is cut here.
			if _, err := os.Stat("/dev/shm"); err == nil {
				t.Setenv("TMPDIR", "/dev/shm")
			}
			h := &testimony{}
			inBubble(t, func(t *testing.T, f *fixture) { model(t, f, h, seed, ops) })
			h.check(t) // outside: it takes its time
			if t.Failed() {
				t.Logf("again: CAY_MODEL_SEED=%d CAY_MODEL_OPS=%d", seed, ops)
			}
		})
	}
}

const modelClients = 8

type modelled struct {
	id     cay.SandboxID
	killed atomic.Bool // a kill was acknowledged
	ended  atomic.Bool // somebody may have ended it
}

func model(t *testing.T, f *fixture, h *testimony, seed uint64, ops int) {
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
	restart := make(chan struct{}, 1)    // not a mutex: fake time goes on while it is held
	var dead atomic.Pointer[atomic.Bool] // whether the run is over
	var stop func()
	start := func() {
		run := &atomic.Bool{}
		dead.Store(run)
		st := mortal{f.store, run}
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

	var bmu sync.Mutex // not held over a wait
	var all []*modelled
	making := 0 // creates under way
	boxes := make([]*modelled, 5)
	replacing := make([]bool, len(boxes))
	// reap ends what has no client: forks, and sandboxes whose server died before
	// it could answer.
	reap := func() {
		rows, err := f.store.ListSandboxes(t.Context(), store.SandboxFilter{States: []cay.SandboxState{cay.StateRunning, cay.StatePaused}})
		if err != nil {
			t.Error(err)
		}
		for _, r := range rows {
			bmu.Lock()
			mine := making > 0 || slices.ContainsFunc(all, func(b *modelled) bool { return b.id == r.ID })
			bmu.Unlock()
			if !mine {
				request("DELETE", "/sandboxes/"+string(r.ID), "")
			}
		}
	}
	make1 := func() *modelled {
		const wish = `{"templateID":"base","timeout":80000,"autoPause":true}`
		for {
			bmu.Lock()
			making++
			bmu.Unlock()
			a := request("POST", "/v2/sandboxes", wish)
			bmu.Lock()
			making--
			if a.status == 201 {
				var s gen.Sandbox
				a.decode(t, &s)
				b := &modelled{id: cay.SandboxID(s.SandboxID)}
				all = append(all, b)
				bmu.Unlock()
				return b
			}
			bmu.Unlock()
			time.Sleep(time.Second)
			reap()
		}
	}
	for i := range boxes {
		boxes[i] = make1()
	}
	faults.Store(true)
	var wg sync.WaitGroup
	var told atomic.Int64
	for client := range modelClients {
		wg.Go(func() {
			for range ops / modelClients {
				place := pick(len(boxes))
				bmu.Lock()
				b := boxes[place]
				bmu.Unlock()
				time.Sleep(time.Duration(pick(200)) * time.Millisecond)
				path := "/sandboxes/" + string(b.id)
				var last answer
				ask := func(what, method, path, body string) {
					h.do(client, modelCall{box: b.id, what: what}, func() (modelAnswer, bool) {
						run := dead.Load()
						last = request(method, path, body)
						a := modelAnswer{status: last.status, unknown: run.Load()}
						if what == "get" && last.status == 200 {
							var s gen.SandboxDetail
							last.decode(t, &s)
							a.state = string(s.State)
						}
						return a, last.status != 400
					})
				}
				switch n := pick(100); {
				case n < 25:
					ask("pause", "POST", path+"/pause", [2]string{"", `{"memory":true}`}[n%2])
				case n < 48:
					ask("connect", "POST", path+"/connect", `{"timeout":70000}`)
				case n < 55:
					ask("snapshot", "POST", path+"/snapshots", `{}`)
				case n < 58:
					ask("fork", "POST", path+"/fork", `{"count":2,"timeout":1}`)
				case n < 62:
					ask("timeout", "POST", path+"/timeout", `{"timeout":1}`)
				case n == 62:
					b.ended.Store(true)
					ask("kill", "DELETE", path, "")
					if last.status == 204 {
						b.killed.Store(true)
					}
				case n == 63 && pick(3) == 0:
					b.ended.Store(true)
					h.do(client, modelCall{box: b.id, what: "die"}, func() (modelAnswer, bool) {
						if !f.node.has(b.id) {
							return modelAnswer{}, false
						}
						f.node.die(b.id, cay.EndOOM, "")
						return modelAnswer{}, true
					})
				case n == 64:
					restart <- struct{}{}
					dead.Load().Store(true)
					stop()
					start()
					<-restart
				case n < 70:
					ask("get", "GET", path, "")
				case n < 85:
					v := int(told.Add(1))
					h.do(client, modelCall{b.id, "write", v}, func() (modelAnswer, bool) { return modelAnswer{}, f.node.write(b.id, v) })
				default:
					h.do(client, modelCall{box: b.id, what: "read"}, func() (modelAnswer, bool) {
						v, ok := f.node.read(b.id)
						return modelAnswer{value: v}, ok
					})
				}
				if last.status == 404 { // it has ended: another one takes its place
					bmu.Lock()
					mine := boxes[place] == b && !replacing[place]
					replacing[place] = replacing[place] || mine
					bmu.Unlock()
					if mine {
						reap()
						fresh := make1()
						bmu.Lock()
						boxes[place], replacing[place] = fresh, false
						bmu.Unlock()
					}
				}
			}
		})
	}
	wg.Wait()
	faults.Store(false)
	reap()
	time.Sleep(quarantineFor + 5*time.Minute)

	kept := []cay.SnapshotID{}
	for _, b := range all {
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
	for _, b := range all {
		if f.record(b.id).State == cay.StateEnded {
			continue
		}
		h.do(0, modelCall{box: b.id, what: "connect"}, func() (modelAnswer, bool) {
			a := request("POST", "/sandboxes/"+string(b.id)+"/connect", `{"timeout":70000}`)
			if a.status >= 300 {
				t.Errorf("the last connect: %d %s", a.status, a.body)
			}
			return modelAnswer{status: a.status}, true
		})
		h.do(0, modelCall{box: b.id, what: "read"}, func() (modelAnswer, bool) {
			v, ok := f.node.read(b.id)
			if !ok {
				t.Errorf("in the end sandbox %s does not run", b.id)
			}
			return modelAnswer{value: v}, true
		})
	}
	if s := f.log.String(); strings.Contains(s, "illegal move") {
		t.Error("an illegal move was tried")
	}
}
