package api

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/store"
)

func sandboxPath(id cay.SandboxID, what string) string { return "/sandboxes/" + string(id) + what }

// info is what a client is told of a sandbox.
func (f *fixture) info(id cay.SandboxID) gen.SandboxDetail {
	f.t.Helper()
	var d gen.SandboxDetail
	f.want(200, f.request("GET", sandboxPath(id, ""), "")).decode(f.t, &d)
	return d
}

func TestPauseAndConnect(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create(`{"templateID":"base","timeout":100,"metadata":{"a":"b"},"envVars":{"X":"1"}}`)
		first := f.record(id)
		token := f.node.configs[id].AccessToken
		f.node.write(id, 7)
		time.Sleep(30 * time.Second)
		f.want(204, f.request("POST", sandboxPath(id, "/pause"), ""))
		pausedAt := time.Now().UTC()
		if f.node.has(id) {
			t.Error("a paused sandbox runs")
		}
		rec := f.record(id)
		if rec.State != cay.StatePaused || !rec.SnapshotMemory || rec.Execution == "" ||
			!slices.Equal(f.node.snapshotIDs(), []cay.SnapshotID{rec.Snapshot}) {
			t.Errorf("record %+v, snapshots %v", rec, f.node.snapshotIDs())
		}

		// The clock stops, also for longer than a sandbox may live.
		time.Sleep(25 * time.Hour)
		if d := f.info(id); d.State != gen.Paused || !d.EndAt.Equal(pausedAt) || !d.StartedAt.Equal(first.StartedAt) || (*d.Metadata)["a"] != "b" {
			t.Errorf("detail of a paused sandbox: %+v", d)
		}
		for path, status := range map[string]int{"/pause": 409, "/snapshots": 409, "/fork": 409, "/timeout": 409, "/refreshes": 409} {
			body := map[string]string{"/timeout": `{"timeout":1}`, "/snapshots": `{}`}[path]
			if e := f.problem(f.want(status, f.request("POST", sandboxPath(id, path), body))); !strings.Contains(e.Message, "paused") {
				t.Errorf("%s of a paused sandbox says %q", path, e.Message)
			}
			f.want(404, f.request("POST", sandboxPath(id, path), body, "X-API-Key", f.foreign))
		}
		f.want(404, f.request("POST", sandboxPath(id, "/connect"), `{"timeout":1}`, "X-API-Key", f.foreign))
		f.want(400, f.request("POST", sandboxPath(id, "/connect"), `{"timeout":9000000}`))

		var s gen.Sandbox
		f.want(201, f.request("POST", sandboxPath(id, "/connect"), `{"timeout":50}`)).decode(t, &s)
		if s.SandboxID != string(id) || s.EnvdAccessToken == nil || *s.EnvdAccessToken != token.Reveal() {
			t.Errorf("answer of a resume: %+v", s)
		}
		c := f.node.configs[id]
		if c.From != rec.Snapshot || c.Mode != cay.StartAuto || c.EnvVars["X"] != "1" || c.Build != rec.Build || c.Resources != rec.Resources || !c.Egress.Open() {
			t.Errorf("the node was told %+v", c)
		}
		if v, ok := f.node.read(id); !ok || v != 7 {
			t.Errorf("memory after the resume: %d, %v", v, ok)
		}
		again := f.record(id)
		if again.State != cay.StateRunning || again.Execution == rec.Execution || again.Snapshot != "" || !again.PausedAt.IsZero() ||
			time.Until(again.Deadline) != 50*time.Second || time.Until(again.MaxDeadline) != 24*time.Hour {
			t.Errorf("record after the resume: %+v", again)
		}
		synctest.Wait()
		if left := f.node.snapshotIDs(); len(left) > 0 {
			t.Errorf("snapshots after the resume: %v", left)
		}
		f.want(200, f.request("POST", sandboxPath(id, "/connect"), `{"timeout":1}`))
		f.want(409, f.request("POST", sandboxPath(id, "/resume"), ""))
		f.want(409, f.request("POST", sandboxPath(id, "/resume"), `{"timeout":5}`))
		time.Sleep(51 * time.Second)
		if rec := f.record(id); rec.State != cay.StateEnded || rec.EndReason != cay.EndTimeout {
			t.Errorf("after its time: %s, %s", rec.State, rec.EndReason)
		}
	})
}

