package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Names of what connections outwards are measured by: to a listener on this
// machine, from the dial to the first byte, so that whoever stands between has
// to have reached it.
const (
	egressHost  = "connection outwards, first byte: from the machine itself"
	egressOpen  = "connection outwards, first byte: no policy"
	egressLists = "connection outwards, first byte: 10,000 ranges denied"
	egressNames = "connection outwards, first byte: names decide"
)

var egressSection = section{"Connections outwards", []string{egressHost, egressOpen, egressLists, egressNames}}

// egressTargets are what a policy may add to a connection.
func egressTargets(o outcome) []Target {
	var out []Target
	open, known := o.series[egressOpen]
	for _, name := range []string{egressLists, egressNames} {
		if s, ok := o.series[name]; ok && known {
			v := round(s.P50 - open.P50)
			out = append(out, Target{Name: name + " − no policy: p50", Value: v, Limit: 1, Unit: "ms", Met: v <= 1, Required: true})
		}
	}
	return out
}

// The other end of the connections: a namespace with a public address, to which
// only this machine has a route. No policy has a reason to refuse it.
var (
	farAddr  = netip.MustParseAddr("93.184.216.34")
	farPort  = uint16(8100)
	nearAddr = netip.MustParseAddr("169.254.77.1")
)

// far is a namespace with a listener that says a byte to whoever connects.
type far struct {
	name string
	l    net.Listener
	done chan struct{}
}

func openFar(ctx context.Context) (f *far, err error) {
	name := "cayb" + strconv.Itoa(os.Getpid())
	f = &far{name: name, done: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close())
		}
	}()
	for _, args := range [][]string{
		{"netns", "add", name},
		{"link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name},
		{"addr", "add", nearAddr.String() + "/32", "dev", name},
		{"link", "set", name, "up"},
		{"route", "add", farAddr.String() + "/32", "dev", name, "src", nearAddr.String()},
		{"-n", name, "addr", "add", farAddr.String() + "/32", "dev", "eth0"},
		{"-n", name, "link", "set", "eth0", "up"},
		{"-n", name, "route", "add", "default", "dev", "eth0"},
	} {
		if out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput(); err != nil {
			return f, fmt.Errorf("ip %v: %w: %s", args, err, out)
		}
	}
	if f.l, err = listenIn("/run/netns/"+name, netip.AddrPortFrom(farAddr, farPort)); err != nil {
		return f, err
	}
	go func() {
		defer close(f.done)
		for {
			c, err := f.l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("x")) // whoever does not get it says so
			_ = c.Close()
		}
	}()
	return f, nil
}

func (f *far) close() error {
	var err error
	if f.l != nil {
		err = f.l.Close()
		<-f.done
	}
	// The link goes with the namespace, in its own time; the route at once.
	_ = exec.Command("ip", "link", "del", f.name).Run() // it may not be there
	return errors.Join(err, exec.Command("ip", "netns", "del", f.name).Run())
}

// listenIn listens in another network namespace.
func listenIn(path string, at netip.AddrPort) (l net.Listener, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		var fd int
		if fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return
		}
		defer unix.Close(fd)
		if err = unix.Setns(fd, unix.CLONE_NEWNET); err == nil {
			l, err = net.Listen("tcp4", at.String())
		}
	}()
	<-done
	return l, err
}

// dialler connects one after the other and prints how long each took, in
// milliseconds.
const dialler = `const net = require("net"), [host, port, n] = process.argv.slice(1), out = [];
const go = (i) => { if (i == n) { console.log(JSON.stringify(out)); return }
  const t = process.hrtime.bigint(), c = net.connect(+port, host);
  c.once("data", () => { out.push(Number(process.hrtime.bigint() - t) / 1e6); c.destroy(); c.once("close", () => go(i + 1)) });
  c.once("error", (e) => { console.error(e); process.exit(1) }) };
go(0)`

// atOnce is how many connections are made under a policy before the next one is
// in force, and how many of them only warm up.
const atOnce, warmOnce = 20, 5

// measureEgress measures connections from a sandbox under each kind of policy,
// in turn.
func (r *run) measureEgress(ctx context.Context) (err error) {
	t := r.cold
	r.note("egress: connections outwards, with and without a policy")
	f, err := openFar(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	sbx, err := t.client.create(ctx, 30*time.Minute)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.client.kill(context.WithoutCancel(ctx), sbx)) }()
	var ranges []string
	for i := range 10_000 {
		ranges = append(ranges, netip.PrefixFrom(netip.AddrFrom4([4]byte{60, byte(i >> 8), byte(i), 0}), 25).String())
	}
	policies := []struct {
		name string
		body map[string]any
	}{
		{egressOpen, map[string]any{}},
		{egressLists, map[string]any{"denyOut": ranges}},
		// The address is allowed, or the name would have to be a real one; the
		// connection goes by way of the node all the same.
		{egressNames, map[string]any{"denyOut": []string{"0.0.0.0/0"}, "allowOut": []string{"bench.example.com", farAddr.String()}}},
	}
	for range r.rounds {
		for _, p := range policies {
			if err := t.client.do(ctx, http.MethodPut, t.server.api+"/sandboxes/"+url.PathEscape(sbx.ID)+"/network", t.client.keyed(), p.body, nil); err != nil {
				return err
			}
			got, err := t.client.run(ctx, sbx, "node", "-e", dialler, farAddr.String(), strconv.Itoa(int(farPort)), strconv.Itoa(atOnce+warmOnce))
			if err != nil {
				return err
			}
			var ms []float64
			if err := json.Unmarshal(got.out, &ms); err != nil || len(ms) != atOnce+warmOnce {
				return fmt.Errorf("%s: status %d, %q", p.name, got.code, got.out)
			}
			for _, v := range ms[warmOnce:] {
				r.book.took(p.name, time.Duration(v*float64(time.Millisecond)))
			}
		}
		for range atOnce {
			took, err := firstByte(ctx, netip.AddrPortFrom(farAddr, farPort))
			if err != nil {
				return err
			}
			r.book.took(egressHost, took)
		}
	}
	return nil
}

// firstByte connects and waits for a byte.
func firstByte(ctx context.Context, to netip.AddrPort) (time.Duration, error) {
	began := time.Now()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp4", to.String())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	_, err = c.Read(make([]byte, 1))
	return time.Since(began), err
}
