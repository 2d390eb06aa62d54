package sqlite

import (
	"context"
	"database/sql"
	"embed"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"strings"

	"github.com/pressly/goose/v3"

	"github.com/cayhq/cay"
)

//go:embed migrations/*.sql
var migrations embed.FS

func provider(db *sql.DB) (*goose.Provider, error) {
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, err
	}
	return goose.NewProvider(goose.DialectSQLite3, db, dir, goose.WithDisableGlobalRegistry(true))
}

// migrate applies what is missing, each migration in a transaction of its own.
func migrate(ctx context.Context, db *sql.DB) error {
	p, err := provider(db)
	if err != nil {
		return err
	}
	_, err = p.Up(ctx)
	return err
}

// newest is the schema version that this build makes.
func newest(db *sql.DB) (int64, error) {
	p, err := provider(db)
	if err != nil {
		return 0, err
	}
	var v int64
	for _, s := range p.ListSources() {
		v = max(v, s.Version)
	}
	return v, nil
}

// inspect refuses a file that this build must not touch: damaged, of another
// program, or of a newer Cay. It reads only.
func (s *Store) inspect(ctx context.Context) error {
	if fi, err := os.Stat(s.path); err != nil || fi.Size() == 0 {
		return err
	}
	db, err := s.connect(url.Values{"mode": {"ro"}, "_query_only": {"1"}}, 1)
	if err != nil {
		return err
	}
	defer db.Close()
	if err := s.checkDamage(ctx, db); err != nil {
		return err
	}
	var tables, versioned int
	err = db.QueryRowContext(ctx, `SELECT count(*), count(*) FILTER (WHERE name = 'goose_db_version') FROM sqlite_schema`).
		Scan(&tables, &versioned)
	if err != nil || tables == 0 {
		return err
	}
	if versioned == 0 {
		return &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerStorage,
			Message: s.path + " is a database of another program",
			Fix:     "move the file away, or give Cay another data directory"}
	}
	var has int64
	if err := db.QueryRowContext(ctx, `SELECT coalesce(max(version_id), 0) FROM goose_db_version WHERE is_applied`).Scan(&has); err != nil {
		return err
	}
	want, err := newest(db)
	if err != nil {
		return err
	}
	if has > want {
		return &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerStorage,
			Message: fmt.Sprintf("the database %s was written by a newer Cay: its schema is version %d and this build (%s) knows up to %d", s.path, has, cay.Version, want),
			Fix:     "start the newer Cay again, or restore the backup made before the upgrade; nothing was changed"}
	}
	return nil
}

// checkDamage compares every page with its neighbours, without the indexes.
func (s *Store) checkDamage(ctx context.Context, db *sql.DB) error {
	rows, err := db.QueryContext(ctx, "PRAGMA quick_check(3)")
	if err != nil {
		return err
	}
	defer rows.Close()
	var found []string
	for rows.Next() {
		var line string
		if err := rows.Scan(&line); err != nil {
			return err
		}
		if line != "ok" {
			found = append(found, line)
		}
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if len(found) > 0 {
		return s.damaged(strings.Join(found, "; "), nil)
	}
	return nil
}
