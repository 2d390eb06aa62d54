package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

func sandboxRoundTrip(f fixture) {
	ctx := f.Context()
	f.base(1)
	yes, no := true, false
	full := newSandbox(1, 0)
	full.Metadata = map[string]string{"user": "ada", "": "empty key", "empty value": "", "ключ": "значение 🏝"}
	full.Secure, full.AllowInternet = true, &no
	full.Options = []byte(`{"autoPause":true,"network":{"allowOut":["1.1.1.1"]}}`)
	full.CreatedAt, full.StartedAt, full.Deadline, full.MaxDeadline = noon, noon, noon.Add(time.Minute), noon.Add(time.Hour)
	bare := newSandbox(2, 0)
	bare.Metadata, bare.Options, bare.Alias, bare.EnvdVersion, bare.Node = map[string]string{}, []byte{}, "", "", ""
	open := newSandbox(3, 0)
	open.AllowInternet = &yes
	dead := newSandbox(4, 0)
	end(noon)(&dead)
	for _, sb := range []store.Sandbox{full, bare, open, dead} {
		f.add(sb)
		if len(sb.Metadata) == 0 {
			sb.Metadata = nil
		}
		if len(sb.Options) == 0 {
			sb.Options = nil
		}
		for _, at := range []*time.Time{&sb.CreatedAt, &sb.StartedAt, &sb.Deadline, &sb.MaxDeadline, &sb.EndedAt} {
			*at = at.UTC().Truncate(time.Microsecond)
		}
		for _, team := range []cay.TeamID{teamID(0), ""} {
			got, err := f.FindSandbox(ctx, team, sb.ID)
			f.must(err)
			same(f, "sandbox", sb, got)
		}
		if sb.State != cay.StateEnded {
			l := f.list(store.SandboxFilter{})
			i := slices.IndexFunc(l, func(s store.Sandbox) bool { return s.ID == sb.ID })
			if i < 0 {
				f.Fatalf("sandbox %s is not in the list", sb.ID)
			}
			same(f, "sandbox in a list", sb, l[i])
		}
	}
}

func sandboxRefusals(f fixture) {
	ctx := f.Context()
	f.base(2)
	_, err := f.FindSandbox(ctx, teamID(0), sandboxID(1))
	f.code(err, cay.CodeSandboxNotFound)
	_, err = f.FindSandbox(ctx, "", sandboxID(1))
	f.code(err, cay.CodeSandboxNotFound)

	f.add(newSandbox(1, 0))
	twin := newSandbox(1, 1)
	f.code(f.AddSandbox(ctx, twin, 10), cay.CodeConflict)
	f.code(f.AddSandbox(ctx, newSandbox(2, 9), 10), cay.CodeNotFound)
	lost := newSandbox(3, 0)
	lost.Template = templateID(9)
	f.code(f.AddSandbox(ctx, lost, 10), cay.CodeTemplateNotFound)
	lost = newSandbox(3, 0)
	lost.Build = buildID(9)
	f.code(f.AddSandbox(ctx, lost, 10), cay.CodeTemplateNotFound)
	f.publish(0, true, manifest(2, 2, "other"))
	lost.Build = buildID(2) // there, but of another template
	f.code(f.AddSandbox(ctx, lost, 10), cay.CodeTemplateNotFound)
	odd := newSandbox(4, 0)
	odd.EndedAt = kept
	f.code(f.AddSandbox(ctx, odd, 10), cay.CodeInternal)

	same(f, "sandboxes after refusals", numbered(1), ids(f.list(store.SandboxFilter{})))
	sb, err := f.FindSandbox(ctx, "", sandboxID(1))
	f.must(err)
	same(f, "the first of two with one ID", newSandbox(1, 0), sb)
	same(f, "spawns after refusals", 1, f.find(0, store.TemplateRef{Name: "base"}).SpawnCount)
}