func TestResumeModes(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		for _, c := range []struct {
			name, pause, path, body string
			unfit                   string
			status                  int
			mode                    cay.StartMode
			memory                  int
			says                    cay.EventType
		}{
			{"auto", ``, "/connect", `{"timeout":9}`, "", 201, cay.StartAuto, 7, cay.EventResumed},
			{"v2 without a body", ``, "v2", ``, "", 201, cay.StartAuto, 7, cay.EventResumed},
			{"cold", ``, "/connect", `{"timeout":9,"memory":false}`, "", 201, cay.StartCold, 0, cay.EventResumed},
			{"resume", ``, "/resume", ``, "", 201, cay.StartAuto, 7, cay.EventResumed},
			{"disk alone", `{"memory":false}`, "/connect", `{"timeout":9}`, "", 201, cay.StartAuto, 0, cay.EventResumed},
			{"memory that is not there", `{"memory":false}`, "/connect", `{"timeout":9,"memory":true}`, "", 409, cay.StartRestore, 0, cay.EventResumeFailed},
			{"degraded", `{"memory":true}`, "/connect", `{"timeout":9}`, "another engine", 201, cay.StartAuto, 0, cay.EventDegraded},
			{"never degraded silently", ``, "/connect", `{"timeout":9,"memory":true}`, "another engine", 409, cay.StartRestore, 0, cay.EventResumeFailed},
		} {
			id := f.create(`{"templateID":"base","timeout":1000}`)
			f.node.write(id, 7)
			f.want(204, f.request("POST", sandboxPath(id, "/pause"), c.pause))
			f.node.unfit = c.unfit
			path := sandboxPath(id, c.path)
			if c.path == "v2" {
				path = "/v2/sandboxes/" + string(id) + "/connect"
			}
			a := f.request("POST", path, c.body)
			f.node.unfit = ""
			if a.status != c.status {
				t.Errorf("%s: %d, want %d: %s", c.name, a.status, c.status, a.body)
				continue
			}
			if got := f.node.configs[id].Mode; got != c.mode {
				t.Errorf("%s: the node was asked for %s, want %s", c.name, got, c.mode)
			}
			rec := f.record(id)
			if h := rec.History; len(h) == 0 || h[len(h)-1].Type != c.says {
				t.Errorf("%s: history %+v, want %s at its end", c.name, h, c.says)
			}
			var logs gen.SandboxLogsV2Response
			f.want(200, f.request("GET", "/v2/sandboxes/"+string(id)+"/logs?search=sandbox", "")).decode(t, &logs)
			if !slices.ContainsFunc(logs.Logs, func(e gen.SandboxLogEntry) bool { return e.Fields["event"] != "" }) {
				t.Errorf("%s: the logs do not tell of the pause: %+v", c.name, logs)
			}
			if c.status == 409 {
				if rec.State != cay.StatePaused || rec.Snapshot == "" || len(f.node.snapshotIDs()) != 1 {
					t.Errorf("%s: after a failed resume: %+v", c.name, rec)
				}
			} else if v, ok := f.node.read(id); !ok || v != c.memory {
				t.Errorf("%s: memory %d, %v, want %d", c.name, v, ok, c.memory)
			}
			f.want(204, f.request("DELETE", sandboxPath(id, ""), ""))
			synctest.Wait()
			if left := f.node.snapshotIDs(); len(left) > 0 {
				t.Fatalf("%s: snapshots left: %v", c.name, left)
			}
			f.want(404, f.request("GET", sandboxPath(id, ""), ""))
		}
	})
}

// Many connect at once: one resumes, all get the sandbox.
func TestConnectsResumeOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		id := f.create("")
		f.want(204, f.request("POST", sandboxPath(id, "/pause"), ""))
		var creates atomic.Int32
		f.node.onCreate = func(context.Context, cay.SandboxConfig) error {
			creates.Add(1)
			time.Sleep(3 * time.Second)
			return nil
		}
		var made, ran atomic.Int32
		var wg sync.WaitGroup
		for i := range 40 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 50 * time.Millisecond)
				switch a := f.request("POST", sandboxPath(id, "/connect"), `{"timeout":100}`); a.status {
				case 201:
					made.Add(1)
				case 200:
					ran.Add(1)
				default:
					t.Errorf("connect: %d %s", a.status, a.body)
				}
			})
		}
		wg.Wait()
		if creates.Load() != 1 || made.Load() != 1 || ran.Load() != 39 {
			t.Errorf("%d resumes, %d answers 201, %d answers 200", creates.Load(), made.Load(), ran.Load())
		}
	})
}

