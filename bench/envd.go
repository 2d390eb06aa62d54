package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"
)

// Names of the series of the daemon in a sandbox, beside programs of the same
// guest that only move bytes.
const (
	envdRPC  = "RPC through the proxy: list commands"
	echoTCP  = "plain TCP echo in that guest"
	envdUp   = "upload of a file"
	sinkTCP  = "plain TCP stream into that guest"
	envdDown = "download of a file"
	pourTCP  = "plain TCP stream out of that guest"
)

var envdSection = section{"envd", []string{envdRPC, echoTCP, envdUp, sinkTCP, envdDown, pourTCP}}

// envdTargets are what the daemon is held to, in terms of what the guest's
// network can do.
func envdTargets(o outcome) []Target {
	var out []Target
	add := func(a, b string, limit float64, atLeast bool) {
		x, okx := o.series[a]
		y, oky := o.series[b]
		if !okx || !oky || y.P50 <= 0 {
			return
		}
		t := Target{Name: a + " ÷ " + b, Value: round(x.P50 / y.P50), Limit: limit, AtLeast: atLeast, Unit: "×"}
		t.Met = t.Value <= limit
		if atLeast {
			t.Met = t.Value >= limit
		}
		out = append(out, t)
	}
	add(envdRPC, echoTCP, 2, false)
	add(envdUp, sinkTCP, 0.7, true)
	add(envdDown, pourTCP, 0.7, true)
	return out
}

// plainServer moves bytes on three ports: it sends back what comes, takes what
// comes, and sends as much as it is asked for.
const plainServer = `import socket, threading
def serve(port, f):
    l = socket.create_server(("0.0.0.0", port))
    while True:
        c = l.accept()[0]
        c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=f, args=(c,), daemon=True).start()
def echo(c):
    while b := c.recv(65536): c.sendall(b)
    c.close()
def sink(c):
    n, b, v = int.from_bytes(c.recv(8), "big"), bytearray(1 << 20), None
    while n > 0:
        got = c.recv_into(b)
        if not got: break
        n -= got
    c.sendall(b"k")
    c.close()
def pour(c):
    n, b = int.from_bytes(c.recv(8), "big"), bytes(range(256)) * 4096
    while n > 0:
        c.sendall(b[:n])
        n -= len(b)
    c.close()
for p, f in ((7001, echo), (7002, sink), (7003, pour)):
    threading.Thread(target=serve, args=(p, f)).start()
`

const (
	echoPort = 7001
	sinkPort = 7002
	pourPort = 7003
)

// address asks where the host reaches a sandbox.
func (c *client) address(ctx context.Context, b box) (netip.Addr, error) {
	var out struct {
		Node struct {
			Host struct {
				Address netip.Addr `json:"address"`
			} `json:"host"`
		} `json:"node"`
	}
	err := c.do(ctx, http.MethodGet, c.api+"/operator/v1/sandboxes/"+url.PathEscape(b.ID), http.Header{"X-Admin-Token": {c.admin}}, nil, &out)
	if err == nil && !out.Node.Host.Address.IsValid() {
		err = errors.New("the server does not say where the sandbox is")
	}
	return out.Node.Host.Address, err
}

// measureEnvd measures calls and transfers of one sandbox, in turn with what
// the plain server there can do.
func (r *run) measureEnvd(ctx context.Context) (err error) {
	t := r.cold
	r.note("envd: calls, and transfers of %d MiB", r.transfer>>20)
	sbx, err := t.client.create(ctx, 30*time.Minute)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.kill(context.WithoutCancel(ctx), sbx)) }()
	addr, err := t.address(ctx, sbx)
	if err != nil {
		return err
	}
	server, err := t.run(ctx, sbx, "/bin/bash", "-c", "setsid -f python3 -c '"+plainServer+"' >/dev/null 2>&1; for i in $(seq 100); do (: </dev/tcp/127.0.0.1/7003) 2>/dev/null && exit 0; sleep 0.1; done; exit 1")
	if err != nil || server.code != 0 {
		return fmt.Errorf("starting the plain server: status %d, %w", server.code, err)
	}
	if err := r.measureCalls(ctx, t, sbx, addr); err != nil {
		return err
	}
	piece := make([]byte, 1<<20)
	rand.Read(piece) // never fails: crypto/rand aborts the program instead
	const warmUps, rounds = 1, 5
	for i := range warmUps + rounds {
		b := r.book
		if i < warmUps {
			b = book{}
		}
		for _, m := range []struct {
			name string
			move func() error
		}{
			{sinkTCP, func() error { return plain(ctx, addr, sinkPort, r.transfer, piece) }},
			{envdUp, func() error { return t.upload(ctx, sbx, r.transfer, piece) }},
			{pourTCP, func() error { return plain(ctx, addr, pourPort, r.transfer, nil) }},
			{envdDown, func() error { return t.download(ctx, sbx, r.transfer) }},
		} {
			began := time.Now()
			if err := m.move(); err != nil {
				return fmt.Errorf("%s: %w", m.name, err)
			}
			b.add(m.name, "MB/s", float64(r.transfer)/1e6/time.Since(began).Seconds())
		}
	}
	return nil
}

