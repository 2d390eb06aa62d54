package certificate

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Files reads a certificate and its key from two PEM files, and again when one
// of them has changed. A pair that does not fit, as between the two writes of
// who renews it, leaves the old one in force.
type Files struct {
	Cert, Key string // paths; Cert has the chain, leaf first
	Domain    string
	Now       func() time.Time
	Log       *slog.Logger

	mu    sync.Mutex
	pair  *tls.Certificate
	seen  [2]stamp
	asked time.Time
}

// lookEvery is how often the files are looked at.
const lookEvery = time.Second

// stamp tells one state of a file from another.
type stamp struct {
	size int64
	time time.Time
	file os.FileInfo
}

func (s stamp) is(o stamp) bool {
	return s.size == o.size && s.time.Equal(o.time) && (s.file == nil) == (o.file == nil) && (s.file == nil || os.SameFile(s.file, o.file))
}

// Open implements [Source].
func (f *Files) Open(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen, f.asked = f.stamps(), f.Now()
	pair, err := f.load()
	if err != nil {
		return invalid(err, "give --cert-file the certificate with its chain and --key-file its key, both in PEM, readable by root",
			"the certificate cannot be used: %v", err)
	}
	f.pair = pair
	if _, err := Covers(pair, f.Domain, f.Now()); err != nil {
		f.Log.Warn("clients will not accept the certificate", "file", f.Cert, "error", err)
	}
	return nil
}

func (f *Files) stamps() (out [2]stamp) {
	for i, path := range []string{f.Cert, f.Key} {
		if st, err := os.Stat(path); err == nil {
			out[i] = stamp{st.Size(), st.ModTime(), st}
		}
	}
	return out
}

func (f *Files) load() (*tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		return nil, fmt.Errorf("reading %s and %s: %w", f.Cert, f.Key, err)
	}
	return &pair, nil
}

// Certificate implements [Source].
func (f *Files) Certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := f.Now(); now.Sub(f.asked) >= lookEvery || now.Before(f.asked) {
		f.asked = now
		f.refresh()
	}
	return f.pair, nil
}

func (f *Files) refresh() {
	seen := f.stamps()
	if seen[0].is(f.seen[0]) && seen[1].is(f.seen[1]) {
		return
	}
	f.seen = seen
	pair, err := f.load()
	if err != nil {
		f.Log.Warn("the certificate has changed and cannot be used; the old one stays", "error", err)
		return
	}
	f.pair = pair
	f.Log.Info("the certificate was read again", "file", f.Cert)
}

// Close implements [Source].
func (f *Files) Close() error { return nil }
