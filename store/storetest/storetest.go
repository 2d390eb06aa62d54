// Package storetest proves that an adapter keeps the contract of package store.
package storetest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

// Run runs the suite. open is called once per subtest and returns an empty,
// open store, which it closes when the subtest ends.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	for _, c := range []struct {
		name string
		f    func(f fixture)
	}{
		{"teams", teams},
		{"keys", keys},
		{"key conflicts", keyConflicts},
		{"key use", keyUse},
		{"publish", publish},
		{"publish conflicts", publishConflicts},
		{"resolve", resolve},
		{"resolve namesakes", resolveNamesakes},
		{"template visibility", visibility},
		{"delete template", deleteTemplate},
		{"list templates", listTemplates},
		{"list builds", listBuilds},
		{"sandbox round trip", sandboxRoundTrip},
		{"sandbox refusals", sandboxRefusals},
		{"limit", limit},
		{"limit under concurrency", limitConcurrent},
		{"update", update},
		{"update refusals", updateRefusals},
		{"update is atomic", updateAtomic},
		{"update that panics", updatePanics},
		{"ended is final", endedFinal},
		{"spawns", spawns},
		{"filters", filters},
		{"metadata", metadata},
		{"pages", pages},
		{"pages while writing", pagesWhileWriting},
		{"count", count},
		{"move deadlines", moveDeadlines},
		{"prune", prune},
		{"snapshot round trip", snapshotRoundTrip},
		{"snapshot references", snapshotReferences},
		{"snapshot lists", snapshotLists},
		{"secret round trip", secretRoundTrip},
		{"secret versions", secretVersions},
		{"secret lists", secretLists},
		{"secrets sealed anew", secretsResealed},
		{"runs", runs},
		{"admit", admit},
		{"foreign is absent", foreign},
		{"cancelled", cancelled},
		{"closed", closed},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(fixture{t, open(t)}) })
	}
}

type fixture struct {
	*testing.T
	store.Store
}