func TestFailedPauseRunsOn(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create(`{"templateID":"base","timeout":100}`)
		before := f.record(id)
		f.node.onSave = func(context.Context, cay.SandboxID, cay.SaveRequest) error {
			if s := f.record(id).State; s != cay.StatePausing {
				t.Errorf("the node is asked while the record says %s", s)
			}
			return &cay.Error{Code: cay.CodeDiskFull, Layer: cay.LayerStorage, Message: "no room is left"}
		}
		e := f.problem(f.want(507, f.request("POST", sandboxPath(id, "/pause"), "")))
		if !strings.Contains(e.Message, "no room") {
			t.Errorf("says %q", e.Message)
		}
		after := f.record(id)
		if d := gocmp.Diff(before, after, gocmp.FilterPath(func(p gocmp.Path) bool { return p.Last().String() == ".History" }, gocmp.Ignore())); d != "" {
			t.Errorf("the record changed:\n%s", d)
		}
		if h := after.History; len(h) != 1 || h[0].Type != cay.EventPauseFailed || !strings.Contains(h[0].Message, "no room") {
			t.Errorf("history %+v", h)
		}
		time.Sleep(101 * time.Second)
		if rec := f.record(id); rec.EndReason != cay.EndTimeout {
			t.Errorf("after its time: %s, %s", rec.State, rec.EndReason)
		}
	})
}

// What a client says of how to save reaches the node.
func TestHowToSave(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create(`{"templateID":"base","timeout":100}`)
		for _, c := range []struct {
			path, body string
			want       cay.SaveRequest
		}{
			{"/snapshots", `{}`, cay.SaveRequest{Memory: true}},
			{"/snapshots", `{"memory":true}`, cay.SaveRequest{Memory: true}},
			{"/snapshots", `{"memory":false}`, cay.SaveRequest{}},
			{"/fork", ``, cay.SaveRequest{Memory: true, Transient: true}},
			{"/pause", ``, cay.SaveRequest{Memory: true, Pause: true}},
			{"/pause", `{"memory":false}`, cay.SaveRequest{Pause: true}},
			{"/pause", `{"requireHealthyGuest":true}`, cay.SaveRequest{Memory: true, Pause: true, Healthy: true}},
		} {
			var got cay.SaveRequest
			f.node.onSave = func(_ context.Context, _ cay.SandboxID, q cay.SaveRequest) error {
				got = q
				return &cay.Error{Code: cay.CodeGuestUnresponsive, Layer: cay.LayerEnvd, Message: "the daemon in the guest does not answer"}
			}
			e := f.problem(f.want(503, f.request("POST", sandboxPath(id, c.path), c.body)))
			if got.Snapshot = ""; got != c.want || *e.ErrorCode != string(cay.CodeGuestUnresponsive) {
				t.Errorf("POST %s %s: the node was asked for %+v, want %+v; code %s", c.path, c.body, got, c.want, *e.ErrorCode)
			}
		}
		if s := f.record(id).State; s != cay.StateRunning {
			t.Errorf("after all that failed the sandbox is %s", s)
		}
	})
}

func TestGuestDiesWhilePausing(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create("")
		f.node.onSave = func(context.Context, cay.SandboxID, cay.SaveRequest) error {
			f.node.die(id, cay.EndOOM, "out of memory")
			synctest.Wait()
			return &cay.Error{Code: cay.CodeGuestExited, Layer: cay.LayerGuest, Message: "it ended"}
		}
		f.want(500, f.request("POST", sandboxPath(id, "/pause"), ""))
		if rec := f.record(id); rec.State != cay.StateEnded || rec.EndReason != cay.EndOOM {
			t.Errorf("%s, %s", rec.State, rec.EndReason)
		}
	})
}

func TestAutoPause(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		var busy atomic.Bool // the first three tries fail
		var tries atomic.Int64
		f.node.onSave = func(context.Context, cay.SandboxID, cay.SaveRequest) error {
			if busy.Load() && tries.Add(1) < 4 {
				return &cay.Error{Code: cay.CodeCheckpointFailed, Layer: cay.LayerRuntime, Message: "the guest is busy"}
			}
			return nil
		}
		defer f.run()()
		id := f.create(`{"templateID":"base","timeout":10,"autoPause":true,"autoResume":{"enabled":true}}`)
		disk := f.create(`{"templateID":"base","timeout":10,"autoPause":true,"autoPauseMemory":false}`)
		if l := f.info(id).Lifecycle; l.OnTimeout != gen.Pause || !l.AutoResume {
			t.Errorf("lifecycle %+v", l)
		}
		// Nobody can say "later" when it is too late, nor is anybody early.
		time.Sleep(10*time.Second - time.Millisecond)
		if rec := f.record(id); rec.State != cay.StateRunning {
			t.Errorf("early: %s", rec.State)
		}
		time.Sleep(500 * time.Millisecond)
		for _, id := range []cay.SandboxID{id, disk} {
			if rec := f.record(id); rec.State != cay.StatePaused || rec.SnapshotMemory != (id != disk) {
				t.Errorf("at its deadline: %s, memory %v", rec.State, rec.SnapshotMemory)
			}
		}

		// While it cannot be paused it runs on.
		f.want(201, f.request("POST", sandboxPath(id, "/connect"), `{"timeout":10}`))
		busy.Store(true)
		time.Sleep(10*time.Second + 500*time.Millisecond)
		if rec := f.record(id); rec.State != cay.StateRunning || tries.Load() == 0 || !f.node.has(id) {
			t.Errorf("after a pause that failed: %s, %d tries", rec.State, tries.Load())
		}
		time.Sleep(20 * time.Second)
		if rec := f.record(id); rec.State != cay.StatePaused || tries.Load() != 4 {
			t.Errorf("after a pause that worked: %s, %d tries", rec.State, tries.Load())
		}
	})
}

