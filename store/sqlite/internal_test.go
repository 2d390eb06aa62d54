package sqlite

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay"
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
	p, err := s.pools()
	if err != nil {
		t.Fatal(err)
	}
	held, err := p.write.Conn(t.Context())
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

// TestFlush: what a client is told of is flushed, whatever was written before.
func TestFlush(t *testing.T) {
	s := opened(t)
	p, err := s.pools()
	if err != nil {
		t.Fatal(err)
	}
	level := func() (n int) {
		if err := p.write.QueryRowContext(t.Context(), "PRAGMA synchronous").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	const normal, full = 1, 2
	if level() != full {
		t.Errorf("synchronous is %d after Open, want FULL", level())
	}
	for range 2 {
		if _, err := s.PruneSandboxes(t.Context(), time.Now()); err != nil {
			t.Fatal(err)
		}
		if level() != normal {
			t.Errorf("synchronous is %d in PruneSandboxes, want NORMAL", level())
		}
		if err := s.PutTeam(t.Context(), cay.Team{ID: "t", Slug: "t"}); err != nil {
			t.Fatal(err)
		}
		if level() != full {
			t.Errorf("synchronous is %d in PutTeam, want FULL", level())
		}
	}
	// The reading connections cannot write, and no connection lets go of references.
	if _, err := p.read.ExecContext(t.Context(), "DELETE FROM teams"); err == nil {
		t.Error("a reading connection wrote")
	}
	for _, db := range []*sql.DB{p.read, p.write} {
		var on int
		if err := db.QueryRowContext(t.Context(), "PRAGMA foreign_keys").Scan(&on); err != nil || on != 1 {
			t.Errorf("foreign_keys = %d, %v", on, err)
		}
	}
}

// TestPlans: no query reads a table from end to end, but for those that list it.
func TestPlans(t *testing.T) {
	s := opened(t)
	p, err := s.pools()
	if err != nil {
		t.Fatal(err)
	}
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
			plan, err := explain(t.Context(), p.read, body)
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
