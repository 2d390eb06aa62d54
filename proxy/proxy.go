// Package proxy is the edge: it takes a request for a port of a sandbox to the
// machine that runs it, as section 4 of the E2B contract says. A request never
// reaches a sandbox other than the one it names: routes carry the execution,
// connections are kept per execution, and a sandbox that ends takes its
// connections with it.
package proxy

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
)

// Limits that hold for every client. The contract sets none on bodies and none
// on how long an answer may take.
const (
	maxHeaderBytes    = 64 << 10
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 620 * time.Second // contract, section 4
	defaultMaxConns   = 16384
	defaultPerSandbox = 4096
	defaultGrace      = 2 * time.Second
)

// Server is the proxy. Set the fields, then use Handler, or Serve, which puts
// the limits of a public listener around it.
type Server struct {
	Catalog catalog.Catalog

	// Domain is the sandbox domain, without a port. Requests to
	// sandbox.<Domain> are routed by headers. Empty: only localhost and IP
	// addresses are.
	Domain string

	// ResolveSignature finds the sandbox that a signed file URL is for when
	// the URL does not say so: without a sandbox domain the SDKs give
	// <E2B_SANDBOX_URL>/files?…&signature=…. It is asked only for requests to
	// a loopback Host without routing headers. Nil turns it off.
	ResolveSignature func(ctx context.Context, s Signature) (cay.SandboxID, bool)

	// Wake is asked for a sandbox that the catalog does not have. When it
	// returns nil, the sandbox is looked up once more and the request goes on.
	// Its errors are those of the control plane: CodeSandboxNotFound for one
	// that does not wake, CodeForbidden for a request that may not wake it,
	// CodeSandboxTransition, CodeTooManySandboxes. Many ask at once for one
	// sandbox. Nil: nothing is woken.
	Wake func(ctx context.Context, q WakeRequest) error
	// MaxParked bounds the requests that wait for that; 0 is 4,096.
	MaxParked int

	// MaxPerSandbox bounds the requests, streams included, that one sandbox
	// may have under way; 0 is 4,096.
	MaxPerSandbox int
	// MaxConns bounds the client connections of one Serve; 0 is 16,384.
	// Further ones wait in the kernel's queue.
	MaxConns int
	// Grace is how long Serve lets requests finish when its context ends;
	// 0 is 2 s.
	Grace time.Duration
	// TLS makes Serve speak TLS, with HTTP/2 by ALPN. Nil is plain.
	TLS *tls.Config

	Now func() time.Time
	Log *slog.Logger

	once sync.Once
	up   upstreams
	log  *slog.Logger
	fine *log.Logger // what net/http says, at level debug

	life context.Context // ends with Close
	stop context.CancelFunc

	mu     sync.Mutex
	lot    lot
	closed bool
	active int
	idle   *sync.Cond // active became 0
}

// Signature is what a signed file URL says (contract, section 2.2).
type Signature struct {
	Path       string // query path, as given
	Operation  string // "read" or "write"
	User       string // query username, empty if missing
	Expiration string // unix seconds, empty if missing
	Value      string // "v1_…"
}

func (s *Server) init() {
	s.once.Do(func() {
		s.log = s.Log
		if s.log == nil {
			s.log = slog.New(slog.DiscardHandler)
		}
		s.fine = slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)
		s.idle = sync.NewCond(&s.mu)
		limit := s.MaxPerSandbox
		if limit <= 0 {
			limit = defaultPerSandbox
		}
		s.up.init(limit)
		s.life, s.stop = context.WithCancel(context.Background())
	})
}

func (s *Server) now() time.Time {
	if s.Now == nil {
		return time.Now()
	}
	return s.Now()
}

// Handler returns the proxy as a handler, for a listener of the caller's.
func (s *Server) Handler() http.Handler {
	s.init()
	return http.HandlerFunc(s.serve)
}

// Cut ends every connection to one execution of a sandbox, those under way
// included. The route must be out of the catalog already; then, when Cut
// returns, no request reaches that execution any more. The orchestrator calls
// it when a sandbox ends.
func (s *Server) Cut(_ cay.SandboxID, e cay.ExecutionID) {
	s.init()
	s.up.cut(e)
}

// Serve accepts connections until ctx ends, then lets requests finish for
// Grace, cuts the others and returns nil. It closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.init()
	limit := s.MaxConns
	if limit <= 0 {
		limit = defaultMaxConns
	}
	srv := s.httpServer()
	failed := make(chan error, 1)
	go func() {
		ll := newLimitListener(l, limit)
		if s.TLS != nil {
			failed <- srv.ServeTLS(ll, "", "")
			return
		}
		failed <- srv.Serve(ll)
	}()
	var err error
	select {
	case err = <-failed:
	case <-ctx.Done():
		grace := s.Grace
		if grace <= 0 {
			grace = defaultGrace
		}
		// Not derived from ctx, which has ended: this is the time after it.
		wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		_ = srv.Shutdown(wait) // what did not finish in time is cut below
		cancel()
		_ = <-failed // http.ErrServerClosed, as Shutdown was called
	}
	_ = srv.Close()
	s.Close()
	return err
}