func TestKillPaused(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create("")
		f.want(204, f.request("POST", sandboxPath(id, "/pause"), ""))
		f.want(404, f.request("DELETE", sandboxPath(id, ""), "", "X-API-Key", f.foreign))
		f.want(204, f.request("DELETE", sandboxPath(id, ""), ""))
		if rec := f.record(id); rec.State != cay.StateEnded || rec.EndReason != cay.EndRequest || len(f.node.snapshotIDs()) > 0 {
			t.Errorf("%+v, snapshots %v", rec, f.node.snapshotIDs())
		}
		f.want(404, f.request("DELETE", sandboxPath(id, ""), ""))
		f.want(404, f.request("POST", sandboxPath(id, "/connect"), `{"timeout":9}`))

		// In the middle of a pause, of a resume and of a snapshot.
		for name, c := range map[string]struct{ paused bool }{"/pause": {}, "/connect": {paused: true}, "/snapshots": {}} {
			id := f.create("")
			if c.paused {
				f.want(204, f.request("POST", sandboxPath(id, "/pause"), ""))
			}
			hold := make(chan struct{})
			f.node.saved = func(cay.SandboxID, cay.SaveRequest) error { <-hold; return nil }
			f.node.onCreate = func(ctx context.Context, _ cay.SandboxConfig) error { <-ctx.Done(); <-hold; return context.Cause(ctx) }
			var wg sync.WaitGroup
			var got answer
			wg.Go(func() {
				got = f.request("POST", sandboxPath(id, name), map[string]string{"/connect": `{"timeout":9}`, "/snapshots": `{}`}[name])
			})
			synctest.Wait()
			wg.Go(func() { f.want(204, f.request("DELETE", sandboxPath(id, ""), "")) })
			synctest.Wait()
			close(hold)
			wg.Wait()
			f.node.saved, f.node.onCreate = nil, nil
			if rec := f.record(id); rec.State != cay.StateEnded || f.node.has(id) {
				t.Errorf("%s and a kill: %s", name, rec.State)
			}
			if name == "/snapshots" {
				if got.status != 201 || len(f.node.snapshotIDs()) != 1 {
					t.Errorf("a snapshot that was whole before the kill: %d %s, %v", got.status, got.body, f.node.snapshotIDs())
				}
				var n gen.SnapshotInfo
				got.decode(t, &n)
				f.want(204, f.request("DELETE", "/templates/"+n.SnapshotID, ""))
			} else if got.status < 400 {
				t.Errorf("%s that a kill ended: %d %s", name, got.status, got.body)
			}
			if left := f.node.snapshotIDs(); len(left) > 0 {
				t.Errorf("%s and a kill: snapshots left: %v", name, left)
			}
		}
	})
}

// A report of an earlier run, however late, does nothing to the next.
func TestLateEndOfAnEarlierRun(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create("")
		old := f.record(id).Execution
		f.want(204, f.request("POST", sandboxPath(id, "/pause"), ""))
		snap := f.record(id).Snapshot
		for _, e := range []cay.SandboxEnd{{Reason: cay.EndPaused, Snapshot: snap}, {Reason: cay.EndEngineCrash}, {Reason: cay.EndOOM}} {
			e.ID, e.ExecutionID, e.At = id, old, time.Now()
			f.node.ends <- e
			synctest.Wait()
			if rec := f.record(id); rec.State != cay.StatePaused {
				t.Fatalf("%s of a run that is over: %s", e.Reason, rec.State)
			}
		}
		f.node.onCreate = func(context.Context, cay.SandboxConfig) error {
			f.node.ends <- cay.SandboxEnd{ID: id, ExecutionID: old, Reason: cay.EndPaused, Snapshot: snap, At: time.Now()}
			time.Sleep(time.Second)
			return nil
		}
		f.want(201, f.request("POST", sandboxPath(id, "/connect"), `{"timeout":100}`))
		for _, r := range []cay.EndReason{cay.EndPaused, cay.EndEngineCrash} {
			f.node.ends <- cay.SandboxEnd{ID: id, ExecutionID: old, Reason: r, Snapshot: snap, At: time.Now()}
		}
		synctest.Wait()
		if rec := f.record(id); rec.State != cay.StateRunning {
			t.Errorf("after late reports: %s", rec.State)
		}
		// The present run's counts.
		f.node.die(id, cay.EndOOM, "")
		synctest.Wait()
		if rec := f.record(id); rec.State != cay.StateEnded || rec.EndReason != cay.EndOOM {
			t.Errorf("after the end of this run: %s, %s", rec.State, rec.EndReason)
		}
	})
}

