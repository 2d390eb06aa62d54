package doctor

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay/network"
)

var networkChecks = []check{
	{id: "network.ports", title: "ports", run: checkPorts},
	{id: "network.firewall", title: "firewall", run: checkFirewall},
	{id: "network.forwarding", title: "forwarding", run: checkForwarding},
	{id: "network.route", title: "way to the internet", run: checkRoute},
	{id: "network.ipv6", title: "sandboxes and IPv6", run: checkIPv6},
	{id: "network.range", title: "address range", run: checkRange},
	{id: "network.resolver", title: "name servers", run: checkResolver},
	{id: "network.domain", title: "sandbox domain", run: checkDomain},
	{id: "network.certificate", title: "certificate", run: checkCertificate},
	{id: "network.conntrack", title: "connection table", run: checkConntrack},
	{id: "network.slot", title: "network of a sandbox", run: needRoot(checkSlot), alone: true},
}

// Table is one of the host's nftables tables.
type Table struct {
	Family string // "ip", "ip6", "inet"
	Name   string
	// ForwardDrop names the chain that drops forwarded packets unless a rule
	// of it accepts them; empty when there is none.
	ForwardDrop string
}

func checkPorts(_ context.Context, d *Doctor) Finding {
	proc, err := fs.Sub(d.Root, "proc")
	if err != nil {
		return skip("/proc cannot be read: %v", err)
	}
	var free, ours []string
	for _, p := range []struct{ what, flag, addr string }{{"API", "--api-addr", d.APIAddr}, {"proxy", "--proxy-addr", d.ProxyAddr}, {"HTTPS", "--tls-addr", d.TLSAddr}} {
		if p.addr == "" {
			continue // it is not used
		}
		if _, port, err := net.SplitHostPort(p.addr); err != nil || port == "0" {
			continue // any free port will do
		}
		pid, cmd, taken := portHolder(proc, p.addr)
		if !taken {
			hosts, port, err := splitAddr(p.addr)
			if err == nil && len(listeners(proc, hosts, port)) > 0 {
				return fail(fmt.Sprintf("the %s's address %s is taken by a process that cannot be seen from here", p.what, p.addr),
					"run as root to see it; or choose another address with "+p.flag)
			}
			free = append(free, p.addr)
			continue
		}
		if pid == d.Starting || d.Server != nil && pid == d.Server.PID {
			ours = append(ours, fmt.Sprintf("%s: held by this data directory's server (pid %d)", p.addr, pid))
			continue
		}
		return fail(fmt.Sprintf("the %s's address %s is taken by process %d (%s)", p.what, p.addr, pid, cmd),
			fmt.Sprintf("stop it: `kill %d`; or choose another address with %s", pid, p.flag))
	}
	if len(free) > 0 {
		ours = append(ours, strings.Join(free, " and ")+" free")
	}
	if ours == nil {
		return ok("any free port")
	}
	return ok("%s", strings.Join(ours, "; "))
}

func checkFirewall(_ context.Context, d *Doctor) Finding {
	if d.Tables == nil {
		return skip("not asked")
	}
	if !d.capable(capNetAdmin) {
		return skip("needs root")
	}
	tables, err := d.Tables()
	if err != nil {
		return fail(fmt.Sprintf("nftables does not answer: %v; sandboxes are walled in with it", err),
			"`modprobe nf_tables`; if there is no such module, use a kernel with CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET")
	}
	own := network.NamesOf(d.Tag).Table
	found := false
	var dropping []string
	for _, t := range tables {
		found = found || t.Name == own
		if t.ForwardDrop != "" && t.Name != own {
			dropping = append(dropping, fmt.Sprintf("%s %s %s", t.Family, t.Name, t.ForwardDrop))
		}
	}
	if names, err := d.read("proc/net/ip_tables_names"); err == nil && strings.Contains(names, "filter") && dropping == nil {
		return warn("the old iptables has a filter table; whether it lets sandboxes through cannot be seen",
			"if sandboxes have no internet: `iptables-legacy -I FORWARD -i '"+network.NamesOf(d.Tag).LinkPrefix+"+' -j ACCEPT`, and the same with -o")
	}
	if dropping != nil {
		chain := dropping[0]
		return warn(fmt.Sprintf("another firewall drops what is forwarded (%s): sandboxes may have no internet", strings.Join(dropping, "; ")),
			fmt.Sprintf("let them through: `nft insert rule %s iifname \"%s*\" accept` and the same with oifname", chain, network.NamesOf(d.Tag).LinkPrefix))
	}
	if d.Server != nil && !found {
		return fail(fmt.Sprintf("the server runs, but its table %q is gone: a firewall tool has removed it", own),
			"restart the server (`cay up` again; sandboxes stay), and keep that tool from flushing all tables")
	}
	if found {
		return ok("nftables works; the rules of this data directory are in force (table %s)", own)
	}
	return ok("nftables works")
}

