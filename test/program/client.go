package program

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"
)

// EnvdPort is the public port of the daemon in a sandbox (contract/e2b.md 2).
const EnvdPort = 49983

// Client speaks to a server as the contract says, without an SDK, and without
// the product's own code.
type Client struct {
	API, Proxy, Key, Admin string
	// HTTP is the client's own, so that a test can end its connections.
	HTTP *http.Client
}

// Client returns a client with the server's first key.
func (s *Server) Client() *Client {
	return &Client{API: s.API, Proxy: s.Proxy, Key: s.Key, Admin: s.Admin, HTTP: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}}}
}

// Vanish closes the client's idle connections.
func (c *Client) Vanish() { c.HTTP.CloseIdleConnections() }

// Refusal is an answer that is no success.
type Refusal struct {
	Status    int    `json:"-"`
	RequestID string `json:"-"`
	Body      string `json:"-"`
	Code      int    `json:"code"`
	ErrorCode string `json:"error_code"`
	Message   string `json:"message"`
}

// Error implements error.
func (r *Refusal) Error() string { return fmt.Sprintf("HTTP %d: %s", r.Status, r.Body) }

// refused returns the refusal in an answer, or nil.
func refused(resp *http.Response) error {
	if resp.StatusCode < 300 {
		return nil
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	r := &Refusal{Status: resp.StatusCode, RequestID: resp.Header.Get("X-Request-Id"), Body: strings.TrimSpace(string(b))}
	if err == nil {
		_ = json.Unmarshal(b, r) // a body that is no JSON shows in Body
	}
	return r
}

// Call makes a request to the API. in and out may be nil.
func (c *Client) Call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.API+path, body)
	if err != nil {
		return err
	}
	if strings.HasPrefix(path, "/operator/") {
		req.Header.Set("X-Admin-Token", c.Admin)
	} else {
		req.Header.Set("X-API-Key", c.Key)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := refused(resp); err != nil {
		return err
	}
	if out == nil {
		_, err := io.Copy(io.Discard, resp.Body)
		return err
	}
	return json.NewDecoder(resp.Body).Decode(out)
}

// Sandbox is a sandbox as its creator knows it.
type Sandbox struct {
	ID    string `json:"sandboxID"`
	Token string `json:"envdAccessToken"`
	State string `json:"state"`
	EndAt time.Time

	client *Client
}

// Create makes a sandbox of the base template that lives for the given time.
// more holds further fields of the request.
func (c *Client) Create(ctx context.Context, life time.Duration, more map[string]any) (*Sandbox, error) {
	req := map[string]any{"templateID": "base", "timeout": int(life / time.Second)}
	for k, v := range more {
		req[k] = v
	}
	s := &Sandbox{client: c}
	return s, c.Call(ctx, http.MethodPost, "/v2/sandboxes", req, s)
}

// Make is Create in a test: the sandbox is there when it returns, and is
// killed at the test's end.
func (c *Client) Make(t testing.TB, life time.Duration, more map[string]any) *Sandbox {
	t.Helper()
	s, err := c.Create(t.Context(), life, more)
	if err != nil {
		t.Fatalf("creating a sandbox: %v", err)
	}
	t.Cleanup(func() {
		ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
		defer stop()
		var r *Refusal // else the server is down, and its end is that of all
		if err := s.Kill(ctx); errors.As(err, &r) && r.Status != http.StatusNotFound {
			t.Errorf("killing sandbox %s: %v", s.ID, err)
		}
	})
	return s
}

// Own makes the client the one that asks for the sandbox, which came in an
// answer to it.
func (c *Client) Own(s *Sandbox) *Sandbox {
	s.client = c
	return s
}

// Kill ends the sandbox.
func (s *Sandbox) Kill(ctx context.Context) error {
	return s.client.Call(ctx, http.MethodDelete, "/sandboxes/"+s.ID, nil, nil)
}

// Get asks the API for the sandbox.
func (c *Client) Get(ctx context.Context, id string) (*Sandbox, error) {
	s := &Sandbox{client: c}
	return s, c.Call(ctx, http.MethodGet, "/sandboxes/"+id, nil, s)
}

// Record is what the operator sees of a sandbox, also of one that has ended.
type Record struct {
	State, EndReason, EndMessage string
	EndedAt                      *time.Time
}

// Record asks for a sandbox's record.
func (c *Client) Record(ctx context.Context, id string) (Record, error) {
	var out struct{ Record Record }
	return out.Record, c.Call(ctx, http.MethodGet, "/operator/v1/sandboxes/"+id, nil, &out)
}

// List asks the API for all running sandboxes.
func (c *Client) List(ctx context.Context) ([]Sandbox, error) {
	var out []Sandbox
	return out, c.Call(ctx, http.MethodGet, "/v2/sandboxes?limit=100", nil, &out)
}

