package edge

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/cayhq/cay/test/program"
)

// Everything that clients speak reaches a sandbox by each way: curl, server-sent
// events, WebSockets, gRPC, large bodies; also services on its localhost. So do
// the answers of the edge itself.
func TestWays(t *testing.T) {
	e := startEdge(t)
	e.box = e.inhabit(t, map[string]any{"network": map[string]any{"httpsPorts": []int{8443}}})
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			t.Run("curl", func(t *testing.T) { e.curl(t, w) })
			t.Run("events", func(t *testing.T) { e.events(t, w) })
			t.Run("websocket", func(t *testing.T) { e.websocket(t, w, 8080) })
			t.Run("websocket over TLS inside", func(t *testing.T) { e.websocket(t, w, 8443) })
			t.Run("bodies", func(t *testing.T) { e.bodies(t, w) })
			t.Run("gRPC", func(t *testing.T) { e.grpc(t, w) })
			t.Run("answers", func(t *testing.T) { e.answers(t, w) })
		})
	}
	t.Run("API", func(t *testing.T) { e.api(t) })
	t.Run("doctor", func(t *testing.T) {
		r := e.Run("doctor", "--json")
		var rep struct {
			Checks []struct{ ID, Verdict, Evidence string }
		}
		if err := json.Unmarshal([]byte(r.Stdout), &rep); err != nil {
			t.Fatalf("%v: %s", err, r)
		}
		for _, c := range rep.Checks {
			if c.ID == "network.certificate" && (c.Verdict != "warn" || !strings.Contains(c.Evidence, "does not trust")) || c.ID == "network.domain" && c.Verdict != "ok" {
				t.Errorf("%+v", c)
			}
		}
	})
	t.Run("wakes", func(t *testing.T) { e.wakes(t) })
}

// curl is run with what a user would give it.
func (e *edge) curl(t *testing.T, w way) {
	for _, c := range []struct {
		proto, flag string
		port        int
	}{{"1.1", "--http1.1", 8080}, {"2", "--http2", 8080}, {"2", "--http2-prior-knowledge", 8080}, {"1.1", "--http1.1", 8443}} {
		proto := c.proto
		if strings.HasPrefix(w.name, "plain") && c.flag == "--http2" {
			proto = "1.1" // the upgrade to h2c is not taken
		}
		args := []string{"-sS", c.flag, "--cacert", e.caFile, "-w", "\n%{http_version} %{http_code}", w.base(e, c.port) + "/hello"}
		for k, v := range w.head(e, c.port) {
			args = append(args, "-H", k+": "+v[0])
		}
		r := program.RunCmd(exec.CommandContext(t.Context(), "curl", args...))
		if !strings.HasPrefix(r.Stdout, "hello ") || !strings.HasSuffix(r.Stdout, "\n"+proto+" 200") || strings.Contains(r.Stdout, "tls=true") != (c.port == 8443) {
			t.Errorf("curl %s: %s", strings.Join(args, " "), r)
		}
	}
}

func (e *edge) request(t *testing.T, w way, port int, method, path string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, w.base(e, port)+path, body)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range w.head(e, port) {
		req.Header[k] = v
	}
	return req
}

func h1(p *http.Protocols) { p.SetHTTP1(true) }
func h2(p *http.Protocols) { p.SetHTTP2(true); p.SetUnencryptedHTTP2(true) }

func (e *edge) events(t *testing.T, w way) {
	for _, proto := range []func(*http.Protocols){h1, h2} {
		hc := e.http(proto)
		defer hc.CloseIdleConnections()
		res, err := hc.Do(e.request(t, w, 8080, "GET", "/sse", nil))
		if err != nil {
			t.Fatal(err)
		}
		sc := bufio.NewScanner(res.Body)
		for i := 0; i < 5; {
			if !sc.Scan() {
				t.Fatalf("%s: the stream ended at event %d: %v", res.Proto, i, sc.Err())
			}
			if sc.Text() == fmt.Sprintf("data: event %d", i) {
				i++
			}
		}
		res.Body.Close()
	}
}

