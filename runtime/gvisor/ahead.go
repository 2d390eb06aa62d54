package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/meminfo"
	"github.com/cayhq/cay/internal/prelude"
	"github.com/cayhq/cay/runtime"
	"github.com/cayhq/cay/runtime/gvisor/gofer"
)

// A guest that is restored brings its memory along. What its sentry has to know
// when it starts is little, and the same for many guests: so some sentries are
// started before anybody asks, each with its file server, which has no root
// directory yet. Root directory, network and memory come with the guest.

// kind is what a sentry has to know of its guest when it starts. JSON is for
// records.
type kind struct {
	Args     string         `json:"args"` // a JSON list, so that kinds compare
	Hostname string         `json:"hostname"`
	Limits   runtime.Limits `json:"limits"`
}

func kindOf(s runtime.Spec) kind {
	args, _ := json.Marshal(s.Args) // strings
	return kind{Args: string(args), Hostname: s.Hostname, Limits: s.Limits}
}

// spec is that of a guest of the kind, in dir, without what is only the guest's.
func (k kind) spec(id runtime.InstanceID, dir string) runtime.Spec {
	s := runtime.Spec{ID: id, RootFS: dir, Hostname: k.Hostname, Limits: k.Limits}
	_ = json.Unmarshal([]byte(k.Args), &s.Args) // we wrote it
	return s
}

// engine is a sentry that has no guest yet, and its file server.
type engine struct {
	kind     kind
	id       runtime.InstanceID // gVisor's for it, also when it has a guest
	layout   layout
	launched <-chan struct{} // closed when its launcher is gone
	sentry   *process
	gofer    *process
	conn     *net.UnixConn // the root directory goes there
}

const (
	// engineKinds is for how many kinds of guests there are engines.
	engineKinds = 2
	// engineHot is how long after a guest of a kind was restored or saved there
	// are engines for it.
	engineHot = 10 * time.Minute
	// engineAfter is how long the processors are left to the guests after
	// anything was done with one.
	engineAfter = 500 * time.Millisecond
	// engineCheck is how often it is looked whether they are still wanted.
	engineCheck = 30 * time.Second
	// engineReserve is how much memory has to be available for a new one, in
	// bytes; with less than half of it, they go.
	engineReserve = 1 << 30
)

// enginePrefix begins the IDs of engines without a guest. Their cgroups are
// spare ones.
const enginePrefix = sparePrefix + "e"

// alive reports whether both processes run.
func (e *engine) alive() bool { return e.sentry.alive() && e.gofer.alive() }

// wantAhead takes the number of engines that a server wants for each kind.
func (s *Supervisor) wantAhead(n string) {
	ahead, err := strconv.Atoi(n)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead = ahead
}

// heat notes that engines of a kind are likely to be wanted.
func (s *Supervisor) heat(k kind) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kinds[k] = s.now()
}

// busy notes that something is done with a guest, until the returned function is
// called: no engine is started meanwhile.
func (s *Supervisor) busy() (done func()) {
	s.mu.Lock()
	s.working++
	s.mu.Unlock()
	return func() {
		s.mu.Lock()
		s.working--
		s.lastWork = s.now()
		s.mu.Unlock()
		select {
		case s.wantSpare <- struct{}{}: // not before: its start would compete with that
		default:
		}
	}
}

// takeEngine returns an engine for a guest of a kind, or nil.
func (s *Supervisor) takeEngine(k kind) *engine {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n, e := range s.engines {
		if e.kind == k && e.alive() {
			s.engines = slices.Delete(s.engines, n, n+1)
			return e
		}
	}
	return nil
}

