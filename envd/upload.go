package envd

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
)

const (
	// copyBuffer is what one transfer holds in memory, beside the buffers of
	// HTTP, unless it is long and gets one of largeBuffers.
	copyBuffer = 128 << 10
	// lingerTime is how long a refused body is still read.
	lingerTime = 10 * time.Second
	// maxNames bounds the paths of one upload together, in bytes.
	maxNames = 8 << 20
)

var (
	copyBuffers = sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }}
	bodyReaders = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, copyBuffer/2) }}
)

// lendable are buffers of one size, of which few are in use at a time.
type lendable struct {
	size  int
	inUse chan struct{}
	pool  sync.Pool // of *[]byte
}

// largeBuffers are for the first long transfers at a time: in a guest it is the
// number of system calls that costs, and of threads that they wake.
var largeBuffers = [...]*lendable{
	{size: 1 << 20, inUse: make(chan struct{}, 2)},
	{size: 256 << 10, inUse: make(chan struct{}, 4)},
}

// lendBuffer lends a buffer for a transfer, until giveBack is called. For a long
// one it is as large as there is.
func lendBuffer(long bool) (buf []byte, giveBack func()) {
	for _, l := range largeBuffers {
		if !long {
			break
		}
		select {
		case l.inUse <- struct{}{}:
			b, ok := l.pool.Get().(*[]byte)
			if !ok {
				made := make([]byte, l.size)
				b = &made
			}
			return *b, func() { l.pool.Put(b); <-l.inUse }
		default:
		}
	}
	b := copyBuffers.Get().(*[]byte)
	return *b, func() { copyBuffers.Put(b) }
}

