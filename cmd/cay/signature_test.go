package main

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/api"
	"github.com/cayhq/cay/proxy"
)

func TestResolveSignature(t *testing.T) {
	const seed = cay.Secret("seed")
	boxes := []cay.NodeSandbox{{ID: "iaaaaaaaaaaaaaaaaaaaa"}, {ID: "ibbbbbbbbbbbbbbbbbbbb"}}
	var listErr error
	s := signatures{seed: seed, list: func(context.Context) ([]cay.NodeSandbox, error) { return boxes, listErr }}
	good := proxy.Signature{Path: "/tmp/a b", Operation: "read", User: "user", Expiration: "1700000000"}
	good.Value = signed(good, api.AccessToken(seed, boxes[1].ID).Reveal())
	if id, ok := s.resolve(t.Context(), good); !ok || id != boxes[1].ID {
		t.Errorf("got %q, %v, want the second sandbox", id, ok)
	}
	plain := proxy.Signature{Path: "x.txt", Operation: "write"}
	plain.Value = signed(plain, api.AccessToken(seed, boxes[0].ID).Reveal())
	if id, ok := s.resolve(t.Context(), plain); !ok || id != boxes[0].ID {
		t.Errorf("got %q, %v, want the first sandbox", id, ok)
	}
	for name, change := range map[string]func(*proxy.Signature){
		"another path":       func(x *proxy.Signature) { x.Path += "/" },
		"another operation":  func(x *proxy.Signature) { x.Operation = "write" },
		"another user":       func(x *proxy.Signature) { x.User = "root" },
		"another expiration": func(x *proxy.Signature) { x.Expiration = "1700000001" },
		"no expiration":      func(x *proxy.Signature) { x.Expiration = "" },
		"another version":    func(x *proxy.Signature) { x.Value = "v2" + x.Value[2:] },
		"a short one":        func(x *proxy.Signature) { x.Value = x.Value[:20] },
		"a long path":        func(x *proxy.Signature) { x.Path = strings.Repeat("a", maxSigned+1); x.Value = signed(*x, "t") },
	} {
		bad := good
		change(&bad)
		if id, ok := s.resolve(t.Context(), bad); ok {
			t.Errorf("%s: got %q, want none", name, id)
		}
	}
	listErr = errors.New("closed")
	if id, ok := s.resolve(t.Context(), good); ok {
		t.Errorf("without a list: got %q", id)
	}
}

// The example of the contract, e2b.md 2.2.
func TestSignedExample(t *testing.T) {
	got := signed(proxy.Signature{Path: "x.txt", Operation: "read"}, strings.Repeat("a", 64))
	if want := "v1_ZLRGhlFxkaNW05C4gCjELdaHBNOVTN0TpeXUyNBl91E"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
