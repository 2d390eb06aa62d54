package envd

import (
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
)

// Headers of the contract and of Cay.
const (
	headerToken   = "X-Access-Token"
	headerControl = "X-Cay-Control"
	headerTime    = "X-Cay-Time"
)

// Operations that a signature may allow.
const (
	opRead  = "read"
	opWrite = "write"
)

// signature is what allows an operation without the token (v1): the hash of
// its parts, the token among them. expires is the query's own text; empty
// means that there is none.
func signature(path, op, user, token, expires string) string {
	text := path + ":" + op + ":" + user + ":" + token
	if expires != "" {
		text += ":" + expires
	}
	sum := sha256.Sum256([]byte(text))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// checkSignature judges the query of a file request.
func checkSignature(q map[string][]string, op, token string, now time.Time) error {
	get := func(k string) string {
		if v := q[k]; len(v) > 0 {
			return v[0]
		}
		return ""
	}
	sig := get("signature")
	if sig == "" {
		return faultf(connect.CodeUnauthenticated, "missing signature query parameter")
	}
	expires := get("signature_expiration")
	var at int64
	if expires != "" {
		n, err := strconv.ParseInt(expires, 10, 64)
		// Only the decimal form that a client signs: no sign, no leading zeros.
		if err != nil || strconv.FormatInt(n, 10) != expires {
			return faultf(connect.CodeUnauthenticated, "invalid signature expiration")
		}
		at = n
	}
	if !sameSecret(sig, signature(get("path"), op, get("username"), token, expires)) {
		return faultf(connect.CodeUnauthenticated, "invalid signature")
	}
	if expires != "" && at < now.Unix() {
		return faultf(connect.CodeUnauthenticated, "signature is already expired")
	}
	return nil
}

// signingTime is the time that a signature's end is judged by. The guest may
// set its clock, so that one is not asked once the node has spoken: time is
// what the node said at init plus what the monotonic clock has counted since.
// The proxy's clock, in X-Cay-Time, can move it only forward: a client inside
// the guest that forges the header gains nothing.
func (s *Server) signingTime(r *http.Request) time.Time {
	s.mu.RLock()
	base, anchor := s.state.timestamp, s.state.anchor
	s.mu.RUnlock()
	now := s.now()
	if !base.IsZero() {
		now = base.Add(time.Since(anchor)) // monotonic: anchor carries its reading
	}
	ms, err := strconv.ParseInt(r.Header.Get(headerTime), 10, 64)
	if err == nil {
		if t := time.UnixMilli(ms); t.After(now) || base.IsZero() {
			return t
		}
	}
	return now
}

// authorizeFile judges a request to /files: the token if there is one, the
// signature otherwise. signed tells which.
func (s *Server) authorizeFile(r *http.Request, op string) (signed bool, err error) {
	token := s.settings().token
	if token == "" {
		return false, nil
	}
	if vals := r.Header.Values(headerToken); len(vals) > 0 {
		if !sameSecret(vals[0], token) {
			return false, faultf(connect.CodeUnauthenticated, "access token present in header but does not match")
		}
		return false, nil
	}
	return true, checkSignature(r.URL.Query(), op, token, s.signingTime(r))
}

// authorized reports whether a request to any other route carries the token.
func (s *Server) authorized(r *http.Request) bool {
	token := s.settings().token
	return token == "" || sameSecret(r.Header.Get(headerToken), token)
}

// basicUser is the user name of Basic authentication; the password is unused.
func basicUser(h http.Header) (string, bool) {
	scheme, text, ok := strings.Cut(h.Get("Authorization"), " ")
	if !ok || !strings.EqualFold(scheme, "Basic") {
		return "", false
	}
	b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(text))
	if err != nil {
		return "", false
	}
	name, _, ok := strings.Cut(string(b), ":")
	return name, ok && name != ""
}

// requestUser is the account a request acts for: the one it names, or the
// default one.
func (s *Server) requestUser(h http.Header) (*user, error) {
	name, ok := basicUser(h)
	if !ok {
		name = s.settings().user
	}
	return s.users.lookup(name)
}
