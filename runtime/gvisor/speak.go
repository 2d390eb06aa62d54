package gvisor

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	goruntime "runtime"
	"strings"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/state/statefile"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/container"
	"gvisor.dev/gvisor/runsc/sandbox"
	"gvisor.dev/gvisor/runsc/specutils"

	"github.com/cayhq/cay/runtime"
)

// The sandboxes of a supervisor need not all be of its engine: one may have
// been started before an upgrade, or from a memory that an earlier engine
// wrote. The supervisor owns their processes like the others. But what is said
// to a sandbox in gVisor's own protocol is said by the sandbox's own program,
// in a process for each request.

// arg0Speak is argv[0] of such a process. The name, request and reply stay as
// they are, for programs of earlier versions read them; fields may be added.
const arg0Speak = "cay-speak"

// order is what a sandbox is told to do, or asked.
type order string

const (
	toStart      order = "start"
	toRestore    order = "restore"
	toCheckpoint order = "checkpoint"
	toFreeze     order = "freeze"
	toThaw       order = "thaw"
	toTell       order = "tell" // whether its tasks are stopped
	toLoad       order = "load" // when all of its memory has been read
)

// unknownOrder is in what an engine says to an order of a later one.
const unknownOrder = "does not know the order"

// request is one order to one sandbox.
type request struct {
	Home  string             `json:"home"`
	ID    runtime.InstanceID `json:"id"`
	Order order              `json:"order"`
	Dir   string             `json:"dir,omitempty"`
	Debug string             `json:"debug,omitempty"`
	// Of a sandbox that was started before its guest was known.
	Sandbox runtime.InstanceID `json:"sandbox,omitempty"`
	NetNS   string             `json:"netNS,omitempty"`
}

// reply is what came of it.
type reply struct {
	Stopped bool   `json:"stopped,omitempty"`
	Error   string `json:"error,omitempty"`
}

// tell gives the instance's sandbox an order. i.op is held, but for toLoad.
func (i *instance) tell(what order, dir string) (stopped bool, err error) {
	i.mu.Lock()
	rec := i.rec
	i.mu.Unlock()
	req := request{Home: string(i.sup.home), ID: rec.ID, Order: what, Dir: dir, Debug: i.sup.DebugDir, Sandbox: rec.Sandbox, NetNS: rec.NetNS}
	if exe := i.otherEngine(); exe != "" {
		return speakBy(i.sup.reaper, exe, req)
	}
	return speak(req)
}

// otherEngine returns the program of the instance's sandbox if its engine is
// not ours. It is the program of the process: the file may have been removed.
func (i *instance) otherEngine() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.rec.Engine == i.sup.engine || i.rec.Sentry.PID == 0 {
		return ""
	}
	return fmt.Sprintf("/proc/%d/exe", i.rec.Sentry.PID)
}

// speak carries out an order to a sandbox of the engine that is linked in.
func speak(req request) (stopped bool, err error) {
	l := home(req.Home).instance(req.ID)
	conf, err := engineConfig(engineFlags(l, req.Debug))
	if err != nil {
		return false, err
	}
	c, err := loadContainer(l, record{ID: req.ID, Sandbox: req.Sandbox}.sandbox())
	if err != nil {
		return false, err
	}
	switch req.Order {
	case toStart:
		return false, c.Start(conf)
	case toRestore:
		if req.NetNS != "" {
			return false, restoreIn(req.NetNS, c, conf, req.Dir)
		}
		return false, c.Restore(conf, req.Dir, false, true, nil)
	case toCheckpoint:
		return false, c.Checkpoint(conf, req.Dir, sandbox.CheckpointOpts{Compression: statefile.CompressionLevelNone, Resume: true})
	case toFreeze:
		return false, c.Sandbox.Pause(c.ID)
	case toThaw:
		return false, c.Sandbox.Resume(c.ID)
	case toLoad:
		return false, c.Sandbox.WaitRestore()
	case toTell:
		stacks, err := c.Sandbox.Stacks()
		if err != nil {
			return false, fmt.Errorf("asking the engine what its tasks do: %w", err)
		}
		return tasksStopped(stacks), nil
	}
	return false, fmt.Errorf("this engine (%s) %s %q", Version(), unknownOrder, req.Order)
}

// restoreIn is the container's Restore for a sandbox that is not in the network
// namespace of its guest.
//
// gVisor hands over the links of the namespace in which it finds the process
// that is the sandbox, and asks for that process for nothing else: here, this
// thread.
func restoreIn(netns string, c *container.Container, conf *config.Config, dir string) error {
	failed := make(chan error)
	go func() {
		goruntime.LockOSThread()
		back, err := specutils.ApplyNS(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: netns})
		if err != nil {
			failed <- fmt.Errorf("setting up network: %w", err)
			return
		}
		c.Sandbox.Pid.Store(unix.Gettid())
		err = c.Sandbox.Restore(conf, c.Spec, c.ID, dir, false, true, nil)
		_ = back() // for the descriptor that it holds: the thread ends
		failed <- err
	}()
	return <-failed
}

// loadContainer loads gVisor's own record of an instance.
func loadContainer(l layout, id runtime.InstanceID) (*container.Container, error) {
	full := container.FullID{SandboxID: string(id), ContainerID: string(id)}
	c, err := container.Load(l.engineRoot, full, container.LoadOpts{Exact: true, SkipCheck: true})
	if err != nil {
		return nil, fmt.Errorf("loading the engine's state: %w", err)
	}
	return c, nil
}

// speakMain is the process that speaks for another supervisor.
func speakMain() int {
	silenceEngineLog()
	var req request
	var rep reply
	err := json.NewDecoder(os.Stdin).Decode(&req)
	if err == nil {
		rep.Stopped, err = speak(req)
	}
	if err != nil {
		rep.Error = err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(rep); err != nil {
		return 1
	}
	return 0
}

// speakBy has an order carried out by another program.
func speakBy(r *reaper, exe string, req request) (stopped bool, err error) {
	in, err := json.Marshal(req)
	if err != nil {
		return false, fmt.Errorf("encoding the order: %w", err)
	}
	var out, complaint bytes.Buffer
	cmd := exec.Command(exe)
	cmd.Args, cmd.Env, cmd.Dir = []string{arg0Speak}, []string{}, "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &complaint
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	ended := make(chan error)
	go func() {
		// As of a launcher: the next supervisor must not meet it at work, and
		// the signal comes when the thread that forked ends.
		goruntime.LockOSThread()
		defer goruntime.UnlockOSThread()
		err := r.start(cmd)
		if err == nil {
			err = cmd.Wait()
			r.disown(cmd.Process.Pid)
		}
		ended <- err
	}()
	err = <-ended
	var rep reply
	if err == nil {
		err = json.Unmarshal(out.Bytes(), &rep)
	}
	if err != nil {
		said, _ := io.ReadAll(io.LimitReader(&complaint, 300))
		return false, fmt.Errorf("the instance's own engine program did not carry out %q: %w: %s", req.Order, err, strings.TrimSpace(string(said)))
	}
	if rep.Error != "" {
		return false, fmt.Errorf("%s", rep.Error)
	}
	return rep.Stopped, nil
}
