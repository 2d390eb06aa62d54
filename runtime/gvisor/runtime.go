package gvisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/runtime"
)

// Runtime is the gVisor runtime of one directory: a client of its supervisor,
// which Open starts when none answers, and which any call starts again when it
// has died.
type Runtime struct {
	// Dir holds the supervisor's socket and the instances: D/run/gvisor.
	Dir string
	// Exe is the program of the supervisor and of everything it starts; "" is the
	// one we are. It may be removed while it runs.
	Exe string
	// Ahead is how many engines are kept started for each kind of guest that was
	// saved or restored lately; 0 is none.
	Ahead int
	// Programs is the directory of the programs of engines, each under its name:
	// Exe's and those of earlier versions. "" is none.
	Programs string
	// Args is the supervisor's command line. Nil is "cay supervise --dir Dir".
	// Args[0] must not begin with "runsc".
	Args []string
	// Env is the supervisor's environment; nil is an empty one, for the server's
	// own may hold secrets and the supervisor needs nothing of it.
	Env []string
	Log *slog.Logger // nil: none
	// StartTimeout bounds the start of a supervisor; 0 is 15 s.
	StartTimeout time.Duration

	home home
	log  *slog.Logger
	http *http.Client

	spawn  sync.Mutex // one start of a supervisor at a time
	ending bool       // guarded by spawn: Shutdown has begun, no supervisor is started any more

	mu      sync.Mutex
	open    bool
	stop    context.CancelFunc
	watcher sync.WaitGroup
	waiters map[runtime.InstanceID][]chan runtime.Exit
	changed chan struct{} // closed when a waiter should look for itself
	info    hello
}

var _ runtime.Runtime = (*Runtime)(nil)

// New returns a closed runtime.
func New(dir string) *Runtime { return &Runtime{Dir: dir} }

// Open implements [runtime.Runtime].
func (r *Runtime) Open(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.open {
		return nil
	}
	dir, err := filepath.Abs(r.Dir)
	if err != nil {
		return fmt.Errorf("finding the runtime directory: %w", err)
	}
	r.home, r.log = home(dir), r.Log
	if r.log == nil {
		r.log = discardLogger
	}
	if n := len(r.home.socket()); n > maxSocketPath {
		return &cay.Error{Code: cay.CodeDataDirInvalid, Layer: cay.LayerRuntime,
			Message: fmt.Sprintf("the path of the data directory is too long: the supervisor's socket %s would have %d bytes of at most %d", r.home.socket(), n, maxSocketPath),
			Fix:     "use a data directory with a shorter path"}
	}
	if builtWithCgo {
		return &cay.Error{Code: cay.CodeHostUnsupported, Layer: cay.LayerRuntime, Message: "this binary was built with cgo, with which gVisor cannot start itself", Fix: "build with CGO_ENABLED=0"}
	}
	if os.Geteuid() != 0 {
		return &cay.Error{Code: cay.CodePrivilege, Layer: cay.LayerHost, Message: "gVisor needs root: it makes namespaces, mounts and cgroups", Fix: "run the server as root"}
	}
	socket := r.home.socket()
	r.http = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		MaxIdleConnsPerHost: 32,
	}}
	r.setEnding(false)
	if err := r.ensure(ctx); err != nil {
		r.http.CloseIdleConnections()
		return err
	}
	r.waiters, r.changed = map[runtime.InstanceID][]chan runtime.Exit{}, make(chan struct{})
	watch, stop := context.WithCancel(context.Background())
	r.stop, r.open = stop, true
	r.watcher.Go(func() { r.watch(watch) })
	return nil
}

// Close implements [runtime.Runtime].
func (r *Runtime) Close() error {
	r.mu.Lock()
	open := r.open
	r.open = false
	if open {
		close(r.changed) // whoever waits learns that the runtime is closed
		r.changed = make(chan struct{})
	}
	r.mu.Unlock()
	if !open {
		return nil
	}
	r.stop()
	r.watcher.Wait()
	r.http.CloseIdleConnections()
	return nil
}

