package edge

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// page is what a browser loads. Its title tells how far it has come.
const page = `<!doctype html><title>loading</title><body><script>
const got = {};
const done = k => v => { got[k] = v; if (got.sse && got.ws && got.post) document.title = "done " + JSON.stringify(got) };
const es = new EventSource("/sse"); es.onmessage = e => { if (e.data == "event 2") { es.close(); done("sse")(e.data) } };
const ws = new WebSocket(location.origin.replace("http", "ws") + "/ws"); ws.onopen = () => ws.send("ping"); ws.onmessage = e => done("ws")(e.data);
fetch("/echo", {method: "POST", body: "body"}).then(r => r.text()).then(done("post"));
</script></body>`

// services are those on the guest's ports: 8080 on its localhost alone.
func services() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/hello", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello %s %q tls=%v", r.Host, r.Header["X-Forwarded-Host"], r.TLS != nil)
	})
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, page)
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	mux.HandleFunc("/sse", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		every, err := time.ParseDuration(r.FormValue("every"))
		if err != nil {
			every = 20 * time.Millisecond
		}
		for i := 0; ; i++ {
			fmt.Fprintf(w, "data: event %d\n\n", i)
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
				return
			case <-time.After(every):
			}
		}
	})
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
		if err != nil {
			return
		}
		defer c.CloseNow()
		c.SetReadLimit(-1)
		for {
			kind, b, err := c.Read(r.Context())
			if err != nil {
				return
			}
			if err := c.Write(r.Context(), kind, append([]byte("echo "), b...)); err != nil {
				return
			}
		}
	})
	return mux
}

// serveGuest serves until one of the services fails.
func serveGuest() error {
	failed := make(chan error, 3)
	go func() { failed <- http.ListenAndServe("127.0.0.1:8080", services()) }()
	go func() { failed <- serveTLS(services()) }()
	go func() {
		l, err := net.Listen("tcp", ":9090")
		if err != nil {
			failed <- err
			return
		}
		s := grpc.NewServer()
		pb.RegisterTestServiceServer(s, testService{})
		failed <- s.Serve(l)
	}()
	return <-failed
}

// serveTLS serves with a certificate that nobody trusts.
func serveTLS(h http.Handler) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return err
	}
	s := &http.Server{Addr: ":8443", Handler: h, TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}}
	return s.ListenAndServeTLS("", "")
}

// testService is gRPC's own service for trials between implementations, as far
// as the tests use it.
type testService struct {
	pb.UnimplementedTestServiceServer
}

// UnaryCall answers with the payload, and with metadata in the trailer.
func (testService) UnaryCall(ctx context.Context, r *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	if s := r.GetResponseStatus(); s.GetCode() != 0 {
		return nil, status.Error(codes.Code(s.GetCode()), s.GetMessage())
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if err := grpc.SetTrailer(ctx, metadata.Pairs("x-seen", fmt.Sprint(md.Get("x-asked")))); err != nil {
		return nil, err
	}
	return &pb.SimpleResponse{Payload: r.GetPayload()}, nil
}

// FullDuplexCall answers each message before it reads the next.
func (testService) FullDuplexCall(s pb.TestService_FullDuplexCallServer) error {
	for n := 0; ; n++ {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			s.SetTrailer(metadata.Pairs("x-count", fmt.Sprint(n)))
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.Send(&pb.StreamingOutputCallResponse{Payload: r.GetPayload()}); err != nil {
			return err
		}
	}
}
