package gvisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/control/client"
	"gvisor.dev/gvisor/runsc/boot"
	"gvisor.dev/gvisor/runsc/container"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/prelude"
	"github.com/cayhq/cay/runtime"
)

// instance is one guest in the supervisor.
//
// op serialises Create, Start and the removal; it is held over calls that an
// engine may never answer, so ending the processes must not need it. mu guards
// the fields below it and is never held over a wait.
type instance struct {
	layout layout
	group  cgroup
	sup    *Supervisor
	log    *slog.Logger

	op sync.Mutex

	launch    context.Context // ends when the instance is being killed
	endLaunch context.CancelCauseFunc
	launched  <-chan struct{} // closed when the launcher is gone; nil of an adopted instance
	watching  sync.WaitGroup
	ended     chan struct{} // closed when rec.Exit is set

	mu      sync.Mutex
	rec     record
	sentry  *process
	gofer   *process
	console *console
	killed  bool // Kill was asked for
	begun   bool // the guest may have run, also before that is on record
	bereft  bool // the gofer was killed before the sentry ended
	removed bool
	// guest is PID 1's status as the engine reported it; asked is closed when
	// the engine has answered or cannot any more, and nil before the start.
	guest *unix.WaitStatus
	asked chan struct{}
	// loaded is closed when the guest has read all of its memory, or unread says
	// why it has not; nil of one that was not restored.
	loaded chan struct{}
	unread error
}

var errKilled = errors.New("the instance is being killed")

func (s *Supervisor) newInstance(rec record) *instance {
	l := s.home.instance(rec.ID)
	i := &instance{layout: l, group: cgroup(l.cgroup), sup: s, log: s.log.With("instance", rec.ID), rec: rec, ended: make(chan struct{})}
	i.launch, i.endLaunch = context.WithCancelCause(context.Background())
	return i
}

func (i *instance) snapshot() runtime.Instance {
	i.mu.Lock()
	defer i.mu.Unlock()
	r := runtime.Instance{ID: i.rec.ID, PID: i.rec.Sentry.PID, State: i.rec.State, CreatedAt: i.rec.CreatedAt, Labels: i.rec.Labels}
	switch r.State {
	case creating:
		r.State = runtime.Created
	case freezing, thawing:
		r.State = runtime.Frozen // until it is known better: a thaw finds out
	}
	if i.rec.Exit != nil {
		e := *i.rec.Exit
		r.Exit = &e
	}
	return r
}

// setState records a state that was reached. After the end it does nothing.
func (i *instance) setState(st runtime.State) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.rec.Exit != nil {
		return nil
	}
	i.rec.State = st
	return i.rec.save(i.layout.record)
}

// create makes the instance's directory and processes. program is that of
// another engine, or "" for ours. i.op is held.
func (i *instance) create(ctx context.Context, spec runtime.Spec, program string) error {
	if program == "" && spec.Restore {
		if used, err := i.createAhead(spec); used {
			return err
		}
	}
	l := i.layout
	if err := os.MkdirAll(l.engineRoot, 0o700); err != nil {
		return fmt.Errorf("making the instance directory: %w", err)
	}
	if err := i.rec.save(l.record); err != nil {
		return err
	}
	if err := keepTmpOnDisk(spec.RootFS); err != nil {
		return err
	}
	oci := ociSpec(spec, l)
	if program == "" {
		if err := writeSpec(oci, l); err != nil {
			return err
		}
	}
	if err := makeConsole(l.console); err != nil {
		return err
	}
	con, err := openConsole(l.console, l.log, i.sup.now)
	if err != nil {
		return err
	}
	i.mu.Lock()
	i.console = con
	i.mu.Unlock()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(i.launch, func() { cancel(errKilled) })()
	var run *launcher
	if program == "" {
		run, err = i.sup.takeLauncher(i.group, oci.Linux.Resources)
	} else {
		run, err = startLauncher(i.sup.reaper, "", program)
	}
	if err != nil {
		return err
	}
	i.launched = run.exited
	req := launchRequest{ID: string(spec.ID), Bundle: l.dir, Console: l.console, InCgroup: run.group != ""}
	if program == "" {
		var told []string
		if req.InCgroup {
			told = bootLimits(spec.Limits)
		}
		if i.sup.gofer != "" {
			told = append(told, prelude.GoferOption+i.sup.gofer)
		}
		req.Flags = append(engineFlags(l, i.sup.DebugDir), shortFlag(told...))
	} else {
		req.Home, req.Spec, req.Debug = string(i.sup.home), &spec, i.sup.DebugDir
	}
	res, err := run.run(ctx, req)
	if err != nil {
		if tail := tailOf(l.panicLog); tail != "" {
			err = fmt.Errorf("%w; the engine's last words: %s", err, tail)
		}
		return err
	}
	if err := i.attach(processID{PID: res.Sentry}, processID{PID: res.Gofer}); err != nil {
		return fmt.Errorf("the engine ended at once: %w: %s", err, tailOf(l.panicLog))
	}
	if err := i.setState(runtime.Created); err != nil {
		return err
	}
	i.watch()
	return nil
}

