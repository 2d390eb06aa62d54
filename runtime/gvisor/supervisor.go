package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/runsc/specutils"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// Supervise runs the supervisor of the directory dir until it is told to leave,
// has nothing to do for some minutes, or ctx ends; the guests live on. It is the
// body of the hidden command `cay supervise`, and logs to standard error. When
// another supervisor has the directory it returns nil at once.
func Supervise(ctx context.Context, dir string) error {
	return (&Supervisor{Dir: dir, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}).Run(ctx)
}

// Supervisor is the process that owns the instances of a directory.
type Supervisor struct {
	Dir string
	Log *slog.Logger // nil: none
	// IdleExit is how long a supervisor without instances and clients stays;
	// 0 is five minutes.
	IdleExit time.Duration
	// DebugDir, if set, is where gVisor writes its debug logs: slow.
	DebugDir string
	// Gofer is the program of cmd/gofer. Without it, each guest's file server is
	// all of gVisor, which starts slower and takes more memory.
	Gofer []byte
	Now   func() time.Time // nil: time.Now

	// engine is the version it calls its own; empty is that of the build. For tests.
	engine  string
	home    home
	log     *slog.Logger
	reaper  *reaper
	started time.Time
	epoch   string
	gofer   string // the path of Gofer, or ""
	quit    context.CancelFunc

	wantSpare chan struct{} // of one element: keepSpares should look

	roots     *net.UnixListener  // where file servers ask for their root; or nil
	askers    chan *net.UnixConn // who asks there
	engineSeq int                // of keepEngines

	mu         sync.Mutex
	engines    []*engine
	ahead      int                // how many of them are wanted of a kind
	kinds      map[kind]time.Time // of guests lately saved or restored, and when
	working    int                // calls of busy that are not done
	lastWork   time.Time
	lastFailed time.Time // that an engine could not be started ahead
	spares     []*launcher
	lastTaken  time.Time // of a spare
	instances  map[runtime.InstanceID]*instance
	closing    bool
	seq        int64
	ends       []exit        // the last endsKept, of which the last has number seq
	news       chan struct{} // closed when seq rises
	clients    int           // requests under way
	lastUse    time.Time
}

// endsKept is how many ends a client may miss between two questions.
const endsKept = 4096

func (s *Supervisor) now() time.Time {
	if s.Now != nil {
		return s.Now()
	}
	return time.Now()
}

// Run is Supervise for a configured supervisor.
func (s *Supervisor) Run(ctx context.Context) error {
	prepareEngine(sandboxFilters) // it tells whether there are any
	silenceEngineLog()
	if s.engine == "" {
		s.engine = Version()
	}
	s.log = s.Log
	if s.log == nil {
		s.log = discardLogger
	}
	dir, err := filepath.Abs(s.Dir)
	if err != nil {
		return fmt.Errorf("finding the runtime directory: %w", err)
	}
	s.home, s.reaper, s.started = home(dir), newReaper(), s.now()
	s.epoch = strconv.Itoa(os.Getpid()) + "-" + strconv.FormatInt(s.started.UnixNano(), 36)
	s.wantSpare, s.askers, s.kinds = make(chan struct{}, 1), make(chan *net.UnixConn), map[kind]time.Time{}
	s.instances, s.news, s.lastUse = map[runtime.InstanceID]*instance{}, make(chan struct{}), s.started
	for _, d := range []string{dir, s.home.shared(), s.home.instances()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return fmt.Errorf("making the runtime directory: %w", err)
		}
	}
	lock, err := lockFile(s.home.lock())
	if errors.Is(err, unix.EWOULDBLOCK) {
		s.log.Info("another supervisor has the directory", "dir", dir)
		return nil
	}
	if err != nil {
		return fmt.Errorf("locking the runtime directory: %w", err)
	}
	defer lock.Close()

	if s.gofer, err = installGofer(s.home, s.Gofer); err != nil {
		s.log.Warn("file servers are all of gVisor, for their own program cannot be written", "err", err)
	}
	// Everything a launcher starts becomes our child when the launcher ends.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("becoming the sub-reaper: %w", err)
	}
	// Of all processes of the machine this one should end last.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0); err != nil {
		s.log.Warn("the supervisor is not protected from the machine running out of memory", "err", err)
	}
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer stop()
	ctx, s.quit = context.WithCancel(ctx)
	defer s.quit()

	s.adoptAll()
	s.removeSpareGroups()
	s.listenRoots()
	_ = os.Remove(s.home.socket()) // ours by the lock, left by a dead supervisor
	ln, err := net.Listen("unix", s.home.socket())
	if err != nil {
		return fmt.Errorf("listening for clients: %w", err)
	}
	if err := os.Chmod(s.home.socket(), 0o600); err != nil {
		return fmt.Errorf("closing the socket to others: %w", err)
	}
	srv := &http.Server{Handler: s.handler(), ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx }}
	s.log.Info("supervisor up", "dir", dir, "pid", os.Getpid(), "protocol", Protocol, "engine", s.engine, "instances", len(s.instances))

	var g sync.WaitGroup
	g.Go(func() { s.reaper.run(ctx) })
	g.Go(func() { s.watchIdle(ctx) })
	g.Go(func() { s.acceptRoots(ctx) })
	g.Go(func() { s.keepSpares(ctx) })
	g.Go(func() {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
	})
	err = srv.Serve(ln)
	s.quit()
	g.Wait()
	s.letGo()
	s.log.Info("supervisor down")
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving clients: %w", err)
	}
	return nil
}

