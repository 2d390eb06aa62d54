package main

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"strings"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/api"
	"github.com/cayhq/cay/proxy"
)

// signatures finds the sandbox whose access token has signed a file URL: with
// the clients' addresses on loopback, nothing else in the URL names it.
type signatures struct {
	seed cay.Secret
	list func(context.Context) ([]cay.NodeSandbox, error)
}

// signatureLength is that of "v1_" and 32 bytes in base64 without padding.
const signatureLength = len("v1_") + 43

// maxSigned bounds what is hashed for each sandbox; a path has 4,096 bytes.
const maxSigned = 8 << 10

// resolve implements [proxy.Server.ResolveSignature]. Whether the signature is
// too old is for envd to say, in the contract's words. Every sandbox is
// compared, so that the time taken does not tell which one it is; their number
// is what the orchestrator lets run.
func (s signatures) resolve(ctx context.Context, sig proxy.Signature) (id cay.SandboxID, ok bool) {
	if len(sig.Value) != signatureLength || !strings.HasPrefix(sig.Value, "v1_") ||
		len(sig.Path)+len(sig.User)+len(sig.Expiration) > maxSigned {
		return "", false
	}
	boxes, err := s.list(ctx)
	if err != nil {
		return "", false
	}
	for _, b := range boxes {
		want := signed(sig, api.AccessToken(s.seed, b.ID).Reveal())
		if subtle.ConstantTimeCompare([]byte(want), []byte(sig.Value)) == 1 {
			id, ok = b.ID, true
		}
	}
	return id, ok
}

// signed is the signature of a URL by a token (e2b.md 2.2).
func signed(sig proxy.Signature, token string) string {
	text := sig.Path + ":" + sig.Operation + ":" + sig.User + ":" + token
	if sig.Expiration != "" {
		text += ":" + sig.Expiration
	}
	sum := sha256.Sum256([]byte(text))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}