// plan says which engines have to go, whether one of a kind is to be started,
// and after which time to ask again; 0 is when something happens. available is
// the machine's free memory in bytes.
func (s *Supervisor) plan(available int64) (drop []*engine, start *kind, again time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	maps.DeleteFunc(s.kinds, func(_ kind, t time.Time) bool { return now.Sub(t) > engineHot })
	hot := slices.SortedFunc(maps.Keys(s.kinds), func(a, b kind) int { return s.kinds[b].Compare(s.kinds[a]) })
	hot = hot[:min(len(hot), engineKinds)]
	count := map[kind]int{}
	s.engines = slices.DeleteFunc(s.engines, func(e *engine) bool {
		if count[e.kind]++; !e.alive() || !slices.Contains(hot, e.kind) || count[e.kind] > s.ahead || available < engineReserve/2 {
			count[e.kind]--
			drop = append(drop, e)
			return true
		}
		return false
	})
	if len(hot) > 0 {
		again = engineCheck
	}
	if s.roots == nil || available < engineReserve || now.Sub(s.lastFailed) < engineCheck {
		return drop, nil, again
	}
	for _, k := range hot {
		if count[k] >= s.ahead {
			continue
		}
		if s.working > 0 {
			return drop, nil, again
		}
		if rest := engineAfter - now.Sub(s.lastWork); rest > 0 {
			return drop, nil, rest
		}
		return drop, &k, 0
	}
	return drop, nil, again
}

// keepEngines starts and ends engines as wanted. It returns after which time to
// call it again; 0 is when something happens.
func (s *Supervisor) keepEngines(ctx context.Context) time.Duration {
	for ctx.Err() == nil {
		available, _ := meminfo.Available() // 0 if that is not known
		drop, start, again := s.plan(available)
		for _, e := range drop {
			s.dropEngine(e)
		}
		if start == nil {
			return again
		}
		e, err := s.newEngine(ctx, *start)
		s.mu.Lock()
		if err == nil {
			s.engines = append(s.engines, e)
		} else {
			s.lastFailed = s.now()
		}
		s.mu.Unlock()
		if err != nil && ctx.Err() == nil {
			s.log.Warn("no engine could be started ahead", "err", err)
		}
	}
	return 0
}

// dropEngines ends all that have no guest.
func (s *Supervisor) dropEngines() {
	s.mu.Lock()
	all := s.engines
	s.engines = nil
	s.mu.Unlock()
	for _, e := range all {
		s.dropEngine(e)
	}
}

// newEngine starts an engine. One call at a time.
func (s *Supervisor) newEngine(ctx context.Context, k kind) (*engine, error) {
	ctx, cancel := context.WithTimeout(ctx, waitEnd)
	defer cancel()
	s.engineSeq++
	id := runtime.InstanceID(enginePrefix + strconv.Itoa(s.engineSeq))
	e := &engine{kind: k, id: id, layout: s.home.instance(id)}
	if err := s.launchEngine(ctx, e); err != nil {
		s.dropEngine(e)
		return nil, err
	}
	return e, nil
}

func (s *Supervisor) launchEngine(ctx context.Context, e *engine) error {
	l := e.layout
	if err := os.MkdirAll(l.engineRoot, 0o700); err != nil {
		return fmt.Errorf("making the engine's directory: %w", err)
	}
	oci := ociSpec(e.kind.spec(e.id, l.dir), l) // its network namespace is a new one, and stays empty
	if err := errors.Join(writeSpec(oci, l), makeConsole(l.console)); err != nil {
		return err
	}
	run, err := s.takeLauncher(cgroup(l.cgroup), oci.Linux.Resources)
	if err != nil {
		return err
	}
	if run.group == "" {
		run.close()
		return errors.New("the launcher has no cgroup of its own")
	}
	e.launched = run.exited
	told := append(bootLimits(e.kind.Limits), prelude.GoferOption+s.gofer, prelude.RootOption+s.home.roots())
	res, err := run.run(ctx, launchRequest{ID: string(e.id), Bundle: l.dir, Console: l.console, InCgroup: true,
		Flags: append(engineFlags(l, ""), shortFlag(told...))})
	if err != nil {
		return err
	}
	if e.sentry, err = openProcess(processID{PID: res.Sentry}); err != nil {
		return err
	}
	if e.gofer, err = openProcess(processID{PID: res.Gofer}); err != nil {
		return err
	}
	e.conn, err = s.asker(ctx, res.Gofer)
	return err
}

