// Package api is the control plane: the REST API that the E2B clients speak,
// and the life of every sandbox from the promise of its ID to its recorded end.
//
// The documents in spec are the truth about the wire; internal/gen is made of
// them. This package holds contracts only: a store and a node.
package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/store"
)

// Server is the control plane. Set the exported fields, then use [Server.Run],
// [Server.Serve] and [Server.Handler]; don't change them afterwards. Store and
// Node must be open.
type Server struct {
	Store store.Store
	Node  cay.Node
	// Snapshots keeps sandboxes as files; nil is a node that cannot.
	Snapshots cay.Snapshots
	// Metrics measures sandboxes; nil answers that this is not there.
	Metrics cay.Metrics
	// Sealer keeps the values of secrets from whoever reads the store; nil is
	// a server that keeps none.
	Sealer Sealer
	// Domain is told to clients as the domain of sandbox host names; empty
	// leaves them with their own.
	Domain string
	// Pepper keys the hashes of API keys, Seed the tokens of sandboxes.
	// Changing one makes every key, or every token, invalid.
	Pepper, Seed cay.Secret
	// AdminToken is the operator's X-Admin-Token; empty refuses every
	// operator.
	AdminToken cay.Secret
	// Now is the wall clock; nil is [time.Now].
	Now func() time.Time
	// Log may be nil.
	Log *slog.Logger
	// ReconcileEvery is how often record and node are compared; 0 is 30 s.
	// QuarantineFor is how long a snapshot is seen without an owner before it
	// is deleted; 0 is ten minutes.
	ReconcileEvery, QuarantineFor time.Duration
	// Fault is called at the points of package killpoint; nil in production.
	Fault killpoint.Hook

	once     sync.Once
	life     *life
	touches  chan touch
	teams    sync.Mutex // one change of a team's limits at a time
	draining atomic.Bool
	// made and failed count creates since the start.
	made, failed atomic.Int64
}

// touch is a use of a key that is not on record yet.
type touch struct {
	key store.KeyID
	at  time.Time
}

// Limits of the HTTP server, those of the public contract (e2b.md 1.1).
const (
	readTimeout    = 10 * time.Second
	handlerTimeout = 70 * time.Second
	writeTimeout   = 75 * time.Second
	idleTimeout    = 620 * time.Second
	maxHeader      = 64 << 10
	maxBody        = 4 << 20
)

// touchEvery is how exactly the last use of a key is kept.
const touchEvery = time.Minute

// How long a stopping server waits for requests: first for them to finish, then
// for them to roll back.
const (
	drainGrace    = 5 * time.Second
	rollbackGrace = 15 * time.Second
)

// init makes what the methods share.
func (s *Server) init() {
	s.once.Do(func() {
		if s.Log == nil {
			s.Log = slog.New(slog.DiscardHandler)
		}
		if s.Now == nil {
			s.Now = time.Now
		}
		s.touches = make(chan touch, 64)
		s.life = newLife(s.Store, s.Node, s.Now, s.Log)
		s.life.snaps, s.life.config, s.life.onTimeout = s.Snapshots, s.config, s.onTimeout
		s.life.fault = s.Fault
		s.life.reconcileEvery = cmp.Or(s.ReconcileEvery, reconcileEvery)
		s.life.quarantineFor = cmp.Or(s.QuarantineFor, quarantineFor)
	})
}

// Serve answers requests on l, which it closes, until ctx ends. Requests under
// way are finished; those that take long, such as creates, are rolled back.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.init()
	base, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	srv := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: readTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return base },
		ErrorLog:          slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serving the API: %w", err)
	case <-ctx.Done():
	}
	s.draining.Store(true)
	err := shutdown(srv, context.WithoutCancel(ctx), drainGrace)
	if errors.Is(err, context.DeadlineExceeded) {
		cancel(errShuttingDown)
		err = shutdown(srv, context.WithoutCancel(ctx), rollbackGrace)
	}
	if err != nil {
		err = errors.Join(fmt.Errorf("waiting for requests under way: %w", err), srv.Close())
	}
	_ = <-served // http.ErrServerClosed, as Shutdown was called
	return err
}

func shutdown(srv *http.Server, ctx context.Context, grace time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	return srv.Shutdown(ctx)
}

// Run keeps the promises made to clients until ctx ends: it brings record and
// node together, ends sandboxes at their deadlines, records why sandboxes
// ended, and forgets ended ones after a week. Every promise that is on record
// is kept by the next Run.
func (s *Server) Run(ctx context.Context) error {
	s.init()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.touchKeys(ctx) })
	wg.Go(func() { s.resealSecrets(ctx) })
	s.life.run(ctx)
	return nil
}

// touchKeys records the uses of keys.
func (s *Server) touchKeys(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case t := <-s.touches:
			if err := s.Store.TouchKey(ctx, t.key, t.at); err != nil && ctx.Err() == nil {
				s.Log.Warn("recording the use of an API key", "key", t.key, "error", err)
			}
		}
	}
}
