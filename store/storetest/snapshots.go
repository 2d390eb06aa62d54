package storetest

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

func snapshotID(n int) cay.SnapshotID { return cay.SnapshotID(fmt.Sprintf("s%020d", n)) }

// newSnapshot is snapshot n of sandbox 1 of the team, without a name.
func newSnapshot(n, team int) store.Snapshot {
	return store.Snapshot{ID: snapshotID(n), Team: teamID(team), Sandbox: sandboxID(1), Template: templateID(1), Alias: "base", Build: buildID(1),
		Resources: cay.Resources{CPUs: 2, MemoryMB: 512, DiskMB: 1024}, EnvdVersion: "0.6.2", Memory: true,
		CreatedAt: kept.Add(time.Duration(n) * time.Minute)}
}

func named(s store.Snapshot, name, tag string) store.Snapshot {
	s.Name, s.Tag = name, tag
	return s
}

func (f fixture) keep(s store.Snapshot) {
	f.Helper()
	f.must(f.AddSnapshot(f.Context(), s))
}

func snapshotIDs(l []store.Snapshot) []cay.SnapshotID {
	out := []cay.SnapshotID{}
	for _, s := range l {
		out = append(out, s.ID)
	}
	return out
}

func (f fixture) snapshots(filter store.SnapshotFilter) []cay.SnapshotID {
	f.Helper()
	l, err := f.ListSnapshots(f.Context(), filter)
	f.must(err)
	return snapshotIDs(l)
}

func snapshotRoundTrip(f fixture) {
	ctx := f.Context()
	f.base(2)
	s := named(newSnapshot(1, 0), "mine", "v1")
	s.CreatedAt, s.Options = noon, []byte(`{"x":1}`)
	f.keep(s)
	s.CreatedAt = kept
	bare := newSnapshot(2, 0)
	bare.Memory = false
	f.keep(bare)
	for _, want := range []store.Snapshot{s, bare} {
		got, err := f.FindSnapshot(ctx, teamID(0), store.TemplateRef{Name: string(want.ID)})
		f.must(err)
		same(f, "snapshot", want, got)
	}
	l, err := f.ListSnapshots(ctx, store.SnapshotFilter{})
	f.must(err)
	same(f, "list", []store.Snapshot{bare, s}, l)

	f.code(f.AddSnapshot(ctx, newSnapshot(1, 0)), cay.CodeConflict)
	f.code(f.AddSnapshot(ctx, newSnapshot(3, 9)), cay.CodeNotFound)
	f.code(f.AddSnapshot(ctx, named(newSnapshot(3, 0), "base", "default")), cay.CodeConflict)
	f.keep(named(newSnapshot(3, 1), "base", "default")) // the template is another team's
	lost := newSnapshot(4, 0)
	lost.Build = buildID(9)
	f.code(f.AddSnapshot(ctx, lost), cay.CodeTemplateNotFound)

	// The build that a snapshot needs stays.
	f.code(f.DeleteTemplate(ctx, teamID(0), templateID(1)), cay.CodeConflict)
	for _, id := range []cay.SnapshotID{s.ID, bare.ID} {
		f.must(f.DeleteSnapshot(ctx, teamID(0), id))
	}
	f.code(f.DeleteSnapshot(ctx, teamID(0), s.ID), cay.CodeNotFound)
	f.code(f.DeleteTemplate(ctx, teamID(0), templateID(1)), cay.CodeConflict)
	f.must(f.DeleteSnapshot(ctx, teamID(1), snapshotID(3)))
	f.must(f.DeleteTemplate(ctx, teamID(0), templateID(1)))
}