// createAhead is create with an engine that was started ahead, if there is one.
func (i *instance) createAhead(spec runtime.Spec) (used bool, err error) {
	e := i.sup.takeEngine(kindOf(spec))
	if e == nil {
		return false, nil
	}
	if err := i.useEngine(e, spec); err != nil {
		i.log.Warn("an engine that was started ahead cannot be used", "err", err)
		i.sup.dropEngine(e)
		return false, nil
	}
	if err := i.setState(runtime.Created); err != nil {
		return true, err
	}
	i.watch()
	return true, nil
}

// attach takes hold of the engine's processes.
func (i *instance) attach(sentry, gofer processID) error {
	s, err := openProcess(sentry)
	if err != nil {
		return err
	}
	g, err := openProcess(gofer)
	if err != nil {
		s.close()
		return err
	}
	i.sup.reaper.own(s.PID)
	i.sup.reaper.own(g.PID)
	i.mu.Lock()
	defer i.mu.Unlock()
	i.sentry, i.gofer = s, g
	i.rec.Sentry, i.rec.Gofer = s.processID, g.processID
	if i.killed { // before there was anything to signal
		return errors.Join(s.kill(), g.kill())
	}
	return nil
}

// start runs the guest. i.op is held.
func (i *instance) start() error {
	i.mu.Lock()
	st, saved := i.rec.State, i.rec.Restore
	i.mu.Unlock()
	if saved {
		return i.wrongState("started: it is for a guest that was saved", st)
	}
	if st != runtime.Created {
		return &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerRuntime, Message: fmt.Sprintf("instance %s is %s; only a created one can be started", i.rec.ID, st)}
	}
	i.setBegun(true)
	if _, err := i.tell(toStart, ""); err != nil {
		i.setBegun(false)
		return i.startError(err)
	}
	i.ask()
	return i.setState(runtime.Running)
}

// setBegun notes that the guest may be running: its end can be seen before its
// start has returned.
func (i *instance) setBegun(yes bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.begun = yes
}

// startError says which part of a start failed.
func (i *instance) startError(err error) error {
	e := &cay.Error{Code: cay.CodeEngineFailed, Layer: cay.LayerRuntime, Message: "the engine could not start the guest of instance " + string(i.rec.ID), Err: err}
	text := err.Error()
	switch {
	case bytes.Contains([]byte(text), []byte("setting up network")):
		e.Layer, e.Code = cay.LayerNetwork, cay.CodeNetworkUnavailable
		e.Message = "the engine could not take over the network of instance " + string(i.rec.ID)
	case bytes.Contains([]byte(text), []byte("no such file or directory")) || bytes.Contains([]byte(text), []byte("exec format")):
		e.Layer, e.Code = cay.LayerInit, cay.CodeInitFailed
		e.Message = "PID 1 of instance " + string(i.rec.ID) + " could not be executed"
	}
	return e
}

// container loads gVisor's own record of the instance.
func (i *instance) container() (*container.Container, error) {
	return loadContainer(i.layout, i.sandbox())
}

// sandbox is the ID that gVisor knows the instance by.
func (i *instance) sandbox() runtime.InstanceID {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.rec.sandbox()
}

// ask starts to ask the engine for PID 1's status, which it alone knows once
// the supervisor is not its parent any more.
func (i *instance) ask() {
	asked := make(chan struct{})
	i.mu.Lock()
	i.asked = asked
	i.mu.Unlock()
	i.watching.Go(func() {
		defer close(asked)
		i.askExit()
	})
}

// askExit ends with the guest or with the engine.
func (i *instance) askExit() {
	c, err := i.container()
	if err != nil {
		return
	}
	conn, err := client.ConnectTo(c.Sandbox.GetControlSocketPath())
	if err != nil {
		return
	}
	defer conn.Close()
	id := string(i.sandbox())
	var ws unix.WaitStatus
	if err := conn.Call(boot.ContMgrWait, &id, &ws); err != nil {
		return // the engine ended first; watch finds out why
	}
	i.mu.Lock()
	i.guest = &ws
	i.mu.Unlock()
}

