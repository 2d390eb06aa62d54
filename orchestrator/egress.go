package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/egress"
	"github.com/cayhq/cay/network"
)

// Names decides by name about what guests open, where their policy says names.
// Package egress implements it.
type Names interface {
	// Attach begins to serve a guest; it takes possession of the sockets, also
	// with an error.
	Attach(g egress.Guest) error
	// Update changes the policy of a guest, for what is open too.
	Update(e cay.ExecutionID, p cay.Egress) error
	// Detach ends what is open and closes the sockets; an unknown guest is no
	// error.
	Detach(e cay.ExecutionID) error
	// Bundle returns, in PEM, the authority that a guest whose policy has
	// rules must trust.
	Bundle() (string, error)
}

var errNoNames = &cay.Error{Code: cay.CodeNotImplemented, Layer: cay.LayerNetwork,
	Message: "this node does not decide about connections by name", Fix: "allow addresses and ranges instead of names"}

// confined says what a guest may reach, and for whom that is.
type confined struct {
	sandbox cay.SandboxID
	team    cay.TeamID
	egress  cay.Egress
}

// SetEgress implements [cay.Node].
func (o *Orchestrator) SetEgress(ctx context.Context, id cay.SandboxID, e cay.Egress) error {
	o.mu.Lock()
	g := o.bySbx[id]
	var team cay.TeamID
	if g != nil {
		team = g.rec.Team
	}
	o.mu.Unlock()
	if g == nil {
		return errNotFound(id)
	}
	if err := o.trust(ctx, g, e); err != nil {
		return err
	}
	return o.confine(ctx, g, confined{id, team, e})
}

// bundle returns what a guest must trust for a policy; mostly nothing.
func (o *Orchestrator) bundle(e cay.Egress) (string, error) {
	switch {
	case len(e.Rules) == 0:
		return "", nil
	case o.Names == nil:
		return "", errNoNames
	}
	return o.Names.Bundle()
}

// trustTimeout bounds how long a guest may take to write a file.
const trustTimeout = 5 * time.Second

// trust has a running guest trust what a policy needs, before it is in force.
func (o *Orchestrator) trust(ctx context.Context, g *guest, e cay.Egress) error {
	bundle, err := o.bundle(e)
	if err != nil || bundle == "" {
		return err
	}
	o.mu.Lock()
	addr := g.addr()
	o.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, trustTimeout)
	defer cancel()
	if err := o.Guest.Trust(ctx, addr, bundle); err != nil {
		return &cay.Error{Code: cay.CodeEnvdInit, Layer: cay.LayerEnvd,
			Message: "the guest did not take the certificate that rules need, so its network stays as it was: " + err.Error(),
			Fix:     "try again; if the sandbox is of an older version of Cay, create a new one", Err: err}
	}
	return nil
}

// confine gives a guest that has a slot another policy. The record goes first,
// so that whoever adopts the guest enforces what was asked for last.
func (o *Orchestrator) confine(ctx context.Context, g *guest, c confined) error {
	if c.egress.Named() && o.Names == nil {
		return errNoNames
	}
	g.net.Lock()
	defer g.net.Unlock()
	o.mu.Lock()
	had := g.rec.Egress
	hadPassword := g.rec.ProxyPassword
	if g.rec.Phase == ending {
		o.mu.Unlock()
		return errNotFound(c.sandbox)
	}
	g.rec.setEgress(c.egress)
	err := o.records.write(g.rec)
	o.mu.Unlock()
	if err == nil {
		err = o.enforce(ctx, g, c)
	}
	if err == nil {
		return nil
	}
	o.mu.Lock()
	g.rec.Egress, g.rec.ProxyPassword = had, hadPassword
	old := g.rec
	if old.Phase != ending {
		err = errors.Join(err, o.records.write(old))
	}
	o.mu.Unlock()
	if had != nil && old.Phase != ending {
		err = errors.Join(err, o.enforce(context.WithoutCancel(ctx), g, confined{c.sandbox, c.team, old.egress()}))
	}
	return err
}

// enforce puts a policy in force for a guest that has a slot. The caller holds
// g.net. What the network turns over to Names is refused while nobody is there
// to take it.
func (o *Orchestrator) enforce(ctx context.Context, g *guest, c confined) error {
	if g.named && !c.egress.Named() {
		if err := o.Names.Detach(g.rec.Execution); err != nil {
			return err
		}
		g.named = false
	}
	if err := o.Slots.SetPolicy(ctx, g.rec.Slot, c.egress); err != nil {
		return err
	}
	if g.named {
		return o.Names.Update(g.rec.Execution, c.egress)
	}
	return o.attach(ctx, g, c)
}

