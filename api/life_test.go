package api

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

// inBubble runs a test with a fixture on fake time.
func inBubble(t *testing.T, f func(t *testing.T, f *fixture)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newFixture(t)) })
}

func TestDeadline(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		var ids []cay.SandboxID
		for i := range 5 {
			ids = append(ids, f.create(fmt.Sprintf(`{"templateID":"base","timeout":%d}`, 10+10*i)))
		}
		begin := time.Now()
		// The third gets more time, the fourth less, the fifth is ended now.
		f.want(204, f.request("POST", "/sandboxes/"+string(ids[2])+"/timeout", `{"timeout":100}`))
		f.want(204, f.request("POST", "/sandboxes/"+string(ids[3])+"/timeout", `{"timeout":15}`))
		f.want(204, f.request("POST", "/sandboxes/"+string(ids[4])+"/timeout", `{"timeout":0}`))
		time.Sleep(200 * time.Second)
		for i, after := range []time.Duration{10, 20, 100, 15, 0} {
			rec := f.record(ids[i])
			late := rec.EndedAt.Sub(begin) - after*time.Second
			if rec.State != cay.StateEnded || rec.EndReason != cay.EndTimeout || late < 0 || late > 500*time.Millisecond {
				t.Errorf("sandbox %d: %s, %s, %v late", i, rec.State, rec.EndReason, late)
			}
			if got := f.node.killed(ids[i]); len(got) != 1 || got[0] != cay.EndTimeout {
				t.Errorf("sandbox %d: killed on the node for %v", i, got)
			}
		}
	})
}

func TestDeadlineKillIsRetried(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		tries := 0
		f.node.onKill = func(context.Context, cay.SandboxID, cay.EndReason) error {
			if tries++; tries <= 3 {
				return &cay.Error{Code: cay.CodeEngineUnavailable, Layer: cay.LayerRuntime, Message: "the engine does not answer"}
			}
			return nil
		}
		id := f.create(`{"templateID":"base","timeout":10}`)
		time.Sleep(11 * time.Second)
		if rec := f.record(id); rec.State != cay.StateKilling || rec.EndReason != cay.EndTimeout {
			t.Errorf("while the kill fails: %s, %q", rec.State, rec.EndReason)
		}
		f.want(404, f.request("GET", "/sandboxes/"+string(id), ""))
		time.Sleep(time.Minute)
		if rec := f.record(id); rec.State != cay.StateEnded || f.node.has(id) || tries != 4 {
			t.Errorf("after %d tries: %s, on the node: %v", tries, rec.State, f.node.has(id))
		}
	})
}

func TestRequestedKillIsRetried(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		tries := 0
		f.node.onKill = func(context.Context, cay.SandboxID, cay.EndReason) error {
			if tries++; tries == 1 {
				return &cay.Error{Code: cay.CodeEngineUnavailable, Layer: cay.LayerRuntime, Message: "the engine does not answer", Fix: "wait"}
			}
			return nil
		}
		id := f.create("")
		e := f.problem(f.want(500, f.request("DELETE", "/sandboxes/"+string(id), "")))
		if *e.ErrorCode != string(cay.CodeEngineUnavailable) {
			t.Errorf("the failed kill says %s", *e.ErrorCode)
		}
		time.Sleep(5 * time.Second)
		if rec := f.record(id); rec.State != cay.StateEnded || rec.EndReason != cay.EndRequest || f.node.has(id) {
			t.Errorf("nobody went on with the kill: %s, %s", rec.State, rec.EndReason)
		}
	})
}

// An extension and the deadline race: either the client is told that it counts
// and the sandbox lives, or it is refused.
func TestExtendAtDeadline(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		var kept, refused int
		for i := range 18 {
			id := f.create(`{"templateID":"base","timeout":10}`)
			time.Sleep(10*time.Second + time.Duration(i-9)*time.Microsecond)
			a := f.request("POST", "/sandboxes/"+string(id)+"/connect", `{"timeout":100}`)
			time.Sleep(50 * time.Second)
			alive := f.node.has(id)
			switch {
			case a.status == 200 && alive:
				kept++
				f.want(204, f.request("DELETE", "/sandboxes/"+string(id), ""))
			case (a.status == 404 || a.status == 409) && !alive:
				refused++
			default:
				t.Errorf("connect answered %d and the sandbox lives: %v", a.status, alive)
			}
		}
		if kept == 0 || refused == 0 {
			t.Errorf("kept %d, refused %d: the race was not met", kept, refused)
		}
	})
}

