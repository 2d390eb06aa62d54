package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Names of what the proxy is measured by, beside requests that go straight to
// the same service, and nginx before it.
const (
	portStraight = "request to a port: straight"
	portCay      = "request to a port: through Cay"
	portNginx    = "request to a port: through nginx"
	envdStraight = "request to envd: straight, kept connection"
	envdCay      = "request to envd: through Cay, kept connection"

	proxyRate  = "requests a second to a port, through Cay"
	nginxRate  = "requests a second to a port, through nginx"
	proxyRatio = "requests a second, Cay ÷ nginx"
	proxyCPU   = "processor time of a request, Cay"
	nginxCPU   = "processor time of a request, nginx"
	streamCost = "memory of an open stream"
)

var proxySection = section{"proxy", []string{portStraight, portCay, portNginx, envdStraight, envdCay}}

// proxyTargets are what the proxy is held to.
func proxyTargets(o outcome) []Target {
	var out []Target
	for _, pair := range [][2]string{{portCay, portStraight}, {envdCay, envdStraight}} {
		x, okx := o.series[pair[0]]
		y, oky := o.series[pair[1]]
		if !okx || !oky {
			continue
		}
		for _, p := range []struct {
			name         string
			value, limit float64
		}{{"p50", x.P50 - y.P50, 0.15}, {"p99", x.P99 - y.P99, 1}} {
			v := round(p.value)
			out = append(out, Target{Name: pair[0] + " − straight: " + p.name, Value: v, Limit: p.limit, Unit: "ms", Met: v <= p.limit, Required: true})
		}
	}
	if f, ok := o.figures[proxyRatio]; ok {
		out = append(out, Target{Name: proxyRatio, Value: f.Value, Limit: 0.7, AtLeast: true, Unit: f.Unit, Met: f.Value >= 0.7, Required: true})
	}
	if f, ok := o.figures[streamCost]; ok {
		out = append(out, Target{Name: streamCost, Value: f.Value, Limit: 40, Unit: f.Unit, Met: f.Value <= 40, Required: true})
	}
	return out
}

const webPort = 8000

// webServer answers at once, or with events: one, or ten a second.
const webServer = `require("http").createServer((q, s) => {
  if (q.url === "/") { s.writeHead(200, {"Content-Length": 2}); s.end("ok"); return }
  s.writeHead(200, {"Content-Type": "text/event-stream"}); s.write("data: 0\n\n");
  if (q.url === "/active") { const t = setInterval(() => s.write("data: 1\n\n"), 100); s.on("close", () => clearInterval(t)) }
}).listen(8000, "0.0.0.0", 4096)`

// web makes a sandbox with the server in it.
func (t *subject) web(ctx context.Context) (box, netip.Addr, error) {
	sbx, err := t.client.create(ctx, 30*time.Minute)
	if err != nil {
		return sbx, netip.Addr{}, err
	}
	addr, err := t.address(ctx, sbx)
	if err != nil {
		return sbx, addr, err
	}
	server, err := t.run(ctx, sbx, "/bin/bash", "-c", "ulimit -n $(ulimit -Hn); setsid -f node -e '"+webServer+"' >/dev/null 2>&1; for i in $(seq 100); do (: </dev/tcp/127.0.0.1/8000) 2>/dev/null && exit 0; sleep 0.1; done; exit 1")
	if err == nil && server.code != 0 {
		err = fmt.Errorf("starting the web server: status %d", server.code)
	}
	return sbx, addr, err
}