// A guest that dies before its resume is on record leaves the sandbox paused.
func TestEarlyEndOfAResume(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create("")
		f.want(204, f.request("POST", sandboxPath(id, "/pause"), ""))
		f.node.afterCreate = func() {
			f.node.die(id, cay.EndEngineCrash, "")
			synctest.Wait()
		}
		e := f.problem(f.want(500, f.request("POST", sandboxPath(id, "/connect"), `{"timeout":100}`)))
		if !strings.Contains(e.Message, "snapshot is as it was") {
			t.Errorf("says %q", e.Message)
		}
		f.node.afterCreate = nil
		if rec := f.record(id); rec.State != cay.StatePaused {
			t.Errorf("%s", rec.State)
		}
		f.want(201, f.request("POST", sandboxPath(id, "/connect"), `{"timeout":100}`))
	})
}

func TestPausedTakesNoPlace(t *testing.T) {
	f := newFixture(t)
	f.team.Limits.ConcurrentSandboxes = 2
	if err := f.store.PutTeam(t.Context(), f.team); err != nil {
		t.Fatal(err)
	}
	a, b := f.create(""), f.create("")
	f.want(429, f.request("POST", "/v2/sandboxes", `{"templateID":"base"}`))
	f.want(204, f.request("POST", sandboxPath(a, "/pause"), ""))
	c := f.create("")
	e := f.problem(f.want(429, f.request("POST", sandboxPath(a, "/connect"), `{"timeout":9}`)))
	if !strings.Contains(e.Message, "limit is 2") || f.record(a).State != cay.StatePaused {
		t.Errorf("%s, says %q", f.record(a).State, e.Message)
	}
	f.want(204, f.request("POST", sandboxPath(b, "/pause"), ""))
	f.want(201, f.request("POST", sandboxPath(a, "/connect"), `{"timeout":9}`))
	f.want(400, f.request("POST", sandboxPath(c, "/fork"), `{"count":2}`))
}

func TestListPaused(t *testing.T) {
	f := newFixture(t)
	var ids []string
	for i := range 4 {
		id := f.create(fmt.Sprintf(`{"templateID":"base","metadata":{"n":"%d"}}`, i))
		ids = append(ids, string(id))
		if i%2 == 0 {
			f.want(204, f.request("POST", sandboxPath(id, "/pause"), ""))
		}
	}
	for query, want := range map[string][]string{
		"": {ids[3], ids[2], ids[1], ids[0]}, "state=paused": {ids[2], ids[0]}, "state=running": {ids[3], ids[1]},
		"state=running,paused": {ids[3], ids[2], ids[1], ids[0]}, "state=paused&order=asc": {ids[0], ids[2]},
		"state=paused&metadata=n%3D2": {ids[2]}, "state=paused&limit=1": {ids[2]},
	} {
		a := f.want(200, f.request("GET", "/v2/sandboxes?"+query, ""))
		var got []gen.ListedSandbox
		a.decode(t, &got)
		var seen []string
		for _, s := range got {
			seen = append(seen, s.SandboxID)
			if paused := slices.Index(ids, s.SandboxID)%2 == 0; (s.State == gen.Paused) != paused {
				t.Errorf("%q: %s is %s", query, s.SandboxID, s.State)
			}
		}
		if d := gocmp.Diff(want, seen); d != "" {
			t.Errorf("%q: %s", query, d)
		}
		total := "2"
		if strings.HasPrefix(query, "state=paused") {
			total = ""
		}
		if got := a.header.Get("X-Total-Running"); got != total {
			t.Errorf("%q: X-Total-Running %q, want %q", query, got, total)
		}
	}
	var v1 []gen.ListedSandbox
	f.want(200, f.request("GET", "/sandboxes", "")).decode(t, &v1)
	if len(v1) != 2 {
		t.Errorf("the old list has %d sandboxes, want the 2 that run", len(v1))
	}
	f.want(400, f.request("DELETE", "/templates/"+string(f.base), ""))
}

