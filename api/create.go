package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/store"
)

// sandboxHandlers serves what is about sandboxes.
type sandboxHandlers struct{ *Server }

// Seconds that a sandbox lives when its creator doesn't say (e2b.md 0.1).
const (
	defaultTimeoutV1 = 15
	defaultTimeoutV2 = 300
)

// options is what [store.Sandbox.Options] holds: the creator's wishes that are
// told back but have no column of their own.
type options struct {
	Network    *gen.SandboxNetworkConfig `json:"network,omitempty"`
	AutoResume bool                      `json:"autoResume,omitempty"`
	MCP        *gen.Mcp                  `json:"mcp,omitempty"`
}

// CreateSandbox implements the generated interface.
func (s sandboxHandlers) CreateSandbox(ctx context.Context, r gen.CreateSandboxRequestObject) (gen.CreateSandboxResponseObject, error) {
	secure := r.Body.Secure != nil && *r.Body.Secure
	sbx, err := s.create(ctx, *r.Body, secure, defaultTimeoutV1)
	if err != nil {
		return nil, err
	}
	return gen.CreateSandbox201JSONResponse(sbx), nil
}

// CreateSandboxV2 implements the generated interface.
func (s sandboxHandlers) CreateSandboxV2(ctx context.Context, r gen.CreateSandboxV2RequestObject) (gen.CreateSandboxV2ResponseObject, error) {
	b := r.Body
	sbx, err := s.create(ctx, gen.NewSandbox{
		TemplateID: b.TemplateID, Timeout: b.Timeout, Metadata: b.Metadata, EnvVars: b.EnvVars,
		AllowInternetAccess: b.AllowInternetAccess, Network: b.Network, Mcp: b.Mcp, Iam: b.Iam, VolumeMounts: b.VolumeMounts,
		AutoPause: b.AutoPause, AutoPauseMemory: b.AutoPauseMemory, AutoResume: b.AutoResume,
	}, true, defaultTimeoutV2)
	if err != nil {
		return nil, err
	}
	return gen.CreateSandboxV2201JSONResponse(sbx), nil
}

// create makes a sandbox for the caller's team.
func (s sandboxHandlers) create(ctx context.Context, n gen.NewSandbox, secure bool, seconds int32) (gen.Sandbox, error) {
	team := callerOf(ctx).team
	ref, err := parseTemplateRef(n.TemplateID)
	if err != nil {
		return gen.Sandbox{}, err
	}
	if n.Timeout != nil {
		seconds = *n.Timeout
	}
	timeout, err := lifetime(team, seconds)
	if err != nil {
		return gen.Sandbox{}, err
	}
	if err := checkLifecycle(n); err != nil {
		return gen.Sandbox{}, err
	}
	if err := checkEnv(n.EnvVars); err != nil {
		return gen.Sandbox{}, err
	}
	if err := checkExtras(n); err != nil {
		return gen.Sandbox{}, err
	}
	net, err := egress(n.Network, n.AllowInternetAccess)
	if err != nil {
		return gen.Sandbox{}, err
	}
	if !net.public && !secure {
		return gen.Sandbox{}, invalid("network.allowPublicTraffic false needs a secure sandbox", "send secure: true too")
	}
	tpl, err := s.Store.FindTemplate(ctx, team.ID, ref)
	if cay.CodeOf(err) == cay.CodeTemplateNotFound {
		return gen.Sandbox{}, errNoTemplate(n.TemplateID)
	}
	if err != nil {
		return gen.Sandbox{}, err
	}

	id := cay.NewSandboxID()
	cfg := cay.SandboxConfig{ID: id, TeamID: team.ID, Template: tpl.ID, Build: tpl.Current.ID, Resources: tpl.Current.Resources,
		AllowInternet: net.internet}
	if n.EnvVars != nil {
		cfg.EnvVars = *n.EnvVars
	}
	if secure {
		cfg.AccessToken = AccessToken(s.Seed, id)
	}
	if !net.public {
		cfg.TrafficToken = trafficToken(s.Seed, id)
	}
	rec := store.Sandbox{ID: id, Team: team.ID, Template: tpl.ID, Alias: tpl.Name, Build: tpl.Current.ID,
		Resources: tpl.Current.Resources, EnvdVersion: tpl.Current.EnvdVersion,
		Secure: secure, AllowInternet: n.AllowInternetAccess}
	if n.Metadata != nil {
		rec.Metadata = *n.Metadata
	}
	opt := options{Network: n.Network, MCP: n.Mcp, AutoResume: n.AutoResume != nil && n.AutoResume.Enabled}
	if rec.Options, err = json.Marshal(opt); err != nil {
		return gen.Sandbox{}, fmt.Errorf("encoding the options of a sandbox: %w", err)
	}
	rec, err = s.life.create(ctx, team, rec, cfg, timeout)
	if err != nil {
		s.failed.Add(1)
		return gen.Sandbox{}, placeError(err)
	}
	s.made.Add(1)
	return s.sandbox(rec), nil
}

