package crash

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/api"
	routes "github.com/cayhq/cay/catalog/memory"
	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/orchestrator"
	"github.com/cayhq/cay/runtime"
	"github.com/cayhq/cay/store"
	"github.com/cayhq/cay/store/sqlite"
)

// childEnv makes the test program a server: its directory.
const childEnv = "CAY_CRASH_DIR"

// hastyEnv makes that server's quarantine short.
const hastyEnv = "CAY_CRASH_HASTY"

const (
	testKey    = "e2b_1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a"
	testAdmin  = "admin-token"
	testPepper = cay.Secret("pepper")
	testTeam   = cay.TeamID("11111111-1111-4111-8111-111111111111")
)

// failingStore is a store whose writes fail when they are told to.
type failingStore struct {
	store.Store
	*faults
}

func (s failingStore) AddSandbox(ctx context.Context, r store.Sandbox, limit int) error {
	if err := s.typed("store.write"); err != nil {
		return err
	}
	return s.Store.AddSandbox(ctx, r, limit)
}

func (s failingStore) UpdateSandbox(ctx context.Context, id cay.SandboxID, f func(*store.Sandbox) error) (store.Sandbox, error) {
	if err := s.typed("store.write"); err != nil {
		return store.Sandbox{}, err
	}
	return s.Store.UpdateSandbox(ctx, id, f)
}

func (s failingStore) AdmitSandbox(ctx context.Context, id cay.SandboxID, n int, f func(*store.Sandbox) error) (store.Sandbox, error) {
	if err := s.typed("store.write"); err != nil {
		return store.Sandbox{}, err
	}
	return s.Store.AdmitSandbox(ctx, id, n, f)
}

func (s failingStore) AddSnapshot(ctx context.Context, r store.Snapshot) error {
	if err := s.typed("store.write"); err != nil {
		return err
	}
	return s.Store.AddSnapshot(ctx, r)
}

// child is a whole server on a host of files. Its process may be killed at any
// time: nothing of it but files counts.
type child struct {
	dir    string
	faults *faults
	host   *host
	orch   *orchestrator.Orchestrator
	store  *sqlite.Store
}

func runChild(dir string) error {
	ctx := context.Background()
	f := &faults{known: map[string]bool{}, fails: map[string]syscall.Errno{}, hits: map[string]bool{}}
	for _, p := range killpoint.Points() {
		f.known[p] = true
	}
	c := &child{dir: dir, faults: f}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	var err error
	if c.host, err = newHost(filepath.Join(dir, "host"), f); err != nil {
		return err
	}
	c.store = sqlite.New(filepath.Join(dir, "cay.db"))
	if err := c.store.Open(ctx); err != nil {
		return err
	}
	if err := c.furnish(ctx); err != nil {
		return err
	}
	c.orch = &orchestrator.Orchestrator{Node: "local", Dir: filepath.Join(dir, "records"), SnapshotDir: filepath.Join(dir, "snapshots"),
		Runtime: c.host.engine, Slots: slots{c.host}, Disks: disks{c.host}, Builds: builds{}, Catalog: routes.New(), Guest: inside{c.host},
		Envd:         orchestrator.Agent{Version: "0.6.13", Digest: serverEnvd, Program: func() ([]byte, error) { return []byte("program"), nil }},
		StartTimeout: 20 * time.Second, Log: log, Fault: f.point}
	if err := c.orch.Open(ctx); err != nil {
		return err
	}
	s := &api.Server{Store: failingStore{c.store, f}, Node: c.orch, Snapshots: c.orch, Pepper: testPepper, Seed: "seed", AdminToken: testAdmin, Log: log, Fault: f.point}
	if os.Getenv(hastyEnv) != "" {
		s.ReconcileEvery, s.QuarantineFor = 200*time.Millisecond, 300*time.Millisecond
	}
	go func() { _ = s.Run(ctx) }() // the process is its end
	mux := http.NewServeMux()
	mux.Handle("/", s.Handler())
	mux.HandleFunc("/test/arm", c.arm)
	mux.HandleFunc("/test/hits", c.hits)
	mux.HandleFunc("/test/write", c.write)
	mux.HandleFunc("/test/read", c.read)
	mux.HandleFunc("/test/inventory", c.inventory)
	socket := filepath.Join(dir, "socket")
	if err := remove(socket); err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return http.Serve(l, mux) //nolint:gosec // the process is its time-out
}

// furnish makes a team with a key and a template, once.
func (c *child) furnish(ctx context.Context) error {
	if _, err := c.store.Team(ctx, testTeam); err == nil {
		return nil
	}
	hash, err := api.HashKey(testPepper, testKey)
	if err != nil {
		return err
	}
	k := store.Key{ID: "11111111-1111-5111-8111-111111111111", Team: testTeam, Name: "first", Hash: hash, CreatedAt: time.Now().UTC()}
	k.Prefix, k.Suffix, k.Length = api.MaskKey(testKey)
	err = c.store.PutTeam(ctx, cay.Team{ID: testTeam, Name: "One", Slug: "one", Limits: cay.TeamLimits{ConcurrentSandboxes: 100, MaxLengthHours: 24}})
	if err == nil {
		err = c.store.AddKey(ctx, k)
	}
	if err == nil {
		_, err = c.store.PublishBuild(ctx, testTeam, true, cay.Manifest{Format: cay.ManifestFormat, Build: theBuild, Template: cay.NewTemplateID(), Name: "base",
			CreatedAt: time.Now().UTC(), EnvdVersion: "0.6.13", Resources: cay.Resources{CPUs: 1, MemoryMB: 128, DiskMB: 256}})
	}
	return err
}

