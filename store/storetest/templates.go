package storetest

import (
	"slices"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

func (f fixture) find(team int, ref store.TemplateRef) store.Template {
	f.Helper()
	tpl, err := f.FindTemplate(f.Context(), teamID(team), ref)
	if err != nil {
		f.Fatalf("FindTemplate(%+v) by team %d: %v", ref, team, err)
	}
	return tpl
}

func (f fixture) exists(ref store.TemplateRef) bool {
	f.Helper()
	ok, err := f.TemplateExists(f.Context(), ref)
	f.must(err)
	return ok
}

func builtFrom(m cay.Manifest, id cay.TemplateID) store.Build {
	return store.Build{ID: m.Build, Template: id, Resources: m.Resources, EnvdVersion: m.EnvdVersion,
		CreatedAt: m.CreatedAt.UTC().Truncate(time.Microsecond)}
}

func publish(f fixture) {
	ctx := f.Context()
	f.teams(1)
	one := manifest(1, 1, "base")
	same(f, "ID of a new template", templateID(1), f.publish(0, true, one))
	got := f.find(0, store.TemplateRef{Name: "base"})
	if got.CreatedAt.IsZero() || got.CreatedAt.Location() != time.UTC || !got.UpdatedAt.Equal(got.CreatedAt) {
		f.Fatalf("made %v, updated %v; want one instant in UTC", got.CreatedAt, got.UpdatedAt)
	}
	want := store.Template{ID: templateID(1), Team: teamID(0), Name: "base", Public: true,
		CreatedAt: got.CreatedAt, UpdatedAt: got.UpdatedAt, BuildCount: 1, Current: builtFrom(one, templateID(1))}
	same(f, "template", want, got)

	// A later build: the template keeps its ID and its visibility.
	two := manifest(2, 2, "base")
	two.Resources.CPUs, two.EnvdVersion = 4, "0.7.0"
	same(f, "ID of a known template", templateID(1), f.publish(0, false, two))
	got = f.find(0, store.TemplateRef{Name: "base"})
	if got.UpdatedAt.Before(want.UpdatedAt) {
		f.Fatalf("updated %v, before %v", got.UpdatedAt, want.UpdatedAt)
	}
	want.UpdatedAt, want.BuildCount, want.Current = got.UpdatedAt, 2, builtFrom(two, templateID(1))
	same(f, "template after a second build", want, got)
	if f.exists(store.TemplateRef{Name: string(templateID(2))}) {
		f.Fatal("the second manifest's template ID names something")
	}

	// The current build again, as each start of a server does it.
	f.publish(0, true, two)
	same(f, "template after the same build", want, f.find(0, store.TemplateRef{Name: "base"}))

	// An earlier build again: a way back.
	f.publish(0, true, one)
	got = f.find(0, store.TemplateRef{Name: "base"})
	same(f, "current build after a way back", one.Build, got.Current.ID)
	same(f, "builds after a way back", 2, got.BuildCount)
	builds, err := f.ListBuilds(ctx, templateID(1), store.Cursor{}, 0)
	f.must(err)
	same(f, "rows of builds", 2, len(builds))
}

func publishConflicts(f fixture) {
	ctx := f.Context()
	f.teams(2)
	f.publish(0, true, manifest(1, 1, "base"))
	before := f.find(0, store.TemplateRef{Name: "base"})

	_, err := f.PublishBuild(ctx, teamID(0), true, manifest(1, 2, "other"))
	f.code(err, cay.CodeConflict) // the build is base's
	_, err = f.PublishBuild(ctx, teamID(1), true, manifest(1, 2, "base"))
	f.code(err, cay.CodeConflict) // and another team's
	_, err = f.PublishBuild(ctx, teamID(1), true, manifest(2, 1, "mine"))
	f.code(err, cay.CodeConflict) // the template ID is another team's
	_, err = f.PublishBuild(ctx, teamID(9), true, manifest(2, 2, "base"))
	f.code(err, cay.CodeNotFound)

	same(f, "template after conflicts", before, f.find(0, store.TemplateRef{Name: "base"}))
	for _, name := range []string{"other", "mine", string(templateID(2))} {
		if f.exists(store.TemplateRef{Name: name}) {
			f.Fatalf("a refused publication left %q", name)
		}
	}
}

func resolve(f fixture) {
	f.teams(2)
	f.publish(0, true, manifest(1, 1, "base"))
	f.publish(0, false, manifest(2, 2, "private"))
	for _, c := range []struct {
		team   int
		ref    store.TemplateRef
		want   cay.TemplateID // empty: not found
		exists bool
	}{
		{0, store.TemplateRef{Name: "base"}, templateID(1), true},
		{0, store.TemplateRef{Name: "base", Tag: "default"}, templateID(1), true},
		{0, store.TemplateRef{Name: "base", Tag: "v9"}, "", false},
		{0, store.TemplateRef{Name: string(templateID(1))}, templateID(1), true},
		{0, store.TemplateRef{Namespace: "team-0", Name: "base"}, templateID(1), true},
		{0, store.TemplateRef{Namespace: "team-0", Name: "base", Tag: "default"}, templateID(1), true},
		{0, store.TemplateRef{Namespace: "team-1", Name: "base"}, "", false},
		{0, store.TemplateRef{Namespace: "nobody", Name: "base"}, "", false},
		{0, store.TemplateRef{Name: "private"}, templateID(2), true},
		{0, store.TemplateRef{Name: "missing"}, "", false},
		{0, store.TemplateRef{Name: ""}, "", false},
		{0, store.TemplateRef{Name: "%"}, "", false},
		{1, store.TemplateRef{Name: "base"}, templateID(1), true},
		{1, store.TemplateRef{Name: string(templateID(1))}, templateID(1), true},
		{1, store.TemplateRef{Namespace: "team-0", Name: "base"}, templateID(1), true},
		{1, store.TemplateRef{Name: "private"}, "", true},
		{1, store.TemplateRef{Name: string(templateID(2))}, "", true},
		{1, store.TemplateRef{Namespace: "team-0", Name: "private"}, "", true},
		{1, store.TemplateRef{Name: "private", Tag: "v9"}, "", false},
	} {
		same(f, "TemplateExists", c.exists, f.exists(c.ref))
		tpl, err := f.FindTemplate(f.Context(), teamID(c.team), c.ref)
		if c.want == "" {
			if cay.CodeOf(err) != cay.CodeTemplateNotFound {
				f.Fatalf("FindTemplate(%+v) by team %d = %v, %v; want template_not_found", c.ref, c.team, tpl.ID, err)
			}
			continue
		}
		if err != nil || tpl.ID != c.want {
			f.Fatalf("FindTemplate(%+v) by team %d = %v, %v; want %v", c.ref, c.team, tpl.ID, err, c.want)
		}
	}
}

// resolveNamesakes: nobody takes over a reference by a namesake.
func resolveNamesakes(f fixture) {
	f.teams(4)
	f.publish(0, true, manifest(1, 11, "base"))
	f.publish(1, true, manifest(2, 2, "base"))
	f.publish(2, false, manifest(3, 3, "base"))
	// A name that is another public template's ID.
	f.publish(1, true, manifest(4, 4, string(templateID(11))))
	// One that was there before the template with the ID.
	f.publish(2, true, manifest(5, 5, string(templateID(6))))
	f.publish(0, true, manifest(6, 6, "late"))
	for _, c := range []struct {
		team int
		ref  store.TemplateRef
		want cay.TemplateID
	}{
		{0, store.TemplateRef{Name: "base"}, templateID(11)},
		{1, store.TemplateRef{Name: "base"}, templateID(2)},
		{2, store.TemplateRef{Name: "base"}, templateID(3)},
		{3, store.TemplateRef{Name: "base"}, templateID(11)}, // the oldest public one, not the least ID
		{3, store.TemplateRef{Namespace: "team-1", Name: "base"}, templateID(2)},
		{2, store.TemplateRef{Namespace: "team-0", Name: "base"}, templateID(11)},
		{3, store.TemplateRef{Name: string(templateID(11))}, templateID(11)},
		{0, store.TemplateRef{Name: string(templateID(11))}, templateID(11)},
		{1, store.TemplateRef{Name: string(templateID(11))}, templateID(4)}, // its own
		{3, store.TemplateRef{Name: string(templateID(6))}, templateID(6)},  // the ID, though the name is older
	} {
		if got := f.find(c.team, c.ref); got.ID != c.want {
			f.Fatalf("FindTemplate(%+v) by team %d = %v; want %v", c.ref, c.team, got.ID, c.want)
		}
	}
}

func visibility(f fixture) {
	ctx := f.Context()
	f.teams(2)
	f.publish(0, false, manifest(1, 1, "base"))
	ref := store.TemplateRef{Name: "base"}
	_, err := f.FindTemplate(ctx, teamID(1), ref)
	f.code(err, cay.CodeTemplateNotFound)

	f.must(f.SetTemplatePublic(ctx, teamID(0), templateID(1), true))
	got := f.find(1, ref)
	if !got.Public || got.UpdatedAt.Before(got.CreatedAt) {
		f.Fatalf("template made public: %+v", got)
	}
	// Publishing does not undo it.
	f.publish(0, false, manifest(2, 1, "base"))
	same(f, "current build for a stranger", buildID(2), f.find(1, ref).Current.ID)

	f.must(f.SetTemplatePublic(ctx, teamID(0), templateID(1), false))
	_, err = f.FindTemplate(ctx, teamID(1), ref)
	f.code(err, cay.CodeTemplateNotFound)
	f.code(f.SetTemplatePublic(ctx, teamID(0), templateID(9), true), cay.CodeTemplateNotFound)
}

func deleteTemplate(f fixture) {
	ctx := f.Context()
	f.base(2)
	f.publish(0, true, manifest(2, 1, "base"))
	f.publish(0, false, manifest(3, 3, "spare"))
	f.add(newSandbox(1, 1)) // another team's sandbox counts

	f.code(f.DeleteTemplate(ctx, teamID(0), templateID(1)), cay.CodeConflict)
	same(f, "builds of a template in use", 2, f.find(0, store.TemplateRef{Name: "base"}).BuildCount)

	f.set(sandboxID(1), end(kept.Add(time.Second)))
	f.must(f.DeleteTemplate(ctx, teamID(0), templateID(1)))
	f.code(f.DeleteTemplate(ctx, teamID(0), templateID(1)), cay.CodeTemplateNotFound)
	if f.exists(store.TemplateRef{Name: "base"}) {
		f.Fatal("the deleted template exists")
	}
	builds, err := f.ListBuilds(ctx, templateID(1), store.Cursor{}, 0)
	f.must(err)
	same(f, "builds of a deleted template", 0, len(builds))
	f.code(f.AddSandbox(ctx, newSandbox(2, 1), 10), cay.CodeTemplateNotFound)
	sb, err := f.FindSandbox(ctx, teamID(1), sandboxID(1))
	f.must(err)
	same(f, "template in the record of an ended sandbox", templateID(1), sb.Template)
	same(f, "another template", templateID(3), f.find(0, store.TemplateRef{Name: "spare"}).ID)

	// Name and builds are free again.
	same(f, "the template anew", templateID(4), f.publish(0, true, manifest(1, 4, "base")))
}

// walk reads a list page by page and checks that no page is longer than asked.
func walk[T any](f fixture, size int, cursor func(T) store.Cursor, page func(store.Cursor, int) ([]T, error)) []T {
	f.Helper()
	var out []T
	var at store.Cursor
	for range 1000 {
		l, err := page(at, size)
		f.must(err)
		if len(l) > size {
			f.Fatalf("a page of %d, asked for %d", len(l), size)
		}
		if len(l) == 0 {
			return out
		}
		out = append(out, l...)
		at = cursor(l[len(l)-1])
	}
	f.Fatal("the pages never end")
	return nil
}

func listTemplates(f fixture) {
	ctx := f.Context()
	f.teams(2)
	var want []cay.TemplateID
	for i := range 7 {
		team, public := i%2, i%3 == 0
		f.publish(team, public, manifest(i, i, "t"+string(rune('a'+i))))
		if team == 0 || public {
			want = append(want, templateID(i))
		}
	}
	all, err := f.ListTemplates(ctx, teamID(0), store.Cursor{}, 0)
	f.must(err)
	var got []cay.TemplateID
	for _, tpl := range all {
		got = append(got, tpl.ID)
		same(f, "template in a list", f.find(0, store.TemplateRef{Name: tpl.Name}), tpl)
	}
	sorted := slices.IsSortedFunc(all, func(a, b store.Template) int { return b.CreatedAt.Compare(a.CreatedAt) })
	slices.Sort(got)
	if !sorted || !gocmp.Equal(want, got) {
		f.Fatalf("templates %v (newest first: %v), want %v", got, sorted, want)
	}
	for _, size := range []int{1, 2, 3, 100} {
		same(f, "templates by pages", all, walk(f, size,
			func(t store.Template) store.Cursor { return store.Cursor{At: t.CreatedAt, ID: string(t.ID)} },
			func(c store.Cursor, n int) ([]store.Template, error) { return f.ListTemplates(ctx, teamID(0), c, n) }))
	}
}

func listBuilds(f fixture) {
	ctx := f.Context()
	f.teams(1)
	var want []store.Build
	for i := range 9 {
		m := manifest(i, 1, "base")
		m.CreatedAt = noon.Add(time.Duration(i/4) * time.Microsecond) // many at one instant
		f.publish(0, true, m)
		want = append(want, builtFrom(m, templateID(1)))
	}
	f.publish(0, true, manifest(20, 2, "other"))
	slices.SortFunc(want, func(a, b store.Build) int {
		if c := b.CreatedAt.Compare(a.CreatedAt); c != 0 {
			return c
		}
		if a.ID > b.ID {
			return -1
		}
		return 1
	})
	all, err := f.ListBuilds(ctx, templateID(1), store.Cursor{}, 0)
	f.must(err)
	same(f, "builds, newest first", want, all)
	for _, size := range []int{1, 2, 4, 100} {
		same(f, "builds by pages", want, walk(f, size,
			func(b store.Build) store.Cursor { return store.Cursor{At: b.CreatedAt, ID: string(b.ID)} },
			func(c store.Cursor, n int) ([]store.Build, error) { return f.ListBuilds(ctx, templateID(1), c, n) }))
	}
	none, err := f.ListBuilds(ctx, templateID(9), store.Cursor{}, 0)
	f.must(err)
	same(f, "builds of nothing", 0, len(none))
}
