package cli

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"connectrpc.com/connect"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/envd/process/processconnect"
	"github.com/cayhq/cay/internal/gen/operator"
)

// envdPort is where envd listens in a sandbox: part of the contract.
const envdPort = 49983

// detailRequest is the key of the request's ID in an error's Detail.
const detailRequest = "request"

// Client talks to one server: as its first team, and as its operator.
type Client struct {
	server   Server
	http     *http.Client // its transport also carries what goes to guests
	api      *api.ClientWithResponses
	operator *operator.ClientWithResponses
}

// NewClient returns a client; it connects with the first call.
func NewClient(s Server) (*Client, error) {
	c := &Client{server: s, http: &http.Client{Transport: &http.Transport{
		// The server is on this machine: a proxy of the environment is not for it.
		DialContext:         (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		MaxIdleConnsPerHost: 16,
	}}}
	var err error
	c.api, err = api.NewClientWithResponses(s.APIURL, api.WithHTTPClient(c.http), api.WithRequestEditorFn(c.asTeam))
	if err != nil {
		return nil, fmt.Errorf("using the API's address %s: %w", s.APIURL, err)
	}
	c.operator, err = operator.NewClientWithResponses(s.APIURL, operator.WithHTTPClient(c.http), operator.WithRequestEditorFn(c.asOperator))
	if err != nil {
		return nil, fmt.Errorf("using the API's address %s: %w", s.APIURL, err)
	}
	return c, nil
}

func (c *Client) asTeam(_ context.Context, r *http.Request) error {
	r.Header.Set("X-API-Key", c.server.APIKey.Reveal())
	return nil
}

func (c *Client) asOperator(_ context.Context, r *http.Request) error {
	r.Header.Set("X-Admin-Token", c.server.AdminToken.Reveal())
	return nil
}

// forTeam makes one call as the operator who acts for the team.
func (c *Client) forTeam(_ context.Context, r *http.Request) error {
	r.Header.Del("X-API-Key")
	r.Header.Set("X-Admin-Token", c.server.AdminToken.Reveal())
	r.Header.Set("X-Team-ID", string(c.server.TeamID))
	return nil
}

// answered checks that a call succeeded. fault is the body of a failure, if it
// had one.
func answered(r *http.Response, fault *api.Failure, want int) error {
	if r.StatusCode == want {
		return nil
	}
	if fault == nil || fault.Message == "" {
		return strange(r)
	}
	return told(fault)
}

// told is the failure that an answer tells of.
func told(fault *api.Failure) *cay.Error {
	e := &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerAPI, Message: fault.Message}
	if fault.ErrorCode != nil {
		e.Code = cay.Code(*fault.ErrorCode)
	}
	if fault.Layer != nil {
		e.Layer = cay.Layer(*fault.Layer)
	}
	if fault.RequestID != nil {
		e.Message = strings.TrimSuffix(e.Message, " ["+*fault.RequestID+"]")
		e.Detail = map[string]string{detailRequest: *fault.RequestID}
	}
	if fault.Fix != nil && *fault.Fix != "" {
		e.Fix = *fault.Fix
		// The message of the API holds the fix too, as a sentence.
		if i := strings.LastIndex(e.Message, sentence(e.Fix)); i > 0 {
			e.Message = e.Message[:i]
		}
	}
	e.Message = strings.TrimRight(e.Message, ". ")
	return e
}

// body is the result of a call that succeeded.
func body[T any](v *T, r *http.Response, fault *api.Failure, want int) (T, error) {
	var none T
	if err := answered(r, fault, want); err != nil {
		return none, err
	}
	if v == nil {
		return none, strange(r)
	}
	return *v, nil
}

func strange(r *http.Response) error {
	return &cay.Error{Code: cay.CodeInternal, Layer: cay.LayerAPI,
		Message: fmt.Sprintf("the server answered %s %s with %s, in a form that this program does not understand", r.Request.Method, r.Request.URL.Path, r.Status),
		Fix:     "use the same version of cay for server and client: compare `cay version` and `cay status`"}
}

// sentence is a fix as the API writes it into the message.
func sentence(fix string) string {
	first, n := utf8.DecodeRuneInString(fix)
	return string(unicode.ToUpper(first)) + strings.TrimRight(fix[n:], ". ")
}

func (c *Client) unreachable(err error) error {
	if errors.Is(err, context.Canceled) {
		return err
	}
	return &cay.Error{Code: cay.CodeNotRunning, Layer: cay.LayerAPI,
		Message: fmt.Sprintf("the server at %s does not answer: %v", c.server.APIURL, cause(err)),
		Fix:     fmt.Sprintf("see `cay status`; start it again with `cay up --data-dir %s`, sandboxes stay", c.server.DataDir), Err: err}
}

