package proxy

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/cayhq/cay"
)

// forward takes an admitted request to its sandbox and the answer back. With
// again, it reports true when there is no answer because the sandbox went away.
func (s *Server) forward(w http.ResponseWriter, r *http.Request, t target, c *connections, in cay.Ingress, again bool) (gone bool) {
	body := &clientBody{ReadCloser: r.Body}
	if r.ProtoMajor == 1 && r.TLS == nil {
		body.conn = guardedOf(r)
	}
	out := s.outgoing(r, t, c, in)
	if r.ContentLength != 0 {
		if r.ProtoMajor == 1 {
			// Else the server would read the whole body before it sends the
			// answer's header, and a two-way stream would hang.
			_ = http.NewResponseController(w).EnableFullDuplex()
		}
		out.Body = body
	}
	a, err := s.up.do(out, c, t, interimTo(w))
	switch {
	case err == nil:
	case body.broken.Load():
		badRequest(w, r, "the request's body is malformed or ended early")
		return false
	case again && s.up.dead(c) && r.Context().Err() == nil:
		return true
	default:
		s.failed(w, r, t, c, err)
		return false
	}
	if a.StatusCode == http.StatusSwitchingProtocols {
		s.tunnel(w, r, t, c, out, a)
		return false
	}
	whole := false
	defer func() { a.end(whole) }()
	if err := answerTo(w, r, a); err != nil {
		s.log.Debug("an answer broke off", "sandbox", t.sandbox, "port", t.port, "error", err)
		panic(http.ErrAbortHandler) // the client must not take it for complete
	}
	if a.wire != nil && a.keep == nil && a.ContentLength >= 0 && r.ProtoMajor == 1 {
		// Before the connection is closed, for that has the guest work as well.
		// HTTP/2 would have to say the end once more.
		a.told = http.NewResponseController(w).Flush() == nil
	}
	whole = true
	return false
}

// clientBody notes that the client's body is at fault, so that the sandbox is
// not blamed. It may be read after the answer has come.
type clientBody struct {
	io.ReadCloser
	conn   *guarded // whose bytes these are; nil if they are in another form there
	broken atomic.Bool
}

func (b *clientBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF && !errors.Is(err, http.ErrBodyReadAfterClose) {
		b.broken.Store(true)
	}
	return n, err
}

// hopByHop are the headers between two neighbours (RFC 9110, section 7.6.1),
// which Connection may name more of.
var hopByHop = []string{"Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization",
	"Te", "Trailer", "Transfer-Encoding", "Upgrade"}

// ours are headers that end here: what names and opens the target, and what
// others on the way would have set.
var ours = []string{headerTraffic, headerSandbox, headerPort, "Http2-Settings", "Expect",
	"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"}

// dropHopByHop takes the headers between two neighbours off.
func dropHopByHop(h http.Header) {
	for _, v := range h["Connection"] {
		for name := range strings.SplitSeq(v, ",") {
			if name = textproto.TrimString(name); name != "" {
				h.Del(name)
			}
		}
	}
	for _, name := range hopByHop {
		delete(h, name)
	}
}

// outgoing makes the request the sandbox sees: the client's own, with its Host,
// path and query as they came, without what is only between client and proxy.
func (s *Server) outgoing(r *http.Request, t target, c *connections, in cay.Ingress) *http.Request {
	out := &http.Request{Method: r.Method, Host: r.Host, ContentLength: r.ContentLength,
		Proto: r.Proto, ProtoMajor: r.ProtoMajor, ProtoMinor: r.ProtoMinor,
		Trailer: r.Trailer, // filled while the body is read, so the very map
		Header:  make(http.Header, len(r.Header)),
		URL: &url.URL{Scheme: "http", Host: c.hostport(t.port),
			Path: r.URL.Path, RawPath: r.URL.RawPath, RawQuery: r.URL.RawQuery, ForceQuery: r.URL.ForceQuery}}
	h := out.Header
	for k, v := range r.Header {
		if !strings.HasPrefix(k, "X-Cay-") {
			h[k] = v
		}
	}
	protocol := upgradeOf(h)
	trailers := hasToken(h["Te"], "trailers")
	dropHopByHop(h)
	for _, name := range ours {
		delete(h, name)
	}
	if trailers {
		h["Te"] = []string{"trailers"}
	}
	ctx := r.Context()
	if t.port == envdPort {
		// envd judges the expiry of signed URLs by this, not by a clock that
		// root in the guest can set. It needs no upgrades, behind which no path
		// would be looked at.
		h["X-Cay-Time"] = []string{strconv.FormatInt(s.now().UnixMilli(), 10)}
		return out.WithContext(ctx)
	}
	// Nor is h2c taken, which would carry more requests: it is spoken with
	// prior knowledge only.
	if protocol != "" && r.ContentLength == 0 && !strings.Contains(strings.ToLower(protocol), "h2c") {
		h["Connection"], h["Upgrade"] = []string{"Upgrade"}, []string{protocol}
	} else {
		out.Close = true // one connection for each request (contract, section 4)
	}
	if in.TLS(t.port) {
		out.URL.Scheme = "https"
		ctx = context.WithValue(ctx, serverName{}, sni(r.Host, in, t.port))
	}
	if host, masked := in.Host(t.port); masked {
		out.Host = host
		h["X-Forwarded-Host"] = []string{r.Host}
	}
	return out.WithContext(ctx)
}

