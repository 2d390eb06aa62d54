package envd

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/process"
)

// defaultPath is PATH where envd itself has none.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func daemonPath() string {
	if p := os.Getenv("PATH"); p != "" {
		return p
	}
	return defaultPath
}

// oomScore makes the kernel choose processes of users before envd.
const oomScore = "100"

// command is what to start.
type command struct {
	config *pb.ProcessConfig
	tag    *string
	pty    *pb.PTY // nil: pipes
	stdin  bool
	user   *user
	env    map[string]string // global environment
	dir    string            // default directory
	until  time.Time         // when it is killed; zero: never
}

// environment is that of a new process: PATH, the account's variables, the
// sandbox's, the request's; the last wins, and nothing of envd's own.
func environment(c command) []string {
	m := map[string]string{
		"PATH": daemonPath(), "HOME": c.user.home, "USER": c.user.name, "LOGNAME": c.user.name,
	}
	maps.Copy(m, c.env)
	maps.Copy(m, c.config.GetEnvs())
	env := make([]string, 0, len(m))
	for k, v := range m {
		env = append(env, k+"="+v)
	}
	slices.Sort(env)
	return env
}

// workingDir is the directory of a new process; it must exist and the account
// must be able to enter it.
func workingDir(c command) (string, error) {
	dir, err := resolvePath(c.config.GetCwd(), c.user, c.dir)
	if err != nil {
		return "", err
	}
	err = c.user.do(func() error {
		st, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if !st.IsDir() {
			return syscall.ENOTDIR
		}
		return unix.Faccessat(unix.AT_FDCWD, dir, unix.X_OK, unix.AT_EACCESS)
	})
	switch {
	case err == nil:
		return dir, nil
	case isNotExist(err) && !errors.Is(err, syscall.ENOTDIR):
		return "", invalid("cwd '%s' does not exist", dir)
	case errors.Is(err, syscall.ENOTDIR):
		return "", invalid("cwd '%s' is not a directory", dir)
	default:
		return "", invalid("cwd '%s' cannot be used: %v", dir, err)
	}
}

// lookPath finds a program as a shell of the account would, in the PATH that
// the process gets.
func lookPath(c command, dir string, env []string) (string, error) {
	name := c.config.GetCmd()
	if name == "" {
		return "", invalid("the command is empty")
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", invalid("the command must not contain a NUL byte")
	}
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		return name, nil
	}
	path := ""
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	return with(c.user, func() (string, error) {
		for d := range strings.SplitSeq(path, ":") {
			if d == "" {
				d = "."
			}
			if !filepath.IsAbs(d) {
				d = filepath.Join(dir, d)
			}
			f := filepath.Join(d, name)
			if st, err := os.Stat(f); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
				return f, nil
			}
		}
		return "", invalid("error starting process '%s': executable file not found in $PATH", name)
	})
}