func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	_ = f.Truncate(0)
	_, _ = f.WriteAt(strconv.AppendInt(nil, int64(os.Getpid()), 10), 0) // for people
	return f, nil
}

// adoptAll takes over what is in the directory.
func (s *Supervisor) adoptAll() {
	ents, err := os.ReadDir(s.home.instances())
	if err != nil {
		s.log.Error("the instances cannot be listed", "err", err)
	}
	var g errgroup.Group
	g.SetLimit(16)
	for _, e := range ents {
		g.Go(func() error {
			s.adopt(runtime.InstanceID(e.Name()))
			return nil
		})
	}
	_ = g.Wait()
}

func (s *Supervisor) adopt(id runtime.InstanceID) {
	rec, err := loadRecord(s.home.instance(id).record)
	known := err == nil && rec.ID == id
	if !known {
		rec = record{ID: id, State: creating}
	}
	i := s.newInstance(rec)
	if known && i.adopt() {
		i.log.Info("instance adopted", "state", i.snapshot().State)
		s.mu.Lock()
		s.instances[id] = i
		s.mu.Unlock()
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), waitEnd)
	defer cancel()
	err = errors.Join(err, i.destroy(ctx))
	i.log.Warn("removed what a half-made instance left", "err", err)
}

// letGo closes what is open on the instances and leaves them running.
func (s *Supervisor) letGo() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range s.instances {
		i.mu.Lock()
		con := i.console
		i.mu.Unlock()
		con.close()
	}
	if len(s.instances) == 0 {
		s.cleanHost()
	}
}

// cleanHost removes what is shared by the instances, when there are none.
func (s *Supervisor) cleanHost() {
	null := filepath.Join(s.home.shared(), specutils.NullNetNSFilename)
	for unix.Unmount(null, unix.MNT_DETACH) == nil { // concurrent creates may stack mounts
	}
	_ = os.Remove(null)
	_, _ = installGofer(s.home, nil) // removes it
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := cgroup(s.home.cgroupParent()).remove(ctx); err != nil {
		s.log.Warn("the parent cgroup could not be removed", "err", err)
	}
}

// watchIdle ends a supervisor that nobody needs.
func (s *Supervisor) watchIdle(ctx context.Context) {
	limit := s.IdleExit
	if limit == 0 {
		limit = 5 * time.Minute
	}
	t := time.NewTicker(limit / 5)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		s.mu.Lock()
		idle := len(s.instances) == 0 && s.clients == 0 && s.now().Sub(s.lastUse) > limit
		if idle {
			s.closing = true
		}
		s.mu.Unlock()
		if idle {
			s.log.Info("nothing to supervise")
			s.quit()
			return
		}
	}
}

// publish tells clients of an end.
func (s *Supervisor) publish(e exit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seq++
	s.ends = append(s.ends, e)
	if len(s.ends) > endsKept {
		s.ends = append([]exit(nil), s.ends[len(s.ends)-endsKept/2:]...)
	}
	close(s.news)
	s.news = make(chan struct{})
}

