package egress

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay"
)

const (
	// keepAlive is how long a connection may rest between requests.
	keepAlive = 5 * time.Minute
	// maxWays bounds the connections outwards of one HTTP/2 connection whose
	// destination has HTTP/1 only.
	maxWays           = 32
	maxResponseHeader = 256 << 10
)

// exchange carries the requests of one connection, each judged for itself.
type exchange struct {
	g         *guest
	f         *flow
	sni       string // of the TLS connection that ended here; "" without
	transport *http.Transport
	upgrades  *http.Transport // the same in HTTP/1 only

	ctx context.Context // ends with the connection

	mu     sync.Mutex
	ended  bool
	proven map[string]bool // names that have resolved to the destination
	wg     sync.WaitGroup  // requests and dials
}

// begin counts something that the connection's end waits for. It is false
// after that.
func (x *exchange) begin() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.ended {
		x.wg.Add(1)
	}
	return !x.ended
}

// serveTLS ends TLS as the name that the client means.
func (g *guest) serveTLS(f *flow, s sniffed) {
	a, err := g.server.issuerOf()
	if err != nil {
		g.server.log().Error("a sandbox's rule cannot be applied", "sandbox", g.Sandbox, "name", s.name, "error", err)
		reset(f.conn)
		return
	}
	cert, err := a.leafFor(s.name)
	if err != nil {
		g.server.log().Error("a sandbox's rule cannot be applied", "sandbox", g.Sandbox, "name", s.name, "error", err)
		reset(f.conn)
		return
	}
	g.serveRequests(f, s, s.name, func(c net.Conn) net.Conn {
		return tls.Server(c, &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS12,
			NextProtos: []string{"h2", "http/1.1"}})
	})
}

// serveHTTP carries requests without TLS.
func (g *guest) serveHTTP(f *flow, s sniffed) {
	g.serveRequests(f, s, "", func(c net.Conn) net.Conn { return c })
}

func (g *guest) serveRequests(f *flow, s sniffed, sni string, wrap func(net.Conn) net.Conn) {
	if !g.settle(f, s.name) {
		reset(f.conn)
		return
	}
	x := &exchange{g: g, f: f, sni: sni, proven: map[string]bool{}}
	var cancel context.CancelFunc
	x.ctx, cancel = context.WithCancel(g.ctx)
	defer cancel()
	x.transport, x.upgrades = x.newTransport(sni != ""), x.newTransport(false)
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(sni != "")
	quiet := slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug) // what a guest sends wrongly is its own affair
	srv := &http.Server{
		Handler:           x,
		ReadHeaderTimeout: g.limits.Sniff,
		IdleTimeout:       keepAlive,
		MaxHeaderBytes:    maxSniff,
		ErrorLog:          quiet,
		Protocols:         protocols,
	}
	_ = f.conn.SetDeadline(time.Time{}) // the server sets its own
	c := &replay{Conn: f.conn, head: s.head, closed: make(chan struct{})}
	_ = srv.Serve(&single{conn: wrap(c), closed: c.closed, addr: f.conn.LocalAddr()}) // always an error: the connection has ended
	x.mu.Lock()
	x.ended = true
	x.mu.Unlock()
	cancel()
	g.mu.Lock()
	g.cutLocked(f)
	g.mu.Unlock()
	x.wg.Wait()
	x.transport.CloseIdleConnections()
	x.upgrades.CloseIdleConnections()
}