// attach has a guest served by name whose policy needs it. The caller holds
// g.net, and the policy is in force in the network.
func (o *Orchestrator) attach(ctx context.Context, g *guest, c confined) error {
	if !c.egress.Named() {
		return nil
	}
	if o.Names == nil {
		return errNoNames
	}
	slot := g.rec.Slot
	d, err := o.Slots.Divert(ctx, slot)
	if err != nil {
		return err
	}
	err = o.Names.Attach(egress.Guest{Execution: g.rec.Execution, Sandbox: c.sandbox, Team: c.team, Policy: c.egress,
		IPv6: d.IPv6, TCP: d.TCP, DNS: d.DNS, DNSTCP: d.DNSTCP, Destination: network.Destination,
		Dial:   func(ctx context.Context, to netip.AddrPort) (net.Conn, error) { return o.Slots.Dial(ctx, slot, to) },
		Report: func(r cay.EgressRefusal) { o.Slots.NoteRefusal(slot, r) }})
	if err != nil {
		return err
	}
	g.named = true
	return nil
}

// RefreshTeam implements [cay.Node].
func (o *Orchestrator) RefreshTeam(ctx context.Context, id cay.TeamID) error {
	o.mu.Lock()
	var slots []int
	for _, g := range o.bySbx {
		if g.rec.Team == id && g.rec.Slot >= 0 && g.rec.Phase != ending {
			slots = append(slots, g.rec.Slot)
		}
	}
	o.mu.Unlock()
	return o.join(ctx, id, slots...)
}

// join has slots count for a team, with the limits that it has now: whoever
// asks last puts the last ones in force.
func (o *Orchestrator) join(ctx context.Context, id cay.TeamID, slots ...int) error {
	if o.TeamLimits == nil || id == "" {
		return nil
	}
	o.teams.Lock()
	defer o.teams.Unlock()
	l, err := o.TeamLimits(ctx, id)
	if err != nil {
		return fmt.Errorf("looking for the team's limits: %w", err)
	}
	return o.Slots.LimitTeam(ctx, id, l, slots...)
}

// detach ends what Names serves of an ending guest, and keeps what was refused
// to it. Nothing is attached to it any more.
func (o *Orchestrator) detach(ctx context.Context, g *guest) []cay.EgressRefusal {
	g.net.Lock()
	defer g.net.Unlock()
	if g.named {
		if err := o.Names.Detach(g.rec.Execution); err != nil {
			o.log().Warn("closing what an ended sandbox had open", "execution", g.rec.Execution, "error", err)
		}
		g.named = false
	}
	if g.rec.Slot < 0 {
		return nil
	}
	log, err := o.Slots.Refusals(ctx, g.rec.Slot, 0)
	if err != nil {
		return nil // a courtesy
	}
	return log
}

// reconfine enforces what the record of an adopted guest says. After an error
// the network has what it had, and lets less through.
func (o *Orchestrator) reconfine(ctx context.Context, g *guest) {
	if err := o.join(ctx, g.rec.Team, g.rec.Slot); err != nil {
		o.log().Error("an adopted sandbox may not count for the limits of its team", "sandbox", g.rec.Sandbox, "error", err)
	}
	if g.rec.Egress == nil { // of a version that did not keep it
		return
	}
	g.net.Lock()
	defer g.net.Unlock()
	c := confined{g.rec.Sandbox, g.rec.Team, g.rec.egress()}
	if c.egress.Named() && o.Names == nil {
		return
	}
	if err := o.enforce(ctx, g, c); err != nil {
		o.log().Error("the egress policy of an adopted sandbox is not wholly in force", "sandbox", g.rec.Sandbox, "error", err)
	}
}

// EgressLog implements [cay.Node].
func (o *Orchestrator) EgressLog(ctx context.Context, id cay.SandboxID, seq uint64) ([]cay.EgressRefusal, error) {
	o.mu.Lock()
	g := o.bySbx[id]
	slot := -1
	if g != nil && g.rec.Phase != ending {
		slot = g.rec.Slot
	}
	o.mu.Unlock()
	if slot >= 0 {
		return o.Slots.Refusals(ctx, slot, seq)
	}
	p, ok := o.past.get(id)
	if !ok {
		return nil, errNotFound(id)
	}
	i := slices.IndexFunc(p.refused, func(r cay.EgressRefusal) bool { return r.Seq > seq })
	if i < 0 {
		return nil, nil
	}
	return p.refused[i:], nil
}
