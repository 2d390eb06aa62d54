package main

import (
	"context"
	"crypto/subtle"
	"strconv"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/api"
	"github.com/cayhq/cay/proxy"
)

// waker takes the proxy's requests for sleeping sandboxes to the control plane.
func waker(a *api.Server) func(context.Context, proxy.WakeRequest) error {
	return func(ctx context.Context, q proxy.WakeRequest) error {
		k := api.Knock{Sandbox: q.Sandbox, Envd: q.Envd, Token: q.Token}
		if sig := q.Signature; sig.Value != "" && len(sig.Path)+len(sig.User)+len(sig.Expiration) <= maxSigned && fresh(sig.Expiration, time.Now()) {
			k.Signed = func(token cay.Secret) bool {
				return subtle.ConstantTimeCompare([]byte(signed(sig, token.Reveal())), []byte(sig.Value)) == 1
			}
		}
		return a.Wake(ctx, k)
	}
}

// fresh reports whether a signature that expires then may still wake a sandbox.
// Envd judges it again, in the contract's words.
func fresh(expiration string, now time.Time) bool {
	if expiration == "" {
		return true
	}
	at, err := strconv.ParseInt(expiration, 10, 64)
	return err == nil && at >= now.Unix()
}
