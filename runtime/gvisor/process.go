package gvisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// processID names a process for as long as the machine runs: a PID alone is
// reused, a PID with its start time is not.
type processID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // in clock ticks since boot (field 22 of proc_pid_stat(5))
}

// process is a handle on a process that need not be a child.
type process struct {
	processID
	file *os.File // pidfd
	raw  syscall.RawConn
}

var errGone = errors.New("process is gone")

// startTime reads the start time of a process.
func startTime(pid int) (uint64, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, errGone
	}
	// The name in parentheses may hold anything; the fields follow its last ')'.
	_, rest, ok := strings.Cut(string(data[bytes.LastIndexByte(data, ')')+1:]), " ")
	f := strings.Fields(rest)
	if !ok || len(f) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat is malformed", pid)
	}
	return strconv.ParseUint(f[19], 10, 64) // field 22; rest begins with field 3
}

// openProcess opens a process; with want.Start 0 any process of that PID.
func openProcess(want processID) (*process, error) {
	if want.PID <= 0 {
		return nil, errGone
	}
	fd, err := unix.PidfdOpen(want.PID, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, errGone
	}
	file := os.NewFile(uintptr(fd), "pidfd")
	p := &process{processID: want, file: file}
	start, err := startTime(want.PID)
	if err == nil && want.Start != 0 && start != want.Start {
		err = errGone
	}
	if err == nil {
		p.raw, err = file.SyscallConn()
	}
	// Between opening and reading the start time the PID could have changed
	// hands only if our process is gone by now.
	if err == nil && !p.alive() {
		err = errGone
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	p.Start = start
	return p, nil
}

func readable(fd uintptr) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0
}

// alive reports whether the process has not ended.
func (p *process) alive() bool {
	ended := false
	err := p.raw.Control(func(fd uintptr) { ended = readable(fd) })
	return err == nil && !ended
}

// wait returns when the process has ended: a zombie counts as ended.
func (p *process) wait() error { return p.raw.Read(readable) }

// kill sends SIGKILL. A process that is gone is no error.
func (p *process) kill() error {
	var err error
	cerr := p.raw.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	if cerr != nil || errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

func (p *process) close() {
	if p != nil {
		p.file.Close()
	}
}

// reap collects the process if it is our child and has ended.
func (p *process) reap() (ws unix.WaitStatus, ok bool) {
	pid, err := unix.Wait4(p.PID, &ws, unix.WNOHANG, nil)
	return ws, err == nil && pid == p.PID
}

// reaper collects the processes that came to the supervisor because their own
// parent, a launcher, has ended, and that nobody else waits for.
type reaper struct {
	mu    sync.Mutex
	owned map[int]bool // PIDs somebody else waits for
}

func newReaper() *reaper { return &reaper{owned: map[int]bool{}} }

// start starts cmd, which the caller waits for.
func (r *reaper) start(cmd *exec.Cmd) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	r.owned[cmd.Process.Pid] = true
	return nil
}

// own makes the reaper leave pid to the caller.
func (r *reaper) own(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.owned[pid] = true
}

func (r *reaper) disown(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.owned, pid)
}

// run reaps until ctx ends.
func (r *reaper) run(ctx context.Context) {
	child := make(chan os.Signal, 1)
	signal.Notify(child, unix.SIGCHLD)
	defer signal.Stop(child)
	for {
		again := r.sweep()
		var timer <-chan time.Time
		if again {
			timer = time.After(20 * time.Millisecond)
		}
		select {
		case <-child:
		case <-timer:
		case <-ctx.Done():
			return
		}
	}
}

// sweep reaps what is nobody's, and reports whether an owned zombie hides the
// rest: the kernel shows one at a time.
func (r *reaper) sweep() (again bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var info unix.Siginfo
		if err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err != nil {
			return false
		}
		pid := siginfoPID(&info)
		if pid == 0 {
			return false
		}
		if r.owned[pid] {
			return true
		}
		_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
	}
}
