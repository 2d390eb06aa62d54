package invariant

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// nsTypes are the names in /proc/PID/ns.
var nsTypes = []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"}

// inOrder sorts the flags of an engine process, which come in any order.
func inOrder(command string) string {
	if !strings.HasPrefix(command, "runsc-") {
		return command
	}
	args := strings.Fields(command)
	slices.Sort(args[1:])
	return strings.Join(args, " ")
}

// processes reads every process but those that are not the server's by
// necessity: init, the caller, and those that the caller has started with its
// own name (a test's helpers).
func processes(s Snapshot, scope Scope) error {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	spaces := map[string]map[string]bool{}
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		p, ok := readProcess(pid)
		if !ok {
			continue // it has just ended
		}
		for _, typ := range nsTypes {
			if ns, err := os.Readlink(filepath.Join("/proc", d.Name(), "ns", typ)); err == nil {
				if spaces[typ] == nil {
					spaces[typ] = map[string]bool{}
				}
				spaces[typ][ns] = true
			}
		}
		if pid == 1 || pid == os.Getpid() || p.kernel {
			continue
		}
		if p.state == "Z" || p.state == "X" {
			s.add(scope, Zombie, p.comm, "process "+d.Name()+" of parent "+p.parent)
			continue
		}
		s.add(scope, Process, inOrder(p.command), "process "+d.Name())
		if verb := p.verb(); verb == "up" || verb == "supervise" {
			descriptors(s, scope, d.Name(), verb)
		}
	}
	pinned, err := mountTable("self")
	if err != nil {
		return err
	}
	for _, m := range pinned {
		if typ, _, ok := strings.Cut(m.root, ":"); ok && m.fstype == "nsfs" {
			if spaces[typ] == nil {
				spaces[typ] = map[string]bool{}
			}
			spaces[typ][m.root] = true
		}
	}
	for typ, all := range spaces {
		for ns := range all {
			s.add(scope, Namespace, typ, ns)
		}
	}
	return nil
}

type process struct {
	state, comm, parent, command string
	args                         []string
	kernel                       bool
}

func readProcess(pid int) (process, bool) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return process{}, false
	}
	// The name in parentheses may hold anything; the fields follow the last ')'.
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return process{}, false
	}
	f := strings.Fields(string(stat[end+1:]))
	if len(f) < 7 {
		return process{}, false
	}
	p := process{comm: string(stat[open+1 : end]), state: f[0], parent: f[1]}
	flags, _ := strconv.ParseUint(f[6], 10, 32)
	p.kernel = flags&0x00200000 != 0 // PF_KTHREAD of include/linux/sched.h
	cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return process{}, false
	}
	p.args = strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
	p.command = strings.Join(p.args, " ")
	if p.command == "" {
		p.command = p.comm
	}
	return p, true
}

// verb is the subcommand of a process of the program.
func (p process) verb() string {
	if len(p.args) > 1 && p.comm == "cay" {
		return p.args[1]
	}
	return ""
}

// descriptors reads what a long-lived process of the server holds open. Sockets
// are in sockets.
func descriptors(s Snapshot, scope Scope, pid, verb string) {
	dir := filepath.Join("/proc", pid, "fd")
	fds, err := os.ReadDir(dir)
	if err != nil {
		return // it has just ended
	}
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join(dir, fd.Name()))
		// Connections to the database are a pool of a few, made as needed.
		if err != nil || strings.HasPrefix(to, "socket:") || strings.HasPrefix(to, scope.DataDir+"/cay.db") {
			continue
		}
		s.add(scope, Open, verb+": "+to, "descriptor "+fd.Name()+" of process "+pid+" ("+to+")")
	}
}

type mountEntry struct {
	device, root, point, fstype, source string
}

// mountTable reads /proc/PID/mountinfo (Documentation/filesystems/proc.rst, 3.5).
func mountTable(pid string) ([]mountEntry, error) {
	b, err := os.ReadFile(filepath.Join("/proc", pid, "mountinfo"))
	if err != nil {
		return nil, err
	}
	var out []mountEntry
	for line := range strings.Lines(string(b)) {
		head, tail, ok := strings.Cut(strings.TrimSpace(line), " - ")
		h, t := strings.Fields(head), strings.Fields(tail)
		if ok && len(h) >= 6 && len(t) >= 2 {
			out = append(out, mountEntry{device: h[2], root: h[3], point: h[4], fstype: t[0], source: t[1]})
		}
	}
	return out, nil
}

// mounts reads the mounts of every mount namespace that a process is in.
func mounts(s Snapshot, scope Scope) error {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, d := range dirs {
		if _, err := strconv.Atoi(d.Name()); err != nil {
			continue
		}
		ns, err := os.Readlink(filepath.Join("/proc", d.Name(), "ns/mnt"))
		if err != nil || seen[ns] {
			continue
		}
		table, err := mountTable(d.Name())
		if err != nil {
			continue // it has just ended; another process of the namespace has its turn
		}
		seen[ns] = true
		where := ""
		if ns != own {
			where = " in another namespace"
		}
		for _, m := range table {
			if m.fstype != "nsfs" && where != "" && !strings.HasPrefix(m.point, scope.DataDir) {
				continue // a copy of one of ours
			}
			s.add(scope, Mount, m.fstype+" on "+m.point+where, m.point)
		}
	}
	return nil
}

// loops reads the loop devices over files of the data directory, those that
// have been removed included.
func loops(s Snapshot, scope Scope) error {
	all, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, path := range all {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) || err != nil {
			continue // it has just been taken off
		}
		file := strings.TrimSuffix(string(b), "\n")
		if scope.DataDir != "" && strings.HasPrefix(file, scope.DataDir+"/") {
			s.add(scope, Loop, file, filepath.Base(filepath.Dir(filepath.Dir(path)))+" over "+file)
		}
	}
	return nil
}

// cgroups reads the directories of cgroups.
func cgroups(s Snapshot, scope Scope) error {
	roots, err := filepath.Glob("/sys/fs/cgroup/*")
	if err != nil {
		return err
	}
	for _, root := range append(roots, "/sys/fs/cgroup") {
		for _, name := range scope.Cgroups {
			if filepath.Base(root) == name {
				continue // it is in the list of its own root
			}
			err := filepath.WalkDir(filepath.Join(root, name), func(path string, e fs.DirEntry, err error) error {
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				if err == nil && e.IsDir() {
					s.add(scope, Cgroup, path, path)
				}
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func settings(s Snapshot, scope Scope) error {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err != nil {
		return err
	}
	// Not through add: the value is the point.
	c := class{Setting, "ip_forward is " + strings.TrimSpace(string(b))}
	s[c] = append(s[c], c.Name)
	return nil
}