func TestRestartKeepsDeadlines(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		stop := f.run()
		passed := f.create(`{"templateID":"base","timeout":20}`)
		later := f.create(`{"templateID":"base","timeout":100}`)
		begin := time.Now()
		time.Sleep(10 * time.Second)
		stop()
		if !f.node.has(passed) || !f.node.has(later) {
			t.Fatal("stopping the server ended sandboxes")
		}
		time.Sleep(50 * time.Second) // down while the first deadline passes
		f.serve(nil)
		up := time.Now()
		defer f.run()()
		time.Sleep(2 * time.Second)
		rec := f.record(passed)
		if rec.State != cay.StateEnded || rec.EndReason != cay.EndTimeout || rec.EndedAt.Sub(up) > 2*time.Second {
			t.Errorf("the deadline during the down-time: %s %s %v after the start", rec.State, rec.EndReason, rec.EndedAt.Sub(up))
		}
		time.Sleep(100 * time.Second)
		rec = f.record(later)
		if late := rec.EndedAt.Sub(begin) - 100*time.Second; rec.State != cay.StateEnded || late < 0 || late > 500*time.Millisecond {
			t.Errorf("the deadline after the restart: %s, %v late", rec.State, late)
		}
	})
}

func TestReconcile(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		tpl, err := f.store.FindTemplate(t.Context(), f.team.ID, store.TemplateRef{Name: "base"})
		if err != nil {
			t.Fatal(err)
		}
		row := func(state cay.SandboxState, reason cay.EndReason, there bool) cay.SandboxID {
			now := time.Now().UTC().Truncate(time.Microsecond)
			rec := store.Sandbox{ID: cay.NewSandboxID(), Team: f.team.ID, Template: f.base, Build: tpl.Current.ID, State: state, CreatedAt: now, StartedAt: now,
				Resources: cay.Resources{CPUs: 1, MemoryMB: 128, DiskMB: 64}, Deadline: now.Add(time.Hour), MaxDeadline: now.Add(24 * time.Hour), EndReason: reason}
			if state == cay.StateEnded {
				rec.State, rec.EndReason = cay.StateRunning, ""
			}
			if err := f.store.AddSandbox(t.Context(), rec, 100); err != nil {
				t.Fatal(err)
			}
			if state == cay.StateEnded {
				_, err := f.store.UpdateSandbox(t.Context(), rec.ID, func(s *store.Sandbox) error {
					setEnd(s, state, reason, "", now)
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			if there {
				f.node.live[rec.ID] = cay.NodeSandbox{ID: rec.ID, State: cay.StateRunning, StartedAt: now, Deadline: now}
			}
			return rec.ID
		}
		starting, startingThere := row(cay.StateStarting, "", false), row(cay.StateStarting, "", true)
		lost, running := row(cay.StateRunning, "", false), row(cay.StateRunning, "", true)
		oom := row(cay.StateRunning, "", false)
		killing, killingThere := row(cay.StateKilling, cay.EndTimeout, false), row(cay.StateKilling, cay.EndTimeout, true)
		ended := row(cay.StateEnded, cay.EndShutdown, true)
		orphan := cay.NewSandboxID()
		f.node.live[orphan] = cay.NodeSandbox{ID: orphan, StartedAt: time.Now()}
		f.node.die(oom, cay.EndOOM, "") // the node remembers
		time.Sleep(time.Second)

		f.serve(nil)
		verifying := cay.NewSandboxID() // a template's verification, begun by this server
		f.node.live[verifying] = cay.NodeSandbox{ID: verifying, StartedAt: time.Now().Add(time.Millisecond)}
		defer f.run()()
		time.Sleep(2 * time.Second)
		for id, want := range map[cay.SandboxID]cay.EndReason{
			starting: cay.EndStartFailed, startingThere: cay.EndStartFailed, lost: cay.EndNodeLost, oom: cay.EndOOM,
			killing: cay.EndTimeout, killingThere: cay.EndTimeout, ended: cay.EndShutdown,
		} {
			rec := f.record(id)
			if rec.State != cay.StateEnded || rec.EndReason != want || f.node.has(id) {
				t.Errorf("%s: %s, %q, on the node: %v; want ended, %q", id, rec.State, rec.EndReason, f.node.has(id), want)
			}
		}
		if rec := f.record(running); rec.State != cay.StateRunning || !f.node.has(running) {
			t.Errorf("the running sandbox: %s, on the node: %v", rec.State, f.node.has(running))
		}
		if got := f.node.live[running].Deadline; !got.Equal(f.record(running).Deadline) {
			t.Errorf("the node was not told the deadline on record: %v", got)
		}
		if got := f.node.killed(orphan); len(got) != 1 || got[0] != cay.EndOrphan {
			t.Errorf("the orphan was killed for %v", got)
		}
		if !f.node.has(verifying) {
			t.Error("a sandbox that this server started was taken for an orphan")
		}
	})
}

func TestLostWhileRunning(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create(`{"templateID":"base","timeout":3600}`)
		f.node.mu.Lock()
		delete(f.node.live, id) // without a word
		f.node.mu.Unlock()
		time.Sleep(2 * reconcileEvery)
		if rec := f.record(id); rec.State != cay.StateEnded || rec.EndReason != cay.EndNodeLost {
			t.Errorf("%s, %q", rec.State, rec.EndReason)
		}
	})
}