// measureProxy measures requests to a service of a sandbox.
func (r *run) measureProxy(ctx context.Context) (err error) {
	t := r.cold
	r.note("proxy: requests, beside straight ones and nginx")
	sbx, addr, err := t.web(ctx)
	defer func() { err = errors.Join(err, t.kill(context.WithoutCancel(ctx), sbx)) }()
	if err != nil {
		return err
	}
	straight := "http://" + netip.AddrPortFrom(addr, webPort).String()
	ng, err := startNginx(ctx, filepath.Join(r.work, "nginx"), straight)
	if err != nil {
		return err
	}
	if ng == nil {
		r.note("nginx is not installed (nginx-light): the proxy is measured without it")
	} else {
		defer func() { err = errors.Join(err, ng.end()) }()
	}
	port := http.Header{"E2b-Sandbox-Id": {sbx.ID}, "E2b-Sandbox-Port": {strconv.Itoa(webPort)}}
	fresh := &http.Transport{DisableKeepAlives: true}
	kept := &http.Transport{MaxIdleConnsPerHost: 64}
	defer kept.CloseIdleConnections()
	asks := []ask{
		{portStraight, straight, nil, fresh},
		{portCay, t.client.proxy, port, kept},
		{envdStraight, "http://" + netip.AddrPortFrom(addr, 49983).String() + "/health", inside(sbx), kept},
		{envdCay, t.client.proxy + "/health", inside(sbx), kept},
	}
	if ng != nil {
		asks = append(asks, ask{portNginx, ng.url, nil, kept})
	}
	const warmUps = 50
	for i := range warmUps + 10*r.rounds {
		b := r.book
		if i < warmUps {
			b = book{}
		}
		for _, a := range asks {
			took, err := a.do(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", a.name, err)
			}
			b.took(a.name, took)
		}
	}
	if ng != nil {
		if err := r.measureRate(ctx, t, asks[1], asks[4], ng); err != nil {
			return err
		}
	}
	return r.measureStreams(ctx, t)
}

// ask is one kind of request.
type ask struct {
	name, url string
	head      http.Header
	by        *http.Transport
}

func (a ask) do(ctx context.Context) (time.Duration, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url, nil)
	if err != nil {
		return 0, err
	}
	if a.head != nil {
		req.Header = a.head.Clone()
	}
	began := time.Now()
	res, err := a.by.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, res.Body)
	res.Body.Close()
	took := time.Since(began)
	if err == nil && res.StatusCode/100 != 2 {
		err = errors.New(res.Status)
	}
	return took, err
}

// measureRate has many clients ask without a pause, in turn through Cay and
// through nginx.
func (r *run) measureRate(ctx context.Context, t *subject, cay, other ask, ng *nginx) error {
	const clients = 32
	length := r.sustain / 5
	r.note("proxy: %d clients without a pause", clients)
	type side struct {
		ask  ask
		pids func() ([]int, error)
		rate []float64
		cost []float64
	}
	sides := []*side{
		{ask: cay, pids: func() ([]int, error) { return []int{t.cmd.Process.Pid}, nil }},
		{ask: other, pids: ng.processes},
	}
	for range 7 {
		for _, s := range sides {
			pids, err := s.pids()
			if err != nil {
				return err
			}
			used := func() (sum time.Duration, err error) {
				for _, pid := range pids {
					d, err := processTime(pid)
					if err != nil {
						return 0, err
					}
					sum += d
				}
				return sum, nil
			}
			before, err := used()
			if err != nil {
				return err
			}
			n, took, err := flood(ctx, s.ask, clients, length)
			if err != nil {
				return fmt.Errorf("%s: %w", s.ask.name, err)
			}
			after, err := used()
			if err != nil {
				return err
			}
			s.rate = append(s.rate, float64(n)/took.Seconds())
			s.cost = append(s.cost, float64((after-before).Microseconds())/float64(n))
		}
	}
	rates := [2]float64{median(sides[0].rate), median(sides[1].rate)}
	r.figures[proxyRate] = Figure{round(rates[0]), "/s"}
	r.figures[nginxRate] = Figure{round(rates[1]), "/s"}
	r.figures[proxyCPU] = Figure{round(median(sides[0].cost)), "µs"}
	r.figures[nginxCPU] = Figure{round(median(sides[1].cost)), "µs"}
	ratios := make([]float64, len(sides[0].rate)) // of neighbours, which meet the same machine
	for i := range ratios {
		ratios[i] = sides[0].rate[i] / sides[1].rate[i]
	}
	r.figures[proxyRatio] = Figure{round(median(ratios)), "×"}
	return nil
}

func median(v []float64) float64 { return rank(slices.Sorted(slices.Values(v)), 50) }

// flood has clients ask for a while, and counts the answers.
func flood(ctx context.Context, a ask, clients int, length time.Duration) (n int, took time.Duration, err error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	began := time.Now()
	for range clients {
		wg.Go(func() {
			mine := 0
			var failed error
			for failed == nil && time.Since(began) < length {
				if _, failed = a.do(ctx); failed == nil {
					mine++
				}
			}
			mu.Lock()
			n += mine
			err = errors.Join(err, failed)
			mu.Unlock()
		})
	}
	wg.Wait()
	return n, time.Since(began), err
}