// cause is the innermost error: "connection refused" without the path there.
func cause(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}

// fault is the operator API's body of a failure, which is the public one's.
func fault(f *operator.Failure) *api.Failure {
	if f == nil {
		return nil
	}
	return &api.Failure{Code: f.Code, Message: f.Message, ErrorCode: f.ErrorCode, Fix: f.Fix, Layer: f.Layer, RequestID: f.RequestID}
}

// Health asks whether the server is well.
func (c *Client) Health(ctx context.Context) error {
	r, err := c.api.HealthWithResponse(ctx)
	if err != nil {
		return c.unreachable(err)
	}
	if r.StatusCode() != http.StatusOK && r.StatusCode() != http.StatusNoContent {
		return &cay.Error{Code: cay.CodeNotRunning, Layer: cay.LayerAPI,
			Message: fmt.Sprintf("the server at %s answers %s", c.server.APIURL, r.Status()), Fix: "see its log"}
	}
	return nil
}

// Sandboxes returns every sandbox of the team that has the metadata.
func (c *Client) Sandboxes(ctx context.Context, metadata map[string]string) ([]api.ListedSandbox, error) {
	params := &api.ListSandboxesV2Params{}
	if len(metadata) > 0 {
		q := metadataQuery(metadata)
		params.Metadata = &q
	}
	return pages(func(token *string) ([]api.ListedSandbox, http.Header, error) {
		params.NextToken = token
		r, err := c.api.ListSandboxesV2WithResponse(ctx, params)
		if err != nil {
			return nil, nil, c.unreachable(err)
		}
		page, err := body(r.JSON200, r.HTTPResponse, r.JSONDefault, http.StatusOK)
		return page, r.HTTPResponse.Header, err
	})
}

// Sandbox returns one sandbox.
func (c *Client) Sandbox(ctx context.Context, id string) (api.SandboxDetail, error) {
	r, err := c.api.GetSandboxWithResponse(ctx, id)
	if err != nil {
		return api.SandboxDetail{}, c.unreachable(err)
	}
	return body(r.JSON200, r.HTTPResponse, r.JSONDefault, http.StatusOK)
}

// Kill ends a sandbox.
func (c *Client) Kill(ctx context.Context, id string) error {
	r, err := c.api.KillSandboxWithResponse(ctx, id)
	if err != nil {
		return c.unreachable(err)
	}
	return answered(r.HTTPResponse, r.JSONDefault, http.StatusNoContent)
}

// guest is a sandbox as one talks to its envd.
type guest struct {
	id, token string
	user      string // empty is the template's default
}

// roundTripper is a function that is an [http.RoundTripper].
type roundTripper func(*http.Request) (*http.Response, error)

// RoundTrip implements [http.RoundTripper].
func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// transport sends requests to a guest's envd through the proxy.
func (c *Client) transport(g guest) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		r = r.Clone(r.Context())
		r.Header.Set("E2b-Sandbox-Id", g.id)
		r.Header.Set("E2b-Sandbox-Port", strconv.Itoa(envdPort))
		// A stream that says nothing for long is kept open by its server.
		r.Header.Set("Keepalive-Ping-Interval", "50")
		if g.token != "" {
			r.Header.Set("X-Access-Token", g.token)
		}
		if g.user != "" {
			r.Header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(g.user+":")))
		}
		return c.http.Transport.RoundTrip(r)
	})
}

// processes returns the process service of a guest.
func (c *Client) processes(g guest) processconnect.ProcessClient {
	return processconnect.NewProcessClient(&http.Client{Transport: c.transport(g)}, c.server.ProxyURL)
}

// guestError is an error of envd or of the proxy before it, for people.
func guestError(id string, err error) error {
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return err
	}
	e := &cay.Error{Code: cay.CodeEnvdUnreachable, Layer: cay.LayerEnvd, Err: err,
		Message: fmt.Sprintf("sandbox %s: %s", id, ce.Message()), Fix: "see `cay sandbox inspect " + id + "`"}
	switch ce.Code() {
	case connect.CodeInvalidArgument, connect.CodeNotFound, connect.CodeFailedPrecondition, connect.CodePermissionDenied:
		e.Code, e.Fix = cay.CodeInvalidRequest, "correct the command, its directory or its user"
	case connect.CodeUnauthenticated:
		e.Code, e.Fix = cay.CodeUnauthorized, "name a user that the sandbox has with --user"
	}
	return e
}