// uploaded is how the answer names a written file.
type uploaded struct {
	Name     string            `json:"name"`
	Path     string            `json:"path"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// fileUser is the account of a /files request: the one of the query, which a
// signature covers, or the default one.
func (s *Server) fileUser(q url.Values) (*user, error) {
	name := q.Get("username")
	if name == "" {
		name = s.settings().user
	}
	return s.users.lookup(name)
}

func (s *Server) upload(w http.ResponseWriter, r *http.Request) {
	files, err := s.receive(w, r)
	// Whoever watches sees the files once the client knows of them.
	s.watchers.settle()
	if err != nil {
		refuse(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, files)
}

// refuse answers with an error and then reads on for a while. Most clients
// send everything before they look for an answer, and closing a connection on
// data that nobody read destroys the answer on its way.
func refuse(w http.ResponseWriter, r *http.Request, err error) {
	rc := http.NewResponseController(w)
	if r.ProtoMajor == 1 {
		rc.EnableFullDuplex() // or the answer would wait for the body
	}
	writeFault(w, err)
	if r.ProtoMajor == 1 && rc.Flush() == nil && rc.SetReadDeadline(time.Now().Add(lingerTime)) == nil {
		copyOut(io.Discard, r.Body, -1, false)
		rc.SetReadDeadline(time.Time{})
	}
}

// receive writes the files of a request.
func (s *Server) receive(w http.ResponseWriter, r *http.Request) ([]uploaded, error) {
	signed, err := s.authorizeFile(r, opWrite)
	if err != nil {
		return nil, err
	}
	q := r.URL.Query()
	u, err := s.fileUser(q)
	if err != nil {
		return nil, err
	}
	meta, err := parseMetadata(r.Header)
	if err != nil {
		return nil, err
	}
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil && !errors.Is(err, mime.ErrInvalidMediaParameter) {
		return nil, invalid("the content type is not valid: %v", err)
	}
	idle := &idleReader{r: r.Body, rc: http.NewResponseController(w)}
	defer idle.stop()
	// Decoders read in small steps; the connection should not.
	steps := bodyReaders.Get().(*bufio.Reader)
	steps.Reset(idle)
	defer func() { steps.Reset(nil); bodyReaders.Put(steps) }()
	body, plain, err := decoded(steps, r.Header)
	if err != nil {
		return nil, err
	}
	in := &intake{s: s, u: u, meta: meta, workdir: s.settings().workdir, path: q.Get("path")}
	if signed && in.path == "" {
		if in.base, err = in.confine(); err != nil {
			return nil, err
		}
	}
	defer in.discard()
	switch kind {
	case "application/octet-stream":
		if in.path == "" {
			return nil, invalid("the path query parameter is required for application/octet-stream")
		}
		size := int64(-1)
		if plain {
			body, size = idle, r.ContentLength
		}
		err = in.take("", &filler{r: body}, size)
	case "multipart/form-data":
		if params["boundary"] == "" {
			return nil, invalid("the content type names no multipart boundary")
		}
		if len(params["boundary"]) > maxBoundary {
			return nil, invalid("the multipart boundary is longer than %d bytes", maxBoundary)
		}
		if plain {
			body = idle
		}
		form := newFormReader(body, params["boundary"])
		err = in.parts(form)
		form.close()
		if err == nil {
			// The end of a compressed body carries its checksum.
			if _, err = io.Copy(io.Discard, body); err != nil {
				err = broken(err)
			}
		}
	default:
		return nil, invalid("the content type must be multipart/form-data or application/octet-stream, not %q", kind)
	}
	if err == nil {
		err = in.commit()
	}
	if err == nil && len(in.done) == 0 {
		err = invalid("the request contains no file")
	}
	return in.done, err
}

// broken is what is said to a client whose body cannot be read to its end.
func broken(err error) error {
	return &fault{code: connect.CodeInvalidArgument, msg: "the body of the request is broken", err: err}
}

// decoded undoes the encoding of a request's whole body; plain tells that there
// is none.
func decoded(body io.Reader, h http.Header) (r io.Reader, plain bool, err error) {
	enc, _, _ := strings.Cut(h.Get("Content-Encoding"), ";")
	switch strings.ToLower(strings.TrimSpace(enc)) {
	case "", "identity":
		return body, true, nil
	case "gzip":
		z, err := gzip.NewReader(body)
		if err != nil {
			return nil, false, broken(err)
		}
		return z, false, nil
	default:
		return nil, false, invalid("unsupported Content-Encoding %q, supported: [gzip]", enc)
	}
}

// idleReader bounds how long a body may stand still, so that a client that
// vanished without a word does not hold a half-written file for ever.
type idleReader struct {
	r    io.Reader
	rc   *http.ResponseController
	next time.Time
}

func (i *idleReader) Read(b []byte) (int, error) {
	if now := time.Now(); now.After(i.next) {
		i.next = now.Add(idleTimeout / 8)
		i.rc.SetReadDeadline(now.Add(idleTimeout)) // a writer without deadlines is a test's
	}
	return i.r.Read(b)
}

func (i *idleReader) stop() { i.rc.SetReadDeadline(time.Time{}) }

// intake takes in the files of one request. The last file is committed when
// the rest of the body is known to be whole.
type intake struct {
	s       *Server
	u       *user
	meta    map[string]string
	workdir string
	path    string // the query's
	base    string // real path nothing may be written outside of, or ""

	seen  map[string]bool
	names int
	held  *staged
	done  []uploaded
}

// confine returns the real path of the default directory: a signature that
// names no path is good for that one alone.
func (in *intake) confine() (string, error) {
	dir, err := resolvePath("", in.u, in.workdir)
	if err != nil {
		return "", err
	}
	return with(in.u, func() (string, error) {
		fd, err := makeDirs(dir)
		if err != nil {
			return "", pathError(dir, err)
		}
		defer unix.Close(fd)
		return fdPath(fd)
	})
}

// parts takes in every part of a form that is named file.
func (in *intake) parts(form *formReader) error {
	for {
		header, err := form.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return broken(err)
		}
		name, file := partName(header.Get("Content-Disposition"))
		if name != "file" {
			continue
		}
		if in.path == "" && file == "" {
			return invalid("a part of the form has no filename, and the request no path")
		}
		if err := in.take(file, form.body(header), -1); err != nil {
			return err
		}
	}
}

// partName reads the name and the full file name, directories and all, of a
// part of a form. The one of mime/multipart would drop the directories.
func partName(disposition string) (name, file string) {
	kind, params, err := mime.ParseMediaType(disposition)
	if err != nil || kind != "form-data" {
		return "", ""
	}
	return params["name"], params["filename"]
}

// take stages one file and holds it; the one before is committed.
func (in *intake) take(name string, body pieces, size int64) error {
	if in.path != "" {
		name = in.path
	}
	path, err := resolvePath(name, in.u, in.workdir)
	if err != nil {
		return err
	}
	if in.seen[path] {
		return invalid("the upload contains more than one file for the path '%s'; each path may be written once", path)
	}
	if in.names += len(path); in.names > maxNames {
		return invalid("the upload contains too many files; their paths together may have %d bytes", maxNames)
	}
	if in.seen == nil {
		in.seen = map[string]bool{}
	}
	in.seen[path] = true
	if err := in.commit(); err != nil {
		return err
	}
	if in.held, err = stage(in.u, path, in.base); err != nil {
		return err
	}
	if size > 0 && !in.held.free(size) {
		return fmt.Errorf("the upload of %d bytes: %w", size, unix.ENOSPC)
	}
	return fill(in.held, body)
}

// pieces is a body in pieces, each of which is valid until the next is asked
// for; io.EOF comes with the last one or after it.
type pieces interface {
	piece() ([]byte, error)
}

// fill writes a body to a staged file.
func fill(t *staged, body pieces) error {
	if f, ok := body.(*filler); ok {
		defer f.close()
	}
	for {
		b, rerr := body.piece()
		if len(b) > 0 {
			if _, err := t.file.Write(b); err != nil {
				return fmt.Errorf("writing '%s': %w", t.path, err)
			}
		}
		if rerr == io.EOF {
			return nil
		}
		if rerr != nil {
			return broken(rerr)
		}
	}
}

// filler makes pieces of what a reader brings, each a full buffer. The buffer is
// a large one if the body turns out to be long.
type filler struct {
	r        io.Reader
	buf      []byte
	giveBack func()
}

func (f *filler) piece() (b []byte, err error) {
	switch {
	case f.buf == nil:
		f.buf, f.giveBack = lendBuffer(false)
	case len(f.buf) == copyBuffer:
		f.close()
		f.buf, f.giveBack = lendBuffer(true)
	}
	n := 0
	for n < len(f.buf) && err == nil {
		var m int
		m, err = f.r.Read(f.buf[n:])
		n += m
	}
	return f.buf[:n], err
}

// close gives the buffer back.
func (f *filler) close() {
	if f.buf != nil {
		f.giveBack()
		f.buf = nil
	}
}

func (in *intake) commit() error {
	if in.held == nil {
		return nil
	}
	stored, err := in.held.commit(in.meta)
	if err == nil {
		path := in.held.path
		in.done = append(in.done, uploaded{Name: filepath.Base(path), Path: path, Type: "file", Metadata: stored})
	}
	in.discard()
	return err
}

func (in *intake) discard() {
	if in.held != nil {
		in.held.discard()
		in.held = nil
	}
}