func TestSnapshots(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create(`{"templateID":"base","timeout":1000}`)
		deadline := f.record(id).Deadline
		make := func(body string) gen.SnapshotInfo {
			t.Helper()
			var n gen.SnapshotInfo
			f.want(201, f.request("POST", sandboxPath(id, "/snapshots"), body)).decode(t, &n)
			time.Sleep(time.Second)
			return n
		}
		f.node.write(id, 1)
		one := make(`{}`)
		f.node.write(id, 2)
		two := make(`{"name":"mine"}`)
		f.node.write(id, 3)
		three := make(`{"name":"one/Mine:v3"}`)
		if len(one.Names) != 0 || !strings.HasSuffix(one.SnapshotID, ":default") || two.SnapshotID != "one/mine:default" || three.SnapshotID != "one/mine:v3" {
			t.Errorf("%+v, %+v, %+v", one, two, three)
		}
		if rec := f.record(id); rec.State != cay.StateRunning || !rec.Deadline.Equal(deadline) || rec.Snapshot != "" {
			t.Errorf("the source: %+v", rec)
		}
		for body, status := range map[string]int{`{"name":"two/x"}`: 400, `{"name":"a b"}`: 400, `{"name":"own"}`: 400, `{"name":"base:x"}`: 400} {
			f.want(status, f.request("POST", sandboxPath(id, "/snapshots"), body))
		}
		for query, want := range map[string][]string{
			"": {"one/mine:v3", "one/mine:default", one.SnapshotID}, "name=mine": {"one/mine:v3", "one/mine:default"},
			"name=one%2Fmine:v3": {"one/mine:v3"}, "name=two%2Fmine": nil, "sandboxID=" + string(id) + "&limit=1": {"one/mine:v3"}, "sandboxID=i0": nil,
		} {
			var got []gen.SnapshotInfo
			f.want(200, f.request("GET", "/snapshots?"+query, "")).decode(t, &got)
			var names []string
			for _, n := range got {
				names = append(names, n.SnapshotID)
			}
			if d := gocmp.Diff(want, names); d != "" {
				t.Errorf("%q: %s", query, d)
			}
		}
		page := f.want(200, f.request("GET", "/snapshots?limit=2", ""))
		var rest []gen.SnapshotInfo
		f.want(200, f.request("GET", "/snapshots?limit=2&nextToken="+page.header.Get("X-Next-Token"), "")).decode(t, &rest)
		if len(rest) != 1 || rest[0].SnapshotID != one.SnapshotID {
			t.Errorf("second page: %+v", rest)
		}

		// The source's end is not the snapshots'.
		f.want(204, f.request("DELETE", sandboxPath(id, ""), ""))
		for ref, memory := range map[string]int{one.SnapshotID: 1, strings.TrimSuffix(one.SnapshotID, ":default"): 1, "mine": 2, "one/mine:v3": 3, "MINE:v3": 3} {
			made := f.create(fmt.Sprintf(`{"templateID":%q,"metadata":{"x":"y"}}`, ref))
			if v, ok := f.node.read(made); !ok || v != memory {
				t.Errorf("%s: memory %d, %v, want %d", ref, v, ok, memory)
			}
			rec := f.record(made)
			if rec.Parent != id || rec.Origin == "" || rec.Template != f.base || f.node.configs[made].AccessToken != AccessToken(testSeed, made) {
				t.Errorf("%s: %+v", ref, rec)
			}
		}
		for _, ref := range []string{"mine:v9", "two/mine", one.SnapshotID[:10]} {
			f.want(404, f.request("POST", "/v2/sandboxes", fmt.Sprintf(`{"templateID":%q}`, ref)))
		}
		f.want(404, f.request("POST", "/v2/sandboxes", `{"templateID":"one/mine:v3"}`, "X-API-Key", f.foreign))
		f.want(404, f.request("DELETE", "/templates/one%2Fmine:v3", "", "X-API-Key", f.foreign))
		f.want(204, f.request("DELETE", "/templates/one%2Fmine%3Av3", ""))
		f.want(404, f.request("DELETE", "/templates/one%2Fmine:v3", ""))
		f.want(204, f.request("DELETE", "/templates/"+one.SnapshotID, ""))
		f.want(204, f.request("DELETE", "/templates/mine", ""))
		if left := f.node.snapshotIDs(); len(left) > 0 {
			t.Errorf("snapshots left: %v", left)
		}
	})
}