func limit(f fixture) {
	ctx := f.Context()
	f.base(2)
	f.code(f.AddSandbox(ctx, newSandbox(1, 0), 0), cay.CodeTooManySandboxes)
	f.must(f.AddSandbox(ctx, newSandbox(1, 0), 3))
	f.must(f.AddSandbox(ctx, newSandbox(2, 0), 3))
	f.must(f.AddSandbox(ctx, newSandbox(3, 0), 3))
	f.code(f.AddSandbox(ctx, newSandbox(4, 0), 3), cay.CodeTooManySandboxes)
	f.must(f.AddSandbox(ctx, newSandbox(5, 1), 1)) // another team has its own

	// Every state before the end holds a place.
	f.set(sandboxID(1), func(sb *store.Sandbox) { sb.State = cay.StateRunning })
	f.set(sandboxID(2), func(sb *store.Sandbox) { sb.State = cay.StateKilling })
	f.code(f.AddSandbox(ctx, newSandbox(4, 0), 3), cay.CodeTooManySandboxes)
	_, err := f.FindSandbox(ctx, "", sandboxID(4))
	f.code(err, cay.CodeSandboxNotFound)

	f.set(sandboxID(2), end(kept))
	f.must(f.AddSandbox(ctx, newSandbox(4, 0), 3))
	f.code(f.AddSandbox(ctx, newSandbox(6, 0), 3), cay.CodeTooManySandboxes)
	// A limit that was lowered refuses new ones and harms none.
	f.code(f.AddSandbox(ctx, newSandbox(6, 0), 1), cay.CodeTooManySandboxes)
	same(f, "sandboxes", 3, len(f.list(store.SandboxFilter{Team: teamID(0)})))
}

