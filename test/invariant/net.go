package invariant

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// links reads the network's links and their addresses.
func links(s Snapshot, scope Scope) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	all, err := h.LinkList()
	if err != nil {
		return err
	}
	for _, l := range all {
		s.add(scope, Link, l.Type()+" "+l.Attrs().Name, l.Attrs().Name)
	}
	addrs, err := h.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		s.add(scope, Link, "address of "+a.Label, a.IPNet.String())
	}
	return nil
}

// firewall reads every table with its chains, rules, sets and elements.
func firewall(s Snapshot, scope Scope) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	tables, err := c.ListTables()
	if err != nil {
		return err
	}
	for _, t := range tables {
		name := fmt.Sprintf("table %d %s", t.Family, t.Name)
		s.add(scope, Firewall, name, name)
		sets, err := c.GetSets(t)
		if gone(err) {
			continue
		}
		if err != nil {
			return err
		}
		for _, set := range sets {
			s.add(scope, Firewall, name+" set "+set.Name, set.Name)
			elements, err := c.GetSetElements(set)
			if err != nil && !gone(err) {
				return err
			}
			for _, e := range elements {
				key := fmt.Sprintf("%x", e.Key)
				if set.KeyType.Name == nftables.TypeIFName.Name {
					key = strings.TrimRight(string(e.Key), "\x00")
				}
				s.add(scope, Firewall, name+" element of "+set.Name, key)
			}
		}
	}
	chains, err := c.ListChains()
	if err != nil {
		return err
	}
	for _, ch := range chains {
		name := fmt.Sprintf("table %d %s chain %s", ch.Table.Family, ch.Table.Name, ch.Name)
		s.add(scope, Firewall, name, ch.Name)
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil && !gone(err) {
			return err
		}
		for _, r := range rules {
			s.add(scope, Firewall, name+" rule", fmt.Sprintf("handle %d", r.Handle))
		}
	}
	return nil
}

// gone reports whether what was listed went before it was looked at.
func gone(err error) bool { return errors.Is(err, unix.ENOENT) }

// tcpStates are those of include/net/tcp_states.h.
var tcpStates = map[string]string{"01": "established", "02": "SYN sent", "03": "SYN received", "04": "FIN wait 1",
	"05": "FIN wait 2", "06": "time wait", "07": "closed", "08": "close wait", "09": "last ACK", "0A": "listening", "0B": "closing"}

// kernels reports whether a TCP socket is the kernel's own memory of a
// connection that both sides have closed, or ours has with the other's leave:
// it goes by itself within a minute, and nobody can do anything about it.
func kernels(state, inode string) bool { return state == "06" || state == "05" && inode == "0" }

// sockets reads the sockets of this network namespace.
func sockets(s Snapshot, scope Scope) error {
	for _, proto := range []string{"tcp", "tcp6", "udp", "udp6"} {
		lines, err := table("/proc/thread-self/net/" + proto)
		if err != nil {
			return err
		}
		for _, f := range lines {
			if len(f) < 10 {
				continue
			}
			state := tcpStates[f[3]]
			if strings.HasPrefix(proto, "udp") {
				state = "bound"
			}
			if !kernels(f[3], f[9]) || state == "bound" {
				s.add(scope, Socket, proto+" "+state, f[1]+" to "+f[2]+" inode "+f[9])
			}
		}
	}
	lines, err := table("/proc/thread-self/net/unix")
	if err != nil {
		return err
	}
	for _, f := range lines {
		// Num RefCount Protocol Flags Type St Inode Path; one without a name is
		// counted with the process that holds it. Flag 0x10000 is listening.
		if len(f) >= 8 && f[3] == "00010000" {
			s.add(scope, Socket, "unix "+f[7], f[7])
		}
	}
	return nil
}

// table reads a file of /proc/PID/net without its heading.
func table(path string) ([][]string, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // a kernel without that protocol
	}
	if err != nil {
		return nil, err
	}
	var out [][]string
	for line := range strings.Lines(string(b)) {
		out = append(out, strings.Fields(line))
	}
	return out[min(1, len(out)):], nil
}
