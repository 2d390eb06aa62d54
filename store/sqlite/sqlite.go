// Package sqlite keeps the record in one SQLite file, for one machine.
//
// The file is in WAL mode: readers never wait for the writer. One connection
// writes and several read. A commit is in the page cache before a method
// returns, so it survives a kill -9 of the process whatever happens next.
//
// Against a loss of power a commit is also flushed to the disk, but for those
// that the contract names. A flush is the dear part: measured on a virtual disk,
// 0.2 ms when it is idle and 4 to 15 ms when it is busy, beside 0.2 ms for the
// rest of a write. So a create pays for one and not for two; the writing connection does not
// wait for it, and all who wait at one time share one (see flusher). What was
// not flushed is lost from the end, whole commits at a time: a loss of power
// never damages the file. A disk that fails a flush is an error of the method,
// and then alone the change may be in place after an error.
package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"time"

	_ "modernc.org/sqlite" // the driver "sqlite"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/sqlite"
	"github.com/cayhq/cay/store"
)

// Store is a [store.Store] in a file.
type Store struct {
	// Now is the clock for a template's CreatedAt and UpdatedAt.
	Now func() time.Time

	path string
	busy time.Duration // how long to wait for another process, a backup say
	mu   sync.RWMutex  // held for reading by every call, for writing by Open and Close
	open *pools
}

var _ store.Store = (*Store)(nil)

// New returns a store for the file at path, which Open makes if it is absent.
// Its directory must exist. Beside it are path-wal and path-shm: the three
// belong together.
func New(path string) *Store { return &Store{Now: time.Now, path: path, busy: 5 * time.Second} }

type pools struct {
	write, read *sql.DB
	// pin keeps the WAL: SQLite removes it with its last connection.
	pin   *sql.Conn
	flush *flusher
}

func (p *pools) close() error {
	// The writer goes last: the last connection folds the WAL into the file,
	// which a reading one may not.
	var pinned error
	if p.pin != nil {
		pinned = p.pin.Close()
	}
	return errors.Join(pinned, p.read.Close(), p.write.Close(), p.flush.close())
}

// dsn names the file to the driver. The path is escaped, since the driver takes
// what follows a question mark for options.
func (s *Store) dsn(options url.Values) (string, error) {
	abs, err := filepath.Abs(s.path)
	if err != nil {
		return "", err
	}
	options.Set("_busy_timeout", strconv.FormatInt(s.busy.Milliseconds(), 10))
	options.Set("_foreign_keys", "1")
	options.Set("_dqs", "0")
	options.Set("_error_rc", "1")
	return (&url.URL{Scheme: "file", Path: abs, RawQuery: options.Encode()}).String(), nil
}

func (s *Store) connect(options url.Values, conns int) (*sql.DB, error) {
	dsn, err := s.dsn(options)
	if err != nil {
		return nil, err
	}
	db, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return db, nil
}

// Open implements [store.Store]. It reads the whole file once, to refuse a
// damaged one at the start and not in the middle of the day.
func (s *Store) Open(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open != nil {
		return internal("the database " + s.path + " is open already")
	}
	if err := s.create(); err != nil {
		return s.fail("make the database", err)
	}
	if err := s.inspect(ctx); err != nil {
		return s.fail("check the database", err)
	}
	p, err := s.pools()
	if err != nil {
		return s.fail("open the database", err)
	}
	if err := migrate(ctx, p.write); err != nil {
		return s.fail("bring the database to this version", errors.Join(err, p.close()))
	}
	if p.pin, err = p.read.Conn(ctx); err == nil {
		err = s.checkWAL(ctx, p.pin)
	}
	if err != nil {
		return s.fail("open the database", errors.Join(err, p.close()))
	}
	if p.flush.file, err = os.OpenFile(s.path+"-wal", os.O_RDWR, 0); err != nil {
		return s.fail("open the database", errors.Join(err, p.close()))
	}
	s.open = p
	return nil
}