func limitConcurrent(f fixture) {
	ctx := f.Context()
	f.base(2)
	const max, goroutines, each = 7, 50, 6
	var live, most, made atomic.Int64
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			for i := range each {
				sb := newSandbox(g*each+i, g%2)
				err := f.AddSandbox(ctx, sb, max)
				if cay.CodeOf(err) == cay.CodeTooManySandboxes {
					continue
				}
				if err != nil {
					f.Error(err)
					return
				}
				made.Add(1)
				if sb.Team == teamID(0) {
					for n := live.Add(1); ; {
						m := most.Load()
						if n <= m || most.CompareAndSwap(m, n) {
							break
						}
					}
				}
				n, err := f.CountSandboxes(ctx, sb.Team)
				if err != nil || n > max {
					f.Errorf("team has %d live sandboxes (%v), limit %d", n, err, max)
				}
				if sb.Team == teamID(0) {
					live.Add(-1) // before the end, so that live is never too high
				}
				if _, err := f.UpdateSandbox(ctx, sb.ID, func(sb *store.Sandbox) error { end(kept)(sb); return nil }); err != nil {
					f.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if most.Load() > max {
		f.Errorf("%d sandboxes lived at once, limit %d", most.Load(), max)
	}
	if made.Load() < max {
		f.Errorf("only %d of %d were made", made.Load(), goroutines*each)
	}
	// All at once, and none ends: exactly the limit.
	var ok atomic.Int64
	for i := range goroutines {
		wg.Go(func() {
			switch err := f.AddSandbox(ctx, newSandbox(10_000+i, 0), max); {
			case err == nil:
				ok.Add(1)
			case cay.CodeOf(err) != cay.CodeTooManySandboxes:
				f.Error(err)
			}
		})
	}
	wg.Wait()
	same(f, "accepted of 50 at once", int64(max), ok.Load())
	same(f, "live", max, len(f.list(store.SandboxFilter{Team: teamID(0)})))
}

func update(f fixture) {
	f.base(1)
	f.add(newSandbox(1, 0))
	no := false
	got := f.set(sandboxID(1), func(sb *store.Sandbox) {
		same(f, "what change sees", newSandbox(1, 0), *sb)
		sb.State, sb.Node, sb.EnvdVersion = cay.StateRunning, "n2", "0.7.0"
		sb.Resources = cay.Resources{CPUs: 8, MemoryMB: 1024, DiskMB: 2048}
		sb.Metadata = map[string]string{"a": "b"}
		sb.Secure, sb.AllowInternet, sb.Options = true, &no, []byte(`{"x":1}`)
		sb.StartedAt, sb.Deadline, sb.MaxDeadline = noon.Add(time.Second), noon.Add(time.Hour), noon.Add(2*time.Hour)
	})
	want := newSandbox(1, 0)
	want.State, want.Node, want.EnvdVersion = cay.StateRunning, "n2", "0.7.0"
	want.Resources = cay.Resources{CPUs: 8, MemoryMB: 1024, DiskMB: 2048}
	want.Metadata = map[string]string{"a": "b"}
	want.Secure, want.AllowInternet, want.Options = true, &no, []byte(`{"x":1}`)
	want.StartedAt, want.Deadline, want.MaxDeadline = kept.Add(time.Second), kept.Add(time.Hour), kept.Add(2*time.Hour)
	same(f, "what UpdateSandbox returns", want, got)
	got, err := f.FindSandbox(f.Context(), teamID(0), sandboxID(1))
	f.must(err)
	same(f, "what is recorded", want, got)

	same(f, "a change of nothing", want, f.set(sandboxID(1), func(sb *store.Sandbox) {}))
	same(f, "a change of digits that are not kept", want, f.set(sandboxID(1), func(sb *store.Sandbox) {
		sb.Deadline = sb.Deadline.Add(999).In(time.FixedZone("x", 3600))
	}))
	// What change was given is its own: keeping it reaches nothing.
	var leak *store.Sandbox
	f.set(sandboxID(1), func(sb *store.Sandbox) { leak = sb })
	leak.State = cay.StateKilling
	leak.Metadata["a"] = "changed"
	got, err = f.FindSandbox(f.Context(), "", sandboxID(1))
	f.must(err)
	same(f, "the record after a change has ended", want, got)
}

func updateRefusals(f fixture) {
	ctx := f.Context()
	f.base(2)
	f.publish(0, true, manifest(2, 2, "other"))
	f.add(newSandbox(1, 0))
	_, err := f.UpdateSandbox(ctx, sandboxID(9), func(*store.Sandbox) error {
		f.Error("change was called without a record")
		return nil
	})
	f.code(err, cay.CodeSandboxNotFound)

	mine := errors.New("mine")
	_, err = f.UpdateSandbox(ctx, sandboxID(1), func(sb *store.Sandbox) error { sb.State = cay.StateRunning; return mine })
	if err != mine {
		f.Fatalf("error of change came back as %v", err)
	}
	for name, change := range map[string]func(*store.Sandbox){
		"ID":                 func(sb *store.Sandbox) { sb.ID = sandboxID(2) },
		"team":               func(sb *store.Sandbox) { sb.Team = teamID(1) },
		"template":           func(sb *store.Sandbox) { sb.Template = templateID(2) },
		"alias":              func(sb *store.Sandbox) { sb.Alias = "other" },
		"build":              func(sb *store.Sandbox) { sb.Build = buildID(2) },
		"creation":           func(sb *store.Sandbox) { sb.CreatedAt = noon.Add(time.Hour) },
		"end without time":   func(sb *store.Sandbox) { sb.State, sb.EndReason = cay.StateEnded, cay.EndOOM },
		"end without reason": func(sb *store.Sandbox) { sb.State, sb.EndedAt = cay.StateEnded, noon },
		"life with an end":   func(sb *store.Sandbox) { sb.EndedAt, sb.EndReason = noon, cay.EndOOM },
	} {
		_, err := f.UpdateSandbox(ctx, sandboxID(1), func(sb *store.Sandbox) error { change(sb); return nil })
		if cay.CodeOf(err) != cay.CodeInternal {
			f.Errorf("change of %s: %v; want an internal error", name, err)
		}
	}
	got, err := f.FindSandbox(ctx, "", sandboxID(1))
	f.must(err)
	same(f, "the record after refused changes", newSandbox(1, 0), got)
}

func updateAtomic(f fixture) {
	ctx := f.Context()
	f.base(1)
	f.add(newSandbox(1, 0))
	const goroutines, each = 20, 10
	var wg sync.WaitGroup
	for range goroutines {
		wg.Go(func() {
			for range each {
				_, err := f.UpdateSandbox(ctx, sandboxID(1), func(sb *store.Sandbox) error {
					// Two fields that move together: a reader sees both or none.
					sb.Deadline = sb.Deadline.Add(time.Second)
					sb.MaxDeadline = sb.MaxDeadline.Add(time.Second)
					return nil
				})
				if err != nil {
					f.Error(err)
				}
				sb, err := f.FindSandbox(ctx, "", sandboxID(1))
				if err != nil || sb.MaxDeadline.Sub(sb.Deadline) != time.Hour-time.Minute {
					f.Errorf("half a change was seen: %v %v, %v", sb.Deadline, sb.MaxDeadline, err)
				}
			}
		})
	}
	wg.Wait()
	sb, err := f.FindSandbox(ctx, "", sandboxID(1))
	f.must(err)
	same(f, "deadline after 200 additions", kept.Add(time.Minute+goroutines*each*time.Second), sb.Deadline)

	// Of many that want to end it, one does.
	var won atomic.Int64
	lost := errors.New("ended already")
	for i := range goroutines {
		wg.Go(func() {
			_, err := f.UpdateSandbox(ctx, sandboxID(1), func(sb *store.Sandbox) error {
				if sb.State == cay.StateEnded {
					return lost
				}
				end(kept)(sb)
				sb.EndMessage = fmt.Sprint(i)
				return nil
			})
			if err == nil {
				won.Add(1)
			} else if err != lost {
				f.Error(err)
			}
		})
	}
	wg.Wait()
	same(f, "how many ended it", 1, won.Load())
}

func updatePanics(f fixture) {
	f.base(1)
	f.add(newSandbox(1, 0))
	func() {
		defer func() {
			if recover() == nil {
				f.Fatal("the panic was swallowed")
			}
		}()
		_, _ = f.UpdateSandbox(f.Context(), sandboxID(1), func(sb *store.Sandbox) error {
			sb.State = cay.StateRunning
			panic("defect in change")
		})
	}()
	sb, err := f.FindSandbox(f.Context(), "", sandboxID(1))
	f.must(err)
	same(f, "state", cay.StateStarting, sb.State)
	ctx, cancel := context.WithTimeout(f.Context(), 10*time.Second)
	defer cancel()
	f.must(f.AddSandbox(ctx, newSandbox(2, 0), 10)) // no lock was left
}

func endedFinal(f fixture) {
	ctx := f.Context()
	f.base(1)
	f.add(newSandbox(1, 0))
	// The reason may be known when the end begins, and is no end yet.
	killing := f.set(sandboxID(1), func(sb *store.Sandbox) { sb.State, sb.EndReason = cay.StateKilling, cay.EndTimeout })
	same(f, "reason of a kill that has begun", cay.EndTimeout, killing.EndReason)
	same(f, "live sandboxes", []store.Sandbox{killing}, f.list(store.SandboxFilter{}))
	want := f.set(sandboxID(1), end(noon))
	same(f, "time of the end", kept, want.EndedAt)
	for name, change := range map[string]func(*store.Sandbox){
		"revive": func(sb *store.Sandbox) {
			sb.State, sb.EndedAt, sb.EndReason, sb.EndMessage = cay.StateRunning, time.Time{}, "", ""
		},
		"another reason":   func(sb *store.Sandbox) { sb.EndReason = cay.EndTimeout },
		"another deadline": func(sb *store.Sandbox) { sb.Deadline = sb.Deadline.Add(time.Hour) },
	} {
		_, err := f.UpdateSandbox(ctx, sandboxID(1), func(sb *store.Sandbox) error { change(sb); return nil })
		if cay.CodeOf(err) != cay.CodeConflict {
			f.Errorf("%s: %v; want conflict", name, err)
		}
	}
	same(f, "no change", want, f.set(sandboxID(1), func(*store.Sandbox) {}))
	got, err := f.FindSandbox(ctx, teamID(0), sandboxID(1))
	f.must(err)
	same(f, "ended sandbox", want, got)
	same(f, "live sandboxes", 0, len(f.list(store.SandboxFilter{})))
	same(f, "ended sandboxes in a list", 0, len(f.list(store.SandboxFilter{States: []cay.SandboxState{cay.StateEnded}})))
}

func spawns(f fixture) {
	f.base(1)
	before := f.find(0, store.TemplateRef{Name: "base"})
	if before.SpawnCount != 0 || !before.LastSpawnedAt.IsZero() {
		f.Fatalf("a template without sandboxes: %+v", before)
	}
	for i, at := range []time.Time{noon, noon.Add(time.Second), noon.Add(-time.Hour)} {
		sb := newSandbox(i, 0)
		sb.CreatedAt = at
		f.add(sb)
	}
	after := f.find(0, store.TemplateRef{Name: "base"})
	before.SpawnCount, before.LastSpawnedAt = 3, kept.Add(time.Second)
	same(f, "template after three sandboxes", before, after)
}

func filters(f fixture) {
	f.base(2)
	f.publish(0, true, manifest(2, 2, "other"))
	add := func(n, team int, state cay.SandboxState, at time.Duration, change func(*store.Sandbox)) {
		sb := newSandbox(n, team)
		sb.State, sb.StartedAt = state, kept.Add(at)
		if change != nil {
			change(&sb)
		}
		f.add(sb)
	}
	add(1, 0, cay.StateRunning, 1*time.Second, func(sb *store.Sandbox) { sb.Metadata = map[string]string{"user": "ada", "env": "dev"} })
	add(2, 0, cay.StateStarting, 2*time.Second, func(sb *store.Sandbox) { sb.Metadata = map[string]string{"user": "ada"} })
	add(3, 0, cay.StateKilling, 3*time.Second, func(sb *store.Sandbox) { sb.Metadata = map[string]string{"user": "bob", "env": "dev"} })
	add(4, 0, cay.StateRunning, 4*time.Second, func(sb *store.Sandbox) { sb.Template, sb.Build = templateID(2), buildID(2) })
	add(5, 1, cay.StateRunning, 5*time.Second, func(sb *store.Sandbox) { sb.Metadata = map[string]string{"user": "ada"} })
	add(6, 0, cay.StateEnded, 6*time.Second, end(kept))
	running, other := []cay.SandboxState{cay.StateRunning}, templateID(2)
	for name, c := range map[string]struct {
		f    store.SandboxFilter
		want []cay.SandboxID
	}{
		"everything":               {store.SandboxFilter{}, numbered(5, 4, 3, 2, 1)},
		"upwards":                  {store.SandboxFilter{Ascending: true}, numbered(1, 2, 3, 4, 5)},
		"team":                     {store.SandboxFilter{Team: teamID(0)}, numbered(4, 3, 2, 1)},
		"unknown team":             {store.SandboxFilter{Team: teamID(9)}, numbered()},
		"running":                  {store.SandboxFilter{States: running}, numbered(5, 4, 1)},
		"running or starting":      {store.SandboxFilter{Team: teamID(0), States: []cay.SandboxState{cay.StateStarting, cay.StateRunning}}, numbered(4, 2, 1)},
		"template":                 {store.SandboxFilter{Template: other}, numbered(4)},
		"unknown template":         {store.SandboxFilter{Template: templateID(9)}, numbered()},
		"a pair":                   {store.SandboxFilter{Team: teamID(0), Metadata: map[string]string{"user": "ada"}}, numbered(2, 1)},
		"a pair of any team":       {store.SandboxFilter{Metadata: map[string]string{"user": "ada"}}, numbered(5, 2, 1)},
		"both pairs":               {store.SandboxFilter{Metadata: map[string]string{"user": "ada", "env": "dev"}}, numbered(1)},
		"a value of another key":   {store.SandboxFilter{Metadata: map[string]string{"user": "dev"}}, numbered()},
		"a key alone":              {store.SandboxFilter{Metadata: map[string]string{"user": ""}}, numbered()},
		"no pair":                  {store.SandboxFilter{Team: teamID(0), Metadata: map[string]string{}}, numbered(4, 3, 2, 1)},
		"since, inclusive":         {store.SandboxFilter{StartedAfter: kept.Add(3 * time.Second)}, numbered(5, 4, 3)},
		"since, finer than kept":   {store.SandboxFilter{StartedAfter: kept.Add(3*time.Second + 999)}, numbered(5, 4, 3)},
		"since, upwards":           {store.SandboxFilter{StartedAfter: kept.Add(3 * time.Second), Ascending: true, Limit: 2}, numbered(3, 4)},
		"limit":                    {store.SandboxFilter{Limit: 2}, numbered(5, 4)},
		"everything at once":       {store.SandboxFilter{Team: teamID(0), States: running, Metadata: map[string]string{"env": "dev"}, Template: templateID(1), StartedAfter: kept, Limit: 5}, numbered(1)},
		"after one":                {store.SandboxFilter{After: store.Cursor{At: kept.Add(4 * time.Second), ID: string(sandboxID(4))}}, numbered(3, 2, 1)},
		"after one, upwards":       {store.SandboxFilter{Ascending: true, After: store.Cursor{At: kept.Add(4 * time.Second), ID: string(sandboxID(4))}}, numbered(5)},
		"after one that is gone":   {store.SandboxFilter{After: store.Cursor{At: kept.Add(3*time.Second + 500*time.Millisecond), ID: string(sandboxID(99))}}, numbered(3, 2, 1)},
		"after an instant, no ID":  {store.SandboxFilter{Ascending: true, After: store.Cursor{At: kept.Add(4 * time.Second)}}, numbered(4, 5)},
		"a state that none is in":  {store.SandboxFilter{States: []cay.SandboxState{"paused"}}, numbered()},
		"a state with odd letters": {store.SandboxFilter{States: []cay.SandboxState{`"']`}}, numbered()},
	} {
		got := ids(f.list(c.f))
		if !slices.Equal(c.want, got) {
			f.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// metadata holds every pair against every other: each matches itself alone.
func metadata(f fixture) {
	f.base(1)
	words := []string{"a", "A", "a ", "", "ä", "a\u0308", "a b=c&d", `"`, `\`, `\u0061`, "'", "<a>&", "\u2028", "\n\t\x01\x7f", "🏝",
		"null", "true", "1", "1.0", "[]", "{}", "$.a", "%", "_", "*", "a.b", "a[0]", strings.Repeat("x", 5000), "\x00", "a\x00b"}
	for i, w := range words {
		sb := newSandbox(i, 0)
		sb.Metadata = map[string]string{w: w, "all": "same"}
		f.add(sb)
		got, err := f.FindSandbox(f.Context(), "", sb.ID)
		f.must(err)
		same(f, "metadata", sb.Metadata, got.Metadata)
	}
	for i, w := range words {
		got := ids(f.list(store.SandboxFilter{Metadata: map[string]string{w: w}}))
		if !slices.Equal(got, numbered(i)) {
			f.Errorf("%q matches %v, want %v", w, got, numbered(i))
		}
	}
	same(f, "a pair that all have", len(words), len(f.list(store.SandboxFilter{Metadata: map[string]string{"all": "same"}})))
}

func pageOf(f fixture, filter store.SandboxFilter) func(store.Cursor, int) ([]store.Sandbox, error) {
	return func(c store.Cursor, n int) ([]store.Sandbox, error) {
		filter.After, filter.Limit = c, n
		return f.ListSandboxes(f.Context(), filter)
	}
}

func cursorOf(sb store.Sandbox) store.Cursor {
	return store.Cursor{At: sb.StartedAt, ID: string(sb.ID)}
}

func pages(f fixture) {
	f.base(2)
	for i := range 23 {
		sb := newSandbox((i*7)%23, i%2)
		sb.StartedAt = kept.Add(time.Duration(i/9) * time.Microsecond) // nine at one instant
		f.add(sb)
	}
	for _, up := range []bool{false, true} {
		for _, team := range []cay.TeamID{"", teamID(0)} {
			filter := store.SandboxFilter{Team: team, Ascending: up}
			all := f.list(filter)
			if n := map[cay.TeamID]int{"": 23, teamID(0): 12}[team]; len(all) != n {
				f.Fatalf("%d sandboxes, want %d", len(all), n)
			}
			if !slices.IsSortedFunc(all, func(a, b store.Sandbox) int {
				c := a.StartedAt.Compare(b.StartedAt)
				if c == 0 {
					c = strings.Compare(string(a.ID), string(b.ID))
				}
				if !up {
					c = -c
				}
				return c
			}) {
				f.Fatalf("the list is not in order: %v", ids(all))
			}
			for _, size := range []int{1, 2, 5, 9, 23, 100} {
				same(f, fmt.Sprintf("pages of %d", size), ids(all), ids(walk(f, size, cursorOf, pageOf(f, filter))))
			}
		}
	}
}

// pagesWhileWriting: whoever lives during the whole walk is seen exactly once.
func pagesWhileWriting(f fixture) {
	f.base(1)
	want := map[cay.SandboxID]int{}
	for i := range 40 {
		f.add(newSandbox(i*100, 0)) // one instant for all
		want[sandboxID(i*100)] = 1
	}
	ctx, cancel := context.WithCancel(f.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			id := (i%40)*100 + 1 + i/40
			if err := f.AddSandbox(f.Context(), newSandbox(id, 0), 10_000); err != nil {
				f.Error(err)
				return
			}
			if _, err := f.UpdateSandbox(f.Context(), sandboxID(id), func(sb *store.Sandbox) error { end(kept)(sb); return nil }); err != nil {
				f.Error(err)
				return
			}
		}
	})
	for _, up := range []bool{false, true, false, true} {
		got := map[cay.SandboxID]int{}
		for _, sb := range walk(f, 3, cursorOf, pageOf(f, store.SandboxFilter{Ascending: up})) {
			if _, steady := want[sb.ID]; steady {
				got[sb.ID]++
			}
		}
		same(f, "the steady ones, each once", want, got)
	}
	cancel()
	wg.Wait()
}

func count(f fixture) {
	ctx := f.Context()
	f.base(2)
	for i, state := range []cay.SandboxState{cay.StateStarting, cay.StateRunning, cay.StateRunning, cay.StateKilling, cay.StateEnded} {
		for team := range 2 {
			sb := newSandbox(i*10+team, team)
			sb.State = state
			if state == cay.StateEnded {
				end(kept)(&sb)
			}
			f.add(sb)
		}
	}
	for _, c := range []struct {
		team   cay.TeamID
		states []cay.SandboxState
		want   int
	}{
		{teamID(0), nil, 4},
		{teamID(0), []cay.SandboxState{cay.StateRunning}, 2},
		{teamID(0), []cay.SandboxState{cay.StateRunning, cay.StateStarting}, 3},
		{teamID(0), []cay.SandboxState{cay.StateEnded}, 1},
		{teamID(0), []cay.SandboxState{cay.StateEnded, cay.StateRunning}, 3},
		{"", []cay.SandboxState{cay.StateEnded, cay.StateKilling}, 4},
		{teamID(0), []cay.SandboxState{"paused"}, 0},
		{"", nil, 8},
		{"", []cay.SandboxState{cay.StateRunning}, 4},
		{teamID(9), nil, 0},
	} {
		n, err := f.CountSandboxes(ctx, c.team, c.states...)
		f.must(err)
		if n != c.want {
			f.Errorf("CountSandboxes(%s, %v) = %d, want %d", c.team, c.states, n, c.want)
		}
	}
}

func moveDeadlines(f fixture) {
	ctx := f.Context()
	f.base(1)
	states := []cay.SandboxState{cay.StateRunning, cay.StateStarting, cay.StatePaused, cay.StateEnded}
	var before []store.Sandbox
	for i, state := range states {
		sb := newSandbox(i, 0)
		sb.State = state
		if state == cay.StateEnded {
			end(kept)(&sb)
		}
		f.add(sb)
		sb, err := f.FindSandbox(ctx, "", sb.ID)
		f.must(err)
		before = append(before, sb)
	}
	for _, step := range []time.Duration{-time.Hour, time.Hour, 0} {
		n, err := f.MoveDeadlines(ctx, step, cay.StateRunning, cay.StateStarting, cay.StateEnded)
		f.must(err)
		same(f, "moved", 2, n)
		for i := range before {
			if i < 2 {
				before[i].Deadline, before[i].MaxDeadline = before[i].Deadline.Add(step), before[i].MaxDeadline.Add(step)
			}
			got, err := f.FindSandbox(ctx, "", before[i].ID)
			f.must(err)
			same(f, string(states[i]), before[i], got)
		}
	}
	n, err := f.MoveDeadlines(ctx, time.Hour, cay.StatePausing)
	f.must(err)
	same(f, "moved where there are none", 0, n)
}

func prune(f fixture) {
	ctx := f.Context()
	f.base(1)
	for i := range 5 {
		f.add(newSandbox(i, 0))
	}
	for i := range 3 {
		f.set(sandboxID(i), end(kept.Add(time.Duration(i)*time.Hour)))
	}
	n, err := f.PruneSandboxes(ctx, kept)
	f.must(err)
	same(f, "pruned at the instant of the first end", 0, n)
	n, err = f.PruneSandboxes(ctx, kept.Add(2*time.Hour))
	f.must(err)
	same(f, "pruned", 2, n)
	for i, code := range []cay.Code{cay.CodeSandboxNotFound, cay.CodeSandboxNotFound, "", "", ""} {
		if _, err := f.FindSandbox(ctx, "", sandboxID(i)); cay.CodeOf(err) != code {
			f.Errorf("sandbox %d after pruning: %v, want %q", i, err, code)
		}
	}
	// However late: what lives stays.
	n, err = f.PruneSandboxes(ctx, kept.Add(1e6*time.Hour))
	f.must(err)
	same(f, "pruned in the far future", 1, n)
	same(f, "live", numbered(4, 3), ids(f.list(store.SandboxFilter{})))
	f.add(newSandbox(0, 0)) // the ID is free
}