// watch waits for the end of the engine's processes. The engine cannot live
// without its gofer: when that ends first, the guest would hang on its disk.
func (i *instance) watch() {
	i.mu.Lock()
	sentry, gofer := i.sentry, i.gofer
	i.mu.Unlock()
	i.watching.Go(func() {
		_ = gofer.wait()
		if i.launched != nil {
			<-i.launched // only then is it our child
		}
		if sentry.alive() { // else it took its gofer along
			ws, ok := gofer.reap()
			i.mu.Lock()
			i.bereft = ok && ws.Signaled()
			i.mu.Unlock()
		}
		_ = sentry.kill() // no effect when it is gone already
		gofer.reap()
		i.sup.reaper.disown(gofer.PID)
	})
	i.watching.Go(func() {
		_ = sentry.wait()
		if i.launched != nil {
			<-i.launched // only then is it our child
		}
		ws, reaped := sentry.reap()
		i.sup.reaper.disown(sentry.PID)
		_ = gofer.kill()
		i.end(ws, reaped)
	})
}

// end records why the instance ended.
func (i *instance) end(ws unix.WaitStatus, reaped bool) {
	i.mu.Lock()
	answers := []chan struct{}{i.asked, i.loaded}
	i.mu.Unlock()
	for _, answer := range answers {
		if answer == nil {
			continue
		}
		select {
		case <-answer: // at once: the engine's end of the connection is closed
		case <-time.After(time.Second):
		}
	}
	i.console.drain()
	oom, pids := i.group.oomKills(), i.group.pidsRefused()
	i.mu.Lock()
	if i.rec.Exit != nil {
		i.mu.Unlock()
		return
	}
	e := runtime.Exit{Code: -1, At: i.sup.now().UTC()}
	switch guest := i.guest; {
	case i.killed:
		e.Reason, e.Code, e.Message = cay.EndRequest, 137, "the instance was killed"
	case i.bereft: // whatever became of the guest without its files
		e.Reason, e.Message = cay.EndEngineCrash, "the engine's file server was ended by a signal"
	case i.unread != nil && oom == 0 && (guest == nil || guest.Signal() == unix.SIGKILL):
		e.Reason, e.Message = cay.EndEngineCrash, "the memory of the guest could not be read to the end: "+firstLine(i.unread.Error())
	case guest != nil:
		e.Reason, e.Code, e.Message = cay.EndGuestExit, exitCode(*guest), "PID 1 of the guest "+describe(*guest)
	case oom > 0:
		e.Reason, e.Code, e.Message = cay.EndOOM, 137, "the guest used more memory than its limit, and the kernel ended the engine"
	case pids > 0:
		e.Reason, e.Message = cay.EndPIDs, fmt.Sprintf("the guest's processes exhausted the limit on host tasks (%d forks refused)", pids)
	case reaped && ws.Exited() && (i.begun || i.rec.State == runtime.Running) && tailOf(i.layout.panicLog) == "":
		// PID 1 ended before the engine could answer askExit; the engine
		// exits with the guest's status.
		e.Reason, e.Code, e.Message = cay.EndGuestExit, ws.ExitStatus(), "PID 1 of the guest "+describe(ws)
	default:
		e.Reason, e.Message = cay.EndEngineCrash, "the engine process ended"
		if reaped {
			e.Message = "the engine process " + describe(ws)
		}
		if tail := tailOf(i.layout.panicLog); tail != "" {
			e.Message += ": " + tail
		}
	}
	i.finish(e)
	i.mu.Unlock()
	i.sup.publish(exit{ID: i.rec.ID, Exit: e})
	i.log.Info("instance ended", "reason", e.Reason, "code", e.Code, "message", e.Message)
}

// finish records the end. i.mu is held.
func (i *instance) finish(e runtime.Exit) {
	i.rec.State, i.rec.Exit = runtime.Exited, &e
	if !i.removed {
		if err := i.rec.save(i.layout.record); err != nil {
			i.log.Warn("the end of an instance could not be recorded", "err", err)
		}
	}
	close(i.ended)
}

