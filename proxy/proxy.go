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
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
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
	apiBodyTime       = time.Minute // for the body of a request to the API
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
	// MaxConns bounds the client connections; 0 is 16,384, or a third of the
	// files that the process may open if that is less. When it is reached, one
	// makes room that has had no request under way for longest; if all have,
	// further ones wait in the kernel's queue.
	MaxConns int
	// MaxPerClient bounds those of one address, for IPv6 of one /64; 0 is half
	// of MaxConns, and then none for the loopback, where a proxy in front is.
	MaxPerClient int
	// Grace is how long Serve lets requests finish when its context ends;
	// 0 is 2 s.
	Grace time.Duration
	// TLS is for the second listener of Serve, with HTTP/2 by ALPN.
	TLS *tls.Config
	// API gets what comes over TLS for api.<Domain>. Nil: nobody does.
	API http.Handler
	// Challenge is asked first about plain requests below
	// /.well-known/acme-challenge/, and reports whether it has answered. Nil:
	// they are like all others.
	Challenge func(w http.ResponseWriter, r *http.Request) bool
	// RedirectPort, unless 0, is the port of https to which plain requests for
	// names below Domain are sent.
	RedirectPort int

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
// Grace, cuts the others and returns nil. It closes both listeners: plain
// speaks HTTP/1 and HTTP/2 with prior knowledge; secure, which may be nil, is
// for TLS.
func (s *Server) Serve(ctx context.Context, plain, secure net.Listener) error {
	s.init()
	limit := s.MaxConns
	if limit <= 0 {
		limit = max(1, min(defaultMaxConns, descriptors()/3))
	}
	perClient, exempt := s.MaxPerClient, (func(netip.Addr) bool)(nil)
	if perClient <= 0 {
		perClient, exempt = max(1, limit/2), netip.Addr.IsLoopback
	}
	g := newGate(limit, perClient, exempt)
	listeners := []net.Listener{&gateListener{plain, g}}
	if secure != nil {
		listeners = append(listeners, newTLSListener(&gateListener{secure, g}, s.TLS))
	}
	srv := s.httpServer()
	failed := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { failed <- srv.Serve(l) }()
	}
	var err error
	running := len(listeners)
	select {
	case err = <-failed:
		running--
	case <-ctx.Done():
		grace := s.Grace
		if grace <= 0 {
			grace = defaultGrace
		}
		// Not derived from ctx, which has ended: this is the time after it.
		wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		_ = srv.Shutdown(wait) // what did not finish in time is cut below
		cancel()
	}
	_ = srv.Close()
	for ; running > 0; running-- {
		_ = <-failed // http.ErrServerClosed, as it was closed
	}
	for _, l := range listeners {
		_ = l.Close() // again, if the server had it
	}
	s.Close()
	return err
}

func (s *Server) httpServer() *http.Server {
	p := new(http.Protocols)
	p.SetHTTP1(true)
	p.SetHTTP2(true)
	p.SetUnencryptedHTTP2(true) // with prior knowledge; the Upgrade form is not served
	return &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		Protocols:         p,
		ConnContext:       connContext,
		ErrorLog:          s.fine,
	}
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
	if gc := guardedOf(r); gc != nil {
		gc.begin()
		defer gc.end()
	}
	defer func() {
		if p := recover(); p != nil {
			if p != http.ErrAbortHandler {
				s.log.Error("the proxy panicked", "panic", p, "stack", string(debug.Stack()))
			}
			panic(http.ErrAbortHandler) // the server closes the connection
		}
	}()

	if !ordinary(r) {
		badRequest(w, r, "the proxy takes ordinary requests only: no CONNECT, and a path that starts with a slash")
		return
	}
	if s.own(w, r) {
		return
	}
	t, err := parseTarget(r.Host, r.Header, s.Domain)
	if err != nil {
		var ok bool
		if t, ok = s.signed(r); !ok {
			badRequest(w, r, err.Error())
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

// ordinary reports whether a request can be written to a sandbox as it came.
// HTTP/2 lets pass what would be read otherwise on a line of HTTP/1.
func ordinary(r *http.Request) bool {
	if r.ProtoMajor > 1 && !strings.HasPrefix(r.RequestURI, "/") && r.RequestURI != "*" {
		return false
	}
	return r.Method != http.MethodConnect && token(r.Method) && r.URL.Opaque == "" &&
		strings.IndexFunc(r.URL.RawQuery, func(c rune) bool { return c <= ' ' || c == 0x7f }) < 0
}

// token reports whether a text is one word of HTTP (RFC 9110, section 5.6.2).
func token(s string) bool {
	for i := range len(s) {
		c := s[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte("\"(),/:;<=>?@[\\]{}", c) >= 0 {
			return false
		}
	}
	return s != ""
}

// own answers what is for no sandbox.
func (s *Server) own(w http.ResponseWriter, r *http.Request) bool {
	if r.TLS == nil && s.Challenge != nil && strings.HasPrefix(r.URL.Path, "/.well-known/acme-challenge/") && s.Challenge(w, r) {
		return true
	}
	if s.Domain == "" || s.API == nil && s.RedirectPort == 0 {
		return false
	}
	name, err := hostname(r.Host)
	if err != nil {
		return false
	}
	name = strings.ToLower(name)
	below, found := strings.CutSuffix(name, "."+s.Domain)
	switch {
	case !found:
		return false
	case r.TLS != nil && s.API != nil && below == "api":
		hurry(w, r, apiBodyTime)
		s.API.ServeHTTP(w, r)
		return true
	case r.TLS == nil && s.RedirectPort != 0:
		if s.RedirectPort != 443 {
			name += ":" + strconv.Itoa(s.RedirectPort)
		}
		w.Header().Set("Cache-Control", "no-store")
		http.Redirect(w, r, "https://"+name+r.URL.RequestURI(), http.StatusPermanentRedirect)
		return true
	}
	return false
}

// hold keeps what a request has taken, for a stream that outlives its handler,
// until the returned function is called.
func (s *Server) hold(r *http.Request, c *connections) (release func()) {
	s.mu.Lock()
	s.active++
	s.mu.Unlock()
	s.up.hold(c)
	gc := guardedOf(r)
	if gc != nil {
		gc.begin()
	}
	return func() {
		if gc != nil {
			gc.end()
		}
		s.up.leave(c)
		s.end()
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

// failed answers when the sandbox gave no answer.
func (s *Server) failed(w http.ResponseWriter, r *http.Request, t target, c *connections, err error) {
	if s.up.dead(c) {
		notFound(t.sandbox).write(w, r)
		return
	}
	if r.Context().Err() != nil {
		// The client went away, or sends no more: a body that broke off is no
		// request that was answered, which an empty answer would say.
		panic(http.ErrAbortHandler)
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