// start runs a command. The process is registered and its output waits for
// run; a caller subscribes in between, so that nothing is missed.
func (ps *processes) start(c command) (p *process, err error) {
	dir, err := workingDir(c)
	if err != nil {
		return nil, err
	}
	env := environment(c)
	for _, kv := range env {
		if strings.IndexByte(kv, 0) >= 0 || kv[0] == '=' {
			return nil, invalid("an environment variable has a name or value that no process can have")
		}
	}
	for k := range c.config.GetEnvs() {
		if strings.Contains(k, "=") {
			return nil, invalid("the name of environment variable %q contains '='", k)
		}
	}
	for _, a := range c.config.GetArgs() {
		if strings.IndexByte(a, 0) >= 0 {
			return nil, invalid("an argument contains a NUL byte")
		}
	}
	path, err := lookPath(c, dir, env)
	if err != nil {
		return nil, err
	}

	p = &process{tag: c.tag, config: c.config, startedAt: time.Now(),
		inMu: make(chan struct{}, 1), done: make(chan struct{})}
	var theirs [3]*os.File
	made := p // the result is nil where an error is returned
	defer func() {
		for i, f := range theirs {
			if f != nil && (i == 0 || f != theirs[0]) {
				f.Close()
			}
		}
		if err != nil {
			made.closeFiles()
		}
	}()
	pidfd := -1
	sys := &syscall.SysProcAttr{
		Setsid:     true,
		Credential: &syscall.Credential{Uid: c.user.uid, Gid: c.user.gid, Groups: c.user.groups},
		PidFD:      &pidfd,
	}
	if os.Geteuid() != 0 {
		sys.Credential = nil // only root can be somebody else
	}
	switch {
	case c.pty != nil:
		var slave *os.File
		p.pty, slave, err = openTerminal(c.pty.GetSize(), c.user)
		if err != nil {
			return nil, err
		}
		theirs = [3]*os.File{slave, slave, slave}
		sys.Setctty, sys.Ctty = true, 0
	default:
		if p.stdout, theirs[1], err = os.Pipe(); err != nil {
			return nil, fmt.Errorf("making a pipe: %w", err)
		}
		if p.stderr, theirs[2], err = os.Pipe(); err != nil {
			return nil, fmt.Errorf("making a pipe: %w", err)
		}
		if c.stdin {
			theirs[0], p.stdin, err = os.Pipe()
		} else {
			theirs[0], err = os.Open(os.DevNull)
		}
		if err != nil {
			return nil, fmt.Errorf("making the standard input: %w", err)
		}
		// A program that opens /dev/stdout again needs the right to its pipe;
		// most don't.
		for _, f := range theirs {
			if f.Name() != os.DevNull {
				_ = f.Chown(int(c.user.uid), int(c.user.gid))
			}
		}
	}
	attr := &syscall.ProcAttr{Dir: dir, Env: env, Sys: sys}
	for _, f := range theirs {
		attr.Files = append(attr.Files, f.Fd())
	}
	if g := ps.group(c.tag); g != nil {
		sys.UseCgroupFD, sys.CgroupFD = true, int(g.Fd())
	}
	args := append([]string{c.config.GetCmd()}, c.config.GetArgs()...)
	pid, err := syscall.ForkExec(path, args, attr)
	if err != nil && sys.UseCgroupFD && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EAGAIN) {
		// An engine without clone3, or a cgroup that was removed.
		sys.UseCgroupFD = false
		pid, err = syscall.ForkExec(path, args, attr)
	}
	if err != nil {
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOMEM) {
			return nil, fmt.Errorf("error starting process '%s': %w", c.config.GetCmd(), err)
		}
		return nil, invalid("error starting process '%s': %v", c.config.GetCmd(), &os.PathError{Op: "fork/exec", Path: path, Err: err})
	}
	p.pid = uint32(pid)
	if pidfd >= 0 {
		// Only a descriptor that does not block is polled.
		if syscall.SetNonblock(pidfd, true) == nil {
			p.exit = os.NewFile(uintptr(pidfd), "pidfd")
		} else {
			unix.Close(pidfd)
		}
	}
	// Best effort: the process may be gone, or the kernel may not have it.
	_ = os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(oomScore), 0)
	if !c.until.IsZero() {
		left := time.Until(c.until)
		p.deadlineAge = sinceBoot() + left
		p.deadline = time.AfterFunc(left, p.kill)
	}
	ps.add(p)
	ps.keeper.keep(p)
	return p, nil
}

// openTerminal makes a terminal of a size, owned by the account.
func openTerminal(size *pb.PTY_Size, a *user) (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("opening a terminal: %w", err)
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	defer func() {
		if err != nil {
			master.Close()
			master = nil
		}
	}()
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return master, nil, fmt.Errorf("unlocking a terminal: %w", err)
	}
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err != nil {
		return master, nil, fmt.Errorf("asking for a terminal's number: %w", err)
	}
	if err := setSize(master, size); err != nil {
		return master, nil, err
	}
	slave, err = os.OpenFile("/dev/pts/"+strconv.FormatUint(uint64(n), 10), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return master, nil, fmt.Errorf("opening a terminal's other end: %w", err)
	}
	// Programs such as gpg and screen open their terminal by name; others work
	// without.
	_ = slave.Chown(int(a.uid), int(a.gid))
	_ = slave.Chmod(0o620)
	return master, slave, nil
}

// setSize gives a terminal its size. 0 keeps the kernel's meaning, "unknown".
func setSize(master *os.File, size *pb.PTY_Size) error {
	if size == nil {
		return nil
	}
	ws := unix.Winsize{Row: clamp16(size.GetRows()), Col: clamp16(size.GetCols())}
	rc, err := master.SyscallConn()
	if err != nil {
		return fmt.Errorf("resizing the terminal: %w", err)
	}
	var ierr error
	if err := rc.Control(func(fd uintptr) { ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &ws) }); err != nil {
		return fmt.Errorf("resizing the terminal: %w", err)
	}
	if ierr != nil {
		return fmt.Errorf("resizing the terminal: %w", ierr)
	}
	return nil
}

func clamp16(n uint32) uint16 { return uint16(min(n, 1<<16-1)) }
