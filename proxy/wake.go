package proxy

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
)

// WakeRequest is a request for a port of a sandbox that no node runs.
type WakeRequest struct {
	Sandbox cay.SandboxID
	// Envd tells that it is envd's port, which the access token guards; the
	// traffic token guards the others. Token is the one the request carries.
	Envd  bool
	Token cay.Secret
	// Signature is what a signed file URL says; its Value is empty for every
	// other request.
	Signature Signature
}

const (
	headerAccess = "X-Access-Token"
	// defaultMaxParked bounds the requests that wait for sandboxes to wake.
	defaultMaxParked = 4096
	// parkedPerSandbox bounds those that wait for one.
	parkedPerSandbox = 1024
	// parkFor is how long a request may wait (contract, section 4).
	parkFor = 60 * time.Second
)

var errFullOfParked = errors.New("too many requests wait for sandboxes to wake")

// lot holds back requests for sandboxes that sleep.
type lot struct {
	all   int
	bySbx map[cay.SandboxID]int
}

// park counts a request in. s.mu guards the lot.
func (s *Server) park(id cay.SandboxID) error {
	most := s.MaxParked
	if most <= 0 {
		most = defaultMaxParked
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lot.all >= most || s.lot.bySbx[id] >= parkedPerSandbox {
		return errFullOfParked
	}
	if s.lot.bySbx == nil {
		s.lot.bySbx = map[cay.SandboxID]int{}
	}
	s.lot.all++
	s.lot.bySbx[id]++
	return nil
}

func (s *Server) unpark(id cay.SandboxID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lot.all--
	if s.lot.bySbx[id]--; s.lot.bySbx[id] == 0 {
		delete(s.lot.bySbx, id)
	}
}

// enter finds the way to a sandbox; one that sleeps is woken first, if it may
// be.
func (s *Server) enter(r *http.Request, t target) (catalog.Route, *connections, error) {
	route, c, err := s.up.enter(r.Context(), s.Catalog, t.sandbox)
	if !errors.Is(err, catalog.ErrNotFound) || s.Wake == nil {
		return route, c, err
	}
	if err := s.wake(r, t); err != nil {
		return route, nil, err
	}
	return s.up.enter(r.Context(), s.Catalog, t.sandbox)
}

// wake waits until a sandbox runs. The request's body is not touched: it is the
// client that waits.
func (s *Server) wake(r *http.Request, t target) error {
	if err := s.park(t.sandbox); err != nil {
		return err
	}
	defer s.unpark(t.sandbox)
	ctx, stop := context.WithTimeoutCause(r.Context(), parkFor, &cay.Error{Code: cay.CodeSandboxTransition, Layer: cay.LayerPlacement,
		Message: "the sandbox did not wake in time", Fix: "try again"})
	defer stop()
	defer context.AfterFunc(s.life, stop)()
	q := WakeRequest{Sandbox: t.sandbox, Envd: t.port == envdPort}
	if q.Envd {
		q.Token = cay.Secret(r.Header.Get(headerAccess))
		q.Signature, _ = signatureOf(r)
	} else {
		q.Token = cay.Secret(r.Header.Get(headerTraffic))
	}
	err := s.Wake(ctx, q)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// refuse answers a request whose sandbox cannot be entered.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, t target, err error) {
	code := cay.CodeOf(err)
	switch {
	case errors.Is(err, catalog.ErrNotFound), code == cay.CodeSandboxNotFound:
		notFound(t.sandbox).write(w, r)
	case errors.Is(err, errFull):
		tooMany(t.sandbox, s.up.limit).write(w, r)
	case r.Context().Err() != nil:
		panic(http.ErrAbortHandler) // the client went away, and an empty answer would be a success
	case errors.Is(err, errFullOfParked):
		parkFull(t.sandbox).write(w, r)
	case code == cay.CodeForbidden && t.port != envdPort && r.Header.Get(headerTraffic) == "":
		tokenMissing(t.sandbox).write(w, r)
	case code == cay.CodeForbidden && t.port != envdPort:
		tokenWrong(t.sandbox).write(w, r)
	case code == cay.CodeForbidden:
		resumeDenied(t.sandbox).write(w, r)
	case code == cay.CodeSandboxTransition, code == cay.CodeConflict:
		inTransition(t.sandbox).write(w, r)
	case code == cay.CodeTooManySandboxes:
		teamFull(t.sandbox).write(w, r)
	case s.Wake != nil && isTyped(err) && code != cay.CodeStoreUnavailable && code != cay.CodeShuttingDown:
		s.log.Error("a sandbox does not wake", "sandbox", t.sandbox, "error", err)
		cannotWake(t.sandbox).write(w, r)
	default:
		s.log.Warn("it cannot be told where a sandbox is", "sandbox", t.sandbox, "error", err)
		unavailable(t.sandbox).write(w, r)
	}
}

func isTyped(err error) bool {
	var e *cay.Error
	return errors.As(err, &e)
}