func TestNodeReportsEnd(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create("")
		time.Sleep(time.Second)
		f.node.die(id, cay.EndOOM, "the guest used more memory than its limit")
		f.node.ends <- cay.SandboxEnd{ID: cay.NewSandboxID(), Reason: cay.EndRequest} // nobody's
		synctest.Wait()
		rec := f.record(id)
		if rec.State != cay.StateEnded || rec.EndReason != cay.EndOOM || rec.EndMessage == "" || !rec.EndedAt.Equal(time.Now().Truncate(time.Microsecond)) {
			t.Errorf("record %+v", rec)
		}
		f.want(404, f.request("GET", "/sandboxes/"+string(id), ""))
	})
}

func TestKillDuringStart(t *testing.T) {
	for _, tt := range []struct {
		name     string
		onCreate func(ctx context.Context) error // how the node's start takes the end of its context
	}{
		{"start gives up", func(ctx context.Context) error { <-ctx.Done(); return context.Cause(ctx) }},
		{"start wins", func(ctx context.Context) error { <-ctx.Done(); return nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fixture) {
				defer f.run()()
				f.node.onCreate = func(ctx context.Context, _ cay.SandboxConfig) error { return tt.onCreate(ctx) }
				made := make(chan answer)
				go func() { made <- f.request("POST", "/v2/sandboxes", `{"templateID":"base"}`) }()
				synctest.Wait()
				rows, err := f.store.ListSandboxes(t.Context(), store.SandboxFilter{})
				if err != nil || len(rows) != 1 || rows[0].State != cay.StateStarting {
					t.Fatalf("rows %+v, %v", rows, err)
				}
				id := rows[0].ID
				// Half-made things are not shown.
				f.want(404, f.request("GET", "/sandboxes/"+string(id), ""))
				if a := f.want(200, f.request("GET", "/v2/sandboxes", "")); strings.TrimSpace(a.body) != "[]" {
					t.Errorf("list shows a starting sandbox: %s", a.body)
				}
				f.want(204, f.request("DELETE", "/sandboxes/"+string(id), ""))
				rec := f.record(id)
				if rec.State != cay.StateEnded || rec.EndReason != cay.EndRequest || f.node.has(id) {
					t.Errorf("after the answered kill: %s, %q, on the node: %v", rec.State, rec.EndReason, f.node.has(id))
				}
				e := f.problem(f.want(409, <-made))
				if !strings.HasPrefix(e.Message, "Failed to place sandbox: it was killed while it started") {
					t.Error(e.Message)
				}
			})
		})
	}
}

func TestClientVanishes(t *testing.T) {
	for _, tt := range []struct {
		name string
		deaf bool // the node finishes the start all the same
	}{{"the node gives up", false}, {"the node finishes", true}} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fixture) {
				defer f.run()()
				ctx, leave := context.WithCancel(t.Context())
				f.node.onCreate = func(ctx context.Context, _ cay.SandboxConfig) error {
					<-ctx.Done()
					if tt.deaf {
						return nil
					}
					return ctx.Err()
				}
				done := make(chan struct{})
				go func() {
					defer close(done)
					f.requestCtx(ctx, "POST", "/v2/sandboxes", `{"templateID":"base"}`)
				}()
				synctest.Wait()
				leave()
				<-done
				if n := len(f.node.live); n != 0 {
					t.Errorf("%d sandboxes nobody knows of", n)
				}
				rows, err := f.store.ListSandboxes(t.Context(), store.SandboxFilter{})
				if err != nil || len(rows) != 0 {
					t.Errorf("live rows %+v, %v", rows, err)
				}
				for id := range f.node.configs {
					rec := f.record(id)
					if rec.EndReason != cay.EndStartFailed || !strings.Contains(rec.EndMessage, "the client closed the connection") {
						t.Errorf("ended as %q: %q", rec.EndReason, rec.EndMessage)
					}
				}
			})
		})
	}
}