// placeError keeps the words that clients look for when a sandbox could not be
// made. A limit of the team is not a failure to place.
func placeError(err error) error {
	var e *cay.Error
	if !errors.As(err, &e) {
		e = &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerPlacement, Message: "something went wrong inside Cay",
			Fix: "look for the request ID in the server's log, and report it"}
		if errors.Is(err, context.DeadlineExceeded) {
			e.Code, e.Message, e.Fix = cay.CodePlacementTimeout, "it was not ready in time", "look at the machine's load, and try again"
		}
	}
	if e.Code == cay.CodeTooManySandboxes {
		return err
	}
	placed := *e
	placed.Message = "Failed to place sandbox: " + e.Message
	if tail := e.Detail["console"]; tail != "" && !strings.Contains(e.Message, tail) {
		placed.Message += "; its console ended with: " + tail
	}
	placed.Err = err
	return &placed
}

// lifetime checks the seconds that a sandbox shall live.
func lifetime(team cay.Team, seconds int32) (time.Duration, error) {
	d := time.Duration(seconds) * time.Second
	if d <= 0 {
		return 0, invalid("timeout must be at least 1 second, and is %d", "send the seconds that the sandbox shall live", seconds)
	}
	return d, checkLength(team, d)
}

// checkLength holds a time from now against the team's limit.
func checkLength(team cay.Team, d time.Duration) error {
	if most := maxLength(team); d > most {
		return invalid("timeout is %d seconds, and the team's sandboxes may live %d hours at most",
			fmt.Sprintf("send %d or less", int(most.Seconds())), int(d.Seconds()), team.Limits.MaxLengthHours)
	}
	return nil
}

// checkLifecycle refuses what a sandbox shall do at its end and can't yet.
func checkLifecycle(n gen.NewSandbox) error {
	pause := n.AutoPause != nil && *n.AutoPause
	if n.AutoPauseMemory != nil && !*n.AutoPauseMemory {
		if !pause {
			return invalid("autoPauseMemory false needs autoPause", "send autoPause: true too, or leave autoPauseMemory out")
		}
		if n.AutoResume != nil && n.AutoResume.Enabled {
			return invalid("autoPauseMemory false cannot be combined with autoResume.enabled", "leave one of the two out")
		}
	}
	if pause {
		return absent("pausing a sandbox at its end (autoPause)", "leave autoPause out: the sandbox is killed at its end")
	}
	return nil
}

// checkEnv refuses names and values that no process could be given.
func checkEnv(env *gen.EnvVars) error {
	if env == nil {
		return nil
	}
	for k, v := range *env {
		if k == "" || strings.ContainsAny(k, "=\x00") {
			return invalid("envVars has the name %q: a name is not empty and holds no = and no NUL", "rename it", k)
		}
		if strings.Contains(v, "\x00") {
			return invalid("the value of envVars.%s holds a NUL", "remove it", k)
		}
	}
	return nil
}

// maxTokens is how many identity tokens a sandbox may have (e2b.md 1.4).
const maxTokens = 5

// checkExtras refuses volumes and identities, wrong ones as wrong.
func checkExtras(n gen.NewSandbox) error {
	seen := map[string]bool{}
	for i, m := range n.VolumeMounts {
		if !strings.HasPrefix(m.Path, "/") || path.Clean(m.Path) != m.Path {
			return invalid("volumeMounts.%d.path is %q: it must be absolute and clean", "send a path such as /data", i, m.Path)
		}
		if seen[m.Path] {
			return invalid("volumeMounts.%d.path %q is used twice", "mount each volume at a path of its own", i, m.Path)
		}
		seen[m.Path] = true
	}
	if len(n.VolumeMounts) > 0 {
		return absent("mounting volumes (volumeMounts)", "copy the files with files.write")
	}
	if n.Iam == nil || n.Iam.Tokens == nil || len(*n.Iam.Tokens) == 0 {
		return nil
	}
	if len(*n.Iam.Tokens) > maxTokens {
		return invalid("iam.tokens has %d tokens, and may have %d", "ask for fewer", len(*n.Iam.Tokens), maxTokens)
	}
	for name, t := range *n.Iam.Tokens {
		if name == "" || t.Audience == "" {
			return invalid("iam.tokens needs a name and an audience for each token", "fill them in")
		}
		if t.TokenType != "JWT-SVID" {
			return invalid("iam.tokens.%s.tokenType is %q, and only JWT-SVID is known", "send JWT-SVID", name, t.TokenType)
		}
	}
	return absent("identity tokens (iam)", "pass a credential in envVars")
}