func (e *edge) websocket(t *testing.T, w way, port int) {
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	hc := e.http(h1)
	defer hc.CloseIdleConnections()
	c, _, err := websocket.Dial(ctx, w.base(e, port)+"/ws", &websocket.DialOptions{HTTPClient: hc, HTTPHeader: w.head(e, port)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	c.SetReadLimit(-1)
	large := make([]byte, 1<<20)
	rand.Read(large)
	for i, msg := range [][]byte{[]byte("ping"), {}, large} {
		if err := c.Write(ctx, websocket.MessageBinary, msg); err != nil {
			t.Fatal(err)
		}
		if _, got, err := c.Read(ctx); err != nil || !bytes.Equal(got, append([]byte("echo "), msg...)) {
			t.Fatalf("message %d: %d bytes, %v", i, len(got), err)
		}
	}
	if err := c.Close(websocket.StatusNormalClosure, ""); err != nil {
		t.Error(err)
	}
}

func (e *edge) bodies(t *testing.T, w way) {
	body := make([]byte, 3<<20)
	rand.Read(body)
	for _, proto := range []func(*http.Protocols){h1, h2} {
		hc := e.http(proto)
		defer hc.CloseIdleConnections()
		for name, r := range map[string]io.Reader{"counted": bytes.NewReader(body), "chunked": io.MultiReader(bytes.NewReader(body))} {
			res, err := hc.Do(e.request(t, w, 8080, "POST", "/echo", r))
			if err != nil {
				t.Fatal(name, err)
			}
			got, err := io.ReadAll(res.Body)
			res.Body.Close()
			if err != nil || !bytes.Equal(got, body) {
				t.Errorf("%s by %s: %d bytes, %v", name, res.Proto, len(got), err)
			}
		}
	}
}

func (e *edge) grpc(t *testing.T, w way) {
	creds := insecure.NewCredentials()
	scheme, target, _ := strings.Cut(w.base(e, 9090), "://")
	if scheme == "https" {
		creds = credentials.NewClientTLSFromCert(e.roots, "")
		target += ":443"
	}
	conn, err := grpc.NewClient("dns:///"+target, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	for k, v := range w.head(e, 9090) {
		ctx = metadata.AppendToOutgoingContext(ctx, k, v[0])
	}
	c := pb.NewTestServiceClient(conn)

	payload := &pb.Payload{Body: bytes.Repeat([]byte("x"), 100_000)}
	var trailer metadata.MD
	got, err := c.UnaryCall(metadata.AppendToOutgoingContext(ctx, "x-asked", "yes"), &pb.SimpleRequest{Payload: payload}, grpc.Trailer(&trailer))
	if err != nil || !bytes.Equal(got.GetPayload().GetBody(), payload.GetBody()) || fmt.Sprint(trailer.Get("x-seen")) != "[[yes]]" {
		t.Fatalf("unary: %v, trailer %v", err, trailer)
	}
	_, err = c.UnaryCall(ctx, &pb.SimpleRequest{ResponseStatus: &pb.EchoStatus{Code: int32(codes.DataLoss), Message: "lost"}})
	if status.Code(err) != codes.DataLoss || status.Convert(err).Message() != "lost" {
		t.Errorf("a status without a message: %v", err)
	}

	s, err := c.FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		msg := fmt.Sprint("message ", i)
		if err := s.Send(&pb.StreamingOutputCallRequest{Payload: &pb.Payload{Body: []byte(msg)}}); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Recv(); err != nil || string(got.GetPayload().GetBody()) != msg {
			t.Fatalf("%s: %v, %v", msg, got, err)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != io.EOF || fmt.Sprint(s.Trailer().Get("x-count")) != "[20]" {
		t.Errorf("the end of a stream: %v, trailer %v", err, s.Trailer())
	}
}

// api makes a sandbox and ends it over HTTPS.
func (e *edge) api(t *testing.T) {
	c := &program.Client{API: "https://api." + domain, Proxy: "https://sandbox." + domain, Key: e.Key, HTTP: e.http(h2)}
	defer c.Vanish()
	box := c.Make(t, time.Minute, nil)
	if got := box.Out(t, "echo over $((40+2))"); got != "over 42\n" {
		t.Errorf("%q", got)
	}
	var told struct{ Domain string }
	if err := c.Call(t.Context(), "GET", "/sandboxes/"+box.ID, nil, &told); err != nil || told.Domain != domain {
		t.Errorf("the domain is told as %q, %v", told.Domain, err)
	}
	req, err := http.NewRequestWithContext(t.Context(), "GET", e.Proxy+"/health", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = "api." + domain
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 400 {
		t.Errorf("the API answers on the sandboxes' plain port: %d", res.StatusCode)
	}
}

// wakes pauses the sandbox and has requests of every kind wake it.
func (e *edge) wakes(t *testing.T) {
	box := e.client.Make(t, 10*time.Minute, map[string]any{"autoResume": map[string]any{"enabled": true}, "autoPause": true})
	if _, err := box.Start(t.Context(), "", "exec python3 -m http.server 8000"); err != nil {
		t.Fatal(err)
	}
	hc := e.http(h2)
	defer hc.CloseIdleConnections()
	at := *e
	at.box = box
	for _, w := range ways {
		get := func() string {
			res, err := hc.Do(at.request(t, w, 8000, "GET", "/", nil))
			if err != nil {
				return err.Error()
			}
			defer res.Body.Close()
			b, _ := io.ReadAll(res.Body) // what came is shown
			if res.StatusCode != 200 {
				return fmt.Sprint(res.StatusCode, " ", string(b))
			}
			return ""
		}
		program.Eventually(t, patience, get)
		if err := e.client.Call(t.Context(), "POST", "/sandboxes/"+box.ID+"/pause", nil, nil); err != nil {
			t.Fatal(err)
		}
		if said := get(); said != "" {
			t.Errorf("a paused sandbox, %s: %s", w.name, said)
		}
	}
}

// answers are what the edge says itself: JSON to programs, a page to people.
func (e *edge) answers(t *testing.T, w way) {
	nobody := *e
	nobody.box = &program.Sandbox{ID: "i" + strings.Repeat("0", 20)}
	for _, c := range []struct {
		of         *edge
		port       int
		path       string
		status     int
		json, page string
	}{
		{e, 8099, "/", 502, `{"sandboxId":"` + e.box.ID + `","message":"The sandbox is running but port is not open","port":8099,"code":502}`, "no service running on port 8099"},
		{&nobody, 8080, "/", 502, `{"sandboxId":"` + nobody.box.ID + `","message":"The sandbox was not found","code":502}`, "Sandbox Not Found"},
		{e, program.EnvdPort, "/init", 404, `{"message":"This path is reserved for the E2B control plane","path":"/init","code":404}`, "Reserved Path"},
		{e, 0, "/", 400, "", ""},
		{e, 65536, "/", 400, "", ""},
	} {
		for _, person := range []bool{false, true} {
			hc := e.http(h1)
			req := c.of.request(t, w, c.port, "GET", c.path, nil)
			if person {
				hc = e.http(h2)
				req.Header.Set("User-Agent", "Mozilla/5.0")
				req.Header.Set("Accept", "text/html,*/*")
			}
			res, err := hc.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(res.Body)
			res.Body.Close()
			hc.CloseIdleConnections()
			got := strings.TrimSpace(string(b))
			kind, good := "application/json; charset=utf-8", got == c.json
			switch {
			case c.json == "":
				kind, good = "text/plain; charset=utf-8", got != ""
			case person:
				kind, good = "text/html; charset=utf-8", strings.Contains(got, c.page)
			}
			if err != nil || res.StatusCode != c.status || !good || res.Header.Get("Content-Type") != kind {
				t.Errorf("%s, port %d, by %s, a person: %v: %d %s, %q, %v", c.path, c.port, res.Proto, person, res.StatusCode, res.Header.Get("Content-Type"), got, err)
			}
		}
	}
}