func exitCode(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

func describe(ws unix.WaitStatus) string {
	if ws.Signaled() {
		return "was ended by signal " + ws.Signal().String()
	}
	return fmt.Sprintf("exited with code %d", ws.ExitStatus())
}

// tailOf returns the last words in a log of the engine: what follows the first
// "panic:" or "fatal error:", else the end, at most 1 KiB.
func tailOf(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	data, _ := io.ReadAll(io.LimitReader(f, 256<<10))
	for _, mark := range []string{"panic:", "fatal error:"} {
		if at := bytes.Index(data, []byte(mark)); at >= 0 {
			data = data[at:]
			return string(bytes.TrimSpace(data[:min(len(data), 1<<10)]))
		}
	}
	return string(bytes.TrimSpace(data[max(0, len(data)-1<<10):]))
}

// signalAll ends the engine's processes without waiting.
func (i *instance) signalAll() {
	i.mu.Lock()
	i.killed = true
	sentry, gofer := i.sentry, i.gofer
	i.mu.Unlock()
	i.endLaunch(errKilled)
	for _, p := range []*process{sentry, gofer} {
		if p != nil {
			if err := p.kill(); err != nil {
				i.log.Warn("a process could not be signalled", "pid", p.PID, "err", err)
			}
		}
	}
}

// destroy ends the instance and removes everything of it. It may be called
// again after an error, and by several at once.
func (i *instance) destroy(ctx context.Context) error {
	i.signalAll()
	i.op.Lock()
	defer i.op.Unlock()
	i.mu.Lock()
	removed, sentry := i.removed, i.sentry
	i.mu.Unlock()
	if removed {
		return nil
	}
	if sentry != nil {
		watched := make(chan struct{})
		go func() { i.watching.Wait(); close(watched) }()
		select {
		case <-watched:
		case <-ctx.Done():
			return i.killError("its processes did not end in time", ctx.Err())
		}
	}
	// Whatever else runs in its cgroup, as after a launcher that died.
	if err := i.group.killAll(ctx); err != nil {
		return i.killError("some of its processes did not end", err)
	}
	if err := i.group.remove(ctx); err != nil {
		return i.killError("its cgroup could not be removed", err)
	}
	i.mu.Lock()
	con := i.console
	i.mu.Unlock()
	con.close()
	if err := os.RemoveAll(i.layout.dir); err != nil {
		return i.killError("its directory could not be removed", err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.removed = true
	i.sentry.close()
	i.gofer.close()
	if i.rec.Exit == nil {
		i.finish(runtime.Exit{Reason: cay.EndRequest, Code: -1, Message: "the instance was killed before it ran", At: i.sup.now().UTC()})
	}
	return nil
}

func (i *instance) killError(what string, err error) error {
	return &cay.Error{Code: cay.CodeEngineFailed, Layer: cay.LayerRuntime,
		Message: fmt.Sprintf("instance %s could not be ended: %s", i.rec.ID, what), Fix: "the kill may be repeated", Err: err}
}

// adopt takes over an instance that an earlier supervisor left. It reports
// false when nothing of it is worth keeping.
func (i *instance) adopt() bool {
	switch {
	case i.rec.Exit != nil:
		close(i.ended)
		i.console, _ = openConsole(i.layout.console, i.layout.log, i.sup.now)
		return true
	case i.rec.State == creating:
		return false // its Create never returned: nobody counts on it
	}
	con, err := openConsole(i.layout.console, i.layout.log, i.sup.now)
	if err != nil {
		i.log.Warn("the console of an adopted instance is lost", "err", err)
	}
	i.console = con
	switch {
	case i.rec.Boot != bootID():
		i.lost("the machine restarted")
		return true
	case i.rec.State == runtime.Created && i.rec.Engine != i.sup.engine:
		// A guest that runs needs nothing of us but to be watched and ended; one
		// that waits for its start would be spoken to by another version.
		i.lost("it was prepared by engine " + i.rec.Engine + " and not started before the upgrade to " + i.sup.engine)
		return true
	}
	if err := i.attach(i.rec.Sentry, i.rec.Gofer); err != nil {
		i.lost("")
		return true
	}
	if i.rec.State == runtime.Created && i.startedUnseen() {
		if err := i.setState(runtime.Running); err != nil {
			i.log.Warn("the state of an adopted instance could not be recorded", "err", err)
		}
	}
	i.watch()
	if i.rec.Loading {
		i.load()
	}
	switch i.rec.State {
	case freezing, thawing:
		if err := i.settle(); err != nil {
			i.log.Warn("whether an adopted guest is frozen could not be found out", "err", err)
		}
		i.ask()
	case runtime.Running, runtime.Frozen:
		i.ask()
	}
	return true
}

// startedUnseen asks the engine whether the guest runs: the earlier supervisor
// may have died between starting it and recording that.
func (i *instance) startedUnseen() bool {
	c, err := i.container()
	if err != nil {
		return false
	}
	st, err := c.Sandbox.ContainerRuntimeState(string(i.sandbox()))
	return err == nil && st == boot.RuntimeStateRunning
}

// lost records the end of an instance that nobody saw.
func (i *instance) lost(why string) {
	for _, id := range []processID{i.rec.Sentry, i.rec.Gofer} {
		if p, err := openProcess(id); err == nil { // one of the two may be left
			_ = p.kill()
			p.close()
		}
	}
	e := runtime.Exit{Reason: cay.EndEngineCrash, Code: -1, At: i.sup.now().UTC(), Message: "the engine process ended while no supervisor was watching"}
	switch {
	case why != "":
		e.Message = why
	case i.group.oomKills() > 0:
		e.Reason, e.Message = cay.EndOOM, "the guest used more memory than its limit, while no supervisor was watching"
	case i.group.pidsRefused() > 0:
		e.Reason, e.Message = cay.EndPIDs, "the guest's processes exhausted the limit on host tasks, while no supervisor was watching"
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.finish(e)
}

// waitEnd bounds how long the supervisor waits for one instance to go.
const waitEnd = 30 * time.Second
