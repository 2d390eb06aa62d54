package template

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/cayhq/cay"
)

// EnvdProber is the [Prober] that talks to envd at the sandbox's own address,
// over the protocol that clients use (contract/e2b.md 2): Connect with JSON,
// and plain HTTP for files.
type EnvdProber struct {
	// Port is envd's.
	Port int
	// Client may be nil.
	Client *http.Client
}

// probePath is where the probe's file goes; probeScript tells what a sandbox
// is used for first. Its output is compared.
const (
	probePath   = "/tmp/cay-probe"
	probeScript = `set -e; cat ` + probePath + `; echo; id -un; cd; pwd; rm ` + probePath + `; sudo -n true; echo done`
)

// Probe writes a file, runs a command as the default user that prints it, and
// reads a file back.
func (p EnvdProber) Probe(ctx context.Context, s cay.NodeSandbox, token cay.Secret) error {
	base := "http://" + net.JoinHostPort(s.Host.Address, fmt.Sprint(p.Port))
	const content = "cay \x01 \xe2\x9c\x93 probe"
	if err := p.upload(ctx, base, token, probePath, content); err != nil {
		return err
	}
	got, err := p.download(ctx, base, token, probePath)
	if err != nil {
		return err
	}
	if got != content {
		return probeError("a file came back from the sandbox with other content", fmt.Sprintf("%q", got), nil)
	}
	out, err := p.run(ctx, base, token, probeScript)
	if err != nil {
		return err
	}
	if out.code != 0 || !strings.HasPrefix(out.stdout, content+"\n") || !strings.HasSuffix(out.stdout, "\ndone\n") {
		return probeError(fmt.Sprintf("the probe command ended with exit code %d", out.code),
			"stdout:\n"+out.stdout+"\nstderr:\n"+out.stderr, nil)
	}
	return nil
}

func probeError(what, output string, err error) error {
	e := &cay.Error{Code: cay.CodeGuestProbe, Layer: cay.LayerGuest, Message: "the sandbox is up, but " + what,
		Fix: "see the output; correct the recipe, or report a defect", Err: err}
	if output != "" {
		e.Detail = map[string]string{"output": output}
	}
	return e
}

func (p EnvdProber) client() *http.Client {
	if p.Client != nil {
		return p.Client
	}
	return http.DefaultClient
}

// do sends a request and returns a body that is a success.
func (p EnvdProber) do(ctx context.Context, method, u string, token cay.Secret, contentType string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, u, body)
	if err != nil {
		return nil, fmt.Errorf("make a request to envd: %w", err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	if token != "" {
		req.Header.Set("X-Access-Token", token.Reveal())
	}
	resp, err := p.client().Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, &cay.Error{Code: cay.CodeEnvdUnreachable, Layer: cay.LayerEnvd,
			Message: "envd does not answer at " + req.URL.Host, Fix: "see the guest's console", Err: err}
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return nil, probeError(fmt.Sprintf("envd answered %s %s with %s", method, req.URL.Path, resp.Status), string(text), nil)
	}
	return resp, nil
}

func filesURL(base, path string) string {
	return base + "/files?" + url.Values{"path": {path}}.Encode()
}

func (p EnvdProber) upload(ctx context.Context, base string, token cay.Secret, path, content string) error {
	var body bytes.Buffer
	w := multipart.NewWriter(&body)
	part, err := w.CreateFormFile("file", path)
	if err == nil {
		_, err = io.WriteString(part, content)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		return fmt.Errorf("encode the probe's file: %w", err)
	}
	resp, err := p.do(ctx, http.MethodPost, filesURL(base, path), token, w.FormDataContentType(), &body)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func (p EnvdProber) download(ctx context.Context, base string, token cay.Secret, path string) (string, error) {
	resp, err := p.do(ctx, http.MethodGet, filesURL(base, path), token, "", nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return "", probeError("reading a file back broke off", "", err)
	}
	return string(b), nil
}

type probeResult struct {
	stdout, stderr string
	code           int
}

// Frames of Connect's streaming protocol (connectrpc.com/docs/protocol): a
// flag byte, a big-endian length of four bytes, a message.
const (
	frameEnd = 2
	maxFrame = 4 << 20
)

func frame(msg []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg))), msg...)
}

func readFrame(r io.Reader) (flags byte, msg []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > maxFrame {
		return 0, nil, fmt.Errorf("a message of %d bytes is too long", n)
	}
	msg = make([]byte, n)
	_, err = io.ReadFull(r, msg)
	return head[0], msg, err
}

// run runs a shell command in the sandbox.
func (p EnvdProber) run(ctx context.Context, base string, token cay.Secret, script string) (probeResult, error) {
	msg, err := json.Marshal(map[string]any{"process": map[string]any{"cmd": "/bin/bash", "args": []string{"-l", "-c", script}}, "stdin": false})
	if err != nil {
		return probeResult{}, fmt.Errorf("encode the probe command: %w", err)
	}
	resp, err := p.do(ctx, http.MethodPost, base+"/process.Process/Start", token, "application/connect+json", bytes.NewReader(frame(msg)))
	if err != nil {
		return probeResult{}, err
	}
	defer resp.Body.Close()
	return readProcess(resp.Body)
}

// readProcess reads the events of a process until it ends.
func readProcess(r io.Reader) (probeResult, error) {
	var out probeResult
	ended := false
	for {
		flags, msg, err := readFrame(r)
		if err != nil {
			return out, probeError("the stream of the probe command broke off", out.stdout+out.stderr, err)
		}
		var ev struct {
			Event struct {
				Data *struct{ Stdout, Stderr []byte }
				End  *struct{ ExitCode int }
			}
			Error *struct{ Code, Message string }
		}
		if err := json.Unmarshal(msg, &ev); err != nil {
			return out, probeError("envd sent a message that is no JSON", string(msg), err)
		}
		switch {
		case flags&frameEnd != 0 && ev.Error != nil:
			return out, probeError("the probe command failed: "+ev.Error.Code+": "+ev.Error.Message, out.stdout+out.stderr, nil)
		case flags&frameEnd != 0 && !ended:
			return out, probeError("the probe command gave no result", out.stdout+out.stderr, nil)
		case flags&frameEnd != 0:
			return out, nil
		case ev.Event.Data != nil:
			out.stdout += string(ev.Event.Data.Stdout)
			out.stderr += string(ev.Event.Data.Stderr)
		case ev.Event.End != nil:
			out.code, ended = ev.Event.End.ExitCode, true
		}
	}
}