func TestFailedSnapshotIsInvisible(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create("")
		f.node.onSave = func(context.Context, cay.SandboxID, cay.SaveRequest) error {
			return &cay.Error{Code: cay.CodeCheckpointFailed, Layer: cay.LayerRuntime, Message: "no"}
		}
		f.want(500, f.request("POST", sandboxPath(id, "/snapshots"), `{"name":"mine"}`))
		f.want(500, f.request("POST", sandboxPath(id, "/fork"), ``))
		var got []gen.SnapshotInfo
		f.want(200, f.request("GET", "/snapshots", "")).decode(t, &got)
		if rec := f.record(id); rec.State != cay.StateRunning || rec.Snapshot != "" || len(got) > 0 {
			t.Errorf("%+v, %+v", rec, got)
		}
	})
}

func TestFork(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create(`{"templateID":"base","timeout":1000,"metadata":{"a":"b"},"envVars":{"X":"1"}}`)
		source := f.record(id)
		f.node.write(id, 9)
		n := atomic.Int32{}
		f.node.onCreate = func(context.Context, cay.SandboxConfig) error {
			time.Sleep(100 * time.Millisecond)
			if n.Add(1) == 3 {
				return &cay.Error{Code: cay.CodeCapacity, Layer: cay.LayerPlacement, Message: "no room"}
			}
			return nil
		}
		began := time.Now()
		var out []gen.SandboxForkResult
		f.want(201, f.request("POST", sandboxPath(id, "/fork"), `{"count":5,"timeout":20}`)).decode(t, &out)
		if took := time.Since(began); took != 100*time.Millisecond {
			t.Errorf("five forks took %v: not at once", took)
		}
		failed := 0
		tokens := map[string]bool{AccessToken(testSeed, id).Reveal(): true}
		for _, r := range out {
			if (r.Sandbox == nil) == (r.Error == nil) {
				t.Fatalf("a result is a sandbox or an error: %+v", r)
			}
			if r.Error != nil {
				failed++
				if r.Error.Code != 503 || !strings.Contains(r.Error.Message, "no room") {
					t.Errorf("error of a fork: %+v", r.Error)
				}
				continue
			}
			made := cay.SandboxID(r.Sandbox.SandboxID)
			rec, c := f.record(made), f.node.configs[made]
			if v, _ := f.node.read(made); v != 9 || c.Mode != cay.StartRestore || c.EnvVars["X"] != "1" {
				t.Errorf("fork %s: memory %d, %+v", made, v, c)
			}
			if rec.Parent != id || rec.Metadata["a"] != "b" || !rec.Secure || rec.Deadline.Sub(rec.StartedAt) != 20*time.Second {
				t.Errorf("fork %+v", rec)
			}
			if tokens[*r.Sandbox.EnvdAccessToken] {
				t.Error("two forks have one token")
			}
			tokens[*r.Sandbox.EnvdAccessToken] = true
		}
		if len(out) != 5 || failed != 1 {
			t.Errorf("%d results, %d failed", len(out), failed)
		}
		if rec := f.record(id); rec.State != cay.StateRunning || !rec.Deadline.Equal(source.Deadline) || rec.Execution != source.Execution {
			t.Errorf("the source: %+v", rec)
		}
		synctest.Wait()
		if left := f.node.snapshotIDs(); len(left) > 0 {
			t.Errorf("snapshots left: %v", left)
		}
		f.want(404, f.request("POST", sandboxPath("i00000000000000000000", "/fork"), ``))
		f.want(400, f.request("POST", sandboxPath(id, "/fork"), `{"count":0}`))
		f.want(400, f.request("POST", sandboxPath(id, "/fork"), `{"timeout":0}`))
	})
}

