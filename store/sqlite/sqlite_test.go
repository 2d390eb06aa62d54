package sqlite_test

import (
	"bytes"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
	"github.com/cayhq/cay/store/sqlite"
	"github.com/cayhq/cay/store/storetest"
)

func open(t testing.TB, path string) *sqlite.Store {
	t.Helper()
	s := sqlite.New(path)
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

func file(t testing.TB) string { return filepath.Join(t.TempDir(), "cay.db") }

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store { return open(t, file(t)) })
}

func TestDurable(t *testing.T) {
	storetest.RunDurable(t, storetest.Place{
		New: func(dir string) store.Store { return sqlite.New(filepath.Join(dir, "cay.db")) },
		Check: func(t *testing.T, dir string) {
			path := filepath.Join(dir, "cay.db")
			db := raw(t, path)
			var result string
			if err := db.QueryRow("PRAGMA integrity_check").Scan(&result); err != nil || result != "ok" {
				t.Errorf("integrity_check: %q, %v", result, err)
			}
			rows, err := db.Query("PRAGMA foreign_key_check")
			if err != nil {
				t.Fatal(err)
			}
			if rows.Next() {
				t.Error("a reference leads nowhere")
			}
			if err := errors.Join(rows.Err(), rows.Close(), db.Close()); err != nil {
				t.Fatal(err)
			}
		},
	})
}

