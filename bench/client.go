package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"
)

// client speaks to a server as the SDKs do, with kept-alive connections and
// without an SDK's own cost.
type client struct {
	http                   *http.Client
	api, proxy, key, admin string
}

func newClient(s *server) *client {
	return &client{api: s.api, proxy: s.proxy, key: s.key, admin: s.admin,
		http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}, Timeout: time.Minute}}
}

func (c *client) close() { c.http.CloseIdleConnections() }

// box is a sandbox as create answers.
type box struct {
	ID    string `json:"sandboxID"`
	Token string `json:"envdAccessToken"`
}

// do sends a request with a JSON body and decodes the answer, if into is not
// nil. Another status than 2xx is an error with the server's words.
func (c *client) do(ctx context.Context, method, address string, head http.Header, body, into any) error {
	var rd io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		rd = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, address, rd)
	if err != nil {
		return err
	}
	req.Header = head
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body) // to its end, so that the connection is kept
	switch {
	case err != nil:
		return fmt.Errorf("reading the answer to %s %s: %w", method, req.URL.Path, err)
	case resp.StatusCode/100 != 2:
		return fmt.Errorf("%s %s: %s: %s", method, req.URL.Path, resp.Status, bytes.TrimSpace(b))
	case into == nil:
		return nil
	}
	return json.Unmarshal(b, into)
}

func (c *client) keyed() http.Header { return http.Header{"X-Api-Key": {c.key}} }

// create makes a sandbox that ends by itself if nobody kills it.
func (c *client) create(ctx context.Context, timeout time.Duration) (box, error) {
	var b box
	err := c.do(ctx, http.MethodPost, c.api+"/v2/sandboxes", c.keyed(),
		map[string]any{"templateID": "base", "timeout": int(timeout.Seconds())}, &b)
	return b, err
}

func (c *client) kill(ctx context.Context, b box) error {
	return c.do(ctx, http.MethodDelete, c.api+"/sandboxes/"+url.PathEscape(b.ID), c.keyed(), nil, nil)
}

// step is a part of a start, by the server's own clock.
type step struct {
	Name   string  `json:"name"`
	TookMs float64 `json:"tookMs"`
}

func (c *client) trace(ctx context.Context, b box) ([]step, error) {
	var out []step
	err := c.do(ctx, http.MethodGet, c.api+"/operator/v1/sandboxes/"+url.PathEscape(b.ID)+"/trace",
		http.Header{"X-Admin-Token": {c.admin}}, nil, &out)
	return out, err
}

// pooled returns how many guests are booted ahead.
func (c *client) pooled(ctx context.Context) (int, error) {
	var status struct {
		Node struct {
			PoolReady int `json:"poolReady"`
		} `json:"node"`
	}
	err := c.do(ctx, http.MethodGet, c.api+"/operator/v1/status", http.Header{"X-Admin-Token": {c.admin}}, nil, &status)
	return status.Node.PoolReady, err
}

// inside are the headers of a call to a sandbox's envd, by way of the proxy.
func inside(b box) http.Header {
	return http.Header{"E2b-Sandbox-Id": {b.ID}, "E2b-Sandbox-Port": {"49983"}, "X-Access-Token": {b.Token},
		"Connect-Protocol-Version": {"1"}}
}

// stat is the smallest call that does something.
func (c *client) stat(ctx context.Context, b box) error {
	return c.do(ctx, http.MethodPost, c.proxy+"/filesystem.Filesystem/Stat", inside(b), map[string]string{"path": "/etc/hostname"}, nil)
}

// command is what run saw.
type command struct {
	first time.Time // when the first output came
	out   []byte
	code  int
}

// run runs a command to its end.
func (c *client) run(ctx context.Context, b box, cmd string, args ...string) (command, error) {
	var got command
	body, err := json.Marshal(map[string]any{"process": map[string]any{"cmd": cmd, "args": args}})
	if err != nil {
		return got, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.proxy+"/process.Process/Start", bytes.NewReader(envelope(body)))
	if err != nil {
		return got, err
	}
	req.Header = inside(b)
	req.Header.Set("Content-Type", "application/connect+json")
	resp, err := c.http.Do(req)
	if err != nil {
		return got, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // the status says enough when this fails
		return got, fmt.Errorf("starting %s: %s: %s", cmd, resp.Status, bytes.TrimSpace(text))
	}
	return readCommand(resp.Body)
}

// event is a message of Process.Start's stream.
type event struct {
	Event struct {
		Data *struct {
			Stdout []byte `json:"stdout"`
		} `json:"data"`
		End *struct {
			ExitCode int    `json:"exitCode"`
			Exited   bool   `json:"exited"`
			Status   string `json:"status"`
		} `json:"end"`
	} `json:"event"`
}

// readCommand follows the stream of a command to its end.
func readCommand(rd io.Reader) (command, error) {
	var got command
	ended := false
	for {
		last, msg, err := readEnvelope(rd)
		if err != nil {
			return got, fmt.Errorf("reading what the command does: %w", err)
		}
		if last {
			var end struct {
				Error *struct{ Code, Message string } `json:"error"`
			}
			if err := json.Unmarshal(msg, &end); err != nil {
				return got, fmt.Errorf("reading the end of the stream: %w", err)
			}
			if end.Error != nil {
				return got, fmt.Errorf("the command failed: %s: %s", end.Error.Code, end.Error.Message)
			}
			if !ended {
				return got, errors.New("the stream ended before the command")
			}
			_, err := io.Copy(io.Discard, rd) // so that the connection is kept
			return got, err
		}
		var e event
		if err := json.Unmarshal(msg, &e); err != nil {
			return got, fmt.Errorf("reading an event of the command: %w", err)
		}
		if d := e.Event.Data; d != nil && len(d.Stdout) > 0 {
			if got.first.IsZero() {
				got.first = time.Now()
			}
			got.out = append(got.out, d.Stdout...)
		}
		if end := e.Event.End; end != nil {
			ended, got.code = true, end.ExitCode
			if !end.Exited {
				return got, fmt.Errorf("the command did not exit: %s", end.Status)
			}
		}
	}
}

// lastFlag marks the end of a stream of the Connect protocol.
const lastFlag = 2

// maxMessage bounds a message, against a broken length.
const maxMessage = 4 << 20

// envelope frames a message of a stream.
func envelope(msg []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg))), msg...)
}

func readEnvelope(rd io.Reader) (last bool, msg []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(rd, head[:]); err != nil {
		return false, nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > maxMessage {
		return false, nil, fmt.Errorf("a message of %d bytes", n)
	}
	msg = make([]byte, n)
	if _, err := io.ReadFull(rd, msg); err != nil {
		return false, nil, err
	}
	return head[0]&lastFlag != 0, msg, nil
}
