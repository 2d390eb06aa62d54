package storetest

import (
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

func teams(f fixture) {
	ctx := f.Context()
	l, err := f.ListTeams(ctx)
	f.must(err)
	same(f, "teams of an empty store", 0, len(l))
	_, err = f.Team(ctx, teamID(0))
	f.code(err, cay.CodeNotFound)

	f.teams(3)
	got, err := f.Team(ctx, teamID(1))
	f.must(err)
	same(f, "team", newTeam(1), got)

	changed := newTeam(0)
	changed.Name, changed.Slug, changed.Limits = "Ünï", "new-slug", cay.TeamLimits{ConcurrentSandboxes: 1, MaxLengthHours: 2,
		Network: cay.NetworkLimits{Connections: 3, PerSecond: 4, Mbit: 5}}
	f.must(f.PutTeam(ctx, changed))
	l, err = f.ListTeams(ctx)
	f.must(err)
	same(f, "teams, oldest first, one replaced", []cay.Team{changed, newTeam(1), newTeam(2)}, l)

	thief := newTeam(2)
	thief.Slug = newTeam(1).Slug
	f.code(f.PutTeam(ctx, thief), cay.CodeConflict)
	fresh := newTeam(7)
	fresh.Slug = newTeam(1).Slug
	f.code(f.PutTeam(ctx, fresh), cay.CodeConflict)
	l, err = f.ListTeams(ctx)
	f.must(err)
	same(f, "teams after conflicts", []cay.Team{changed, newTeam(1), newTeam(2)}, l)
}

func keys(f fixture) {
	ctx := f.Context()
	f.teams(2)
	_, _, err := f.FindKey(ctx, hash(1))
	f.code(err, cay.CodeKeyNotFound)

	first := newKey(1, 0)
	first.CreatedAt = noon.Add(-time.Hour)
	f.must(f.AddKey(ctx, first))
	first.CreatedAt = kept.Add(-time.Hour)
	k, team, err := f.FindKey(ctx, hash(1))
	f.must(err)
	same(f, "key", first, k)
	same(f, "the key's team", newTeam(0), team)

	// Keys of one instant are in the order of their IDs.
	a, b := newKey(2, 0), newKey(3, 0)
	if a.ID > b.ID {
		a, b = b, a
	}
	f.must(f.AddKey(ctx, b))
	f.must(f.AddKey(ctx, a))
	f.must(f.AddKey(ctx, newKey(4, 1)))
	l, err := f.ListKeys(ctx, teamID(0))
	f.must(err)
	same(f, "keys, oldest first", []store.Key{first, a, b}, l)

	f.must(f.RenameKey(ctx, teamID(0), first.ID, "renamed"))
	k, _, err = f.FindKey(ctx, hash(1))
	f.must(err)
	same(f, "name", "renamed", k.Name)

	f.must(f.DeleteKey(ctx, teamID(0), first.ID))
	_, _, err = f.FindKey(ctx, hash(1))
	f.code(err, cay.CodeKeyNotFound)
	f.code(f.DeleteKey(ctx, teamID(0), first.ID), cay.CodeKeyNotFound)
	f.code(f.RenameKey(ctx, teamID(0), first.ID, "x"), cay.CodeKeyNotFound)
	l, err = f.ListKeys(ctx, teamID(0))
	f.must(err)
	same(f, "keys after a deletion", []store.Key{a, b}, l)
}

func keyConflicts(f fixture) {
	ctx := f.Context()
	f.teams(2)
	f.must(f.AddKey(ctx, newKey(1, 0)))
	sameID := newKey(1, 1)
	sameID.Hash = hash(2)
	f.code(f.AddKey(ctx, sameID), cay.CodeConflict)
	sameHash := newKey(2, 1)
	sameHash.Hash = hash(1)
	f.code(f.AddKey(ctx, sameHash), cay.CodeConflict)
	f.code(f.AddKey(ctx, newKey(3, 9)), cay.CodeNotFound)
	for _, h := range [][]byte{nil, hash(1)[:31], append(hash(1), 0)} {
		bad := newKey(4, 0)
		bad.Hash = h
		f.code(f.AddKey(ctx, bad), cay.CodeInternal)
		_, _, err := f.FindKey(ctx, h)
		f.code(err, cay.CodeKeyNotFound)
	}
	k, team, err := f.FindKey(ctx, hash(1))
	f.must(err)
	same(f, "key after conflicts", newKey(1, 0), k)
	same(f, "its team", teamID(0), team.ID)
}

func keyUse(f fixture) {
	ctx := f.Context()
	f.teams(1)
	f.must(f.AddKey(ctx, newKey(1, 0)))
	used := func(want time.Time) {
		f.Helper()
		k, _, err := f.FindKey(ctx, hash(1))
		f.must(err)
		if !k.LastUsed.Equal(want) {
			f.Fatalf("last used %v, want %v", k.LastUsed, want)
		}
	}
	used(time.Time{})
	minute := noon.Truncate(time.Minute)
	f.must(f.TouchKey(ctx, keyID(1), noon))
	used(minute)
	f.must(f.TouchKey(ctx, keyID(1), minute.Add(59*time.Second)))
	used(minute)
	f.must(f.TouchKey(ctx, keyID(1), minute.Add(60*time.Second)))
	used(minute.Add(time.Minute))
	f.must(f.TouchKey(ctx, keyID(1), noon.Add(-time.Hour)))
	used(minute.Add(time.Minute))
	f.must(f.TouchKey(ctx, keyID(9), noon))

	moved := newKey(2, 0)
	moved.LastUsed = noon
	f.must(f.AddKey(ctx, moved))
	k, _, err := f.FindKey(ctx, hash(2))
	f.must(err)
	same(f, "last use of a key that was added with one", minute.UTC(), k.LastUsed)
}
