package gvisor

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"testing"
)

// Whoever only asks may ask the next supervisor; an order that one took before
// it ended may have been carried out.
func TestNotTaken(t *testing.T) {
	gone := filepath.Join(t.TempDir(), "gone")
	for name, dying := range map[string]func(net.Conn){
		"before it read": func(net.Conn) {},                                        // ECONNRESET
		"after it read":  func(c net.Conn) { _, _ = c.Read(make([]byte, 64<<10)) }, // EOF
	} {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					dying(c)
					c.Close()
				}
			}()
			socket := ln.Addr().String()
			r := &Runtime{http: &http.Client{Transport: &http.Transport{
				DisableKeepAlives: true, // or net/http itself tries once more
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, "unix", socket)
				},
			}}}
			if err := r.do(t.Context(), http.MethodGet, "/", nil, nil); !errors.Is(err, errOffline) {
				t.Errorf("a question: %v", err)
			}
			if err := r.do(t.Context(), http.MethodPost, "/", []byte("{}"), nil); err == nil || errors.Is(err, errOffline) {
				t.Errorf("an order: %v", err)
			}
			socket = gone
			if err := r.do(t.Context(), http.MethodPost, "/", []byte("{}"), nil); !errors.Is(err, errOffline) {
				t.Errorf("an order that nobody took: %v", err)
			}
		})
	}
}