// The streams of the promise (V-13). One sandbox has fewer requests at once.
const (
	idleStreams   = 5000
	activeStreams = 500
	streamBoxes   = 4
)

// measureStreams holds streams open and looks at what the server has grown by.
func (r *run) measureStreams(ctx context.Context, t *subject) (err error) {
	r.note("proxy: %d idle and %d active streams", idleStreams, activeStreams)
	var boxes []box
	defer func() {
		for _, b := range boxes {
			err = errors.Join(err, t.kill(context.WithoutCancel(ctx), b))
		}
	}()
	for range streamBoxes {
		b, _, err := t.web(ctx)
		if b.ID != "" {
			boxes = append(boxes, b)
		}
		if err != nil {
			return err
		}
	}
	before := pssOf(t.cmd.Process.Pid)
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			_ = c.Close() // they were read only
		}
	}()
	addr := strings.TrimPrefix(t.client.proxy, "http://")
	for i := range idleStreams + activeStreams {
		path := "/idle"
		if i%11 == 0 {
			path = "/active"
		}
		c, err := openStream(ctx, addr, boxes[i%len(boxes)], path)
		if err != nil {
			return fmt.Errorf("stream %d: %w", i, err)
		}
		conns = append(conns, c)
		if path == "/active" {
			go func() { _, _ = io.Copy(io.Discard, c) }() // until it is closed
		}
	}
	time.Sleep(r.rest)
	grown := pssOf(t.cmd.Process.Pid) - before
	r.figures[streamCost] = Figure{round(grown / 1024 / float64(len(conns))), "KiB"}
	return nil
}

// openStream asks for events and waits for the first.
func openStream(ctx context.Context, addr string, b box, path string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: %s\r\nE2b-Sandbox-Port: %d\r\n\r\n", path, b.ID, webPort); err != nil {
		return nil, err
	}
	_ = c.SetReadDeadline(time.Now().Add(time.Minute))
	for br := bufio.NewReaderSize(c, 512); ; {
		line, err := br.ReadString('\n')
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(line, "data: ") {
			return c, c.SetReadDeadline(time.Time{})
		}
	}
}

// nginx is Debian's, as a proxy in front of one service.
type nginx struct {
	url, dir string
	cmd      *exec.Cmd
}

// startNginx returns nil where there is none.
func startNginx(ctx context.Context, dir, to string) (*nginx, error) {
	bin, err := exec.LookPath("nginx")
	if err != nil {
		if bin, err = exec.LookPath("/usr/sbin/nginx"); err != nil {
			return nil, nil
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := l.Addr().String()
	if err := errors.Join(l.Close(), os.MkdirAll(dir, 0o755)); err != nil {
		return nil, err
	}
	// Like Cay: to the service HTTP/1.1 on a connection of its own.
	conf := fmt.Sprintf(`worker_processes auto; daemon off; pid %[1]s/pid; error_log %[1]s/error.log;
events { worker_connections 4096; }
http {
  access_log off; keepalive_requests 100000000; keepalive_timeout 600s;
  client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  server { listen %[2]s; location / { proxy_pass %[3]s; proxy_http_version 1.1; proxy_set_header Connection close; proxy_set_header Host $http_host; proxy_buffering off; } }
}
`, dir, addr, to)
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
		return nil, err
	}
	n := &nginx{url: "http://" + addr, dir: dir, cmd: exec.Command(bin, "-c", file)}
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := n.cmd.Start(); err != nil {
		return nil, err
	}
	for range 100 {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			return n, c.Close()
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), n.end())
		case <-time.After(50 * time.Millisecond):
		}
	}
	said, _ := os.ReadFile(filepath.Join(dir, "error.log")) // what it says is in the error
	return nil, errors.Join(fmt.Errorf("nginx does not answer: %s", said), n.end())
}

// processes are its workers.
func (n *nginx) processes() ([]int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", n.cmd.Process.Pid, n.cmd.Process.Pid))
	if err != nil {
		return nil, err
	}
	var pids []int
	for f := range strings.FieldsSeq(string(b)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	if len(pids) == 0 {
		return nil, errors.New("nginx has no workers")
	}
	return pids, nil
}

func (n *nginx) end() error {
	if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	_ = n.cmd.Wait() // its status is that of a signal
	return nil
}