func checkForwarding(_ context.Context, d *Doctor) Finding {
	n, known := d.number("proc/sys/net/ipv4/ip_forward")
	if !known {
		return fail("the kernel has no IPv4 forwarding setting", "use a kernel with IPv4")
	}
	if n == 1 {
		return ok("on")
	}
	if d.Server != nil {
		return fail("off, although the server switched it on: somebody has switched it off since, and sandboxes have no internet",
			"`sysctl -w net.ipv4.ip_forward=1`, and find what sets it: `grep -r ip_forward /etc/sysctl*`")
	}
	if ms, err := d.mounts(); err == nil {
		if m, found := mountOf(ms, "/proc/sys"); found && m.point == "/proc/sys" && slices.Contains(m.options, "ro") {
			return fail("off, and /proc/sys is read-only, so that `cay up` cannot switch it on",
				"set net.ipv4.ip_forward=1 on the machine, or run the container with `--sysctl net.ipv4.ip_forward=1`")
		}
	}
	return ok("off; `cay up` switches it on, and the last `cay down` off")
}

// route is a line of /proc/net/route.
type route struct {
	link string
	dst  netip.Prefix
}

func (d *Doctor) routes() ([]route, error) {
	text, err := d.read("proc/net/route")
	if err != nil {
		return nil, err
	}
	var out []route
	for sc := bufio.NewScanner(strings.NewReader(text)); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if len(f) < 8 {
			continue
		}
		dst, err1 := hex.DecodeString(f[1])
		mask, err2 := hex.DecodeString(f[7])
		flags, err3 := strconv.ParseUint(f[3], 16, 32)
		const up, reject = 0x1, 0x200
		if err1 != nil || err2 != nil || err3 != nil || len(dst) != 4 || len(mask) != 4 || flags&up == 0 || flags&reject != 0 {
			continue
		}
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], binary.LittleEndian.Uint32(dst))
		ones := 0
		for m := binary.LittleEndian.Uint32(mask); m != 0; m <<= 1 {
			ones++
		}
		out = append(out, route{link: f[0], dst: netip.PrefixFrom(netip.AddrFrom4(a), ones)})
	}
	return out, nil
}

func checkRoute(_ context.Context, d *Doctor) Finding {
	routes, err := d.routes()
	if err != nil {
		return skip("/proc/net/route cannot be read: %v", err)
	}
	for _, r := range routes {
		if r.dst.Bits() == 0 {
			return ok("by %s", r.link)
		}
	}
	return warn("this machine has no default route: sandboxes reach nothing outside",
		"`ip route add default via GATEWAY`, if they are meant to")
}

// checkIPv6 says whether sandboxes get IPv6, which they do where the machine has
// it: see network.HasIPv6, which asks the kernel for the same.
func checkIPv6(_ context.Context, d *Doctor) Finding {
	routes, err := fs.ReadFile(d.Root, "proc/net/ipv6_route")
	if err != nil {
		return ok("off: this machine's kernel has no IPv6")
	}
	link := ""
	for line := range strings.Lines(string(routes)) {
		f := strings.Fields(line)
		if len(f) == 10 && strings.Trim(f[0]+f[1], "0") == "" && f[9] != "lo" {
			link = f[9]
		}
	}
	if link == "" {
		return ok("off: this machine has no default route of IPv6")
	}
	addrs, err := fs.ReadFile(d.Root, "proc/net/if_inet6")
	if err != nil {
		return skip("/proc/net/if_inet6 cannot be read: %v", err)
	}
	for line := range strings.Lines(string(addrs)) {
		b, err := hex.DecodeString(strings.Fields(line + " -")[0])
		if a, is := netip.AddrFromSlice(b); err == nil && is && a.Is6() && !network.IsRefused(a) {
			return ok("on, in the name of %s by %s", a, link)
		}
	}
	return ok("off: this machine has no public address of IPv6")
}