// ensure makes sure that a supervisor of our protocol and engine answers. One of
// another version is asked to leave: its successor adopts the guests.
func (r *Runtime) ensure(ctx context.Context) error {
	r.spawn.Lock()
	defer r.spawn.Unlock()
	timeout := r.StartTimeout
	if timeout == 0 {
		timeout = 15 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var h hello
	err := r.ask(ctx, pathHello, &h)
	if err != nil && r.ending {
		return errEnding
	}
	if err == nil && (h.Protocol != Protocol || h.Engine != Version()) {
		r.log.Info("replacing the supervisor of another version", "pid", h.PID, "engine", h.Engine, "protocol", h.Protocol, "instances", h.Instances)
		if err := r.post(ctx, pathLeave, nil); err != nil {
			return r.unavailable("the supervisor of another version does not leave", err)
		}
		if err := r.waitGone(ctx, h.PID); err != nil {
			return err
		}
		err = errGone
	}
	if err == nil {
		r.info = h
		return nil
	}
	child, err := r.startSupervisor()
	if err != nil {
		return r.unavailable("the supervisor could not be started", err)
	}
	var again <-chan time.Time
	for {
		if err := r.ask(ctx, pathHello, &h); err == nil {
			r.info = h
			r.log.Info("supervisor started", "pid", h.PID)
			return nil
		}
		select {
		case err := <-child:
			if err != nil {
				return r.unavailable("the supervisor ended at once", err)
			}
			// It found another one, which may be at its end.
			child, again = nil, time.After(100*time.Millisecond)
		case <-again:
			again = nil
			if child, err = r.startSupervisor(); err != nil {
				return r.unavailable("the supervisor could not be started", err)
			}
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return r.unavailable("the supervisor does not answer", ctx.Err())
		}
	}
}

func (r *Runtime) unavailable(what string, err error) error {
	e := &cay.Error{Code: cay.CodeEngineUnavailable, Layer: cay.LayerRuntime, Message: what, Fix: "see " + r.home.log(), Err: err}
	if pid, rerr := os.ReadFile(r.home.lock()); rerr == nil {
		e.Detail = map[string]string{"pid": string(bytes.TrimSpace(pid))}
	}
	return e
}

// waitGone waits for a supervisor to end.
func (r *Runtime) waitGone(ctx context.Context, pid int) error {
	p, err := openProcess(processID{PID: pid})
	if err != nil {
		return nil //nolint:nilerr // it is gone
	}
	defer p.close()
	if d, ok := ctx.Deadline(); ok {
		_ = p.file.SetReadDeadline(d)
	}
	if err := p.wait(); err != nil {
		return r.unavailable("the supervisor of another version does not end", err)
	}
	return nil
}

// startSupervisor starts a supervisor that outlives us. The channel tells of its
// end.
func (r *Runtime) startSupervisor() (<-chan error, error) {
	if err := os.MkdirAll(string(r.home), 0o700); err != nil {
		return nil, fmt.Errorf("making the runtime directory: %w", err)
	}
	// The log is of one life of the supervisor and the one before: bounded.
	if st, err := os.Stat(r.home.log()); err == nil && st.Size() > 1<<20 {
		_ = os.Rename(r.home.log(), r.home.log()+".old")
	}
	out, err := os.OpenFile(r.home.log(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the supervisor's log: %w", err)
	}
	defer out.Close()
	args := r.Args
	if args == nil {
		args = []string{"cay", "supervise", "--dir", string(r.home)}
	}
	exe := r.Exe
	if exe == "" {
		exe = arg0Exe
	}
	cmd := exec.Command(exe)
	cmd.Args, cmd.Dir = args, "/"
	cmd.Env = append([]string{}, r.Env...) // not nil: that would be our own
	cmd.Stdout, cmd.Stderr = out, out
	// A session of its own: a terminal's Ctrl-C is for the server.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the supervisor, which may outlive Close
	return ended, nil
}

// errOffline says that no supervisor took the request.
var errOffline = errors.New("no supervisor answers")

// do sends one request. When no supervisor took it, the error is errOffline.
func (r *Runtime) do(ctx context.Context, method, path string, body []byte, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://supervisor"+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("making the request: %w", err)
	}
	resp, err := r.http.Do(req)
	if err != nil {
		if notTaken(ctx, method, err) {
			return fmt.Errorf("%w: %w", errOffline, err)
		}
		return fmt.Errorf("asking the supervisor: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var w wireError
		if err := json.NewDecoder(resp.Body).Decode(&w); err != nil {
			return fmt.Errorf("decoding the supervisor's error: %w", err)
		}
		return w.err()
	}
	if out == nil {
		_, _ = io.Copy(io.Discard, resp.Body)
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("decoding the supervisor's answer: %w", err)
	}
	return nil
}

// notTaken reports whether a request without an answer may be sent to another
// supervisor: none was there to take it, or nothing but a question was lost.
func notTaken(ctx context.Context, method string, err error) bool {
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return true
	}
	return method == http.MethodGet && ctx.Err() == nil
}

func (r *Runtime) ask(ctx context.Context, path string, out any) error {
	return r.do(ctx, http.MethodGet, path, nil, out)
}

func (r *Runtime) post(ctx context.Context, path string, body []byte) error {
	return r.do(ctx, http.MethodPost, path, body, nil)
}

// call is do for callers outside: it starts a supervisor when none is there,
// and types what is not typed.
func (r *Runtime) call(ctx context.Context, method, path string, body []byte, out any) error {
	r.mu.Lock()
	open := r.open
	r.mu.Unlock()
	if !open {
		return &cay.Error{Code: cay.CodeEngineUnavailable, Layer: cay.LayerRuntime, Message: "the runtime is closed"}
	}
	err := r.do(ctx, method, path, body, out)
	if errors.Is(err, errOffline) {
		if err := r.ensure(ctx); err != nil {
			return err
		}
		err = r.do(ctx, method, path, body, out)
	}
	var typed *cay.Error
	if err == nil || errors.As(err, &typed) || ctx.Err() != nil {
		return err
	}
	return r.unavailable("the supervisor did not answer "+path, err)
}

func withID(path string, id runtime.InstanceID) string {
	return path + "?id=" + url.QueryEscape(string(id))
}

// Info implements [runtime.Runtime].
func (r *Runtime) Info(ctx context.Context) (runtime.Info, error) {
	var h hello
	if err := r.call(ctx, http.MethodGet, pathHello, nil, &h); err != nil {
		return runtime.Info{}, err
	}
	d := h.Detail
	if d == nil {
		d = map[string]string{}
	}
	d["supervisor_pid"] = strconv.Itoa(h.PID)
	d["protocol"] = strconv.Itoa(h.Protocol)
	d["engines_ahead"] = strconv.Itoa(h.Ahead)
	return runtime.Info{Name: "gvisor", Version: h.Engine, Program: r.program(), Platform: enginePlatform, Detail: d}, nil
}

// Create implements [runtime.Runtime].
func (r *Runtime) Create(ctx context.Context, s runtime.Spec) error {
	body, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encoding the spec: %w", err)
	}
	q := url.Values{"ahead": {strconv.Itoa(r.Ahead)}}
	if e := s.Engine; e.Version != "" && e.Version != Version() {
		file := filepath.Join(r.Programs, e.Program)
		if _, err := os.Stat(file); err != nil || r.Programs == "" || e.Program == "" {
			return &cay.Error{Code: cay.CodeSnapshotIncompatible, Layer: cay.LayerRuntime,
				Message: fmt.Sprintf("the engine %s is not there any more; this node has %s", e.Version, Version()),
				Fix:     "start from the disk alone, or with the version of Cay that has it", Err: err}
		}
		q.Set("program", file)
	}
	return r.call(ctx, http.MethodPost, pathCreate+"?"+q.Encode(), body, nil)
}

