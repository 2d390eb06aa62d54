package orchestrator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/killpoint"
)

var _ cay.EnvdUpgrader = (*Orchestrator)(nil)

// Agent is an envd that running guests can be given. The zero value is none.
type Agent struct {
	Version string
	Digest  cay.Digest
	// Program returns the program, whose digest is Digest.
	Program func() ([]byte, error)
}

// Bounds of a replacement of envd. The one before waits up to half a minute
// for transfers and as long again for readers (envd/leave.go).
const (
	upgradeTimeout = 2 * time.Minute
	upgradePause   = 100 * time.Millisecond
	identityTime   = time.Second
)

// calmTime is how long an envd must be the same one before it is taken for the
// guest's: PID 1 puts the one before back within five seconds (cmd/init).
const calmTime = 6 * time.Second

// UpgradeEnvd implements [cay.EnvdUpgrader].
//
// From the record before the program is sent until one after it is known which
// of the two runs, both digests are on record, and in the manifest of what is
// saved meanwhile: whenever the node dies or the guest is frozen, what comes
// back is one of them.
func (o *Orchestrator) UpgradeEnvd(ctx context.Context, id cay.SandboxID) (cay.EnvdUpgrade, error) {
	// Once begun it goes on, whether or not the caller waits.
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), upgradeTimeout)
	defer stop()
	g, err := o.beginUpgrade(id)
	if err != nil {
		return cay.EnvdUpgrade{}, err
	}
	defer o.wg.Done()
	defer func() {
		o.mu.Lock()
		g.upgrading = false
		o.mu.Unlock()
		o.settle(g)
	}()
	defer context.AfterFunc(o.life, stop)()
	began := o.now()
	u, err := o.upgrade(ctx, g)
	u.Took = o.now().Sub(began)
	if err != nil {
		if o.life.Err() != nil {
			err = errShuttingDown()
		}
		o.log().Error("envd was not replaced", "sandbox", id, "error", err)
		return u, err
	}
	o.log().Info("envd replaced", "sandbox", id, "changed", u.Changed, "from", u.FromDigest, "to", u.Digest, "took", u.Took)
	return u, nil
}

// beginUpgrade finds a guest that runs, for one replacement at a time. The
// caller ends it.
func (o *Orchestrator) beginUpgrade(id cay.SandboxID) (*guest, error) {
	if o.Envd.Digest == "" {
		return nil, &cay.Error{Code: cay.CodeNotImplemented, Layer: cay.LayerEnvd,
			Message: "this server has no envd to give to sandboxes", Fix: "build it with `make build`"}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	g := o.bySbx[id]
	switch {
	case g == nil, g.rec.Phase == ending:
		return nil, errNotFound(id)
	case !o.open:
		return nil, errShuttingDown()
	case g.rec.Phase != running, g.rec.Untold, g.upgrading:
		return nil, &cay.Error{Code: cay.CodeSandboxTransition, Layer: cay.LayerEnvd,
			Message: fmt.Sprintf("another operation on sandbox %s is under way", id), Fix: "try again when it is done"}
	}
	g.upgrading = true
	g.rec.Steps = slices.DeleteFunc(g.rec.Steps, func(s cay.StartStep) bool { return s.Op == string(killpoint.Upgrade) })
	o.wg.Add(1)
	return g, nil
}

func (o *Orchestrator) upgrade(ctx context.Context, g *guest) (cay.EnvdUpgrade, error) {
	const op = killpoint.Upgrade
	o.mu.Lock()
	addr := g.addr()
	o.mu.Unlock()
	timed := func(name string, do func() error) error {
		began := o.now()
		err := do()
		o.stepOf(g, string(op), name, cay.LayerEnvd, began, err)
		return err
	}
	before, err := o.identity(ctx, addr)
	if err != nil {
		return cay.EnvdUpgrade{}, o.upgradeFailed(ctx, g, cay.CodeGuestUnresponsive, "envd does not answer: "+err.Error(), err)
	}
	u := cay.EnvdUpgrade{FromVersion: before.EnvdVersion, FromDigest: before.EnvdDigest, Version: before.EnvdVersion, Digest: before.EnvdDigest}
	if before.EnvdDigest == o.Envd.Digest {
		return u, nil
	}
	if err := o.recordEnvd(g, "next", before, o.Envd.Digest); err != nil {
		return u, err
	}
	program, err := o.Envd.Program()
	if err != nil {
		return u, err
	}
	o.Fault.Pass(op, "send.before")
	err = timed("send", func() error { return o.Guest.Upgrade(ctx, addr, program, o.Envd.Digest) })
	o.Fault.Pass(op, "send.after")
	if err != nil {
		return u, o.upgradeFailed(ctx, g, cay.CodeEnvdUpgrade, "the envd that runs did not take the other one: "+err.Error(), err)
	}
	var after GuestIdentity
	o.Fault.Pass(op, "replace.before")
	err = timed("replace", func() error { after, err = o.awaitEnvd(ctx, g, addr, before); return err })
	o.Fault.Pass(op, "replace.after")
	if err != nil {
		return u, err
	}
	u.Changed, u.Version, u.Digest = true, after.EnvdVersion, after.EnvdDigest
	if err := o.recordEnvd(g, "replaced", after, before.EnvdDigest); err != nil {
		o.log().Error("the record of a guest whose envd was replaced cannot be written; trying again", "execution", g.rec.Execution, "error", err)
	}
	return u, nil
}

// awaitEnvd waits until the other envd answers, or the one before is back.
func (o *Orchestrator) awaitEnvd(ctx context.Context, g *guest, addr GuestAddr, before GuestIdentity) (GuestIdentity, error) {
	for {
		id, err := o.identity(ctx, addr)
		switch {
		case err != nil: // it is on its way
		case id.EnvdDigest == o.Envd.Digest:
			return id, nil
		case !id.Replacing && id.PID != before.PID:
			return id, o.upgradeFailed(ctx, g, cay.CodeEnvdUpgrade, "the other envd ended at once, and the one before it is back"+o.lastWords(ctx, g), nil)
		}
		select {
		case <-g.exited:
			return id, o.diedDuring(ctx, g, "replacing its envd")
		case <-g.gone:
			return id, &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerEnvd,
				Message: "the sandbox was paused or ended while its envd was replaced", Fix: "resume it, and try again"}
		case <-ctx.Done():
			return id, o.upgradeFailed(ctx, g, cay.CodeEnvdUpgrade, fmt.Sprintf("the other envd did not answer within %s", upgradeTimeout), err)
		case <-time.After(upgradePause):
		}
	}
}