// newTransport returns one whose connections all lead where the one that is
// served was going.
func (x *exchange) newTransport(http2 bool) *http.Transport {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(http2)
	return &http.Transport{
		// Proxy stays nil: the environment's is the operator's.
		DialContext:            x.dial,
		TLSClientConfig:        &tls.Config{RootCAs: x.g.server.Roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    10 * time.Second,
		DisableCompression:     true, // bodies pass as they are
		MaxConnsPerHost:        maxWays,
		IdleConnTimeout:        keepAlive,
		MaxResponseHeaderBytes: maxResponseHeader,
		ReadBufferSize:         4 << 10,
		WriteBufferSize:        4 << 10,
		Protocols:              protocols,
	}
}

// single is a listener that has one connection and ends with it.
type single struct {
	conn   net.Conn
	closed <-chan struct{}
	addr   net.Addr
}

// Accept implements [net.Listener].
func (l *single) Accept() (net.Conn, error) {
	if c := l.conn; c != nil {
		l.conn = nil
		return c, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}

// Close implements [net.Listener]; the connection's user closes it.
func (l *single) Close() error { return nil }

// Addr implements [net.Listener].
func (l *single) Addr() net.Addr { return l.addr }

// ServeHTTP judges a request and passes it on.
func (x *exchange) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !x.begin() {
		panic(http.ErrAbortHandler)
	}
	defer x.wg.Done()

	g, f, p := x.g, x.f, x.g.policy.Load()
	name, why := requestName(r)
	if x.sni != "" && name != "" && name != x.sni {
		g.refuse(cay.EgressRefusal{Protocol: x.protocol(), Destination: f.to, Name: name, Rule: ruleNames, Reason: "the request is for another name than its TLS connection"})
		http.Error(w, fmt.Sprintf("this connection is for %s", x.sni), http.StatusMisdirectedRequest)
		return
	}
	v := x.judge(p, name, why)
	if !v.open || !g.settle(f, name) {
		g.deny(f, cay.EgressRefusal{Protocol: x.protocol(), Name: name, Rule: v.rule, Reason: v.reason})
		panic(http.ErrAbortHandler)
	}
	var set http.Header
	if t, ok := p.rules.find(name); ok && v.transform {
		if r.Method == http.MethodTrace {
			http.Error(w, "TRACE would show what a rule adds to the request", http.StatusMethodNotAllowed)
			return
		}
		var err error
		set, err = t.resolve(r.Context(), func(ctx context.Context, s string) (cay.Secret, error) {
			if g.server.Secret == nil {
				return "", &cay.Error{Code: cay.CodeNotImplemented, Layer: cay.LayerNetwork,
					Message: "this node has no secrets", Fix: "write the header's value into the rule"}
			}
			return g.server.Secret(ctx, g.Team, s)
		})
		if err != nil {
			x.unresolved(w, t, name, err)
			return
		}
	}
	x.pass(w, r, v.name, set)
}

// judge decides about a request. A name that has resolved to the destination
// once is good for as long as the connection lasts.
func (x *exchange) judge(p *policy, name, why string) verdict {
	x.mu.Lock()
	proven := x.proven[name]
	x.mu.Unlock()
	v := x.g.judge(p, x.f.to, name, why, proven)
	if v.name != "" && !proven {
		x.mu.Lock()
		if len(x.proven) < maxAddresses {
			x.proven[v.name] = true
		}
		x.mu.Unlock()
	}
	return v
}

func (x *exchange) protocol() string {
	if x.sni != "" {
		return "tls"
	}
	return "http"
}

// unresolved answers a request whose headers cannot be had. The text is ours:
// an error of the store's may say what a guest should not know.
func (x *exchange) unresolved(w http.ResponseWriter, t *transform, name string, err error) {
	text := "a header of the rule cannot be had now"
	var typed *cay.Error
	if errors.As(err, &typed) {
		text = typed.Message + "; " + typed.Fix
	}
	x.g.server.log().Warn("a sandbox's rule cannot be applied", "sandbox", x.g.Sandbox, "name", name, "error", err)
	x.g.refuse(cay.EgressRefusal{Protocol: x.protocol(), Destination: x.f.to, Name: name, Rule: t.name, Reason: "a header of the rule cannot be had"})
	http.Error(w, "Cay did not send the request to "+name+": "+text, http.StatusBadGateway)
}

// pass sends a request to the destination of the connection it came by. Name
// is the proven one, if there is one.
func (x *exchange) pass(w http.ResponseWriter, r *http.Request, name string, set http.Header) {
	scheme, host := "http", x.f.to.String()
	if x.sni != "" {
		scheme = "https"
	}
	if name != "" {
		host = net.JoinHostPort(name, strconv.Itoa(int(x.f.to.Port())))
	}
	transport := x.transport
	if r.Header.Get("Upgrade") != "" {
		transport = x.upgrades
	}
	rp := &httputil.ReverseProxy{
		Transport:     transport,
		FlushInterval: -1, // a stream's bytes are passed on as they come
		ErrorLog:      slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
		BufferPool:    buffers{},
		Rewrite: func(pr *httputil.ProxyRequest) {
			in, out := pr.In, pr.Out
			out.URL.Scheme, out.URL.Host = scheme, host
			out.URL.RawQuery = in.URL.RawQuery
			out.Host = in.Host
			out.Trailer = in.Trailer // filled in when the body has been read
			for _, h := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
				if v, ok := in.Header[h]; ok {
					out.Header[h] = v // the guest's own words; we are not to be seen
				}
			}
			if strings.Contains(strings.ToLower(out.Header.Get("Upgrade")), "h2c") {
				out.Header.Del("Upgrade") // in HTTP/2 no request after the first could be judged
				out.Header.Del("Connection")
			}
			for h, v := range set {
				if h == "Host" {
					out.Host = v[0]
					continue
				}
				out.Header[h] = v
			}
		},
		ModifyResponse: func(resp *http.Response) error {
			if len(resp.Trailer) > 0 && r.ProtoMajor == 1 {
				resp.Header.Del("Content-Length") // HTTP/1 has trailers after chunks only
			}
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) { x.failed(w, r, name, err) },
	}
	rp.ServeHTTP(w, r)
}

