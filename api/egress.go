package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/store"
)

// egressWish is what a creator said about where a sandbox may go.
type egressWish struct {
	AllowInternet *bool                               `json:"allowInternet,omitempty"`
	AllowOut      []string                            `json:"allowOut,omitempty"`
	DenyOut       []string                            `json:"denyOut,omitempty"`
	Proxy         *gen.SandboxEgressProxyConfig       `json:"egressProxy,omitempty"`
	Rules         map[string][]gen.SandboxNetworkRule `json:"rules,omitempty"`
}

// egressOf is the wish of a sandbox on record.
func (s *Server) egressOf(rec store.Sandbox) egressWish {
	w := egressWish{AllowInternet: rec.AllowInternet}
	if n := s.options(rec).Network; n != nil {
		w.AllowOut, w.DenyOut, w.Proxy, w.Rules = n.AllowOut, n.DenyOut, n.EgressProxy, n.Rules
	}
	return w
}

// under returns what a creator said and, if that is nothing of where the sandbox
// may go, what was said for the one it is made from.
func (w egressWish) under(n *gen.SandboxNetworkConfig, internet *bool) (*gen.SandboxNetworkConfig, *bool) {
	said := internet != nil || n != nil && (len(n.AllowOut)+len(n.DenyOut)+len(n.Rules) > 0 || n.EgressProxy != nil)
	if said || w.AllowInternet == nil && len(w.AllowOut)+len(w.DenyOut)+len(w.Rules) == 0 && w.Proxy == nil {
		return n, internet
	}
	var out gen.SandboxNetworkConfig
	if n != nil {
		out = *n
	}
	out.AllowOut, out.DenyOut, out.EgressProxy, out.Rules = w.AllowOut, w.DenyOut, w.Proxy, w.Rules
	return &out, w.AllowInternet
}

// setEgress changes what a running sandbox may reach: on the node first, so that
// what is on record is in force, then on record, with keep.
func (l *life) setEgress(ctx context.Context, team cay.TeamID, id cay.SandboxID, e cay.Egress, keep func(*store.Sandbox) error) error {
	// The client may go: the two must agree at the end.
	ctx, stop := detached(ctx, recordTimeout)
	defer stop()
	turn := &l.nets[shard(id)]
	turn.Lock()
	defer turn.Unlock()
	rec, err := l.store.FindSandbox(ctx, team, id)
	if err != nil {
		return gone(id, err)
	}
	if !rec.State.Runs() {
		return gone(id, errOf(&rec))
	}
	err = l.node.SetEgress(ctx, id, e)
	if cay.CodeOf(err) == cay.CodeSandboxNotFound { // it has just ended, or been paused
		return l.busy(ctx, team, id)
	}
	if err != nil {
		return fmt.Errorf("changing the network of sandbox %s: %w", id, err)
	}
	// Whatever became of the sandbox meanwhile: it has the policy, and takes it
	// along.
	_, err = l.update(ctx, id, func(s *store.Sandbox) error {
		if s.State == cay.StateEnded || s.State == cay.StateKilling {
			return errOver
		}
		return keep(s)
	})
	if err == nil || errors.Is(err, errOver) || cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return gone(id, err)
	}
	if was, cerr := l.config(rec); cerr == nil {
		if nerr := l.node.SetEgress(ctx, id, was.Egress); nerr != nil {
			l.log.Error("a sandbox has a network policy that is not on record; the reconciler takes it away", "sandbox", id, "error", nerr)
		}
	}
	return err
}

// settleEgress makes the policy on the node that which is on record: a change
// may have been interrupted.
func (l *life) settleEgress(ctx context.Context, r store.Sandbox, n cay.NodeSandbox) {
	if cfg, err := l.config(r); err != nil || sameEgress(cfg.Egress, n.Egress) {
		return // unreadable: said elsewhere
	}
	turn := &l.nets[shard(r.ID)]
	turn.Lock()
	defer turn.Unlock()
	ctx, stop := context.WithTimeout(ctx, recordTimeout)
	defer stop()
	// Both may have changed since they were read, but not from here on.
	fresh, err := l.store.FindSandbox(ctx, "", r.ID)
	if err != nil || fresh.State != cay.StateRunning {
		return
	}
	cfg, err := l.config(fresh)
	if err != nil {
		return
	}
	if n, err = l.node.Get(ctx, r.ID); err != nil || sameEgress(cfg.Egress, n.Egress) {
		return
	}
	l.log.Warn("the network policy of a sandbox is not that on record; setting it", "sandbox", r.ID)
	if err := l.node.SetEgress(ctx, r.ID, cfg.Egress); err != nil && cay.CodeOf(err) != cay.CodeSandboxNotFound {
		l.log.Error("setting the network policy on record", "sandbox", r.ID, "error", err)
	}
}

// sameEgress compares two policies but for passwords, which nodes do not tell.
func sameEgress(a, b cay.Egress) bool {
	text := func(e cay.Egress) []byte {
		if e.Proxy != nil {
			p := *e.Proxy
			p.Password = ""
			e.Proxy = &p
		}
		out, _ := json.Marshal(e) // texts, numbers and prefixes
		return out
	}
	return slices.Equal(text(a), text(b))
}