func (s *Server) httpServer() *http.Server {
	p := new(http.Protocols)
	p.SetHTTP1(true)
	p.SetHTTP2(true)
	p.SetUnencryptedHTTP2(true) // with prior knowledge; the Upgrade form is not served
	srv := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		Protocols:         p,
		ErrorLog:          s.fine,
	}
	if s.TLS != nil {
		srv.TLSConfig = s.TLS.Clone()
	}
	return srv
}

// Close cuts every connection to every sandbox, refuses further requests and
// returns when the ones under way are over. A caller that uses Handler closes
// its http.Server first, since a client that reads nothing holds its request.
func (s *Server) Close() error {
	s.init()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.stop()
	s.up.close()
	s.mu.Lock()
	for s.active > 0 {
		s.idle.Wait()
	}
	s.mu.Unlock()
	s.up.close() // what a request that was still entering has opened
	return nil
}

func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.active++
	return true
}

func (s *Server) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active--; s.active == 0 {
		s.idle.Broadcast()
	}
}

// serve handles one request.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if !s.begin() {
		unavailable("").write(w, r)
		return
	}
	defer s.end()
	defer func() {
		if p := recover(); p != nil {
			if p != http.ErrAbortHandler {
				s.log.Error("the proxy panicked", "panic", p, "stack", string(debug.Stack()))
			}
			panic(http.ErrAbortHandler) // the server closes the connection
		}
	}()

	if r.Method == http.MethodConnect || r.URL.Opaque != "" {
		badRequest(w, "the proxy takes ordinary requests only: no CONNECT, and a path that starts with a slash")
		return
	}
	t, err := parseTarget(r.Host, r.Header, s.Domain)
	if err != nil {
		var ok bool
		if t, ok = s.signed(r); !ok {
			badRequest(w, err.Error())
			return
		}
	}
	if t.port == envdPort && reserved(r.URL.Path) {
		controlRoute(r.URL.Path).write(w, r)
		return
	}
	for again := true; s.pass(w, r, t, again); {
		again = false
	}
}

// pass takes a request to its sandbox. It reports true, instead of answering,
// when the sandbox went away under the request and the request may be made
// again: then the sandbox may have been paused, and wake for it.
func (s *Server) pass(w http.ResponseWriter, r *http.Request, t target, again bool) bool {
	route, c, err := s.enter(r, t)
	if err != nil {
		s.refuse(w, r, t, err)
		return false
	}
	defer s.up.leave(c)
	if refusal, ok := admit(r.Header, t, route); !ok {
		refusal.write(w, r)
		return false
	}
	return s.forward(w, r, t, c, route.Ingress, again && s.Wake != nil && repeatable(r))
}

// repeatable reports whether a request may be made twice.
func repeatable(r *http.Request) bool {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions:
		return r.ContentLength == 0 && r.Header.Get("Upgrade") == ""
	}
	return false
}

// admit judges the traffic token; envd's port has its own token, which envd
// judges. The control port looks like a closed one.
func admit(h http.Header, t target, route catalog.Route) (answer, bool) {
	if t.port == envdPort {
		return answer{}, true
	}
	if want := route.TrafficToken.Reveal(); want != "" {
		switch got := h.Get(headerTraffic); {
		case got == "":
			return tokenMissing(t.sandbox), false
		case subtle.ConstantTimeCompare([]byte(got), []byte(want)) != 1:
			return tokenWrong(t.sandbox), false
		}
	}
	if t.port == controlPort {
		return portClosed(t), false
	}
	return answer{}, true
}