// dropEngine ends an engine without a guest, and removes what it has.
func (s *Supervisor) dropEngine(e *engine) {
	if e.conn != nil {
		e.conn.Close()
	}
	s.removeGroup(cgroup(e.layout.cgroup)) // and its processes
	for _, p := range []*process{e.sentry, e.gofer} {
		if p != nil {
			<-e.launched // only then they are our children
			p.reap()     // for when the reaper is gone
			p.close()
		}
	}
	if err := os.RemoveAll(e.layout.dir); err != nil {
		s.log.Warn("the directory of an engine without a guest could not be removed", "err", err)
	}
}

// listenRoots makes the socket where file servers ask for their root directory.
// Without it, no engine is started ahead; nor without the file server that knows
// of it, nor under cgroup v2, where a cgroup has one name for ever.
func (s *Supervisor) listenRoots() {
	_ = os.Remove(s.home.roots()) // ours by the lock, left by a dead supervisor
	if s.gofer == "" || s.DebugDir != "" || unified() {
		return
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.home.roots(), Net: "unix"})
	if err == nil {
		err = os.Chmod(s.home.roots(), 0o600)
	}
	if err != nil {
		s.log.Warn("no engines are started ahead", "err", err)
		return
	}
	s.roots = ln
}

// acceptRoots accepts the file servers of engines that are being started.
func (s *Supervisor) acceptRoots(ctx context.Context) {
	if s.roots == nil {
		return
	}
	defer context.AfterFunc(ctx, func() { s.roots.Close() })()
	for {
		conn, err := s.roots.AcceptUnix()
		if err != nil {
			return
		}
		select {
		case s.askers <- conn:
		case <-ctx.Done():
			conn.Close()
		}
	}
}

// asker returns the connection of a file server.
func (s *Supervisor) asker(ctx context.Context, pid int) (*net.UnixConn, error) {
	for {
		select {
		case conn := <-s.askers:
			if got, err := peer(conn); err == nil && got == pid {
				return conn, nil
			}
			conn.Close() // of one that failed
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the file server: %w", ctx.Err())
		}
	}
}

// peer returns the process at the other end of a connection.
func peer(conn *net.UnixConn) (int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return 0, cerr
	}
	if err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

// giveRoot hands an engine the root directory of its guest.
func (e *engine) giveRoot(path string) error {
	tree, err := gofer.CloneTree(path)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	if _, _, err := e.conn.WriteMsgUnix([]byte{0}, unix.UnixRights(tree), nil); err != nil {
		return fmt.Errorf("handing over the guest's root: %w", err)
	}
	return nil
}

// useEngine makes an engine that waited the instance's. What fails is undone,
// but for the engine, which is of no use any more. i.op is held.
func (i *instance) useEngine(e *engine, spec runtime.Spec) (err error) {
	if err := keepTmpOnDisk(spec.RootFS); err != nil {
		return err
	}
	i.mu.Lock()
	i.rec.Sandbox, i.rec.NetNS = e.id, spec.NetNS
	rec := i.rec
	i.mu.Unlock()
	group := cgroup(e.layout.cgroup)
	var con *console
	defer func() {
		if err == nil {
			return
		}
		con.close()
		_ = i.group.rename(group) // some hierarchies may have it
		_ = os.Rename(i.layout.dir, e.layout.dir)
		i.mu.Lock()
		i.rec.Sandbox, i.rec.NetNS, i.console = "", "", nil
		i.mu.Unlock()
	}()
	// At any instant the next supervisor finds directory and cgroup under a name
	// whose things it removes: that of a spare, or of a create that did not return.
	if err := rec.save(e.layout.record); err != nil {
		return err
	}
	if err := os.Rename(e.layout.dir, i.layout.dir); err != nil {
		return fmt.Errorf("taking over the engine's directory: %w", err)
	}
	if err := group.rename(i.group); err != nil {
		return err
	}
	if con, err = openConsole(i.layout.console, i.layout.log, i.sup.now); err != nil {
		return err
	}
	i.mu.Lock()
	i.console = con
	i.mu.Unlock()
	if err := e.giveRoot(spec.RootFS); err != nil {
		return err
	}
	i.launched = e.launched
	if err := i.attach(e.sentry.processID, e.gofer.processID); err != nil {
		return err
	}
	e.conn.Close()
	e.sentry.close()
	e.gofer.close()
	return nil
}