// create makes an instance, by the program of another engine if there is one. A
// failed one leaves nothing.
func (s *Supervisor) create(ctx context.Context, spec runtime.Spec, program string) error {
	if err := checkSpec(spec, s.home.instance(spec.ID)); err != nil {
		return err
	}
	engine := s.engine
	if program != "" {
		engine = spec.Engine.Version
	}
	i := s.newInstance(record{Format: recordFormat, ID: spec.ID, Engine: engine, Boot: bootID(),
		State: creating, CreatedAt: s.now().UTC(), Labels: spec.Labels, Kind: kindOf(spec), Restore: spec.Restore})
	i.op.Lock()
	s.mu.Lock()
	switch {
	case s.closing:
		s.mu.Unlock()
		return &cay.Error{Code: cay.CodeShuttingDown, Layer: cay.LayerRuntime, Message: "the engine's supervisor is going down"}
	case s.instances[spec.ID] != nil:
		s.mu.Unlock()
		return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerRuntime, Message: fmt.Sprintf("instance %s exists already", spec.ID)}
	}
	s.instances[spec.ID] = i
	s.mu.Unlock()
	began := s.now()
	done := s.busy()
	if spec.Restore && program == "" {
		s.heat(kindOf(spec))
	}
	err := i.create(ctx, spec, program)
	done()
	if err == nil {
		err = ctx.Err() // the caller has given up: it counts on nothing being left
	}
	i.op.Unlock()
	if err != nil {
		i.log.Warn("instance could not be created", "err", err)
	}
	if err == nil {
		i.log.Info("instance created", "pid", i.snapshot().PID, "took", s.now().Sub(began))
		return nil
	}
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), waitEnd)
	defer cancel()
	if derr := s.kill(clean, spec.ID); derr != nil {
		i.log.Error("a failed create left something", "err", derr)
	}
	var typed *cay.Error
	if errors.As(err, &typed) {
		return err
	}
	return s.createError(spec.ID, err)
}

// createError says which part of a create failed.
func (s *Supervisor) createError(id runtime.InstanceID, err error) error {
	e := &cay.Error{Code: cay.CodeEngineFailed, Layer: cay.LayerRuntime,
		Message: "the engine could not be started for instance " + string(id), Err: err}
	switch {
	case errors.Is(err, unix.ENOSPC):
		e.Code, e.Layer, e.Fix = cay.CodeDiskFull, cay.LayerStorage, "free space on the file system of the data directory"
	case errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EPERM):
		e.Code, e.Layer, e.Fix = cay.CodePrivilege, cay.LayerHost, "run the server as root"
	}
	return e
}

func (s *Supervisor) get(id runtime.InstanceID) (*instance, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := s.instances[id]; i != nil {
		return i, nil
	}
	return nil, notFound(id)
}

func (s *Supervisor) kill(ctx context.Context, id runtime.InstanceID) error {
	i, err := s.get(id)
	if err != nil {
		return nil //nolint:nilerr // what is not there is ended
	}
	began := s.now()
	if err := i.destroy(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	first := s.instances[id] == i
	if first {
		delete(s.instances, id)
	}
	s.mu.Unlock()
	if first {
		i.log.Info("instance removed", "took", s.now().Sub(began))
	}
	return nil
}

func (s *Supervisor) list() []runtime.Instance {
	s.mu.Lock()
	all := make([]*instance, 0, len(s.instances))
	for _, i := range s.instances {
		all = append(all, i)
	}
	s.mu.Unlock()
	out := make([]runtime.Instance, 0, len(all))
	for _, i := range all {
		out = append(out, i.snapshot())
	}
	return out
}

// shutdown ends every instance and then the supervisor.
func (s *Supervisor) shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closing = true
	ids := make([]runtime.InstanceID, 0, len(s.instances))
	for id := range s.instances {
		ids = append(ids, id)
	}
	s.mu.Unlock()
	var g errgroup.Group
	g.SetLimit(16)
	for _, id := range ids {
		g.Go(func() error { return s.kill(ctx, id) })
	}
	if err := g.Wait(); err != nil {
		s.mu.Lock()
		s.closing = false
		s.mu.Unlock()
		return err
	}
	s.quit()
	return nil
}

// exitsAfter returns the ends after a number, and waits for one if there is none.
func (s *Supervisor) exitsAfter(ctx context.Context, epoch string, after int64) exits {
	if epoch != s.epoch {
		after = 0
	}
	// A server's answer, however empty, tells the client that we live.
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		s.mu.Lock()
		out := exits{Epoch: s.epoch, Seq: s.seq}
		if n := s.seq - after; n > 0 {
			out.Exits = append(out.Exits, s.ends[max(0, int64(len(s.ends))-n):]...)
		}
		news := s.news
		s.mu.Unlock()
		if len(out.Exits) > 0 || epoch != s.epoch {
			return out
		}
		select {
		case <-news:
		case <-ctx.Done():
			return out
		}
	}
}