// identity asks a guest once.
func (o *Orchestrator) identity(ctx context.Context, addr GuestAddr) (GuestIdentity, error) {
	ctx, stop := context.WithTimeout(ctx, identityTime)
	defer stop()
	return o.Guest.Identity(ctx, addr)
}

// upgradeFailed says why envd was not replaced, with what the guest said.
func (o *Orchestrator) upgradeFailed(ctx context.Context, g *guest, code cay.Code, why string, err error) error {
	var typed *cay.Error
	if errors.As(err, &typed) {
		return err
	}
	return &cay.Error{Code: code, Layer: cay.LayerEnvd,
		Message: "envd was not replaced: " + why,
		Fix:     "the sandbox runs on; `cay sandbox inspect` shows which envd it has, and the last lines of its console",
		Detail:  o.consoleDetail(context.WithoutCancel(ctx), g), Err: err}
}

// lastWords is what PID 1 said when it put the envd before back.
func (o *Orchestrator) lastWords(ctx context.Context, g *guest) string {
	for line := range strings.Lines(o.consoleDetail(ctx, g)["console"]) {
		if strings.Contains(line, "the program before it is back") {
			return ": " + strings.TrimSpace(line)
		}
	}
	return ""
}

// recordEnvd notes which envd a guest has, and which other one it may have. What
// is known counts even if the record cannot be written.
func (o *Orchestrator) recordEnvd(g *guest, name string, id GuestIdentity, other cay.Digest) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if g.rec.Phase == ending || g.rec.Envd == id.EnvdDigest && g.rec.EnvdVersion == id.EnvdVersion && g.rec.EnvdOther == other {
		return nil
	}
	next := g.rec
	next.Envd, next.EnvdVersion, next.EnvdOther = id.EnvdDigest, id.EnvdVersion, other
	err := o.writeLocked(killpoint.Upgrade, next, name)
	if err != nil && name == "next" {
		return storageError("write the node's record of sandbox "+string(g.rec.Sandbox), err) // nothing is begun
	}
	g.rec.Envd, g.rec.EnvdVersion, g.rec.EnvdOther = next.Envd, next.EnvdVersion, next.EnvdOther
	if err != nil {
		return storageError("write the node's record of sandbox "+string(g.rec.Sandbox), err)
	}
	return nil
}

// settle finds out in the background which envd a guest has whose record names
// two: the one that stays.
func (o *Orchestrator) settle(g *guest) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if g.rec.EnvdOther == "" || g.settling || o.life.Err() != nil {
		return
	}
	g.settling = true
	o.wg.Go(func() {
		defer func() {
			o.mu.Lock()
			g.settling = false
			o.mu.Unlock()
		}()
		var last GuestIdentity
		for {
			o.mu.Lock()
			addr, known, sandbox := g.addr(), g.rec.Envd, g.rec.Sandbox
			upgrading := g.upgrading // again
			o.mu.Unlock()
			id, err := o.identity(o.life, addr)
			switch {
			case err != nil, id.Replacing, upgrading:
				id = GuestIdentity{}
			case id.EnvdDigest != "" && id.EnvdDigest == last.EnvdDigest && id.PID == last.PID:
				if id.EnvdDigest != known {
					o.log().Warn("a guest has another envd than was thought", "sandbox", sandbox, "envd", id.EnvdDigest, "thought", known)
				}
				if o.recordEnvd(g, "settled", id, "") == nil {
					return
				}
			}
			last = id
			select {
			case <-time.After(calmTime):
			case <-g.gone:
				return
			case <-o.life.Done():
				return
			}
		}
	})
}

// has sets which envd a guest of a build, or of a snapshot, begins with.
func (r *record) has(m cay.Manifest, from *origin) {
	r.Envd, r.EnvdVersion = m.Envd, m.EnvdVersion
	if from != nil && from.Envd != "" {
		r.Envd, r.EnvdOther = from.Envd, from.EnvdOther
		r.EnvdVersion = cmp.Or(from.EnvdVersion, r.EnvdVersion)
	}
}

// may reports whether a guest may have an envd: one that the record names, or
// any if that names none.
func (r *record) may(d cay.Digest) bool {
	return r.Envd == "" || d == r.Envd || d == r.EnvdOther && d != ""
}