func snapshotReferences(f fixture) {
	ctx := f.Context()
	f.base(2)
	f.keep(named(newSnapshot(1, 0), "mine", store.DefaultTag))
	f.keep(named(newSnapshot(2, 0), "mine", "v2"))
	f.keep(named(newSnapshot(3, 1), "mine", store.DefaultTag))
	f.keep(named(newSnapshot(4, 0), string(snapshotID(5)), store.DefaultTag)) // a name that looks like an ID
	f.keep(newSnapshot(5, 0))
	for _, c := range []struct {
		team int
		ref  store.TemplateRef
		want int // 0: none
	}{
		{0, store.TemplateRef{Name: "mine"}, 1},
		{0, store.TemplateRef{Name: "mine", Tag: "default"}, 1},
		{0, store.TemplateRef{Name: "mine", Tag: "v2"}, 2},
		{0, store.TemplateRef{Name: "mine", Tag: "v3"}, 0},
		{0, store.TemplateRef{Name: string(snapshotID(2))}, 2},
		{0, store.TemplateRef{Name: string(snapshotID(2)), Tag: "default"}, 2},
		{0, store.TemplateRef{Name: string(snapshotID(2)), Tag: "v2"}, 0},
		{0, store.TemplateRef{Name: string(snapshotID(5))}, 5},
		{0, store.TemplateRef{Namespace: "team-0", Name: "mine"}, 1},
		{0, store.TemplateRef{Namespace: "team-1", Name: "mine"}, 0},
		{0, store.TemplateRef{Name: string(snapshotID(3))}, 0},
		{0, store.TemplateRef{Name: ""}, 0},
		{1, store.TemplateRef{Name: "mine"}, 3},
	} {
		got, err := f.FindSnapshot(ctx, teamID(c.team), c.ref)
		if c.want == 0 {
			f.code(err, cay.CodeNotFound)
			continue
		}
		if err != nil || got.ID != snapshotID(c.want) {
			f.Fatalf("%+v for team %d is %s, %v; want snapshot %d", c.ref, c.team, got.ID, err, c.want)
		}
	}

	// A name follows the newest; the older one keeps its ID.
	f.keep(named(newSnapshot(6, 0), "mine", store.DefaultTag))
	got, err := f.FindSnapshot(ctx, teamID(0), store.TemplateRef{Name: "mine"})
	f.must(err)
	same(f, "the one of the name", snapshotID(6), got.ID)
	got, err = f.FindSnapshot(ctx, teamID(0), store.TemplateRef{Name: string(snapshotID(1))})
	f.must(err)
	same(f, "the older one", newSnapshot(1, 0), got)
	got, err = f.FindSnapshot(ctx, teamID(1), store.TemplateRef{Name: "mine"})
	f.must(err)
	same(f, "another team's", snapshotID(3), got.ID)
}

func snapshotLists(f fixture) {
	f.base(2)
	for n := range 6 {
		s := newSnapshot(n+1, n/5)
		s.Sandbox = sandboxID(1 + n%2)
		s.CreatedAt = kept.Add(time.Duration(n/2) * time.Minute) // two of each instant
		if n > 2 {
			s = named(s, "mine", fmt.Sprintf("v%d", n))
		}
		f.keep(s)
	}
	want := func(n ...int) []cay.SnapshotID {
		out := []cay.SnapshotID{}
		for _, i := range n {
			out = append(out, snapshotID(i))
		}
		return out
	}
	same(f, "all", want(6, 5, 4, 3, 2, 1), f.snapshots(store.SnapshotFilter{}))
	same(f, "a team's", want(5, 4, 3, 2, 1), f.snapshots(store.SnapshotFilter{Team: teamID(0)}))
	same(f, "a sandbox's", want(5, 3, 1), f.snapshots(store.SnapshotFilter{Team: teamID(0), Sandbox: sandboxID(1)}))
	same(f, "of a name", want(5, 4), f.snapshots(store.SnapshotFilter{Team: teamID(0), Name: "mine"}))
	same(f, "of a tag", want(4), f.snapshots(store.SnapshotFilter{Team: teamID(0), Name: "mine", Tag: "v3"}))
	var all []cay.SnapshotID
	var after store.Cursor
	for {
		page, err := f.ListSnapshots(f.Context(), store.SnapshotFilter{Team: teamID(0), After: after, Limit: 2})
		f.must(err)
		all = append(all, snapshotIDs(page)...)
		if len(page) < 2 {
			break
		}
		after = store.Cursor{At: page[1].CreatedAt, ID: string(page[1].ID)}
	}
	same(f, "page by page", want(5, 4, 3, 2, 1), all)
	f.code(f.DeleteSnapshot(f.Context(), teamID(1), snapshotID(1)), cay.CodeNotFound)
	same(f, "after a stranger's attempt", want(5, 4, 3, 2, 1), f.snapshots(store.SnapshotFilter{Team: teamID(0)}))
}

