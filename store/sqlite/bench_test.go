package sqlite_test

import (
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
	"github.com/cayhq/cay/store/sqlite"
)

// timed runs f b.N times and reports percentiles: a mean hides the flushes and
// the times the WAL is folded into the file.
func timed(b *testing.B, f func(i int) error) {
	b.Helper()
	took := make([]time.Duration, 0, b.N)
	for i := 0; b.Loop(); i++ {
		from := time.Now()
		if err := f(i); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(from))
	}
	slices.Sort(took)
	for name, at := range map[string]int{"p50-µs": 50, "p95-µs": 95, "p99-µs": 99} {
		b.ReportMetric(float64(took[(len(took)-1)*at/100].Nanoseconds())/1e3, name)
	}
}

func prepared(b *testing.B) *sqlite.Store {
	s := open(b, file(b))
	ready(b, s)
	return s
}

func running(sb *store.Sandbox) error {
	sb.State, sb.StartedAt = cay.StateRunning, sb.StartedAt.Add(time.Millisecond)
	return nil
}

func BenchmarkAddSandbox(b *testing.B) {
	// Many teams: the limit is counted among a team's own.
	const teams = 500
	s := prepared(b)
	for i := range teams {
		id := fmt.Sprintf("t%d", i)
		if err := s.PutTeam(b.Context(), cay.Team{ID: cay.TeamID(id), Slug: id}); err != nil {
			b.Fatal(err)
		}
	}
	timed(b, func(i int) error {
		sb := newSandbox(i)
		sb.Team = cay.TeamID(fmt.Sprintf("t%d", i%teams))
		return s.AddSandbox(b.Context(), sb, 200)
	})
}

func BenchmarkUpdateSandbox(b *testing.B) {
	s := prepared(b)
	if err := s.AddSandbox(b.Context(), newSandbox(0), 1); err != nil {
		b.Fatal(err)
	}
	timed(b, func(i int) error {
		_, err := s.UpdateSandbox(b.Context(), newSandbox(0).ID, running)
		return err
	})
}

// BenchmarkLife is what the record costs a sandbox: made, running, ended.
func BenchmarkLife(b *testing.B) {
	s := prepared(b)
	timed(b, func(i int) error {
		sb := newSandbox(i)
		if err := s.AddSandbox(b.Context(), sb, 10); err != nil {
			return err
		}
		if _, err := s.UpdateSandbox(b.Context(), sb.ID, running); err != nil {
			return err
		}
		_, err := s.UpdateSandbox(b.Context(), sb.ID, func(sb *store.Sandbox) error {
			sb.State, sb.EndedAt, sb.EndReason = cay.StateEnded, sb.StartedAt, cay.EndRequest
			return nil
		})
		return err
	})
}

// BenchmarkCreateParallel is the two writes of a create, from many clients.
func BenchmarkCreateParallel(b *testing.B) {
	s := prepared(b)
	var n atomic.Int64
	b.SetParallelism(16)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			sb := newSandbox(int(n.Add(1)))
			if err := s.AddSandbox(b.Context(), sb, 1<<30); err != nil {
				b.Error(err)
				return
			}
			if _, err := s.UpdateSandbox(b.Context(), sb.ID, running); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkFindKey(b *testing.B) {
	s := prepared(b)
	hash := make([]byte, 32)
	for i := range 200 {
		hash[0] = byte(i)
		k := store.Key{ID: store.KeyID(string(rune('a' + i))), Team: "t", Name: "k", Hash: hash, CreatedAt: time.Now()}
		if err := s.AddKey(b.Context(), k); err != nil {
			b.Fatal(err)
		}
	}
	timed(b, func(i int) error {
		_, _, err := s.FindKey(b.Context(), hash)
		return err
	})
}

func BenchmarkFindSandbox(b *testing.B) {
	s := open(b, filled(b, 2000))
	timed(b, func(i int) error {
		_, err := s.FindSandbox(b.Context(), "t", newSandbox(i%2000).ID)
		return err
	})
}

func BenchmarkListSandboxes(b *testing.B) {
	s := open(b, filled(b, 2000))
	timed(b, func(i int) error {
		l, err := s.ListSandboxes(b.Context(), store.SandboxFilter{Team: "t", Limit: 100,
			States: []cay.SandboxState{cay.StateStarting}, Metadata: map[string]string{"user": "ada"}})
		if err == nil && len(l) != 100 {
			b.Fatalf("%d sandboxes", len(l))
		}
		return err
	})
}

// BenchmarkOpen is what a start pays for the check of every page.
func BenchmarkOpen(b *testing.B) {
	path := filled(b, 20_000)
	s := sqlite.New(path)
	timed(b, func(int) error {
		if err := s.Open(b.Context()); err != nil {
			return err
		}
		return s.Close()
	})
}
