package api

import (
	"context"
	"crypto/subtle"
	"errors"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

// Knock is a request for a port of a sandbox that does not run.
type Knock struct {
	Sandbox cay.SandboxID
	// Envd tells that the port is envd's, which its access token guards; the
	// traffic token guards the others.
	Envd bool
	// Token is what the request carries of that.
	Token cay.Secret
	// Signed, for envd, reports whether the request is signed with a token
	// (e2b.md 2.2); nil if it is not signed at all.
	Signed func(token cay.Secret) bool
}

// The time that a sandbox lives when traffic resumes it and its creator said
// nothing (e2b.md 4).
const wakeDefault = 5 * time.Minute

// wakeWait bounds a knock.
const wakeWait = 60 * time.Second

// Wake returns when the sandbox runs, resuming it if it is paused and its
// creator wants traffic to do that. A sandbox that does not wake is
// [cay.CodeSandboxNotFound], as is one that is not there; a request without the
// right to is [cay.CodeForbidden]. [cay.CodeSandboxTransition] tells that others
// have been at it for a minute, [cay.CodeTooManySandboxes] that the team has no
// place for it. Many may knock at once: there is one resume.
func (s *Server) Wake(ctx context.Context, k Knock) error {
	s.init()
	ctx, stop := context.WithTimeoutCause(ctx, wakeWait, errTransition(k.Sandbox, cay.StateResuming))
	defer stop()
	for {
		rec, err := s.Store.FindSandbox(ctx, "", k.Sandbox)
		if err != nil {
			return gone(k.Sandbox, err)
		}
		if rec.State.Runs() {
			return nil
		}
		switch rec.State {
		case cay.StatePausing, cay.StateResuming: // in a moment it is known how that went
		case cay.StatePaused:
			o := s.options(rec)
			if !o.AutoResume || !rec.SnapshotMemory {
				return errNoSandbox(rec.ID)
			}
			if err := s.mayWake(rec, o, k); err != nil {
				return err
			}
			if err := s.wake(ctx, rec, o); !errors.Is(err, errBusy) {
				return err
			}
		default:
			return errNoSandbox(rec.ID)
		}
		s.life.await(ctx, rec.ID)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// mayWake asks of a request what the sandbox would ask of it.
func (s *Server) mayWake(rec store.Sandbox, o options, k Knock) error {
	want := cay.Secret("")
	switch {
	case k.Envd && rec.Secure:
		want = AccessToken(s.Seed, rec.ID)
		if k.Signed != nil && k.Signed(want) {
			return nil
		}
	case !k.Envd && o.Network != nil && o.Network.AllowPublicTraffic != nil && !*o.Network.AllowPublicTraffic:
		want = trafficToken(s.Seed, rec.ID)
	}
	if want == "" || subtle.ConstantTimeCompare([]byte(want.Reveal()), []byte(k.Token.Reveal())) == 1 {
		return nil
	}
	return &cay.Error{Code: cay.CodeForbidden, Layer: cay.LayerAuth,
		Message: "the sandbox is paused, and the request does not carry the token that may resume it",
		Fix:     "send the sandbox's token, or connect to it with an API key"}
}

// wake resumes a paused sandbox for as long as its creator gave it.
func (s *Server) wake(ctx context.Context, rec store.Sandbox, o options) error {
	team, err := s.Store.Team(ctx, rec.Team)
	if err != nil {
		return err
	}
	d := wakeDefault
	if o.Seconds > 0 {
		d = time.Duration(o.Seconds) * time.Second
	}
	_, err = s.life.resume(ctx, team, rec.ID, min(d, maxLength(team)), cay.StartAuto)
	return err
}