// runs: what a record keeps of pauses.
func runs(f fixture) {
	f.base(1)
	sb := newSandbox(1, 0)
	sb.Origin, sb.Parent = snapshotID(7), sandboxID(7)
	f.add(sb)
	sb = f.set(sb.ID, func(s *store.Sandbox) {
		s.State, s.Execution, s.Snapshot, s.SnapshotMemory, s.PausedAt = cay.StatePaused, "x1", snapshotID(1), true, noon
		s.History = []store.Happening{{At: noon, Type: cay.EventPaused, Message: "paused <again> & again"}}
	})
	want := newSandbox(1, 0)
	want.Origin, want.Parent = snapshotID(7), sandboxID(7)
	want.State, want.Execution, want.Snapshot, want.SnapshotMemory, want.PausedAt = cay.StatePaused, "x1", snapshotID(1), true, kept
	want.History = []store.Happening{{At: kept, Type: cay.EventPaused, Message: "paused <again> & again"}}
	same(f, "as returned", want, sb)
	got, err := f.FindSandbox(f.Context(), "", sb.ID)
	f.must(err)
	same(f, "as read", want, got)
	got = f.set(sb.ID, func(s *store.Sandbox) {
		s.State, s.Snapshot, s.SnapshotMemory, s.PausedAt, s.History = cay.StateRunning, "", false, time.Time{}, nil
	})
	want.State, want.Snapshot, want.SnapshotMemory, want.PausedAt, want.History = cay.StateRunning, "", false, time.Time{}, nil
	same(f, "after a resume", want, got)
	for name, change := range map[string]func(*store.Sandbox){
		"origin": func(s *store.Sandbox) { s.Origin = snapshotID(8) },
		"parent": func(s *store.Sandbox) { s.Parent = sandboxID(8) },
	} {
		if _, err := f.UpdateSandbox(f.Context(), sb.ID, func(s *store.Sandbox) error { change(s); return nil }); err == nil {
			f.Fatalf("the %s of a sandbox could be changed", name)
		}
	}
}

// admit: a paused sandbox takes no place, and gets one only while there is one.
func admit(f fixture) {
	ctx := f.Context()
	f.base(1)
	to := func(st cay.SandboxState) func(*store.Sandbox) error {
		return func(s *store.Sandbox) error { s.State = st; return nil }
	}
	for n := range 3 {
		f.add(newSandbox(n, 0))
	}
	f.set(sandboxID(0), func(s *store.Sandbox) { s.State = cay.StatePaused })
	f.must(f.AddSandbox(ctx, newSandbox(3, 0), 3))
	for _, st := range []cay.SandboxState{cay.StatePausing, cay.StateSnapshotting, cay.StateResuming, cay.StateKilling, cay.StateRunning} {
		f.set(sandboxID(1), func(s *store.Sandbox) { s.State = st })
		f.code(f.AddSandbox(ctx, newSandbox(4, 0), 3), cay.CodeTooManySandboxes)
		_, err := f.AdmitSandbox(ctx, sandboxID(0), 3, to(cay.StateResuming))
		f.code(err, cay.CodeTooManySandboxes)
	}
	got, err := f.FindSandbox(ctx, "", sandboxID(0))
	f.must(err)
	same(f, "state after a refusal", cay.StatePaused, got.State)
	// Who has a place keeps it, and who takes none needs none.
	_, err = f.AdmitSandbox(ctx, sandboxID(1), 0, to(cay.StatePausing))
	f.must(err)
	_, err = f.AdmitSandbox(ctx, sandboxID(0), 0, func(s *store.Sandbox) error { s.Metadata = map[string]string{"a": "b"}; return nil })
	f.must(err)
	no := errors.New("no")
	if _, err := f.AdmitSandbox(ctx, sandboxID(0), 9, func(*store.Sandbox) error { return no }); err != no {
		f.Fatalf("a refusal came back as %v", err)
	}
	_, err = f.AdmitSandbox(ctx, sandboxID(9), 9, to(cay.StateResuming))
	f.code(err, cay.CodeSandboxNotFound)

	f.set(sandboxID(1), func(s *store.Sandbox) { s.State = cay.StatePaused })
	f.set(sandboxID(2), func(s *store.Sandbox) { s.State = cay.StatePaused })
	// One place is taken and two are free; many come at once.
	var wg sync.WaitGroup
	var in atomic.Int32
	for n := range 3 {
		wg.Go(func() {
			_, err := f.AdmitSandbox(ctx, sandboxID(n), 3, to(cay.StateResuming))
			if err == nil {
				in.Add(1)
			} else {
				f.codeAsync(err, cay.CodeTooManySandboxes)
			}
		})
		wg.Go(func() {
			err := f.AddSandbox(ctx, newSandbox(10+n, 0), 3)
			if err == nil {
				in.Add(1)
			} else {
				f.codeAsync(err, cay.CodeTooManySandboxes)
			}
		})
	}
	wg.Wait()
	same(f, "admitted", int32(2), in.Load())
}

// codeAsync is code for goroutines of a test.
func (f fixture) codeAsync(err error, want cay.Code) {
	f.Helper()
	if cay.CodeOf(err) != want {
		f.Errorf("error %v; want %s", err, want)
	}
}
