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
	// AutoPause pauses the sandbox at its deadline, DiskOnly without its
	// memory.
	AutoPause bool `json:"autoPause,omitempty"`
	DiskOnly  bool `json:"diskOnly,omitempty"`
	// Seconds is the timeout that the creator gave; traffic resumes for as
	// long.
	Seconds int32 `json:"seconds,omitempty"`
	// EnvVars are needed again when the sandbox is started from its disk. They
	// are told to nobody.
	EnvVars map[string]string `json:"envVars,omitempty"`
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
	if err := s.checkLifecycle(n); err != nil {
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
	src, err := s.source(ctx, team, ref, n.TemplateID)
	if err != nil {
		return gen.Sandbox{}, err
	}
	n.Network, n.AllowInternetAccess = src.egress.under(n.Network, n.AllowInternetAccess)
	rec := store.Sandbox{ID: cay.NewSandboxID(), Team: team.ID, Template: src.template, Alias: src.alias, Build: src.build,
		Resources: src.resources, EnvdVersion: src.envd, Secure: secure, AllowInternet: n.AllowInternetAccess,
		Origin: src.snapshot, Parent: src.sandbox}
	if n.Metadata != nil {
		rec.Metadata = *n.Metadata
	}
	opt := options{Network: n.Network, MCP: n.Mcp, AutoResume: n.AutoResume != nil && n.AutoResume.Enabled,
		AutoPause: n.AutoPause != nil && *n.AutoPause, DiskOnly: n.AutoPauseMemory != nil && !*n.AutoPauseMemory, Seconds: seconds}
	if n.EnvVars != nil {
		opt.EnvVars = *n.EnvVars
	}
	if rec.Options, err = json.Marshal(opt); err != nil {
		return gen.Sandbox{}, fmt.Errorf("encoding the options of a sandbox: %w", err)
	}
	cfg, err := s.config(rec)
	if err != nil {
		return gen.Sandbox{}, err
	}
	cfg.From, cfg.Mode = src.snapshot, cay.StartAuto
	rec, err = s.life.create(ctx, team, rec, cfg, timeout)
	if err != nil {
		s.failed.Add(1)
		return gen.Sandbox{}, placeError(err)
	}
	s.made.Add(1)
	return s.sandbox(rec), nil
}

// source is what a sandbox is made of: a template's build, or a snapshot.
type source struct {
	template  cay.TemplateID
	alias     string
	build     cay.BuildID
	resources cay.Resources
	envd      string
	snapshot  cay.SnapshotID // empty: the build alone
	sandbox   cay.SandboxID  // whose snapshot it is
	egress    egressWish     // that sandbox's
}

// source resolves a reference: templates before snapshots.
func (s sandboxHandlers) source(ctx context.Context, team cay.Team, ref store.TemplateRef, text string) (source, error) {
	t, err := s.Store.FindTemplate(ctx, team.ID, ref)
	if err == nil {
		return source{template: t.ID, alias: t.Name, build: t.Current.ID, resources: t.Current.Resources, envd: t.Current.EnvdVersion}, nil
	}
	if cay.CodeOf(err) != cay.CodeTemplateNotFound {
		return source{}, err
	}
	n, err := s.Store.FindSnapshot(ctx, team.ID, ref)
	switch cay.CodeOf(err) {
	case "":
		src := source{template: n.Template, alias: n.Alias, build: n.Build, resources: n.Resources, envd: n.EnvdVersion,
			snapshot: n.ID, sandbox: n.Sandbox}
		if len(n.Options) > 0 {
			err = json.Unmarshal(n.Options, &src.egress)
		}
		return src, err
	case cay.CodeNotFound:
		return source{}, errNoTemplate(text)
	}
	return source{}, err
}

// config is what the node is told of a sandbox on record, but for its deadline
// and what to start it from.
func (s *Server) config(rec store.Sandbox) (cay.SandboxConfig, error) {
	o := s.options(rec)
	net, err := egress(o.Network, rec.AllowInternet)
	if err != nil {
		return cay.SandboxConfig{}, err
	}
	in, err := ingress(o.Network)
	if err != nil {
		return cay.SandboxConfig{}, err
	}
	cfg := cay.SandboxConfig{ID: rec.ID, TeamID: rec.Team, Template: rec.Template, Build: rec.Build, Resources: rec.Resources,
		Egress: net.egress, Ingress: in, EnvVars: o.EnvVars}
	if rec.Secure {
		cfg.AccessToken = AccessToken(s.Seed, rec.ID)
	}
	if !net.public {
		cfg.TrafficToken = trafficToken(s.Seed, rec.ID)
	}
	return cfg, nil
}

// onTimeout says what becomes of a sandbox at its deadline.
func (s *Server) onTimeout(rec store.Sandbox) (pause, memory bool) {
	o := s.options(rec)
	return o.AutoPause, !o.DiskOnly
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

// checkLifecycle refuses what a sandbox cannot do at its end.
func (s sandboxHandlers) checkLifecycle(n gen.NewSandbox) error {
	pause := n.AutoPause != nil && *n.AutoPause
	if n.AutoPauseMemory != nil && !*n.AutoPauseMemory {
		if !pause {
			return invalid("autoPauseMemory false needs autoPause", "send autoPause: true too, or leave autoPauseMemory out")
		}
		if n.AutoResume != nil && n.AutoResume.Enabled {
			return invalid("autoPauseMemory false cannot be combined with autoResume.enabled", "leave one of the two out")
		}
	}
	if pause && s.Snapshots == nil {
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