// program names our own engine's program.
func (r *Runtime) program() string {
	if r.Exe == "" || filepath.Dir(r.Exe) != filepath.Clean(r.Programs) {
		return ""
	}
	return filepath.Base(r.Exe)
}

// Start implements [runtime.Runtime].
func (r *Runtime) Start(ctx context.Context, id runtime.InstanceID) error {
	return r.post1(ctx, pathStart, id, "")
}

// post1 asks the supervisor to do something with one instance.
func (r *Runtime) post1(ctx context.Context, path string, id runtime.InstanceID, dir string) error {
	q := url.Values{"id": {string(id)}}
	if dir != "" {
		q.Set("dir", dir)
	}
	return r.call(ctx, http.MethodPost, path+"?"+q.Encode(), nil, nil)
}

// Kill implements [runtime.Runtime].
func (r *Runtime) Kill(ctx context.Context, id runtime.InstanceID) error {
	return r.post1(ctx, pathKill, id, "")
}

// Instances implements [runtime.Runtime].
func (r *Runtime) Instances(ctx context.Context) ([]runtime.Instance, error) {
	var out []runtime.Instance
	return out, r.call(ctx, http.MethodGet, pathInstances, nil, &out)
}

// Console implements [runtime.Runtime].
func (r *Runtime) Console(ctx context.Context, id runtime.InstanceID) ([]cay.ConsoleLine, error) {
	var out consoleAnswer
	err := r.call(ctx, http.MethodGet, withID(pathConsole, id), nil, &out)
	return out.Lines, err
}