func TestStartFails(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		for _, tt := range []struct {
			err    error
			status int
			code   cay.Code
			says   string
		}{
			{&cay.Error{Code: cay.CodeCapacity, Layer: cay.LayerPlacement, Message: "no node can take this sandbox: 1 node checked, 1 full", Fix: "kill some"}, 503, cay.CodeCapacity,
				"Failed to place sandbox: no node can take this sandbox: 1 node checked, 1 full. Kill some."},
			{&cay.Error{Code: cay.CodeEnvdUnreachable, Layer: cay.LayerEnvd, Message: "envd did not answer", Fix: "rebuild", Detail: map[string]string{"console": "panic: x"}}, 500, cay.CodeEnvdUnreachable,
				"Failed to place sandbox: envd did not answer; its console ended with: panic: x. Rebuild."},
			{fmt.Errorf("secret detail: %w", errors.New("boom")), 500, cay.CodeInternal, "Failed to place sandbox: something went wrong inside Cay. Look for the request ID"},
			{context.DeadlineExceeded, 504, cay.CodePlacementTimeout, "Failed to place sandbox: it was not ready in time"},
		} {
			var id cay.SandboxID
			f.node.onCreate = func(_ context.Context, c cay.SandboxConfig) error { id = c.ID; return tt.err }
			e := f.problem(f.want(tt.status, f.request("POST", "/sandboxes", `{"templateID":"base"}`)))
			if *e.ErrorCode != string(tt.code) || !strings.HasPrefix(e.Message, tt.says) || strings.Contains(e.Message, "boom") {
				t.Errorf("%s: %q, want %q", *e.ErrorCode, e.Message, tt.says)
			}
			if rec := f.record(id); rec.State != cay.StateEnded || rec.EndReason != cay.EndStartFailed {
				t.Errorf("record %s %q", rec.State, rec.EndReason)
			}
		}
		if n, err := f.store.CountSandboxes(t.Context(), f.team.ID); n != 0 || err != nil {
			t.Errorf("%d live sandboxes count against the limit, %v", n, err)
		}
		if !strings.Contains(f.log.String(), "boom") {
			t.Error("the cause is not in the log")
		}
	})
}

// A start that is slow gives the client its whole time all the same.
func TestTimeoutCountsFromReady(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		f.node.onCreate = func(context.Context, cay.SandboxConfig) error { time.Sleep(20 * time.Second); return nil }
		id := f.create(`{"templateID":"base","timeout":30}`)
		rec := f.record(id)
		if left := time.Until(rec.Deadline); left.Round(time.Second) != 30*time.Second {
			t.Errorf("%v left", left)
		}
		if got := f.node.live[id].Deadline; !got.Equal(rec.Deadline) {
			t.Errorf("the node has %v, the record %v", got, rec.Deadline)
		}
	})
}

func TestConnectWaitsForStart(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		f.node.onCreate = func(context.Context, cay.SandboxConfig) error { time.Sleep(3 * time.Second); return nil }
		go func() { f.request("POST", "/v2/sandboxes", `{"templateID":"base"}`) }()
		time.Sleep(time.Second)
		rows, err := f.store.ListSandboxes(t.Context(), store.SandboxFilter{})
		if err != nil || len(rows) != 1 {
			t.Fatal(rows, err)
		}
		f.want(409, f.request("POST", "/sandboxes/"+string(rows[0].ID)+"/timeout", `{"timeout":60}`))
		f.want(200, f.request("POST", "/v2/sandboxes/"+string(rows[0].ID)+"/connect", ""))
	})
}

func TestClockSteps(t *testing.T) {
	for _, step := range []time.Duration{time.Hour, -time.Hour, 30 * time.Second, -30 * time.Second} {
		t.Run(step.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fixture) {
				var mu sync.Mutex
				var off time.Duration
				f.serve(func() time.Time {
					mu.Lock()
					defer mu.Unlock()
					return time.Now().Add(off)
				})
				defer f.run()()
				begin := time.Now()
				ids := []cay.SandboxID{f.create(`{"templateID":"base","timeout":100}`), f.create(`{"templateID":"base","timeout":200}`)}
				time.Sleep(50 * time.Second)
				mu.Lock()
				off = step
				mu.Unlock()
				// A step of more than a minute is somebody setting the clock, and
				// what a sandbox had left it still has. A smaller one is followed.
				want := []time.Duration{100 * time.Second, 200 * time.Second}
				if step.Abs() <= maxStep {
					want[0], want[1] = want[0]-step, want[1]-step
				}
				time.Sleep(time.Second)
				if step.Abs() > maxStep {
					// Told in the new time, and counting from then.
					f.want(204, f.request("POST", "/sandboxes/"+string(ids[1])+"/timeout", `{"timeout":100}`))
					want[1] = 151 * time.Second
				}
				ended := make([]time.Duration, len(ids))
				for tick := 0; tick < 4000 && (ended[0] == 0 || ended[1] == 0); tick++ {
					time.Sleep(100 * time.Millisecond)
					for i, id := range ids {
						if ended[i] == 0 && !f.node.has(id) {
							ended[i] = time.Since(begin)
						}
					}
				}
				for i := range ids {
					if late := ended[i] - want[i]; late < 0 || late > 600*time.Millisecond {
						t.Errorf("sandbox %d ended after %v, want %v", i, ended[i], want[i])
					}
				}
			})
		})
	}
}