// arm names the point at which the process dies, and what fails.
func (c *child) arm(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	c.faults.mu.Lock()
	defer c.faults.mu.Unlock()
	c.faults.kill = q.Get("kill")
	clear(c.faults.fails)
	clear(c.faults.hits)
	if p := q.Get("fail"); p != "" {
		n, err := strconv.Atoi(q.Get("errno"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		c.faults.fails[p] = syscall.Errno(n)
	}
}

// hits lists what was passed.
func (c *child) hits(w http.ResponseWriter, _ *http.Request) {
	c.faults.mu.Lock()
	defer c.faults.mu.Unlock()
	answer(w, slices.Sorted(maps.Keys(c.faults.hits)), nil)
}

func answer(w http.ResponseWriter, v any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	_ = json.NewEncoder(w).Encode(v) // the test may have gone
}

// value is what a guest was told: in its memory, and on its disk.
type value struct{ Memory, Disk string }

// write has a guest write something, as it would by itself: only while it runs.
func (c *child) write(w http.ResponseWriter, r *http.Request) {
	n, err := c.orch.Get(r.Context(), cay.SandboxID(r.URL.Query().Get("id")))
	if err == nil {
		v := r.URL.Query().Get("value")
		g := c.host.engine.Guest(runtime.InstanceID(n.ExecutionID))
		m := recall(g)
		m.Value = v
		c.host.remember(g, m)
		err = replace(disks{c.host}.file(string(n.ExecutionID)), []byte(v))
	}
	answer(w, struct{}{}, err)
}

func (c *child) read(w http.ResponseWriter, r *http.Request) {
	n, err := c.orch.Get(r.Context(), cay.SandboxID(r.URL.Query().Get("id")))
	var v value
	if err == nil {
		all, ierr := c.host.engine.Instances(r.Context())
		err = errors.Join(ierr, errors.New("the guest does not run"))
		for _, in := range all {
			if in.ID == runtime.InstanceID(n.ExecutionID) && in.State == runtime.Running {
				err = nil
			}
		}
	}
	if err == nil {
		v.Memory = recall(c.host.engine.Guest(runtime.InstanceID(n.ExecutionID))).Value
		b, rerr := os.ReadFile(disks{c.host}.file(string(n.ExecutionID)))
		v.Disk, err = string(b), rerr
	}
	answer(w, v, err)
}

// inventory is what there is: on record, and on the host.
type inventory struct {
	States                     map[string]string // of sandboxes that have not ended
	Running                    []string          // executions of sandboxes that are
	Owned                      []string          // snapshots that a record names
	Instances, Disks           []string
	Records, Slots             []string
	Saved, Snapshots, HalfMade []string
}

func (c *child) inventory(w http.ResponseWriter, r *http.Request) {
	v := inventory{States: map[string]string{}}
	var errs []error
	rows, err := c.store.ListSandboxes(r.Context(), store.SandboxFilter{})
	errs = append(errs, err)
	for _, s := range rows {
		if s.State == cay.StateEnded {
			continue
		}
		v.States[string(s.ID)] = string(s.State)
		if s.State == cay.StateRunning {
			v.Running = append(v.Running, string(s.Execution))
		}
		if s.State == cay.StatePaused {
			v.Owned = append(v.Owned, string(s.Snapshot))
		}
	}
	kept, err := c.store.ListSnapshots(r.Context(), store.SnapshotFilter{})
	errs = append(errs, err)
	for _, s := range kept {
		v.Owned = append(v.Owned, string(s.ID))
	}
	all, err := c.host.engine.Instances(r.Context())
	errs = append(errs, err)
	for _, in := range all {
		v.Instances = append(v.Instances, string(in.ID))
	}
	names := func(elem ...string) []string {
		out, err := list(filepath.Join(append([]string{c.dir}, elem...)...))
		errs = append(errs, err)
		return out
	}
	v.Disks, v.Slots, v.Saved = names("host", "disks"), names("host", "slots"), names("host", "saved")
	for _, n := range names("records") {
		v.Records = append(v.Records, strings.TrimSuffix(n, ".json"))
	}
	for _, n := range names("snapshots") {
		if strings.HasSuffix(n, ".new") {
			v.HalfMade = append(v.HalfMade, n)
		} else {
			v.Snapshots = append(v.Snapshots, n)
		}
	}
	for _, s := range [][]string{v.Running, v.Owned, v.Instances, v.Disks, v.Records, v.Saved, v.Snapshots} {
		slices.Sort(s)
	}
	answer(w, v, errors.Join(errs...))
}
