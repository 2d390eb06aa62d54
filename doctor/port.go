package doctor

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// PortHolder returns the process that listens on a TCP address of this
// machine, as its ID and command line. A process that listens on every address
// ("0.0.0.0" or "[::]") holds the port of each. ok is false when nobody
// listens there, or when the process cannot be seen: it is another user's, or
// in another container.
func PortHolder(addr string) (pid int, cmd string, ok bool) {
	return portHolder(os.DirFS("/proc"), addr)
}

// portHolder is [PortHolder] on a tree that looks like /proc.
func portHolder(proc fs.FS, addr string) (pid int, cmd string, ok bool) {
	hosts, port, err := splitAddr(addr)
	if err != nil {
		return 0, "", false
	}
	inodes := listeners(proc, hosts, port)
	if len(inodes) == 0 {
		return 0, "", false
	}
	// A listener is inherited by children; the eldest process is the one that
	// a person would stop.
	for _, pid := range processes(proc) {
		fds := strconv.Itoa(pid) + "/fd"
		entries, err := fs.ReadDir(proc, fds)
		if err != nil {
			continue // gone, or not ours to see
		}
		for _, e := range entries {
			to, err := fs.ReadLink(proc, fds+"/"+e.Name())
			if err != nil {
				continue
			}
			inode, isSocket := strings.CutPrefix(to, "socket:[")
			if isSocket && inodes[strings.TrimSuffix(inode, "]")] {
				return pid, commandLine(proc, pid), true
			}
		}
	}
	return 0, "", false
}

// splitAddr returns the addresses that a listener's address means; none for
// every address.
func splitAddr(addr string) (hosts []netip.Addr, port uint16, err error) {
	host, p, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, 0, err
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return nil, 0, err
	}
	if host == "" {
		return nil, uint16(n), nil
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		// A name, such as localhost: the listener would have resolved it too.
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		hosts, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			return nil, 0, err
		}
		for i := range hosts {
			hosts[i] = hosts[i].Unmap()
		}
		return hosts, uint16(n), nil
	}
	if ip.IsUnspecified() {
		return nil, uint16(n), nil
	}
	return []netip.Addr{ip.Unmap().WithZone("")}, uint16(n), nil
}

// listeners returns the inodes of the sockets that stand in the way of a
// listener on the port.
func listeners(proc fs.FS, hosts []netip.Addr, port uint16) map[string]bool {
	inodes := map[string]bool{}
	for _, name := range []string{"net/tcp", "net/tcp6"} {
		b, err := fs.ReadFile(proc, name)
		if err != nil {
			continue // no IPv6 on this machine
		}
		for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
			f := strings.Fields(sc.Text())
			const listen = "0A"
			if len(f) < 10 || f[3] != listen {
				continue
			}
			at, ok := parseSocketAddr(f[1])
			if !ok || at.Port() != port {
				continue
			}
			ip := at.Addr().Unmap()
			if len(hosts) == 0 || ip.IsUnspecified() || slices.Contains(hosts, ip) {
				inodes[f[9]] = true
			}
		}
	}
	return inodes
}

// parseSocketAddr reads an address as /proc/net/tcp prints it: the words of
// the address in the machine's byte order, in hexadecimal, a colon, the port.
// Every machine that Cay is built for is little-endian.
func parseSocketAddr(s string) (netip.AddrPort, bool) {
	h, p, ok := strings.Cut(s, ":")
	if !ok || (len(h) != 8 && len(h) != 32) {
		return netip.AddrPort{}, false
	}
	b, err := hex.DecodeString(h)
	if err != nil {
		return netip.AddrPort{}, false
	}
	for word := range slices.Chunk(b, 4) {
		slices.Reverse(word)
	}
	port, err := strconv.ParseUint(p, 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	ip, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(ip, uint16(port)), true
}

// processes returns the IDs of all processes, ascending.
func processes(proc fs.FS) []int {
	entries, err := fs.ReadDir(proc, ".")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// commandLine returns a process's command line on one line, or its short name
// for one that has none.
func commandLine(proc fs.FS, pid int) string {
	dir := strconv.Itoa(pid)
	if b, err := fs.ReadFile(proc, dir+"/cmdline"); err == nil && len(b) > 0 {
		return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
	}
	b, err := fs.ReadFile(proc, dir+"/comm")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}
