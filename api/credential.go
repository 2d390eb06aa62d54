package api

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"github.com/cayhq/cay"
)

// The form of API keys that every version of the clients takes (e2b.md 0.10).
const (
	keyPrefix = "e2b_"
	keyBytes  = 20
)

// NewKey returns a fresh API key: e2b_ and 40 lower-case hex digits.
func NewKey() string {
	b := make([]byte, keyBytes)
	rand.Read(b) // never fails: crypto/rand aborts the program instead
	return keyPrefix + hex.EncodeToString(b)
}

// HashKey returns the hash under which a key is kept: HMAC-SHA-256 with the
// pepper, so that a stolen database is worth nothing. A key of another form is
// [cay.CodeUnauthorized].
func HashKey(pepper cay.Secret, key string) ([]byte, error) {
	digits, ok := strings.CutPrefix(key, keyPrefix)
	if !ok || len(digits) != 2*keyBytes || strings.Trim(digits, "0123456789abcdef") != "" {
		return nil, &cay.Error{Code: cay.CodeUnauthorized, Layer: cay.LayerAuth,
			Message: "the API key is malformed: want e2b_ and 40 lower-case hex digits",
			Fix:     "copy it again from `cay env` or from where it was made; it must be in X-API-Key (E2B_API_KEY for the SDKs)"}
	}
	mac := hmac.New(sha256.New, []byte(pepper.Reveal()))
	mac.Write([]byte(key))
	return mac.Sum(nil), nil
}

// MaskKey returns what a person may see of a key: the first two and the last
// four characters of its random part, and that part's length.
func MaskKey(key string) (prefix, suffix string, length int) {
	digits := strings.TrimPrefix(key, keyPrefix)
	if len(digits) < 8 {
		return "", "", len(digits)
	}
	return digits[:2], digits[len(digits)-4:], len(digits)
}

// AccessToken returns the token that guards envd of a sandbox. It depends on
// seed and ID only, so it outlives restarts (e2b.md 1.4).
func AccessToken(seed cay.Secret, id cay.SandboxID) cay.Secret {
	return derive(seed, string(id))
}

// trafficToken returns the token that guards the other ports.
func trafficToken(seed cay.Secret, id cay.SandboxID) cay.Secret {
	return derive(seed, "sandbox-traffic-"+string(id))
}

func derive(seed cay.Secret, text string) cay.Secret {
	mac := hmac.New(sha256.New, []byte(seed.Reveal()))
	mac.Write([]byte(text))
	return cay.Secret(hex.EncodeToString(mac.Sum(nil)))
}