func TestPrune(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		young, old := f.create(""), f.create("")
		for id, ago := range map[cay.SandboxID]time.Duration{young: keepEnded - 90*time.Minute, old: keepEnded + time.Minute} {
			_, err := f.store.UpdateSandbox(t.Context(), id, func(s *store.Sandbox) error {
				setEnd(s, cay.StateEnded, cay.EndRequest, "", time.Now().Add(-ago))
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			f.node.die(id, cay.EndRequest, "")
		}
		kept := func(id cay.SandboxID) bool {
			_, err := f.store.FindSandbox(t.Context(), "", id)
			if err != nil && cay.CodeOf(err) != cay.CodeSandboxNotFound {
				t.Fatal(err)
			}
			return err == nil
		}
		defer f.run()()
		synctest.Wait()
		if kept(old) || !kept(young) {
			t.Errorf("at the start: the old record is kept: %v, the young one: %v", kept(old), kept(young))
		}
		time.Sleep(2*time.Hour + time.Minute)
		if kept(young) {
			t.Error("a record is kept that is older than seven days")
		}
	})
}

// Many clients do everything at once; in the end every sandbox is in exactly
// one recorded state, and record and node agree.
func TestChaos(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		f.node.onCreate = func(ctx context.Context, c cay.SandboxConfig) error {
			select {
			case <-time.After(time.Duration(c.ID[5]%7) * 100 * time.Millisecond):
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		var wg sync.WaitGroup
		for i := range 60 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 37 * time.Millisecond)
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(200+i*13)*time.Millisecond)
				defer cancel()
				if i%3 != 0 {
					ctx = context.Background()
				}
				f.requestCtx(ctx, "POST", "/v2/sandboxes", fmt.Sprintf(`{"templateID":"base","timeout":%d}`, 1+i%4))
				rows, _ := f.store.ListSandboxes(context.Background(), store.SandboxFilter{})
				for j, r := range rows {
					switch (i + j) % 4 {
					case 0:
						f.request("DELETE", "/sandboxes/"+string(r.ID), "")
					case 1:
						f.request("POST", "/sandboxes/"+string(r.ID)+"/connect", `{"timeout":3}`)
					case 2:
						f.request("POST", "/sandboxes/"+string(r.ID)+"/timeout", `{"timeout":1}`)
					}
				}
			})
		}
		wg.Wait()
		time.Sleep(time.Minute)
		f.s.life.mu.Lock()
		defer f.s.life.mu.Unlock()
		f.node.mu.Lock()
		defer f.node.mu.Unlock()
		if len(f.node.live) != 0 || len(f.s.life.due.byID) != 0 || len(f.s.life.tries) != 0 {
			t.Errorf("left over: %d on the node, %d scheduled, %d tries", len(f.node.live), len(f.s.life.due.byID), len(f.s.life.tries))
		}
		for id := range f.node.configs {
			if rec := f.record(id); rec.State != cay.StateEnded || rec.EndReason == "" || rec.EndReason == cay.EndNodeLost {
				t.Errorf("%s: %s, %q", id, rec.State, rec.EndReason)
			}
		}
	})
}

func TestPanicIsAnswered(t *testing.T) {
	f := newFixture(t)
	f.node.onConsole = func(cay.SandboxID) []cay.ConsoleLine { panic("a defect with e2b_secret") }
	id := f.create("")
	e := f.problem(f.want(500, f.request("GET", "/sandboxes/"+string(id)+"/logs", "", "X-Request-ID", "mine-1")))
	if strings.Contains(e.Message, "defect with") || *e.RequestID != "mine-1" {
		t.Error(e.Message)
	}
	if !strings.Contains(f.log.String(), "mine-1") || !strings.Contains(f.log.String(), "a defect with") {
		t.Errorf("the log does not have the panic under the request ID: %s", f.log)
	}
}