// sni returns the name that a service with TLS is asked for: that of the Host it
// will see. An address is none.
func sni(host string, in cay.Ingress, port uint16) string {
	if h, masked := in.Host(port); masked {
		host = h
	}
	name, err := hostname(host)
	if err != nil {
		return ""
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return ""
	}
	return name
}

// upgradeOf returns the protocol that a header asks to switch to.
func upgradeOf(h http.Header) string {
	if !hasToken(h["Connection"], "upgrade") {
		return ""
	}
	return h.Get("Upgrade")
}

// hasToken reports whether a list of values has a token, in any case.
func hasToken(values []string, token string) bool {
	for _, v := range values {
		for t := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(textproto.TrimString(t), token) {
				return true
			}
		}
	}
	return false
}

// interimTo passes what comes before an answer on to the client.
func interimTo(w http.ResponseWriter) func(code int, h http.Header) {
	return func(code int, h http.Header) {
		if code == http.StatusContinue {
			return // the server sends its own when the body is read
		}
		dropHopByHop(h)
		to := w.Header()
		for k, v := range h {
			to[k] = v
		}
		w.WriteHeader(code)
		clear(to)
	}
}

// interimOf has an HTTP/2 transport tell what comes before an answer.
func interimOf(req *http.Request, interim func(code int, h http.Header)) *http.Request {
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
		interim(code, http.Header(h))
		return nil
	}}
	return req.WithContext(httptrace.WithClientTrace(req.Context(), trace))
}

// answerTo copies an answer to the client. An error means that it is cut short.
func answerTo(w http.ResponseWriter, r *http.Request, a *reply) error {
	dropHopByHop(a.Header)
	to := w.Header()
	for k, v := range a.Header {
		to[k] = v
	}
	announced := len(a.Trailer)
	if announced > 0 {
		names := make([]string, 0, announced)
		for k := range a.Trailer {
			names = append(names, k)
		}
		to["Trailer"] = []string{strings.Join(names, ", ")}
	}
	w.WriteHeader(a.StatusCode)
	// An answer that ends with its header is to end so for the client, too:
	// gRPC has its status there.
	if a.ContentLength != 0 && a.Body != http.NoBody && r.Method != http.MethodHead {
		if err := copyAnswer(w, a); err != nil {
			return err
		}
	}
	if len(a.Trailer) == 0 {
		return nil
	}
	// Force chunking if nothing was written, so that the trailer has a place.
	if err := http.NewResponseController(w).Flush(); err != nil {
		return err
	}
	for k, v := range a.Trailer {
		if announced != len(a.Trailer) {
			k = http.TrailerPrefix + k
		}
		to[k] = v
	}
	return nil
}

// copyAnswer copies the body of an answer. What has come is sent at once, with
// what follows if that is there already: streams must not wait.
func copyAnswer(w http.ResponseWriter, a *reply) error {
	flush := http.NewResponseController(w).Flush
	var b buffer
	defer b.free()
	left := a.ContentLength // -1: until the end
	held := true            // something was given to w and not sent: at first, the header
	for {
		if held && (a.wire == nil || a.wire.in.Buffered() == 0) {
			if err := flush(); err != nil {
				return err
			}
			held = false
		}
		if from := a.rest(left); from != nil {
			if to, ok := w.(io.ReaderFrom); ok { // HTTP/1.1
				_, err := to.ReadFrom(from)
				if err == nil && from.N > 0 {
					err = io.ErrUnexpectedEOF
				}
				return err
			}
		}
		if a.wire != nil && b.size == smallest && a.wire.in.Buffered() == 0 {
			// More is to come, or the end. A stream that brings little holds no
			// buffer of ours while it waits for that.
			b.free()
			_, _ = a.wire.in.Peek(1) // the error comes again with Read
		}
		p := b.bytes()
		n, err := a.Body.Read(p)
		if n > 0 {
			if _, err := w.Write(p[:n]); err != nil {
				return err
			}
			held = true
			left -= int64(n)
		}
		b.grow(n)
		if err == io.EOF || err == nil && left == 0 {
			return nil // the server sends the rest
		}
		if err != nil {
			return err
		}
	}
}
