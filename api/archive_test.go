package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/operator"
	"github.com/cayhq/cay/store"
)

// The archive of a fake node is its manifest on a line, and any text.

// OpenArchive implements [cay.Archives].
func (n *fakeNode) OpenArchive(_ context.Context, id cay.SnapshotID) (io.ReadCloser, int64, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s, ok := n.snaps[id]
	if !ok {
		return nil, 0, &cay.Error{Code: cay.CodeNotFound, Layer: cay.LayerStorage, Message: "no such snapshot"}
	}
	b, err := json.Marshal(s.Snapshot)
	return io.NopCloser(strings.NewReader(string(b))), int64(len(b)), err
}

// ReceiveArchive implements [cay.Archives].
func (n *fakeNode) ReceiveArchive(_ context.Context, id cay.SnapshotID, r io.Reader, accept func(cay.Snapshot, string) error) (cay.Snapshot, error) {
	b, err := io.ReadAll(r)
	line, _, _ := strings.Cut(string(b), "\n")
	var m cay.Snapshot
	if err = errors.Join(err, json.Unmarshal([]byte(line), &m)); err != nil {
		return m, &cay.Error{Code: cay.CodeSnapshotCorrupt, Layer: cay.LayerStorage, Message: "the archive is damaged: " + err.Error()}
	}
	if err := accept(m, "base"); err != nil {
		return m, err
	}
	m.ID = id
	n.mu.Lock()
	defer n.mu.Unlock()
	n.snaps[id] = fakeSnapshot{m, 1}
	return m, nil
}

func TestArchives(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fixture) {
		defer f.run()()
		admin := []string{"X-API-Key", "", "X-Admin-Token", testAdmin, "Content-Type", "application/x-tar"}
		id := f.create(`{"templateID":"base","timeout":1000}`)
		f.want(201, f.request("POST", sandboxPath(id, "/snapshots"), `{"name":"mine"}`))
		was := f.node.snapshotIDs()[0]
		f.want(404, f.request("GET", archivePaths+"/s00000000000000000000", "", admin...))
		a := f.want(200, f.request("GET", archivePaths+"/"+string(was), "", admin...))
		if a.header.Get("Content-Type") != "application/x-tar" || a.header.Get("Content-Length") == "" {
			t.Errorf("headers of an archive: %v", a.header)
		}
		f.want(401, f.request("GET", archivePaths+"/"+string(was), ""))
		take := func(body string, team cay.Team, name string) answer {
			return f.request("POST", archivePaths+"?teamID="+string(team.ID)+"&name="+url.QueryEscape(name), body, admin...)
		}
		// However large, and for however long.
		archive := a.body + "\n" + strings.Repeat("x", maxBody)
		var n operator.Snapshot
		f.want(201, take(archive, f.team, "again:v2")).decode(t, &n)
		if n.SnapshotID == string(was) || n.Owner != "client" || len(n.Names) != 1 || n.Names[0] != "again:v2" || n.MemoryBytes == 0 {
			t.Errorf("imported %+v", n)
		}
		var made gen.Sandbox
		f.want(201, f.request("POST", "/v2/sandboxes", `{"templateID":"again:v2"}`)).decode(t, &made)
		if c := f.node.configs[cay.SandboxID(made.SandboxID)]; string(c.From) != n.SnapshotID {
			t.Errorf("a sandbox of it is made from %q", c.From)
		}
		// Any team that may use the template.
		f.want(201, take(archive, f.other, "")).decode(t, &n)
		var list []gen.SnapshotInfo
		f.want(200, f.request("GET", "/snapshots", "", "X-API-Key", f.foreign)).decode(t, &list)
		if len(list) != 1 || list[0].SnapshotID != n.SnapshotID+":default" || n.TeamID != string(f.other.ID) {
			t.Errorf("the other team has %+v, and imported %+v", list, n)
		}

		own := f.create(`{"templateID":"own","timeout":1000}`)
		f.want(201, f.request("POST", sandboxPath(own, "/snapshots"), `{"name":"private"}`))
		private, err := f.store.FindSnapshot(t.Context(), f.team.ID, store.TemplateRef{Name: "private"})
		if err != nil {
			t.Fatal(err)
		}
		secret := f.want(200, f.request("GET", archivePaths+"/"+string(private.ID), "", admin...)).body
		before := len(f.node.snapshotIDs())
		for _, c := range []struct {
			name   string
			answer answer
			status int
			says   string
		}{
			{"a name of a template", take(archive, f.team, "base"), 400, "called"},
			{"another namespace", take(archive, f.team, "two/x"), 400, "namespace"},
			{"no such team", take(archive, cay.Team{ID: "33333333-3333-4333-8333-333333333333"}, ""), 404, "team"},
			{"damaged", take("no archive", f.team, ""), 500, "damaged"},
			{"a template that the team lacks", take(secret, f.other, ""), 404, "of template base, which team two does not have"},
		} {
			if e := f.problem(f.want(c.status, c.answer)); !strings.Contains(e.Message, c.says) {
				t.Errorf("%s: %s", c.name, e.Message)
			}
		}
		if left := len(f.node.snapshotIDs()); left != before {
			t.Errorf("what was refused left %d snapshots", left-before)
		}
		// Nothing of it is taken for an orphan.
		time.Sleep(time.Hour)
		if left := len(f.node.snapshotIDs()); left != before {
			t.Errorf("%d snapshots an hour later, and there were %d", left, before)
		}
	})
}
