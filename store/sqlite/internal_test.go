package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

func opened(t *testing.T) *Store {
	t.Helper()
	s := New(filepath.Join(t.TempDir(), "cay.db"))
	s.busy = 20 * time.Millisecond
	if err := s.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// TestBusy: another process keeps the file for longer than we wait.
func TestBusy(t *testing.T) {
	s := opened(t)
	other, err := s.connect(map[string][]string{"_txlock": {"immediate"}}, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	tx, err := other.Begin()
	if err != nil {
		t.Fatal(err)
	}
	team := cay.Team{ID: "t", Slug: "t"}
	if err := s.PutTeam(t.Context(), team); cay.CodeOf(err) != cay.CodeStoreUnavailable || !strings.Contains(err.Error(), "another process") {
		t.Errorf("PutTeam while another process writes: %v", err)
	}
	if _, err := s.ListTeams(t.Context()); err != nil {
		t.Errorf("reading while another process writes: %v", err)
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	if err := s.PutTeam(t.Context(), team); err != nil {
		t.Errorf("PutTeam afterwards: %v", err)
	}
}

// TestTurn: the wait for the writer's turn ends with the context.
func TestTurn(t *testing.T) {
	s := opened(t)
	held, err := s.open.write.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := s.PutTeam(ctx, cay.Team{ID: "t", Slug: "t"}); cay.CodeOf(err) != cay.CodeStoreUnavailable {
		t.Errorf("PutTeam behind a writer: %v", err)
	}
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err := s.ListTeams(t.Context()); err != nil || len(l) != 0 {
		t.Errorf("teams %v, %v", l, err)
	}
}

// TestBegun: a transaction that has begun ends, whatever becomes of the
// context, so that nobody has to guess whether it took place.
func TestBegun(t *testing.T) {
	s := opened(t)
	if err := s.PutTeam(t.Context(), cay.Team{ID: "t", Slug: "t"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.PublishBuild(t.Context(), "t", true, cay.Manifest{Build: "b", Template: "p", Name: "base"}); err != nil {
		t.Fatal(err)
	}
	if err := s.AddSandbox(t.Context(), store.Sandbox{ID: "i1", Team: "t", Template: "p", Build: "b", State: cay.StateStarting}, 1); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	got, err := s.UpdateSandbox(ctx, "i1", func(sb *store.Sandbox) error {
		cancel()
		sb.State = cay.StateRunning
		return nil
	})
	if err != nil || got.State != cay.StateRunning {
		t.Errorf("UpdateSandbox, cancelled midway: %q, %v", got.State, err)
	}
	if got, err = s.FindSandbox(t.Context(), "t", "i1"); err != nil || got.State != cay.StateRunning {
		t.Errorf("recorded: %q, %v", got.State, err)
	}
}

// TestFlush: what a client is told of is flushed, what changes nothing is not.
func TestFlush(t *testing.T) {
	s, ctx := opened(t), t.Context()
	flushes, fails := 0, error(nil)
	s.open.flush.sync = func() error { flushes++; return fails }
	sb := store.Sandbox{ID: "i1", Team: "t", Template: "p", Build: "b", State: cay.StateStarting}
	key := store.Key{ID: "k", Team: "t", Hash: make([]byte, 32)}
	manifest := cay.Manifest{Build: "b", Template: "p", Name: "base"}
	run := func(sb *store.Sandbox) error { sb.State = cay.StateRunning; return nil }
	for _, c := range []struct {
		name string
		want int
		f    func() error
	}{
		{"PutTeam", 1, func() error { return s.PutTeam(ctx, cay.Team{ID: "t", Slug: "t"}) }},
		{"AddKey", 1, func() error { return s.AddKey(ctx, key) }},
		{"RenameKey", 1, func() error { return s.RenameKey(ctx, "t", "k", "name") }},
		{"TouchKey", 0, func() error { return s.TouchKey(ctx, "k", time.Now()) }},
		{"DeleteKey", 1, func() error { return s.DeleteKey(ctx, "t", "k") }},
		{"PublishBuild", 1, func() error { _, err := s.PublishBuild(ctx, "t", true, manifest); return err }},
		{"SetTemplatePublic", 1, func() error { return s.SetTemplatePublic(ctx, "t", "p", false) }},
		{"AddSandbox", 0, func() error { return s.AddSandbox(ctx, sb, 1) }},
		{"UpdateSandbox", 1, func() error { _, err := s.UpdateSandbox(ctx, "i1", run); return err }},
		{"UpdateSandbox of nothing", 0, func() error { _, err := s.UpdateSandbox(ctx, "i1", run); return err }},
		{"FindSandbox", 0, func() error { _, err := s.FindSandbox(ctx, "t", "i1"); return err }},
		{"MoveDeadlines", 1, func() error { _, err := s.MoveDeadlines(ctx, time.Hour, cay.StateRunning); return err }},
		{"PruneSandboxes", 0, func() error { _, err := s.PruneSandboxes(ctx, time.Now()); return err }},
	} {
		flushes = 0
		if err := c.f(); err != nil || flushes != c.want {
			t.Errorf("%s: %d flushes, want %d (%v)", c.name, flushes, c.want, err)
		}
	}
	for _, fails = range []error{unix.EIO, unix.ENOSPC} {
		err := s.PutTeam(ctx, cay.Team{ID: "u", Slug: fails.Error()})
		want := map[error]cay.Code{unix.EIO: cay.CodeStoreUnavailable, unix.ENOSPC: cay.CodeDiskFull}[fails]
		if cay.CodeOf(err) != want || !errors.Is(err, fails) || !strings.Contains(err.Error(), "loss of power") {
			t.Errorf("PutTeam on a disk that fails to flush: %v", err)
		}
	}
}

// TestFlushShared: a flush serves those that wrote before it began, and no
// more flushes are made than that needs.
func TestFlushShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var written, onDisk, flushes atomic.Int64
		f := newFlusher()
		f.sync = func() error {
			n := written.Load() // what is written during a flush may miss it
			flushes.Add(1)
			time.Sleep(time.Second)
			onDisk.Store(n)
			return nil
		}
		write := func() {
			n := written.Add(1)
			if err := f.flush(); err != nil || onDisk.Load() < n {
				t.Errorf("write %d returned with %d on the disk, %v", n, onDisk.Load(), err)
			}
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(write)
			time.Sleep(time.Millisecond) // all during the first flush
		}
		wg.Wait()
		if n := flushes.Load(); n != 2 {
			t.Errorf("50 writes at a time took %d flushes, want 2", n)
		}
		write()
		if n := flushes.Load(); n != 3 {
			t.Errorf("a write afterwards took %d flushes, want 1", n-2)
		}
	})
}

// TestFlushFile: what is flushed is the WAL in use, whatever became of connections.
func TestFlushFile(t *testing.T) {
	s := opened(t)
	for range 3 {
		for _, db := range []*sql.DB{s.open.write, s.open.read} {
			db.SetMaxIdleConns(-1) // closes those that are idle
			db.SetMaxIdleConns(1)
		}
		if err := s.PutTeam(t.Context(), cay.Team{ID: "t", Slug: "t"}); err != nil {
			t.Fatal(err)
		}
	}
	ours, err := s.open.flush.file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	used, err := os.Stat(s.path + "-wal")
	if err != nil || !os.SameFile(ours, used) || ours.Size() == 0 {
		t.Errorf("the WAL in use is another file (%v)", err)
	}
}

// TestConnections: the reading ones cannot write, and none lets go of a reference.
func TestConnections(t *testing.T) {
	s := opened(t)
	if _, err := s.open.read.ExecContext(t.Context(), "DELETE FROM teams"); err == nil {
		t.Error("a reading connection wrote")
	}
	for _, db := range []*sql.DB{s.open.read, s.open.write} {
		for pragma, want := range map[string]string{"foreign_keys": "1", "journal_mode": "wal", "busy_timeout": "20"} {
			var got string
			if err := db.QueryRowContext(t.Context(), "PRAGMA "+pragma).Scan(&got); err != nil || got != want {
				t.Errorf("%s = %s, %v; want %s", pragma, got, err, want)
			}
		}
	}
}

// TestPlans: no query reads a table from end to end, but for those that list it.
func TestPlans(t *testing.T) {
	s := opened(t)
	scans := map[string]string{
		"ListTeams": "it lists all",
		"CountAny":  "ended ones too, and only operators ask",
	}
	sorts := map[string]string{"ResolveTemplate": "the namesakes only"}
	for _, file := range []string{"teams", "templates", "sandboxes"} {
		text, err := os.ReadFile("queries/" + file + ".sql")
		if err != nil {
			t.Fatal(err)
		}
		queries := strings.Split(string(text), "-- name: ")[1:]
		if len(queries) == 0 {
			t.Fatalf("no query in %s", file)
		}
		for _, q := range queries {
			name, _, _ := strings.Cut(q, " ")
			_, body, _ := strings.Cut(q, "\n")
			body = regexp.MustCompile(`sqlc\.embed\((\w+)\)`).ReplaceAllString(body, "$1.*")
			plan, err := explain(t.Context(), s.open.read, body)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			for _, step := range plan {
				if scans[name] == "" && regexp.MustCompile(`^SCAN \w+( USING INDEX sqlite_autoindex\w+)?$`).MatchString(step) {
					t.Errorf("%s: %s\nplan: %s", name, step, strings.Join(plan, "\n      "))
				}
				if sorts[name] == "" && strings.Contains(step, "TEMP B-TREE") {
					t.Errorf("%s sorts: %s\nplan: %s", name, step, strings.Join(plan, "\n      "))
				}
			}
		}
	}
}

func explain(ctx context.Context, db *sql.DB, query string) ([]string, error) {
	var args []any
	for _, name := range regexp.MustCompile(`@\w+`).FindAllString(query, -1) {
		args = append(args, sql.Named(name[1:], nil))
	}
	rows, err := db.QueryContext(ctx, "EXPLAIN QUERY PLAN "+query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		var id, parent, unused int
		var step string
		if err := rows.Scan(&id, &parent, &unused, &step); err != nil {
			return nil, fmt.Errorf("reading the plan: %w", err)
		}
		out = append(out, step)
	}
	return out, rows.Err()
}
