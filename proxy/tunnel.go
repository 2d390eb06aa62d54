package proxy

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
)

// tunnel answers a request whose sandbox has switched protocols, and carries
// bytes both ways until one side is done. It returns at once: a stream that is
// open for hours shall not hold what a request needs.
func (s *Server) tunnel(w http.ResponseWriter, r *http.Request, t target, c *connections, out *http.Request, a *reply) {
	asked, got := upgradeOf(out.Header), upgradeOf(a.Header)
	if asked == "" || !strings.EqualFold(asked, got) {
		a.end(false)
		noAnswer(t).write(w, r)
		return
	}
	client, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		a.end(false)
		noAnswer(t).write(w, r) // HTTP/2 has no upgrades
		return
	}
	_ = a.stop() // the server no longer watches the client; what we read does
	dropHopByHop(a.Header)
	a.Header["Connection"], a.Header["Upgrade"] = []string{"Upgrade"}, []string{got}
	head := &http.Response{StatusCode: a.StatusCode, ProtoMajor: 1, ProtoMinor: 1, Header: a.Header}
	err = head.Write(buf)
	if err == nil {
		err = buf.Flush()
	}
	rest := take(buf.Reader)
	first := take(a.wire.in)
	if err == nil && len(rest) > 0 {
		_, err = a.wire.conn.Write(rest)
	}
	if err == nil && len(first) > 0 {
		_, err = client.Write(first)
	}
	if err != nil {
		_ = client.Close()
		a.wire.close()
		return
	}
	release := s.hold(r, c)
	guest := a.wire.conn
	a.wire.in.Reset(nil)
	readers.Put(a.wire.in)
	go carry(client, guest, release)
}

// take returns what a reader has read ahead.
func take(r *bufio.Reader) []byte {
	p, _ := r.Peek(r.Buffered()) // what is buffered can be had
	return append([]byte(nil), p...)
}

// carry copies both ways, ends each direction when its reader does, and closes
// both connections when one breaks or both have ended.
func carry(client, guest net.Conn, done func()) {
	defer done()
	var once sync.Once
	end := func() {
		_ = client.Close()
		_ = guest.Close()
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if !pour(client, guest) {
			once.Do(end)
		}
	})
	if !pour(guest, client) {
		once.Do(end)
	}
	wg.Wait()
	once.Do(end)
}

// pour copies from one connection to another and passes the end on. It reports
// whether that was an orderly one.
func pour(to, from net.Conn) bool {
	var b buffer
	defer b.free()
	for {
		p := b.bytes()
		n, err := from.Read(p)
		if n > 0 {
			if _, err := to.Write(p[:n]); err != nil {
				return false
			}
		}
		b.grow(n)
		if err == nil {
			continue
		}
		half, ok := to.(interface{ CloseWrite() error })
		return err == io.EOF && ok && half.CloseWrite() == nil
	}
}