// handler serves the API of wire.go.
func (s *Supervisor) handler() http.Handler {
	mux := http.NewServeMux()
	byID := func(f func(ctx context.Context, i *instance) (any, error)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			i, err := s.get(runtime.InstanceID(r.URL.Query().Get("id")))
			if err == nil {
				var v any
				if v, err = f(r.Context(), i); err == nil {
					writeJSON(w, v)
					return
				}
			}
			writeError(w, err)
		}
	}
	act := func(f func(ctx context.Context, r *http.Request) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if err := f(r.Context(), r); err != nil {
				writeError(w, err)
				return
			}
			writeJSON(w, struct{}{})
		}
	}
	mux.HandleFunc("GET "+pathHello, func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		n, ahead := len(s.instances), len(s.engines)
		s.mu.Unlock()
		writeJSON(w, hello{Protocol: Protocol, Engine: s.engine, Version: cay.Version, PID: os.Getpid(), StartedAt: s.started, Instances: n, Ahead: ahead, Detail: detail()})
	})
	mux.HandleFunc("POST "+pathLeave, act(func(context.Context, *http.Request) error {
		s.mu.Lock()
		s.closing = true
		s.mu.Unlock()
		s.quit()
		return nil
	}))
	mux.HandleFunc("POST "+pathCreate, act(func(ctx context.Context, r *http.Request) error {
		var spec runtime.Spec
		if err := json.NewDecoder(http.MaxBytesReader(nil, r.Body, 4<<20)).Decode(&spec); err != nil {
			return fmt.Errorf("decoding the spec: %w", err)
		}
		s.wantAhead(r.URL.Query().Get("ahead"))
		return s.create(ctx, spec, r.URL.Query().Get("program"))
	}))
	// Once begun, these are carried through, whatever becomes of the asker.
	each := func(path, what string, f func(i *instance, dir string) error) {
		mux.HandleFunc("POST "+path, act(func(_ context.Context, r *http.Request) error {
			q := r.URL.Query()
			return s.with(runtime.InstanceID(q.Get("id")), what, func(i *instance) error { return f(i, q.Get("dir")) })
		}))
	}
	each(pathStart, "started", func(i *instance, _ string) error { return i.start() })
	each(pathFreeze, "frozen", func(i *instance, _ string) error { return i.freeze() })
	each(pathThaw, "thawed", func(i *instance, _ string) error { return i.thaw() })
	each(pathCheckpoint, "checkpointed", (*instance).checkpoint)
	each(pathRestore, "restored", (*instance).restore)
	mux.HandleFunc("GET "+pathLoaded, byID(func(ctx context.Context, i *instance) (any, error) { return i.awaitLoad(ctx) }))
	mux.HandleFunc("POST "+pathKill, act(func(ctx context.Context, r *http.Request) error {
		// A kill once asked for is carried through, whatever becomes of the asker.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), waitEnd)
		defer cancel()
		return s.kill(ctx, runtime.InstanceID(r.URL.Query().Get("id")))
	}))
	mux.HandleFunc("POST "+pathShutdown, act(func(ctx context.Context, _ *http.Request) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*waitEnd)
		defer cancel()
		return s.shutdown(ctx)
	}))
	mux.HandleFunc("GET "+pathInstances, func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, s.list()) })
	mux.HandleFunc("GET "+pathInstance, byID(func(_ context.Context, i *instance) (any, error) { return i.snapshot(), nil }))
	mux.HandleFunc("GET "+pathStats, byID(func(_ context.Context, i *instance) (any, error) { return i.group.stats(), nil }))
	mux.HandleFunc("GET "+pathConsole, byID(func(_ context.Context, i *instance) (any, error) {
		i.mu.Lock()
		con := i.console
		i.mu.Unlock()
		lines, dropped, err := con.lines()
		return consoleAnswer{Lines: lines, Dropped: dropped}, err
	}))
	mux.HandleFunc("GET "+pathExits, func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		after, _ := strconv.ParseInt(q.Get("after"), 10, 64)
		writeJSON(w, s.exitsAfter(r.Context(), q.Get("epoch"), after))
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.clients++
		s.mu.Unlock()
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.clients--
			s.lastUse = s.now()
		}()
		mux.ServeHTTP(w, r)
	})
}

// detail says for people what was chosen on this machine.
func detail() map[string]string {
	d := map[string]string{"cgroup": "v1", "sentry_uid": "65534", "precompiled_seccomp": strconv.FormatBool(seccompPrecompiled())}
	if unified() {
		d["cgroup"] = "v2"
	}
	return d
}
