package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/url"
	"strings"

	"connectrpc.com/connect"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/internal/gen/envd/process"
)

// Trial takes one sandbox through its life the way a client does: REST, then
// envd through the proxy. The doctor times its stages.
type Trial struct {
	client   *Client
	template string
	guest    guest
}

// NewTrial returns a trial on a template; it starts nothing.
func NewTrial(c *Client, template string) *Trial { return &Trial{client: c, template: template} }

// ID is the sandbox's; empty before Create.
func (t *Trial) ID() string { return t.guest.id }

// trialSeconds bounds the life of the sandbox, should nobody end it.
const trialSeconds = 60

// Create makes the sandbox.
func (t *Trial) Create(ctx context.Context) error {
	timeout, secure := int32(trialSeconds), true
	meta := api.SandboxMetadata{"cay-doctor": "trial"}
	r, err := t.client.api.CreateSandboxWithResponse(ctx, api.NewSandbox{TemplateID: t.template, Timeout: &timeout, Secure: &secure, Metadata: &meta})
	if err != nil {
		return t.client.unreachable(err)
	}
	s, err := body(r.JSON201, r.HTTPResponse, r.JSONDefault, http.StatusCreated)
	if err != nil {
		return err
	}
	t.guest.id = s.SandboxID
	if s.EnvdAccessToken != nil {
		t.guest.token = *s.EnvdAccessToken
	}
	return nil
}

// Command runs a shell and compares what it prints.
func (t *Trial) Command(ctx context.Context) error {
	stream, err := t.client.processes(t.guest).Start(ctx, connect.NewRequest(&process.StartRequest{
		Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", "echo $((6*7))"}}}))
	if err != nil {
		return guestError(t.guest.id, err)
	}
	defer stream.Close()
	var out strings.Builder
	for stream.Receive() {
		ev := stream.Msg().GetEvent()
		out.Write(ev.GetData().GetStdout())
		if end := ev.GetEnd(); end != nil {
			if got := strings.TrimSpace(out.String()); got != "42" || end.GetExitCode() != 0 {
				return t.wrong(fmt.Sprintf("a shell that computes 6*7 printed %q and ended with %s", got, end.GetStatus()))
			}
			return nil
		}
	}
	if err := stream.Err(); err != nil {
		return guestError(t.guest.id, err)
	}
	return t.wrong("the command's stream ended before the command")
}

// File writes a file, reads it back and compares.
func (t *Trial) File(ctx context.Context) error {
	const name = "cay-doctor.txt"
	content := []byte("written by cay doctor\n\x00\xff")
	var sent bytes.Buffer
	form := multipart.NewWriter(&sent)
	part, err := form.CreateFormFile("file", name)
	if err != nil {
		return err
	}
	_, _ = part.Write(content) // into memory
	if err := form.Close(); err != nil {
		return err
	}
	if _, err := t.files(ctx, http.MethodPost, name, form.FormDataContentType(), &sent); err != nil {
		return err
	}
	got, err := t.files(ctx, http.MethodGet, name, "", nil)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, content) {
		return t.wrong(fmt.Sprintf("a file of %d bytes came back as %d other bytes", len(content), len(got)))
	}
	return nil
}

func (t *Trial) files(ctx context.Context, method, name, contentType string, content io.Reader) ([]byte, error) {
	u := t.client.server.ProxyURL + "/files?" + url.Values{"path": {name}}.Encode()
	r, err := http.NewRequestWithContext(ctx, method, u, content)
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	resp, err := t.client.transport(t.guest).RoundTrip(r)
	if err != nil {
		return nil, t.wrong("the proxy does not answer: " + err.Error())
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, t.wrong("the answer to a file call broke off: " + err.Error())
	}
	if resp.StatusCode != http.StatusOK {
		return nil, t.wrong(fmt.Sprintf("%s /files answered %s: %s", method, resp.Status, strings.TrimSpace(string(b))))
	}
	return b, nil
}

// Kill ends the sandbox, if there is one.
func (t *Trial) Kill(ctx context.Context) error {
	if t.guest.id == "" {
		return nil
	}
	return t.client.Kill(ctx, t.guest.id)
}

func (t *Trial) wrong(message string) error {
	return &cay.Error{Code: cay.CodeGuestProbe, Layer: cay.LayerGuest, Message: message,
		Fix: "see `cay sandbox inspect " + t.guest.id + "` for its console"}
}