// measureCalls measures round trips of the same size.
func (r *run) measureCalls(ctx context.Context, t *subject, sbx box, addr netip.Addr) error {
	conn, err := net.Dial("tcp", netip.AddrPortFrom(addr, echoPort).String())
	if err != nil {
		return err
	}
	defer conn.Close()
	const warmUps = 50
	msg := make([]byte, 300) // about what an RPC's request has, with its headers
	for i := range warmUps + 10*r.rounds {
		b := r.book
		if i < warmUps {
			b = book{}
		}
		began := time.Now()
		if _, err := conn.Write(msg); err != nil {
			return err
		}
		if _, err := io.ReadFull(conn, msg); err != nil {
			return err
		}
		b.took(echoTCP, time.Since(began))
		began = time.Now()
		if err := t.do(ctx, http.MethodPost, t.client.proxy+"/process.Process/List", inside(sbx), struct{}{}, nil); err != nil {
			return err
		}
		b.took(envdRPC, time.Since(began))
	}
	return nil
}

// plain moves n bytes over a TCP connection to the plain server: there, if
// there is a piece to repeat, or from there.
func plain(ctx context.Context, addr netip.Addr, port uint16, n int64, piece []byte) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(addr, port).String())
	if err != nil {
		return err
	}
	defer conn.Close()
	head := []byte{byte(n >> 56), byte(n >> 48), byte(n >> 40), byte(n >> 32), byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
	if _, err := conn.Write(head); err != nil {
		return err
	}
	if piece == nil {
		got, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, conn, make([]byte, 1<<20))
		if err == nil && got != n {
			err = fmt.Errorf("%d bytes of %d came", got, n)
		}
		return err
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{conn}, io.LimitReader(&again{piece: piece}, n), make([]byte, len(piece))); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, head[:1])
	return err
}

// again repeats a piece without end.
type again struct {
	piece []byte
	at    int
}

func (a *again) Read(p []byte) (int, error) {
	n := copy(p, a.piece[a.at:])
	a.at = (a.at + n) % len(a.piece)
	return n, nil
}

const filePath = "/home/user/transfer"

func (c *client) transferRequest(ctx context.Context, sbx box, method string, body io.Reader, size int64) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.proxy+"/files?path="+url.QueryEscape(filePath), body)
	if err != nil {
		return nil, err
	}
	req.Header = inside(sbx)
	req.Header.Set("Content-Type", "application/octet-stream")
	req.Header.Set("Accept-Encoding", "identity") // the stream beside it is not compressed either
	req.ContentLength = size
	patient := *c.http
	patient.Timeout = 0 // a transfer may take its time
	resp, err := patient.Do(req)
	if err == nil && resp.StatusCode != http.StatusOK {
		said, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // the status says enough when this fails
		resp.Body.Close()
		return nil, fmt.Errorf("%s /files: %s: %s", method, resp.Status, bytes.TrimSpace(said))
	}
	return resp, err
}

func (c *client) upload(ctx context.Context, sbx box, n int64, piece []byte) error {
	resp, err := c.transferRequest(ctx, sbx, http.MethodPost, io.LimitReader(&again{piece: piece}, n), n)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func (c *client) download(ctx context.Context, sbx box, n int64) error {
	resp, err := c.transferRequest(ctx, sbx, http.MethodGet, nil, 0)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, resp.Body, make([]byte, 1<<20))
	if err == nil && got != n {
		err = fmt.Errorf("%d bytes of %d came", got, n)
	}
	return err
}