// Stats implements [runtime.Runtime].
func (r *Runtime) Stats(ctx context.Context, id runtime.InstanceID) (runtime.Stats, error) {
	var out runtime.Stats
	return out, r.call(ctx, http.MethodGet, withID(pathStats, id), nil, &out)
}

// errEnding is the answer to who would start a supervisor while Shutdown ends it.
var errEnding = &cay.Error{Code: cay.CodeEngineUnavailable, Layer: cay.LayerRuntime, Message: "the engine is being shut down", Fix: "start the server again"}

// Shutdown implements [runtime.Runtime]. When it returns, the supervisor's
// process is gone.
func (r *Runtime) Shutdown(ctx context.Context) error {
	// Whoever finds no supervisor starts one, and right after the end of this
	// one somebody would: the watcher, or a caller of Wait.
	r.setEnding(true)
	err := r.do(ctx, http.MethodPost, pathShutdown, nil, nil)
	if errors.Is(err, errOffline) {
		// Guests may be there without a supervisor.
		r.setEnding(false)
		err = r.call(ctx, http.MethodGet, pathHello, nil, nil)
		r.setEnding(true)
		if err == nil {
			err = r.do(ctx, http.MethodPost, pathShutdown, nil, nil)
		}
	}
	if err == nil {
		r.spawn.Lock()
		pid := r.info.PID
		r.spawn.Unlock()
		err = r.waitGone(ctx, pid)
	}
	if err != nil {
		r.setEnding(false)
		return err
	}
	return r.Close()
}

func (r *Runtime) setEnding(v bool) {
	r.spawn.Lock()
	defer r.spawn.Unlock()
	r.ending = v
}

// Wait implements [runtime.Runtime].
func (r *Runtime) Wait(ctx context.Context, id runtime.InstanceID) (runtime.Exit, error) {
	ch := make(chan runtime.Exit, 1)
	r.mu.Lock()
	if r.waiters != nil {
		r.waiters[id] = append(r.waiters[id], ch)
	}
	r.mu.Unlock()
	defer r.unwait(id, ch)
	for {
		r.mu.Lock()
		changed := r.changed
		r.mu.Unlock()
		// Asked after ch was entered: an end is in the answer or comes by ch.
		var i runtime.Instance
		err := r.call(ctx, http.MethodGet, withID(pathInstance, id), nil, &i)
		switch {
		case err == nil && i.Exit != nil:
			return *i.Exit, nil
		case err != nil:
			select {
			case e := <-ch: // ended and removed in between
				return e, nil
			default:
				return runtime.Exit{}, err
			}
		}
		select {
		case e := <-ch:
			return e, nil
		case <-changed:
		case <-ctx.Done():
			return runtime.Exit{}, ctx.Err()
		}
	}
}

func (r *Runtime) unwait(id runtime.InstanceID, ch chan runtime.Exit) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rest := r.waiters[id][:0]
	for _, c := range r.waiters[id] {
		if c != ch {
			rest = append(rest, c)
		}
	}
	if len(rest) == 0 {
		delete(r.waiters, id)
	} else {
		r.waiters[id] = rest
	}
}

// watch hands ends of instances to those who wait, by one request for all. It
// also notices a supervisor that died, and starts the next one.
func (r *Runtime) watch(ctx context.Context) {
	var epoch string
	var seq int64
	for ctx.Err() == nil {
		var e exits
		q := url.Values{"epoch": {epoch}, "after": {strconv.FormatInt(seq, 10)}}
		if err := r.ask(ctx, pathExits+"?"+q.Encode(), &e); err != nil {
			if ctx.Err() != nil {
				return
			}
			if err := r.ensure(ctx); err != nil && ctx.Err() == nil {
				if !errors.Is(err, errEnding) {
					r.log.Error("the engine's supervisor is away", "err", err)
				}
				select {
				case <-time.After(time.Second):
				case <-ctx.Done():
				}
			}
			continue
		}
		r.mu.Lock()
		if e.Epoch != epoch {
			close(r.changed)
			r.changed = make(chan struct{})
		}
		for _, x := range e.Exits {
			for _, ch := range r.waiters[x.ID] {
				select {
				case ch <- x.Exit:
				default:
				}
			}
		}
		r.mu.Unlock()
		epoch, seq = e.Epoch, e.Seq
	}
}
