package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Names of the series of the daemon in a sandbox, beside programs of the same
// guest that only move bytes.
const (
	envdRPC  = "RPC through the proxy: list commands"
	echoTCP  = "plain TCP echo in that guest"
	envdUp   = "upload of a file"
	sinkTCP  = "plain TCP stream into that guest"
	keepTCP  = "the same, written to a file there"
	envdDown = "download of a file"
	pourTCP  = "plain TCP stream out of that guest"
	giveTCP  = "the same, read from a file there"
)

var envdSection = section{"envd", []string{envdRPC, echoTCP, envdUp, sinkTCP, keepTCP, envdDown, pourTCP, giveTCP}}

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

// plainServer moves bytes, on a port for each way: it sends back what comes, takes
// what comes, and sends as much as it is asked for; the last two also to a file
// that gets its name when it is whole, and from that file. So it tells what of a
// transfer is the network, and what the guest's disk.
const plainServer = `import os, socket, threading
def serve(port, f):
    l = socket.create_server(("0.0.0.0", port))
    while True:
        c = l.accept()[0]
        c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=f, args=(c,), daemon=True).start()
def echo(c):
    while b := c.recv(65536): c.sendall(b)
    c.close()
def take(c, f):
    n, b = int.from_bytes(c.recv(8), "big"), memoryview(bytearray(1 << 20))
    while n > 0:
        got = c.recv_into(b)
        if not got: break
        if f >= 0: os.write(f, b[:got])
        n -= got
    return n == 0
def sink(c):
    if take(c, -1): c.sendall(b"k")
    c.close()
def keep(c):
    f = os.open("/home/user/kept.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    whole = take(c, f)
    os.close(f)
    os.rename("/home/user/kept.new", "/home/user/kept")
    if whole: c.sendall(b"k")
    c.close()
def pour(c):
    n, b = int.from_bytes(c.recv(8), "big"), bytes(range(256)) * 4096
    while n > 0:
        c.sendall(b[:n])
        n -= len(b)
    c.close()
def give(c):
    n, b = int.from_bytes(c.recv(8), "big"), memoryview(bytearray(1 << 20))
    f = os.open("/home/user/kept", os.O_RDONLY)
    while n > 0:
        got = os.readv(f, [b])
        if not got: break
        c.sendall(b[:min(n, got)])
        n -= got
    os.close(f)
    c.close()
for p, f in ((7001, echo), (7002, sink), (7003, pour), (7004, keep), (7005, give)):
    threading.Thread(target=serve, args=(p, f)).start()
`

const (
	echoPort = 7001
	sinkPort = 7002
	pourPort = 7003
	keepPort = 7004
	givePort = 7005
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
	server, err := t.run(ctx, sbx, "/bin/bash", "-c", "setsid -f python3 -c '"+plainServer+"' >/dev/null 2>&1; for i in $(seq 100); do (: </dev/tcp/127.0.0.1/7005) 2>/dev/null && exit 0; sleep 0.1; done; exit 1")
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
			{keepTCP, func() error { return plain(ctx, addr, keepPort, r.transfer, piece) }},
			{pourTCP, func() error { return plain(ctx, addr, pourPort, r.transfer, nil) }},
			{envdDown, func() error { return t.download(ctx, sbx, r.transfer) }},
			{giveTCP, func() error { return plain(ctx, addr, givePort, r.transfer, nil) }},
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
	c, err := dialCaller(ctx, t.client.proxy, "/process.Process/List", inside(sbx), "{}")
	if err != nil {
		return err
	}
	defer c.conn.Close()
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
		if err := c.call(); err != nil {
			return err
		}
		b.took(envdRPC, time.Since(began))
	}
	return nil
}

// caller makes one call over and over on a connection of its own: a write and a
// read, as the client of the plain server beside it does. So what a client's
// library costs is in neither figure.
type caller struct {
	conn    net.Conn
	in      *bufio.Reader
	request []byte
}

// dialCaller connects to a server; the call is a POST of JSON.
func dialCaller(ctx context.Context, server, path string, head http.Header, body string) (*caller, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, server+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = head
	req.Header.Set("Content-Type", "application/json")
	var b bytes.Buffer
	if err := req.Write(&b); err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", req.URL.Host)
	if err != nil {
		return nil, err
	}
	return &caller{conn: conn, in: bufio.NewReader(conn), request: b.Bytes()}, nil
}

// call returns when it has all of the answer.
func (c *caller) call() error {
	if _, err := c.conn.Write(c.request); err != nil {
		return err
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(resp.Body) // to its end, so that the next answer follows
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, bytes.TrimSpace(said))
	}
	return err
}

// plain moves n bytes over a TCP connection to the plain server: there, if
// there is a piece to repeat, or from there.
func plain(ctx context.Context, addr netip.Addr, port uint16, n int64, piece []byte) error {
	conn, err := dial(ctx, netip.AddrPortFrom(addr, port).String())
	if err != nil {
		return err
	}
	defer conn.Close()
	var head [8]byte
	binary.BigEndian.PutUint64(head[:], uint64(n))
	if _, err := conn.Write(head[:]); err != nil {
		return err
	}
	if piece == nil {
		return drain(conn, n)
	}
	if err := pour(conn, n, piece); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, head[:1])
	return err
}

func dial(ctx context.Context, addr string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", addr)
}

// pour sends n bytes, a piece at a time. It is the client's half of every stream
// in, so that a library's buffers do not count for one of them alone.
func pour(conn net.Conn, n int64, piece []byte) error {
	for n > 0 {
		m, err := conn.Write(piece[:min(n, int64(len(piece)))])
		if err != nil {
			return err
		}
		n -= int64(m)
	}
	return nil
}

// drain reads to the end what are to be n bytes, as pour sends.
func drain(from io.Reader, n int64) error {
	got, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, from, make([]byte, 1<<20))
	if err == nil && got != n {
		err = fmt.Errorf("%d bytes of %d came", got, n)
	}
	return err
}

const filePath = "/home/user/transfer"

// transfer makes a request for the file over a connection of its own. The body
// of n bytes repeats the piece; take reads the body of the answer.
func (c *client) transfer(ctx context.Context, sbx box, method string, n int64, piece []byte, take func(io.Reader) error) error {
	to, err := url.Parse(c.proxy)
	if err != nil {
		return err
	}
	h := inside(sbx)
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Accept-Encoding", "identity") // the stream beside it is not compressed either
	h.Set("Connection", "close")
	h.Set("Content-Length", strconv.FormatInt(n, 10))
	var head bytes.Buffer
	fmt.Fprintf(&head, "%s /files?path=%s HTTP/1.1\r\nHost: %s\r\n", method, url.QueryEscape(filePath), to.Host)
	if err := h.Write(&head); err != nil {
		return err
	}
	head.WriteString("\r\n")
	conn, err := dial(ctx, to.Host)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Write(head.Bytes()); err != nil {
		return err
	}
	if err := pour(conn, n, piece); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		said, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // the status says enough when this fails
		return fmt.Errorf("%s /files: %s: %s", method, resp.Status, bytes.TrimSpace(said))
	}
	return take(resp.Body)
}

func (c *client) upload(ctx context.Context, sbx box, n int64, piece []byte) error {
	return c.transfer(ctx, sbx, http.MethodPost, n, piece, func(r io.Reader) error {
		_, err := io.Copy(io.Discard, r)
		return err
	})
}

func (c *client) download(ctx context.Context, sbx box, n int64) error {
	return c.transfer(ctx, sbx, http.MethodGet, 0, nil, func(r io.Reader) error { return drain(r, n) })
}