// Every state that a crash can leave, and every thing the node can have then.
func TestInterruptedOperationsAreSettled(t *testing.T) {
	for _, c := range []struct {
		state      cay.SandboxState
		runs, snap bool // on the node
		want       cay.SandboxState
		keeps      bool // the snapshot
	}{
		{cay.StatePausing, true, false, cay.StateRunning, false},
		{cay.StatePausing, false, true, cay.StatePaused, true},
		{cay.StatePausing, false, false, cay.StateEnded, false},
		{cay.StatePaused, false, true, cay.StatePaused, true},
		{cay.StatePaused, true, true, cay.StatePaused, true},
		{cay.StateResuming, true, true, cay.StateRunning, false},
		{cay.StateResuming, false, true, cay.StatePaused, true},
		{cay.StateSnapshotting, true, true, cay.StateRunning, false},
		{cay.StateSnapshotting, true, false, cay.StateRunning, false},
		{cay.StateSnapshotting, false, false, cay.StateEnded, false},
		{cay.StateKilling, false, true, cay.StateEnded, false},
		{cay.StateKilling, true, true, cay.StateEnded, false},
		{cay.StateStarting, true, false, cay.StateEnded, false},
	} {
		name := fmt.Sprintf("%s, runs %v, snapshot %v", c.state, c.runs, c.snap)
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fixture) {
				id := f.create(`{"templateID":"base","timeout":7200}`)
				now := time.Now()
				snap := cay.NewSnapshotID()
				if c.snap {
					f.node.snaps[snap] = fakeSnapshot{cay.Snapshot{ID: snap, Sandbox: id, Build: f.record(id).Build, Resources: f.record(id).Resources,
						Memory: []cay.SnapshotPart{{}}}, 5}
				}
				if !c.runs {
					f.node.mu.Lock()
					delete(f.node.live, id)
					f.node.mu.Unlock()
				}
				// Not through the control plane: this is what a crash leaves.
				_, err := f.store.UpdateSandbox(t.Context(), id, func(s *store.Sandbox) error {
					s.State = c.state
					if c.snap || c.state == cay.StatePausing {
						s.Snapshot, s.SnapshotMemory, s.PausedAt = snap, true, now
					}
					if c.state == cay.StateResuming {
						s.Execution = ""
					}
					if c.state == cay.StateKilling {
						s.EndReason = cay.EndRequest
					}
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				f.serve(nil)
				defer f.run()()
				time.Sleep(35 * time.Second)
				rec := f.record(id)
				if rec.State != c.want || f.node.has(id) != (c.want == cay.StateRunning) {
					t.Errorf("settled as %s (%s), on the node: %v", rec.State, rec.EndMessage, f.node.has(id))
				}
				if c.want == cay.StateRunning && (rec.Snapshot != "" || rec.Execution == "") {
					t.Errorf("a running record %+v", rec)
				}
				time.Sleep(quarantineFor)
				if kept := len(f.node.snapshotIDs()) == 1; kept != c.keeps {
					t.Errorf("the snapshot is kept: %v", kept)
				}
				if c.want == cay.StatePaused {
					f.want(201, f.request("POST", sandboxPath(id, "/connect"), `{"timeout":100}`))
				}
			})
		})
	}
}

func TestQuarantine(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		id := f.create(`{"templateID":"base","timeout":80000}`)
		f.want(201, f.request("POST", sandboxPath(id, "/snapshots"), `{}`))
		f.want(204, f.request("POST", sandboxPath(id, "/pause"), ""))
		kept := f.node.snapshotIDs()
		time.Sleep(time.Minute)
		orphan := cay.NewSnapshotID()
		f.node.mu.Lock()
		f.node.snaps[orphan] = fakeSnapshot{Snapshot: cay.Snapshot{ID: orphan}}
		f.node.mu.Unlock()
		time.Sleep(quarantineFor - time.Second)
		if got := f.node.snapshotIDs(); len(got) != 3 {
			t.Errorf("before its time: %v", got)
		}
		time.Sleep(2 * reconcileEvery)
		if got := f.node.snapshotIDs(); !slices.Equal(got, kept) {
			t.Errorf("after its time: %v, want %v", got, kept)
		}
		if s := f.log.String(); !strings.Contains(s, "quarantine") || !strings.Contains(s, string(orphan)) {
			t.Errorf("the log does not tell: %s", s)
		}
	})
}

// What the table of moves does not have changes nothing.
func TestIllegalMoveIsRefused(t *testing.T) {
	f := newFixture(t)
	id := f.create("")
	for _, to := range cay.SandboxStates() {
		if cay.StateRunning.May(to) {
			continue
		}
		for name, move := range map[string]func(func(*store.Sandbox) error) error{
			"update": func(c func(*store.Sandbox) error) error { _, err := f.s.life.update(t.Context(), id, c); return err },
			"admit":  func(c func(*store.Sandbox) error) error { _, err := f.s.life.admit(t.Context(), id, 9, c); return err },
		} {
			if err := move(func(s *store.Sandbox) error { s.State = to; return nil }); err == nil {
				t.Errorf("%s moved a running sandbox to %s", name, to)
			}
		}
	}
	no := errors.New("no")
	if _, err := f.s.life.update(t.Context(), id, func(*store.Sandbox) error { return no }); err != no {
		t.Errorf("a refusal came back as %v", err)
	}
	if rec := f.record(id); rec.State != cay.StateRunning {
		t.Errorf("%s", rec.State)
	}
}
