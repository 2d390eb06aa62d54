package api

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http"
	"regexp"
	"runtime/debug"
	"strings"
	"time"

	"github.com/cayhq/cay"
)

type ctxKey int

const (
	keyRequest ctxKey = iota
	keyCaller
)

// requestID returns the ID of the request that ctx belongs to.
func requestID(ctx context.Context) string {
	id, _ := ctx.Value(keyRequest).(string)
	return id
}

const headerRequestID = "X-Request-ID"

// A client's request ID that is safe in logs and headers.
var clientRequestID = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// outer wraps every request: an ID, recovery, limits, and a line in the log.
func (s *Server) outer(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		begin := time.Now()
		id := r.Header.Get(headerRequestID)
		if !clientRequestID.MatchString(id) {
			id = "req_" + strings.ToLower(rand.Text()[:16])
		}
		w.Header().Set(headerRequestID, id)
		ctx := context.WithValue(r.Context(), keyRequest, id)
		if !unbounded(r) {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, handlerTimeout)
			defer cancel()
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		}
		r = r.WithContext(ctx)
		// Routing is on the path as it was sent: %2F in a template's name does
		// not end a segment.
		u := *r.URL
		u.RawPath = u.EscapedPath()
		r.URL = &u

		rec := &recorder{ResponseWriter: w}
		defer func() {
			if p := recover(); p != nil {
				if p == http.ErrAbortHandler {
					panic(p)
				}
				s.Log.Error("panic in a handler", "request", id, "method", r.Method, "path", r.URL.Path,
					"panic", fmt.Sprint(p), "stack", string(debug.Stack()))
				if rec.status == 0 {
					writeFault(rec, http.StatusInternalServerError, &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerAPI,
						Message: "something went wrong inside Cay",
						Fix:     "look for the request ID in the server's log, and report it"}, id)
				}
			}
			s.Log.Debug("request", "request", id, "method", r.Method, "path", r.URL.Path, "status", rec.status,
				"took", time.Since(begin))
		}()
		next.ServeHTTP(rec, r)
	})
}

// recorder remembers the status of an answer.
type recorder struct {
	http.ResponseWriter
	status int
}

// WriteHeader implements [http.ResponseWriter].
func (r *recorder) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

// Write implements [http.ResponseWriter].
func (r *recorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.ResponseWriter.Write(b)
}

// Unwrap lets [http.ResponseController] reach the connection.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// What browsers may send and see (e2b.md 1.1), and our own.
const (
	corsRequest = "Origin, Content-Length, Content-Type, User-Agent, Authorization, X-API-Key, X-Team-ID, X-Admin-Token, X-Request-ID, " +
		"browser, lang, lang_version, machine, os, package_version, processor, publisher, release, sdk_runtime, system"
	corsMethods = "GET, POST, PUT, PATCH, DELETE, OPTIONS"
	corsExpose  = "X-Next-Token, X-Total-Running, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset, Retry-After, X-Request-ID"
)

// cors lets pages of every origin use the API. No credential is ambient: a page
// must know a key to use one.
func cors(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("Access-Control-Expose-Headers", corsExpose)
		if r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != "" {
			h.Set("Access-Control-Allow-Headers", corsRequest)
			h.Set("Access-Control-Allow-Methods", corsMethods)
			h.Set("Access-Control-Max-Age", "7200")
			w.WriteHeader(http.StatusNoContent)
			return
		}
		next.ServeHTTP(w, r)
	})
}
