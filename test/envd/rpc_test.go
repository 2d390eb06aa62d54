package envd

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	fs "github.com/cayhq/cay/internal/gen/envd/filesystem"
	"github.com/cayhq/cay/internal/gen/envd/filesystem/filesystemconnect"
	pb "github.com/cayhq/cay/internal/gen/envd/process"
	"github.com/cayhq/cay/internal/gen/envd/process/processconnect"
	"github.com/cayhq/cay/test/program"
)

// box is a sandbox with the clients that the services' descriptions give, in
// JSON as the SDKs speak it.
type box struct {
	*program.Sandbox
	proxy string
	http  *http.Client
	proc  processconnect.ProcessClient
	files filesystemconnect.FilesystemClient
}

// routed adds what names the sandbox, and its token, to every request.
type routed struct {
	http.RoundTripper
	id, token string
}

func (r routed) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	for k, v := range map[string]string{"E2b-Sandbox-Id": r.id, "E2b-Sandbox-Port": strconv.Itoa(program.EnvdPort), "X-Access-Token": r.token} {
		if req.Header.Get(k) == "" {
			req.Header.Set(k, v)
		}
	}
	return r.RoundTripper.RoundTrip(req)
}

func newBox(t *testing.T, server *program.Server, life time.Duration) *box {
	t.Helper()
	s := server.Client().Make(t, life, nil)
	tr := &http.Transport{MaxIdleConnsPerHost: 64, DialContext: (&net.Dialer{Timeout: 10 * time.Second}).DialContext}
	t.Cleanup(tr.CloseIdleConnections)
	b := &box{Sandbox: s, proxy: server.Proxy, http: &http.Client{Transport: routed{tr, s.ID, s.Token}}}
	b.proc = processconnect.NewProcessClient(b.http, server.Proxy, connect.WithProtoJSON())
	b.files = filesystemconnect.NewFilesystemClient(b.http, server.Proxy, connect.WithProtoJSON())
	return b
}

// as makes a request one of an account.
func as[T any](user string, msg *T) *connect.Request[T] {
	req := connect.NewRequest(msg)
	if user != "" {
		req.Header().Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user+":")))
	}
	return req
}

// root runs a script that must succeed as root, and returns what it printed.
func (b *box) root(t testing.TB, script string) string {
	t.Helper()
	r, err := b.Exec(t.Context(), "root", script)
	if err != nil || r.Code != 0 {
		t.Fatalf("as root: %s: %v, %s", script, err, r)
	}
	return r.Stdout
}

// envdMemory is what the kernel of the guest counts for the daemon, in MiB.
func (b *box) envdMemory(t testing.TB) float64 {
	t.Helper()
	text := b.root(t, `awk '/^VmRSS/ {print $2}' /proc/$(pgrep -x envd)/status`)
	kb, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		t.Fatal(err)
	}
	return float64(kb) / 1024
}

func pid(n int) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: uint32(n)}}
}

// start starts a program and reads its first message.
func (b *box) start(ctx context.Context, user string, req *pb.StartRequest) (*connect.ServerStreamForClient[pb.StartResponse], int, error) {
	st, err := b.proc.Start(ctx, as(user, req))
	if err != nil {
		return nil, 0, err
	}
	if !st.Receive() {
		st.Close()
		return nil, 0, errors.Join(st.Err(), errors.New("the stream has no start"))
	}
	return st, int(st.Msg().GetEvent().GetStart().GetPid()), nil
}

// shell is a command as the SDKs run it.
func shell(script string) *pb.StartRequest {
	no := false
	return &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-l", "-c", script}}, Stdin: &no}
}

// ended is how a stream of a process must end.
func ended(st *connect.ServerStreamForClient[pb.StartResponse], each func([]byte)) (*pb.ProcessEvent_EndEvent, error) {
	defer st.Close()
	var end *pb.ProcessEvent_EndEvent
	for st.Receive() {
		ev := st.Msg().GetEvent()
		switch {
		case end != nil:
			return end, fmt.Errorf("after the end came %v", ev)
		case ev.GetEnd() != nil:
			end = ev.GetEnd()
		case each != nil && ev.GetData() != nil:
			each(append(append(ev.GetData().GetStdout(), ev.GetData().GetStderr()...), ev.GetData().GetPty()...))
		}
	}
	if st.Err() == nil && end == nil {
		return nil, errors.New("the stream has no end")
	}
	return end, st.Err()
}

func (b *box) remove(ctx context.Context, user, path string) error {
	_, err := b.files.Remove(ctx, as(user, &fs.RemoveRequest{Path: path}))
	return err
}
