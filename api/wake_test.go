package api

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay"
)

func TestWake(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		make := func(more string) cay.SandboxID {
			id := f.create(`{"templateID":"base","timeout":100` + more + `}`)
			f.node.write(id, 3)
			f.want(204, f.request("POST", sandboxPath(id, "/pause"), ""))
			return id
		}
		const resumes = `,"autoResume":{"enabled":true}`
		access := func(id cay.SandboxID) cay.Secret { return AccessToken(testSeed, id) }
		traffic := func(id cay.SandboxID) cay.Secret { return trafficToken(testSeed, id) }
		signed := func(want cay.Secret) func(cay.Secret) bool { return func(got cay.Secret) bool { return got == want } }
		for _, c := range []struct {
			name, make string
			knock      func(cay.SandboxID) Knock
			want       cay.Code
		}{
			{"a creator who did not ask for it", ``, func(id cay.SandboxID) Knock { return Knock{Envd: true, Token: access(id)} }, cay.CodeSandboxNotFound},
			{"an open port", resumes, func(cay.SandboxID) Knock { return Knock{} }, ""},
			{"a guarded port without a token", resumes + `,"network":{"allowPublicTraffic":false}`, func(cay.SandboxID) Knock { return Knock{} }, cay.CodeForbidden},
			{"a guarded port with the other token", resumes + `,"network":{"allowPublicTraffic":false}`, func(id cay.SandboxID) Knock { return Knock{Token: access(id)} }, cay.CodeForbidden},
			{"a guarded port with its token", resumes + `,"network":{"allowPublicTraffic":false}`, func(id cay.SandboxID) Knock { return Knock{Token: traffic(id)} }, ""},
			{"envd without a token", resumes, func(cay.SandboxID) Knock { return Knock{Envd: true} }, cay.CodeForbidden},
			{"envd with a wrong token", resumes, func(cay.SandboxID) Knock { return Knock{Envd: true, Token: "x"} }, cay.CodeForbidden},
			{"envd with its token", resumes, func(id cay.SandboxID) Knock { return Knock{Envd: true, Token: access(id)} }, ""},
			{"envd with a signature", resumes, func(id cay.SandboxID) Knock { return Knock{Envd: true, Signed: signed(access(id))} }, ""},
			{"envd with a wrong signature", resumes, func(id cay.SandboxID) Knock { return Knock{Envd: true, Signed: signed("x")} }, cay.CodeForbidden},
		} {
			id := make(c.make)
			k := c.knock(id)
			k.Sandbox = id
			err := f.s.Wake(t.Context(), k)
			if cay.CodeOf(err) != c.want {
				t.Errorf("%s: %v, want %q", c.name, err, c.want)
			}
			rec := f.record(id)
			if runs := rec.State == cay.StateRunning; runs != (c.want == "") {
				t.Errorf("%s: %s", c.name, rec.State)
			}
			if c.want == "" && (rec.Deadline.Sub(rec.StartedAt) != 100*time.Second || f.s.Wake(t.Context(), k) != nil) {
				t.Errorf("%s: lives %v", c.name, rec.Deadline.Sub(rec.StartedAt))
			}
		}

		// Without its memory it is not what its clients knew.
		id := f.create(`{"templateID":"base"` + resumes + `}`)
		f.want(204, f.request("POST", sandboxPath(id, "/pause"), `{"memory":false}`))
		for _, id := range []cay.SandboxID{id, "i00000000000000000000"} {
			if err := f.s.Wake(t.Context(), Knock{Sandbox: id}); cay.CodeOf(err) != cay.CodeSandboxNotFound {
				t.Errorf("%v, want not found", err)
			}
		}
		f.want(204, f.request("DELETE", sandboxPath(id, ""), ""))
		if err := f.s.Wake(t.Context(), Knock{Sandbox: id}); cay.CodeOf(err) != cay.CodeSandboxNotFound {
			t.Errorf("of an ended one: %v", err)
		}

		// A team without a place.
		id = make(resumes)
		f.team.Limits.ConcurrentSandboxes = 0
		if err := f.store.PutTeam(t.Context(), f.team); err != nil {
			t.Fatal(err)
		}
		if err := f.s.Wake(t.Context(), Knock{Sandbox: id}); cay.CodeOf(err) != cay.CodeTooManySandboxes || f.record(id).State != cay.StatePaused {
			t.Errorf("%v, %s", err, f.record(id).State)
		}
	})
}

// Many knock, also while the sandbox is still being paused: one resume.
func TestWakeOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		id := f.create(`{"templateID":"base","timeout":1000,"autoResume":{"enabled":true}}`)
		f.node.onSave = func(context.Context, cay.SandboxID, cay.SaveRequest) error { time.Sleep(2 * time.Second); return nil }
		var creates atomic.Int32
		f.node.onCreate = func(context.Context, cay.SandboxConfig) error {
			creates.Add(1)
			time.Sleep(time.Second)
			return nil
		}
		var wg sync.WaitGroup
		wg.Go(func() { f.want(204, f.request("POST", sandboxPath(id, "/pause"), "")) })
		time.Sleep(time.Second)
		for i := range 200 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 9 * time.Millisecond)
				if err := f.s.Wake(t.Context(), Knock{Sandbox: id}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if creates.Load() != 1 {
			t.Errorf("%d resumes", creates.Load())
		}
	})
}

// Nobody waits for ever.
func TestWakeIsBounded(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		id := f.create(`{"templateID":"base","timeout":1000,"autoResume":{"enabled":true}}`)
		f.node.onSave = func(context.Context, cay.SandboxID, cay.SaveRequest) error { time.Sleep(3 * time.Minute); return nil }
		var wg sync.WaitGroup
		wg.Go(func() { f.want(204, f.request("POST", sandboxPath(id, "/pause"), "")) })
		time.Sleep(time.Second)
		began := time.Now()
		err := f.s.Wake(t.Context(), Knock{Sandbox: id})
		if took := time.Since(began); cay.CodeOf(err) != cay.CodeSandboxTransition || took != wakeWait {
			t.Errorf("after %v: %v", took, err)
		}
		e := f.problem(f.want(409, f.request("POST", sandboxPath(id, "/connect"), `{"timeout":9}`)))
		if *e.ErrorCode != string(cay.CodeSandboxTransition) {
			t.Error(fmt.Sprint(e))
		}
		wg.Wait()
	})
}
