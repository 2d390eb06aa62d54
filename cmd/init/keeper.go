package main

import (
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Pauses before envd is started again: short at first, since every client is
// waiting, and longer while it fails at once. After a life of calm it has
// earned the short one again.
const (
	firstPause = 50 * time.Millisecond
	lastPause  = 5 * time.Second
	calm       = time.Minute
	reapEvery  = 50 * time.Millisecond
)

func nextPause(last, lived time.Duration) time.Duration {
	if last == 0 || lived >= calm {
		return firstPause
	}
	return min(2*last, lastPause)
}

// keeper keeps envd running. It has one thread of work, so that nobody else
// waits for children: each wait is for all of them, and envd's own end is
// recognised by its number.
type keeper struct {
	path  string
	args  []string
	env   []string
	token string
	state *os.File // keeps envd's configuration; nil: nothing does
	// listeners are envd's open ports; an envd that is started again finds the
	// connections that were made meanwhile.
	listeners []listener
	store     *store // nil: what envd holds open ends with it
	now       func() time.Time
	sleep     func(time.Duration)

	pause time.Duration
	ends  int
	trial bool // the next life is the first of another program
}

// previous is what the program before is called, while another one is tried. A
// trial ends well when the other one has lived for trialTime and serves. One that
// does not come to serve within upTime is ended.
const (
	previous  = ".previous"
	trialTime = 5 * time.Second
	upTime    = 12 * time.Second
)

// once starts envd, returns after it has ended and the pause after that, and
// reaps all the while.
func (k *keeper) once() {
	began := k.now()
	why := ""
	pid, over, err := k.start()
	if err != nil {
		why = "envd cannot be started: " + err.Error()
	} else {
		var trial *time.Timer
		if k.trial && k.store != nil {
			trial = time.AfterFunc(upTime, func() { k.giveUp(pid) })
		}
		why = "envd ended: " + describe(k.reapUntil(pid))
		if trial != nil {
			trial.Stop()
		}
	}
	if over != nil {
		k.store.hangUp()
		<-over
	}
	k.ends++
	lived := k.now().Sub(began)
	handed := err == nil && k.store != nil && k.store.handedOver()
	switch {
	case handed: // it served, and what is called the previous one is itself
	case k.trial && (lived < trialTime || !k.serves()):
		if os.Rename(k.path+previous, k.path) == nil { // there may be none
			why += "; the program before it is back"
		}
	case k.trial:
		_ = os.Remove(k.path + previous) // there may be none
	}
	k.trial = false
	if handed {
		k.trial, k.pause = true, 0
		say("envd handed over to the next after %s (end %d)", lived.Round(time.Millisecond), k.ends)
		return
	}
	k.pause = nextPause(k.pause, lived)
	say("%s after %s; starting it again in %s (end %d); processes of users go on", why, lived.Round(time.Millisecond), k.pause, k.ends)
	for until := k.now().Add(k.pause); k.now().Before(until); {
		_, _, _ = k.reap(unix.WNOHANG) // whoever ended: envd did already
		k.sleep(min(reapEvery, k.pause))
	}
}

// giveUp ends an envd on trial that does not serve.
func (k *keeper) giveUp(pid int) {
	if !k.store.serves() {
		say("envd does not serve after %s", upTime)
		_ = unix.Kill(pid, unix.SIGKILL) // it may have ended by itself
	}
}

// serves reports whether the last envd came to serve, as far as that is told.
func (k *keeper) serves() bool { return k.store == nil || k.store.serves() }

// start starts envd. The token goes through a pipe, which has room for it: so
// it is in no environment.
//
// over is closed when all that this envd said is stored.
func (k *keeper) start() (pid int, over chan struct{}, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, nil, fmt.Errorf("opening the standard input: %w", err)
	}
	defer null.Close()
	rd, wr, err := os.Pipe()
	if err != nil {
		return 0, nil, fmt.Errorf("making a pipe for the token: %w", err)
	}
	defer rd.Close()
	_, err = wr.WriteString(k.token)
	wr.Close()
	if err != nil {
		return 0, nil, fmt.Errorf("passing the token: %w", err)
	}
	args := slices.Clone(k.args)
	files := []uintptr{null.Fd(), 1, 2}
	if k.token != "" {
		args = append(args, fmt.Sprintf("-token-fd=%d", len(files)))
		files = append(files, rd.Fd())
	}
	if k.state != nil {
		args = append(args, fmt.Sprintf("-state-fd=%d", len(files)))
		files = append(files, k.state.Fd())
	}
	for _, l := range k.listeners {
		args = append(args, fmt.Sprintf("-%s-fd=%d", l.name, len(files)))
		files = append(files, uintptr(l.fd))
	}
	theirs := -1
	if k.store != nil {
		var stored chan struct{}
		theirs, stored, err = k.store.open()
		if err != nil {
			say("what envd holds open ends with it: %v", err)
		} else {
			over = stored
			args = append(args, fmt.Sprintf("-store-fd=%d", len(files)))
			files = append(files, uintptr(theirs))
		}
	}
	// Not os.StartProcess: it waits for children of its own, which reaping
	// would take away.
	pid, err = syscall.ForkExec(k.path, args, &syscall.ProcAttr{
		Dir: "/", Env: k.env, Files: files, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if theirs >= 0 {
		_ = unix.Close(theirs) // or nobody would hear that an envd has ended which is being told
	}
	if err != nil {
		return 0, over, fmt.Errorf("executing %s: %w", k.path, err)
	}
	if over != nil {
		k.store.handOut()
	}
	return pid, over, nil
}

// reapUntil waits for children until a certain one ends.
func (k *keeper) reapUntil(pid int) syscall.WaitStatus {
	for {
		got, st, err := k.reap(0)
		switch {
		case got == pid:
			return st
		case err == unix.ECHILD:
			return 0 // not ours any more; cannot happen while only we wait
		}
	}
}

// reap takes one ended child, or with WNOHANG all there are.
func (k *keeper) reap(options int) (pid int, st syscall.WaitStatus, err error) {
	for {
		pid, err = syscall.Wait4(-1, &st, options, nil)
		if pid > 0 && k.store != nil {
			k.store.ended(pid, uint32(st))
		}
		if err == unix.EINTR || options == unix.WNOHANG && pid > 0 {
			continue
		}
		return pid, st, err
	}
}

// describe says how a process ended.
func describe(st syscall.WaitStatus) string {
	switch {
	case st.Signaled() && st.Signal() == unix.SIGKILL:
		return "signal: killed (by the kernel for lack of memory, or by root)"
	case st.Signaled():
		return "signal: " + st.Signal().String()
	default:
		return fmt.Sprintf("exit status %d", st.ExitStatus())
	}
}
