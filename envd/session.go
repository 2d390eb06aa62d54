package envd

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxSweeps bounds how often a session is searched for members that were born
// while it was being killed.
const maxSweeps = 16

// signalSession signals the session that sid leads: its first group at once,
// and then those that job control made. A kill is repeated until no member is
// left, since one may have forked meanwhile. The error is that of the first
// group.
func signalSession(sid uint32, sig syscall.Signal) error {
	// A leader cannot leave its group, and while the group has members its
	// number is not given out again: this never hits a stranger.
	err := unix.Kill(-int(sid), sig)
	for range maxSweeps {
		if n, serr := sweep(int(sid), sig); serr != nil || n == 0 || sig != unix.SIGKILL {
			break
		}
		_ = unix.Kill(-int(sid), sig) // those of the first group that were born since
	}
	return err
}

// sweep signals the living members of a session that are not in its first
// group, and counts them.
func sweep(sid int, sig syscall.Signal) (n int, err error) {
	d, err := os.Open("/proc")
	if err != nil {
		return 0, err
	}
	defer d.Close()
	for {
		names, rerr := d.Readdirnames(256)
		for _, name := range names {
			pid, perr := strconv.Atoi(name)
			if perr != nil || pid == sid {
				continue
			}
			b, ferr := os.ReadFile("/proc/" + name + "/stat")
			if ferr != nil {
				continue // it ended meanwhile
			}
			st, ok := parseStat(string(b))
			if ok && st.session == sid && st.pgrp != sid && st.state != 'Z' && st.state != 'X' {
				if unix.Kill(pid, sig) == nil {
					n++
				}
			}
		}
		if rerr != nil {
			return n, nil
		}
	}
}

// procStat is what interests us in /proc/PID/stat.
type procStat struct {
	state         byte
	pgrp, session int
}

// parseStat reads /proc/PID/stat (proc(5)). The name in it may hold anything,
// a parenthesis too; the last one ends it.
func parseStat(s string) (procStat, bool) {
	i := strings.LastIndexByte(s, ')')
	if i < 0 {
		return procStat{}, false
	}
	f := strings.Fields(s[i+1:])
	if len(f) < 4 || len(f[0]) != 1 {
		return procStat{}, false
	}
	pgrp, err1 := strconv.Atoi(f[2])
	session, err2 := strconv.Atoi(f[3])
	return procStat{state: f[0][0], pgrp: pgrp, session: session}, errors.Join(err1, err2) == nil
}
