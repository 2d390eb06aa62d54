package envd

import (
	"compress/gzip"
	"io"
	"mime"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
)

// download answers GET and HEAD of /files.
func (s *Server) download(w http.ResponseWriter, r *http.Request) {
	if err := s.send(w, r); err != nil {
		writeFault(w, err)
	}
}

// send answers with a file; an error means that nothing was answered yet.
func (s *Server) send(w http.ResponseWriter, r *http.Request) error {
	if _, err := s.authorizeFile(r, opRead); err != nil {
		return err
	}
	q := r.URL.Query()
	u, err := s.fileUser(q)
	if err != nil {
		return err
	}
	path, err := resolvePath(q.Get("path"), u, s.settings().workdir)
	if err != nil {
		return err
	}
	f, st, err := openRegular(u, path)
	if err != nil {
		return err
	}
	defer f.Close()

	h := w.Header()
	h.Add("Vary", "Accept-Encoding")
	enc, plain := acceptedEncoding(r.Header.Values("Accept-Encoding"))
	// A range is one of the plain bytes, and so is what a condition is about.
	if partial(r.Header) {
		enc = ""
		if !plain {
			enc = refused
		}
	}
	if enc == refused {
		return &fault{code: connect.CodeInvalidArgument, status: http.StatusNotAcceptable,
			msg: "no acceptable encoding found; supported: [identity, gzip]"}
	}
	name := filepath.Base(path)
	h.Set("Content-Disposition", disposition(name))
	mod := time.Unix(st.Mtim.Unix())

	// Files such as those of /proc have a size of zero and content all the
	// same.
	var head [512]byte
	n := 0
	if st.Size == 0 || enc == "gzip" {
		n, err = io.ReadFull(f, head[:])
		if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
			return pathError(path, err)
		}
	}
	endless := st.Size == 0 && n > 0
	if enc == "gzip" && plain && dense(f, st.Size) {
		enc = "" // it would take much longer and save nothing
	}
	if n == 0 && st.Size == 0 && enc == "gzip" && plain {
		enc = "" // nothing to compress; clients look for a length of zero
	}
	if enc == "" && !endless {
		http.ServeContent(bulkWriter{w}, r, name, mod, f)
		return nil
	}
	ctype := mime.TypeByExtension(filepath.Ext(name))
	if ctype == "" {
		ctype = http.DetectContentType(head[:n])
	}
	h.Set("Content-Type", ctype)
	if !endless {
		h.Set("Last-Modified", mod.UTC().Format(http.TimeFormat))
	}
	if enc == "gzip" {
		h.Set("Content-Encoding", "gzip")
	}
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	body := io.MultiReader(strings.NewReader(string(head[:n])), f)
	if !copyOut(w, body, st.Size, enc == "gzip") {
		// The client must not take what it has for the whole file.
		panic(http.ErrAbortHandler)
	}
	return nil
}

var gzipWriters = sync.Pool{New: func() any {
	// The fastest level: what counts is the time until the file is there.
	z, _ := gzip.NewWriterLevel(io.Discard, gzip.BestSpeed)
	return z
}}

// sampleSize is how much of a file is tried.
const sampleSize = 32 << 10

// counter counts what is written to it.
type counter int

func (c *counter) Write(p []byte) (int, error) { *c += counter(len(p)); return len(p), nil }

// dense reports whether compression saves less than a sixteenth of a piece in
// the middle of a file, as of one that is compressed already. A small file is
// not worth the question.
func dense(f io.ReaderAt, size int64) bool {
	if size < 2*sampleSize {
		return false
	}
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	n, err := f.ReadAt((*buf)[:sampleSize], (size-sampleSize)/2)
	if err != nil {
		return false // the transfer itself will tell
	}
	var c counter
	z := gzipWriters.Get().(*gzip.Writer)
	defer gzipWriters.Put(z)
	z.Reset(&c)
	if _, err := z.Write((*buf)[:n]); err != nil || z.Close() != nil {
		return false
	}
	return int(c) > n-n/16
}

// bulkWriter has a file copied to the client by a buffer of ours. gVisor's
// sendfile, to a connection that does not block, reads 1 MiB for each part that
// there is room for, and drops the rest.
type bulkWriter struct{ http.ResponseWriter }

// ReadFrom implements [io.ReaderFrom].
func (b bulkWriter) ReadFrom(r io.Reader) (int64, error) {
	size := int64(-1)
	if l, ok := r.(*io.LimitedReader); ok {
		size = l.N
	}
	return copyLent(b.ResponseWriter, r, size)
}

// copyLent copies by a lent buffer what has about the given size.
func copyLent(w io.Writer, r io.Reader, size int64) (int64, error) {
	buf, giveBack := lendBuffer(size > copyBuffer)
	defer giveBack()
	// Hidden are ReadFrom and WriteTo, which would have buffers of their own.
	return io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, buf)
}

// copyOut sends a body of about a size and reports whether it is all there.
func copyOut(w io.Writer, body io.Reader, size int64, compress bool) bool {
	if !compress {
		_, err := copyLent(w, body, size)
		return err == nil
	}
	z := gzipWriters.Get().(*gzip.Writer)
	defer gzipWriters.Put(z)
	z.Reset(w)
	if _, err := copyLent(z, body, size); err != nil {
		return false
	}
	return z.Close() == nil
}

func disposition(name string) string {
	if d := mime.FormatMediaType("inline", map[string]string{"filename": name}); d != "" {
		return d
	}
	return "inline"
}

// partial reports whether a request is about a part of a file, or depends on
// a condition.
func partial(h http.Header) bool {
	for _, k := range []string{"Range", "If-Range", "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since"} {
		if h.Get(k) != "" {
			return true
		}
	}
	return false
}

// refused is the encoding of a request that takes none of ours.
const refused = "refused"

// acceptedEncoding chooses gzip or "", the plain bytes, by Accept-Encoding
// (RFC 9110, 12.5.3), and tells whether plain bytes would be acceptable. The
// highest quality wins, then the client's order. A star alone means the plain
// bytes, unless those are excluded.
func acceptedEncoding(values []string) (enc string, plain bool) {
	type choice struct {
		enc string
		q   float64
	}
	var choices []choice
	identity, star, gzipped := -1.0, -1.0, -1.0
	for _, v := range values {
		for item := range strings.SplitSeq(v, ",") {
			name, params, _ := strings.Cut(item, ";")
			name = strings.ToLower(strings.TrimSpace(name))
			q := quality(params)
			switch name {
			case "identity":
				identity = q
				choices = append(choices, choice{"", q})
			case "gzip", "x-gzip":
				gzipped = q
				choices = append(choices, choice{"gzip", q})
			case "*":
				star = q
			}
		}
	}
	plain = identity > 0 || identity < 0 && star != 0
	best := choice{}
	for _, c := range choices {
		if c.q > best.q {
			best = c
		}
	}
	switch {
	case best.q > 0:
		return best.enc, plain
	case plain:
		return "", true
	case gzipped < 0 && star > 0:
		return "gzip", false
	default:
		return refused, false
	}
}

// quality reads the weight among an encoding's parameters; 1 if there is none
// that can be read.
func quality(params string) float64 {
	for p := range strings.SplitSeq(params, ";") {
		k, v, _ := strings.Cut(p, "=")
		if strings.EqualFold(strings.TrimSpace(k), "q") {
			if q, err := strconv.ParseFloat(strings.TrimSpace(v), 64); err == nil && q >= 0 && q <= 1 {
				return q
			}
		}
	}
	return 1
}