// raw is a connection that knows nothing of the package.
func raw(t testing.TB, path string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func exec(t testing.TB, db *sql.DB, stmts ...string) {
	t.Helper()
	for _, s := range stmts {
		if _, err := db.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

func schema(t testing.TB, path string) []string {
	t.Helper()
	rows, err := raw(t, path).Query("SELECT type || ' ' || name || ': ' || coalesce(sql, '') FROM sqlite_schema ORDER BY name")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		var s string
		if err := rows.Scan(&s); err != nil {
			t.Fatal(err)
		}
		out = append(out, s)
	}
	return out
}

func TestMigrations(t *testing.T) {
	path := file(t)
	if err := open(t, path).Close(); err != nil {
		t.Fatal(err)
	}
	fresh := schema(t, path)
	if len(fresh) < 10 {
		t.Fatalf("schema of a fresh database: %v", fresh)
	}
	for range 2 {
		s := open(t, path)
		if err := s.PutTeam(t.Context(), cay.Team{ID: "t", Slug: "t"}); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(fresh, schema(t, path)); d != "" {
			t.Fatalf("schema after another Open (-first +now):\n%s", d)
		}
	}
	// An empty file is a fresh one: a crash right after it was made.
	empty := file(t)
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, empty)
	if d := cmp.Diff(fresh, schema(t, empty)); d != "" {
		t.Fatalf("schema in an empty file (-fresh +got):\n%s", d)
	}
}

// refused asserts that Open refuses the file with the code and words, says a
// repair, and leaves every byte as it was.
func refused(t *testing.T, path string, code cay.Code, words ...string) {
	t.Helper()
	content := func() map[string]string {
		out := map[string]string{}
		for _, f := range []string{path, path + "-wal"} {
			if b, err := os.ReadFile(f); err == nil && len(b) > 0 {
				out[f] = string(b)
			}
		}
		return out
	}
	before := content()
	s := sqlite.New(path)
	err := s.Open(t.Context())
	var e *cay.Error
	if !errors.As(err, &e) || e.Code != code || e.Fix == "" || e.Layer != cay.LayerStorage {
		t.Fatalf("Open: %v; want %s with a fix", err, code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
	if err := s.Close(); err != nil {
		t.Errorf("Close after a failed Open: %v", err)
	}
	if !cmp.Equal(before, content()) {
		t.Error("the file was changed")
	}
}

func TestNewerSchema(t *testing.T) {
	const newer = "INSERT INTO goose_db_version (version_id, is_applied) VALUES (4711, 1)"
	path := file(t)
	if err := open(t, path).Close(); err != nil {
		t.Fatal(err)
	}
	db := raw(t, path)
	exec(t, db, newer)
	refused(t, path, cay.CodeDataDirInvalid, "newer Cay", "4711", path) // the row is in the WAL
	crashed := file(t)                                                  // as a killed process leaves it: nobody else is there
	for _, suffix := range []string{"", "-wal"} {
		b, err := os.ReadFile(path + suffix)
		if err != nil || len(b) == 0 {
			t.Fatalf("%d bytes in %q, %v", len(b), suffix, err)
		}
		if err := os.WriteFile(crashed+suffix, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refused(t, crashed, cay.CodeDataDirInvalid, "newer Cay", "4711", crashed)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	refused(t, path, cay.CodeDataDirInvalid, "newer Cay", "4711", path) // and in the file
	exec(t, raw(t, path), "DELETE FROM goose_db_version WHERE version_id = 4711")
	open(t, path)
}

func TestNotOurs(t *testing.T) {
	path := file(t)
	db := raw(t, path)
	exec(t, db, "CREATE TABLE recipes (name TEXT)")
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	refused(t, path, cay.CodeDataDirInvalid, "another program", path)

	path = file(t)
	if err := os.WriteFile(path, []byte(strings.Repeat("no database\n", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, path, cay.CodeDataDirInvalid, "damaged", ".recover", path)

	path = filepath.Join(t.TempDir(), "missing", "cay.db")
	refused(t, path, cay.CodeDataDirInvalid, filepath.Dir(path)+" does not exist")
	refused(t, t.TempDir(), cay.CodeDataDirInvalid)
}

// filled is a closed database with n sandboxes.
func filled(t testing.TB, n int) string {
	path := file(t)
	s := open(t, path)
	ready(t, s)
	for i := range n {
		if err := s.AddSandbox(t.Context(), newSandbox(i), n); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func ready(t testing.TB, s *sqlite.Store) {
	t.Helper()
	if err := s.PutTeam(t.Context(), cay.Team{ID: "t", Name: "t", Slug: "t", Limits: cay.DefaultTeamLimits}); err != nil {
		t.Fatal(err)
	}
	m := cay.Manifest{Build: "b", Template: "p", Name: "base", CreatedAt: time.Now()}
	if _, err := s.PublishBuild(t.Context(), "t", true, m); err != nil {
		t.Fatal(err)
	}
}

func newSandbox(n int) store.Sandbox {
	now := time.Now()
	return store.Sandbox{ID: cay.SandboxID(fmt.Sprintf("i%020d", n)), Team: "t", Template: "p", Build: "b", Alias: "base", Node: "n",
		State: cay.StateStarting, Resources: cay.Resources{CPUs: 2, MemoryMB: 512, DiskMB: 1024}, EnvdVersion: "0.6.2",
		Metadata: map[string]string{"user": "ada", "session": "0123456789"}, Options: []byte(`{"autoPause":false,"envVars":{"A":"B"}}`),
		CreatedAt: now, StartedAt: now, Deadline: now.Add(5 * time.Minute), MaxDeadline: now.Add(24 * time.Hour)}
}

func TestDamage(t *testing.T) {
	path := filled(t, 400)
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	damage := func(path string, from, to int64) {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(bytes.Repeat([]byte{0xa5}, int(to-from)), from); err != nil {
			t.Fatal(err)
		}
	}
	// A stretch in the middle: Open says it.
	torn := file(t)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(torn, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	damage(torn, fi.Size()/2, fi.Size()/2+64<<10)
	refused(t, torn, cay.CodeDataDirInvalid, "damaged", ".recover", torn)

	// The end cut off.
	if err := os.WriteFile(torn, whole[:len(whole)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, torn, cay.CodeDataDirInvalid, "damaged", ".recover", torn)

	// Under an open store: every call either answers or says it, none lies.
	s := open(t, path)
	damage(path, 8192, fi.Size())
	said := false
	for i := range 400 {
		sb, err := s.FindSandbox(t.Context(), "t", newSandbox(i).ID)
		switch {
		case err == nil && sb.Metadata["user"] == "ada":
		case cay.CodeOf(err) == cay.CodeDataDirInvalid && strings.Contains(err.Error(), ".recover"):
			said = true
		default:
			t.Fatalf("FindSandbox of a damaged file = %+v, %v", sb, err)
		}
	}
	if !said {
		t.Fatal("no call met the damage")
	}
}

func TestFileModes(t *testing.T) {
	path := file(t)
	s := open(t, path)
	ready(t, s)
	for _, f := range []string{path, path + "-wal", path + "-shm"} {
		fi, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v; it holds the hashes of keys", f, fi.Mode())
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(path + "*")
	if err != nil || len(left) != 1 {
		t.Errorf("after Close there are %v, %v", left, err)
	}
}

func TestOddPath(t *testing.T) {
	for _, name := range []string{"a b.db", "a?mode=memory", "a#b", "a%41", "a&b;c", ":memory:", "'\"", "ü", "file:x"} {
		path := filepath.Join(t.TempDir(), name)
		ready(t, open(t, path))
		if fi, err := os.Stat(path); err != nil || fi.Size() == 0 {
			t.Errorf("%q: %v", name, err)
		}
	}
	t.Chdir(t.TempDir())
	ready(t, open(t, "relative.db"))
	if _, err := os.Stat("relative.db"); err != nil {
		t.Error(err)
	}
}

// TestTwoProcesses: a second store on the file, as another process would have
// it, waits its turn.
func TestTwoProcesses(t *testing.T) {
	path := file(t)
	a, b := open(t, path), open(t, path)
	ready(t, a)
	var wg sync.WaitGroup
	for i, s := range []*sqlite.Store{a, b} {
		wg.Go(func() {
			for n := range 50 {
				if err := s.AddSandbox(t.Context(), newSandbox(i*1000+n), 1000); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	for _, s := range []*sqlite.Store{a, b} {
		if n, err := s.CountSandboxes(t.Context(), "t"); err != nil || n != 100 {
			t.Errorf("%d sandboxes (%v), want 100", n, err)
		}
	}
}

// small is a file system of 1 MiB of its own.
func small(t *testing.T) string {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("mounting needs root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestDiskFull(t *testing.T) {
	dir := small(t)
	path := filepath.Join(dir, "cay.db")
	s := open(t, path)
	ready(t, s)
	added, full := 0, error(nil)
	for ; added < 10_000 && full == nil; added++ {
		full = s.AddSandbox(t.Context(), newSandbox(added), 10_000)
	}
	added--
	wantFull := func(err error) {
		t.Helper()
		var e *cay.Error
		if !errors.As(err, &e) || e.Code != cay.CodeDiskFull || !strings.Contains(e.Message, dir) || e.Fix == "" {
			t.Fatalf("on a full disk: %v", err)
		}
	}
	wantFull(full)
	// What was there is there, what was refused is not, and reading goes on.
	if n, err := s.CountSandboxes(t.Context(), "t"); err != nil || n != added {
		t.Fatalf("%d sandboxes (%v), want %d", n, err, added)
	}
	if _, err := s.FindSandbox(t.Context(), "t", newSandbox(added).ID); cay.CodeOf(err) != cay.CodeSandboxNotFound {
		t.Fatalf("the refused sandbox: %v", err)
	}
	// So is the next start.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	fill := filepath.Join(dir, "fill")
	for size := 1 << 20; size > 0; size /= 2 {
		f, err := os.OpenFile(fill, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = f.Write(make([]byte, size))
		_ = f.Close()
	}
	wantFull(sqlite.New(filepath.Join(dir, "new.db")).Open(t.Context()))
	err := s.Open(t.Context())
	opened := err == nil
	if opened {
		// The log may have room that it had before.
		var full error
		for i := 0; i < 10_000 && full == nil; i++ {
			id := fmt.Sprintf("x%d", i)
			full = s.PutTeam(t.Context(), cay.Team{ID: cay.TeamID(id), Slug: id})
		}
		wantFull(full)
		if n, err := s.CountSandboxes(t.Context(), "t"); err != nil || n != added {
			t.Fatalf("%d sandboxes (%v), want %d", n, err, added)
		}
	} else {
		wantFull(err)
	}
	// Room again, and all is well: without a restart, if the store had opened.
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatal(err)
	}
	if !opened {
		if err := s.Open(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.PutTeam(t.Context(), cay.Team{ID: "x", Slug: "x"}); err != nil {
		t.Fatal(err)
	}
	if n, err := s.CountSandboxes(t.Context(), "t"); err != nil || n != added {
		t.Fatalf("%d sandboxes (%v), want %d", n, err, added)
	}
}

func TestReadOnly(t *testing.T) {
	dir := small(t)
	path := filepath.Join(dir, "cay.db")
	if err := open(t, path).Close(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, filepath.Join(dir, "new.db")} {
		err := sqlite.New(p).Open(t.Context())
		if cay.CodeOf(err) != cay.CodeDataDirInvalid || !strings.Contains(err.Error(), "cannot be written") {
			t.Errorf("Open of %s on a read-only file system: %v", p, err)
		}
	}
}

// FuzzMetadata: any text comes back as it was and matches itself, and nothing
// that differs from it.
func FuzzMetadata(f *testing.F) {
	for _, w := range []string{"", "a", "\x00", `\u0061`, "\u2028", "\xff", "🏝", `"`, "a.b[0]"} {
		f.Add(w, "v", "a", w)
	}
	s := open(f, file(f))
	ready(f, s)
	n := 0
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		for _, w := range []string{k1, v1, k2, v2} {
			if !utf8.ValidString(w) {
				t.Skip("the API takes JSON, which is UTF-8")
			}
		}
		n++
		sb := newSandbox(n)
		sb.Metadata = map[string]string{k1: v1}
		if err := s.AddSandbox(t.Context(), sb, 2); err != nil {
			t.Fatal(err)
		}
		for _, ask := range []map[string]string{{k1: v1}, {k2: v2}, {k1: v2}, {k2: v1}, {k1: v1, k2: v2}} {
			want := 1
			for k, v := range ask {
				if got, ok := sb.Metadata[k]; !ok || got != v {
					want = 0
				}
			}
			l, err := s.ListSandboxes(t.Context(), store.SandboxFilter{Team: "t", Metadata: ask})
			if err != nil || len(l) != want {
				t.Errorf("metadata %q asked for %q: %d matches, want %d (%v)", sb.Metadata, ask, len(l), want, err)
			}
			if len(l) == 1 && !cmp.Equal(l[0].Metadata, sb.Metadata) {
				t.Errorf("metadata %q came back as %q", sb.Metadata, l[0].Metadata)
			}
		}
		if _, err := s.UpdateSandbox(t.Context(), sb.ID, func(sb *store.Sandbox) error {
			sb.State, sb.EndedAt, sb.EndReason = cay.StateEnded, time.Now(), cay.EndRequest
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	})
}
