package orchestrator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay"
)

// controlPort is the port of envd's control listener. The network lets only
// this machine reach it, the proxy refuses it, and every request carries the
// guest's own token.
const controlPort = 49982

// controlHeader carries the token.
const controlHeader = "X-Cay-Control"

// Guest is the control channel of a booted guest, as the node uses it. The
// real one is HTTP to envd's control listener; tests put another in place.
type Guest interface {
	// Identity asks who answers. A refused connection is an error that
	// satisfies errors.Is(err, errNotListening).
	Identity(ctx context.Context, a GuestAddr) (GuestIdentity, error)
	// Init gives the guest its configuration.
	Init(ctx context.Context, a GuestAddr, c GuestConfig) error
	// Trust has the guest's programs trust an authority, in PEM.
	Trust(ctx context.Context, a GuestAddr, bundle string) error
	// Sync makes the guest write back its file systems.
	Sync(ctx context.Context, a GuestAddr) error
	// Upgrade gives the guest another envd, which takes the place of the one that
	// runs after the return. After a refusal nothing is changed.
	Upgrade(ctx context.Context, a GuestAddr, program []byte, digest cay.Digest) error
}

// GuestAddr says where a guest's control listener is, and its token.
type GuestAddr struct {
	Addr  netip.Addr
	Token cay.Secret
}

// GuestIdentity is what a guest says of itself.
type GuestIdentity struct {
	Build       cay.BuildID `json:"build"`
	Instance    string      `json:"instance"`
	EnvdVersion string      `json:"envdVersion"`
	EnvdDigest  cay.Digest  `json:"envdDigest"`
	// PID tells one envd of the guest from the next; 0 from earlier builds.
	PID int `json:"pid"`
	// Replacing: it makes room for another.
	Replacing bool `json:"replacing"`
}

// GuestConfig is the body of envd's init call.
type GuestConfig struct {
	EnvVars        map[string]string `json:"envVars"`
	AccessToken    string            `json:"accessToken,omitempty"`
	Timestamp      time.Time         `json:"timestamp"`
	DefaultUser    string            `json:"defaultUser,omitempty"`
	DefaultWorkdir string            `json:"defaultWorkdir,omitempty"`
	LifecycleID    string            `json:"lifecycleID"`
	Hostname       string            `json:"hostname,omitempty"`
	Generation     string            `json:"generation"`
	// Instance and ControlToken replace those of the guest, whose memory may be
	// that of another one.
	Instance     string `json:"instance"`
	ControlToken string `json:"controlToken"`
	// CABundle is the authority that ends the guest's TLS where a rule changes
	// its requests.
	CABundle string `json:"caBundle,omitempty"`
}

// errNotListening tells that the guest's network is up and nothing listens yet.
var errNotListening = errors.New("the control port refuses connections")

// httpGuest is the real control channel.
type httpGuest struct{ client *http.Client }

func newHTTPGuest() *httpGuest {
	return &httpGuest{client: &http.Client{
		Transport: &http.Transport{
			// A connection per call: the address of a slot serves another
			// guest later, and an idle connection must not outlive its guest.
			DisableKeepAlives: true,
			DialContext:       (&net.Dialer{Timeout: time.Second}).DialContext,
		},
	}}
}

func (g *httpGuest) do(ctx context.Context, a GuestAddr, method, path string, body any) (*http.Response, error) {
	var rd io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("encoding the request: %w", err)
		}
		rd = bytes.NewReader(b)
	}
	req, err := newGuestRequest(ctx, a, method, path, rd)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return g.client.Do(req)
}

// newGuestRequest returns a request to a guest, with its token.
func newGuestRequest(ctx context.Context, a GuestAddr, method, path string, body io.Reader) (*http.Request, error) {
	u := "http://" + net.JoinHostPort(a.Addr.String(), strconv.Itoa(controlPort)) + path
	req, err := http.NewRequestWithContext(ctx, method, u, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set(controlHeader, a.Token.Reveal())
	return req, nil
}

// maxGuestAnswer bounds what is read of a guest's answer: the guest is hostile.
const maxGuestAnswer = 64 << 10

// Identity implements [Guest].
func (g *httpGuest) Identity(ctx context.Context, a GuestAddr) (GuestIdentity, error) {
	var id GuestIdentity
	resp, err := g.do(ctx, a, http.MethodGet, "/identity", nil)
	if err != nil {
		if isRefused(err) {
			return id, fmt.Errorf("%w: %w", errNotListening, err)
		}
		return id, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxGuestAnswer))
	if err != nil {
		return id, fmt.Errorf("reading the guest's identity: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return id, fmt.Errorf("the guest answered %s to GET /identity", resp.Status)
	}
	if err := json.Unmarshal(b, &id); err != nil {
		return id, fmt.Errorf("decoding the guest's identity: %w", err)
	}
	return id, nil
}

// Init implements [Guest].
func (g *httpGuest) Init(ctx context.Context, a GuestAddr, c GuestConfig) error {
	return g.post(ctx, a, "/init", c)
}

// Trust implements [Guest].
func (g *httpGuest) Trust(ctx context.Context, a GuestAddr, bundle string) error {
	return g.post(ctx, a, "/trust", struct {
		CABundle string `json:"caBundle"`
	}{bundle})
}

// Sync implements [Guest].
func (g *httpGuest) Sync(ctx context.Context, a GuestAddr) error {
	return g.post(ctx, a, "/collapse", nil)
}

// digestHeader carries the digest of an envd that is sent.
const digestHeader = "X-Cay-Envd-Digest"

// Upgrade implements [Guest].
func (g *httpGuest) Upgrade(ctx context.Context, a GuestAddr, program []byte, digest cay.Digest) error {
	req, err := newGuestRequest(ctx, a, http.MethodPost, "/upgrade", bytes.NewReader(program))
	if err != nil {
		return err
	}
	req.Header.Set(digestHeader, string(digest))
	resp, err := g.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return accepted(resp)
}

func (g *httpGuest) post(ctx context.Context, a GuestAddr, path string, body any) error {
	resp, err := g.do(ctx, a, http.MethodPost, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return accepted(resp)
}

// accepted is the refusal in an answer, or nil.
func accepted(resp *http.Response) error {
	if resp.StatusCode/100 == 2 {
		return nil
	}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10)) // the status says enough when the text is cut
	var told struct{ Message string }
	if json.Unmarshal(b, &told) == nil && told.Message != "" {
		return fmt.Errorf("envd answered %s: %s", resp.Status, strings.TrimSpace(told.Message))
	}
	return fmt.Errorf("envd answered %s: %s", resp.Status, bytes.TrimSpace(b))
}