// Request makes a request to a port of the sandbox, through the proxy.
func (s *Sandbox) Request(ctx context.Context, method string, port int, path, contentType string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, s.client.Proxy+path, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("E2b-Sandbox-Id", s.ID)
	req.Header.Set("E2b-Sandbox-Port", strconv.Itoa(port))
	if s.Token != "" {
		req.Header.Set("X-Access-Token", s.Token)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := s.client.HTTP.Do(req)
	if err != nil {
		return nil, err
	}
	if err := refused(resp); err != nil {
		resp.Body.Close()
		return nil, err
	}
	return resp, nil
}

// Answers reports whether the sandbox's daemon answers.
func (s *Sandbox) Answers(ctx context.Context) error {
	resp, err := s.Request(ctx, http.MethodGet, EnvdPort, "/health", "", nil)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Write writes a file as the default user.
func (s *Sandbox) Write(ctx context.Context, path string, content []byte) error {
	var body bytes.Buffer
	w := multipart.NewWriter(&body)
	part, err := w.CreateFormFile("file", path)
	if err == nil {
		_, err = part.Write(content)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		return err
	}
	resp, err := s.Request(ctx, http.MethodPost, EnvdPort, "/files?path="+url.QueryEscape(path), w.FormDataContentType(), &body)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Read reads a file.
func (s *Sandbox) Read(ctx context.Context, path string) ([]byte, error) {
	resp, err := s.Request(ctx, http.MethodGet, EnvdPort, "/files?path="+url.QueryEscape(path), "", nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(resp.Body)
}

// Process is a process in a sandbox, followed through a stream.
type Process struct {
	PID  int
	body io.ReadCloser
	out  Result
}

// Start starts a bash script as the default user, or as the one named.
func (s *Sandbox) Start(ctx context.Context, user, script string) (*Process, error) {
	msg, err := json.Marshal(map[string]any{"process": map[string]any{"cmd": "/bin/bash", "args": []string{"-l", "-c", script}}, "stdin": false})
	if err != nil {
		return nil, err
	}
	frame := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg))), msg...)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.client.Proxy+"/process.Process/Start", bytes.NewReader(frame))
	if err != nil {
		return nil, err
	}
	for k, v := range map[string]string{"E2b-Sandbox-Id": s.ID, "E2b-Sandbox-Port": strconv.Itoa(EnvdPort),
		"X-Access-Token": s.Token, "Content-Type": "application/connect+json", "Connect-Protocol-Version": "1"} {
		req.Header.Set(k, v)
	}
	if user != "" {
		req.Header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user+":")))
	}
	resp, err := s.client.HTTP.Do(req)
	if err != nil {
		return nil, err
	}
	if err := refused(resp); err != nil {
		resp.Body.Close()
		return nil, err
	}
	p := &Process{body: resp.Body}
	for p.PID == 0 {
		if ended, err := p.next(); err != nil || ended {
			resp.Body.Close()
			return nil, errors.Join(err, errors.New("the stream of the process did not begin with its start"))
		}
	}
	return p, nil
}

// next reads one message of the stream.
func (p *Process) next() (ended bool, err error) {
	var head [5]byte
	if _, err := io.ReadFull(p.body, head[:]); err != nil {
		return false, fmt.Errorf("the stream of the process broke off: %w", err)
	}
	msg := make([]byte, binary.BigEndian.Uint32(head[1:]))
	if _, err := io.ReadFull(p.body, msg); err != nil {
		return false, fmt.Errorf("the stream of the process broke off: %w", err)
	}
	var m struct {
		Event struct {
			Start *struct{ PID int }
			Data  *struct{ Stdout, Stderr []byte }
			End   *struct {
				ExitCode int
				Exited   bool
				Status   string
			}
		}
		Error *struct{ Code, Message string }
	}
	if err := json.Unmarshal(msg, &m); err != nil {
		return false, fmt.Errorf("the stream of the process has %q: %w", msg, err)
	}
	switch ev := m.Event; {
	case head[0]&2 != 0 && m.Error != nil:
		return true, fmt.Errorf("%s: %s", m.Error.Code, m.Error.Message)
	case head[0]&2 != 0:
		return true, nil
	case ev.Start != nil:
		p.PID = ev.Start.PID
	case ev.Data != nil:
		p.out.Stdout += string(ev.Data.Stdout)
		p.out.Stderr += string(ev.Data.Stderr)
	case ev.End != nil:
		p.out.Code = ev.End.ExitCode
		if !ev.End.Exited && p.out.Code == 0 {
			p.out.Code = -1
		}
	}
	return false, nil
}

// Wait reads the stream to its end.
func (p *Process) Wait() (Result, error) {
	defer p.body.Close()
	for {
		if ended, err := p.next(); err != nil || ended {
			return p.out, err
		}
	}
}

// Leave lets go of the process, which goes on.
func (p *Process) Leave() error { return p.body.Close() }

// Exec runs a script to its end.
func (s *Sandbox) Exec(ctx context.Context, user, script string) (Result, error) {
	p, err := s.Start(ctx, user, script)
	if err != nil {
		return Result{}, err
	}
	return p.Wait()
}

// Out runs a script that must succeed and returns what it printed.
func (s *Sandbox) Out(t testing.TB, script string) string {
	t.Helper()
	r, err := s.Exec(t.Context(), "", script)
	if err != nil || r.Code != 0 {
		t.Fatalf("sandbox %s: %s: %v, %s", s.ID, script, err, r)
	}
	return r.Stdout
}
