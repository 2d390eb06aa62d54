package cli

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/operator"
)

// pauseHandlers answers what is about pauses and snapshots.
func (f *fakeServer) pauseHandlers(m *http.ServeMux, team, admin func(http.HandlerFunc) http.HandlerFunc) {
	// found decodes the body and answers 404 for what is not there.
	found := func(w http.ResponseWriter, r *http.Request, q any) bool {
		if r.Body != http.NoBody && q != nil {
			if err := json.NewDecoder(r.Body).Decode(q); err != nil {
				refuse(w, 400, "invalid_request", "api", err.Error(), "send JSON")
				return false
			}
		}
		if !f.has(r.PathValue("id")) {
			noSandbox(w, r.PathValue("id"))
			return false
		}
		return true
	}
	m.HandleFunc("POST /sandboxes/{id}/pause", team(func(w http.ResponseWriter, r *http.Request) {
		var q api.SandboxPauseRequest
		switch {
		case !found(w, r, &q):
		case !*q.Memory:
			refuse(w, 409, "conflict", "api", "it is paused", "connect to it")
		default:
			w.WriteHeader(204)
		}
	}))
	m.HandleFunc("POST /v2/sandboxes/{id}/connect", team(func(w http.ResponseWriter, r *http.Request) {
		var q api.ConnectSandboxV2
		if found(w, r, &q) {
			status := 201
			if q.Memory != nil && !*q.Memory && *q.Timeout == 7 {
				status = 200
			}
			reply(w, status, api.Sandbox{SandboxID: r.PathValue("id")})
		}
	}))
	m.HandleFunc("POST /sandboxes/{id}/fork", team(func(w http.ResponseWriter, r *http.Request) {
		var q api.SandboxForkRequest
		if found(w, r, &q) {
			out := []api.SandboxForkResult{{Error: &api.Error{Code: 503, Message: "No room."}}}
			for range *q.Count - 1 {
				out = append(out, api.SandboxForkResult{Sandbox: &api.Sandbox{SandboxID: "ifork"}})
			}
			reply(w, 201, out)
		}
	}))
	m.HandleFunc("POST /sandboxes/{id}/snapshots", team(func(w http.ResponseWriter, r *http.Request) {
		var q api.SandboxSnapshotRequest
		if found(w, r, &q) {
			id := "s1:default"
			if q.Name != nil {
				id = "one/" + *q.Name
			}
			reply(w, 201, api.SnapshotInfo{SnapshotID: id, Names: []string{}})
		}
	}))
	m.HandleFunc("DELETE /templates/{id}", team(func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("id") != "one/warm:v2" {
			refuse(w, 404, "template_not_found", "template", "not found", "see `cay snapshot list`")
			return
		}
		w.WriteHeader(204)
	}))
	m.HandleFunc("GET /operator/v1/snapshots", admin(func(w http.ResponseWriter, _ *http.Request) {
		reply(w, 200, []operator.Snapshot{
			{SnapshotID: "s1", SandboxID: guarded, Owner: "sandbox", Names: []string{}, MemoryBytes: 40 << 20, Runtime: "gvisor", RuntimeVersion: "v1", CreatedAt: fakeNow.Add(-time.Hour)},
			{SnapshotID: "s2", SandboxID: open, Owner: "client", Names: []string{"warm:v2"}, Runtime: "gvisor", RuntimeVersion: "v1", CreatedAt: fakeNow.Add(-2 * time.Hour)},
		})
	}))
	m.HandleFunc("POST /operator/v1/snapshots/{id}/verify", admin(func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("id") != "s1" {
			refuse(w, 500, "snapshot_corrupt", "storage", "part pages.img of snapshot s2 is damaged", "restore it from a backup")
			return
		}
		w.WriteHeader(204)
	}))
	archive := bytes.Repeat([]byte("an archive "), 300_000)
	m.HandleFunc("GET /operator/v1/archives/{id}", admin(func(w http.ResponseWriter, r *http.Request) {
		switch r.PathValue("id") {
		case "s1", "s2":
			w.Header().Set("Content-Type", "application/x-tar")
			w.Header().Set("Content-Length", strconv.Itoa(len(archive)))
			n := len(archive)
			if r.PathValue("id") == "s2" {
				n /= 2 // and the connection ends
			}
			_, _ = w.Write(archive[:n])
		default:
			refuse(w, 404, "not_found", "storage", "no snapshot "+r.PathValue("id")+" on this node", "see `cay snapshot list`")
		}
	}))
	m.HandleFunc("POST /operator/v1/archives", admin(func(w http.ResponseWriter, r *http.Request) {
		got, err := io.ReadAll(r.Body)
		switch q := r.URL.Query(); {
		case err != nil || !bytes.Equal(got, archive) || q.Get("teamID") == "":
			refuse(w, 500, "snapshot_corrupt", "storage", "the archive is damaged", "copy it again")
		case q.Get("name") != "warm:v2":
			refuse(w, 404, "template_not_found", "template", "the snapshot was made from build b of template base, which is not here", "build it")
		default:
			reply(w, 201, operator.Snapshot{SnapshotID: "s9", SandboxID: guarded, Names: []string{"warm:v2"}, MemoryBytes: 40 << 20})
		}
	}))
	m.HandleFunc("GET /operator/v1/sandboxes", admin(func(w http.ResponseWriter, _ *http.Request) {
		reply(w, 200, []operator.SandboxRecord{{SandboxID: guarded, State: "running", Alias: "base", Parent: open, CreatedAt: fakeNow.Add(-time.Minute)}, {SandboxID: open, State: "paused", Alias: "base", CreatedAt: fakeNow.Add(-time.Hour)}})
	}))
}

func TestTree(t *testing.T) {
	r := func(id, parent, state string, age time.Duration) operator.SandboxRecord {
		return operator.SandboxRecord{SandboxID: id, Parent: parent, State: operator.SandboxState(state), Alias: "base", CreatedAt: fakeNow.Add(-age)}
	}
	got := tree([]operator.SandboxRecord{r("c", "a", "running", 3*time.Second), r("b", "a", "paused", 4*time.Second), r("a", "", "running", 9*time.Second),
		r("d", "b", "running", 2*time.Second), r("e", "lost", "running", 2*time.Second), r("f", "lost", "running", time.Second)}, fakeNow)
	want := [][]string{{"a", "running", "base", "9s ago"}, {"  b", "paused", "base", "4s ago"}, {"    d", "running", "base", "2s ago"}, {"  c", "running", "base", "3s ago"},
		{"lost", "gone", "", ""}, {"  e", "running", "base", "2s ago"}, {"  f", "running", "base", "1s ago"}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if got := tree(nil, fakeNow); len(got) > 0 {
		t.Errorf("of nothing: %q", got)
	}
}