// forward takes an admitted request to its sandbox and the answer back. With
// again, it reports true when there is no answer because the sandbox went away.
func (s *Server) forward(w http.ResponseWriter, r *http.Request, t target, c *connections, in cay.Ingress, again bool) (gone bool) {
	if r.ProtoMajor == 1 {
		// Else the server would read the whole body before it sends the
		// answer's header, and a two-way stream would hang.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	body := &clientBody{ReadCloser: r.Body}
	if r.ContentLength != 0 {
		r.Body = body
	}
	if in.TLS(t.port) && t.port != envdPort {
		r = r.WithContext(context.WithValue(r.Context(), serverName{}, sni(r.Host, in, t.port)))
	}
	rp := httputil.ReverseProxy{
		Transport:     s.up.transport(r, t.port),
		FlushInterval: -1, // every write at once: streams must not wait
		BufferPool:    &buffers,
		ErrorLog:      s.fine,
		Rewrite: func(p *httputil.ProxyRequest) {
			s.rewrite(p, t, c, in)
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if body.broken.Load() {
				badRequest(w, "the request's body is malformed or ended early")
				return
			}
			if again && s.up.dead(c) && r.Context().Err() == nil {
				gone = true
				return
			}
			s.failed(w, r, t, c, err)
		},
	}
	rp.ServeHTTP(w, r)
	return gone
}

// clientBody notes that the client's body is at fault, so that the sandbox is
// not blamed. Transports may read it after the answer has come.
type clientBody struct {
	io.ReadCloser
	broken atomic.Bool
}

func (b *clientBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF && !errors.Is(err, http.ErrBodyReadAfterClose) {
		b.broken.Store(true)
	}
	return n, err
}

// rewrite makes the request the sandbox sees: the client's own, with its Host,
// path and query as they came, without what is only between client and proxy.
func (s *Server) rewrite(p *httputil.ProxyRequest, t target, c *connections, to cay.Ingress) {
	in := p.In.URL
	p.Out.URL = &url.URL{
		Scheme: "http",
		Host:   c.hostport(t.port),
		Path:   in.Path, RawPath: in.RawPath,
		RawQuery: in.RawQuery, ForceQuery: in.ForceQuery,
	}
	p.Out.Host = p.In.Host
	if t.port != envdPort {
		if to.TLS(t.port) {
			p.Out.URL.Scheme = "https"
		}
		if host, masked := to.Host(t.port); masked {
			p.Out.Host = host
			p.Out.Header.Set("X-Forwarded-Host", p.In.Host)
		}
	}
	p.Out.Trailer = p.In.Trailer // filled while the body is read, so the very map
	h := p.Out.Header
	for k := range h {
		if strings.HasPrefix(k, "X-Cay-") {
			delete(h, k)
		}
	}
	delete(h, headerTraffic)
	delete(h, headerSandbox)
	delete(h, headerPort)
	delete(h, "Http2-Settings")
	up := strings.ToLower(h.Get("Upgrade"))
	if t.port == envdPort || strings.Contains(up, "h2c") {
		// Behind an upgrade no path would be looked at. envd needs none, and
		// h2c is spoken with prior knowledge only.
		delete(h, "Upgrade")
		delete(h, "Connection")
	}
	if t.port == envdPort {
		// envd judges the expiry of signed URLs by this, not by a clock that
		// root in the guest can set.
		h.Set("X-Cay-Time", strconv.FormatInt(s.now().UnixMilli(), 10))
	}
}

// sni returns the name that a service with TLS is asked for: that of the Host it
// will see. An address is none.
func sni(host string, in cay.Ingress, port uint16) string {
	if h, masked := in.Host(port); masked {
		host = h
	}
	name, err := hostname(host)
	if err != nil {
		return ""
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return ""
	}
	return name
}

// failed answers when the sandbox gave no answer.
func (s *Server) failed(w http.ResponseWriter, r *http.Request, t target, c *connections, err error) {
	if s.up.dead(c) {
		notFound(t.sandbox).write(w, r)
		return
	}
	if r.Context().Err() != nil {
		return // the client went away; there is nobody to answer
	}
	s.log.Debug("the sandbox gave no answer", "sandbox", t.sandbox, "port", t.port, "error", err)
	switch {
	case timedOut(err):
		tooSlow(t).write(w, r)
	case notOpen(err):
		portClosed(t).write(w, r)
	default:
		noAnswer(t).write(w, r)
	}
}

// signed routes a signed file URL that names no sandbox.
func (s *Server) signed(r *http.Request) (target, bool) {
	if s.ResolveSignature == nil {
		return target{}, false
	}
	sig, ok := signatureOf(r)
	if !ok {
		return target{}, false
	}
	if _, _, routed, err := routingHeaders(r.Header); routed || err != nil {
		return target{}, false
	}
	name, err := hostname(r.Host)
	if err != nil {
		return target{}, false
	}
	if ip, err := netip.ParseAddr(name); !strings.EqualFold(name, "localhost") && (err != nil || !ip.Unmap().IsLoopback()) {
		return target{}, false
	}
	id, ok := s.ResolveSignature(r.Context(), sig)
	return target{sandbox: id, port: envdPort}, ok
}

// signatureOf reads a signed file URL.
func signatureOf(r *http.Request) (Signature, bool) {
	if r.URL.Path != "/files" {
		return Signature{}, false
	}
	var op string
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		op = "read"
	case http.MethodPost:
		op = "write"
	default:
		return Signature{}, false
	}
	q := r.URL.Query()
	sig := Signature{Path: q.Get("path"), Operation: op, User: q.Get("username"),
		Expiration: q.Get("signature_expiration"), Value: q.Get("signature")}
	return sig, sig.Value != ""
}