func checkRange(_ context.Context, d *Doctor) Finding {
	cidr := d.CIDR
	if !cidr.IsValid() {
		cidr = network.DefaultCIDR
	}
	routes, err := d.routes()
	if err != nil {
		return skip("/proc/net/route cannot be read: %v", err)
	}
	for _, r := range routes {
		// Links of Cay, of any data directory, are in the range by design.
		if r.dst.Bits() == 0 || strings.HasPrefix(r.link, "cy") || !r.dst.Overlaps(cidr) {
			continue
		}
		return fail(fmt.Sprintf("this machine reaches %s by %s, and sandboxes are to use %s", r.dst, r.link, cidr),
			"give sandboxes another private range: --sandbox-cidr 10.194.0.0/16, or sandbox-cidr in config.yaml")
	}
	return ok("%s is not used by anything else", cidr)
}

func checkResolver(_ context.Context, d *Doctor) Finding {
	f, err := d.Root.Open("etc/resolv.conf")
	if err != nil {
		return warn("/etc/resolv.conf cannot be read; sandboxes get "+addresses(network.PublicResolvers), "name your resolvers there")
	}
	defer f.Close()
	servers := network.Resolvers(f)
	if addresses(servers) == addresses(network.PublicResolvers) {
		return ok("sandboxes ask %s; this machine's own are not reachable from inside, or the same", addresses(servers))
	}
	return ok("sandboxes ask %s, as this machine does", addresses(servers))
}

func addresses(as []netip.Addr) string {
	words := make([]string, len(as))
	for i, a := range as {
		words[i] = a.String()
	}
	return strings.Join(words, ", ")
}

func checkDomain(ctx context.Context, d *Doctor) Finding {
	if d.Domain == "" {
		return ok("none set; clients reach sandboxes by header, as the exports of `cay env` tell them to")
	}
	if d.LookupHost == nil {
		return skip("not asked")
	}
	name := "3000-doctor." + d.Domain
	got, err := d.LookupHost(ctx, name)
	if err != nil && (d.Domain == "localhost" || strings.HasSuffix(d.Domain, ".localhost")) {
		return warn(name+" does not resolve here; browsers and curl know what it means, Node and Python ask the system",
			"install libnss-myhostname (nss-myhostname), or leave E2B_DOMAIN unset and use the exports of `cay env`")
	}
	if err != nil {
		return fail(fmt.Sprintf("%s does not resolve: %v", name, err),
			fmt.Sprintf("make a wildcard record *.%s that points to this machine; for a trial on one machine, leave --domain empty", d.Domain))
	}
	return ok("*.%s resolves to %s", d.Domain, strings.Join(got, ", "))
}

// renewal is how long before its end a certificate should have a successor.
const renewal = 14 * 24 * time.Hour

func checkCertificate(ctx context.Context, d *Doctor) Finding {
	if d.TLSAddr == "" {
		return ok("none; HTTPS is left to a proxy in front, or not used")
	}
	if d.Server == nil || d.Certificate == nil {
		return skip("the server does not run")
	}
	c, err := d.Certificate(ctx)
	switch {
	case err != nil:
		return fail(fmt.Sprintf("HTTPS at %s: %v", d.TLSAddr, err),
			"look at the server's log for part=certificate; with files, see that they are those of the domain")
	case c.Left < renewal:
		return warn(fmt.Sprintf("the certificate of %s ends in %d hours", c.Issuer, int(c.Left.Hours())),
			"whatever renews it has not: look at the server's log for part=certificate, or at what writes the files")
	case c.Untrusted:
		return warn(fmt.Sprintf("the certificate is of %s, which this machine does not trust", c.Issuer),
			"`cay trust`, here and where clients run; or give clients the authority's file")
	}
	return ok("of %s, for %d more days", c.Issuer, int(c.Left.Hours()/24))
}

func checkConntrack(_ context.Context, d *Doctor) Finding {
	most, known := d.number("proc/sys/net/netfilter/nf_conntrack_max")
	if !known || most == 0 {
		return skip("not in use yet")
	}
	n, _ := d.number("proc/sys/net/netfilter/nf_conntrack_count")
	if n*10 >= most*8 {
		return warn(fmt.Sprintf("%d of %d connections: when it is full, new connections of all sandboxes are dropped", n, most),
			fmt.Sprintf("`sysctl -w net.netfilter.nf_conntrack_max=%d`, and the same in /etc/sysctl.d to keep it", most*4))
	}
	return ok("%d of %d connections", n, most)
}

func checkSlot(ctx context.Context, d *Doctor) Finding {
	if d.TrySlot == nil {
		return skip("not tried")
	}
	evidence, err := d.TrySlot(ctx)
	if err != nil {
		return failed(err, "see the findings on firewall and forwarding above")
	}
	return ok("%s", evidence)
}
