package egress

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxSniff bounds what is held of a connection before its name is known. A
// ClientHello with a post-quantum key and a session ticket takes 2 KiB.
const maxSniff = 32 << 10

// sniffed is what a client said of the name it means.
type sniffed struct {
	name string // canonical; empty when there is none
	why  string // there is none: a clause for people
	head []byte // everything that was read
}

var errEnough = errors.New("enough has been read")

// readHello reads a TLS ClientHello. It neither answers nor ends the
// connection.
func readHello(conn net.Conn) sniffed {
	rec := &recorder{Conn: conn}
	var info *tls.ClientHelloInfo
	err := tls.Server(rec, &tls.Config{
		SessionTicketsDisabled: true,
		GetConfigForClient: func(chi *tls.ClientHelloInfo) (*tls.Config, error) {
			info = chi
			return nil, errEnough
		},
	}).HandshakeContext(context.Background()) // ends at GetConfigForClient, or at the deadline of conn
	s := sniffed{head: rec.buf.Bytes()}
	switch {
	case info == nil:
		s.why = whyUnread(err, rec, "is not TLS: no ClientHello could be read")
	case slices.Contains(info.Extensions, extensionECH):
		s.why = "hides its name in an encrypted ClientHello"
	case info.ServerName == "":
		s.why = "says no name: the ClientHello has no SNI"
	default:
		var ok bool
		if s.name, ok = canonical(info.ServerName); !ok {
			s.why = "says an SNI that is no DNS name"
		}
	}
	return s
}

// extensionECH is encrypted_client_hello (RFC 9849).
const extensionECH = 0xfe0d

// readHead reads the header of an HTTP/1 request. It neither answers nor ends
// the connection.
func readHead(conn net.Conn) sniffed {
	rec := &recorder{Conn: conn}
	r, err := http.ReadRequest(bufio.NewReaderSize(rec, 4<<10))
	s := sniffed{head: rec.buf.Bytes()}
	switch {
	case err != nil:
		s.why = whyUnread(err, rec, "is not HTTP/1: no request header could be read")
	case r.Method == "PRI":
		s.why = "is HTTP/2 without TLS, in which no name can be read"
	default:
		s.name, s.why = requestName(r)
	}
	return s
}

// requestName returns the name a request is for, or why it has none. The port
// of Host does not count.
func requestName(r *http.Request) (name, why string) {
	if r.Method == http.MethodConnect {
		return "", "is a CONNECT, which is for proxies"
	}
	host := r.Host // that of an absolute URI, if there is one; it replaces the header, also on the way out
	if h, port, ok := strings.Cut(host, ":"); ok {
		if strings.ContainsFunc(port, func(c rune) bool { return c < '0' || c > '9' }) {
			return "", "has a malformed Host"
		}
		host = h
	}
	if host == "" {
		return "", "says no name: it has no Host"
	}
	name, ok := canonical(host)
	if !ok {
		return "", "has a Host that is no DNS name"
	}
	return name, ""
}

func whyUnread(err error, rec *recorder, otherwise string) string {
	var ne net.Error
	switch {
	case rec.full:
		return "says no name in its first 32 KiB"
	case errors.As(err, &ne) && ne.Timeout():
		return "said no name in time"
	case rec.buf.Len() == 0:
		return "was closed before it said a name"
	}
	return otherwise
}

// recorder keeps what is read through it, up to maxSniff, and writes nothing.
type recorder struct {
	net.Conn
	buf  bytes.Buffer
	full bool
}

func (r *recorder) Read(p []byte) (int, error) {
	room := maxSniff - r.buf.Len()
	if room <= 0 {
		r.full = true
		return 0, io.ErrUnexpectedEOF
	}
	n, err := r.Conn.Read(p[:min(len(p), room)])
	r.buf.Write(p[:n])
	return n, err
}

func (r *recorder) Write(p []byte) (int, error) { return len(p), nil }

// Close, and the deadlines, belong to who owns the connection.
func (r *recorder) Close() error                     { return nil }
func (r *recorder) SetDeadline(time.Time) error      { return nil }
func (r *recorder) SetReadDeadline(time.Time) error  { return nil }
func (r *recorder) SetWriteDeadline(time.Time) error { return nil }

// replay is a connection of which the first bytes have been read already.
type replay struct {
	net.Conn
	head   []byte
	closed chan struct{} // when Close is called
	once   sync.Once
}

func (c *replay) Read(p []byte) (int, error) {
	if len(c.head) > 0 {
		n := copy(p, c.head)
		if c.head = c.head[n:]; len(c.head) == 0 {
			c.head = nil
		}
		return n, nil
	}
	return c.Conn.Read(p)
}

// Close closes the connection and tells who waits for it.
func (c *replay) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { close(c.closed) })
	return err
}

// CloseWrite passes the end of one direction on.
func (c *replay) CloseWrite() error { return closeWrite(c.Conn) }