func (s *Store) pools() (*pools, error) {
	p := &pools{flush: newFlusher()}
	var err error
	p.write, err = s.connect(url.Values{
		"mode":          {"rw"},
		"_journal_mode": {"WAL"},
		"_synchronous":  {"NORMAL"}, // a commit is flushed by p.flush
		"_txlock":       {"immediate"},
		"_pragma":       {"journal_size_limit(16777216)"},
	}, 1)
	if err != nil {
		return nil, err
	}
	p.read, err = s.connect(url.Values{"mode": {"rw"}, "_query_only": {"1"}}, 1+max(4, runtime.GOMAXPROCS(0)))
	if err != nil {
		return nil, errors.Join(err, p.write.Close())
	}
	return p, nil
}

// create makes an empty file that nobody else may read: it holds the hashes of
// keys. An existing file is not opened, since closing it would drop the locks
// of another connection of this process.
func (s *Store) create() error {
	f, err := os.OpenFile(s.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		return f.Close()
	}
	if !errors.Is(err, os.ErrExist) {
		return err
	}
	if fi, err := os.Stat(s.path); err != nil || fi.Mode().IsRegular() {
		return err
	}
	return errors.New("it is no regular file")
}

func (s *Store) checkWAL(ctx context.Context, c *sql.Conn) error {
	var mode string
	if err := c.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&mode); err != nil {
		return err
	}
	if mode != "wal" {
		return &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerStorage,
			Message: "the file system of " + s.path + " lacks what the database needs: shared memory between processes",
			Fix:     "put the data directory on a local file system (ext4, XFS, Btrfs), not on a network one"}
	}
	return nil
}

// Close implements [store.Store]. It waits for the calls that are under way.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		return nil
	}
	err := s.open.close()
	s.open = nil
	if err != nil {
		return s.fail("close the database", err)
	}
	return nil
}

// read runs f outside a transaction: every statement sees all that was
// committed before it began. what says for an error what was to be done.
func (s *Store) read(what string, f func(*gen.Queries) error) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.open == nil {
		return s.fail(what, errNotOpen)
	}
	if err := f(gen.New(s.open.read)); err != nil {
		return s.fail(what, err)
	}
	return nil
}

// lasting says whether a commit must survive a loss of power.
type lasting bool

const (
	flushed   lasting = true
	unflushed lasting = false
)

// write runs f in a transaction, alone. The context bounds the wait for the
// turn; a transaction that has begun goes on to its end, a few milliseconds
// later, so that it is known whether it took place.
func (s *Store) write(ctx context.Context, what string, l lasting, f func(context.Context, *gen.Queries) error) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.open == nil {
		return s.fail(what, errNotOpen)
	}
	changed, err := s.open.transact(ctx, f)
	if err != nil {
		return s.fail(what, err)
	}
	if l == flushed && changed {
		if err := s.open.flush.flush(); err != nil {
			return s.flushFailed(what, err)
		}
	}
	return nil
}

// transact reports whether anything was written.
func (p *pools) transact(ctx context.Context, f func(context.Context, *gen.Queries) error) (bool, error) {
	conn, err := p.write.Conn(ctx)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	if err := ctx.Err(); err != nil {
		return false, err
	}
	ctx = context.WithoutCancel(ctx)
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return false, err
	}
	defer func() { _ = tx.Rollback() }() // after a commit it does nothing; a panic of f must not keep the lock
	c := &counted{Tx: tx}
	if err := f(ctx, gen.New(c)); err != nil {
		return false, err
	}
	return c.wrote, tx.Commit()
}

// counted is a transaction that notes whether a statement was executed: the
// queries that read do not use Exec.
type counted struct {
	*sql.Tx
	wrote bool
}

// ExecContext implements gen.DBTX.
func (c *counted) ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error) {
	c.wrote = true
	return c.Tx.ExecContext(ctx, query, args...)
}

// micros is how an instant is stored; the zero one is 0.
func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func instant(us int64) time.Time {
	if us == 0 {
		return time.Time{}
	}
	return time.UnixMicro(us).UTC()
}

// atMost is a limit as SQL has it: -1 is none.
func atMost(n int) int64 {
	if n <= 0 {
		return -1
	}
	return int64(n)
}
