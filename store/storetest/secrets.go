package storetest

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

func secretID(n int) cay.SecretID { return cay.SecretID(fmt.Sprintf("sec_%020d", n)) }

// newSecret is secret n of a team, called "secret-n".
func newSecret(n, team int) store.Secret {
	at := kept.Add(time.Duration(n) * time.Minute)
	return store.Secret{ID: secretID(n), Team: teamID(team), Name: fmt.Sprintf("secret-%d", n), Version: 1, CreatedAt: at, UpdatedAt: at}
}

func value(key string, n int) store.Sealed {
	return store.Sealed{Key: key, Data: []byte{0, 0xff, byte(n)}}
}

func secretRoundTrip(f fixture) {
	ctx := f.Context()
	f.base(2)
	s := newSecret(1, 0)
	s.Metadata = map[string]string{"a": "<b>"}
	s.CreatedAt, s.UpdatedAt = noon, noon
	f.must(f.AddSecret(ctx, s, value("k1", 1)))
	s.CreatedAt, s.UpdatedAt = kept, kept
	for _, ref := range []string{string(s.ID), s.Name} {
		got, v, err := f.FindSecret(ctx, teamID(0), ref)
		f.must(err)
		same(f, "secret", s, got)
		same(f, "value", value("k1", 1), v)
	}
	f.code(f.AddSecret(ctx, newSecret(1, 0), value("k1", 1)), cay.CodeConflict)
	again := newSecret(2, 0)
	again.Name = s.Name
	f.code(f.AddSecret(ctx, again, value("k1", 1)), cay.CodeConflict)
	f.code(f.AddSecret(ctx, newSecret(3, 9), value("k1", 1)), cay.CodeNotFound)

	// Another team has the same name, and neither sees the other's.
	other := newSecret(2, 1)
	other.Name = s.Name
	f.must(f.AddSecret(ctx, other, value("k1", 2)))
	_, v, err := f.FindSecret(ctx, teamID(1), s.Name)
	f.must(err)
	same(f, "the other team's value", value("k1", 2), v)
	for _, ref := range []string{string(s.ID), "nothing", ""} {
		_, _, err := f.FindSecret(ctx, teamID(1), ref)
		f.code(err, cay.CodeNotFound)
		f.code(f.DeleteSecret(ctx, teamID(1), ref), cay.CodeNotFound)
		_, err = f.UpdateSecret(ctx, teamID(1), ref, func(*store.Secret) (store.Sealed, error) {
			f.Error("a secret that is not there is sealed")
			return store.Sealed{}, nil
		})
		f.code(err, cay.CodeNotFound)
	}

	f.must(f.DeleteSecret(ctx, teamID(0), s.Name))
	f.code(f.DeleteSecret(ctx, teamID(0), s.Name), cay.CodeNotFound)
	_, _, err = f.FindSecret(ctx, teamID(0), string(s.ID))
	f.code(err, cay.CodeNotFound)
	_, _, err = f.FindSecret(ctx, teamID(1), s.Name)
	f.must(err)
	f.must(f.DeleteSecret(ctx, teamID(1), string(other.ID)))
}

func secretVersions(f fixture) {
	ctx := f.Context()
	f.base(1)
	s := newSecret(1, 0)
	s.Metadata = map[string]string{"a": "b"}
	f.must(f.AddSecret(ctx, s, value("k1", 1)))

	got, err := f.UpdateSecret(ctx, teamID(0), s.Name, func(n *store.Secret) (store.Sealed, error) {
		if n.ID != s.ID || n.Version != 2 || n.Metadata["a"] != "b" {
			f.Errorf("sealing gets %+v", *n)
		}
		n.UpdatedAt = noon
		return value("k2", 2), nil
	})
	f.must(err)
	s.Version, s.UpdatedAt = 2, kept
	same(f, "updated", s, got)
	found, v, err := f.FindSecret(ctx, teamID(0), string(s.ID))
	f.must(err)
	same(f, "found", s, found)
	same(f, "value", value("k2", 2), v)

	got, err = f.UpdateSecret(ctx, teamID(0), string(s.ID), func(n *store.Secret) (store.Sealed, error) {
		n.Metadata = nil
		return value("k2", 3), nil
	})
	f.must(err)
	if got.Metadata != nil || got.Version != 3 {
		f.Errorf("updated: %+v", got)
	}
	broken := errors.New("broken")
	if _, err := f.UpdateSecret(ctx, teamID(0), s.Name, func(*store.Secret) (store.Sealed, error) { return value("k9", 9), broken }); !errors.Is(err, broken) {
		f.Errorf("an error of sealing comes back as %v", err)
	}
	_, v, err = f.FindSecret(ctx, teamID(0), s.Name)
	f.must(err)
	same(f, "value after an error", value("k2", 3), v)

	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			_, err := f.UpdateSecret(ctx, teamID(0), s.Name, func(n *store.Secret) (store.Sealed, error) {
				return value("k2", int(n.Version)), nil
			})
			if err != nil {
				f.Error(err)
			}
		})
	}
	wg.Wait()
	found, v, err = f.FindSecret(ctx, teamID(0), s.Name)
	f.must(err)
	if found.Version != 23 {
		f.Errorf("after 22 updates the version is %d", found.Version)
	}
	same(f, "the value of the last version", value("k2", 23), v)
}