// failed answers a request that has no answer.
func (x *exchange) failed(w http.ResponseWriter, r *http.Request, name string, err error) {
	if errors.Is(err, errRefused) {
		x.g.deny(x.f, cay.EgressRefusal{Protocol: x.protocol(), Name: name, Rule: ruleAlways, Reason: "the address is always refused"})
		panic(http.ErrAbortHandler)
	}
	if r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the guest has gone
	}
	x.g.server.log().Debug("a sandbox's request has no answer", "sandbox", x.g.Sandbox, "name", name, "error", err)
	// The error itself may name the sandbox's proxy.
	why := "it could not be reached, or closed the connection"
	var bad *tls.CertificateVerificationError
	if errors.As(err, &bad) {
		why = "its certificate is not to be trusted: " + bad.Err.Error()
	}
	http.Error(w, fmt.Sprintf("Cay has no answer of %s: %s", r.URL.Host, why), http.StatusBadGateway)
}

// dial opens a way out for the transport. It leads where the connection that
// is served was going.
func (x *exchange) dial(ctx context.Context, _, hostport string) (net.Conn, error) {
	name, _, err := net.SplitHostPort(hostport)
	if err != nil {
		return nil, err
	}
	if _, err := netip.ParseAddr(name); err == nil {
		name = "" // no name was proven
	}
	if !x.begin() {
		return nil, net.ErrClosed
	}
	defer x.wg.Done()
	// The transport's context outlives the request, and may the connection.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(x.ctx, cancel)()
	p := x.g.policy.Load()
	out, err := x.g.dial(ctx, p, x.f.to, name)
	if err != nil {
		return nil, err
	}
	if !x.g.own(x.f, out) {
		return nil, net.ErrClosed
	}
	w := &way{Conn: out, x: x, timer: idleTimer{a: out, b: out, idle: x.g.limits.Idle}}
	w.timer.touch()
	return w, nil
}

// way is a connection outwards of an exchange.
type way struct {
	net.Conn
	x     *exchange
	timer idleTimer
}

func (w *way) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	w.timer.touch()
	return n, err
}

func (w *way) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	w.timer.touch()
	return n, err
}

func (w *way) Close() error {
	w.x.g.disown(w.x.f, w.Conn)
	return w.Conn.Close()
}

// CloseWrite lets an upgraded stream end one direction.
func (w *way) CloseWrite() error { return closeWrite(w.Conn) }

// buffers are those of ReverseProxy's copies.
type buffers struct{}

// Get implements [httputil.BufferPool].
func (buffers) Get() []byte { return pieces.Get().(*[pieceSize]byte)[:] }

// Put implements [httputil.BufferPool].
func (buffers) Put(b []byte) { pieces.Put((*[pieceSize]byte)(b)) }