func (f fixture) must(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

// code fails unless err is a *cay.Error of the code that says something.
func (f fixture) code(err error, want cay.Code) {
	f.Helper()
	var e *cay.Error
	if !errors.As(err, &e) || e.Code != want || e.Layer == "" || e.Message == "" {
		f.Fatalf("error %v (%T); want a *cay.Error with code %s, a layer and a message", err, err, want)
	}
}

func same[T any](f fixture, what string, want, got T) {
	f.Helper()
	if d := gocmp.Diff(want, got); d != "" {
		f.Fatalf("%s (-want +got):\n%s", what, d)
	}
}

// Identifiers have the form that their types promise: an adapter may keep them
// in columns of that form.
func uuid(kind string, n int) string {
	h := sha256.Sum256(fmt.Appendf(nil, "%s %d", kind, n))
	return fmt.Sprintf("%x-%x-4%x-8%x-%x", h[:4], h[4:6], h[6:8], h[8:10], h[10:16])[:36]
}

func teamID(n int) cay.TeamID         { return cay.TeamID(uuid("team", n)) }
func keyID(n int) store.KeyID         { return store.KeyID(uuid("key", n)) }
func buildID(n int) cay.BuildID       { return cay.BuildID(uuid("build", n)) }
func templateID(n int) cay.TemplateID { return cay.TemplateID(fmt.Sprintf("%020d", n)) }
func sandboxID(n int) cay.SandboxID   { return cay.SandboxID(fmt.Sprintf("i%020d", n)) }

func hash(n int) []byte {
	h := sha256.Sum256(fmt.Appendf(nil, "hash %d", n))
	return h[:]
}

// noon is an instant with more digits than a store keeps; kept is what it keeps.
var (
	noon = time.Date(2026, 3, 4, 12, 0, 0, 123_456_789, time.FixedZone("far", 5*3600))
	kept = time.Date(2026, 3, 4, 7, 0, 0, 123_456_000, time.UTC)
)

func newTeam(n int) cay.Team {
	return cay.Team{ID: teamID(n), Name: fmt.Sprintf("Team %d", n), Slug: fmt.Sprintf("team-%d", n),
		Limits: cay.TeamLimits{ConcurrentSandboxes: 20 + n, MaxLengthHours: 24}}
}

func (f fixture) teams(n int) {
	f.Helper()
	for i := range n {
		f.must(f.PutTeam(f.Context(), newTeam(i)))
	}
}

func newKey(n, team int) store.Key {
	return store.Key{ID: keyID(n), Team: teamID(team), Name: fmt.Sprintf("key %d", n), Hash: hash(n),
		Prefix: "ab", Suffix: "cdef", Length: 40, CreatedAt: kept}
}

func manifest(build, template int, name string) cay.Manifest {
	return cay.Manifest{Format: cay.ManifestFormat, Build: buildID(build), Template: templateID(template), Name: name,
		CreatedAt: noon, EnvdVersion: "0.6.2", Resources: cay.Resources{CPUs: 2, MemoryMB: 512, DiskMB: 1024}}
}

func (f fixture) publish(team int, public bool, m cay.Manifest) cay.TemplateID {
	f.Helper()
	id, err := f.PublishBuild(f.Context(), teamID(team), public, m)
	f.must(err)
	return id
}

// newSandbox is sandbox n of the team, starting, of template 1 and build 1.
func newSandbox(n, team int) store.Sandbox {
	return store.Sandbox{ID: sandboxID(n), Team: teamID(team), Template: templateID(1), Alias: "base", Build: buildID(1),
		Node: "n1", State: cay.StateStarting, Resources: cay.Resources{CPUs: 2, MemoryMB: 512, DiskMB: 1024},
		EnvdVersion: "0.6.2", CreatedAt: kept, StartedAt: kept, Deadline: kept.Add(time.Minute), MaxDeadline: kept.Add(time.Hour)}
}

// base makes n teams and the public template 1 with build 1, of team 0.
func (f fixture) base(n int) {
	f.Helper()
	f.teams(n)
	f.publish(0, true, manifest(1, 1, "base"))
}

func (f fixture) add(sb store.Sandbox) {
	f.Helper()
	f.must(f.AddSandbox(f.Context(), sb, 1000))
}

func (f fixture) set(id cay.SandboxID, change func(*store.Sandbox)) store.Sandbox {
	f.Helper()
	sb, err := f.UpdateSandbox(f.Context(), id, func(sb *store.Sandbox) error { change(sb); return nil })
	f.must(err)
	return sb
}

func end(at time.Time) func(*store.Sandbox) {
	return func(sb *store.Sandbox) {
		sb.State, sb.EndedAt, sb.EndReason, sb.EndMessage = cay.StateEnded, at, cay.EndRequest, "killed"
	}
}

func (f fixture) list(filter store.SandboxFilter) []store.Sandbox {
	f.Helper()
	l, err := f.ListSandboxes(f.Context(), filter)
	f.must(err)
	return l
}

func ids(l []store.Sandbox) []cay.SandboxID {
	out := []cay.SandboxID{}
	for _, sb := range l {
		out = append(out, sb.ID)
	}
	return out
}

func numbered(n ...int) []cay.SandboxID {
	out := []cay.SandboxID{}
	for _, i := range n {
		out = append(out, sandboxID(i))
	}
	return out
}

// foreign asks every method that takes a team for another team's object and for
// one that does not exist: nothing may tell the two apart.
func foreign(f fixture) {
	f.base(2)
	f.publish(0, false, manifest(2, 2, "private"))
	f.must(f.AddKey(f.Context(), newKey(1, 0)))
	f.add(newSandbox(1, 0))
	inUse := newSandbox(2, 0)
	inUse.Template, inUse.Build = templateID(2), buildID(2)
	f.add(inUse)
	f.keep(newSnapshot(1, 0))
	me, ctx := teamID(1), f.Context()
	for _, c := range []struct {
		name           string
		theirs, absent string
		f              func(id string) (any, error)
	}{
		{"FindSandbox", string(sandboxID(1)), string(sandboxID(9)), func(id string) (any, error) {
			return f.FindSandbox(ctx, me, cay.SandboxID(id))
		}},
		{"RenameKey", string(keyID(1)), string(keyID(9)), func(id string) (any, error) {
			return nil, f.RenameKey(ctx, me, store.KeyID(id), "mine")
		}},
		{"DeleteKey", string(keyID(1)), string(keyID(9)), func(id string) (any, error) {
			return nil, f.DeleteKey(ctx, me, store.KeyID(id))
		}},
		{"FindTemplate by ID", string(templateID(2)), string(templateID(9)), func(id string) (any, error) {
			return f.FindTemplate(ctx, me, store.TemplateRef{Name: id})
		}},
		{"FindTemplate by name", "private", "missing", func(name string) (any, error) {
			return f.FindTemplate(ctx, me, store.TemplateRef{Name: name})
		}},
		{"FindTemplate by namespace", "private", "missing", func(name string) (any, error) {
			return f.FindTemplate(ctx, me, store.TemplateRef{Namespace: "team-0", Name: name})
		}},
		{"FindTemplate by tag", "private", "missing", func(name string) (any, error) {
			return f.FindTemplate(ctx, me, store.TemplateRef{Name: name, Tag: "v9"})
		}},
		{"SetTemplatePublic", string(templateID(2)), string(templateID(9)), func(id string) (any, error) {
			return nil, f.SetTemplatePublic(ctx, me, cay.TemplateID(id), true)
		}},
		{"SetTemplatePublic of a public one", string(templateID(1)), string(templateID(9)), func(id string) (any, error) {
			return nil, f.SetTemplatePublic(ctx, me, cay.TemplateID(id), false)
		}},
		{"FindSnapshot", string(snapshotID(1)), string(snapshotID(9)), func(id string) (any, error) {
			return f.FindSnapshot(ctx, me, store.TemplateRef{Name: id})
		}},
		{"DeleteSnapshot", string(snapshotID(1)), string(snapshotID(9)), func(id string) (any, error) {
			return nil, f.DeleteSnapshot(ctx, me, cay.SnapshotID(id))
		}},
		{"DeleteTemplate", string(templateID(2)), string(templateID(9)), func(id string) (any, error) {
			return nil, f.DeleteTemplate(ctx, me, cay.TemplateID(id))
		}},
	} {
		got, err := c.f(c.theirs)
		want, wantErr := c.f(c.absent)
		if err == nil || wantErr == nil {
			f.Fatalf("%s: foreign %v, absent %v; want errors", c.name, err, wantErr)
		}
		same(f, c.name+": result", want, got)
		same(f, c.name+": text", strings.ReplaceAll(wantErr.Error(), c.absent, c.theirs), err.Error())
		same(f, c.name+": code", cay.CodeOf(wantErr), cay.CodeOf(err))
	}
	keys, err := f.ListKeys(ctx, me)
	f.must(err)
	same(f, "another team's keys", 0, len(keys))
	same(f, "another team's sandboxes", 0, len(f.list(store.SandboxFilter{Team: me})))
	n, err := f.CountSandboxes(ctx, me)
	f.must(err)
	same(f, "count of another team's sandboxes", 0, n)
	l, err := f.ListTemplates(ctx, me, store.Cursor{}, 0)
	f.must(err)
	if len(l) != 1 || l[0].ID != templateID(1) {
		f.Fatalf("templates of another team: %+v; want the public one only", l)
	}
	// And nothing was changed by the attempts.
	if k, _, err := f.FindKey(ctx, hash(1)); err != nil || k.Name != "key 1" {
		f.Fatalf("the key after a stranger's attempts: %+v, %v", k, err)
	}
	if tpl, err := f.FindTemplate(ctx, teamID(0), store.TemplateRef{Name: "private"}); err != nil || tpl.Public {
		f.Fatalf("the template after a stranger's attempts: %+v, %v", tpl, err)
	}
}

// cancelled: a call whose context is over neither lies nor acts.
func cancelled(f fixture) {
	f.base(1)
	f.must(f.AddKey(f.Context(), newKey(1, 0)))
	f.add(newSandbox(1, 0))
	ctx, cancel := context.WithCancel(f.Context())
	cancel()
	for name, err := range outcomes(f, ctx) {
		if cay.CodeOf(err) != cay.CodeStoreUnavailable || !errors.Is(err, context.Canceled) {
			f.Errorf("%s with a cancelled context: %v; want store_unavailable that wraps the cause", name, err)
		}
	}
	same(f, "sandboxes", numbered(1), ids(f.list(store.SandboxFilter{})))
	if sb, err := f.FindSandbox(f.Context(), "", sandboxID(1)); err != nil || sb.State != cay.StateStarting {
		f.Fatalf("the sandbox was changed: %+v, %v", sb, err)
	}
	if k, _, err := f.FindKey(f.Context(), hash(1)); err != nil || k.Name != "key 1" || !k.LastUsed.IsZero() {
		f.Fatalf("the key was changed: %+v, %v", k, err)
	}
}

func closed(f fixture) {
	f.base(1)
	f.must(f.Close())
	f.must(f.Close())
	for name, err := range outcomes(f, f.Context()) {
		if cay.CodeOf(err) != cay.CodeStoreUnavailable {
			f.Errorf("%s of a closed store: %v; want store_unavailable", name, err)
		}
	}
	f.must(f.Close())
}

// outcomes calls every method once and returns the errors. The objects that the
// calls name exist in the fixture of [cancelled], so none is "not found".
func outcomes(f fixture, ctx context.Context) map[string]error {
	out := map[string]error{}
	out["PutTeam"] = f.PutTeam(ctx, newTeam(5))
	_, out["Team"] = f.Team(ctx, teamID(0))
	_, out["ListTeams"] = f.ListTeams(ctx)
	out["AddKey"] = f.AddKey(ctx, newKey(2, 0))
	_, _, out["FindKey"] = f.FindKey(ctx, hash(1))
	_, out["ListKeys"] = f.ListKeys(ctx, teamID(0))
	out["RenameKey"] = f.RenameKey(ctx, teamID(0), keyID(1), "other")
	out["TouchKey"] = f.TouchKey(ctx, keyID(1), noon)
	out["DeleteKey"] = f.DeleteKey(ctx, teamID(0), keyID(1))
	_, out["PublishBuild"] = f.PublishBuild(ctx, teamID(0), true, manifest(2, 1, "base"))
	_, out["FindTemplate"] = f.FindTemplate(ctx, teamID(0), store.TemplateRef{Name: "base"})
	_, out["TemplateExists"] = f.TemplateExists(ctx, store.TemplateRef{Name: "base"})
	_, out["ListTemplates"] = f.ListTemplates(ctx, teamID(0), store.Cursor{}, 10)
	_, out["ListBuilds"] = f.ListBuilds(ctx, templateID(1), store.Cursor{}, 10)
	out["SetTemplatePublic"] = f.SetTemplatePublic(ctx, teamID(0), templateID(1), false)
	out["DeleteTemplate"] = f.DeleteTemplate(ctx, teamID(0), templateID(1))
	out["AddSandbox"] = f.AddSandbox(ctx, newSandbox(2, 0), 100)
	_, out["FindSandbox"] = f.FindSandbox(ctx, teamID(0), sandboxID(1))
	_, out["UpdateSandbox"] = f.UpdateSandbox(ctx, sandboxID(1), func(sb *store.Sandbox) error {
		f.Error("UpdateSandbox called change")
		return nil
	})
	_, out["AdmitSandbox"] = f.AdmitSandbox(ctx, sandboxID(1), 1, func(*store.Sandbox) error {
		f.Error("AdmitSandbox called change")
		return nil
	})
	out["AddSnapshot"] = f.AddSnapshot(ctx, newSnapshot(2, 0))
	_, out["FindSnapshot"] = f.FindSnapshot(ctx, teamID(0), store.TemplateRef{Name: "mine"})
	_, out["ListSnapshots"] = f.ListSnapshots(ctx, store.SnapshotFilter{})
	out["DeleteSnapshot"] = f.DeleteSnapshot(ctx, teamID(0), snapshotID(1))
	out["AddSecret"] = f.AddSecret(ctx, newSecret(2, 0), value("k1", 1))
	_, _, out["FindSecret"] = f.FindSecret(ctx, teamID(0), "mine")
	_, out["UpdateSecret"] = f.UpdateSecret(ctx, teamID(0), "mine", func(*store.Secret) (store.Sealed, error) {
		f.Error("UpdateSecret called seal")
		return store.Sealed{}, nil
	})
	_, out["ListSecrets"] = f.ListSecrets(ctx, teamID(0), store.Cursor{}, 0)
	out["DeleteSecret"] = f.DeleteSecret(ctx, teamID(0), "mine")
	out["ResealSecrets"] = f.ResealSecrets(ctx, "k2", func(store.Secret, store.Sealed) (store.Sealed, error) {
		f.Error("ResealSecrets called reseal")
		return store.Sealed{}, nil
	})
	_, out["ListSandboxes"] = f.ListSandboxes(ctx, store.SandboxFilter{})
	_, out["ListSandboxes upwards"] = f.ListSandboxes(ctx, store.SandboxFilter{Ascending: true})
	_, out["CountSandboxes"] = f.CountSandboxes(ctx, teamID(0))
	_, out["MoveDeadlines"] = f.MoveDeadlines(ctx, time.Hour, cay.StateRunning)
	_, out["PruneSandboxes"] = f.PruneSandboxes(ctx, noon.Add(time.Hour))
	return out
}