func secretLists(f fixture) {
	ctx := f.Context()
	f.base(2)
	for n := 1; n <= 5; n++ {
		f.must(f.AddSecret(ctx, newSecret(n, 0), value("k1", n)))
	}
	f.must(f.AddSecret(ctx, newSecret(6, 1), value("k1", 6)))
	twin := newSecret(7, 0) // of the same instant as number 3
	twin.CreatedAt = newSecret(3, 0).CreatedAt
	f.must(f.AddSecret(ctx, twin, value("k1", 7)))
	var seen []cay.SecretID
	var after store.Cursor
	for {
		l, err := f.ListSecrets(ctx, teamID(0), after, 2)
		f.must(err)
		if len(l) == 0 {
			break
		}
		for _, s := range l {
			seen = append(seen, s.ID)
		}
		after = store.Cursor{At: l[len(l)-1].CreatedAt, ID: string(l[len(l)-1].ID)}
	}
	same(f, "pages", []cay.SecretID{secretID(5), secretID(4), secretID(7), secretID(3), secretID(2), secretID(1)}, seen)
	all, err := f.ListSecrets(ctx, teamID(1), store.Cursor{}, 0)
	f.must(err)
	same(f, "the other team's", []store.Secret{newSecret(6, 1)}, all)
	none, err := f.ListSecrets(ctx, teamID(9), store.Cursor{}, 0)
	f.must(err)
	if len(none) != 0 {
		f.Errorf("a team that is not there has %d secrets", len(none))
	}
}

func secretsResealed(f fixture) {
	ctx := f.Context()
	f.base(2)
	const many = 150
	for n := range many {
		key := "k1"
		if n%10 == 0 {
			key = "k2"
		}
		f.must(f.AddSecret(ctx, newSecret(n, n%2), value(key, n)))
	}
	count := 0
	f.must(f.ResealSecrets(ctx, "k2", func(s store.Secret, v store.Sealed) (store.Sealed, error) {
		if v.Key != "k1" || s.Version != 1 {
			f.Errorf("given to seal anew: %+v under %s", s, v.Key)
		}
		count++
		return store.Sealed{Key: "k2", Data: append(v.Data, 'x')}, nil
	}))
	if count != many*9/10 {
		f.Errorf("%d values were given to seal anew, want %d", count, many*9/10)
	}
	for _, n := range []int{0, 1, many - 1} {
		s, v, err := f.FindSecret(ctx, teamID(n%2), string(secretID(n)))
		f.must(err)
		want := value("k2", n)
		if n%10 != 0 {
			want.Data = append(want.Data, 'x')
		}
		same(f, "value", want, v)
		same(f, "record", newSecret(n, n%2), s)
	}
	f.must(f.ResealSecrets(ctx, "k2", func(store.Secret, store.Sealed) (store.Sealed, error) {
		f.Error("what is under the key already is sealed anew")
		return store.Sealed{}, nil
	}))
	broken := errors.New("broken")
	err := f.ResealSecrets(ctx, "k3", func(s store.Secret, v store.Sealed) (store.Sealed, error) {
		if s.ID == secretID(5) {
			return store.Sealed{}, broken
		}
		return store.Sealed{Key: "k3", Data: v.Data}, nil
	})
	if !errors.Is(err, broken) {
		f.Errorf("an error of sealing comes back as %v", err)
	}
	for n, want := range map[int]string{4: "k3", 5: "k2", 6: "k3", many - 1: "k3"} {
		if _, v, err := f.FindSecret(ctx, teamID(n%2), string(secretID(n))); err != nil || v.Key != want {
			f.Errorf("after an error with another, secret %d is under %s (%v), want %s", n, v.Key, err, want)
		}
	}
}
