package envd

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime/quotedprintable"
	"net/textproto"
	"strings"
)

// formReader reads the parts of a multipart form (RFC 2046, section 5.1.1), as
// mime/multipart does it, but in pieces as large as its buffer: that one looks
// for the boundary in every 4 KiB, which took most of an upload's time.
type formReader struct {
	r        io.Reader
	buf      []byte
	giveBack func()
	lo, hi   int   // what is buffered
	err      error // why there is no more to come

	line   []byte // "--" and the boundary, with which a part begins
	delim  []byte // a line's end and the same, with which its content ends
	begun  bool   // a part has been found
	inPart bool   // its content is being read
	fresh  bool   // nothing of it has been read
	size   int    // of what was read of it
}

var errForm = errors.New("the form is malformed")

// maxBoundary is more than the 70 bytes that RFC 2046 allows, and far less than
// a buffer has.
const maxBoundary = 1 << 10

// newFormReader returns a reader that holds a buffer until close. The boundary
// has up to maxBoundary bytes.
func newFormReader(r io.Reader, boundary string) *formReader {
	f := &formReader{r: r, delim: []byte("\r\n--" + boundary)}
	f.line = f.delim[2:]
	f.buf, f.giveBack = lendBuffer(false)
	return f
}

func (f *formReader) close() { f.giveBack() }

// more reads until the buffer is full, or nothing comes any more.
func (f *formReader) more() {
	f.hi = copy(f.buf, f.buf[f.lo:f.hi])
	f.lo = 0
	for f.hi < len(f.buf) && f.err == nil {
		var n int
		n, f.err = f.r.Read(f.buf[f.hi:])
		f.hi += n
	}
}

// readLine returns the next line with its end, or what there is if the input
// ends, with its error.
func (f *formReader) readLine() ([]byte, error) {
	for i := 0; i < 2; i++ {
		if n := bytes.IndexByte(f.buf[f.lo:f.hi], '\n'); n >= 0 {
			line := f.buf[f.lo : f.lo+n+1]
			f.lo += n + 1
			return line, nil
		}
		if i == 0 {
			f.more()
		}
	}
	if f.err == nil {
		return nil, errForm // it does not fit into the buffer
	}
	line := f.buf[f.lo:f.hi]
	f.lo = f.hi
	return line, f.err
}

// next skips what is left of a part and returns the header of the next one;
// io.EOF after the last.
func (f *formReader) next() (textproto.MIMEHeader, error) {
	for f.inPart {
		if _, err := f.piece(); err != nil && err != io.EOF {
			return nil, err
		}
	}
	separated := false // the line's end before the boundary has been read
	for {
		line, err := f.readLine()
		switch {
		case err == io.EOF && f.last(line):
			return nil, io.EOF
		case err != nil:
			return nil, f.early(err)
		case f.boundary(line):
			f.begun = true
			return f.header()
		case f.last(line):
			return nil, io.EOF
		case !f.begun: // what is before the first part means nothing
		case !separated && bytes.Equal(line, f.end()):
			separated = true
		default:
			return nil, errForm
		}
	}
}

// early makes an end of the input where more was to come a failure.
func (f *formReader) early(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// end is how a line ends: CRLF, or LF if that of the first boundary does.
func (f *formReader) end() []byte { return f.delim[:len(f.delim)-len(f.line)] }

// boundary reports whether a line begins a part.
func (f *formReader) boundary(line []byte) bool {
	rest, ok := bytes.CutPrefix(line, f.line)
	if !ok {
		return false
	}
	rest = bytes.TrimLeft(rest, " \t")
	if !f.begun && string(rest) == "\n" {
		f.delim = f.delim[1:]
	}
	return bytes.Equal(rest, f.end())
}

// last reports whether a line ends the form.
func (f *formReader) last(line []byte) bool {
	rest, ok := bytes.CutPrefix(line, f.line)
	if !ok || !bytes.HasPrefix(rest, []byte("--")) {
		return false
	}
	rest = bytes.TrimLeft(rest[2:], " \t")
	return len(rest) == 0 || bytes.Equal(rest, f.end())
}

// header reads that of a part.
func (f *formReader) header() (textproto.MIMEHeader, error) {
	var head bytes.Buffer
	for {
		line, err := f.readLine()
		if err != nil {
			return nil, fmt.Errorf("in the head of a part: %w", f.early(err))
		}
		if head.Len() > len(f.buf) {
			return nil, errForm
		}
		head.Write(line)
		if string(line) == "\r\n" || string(line) == "\n" {
			break
		}
	}
	h, err := textproto.NewReader(bufio.NewReader(&head)).ReadMIMEHeader()
	f.inPart, f.fresh, f.size = err == nil, true, 0
	return h, err
}

// piece returns the next piece of a part's content, valid until the next call;
// io.EOF after the last.
func (f *formReader) piece() ([]byte, error) {
	if !f.inPart {
		return nil, io.EOF
	}
	if f.size > copyBuffer && len(f.buf) == copyBuffer {
		f.enlarge()
	}
	f.more()
	n, over := f.content(f.buf[f.lo:f.hi])
	p := f.buf[f.lo : f.lo+n]
	f.lo += n
	f.size += n
	if over {
		f.inPart = false
	} else if n == 0 {
		f.inPart = false
		return nil, f.early(f.err)
	}
	return p, nil
}

// enlarge takes a larger buffer, if there is one, for a long part.
func (f *formReader) enlarge() {
	buf, giveBack := lendBuffer(true)
	f.hi = copy(buf, f.buf[f.lo:f.hi])
	f.lo = 0
	f.giveBack()
	f.buf, f.giveBack = buf, giveBack
}

// content returns how much of b, which is all there is or as much as fits, is
// content for sure, and whether the part is over then.
func (f *formReader) content(b []byte) (n int, over bool) {
	if f.fresh {
		if bytes.HasPrefix(b, f.line) && f.closes(b[len(f.line):]) {
			return 0, true // nothing, not even a line's end
		}
		f.fresh = false
	}
	for {
		i := bytes.Index(b[n:], f.delim)
		if i < 0 {
			break
		}
		n += i
		rest := b[n+len(f.delim):]
		if len(rest) < 2 && f.err == nil {
			return n, false // what follows decides
		}
		if f.closes(rest) {
			return n, true
		}
		n += len(f.delim)
	}
	if f.err == nil {
		// The last bytes may be the beginning of one.
		for k := max(n, len(b)-len(f.delim)+1); k < len(b); k++ {
			if bytes.HasPrefix(f.delim, b[k:]) {
				return k, false
			}
		}
	}
	return len(b), false
}

// closes reports whether what follows the boundary makes it one: space, the end
// of a line, or the two dashes of the last.
func (f *formReader) closes(rest []byte) bool {
	if len(rest) == 0 {
		return true
	}
	switch rest[0] {
	case ' ', '\t', '\r', '\n':
		return true
	}
	return len(rest) > 1 && rest[0] == '-' && rest[1] == '-'
}

// Read implements [io.Reader] for the content of a part, by way of a copy.
func (f *formReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	b, err := f.piece()
	if over := len(b) - len(p); over > 0 {
		b = b[:len(p)]
		f.lo -= over
		f.size -= over
		f.inPart = true
	}
	return copy(p, b), err
}

// body returns the content of the part with this header.
func (f *formReader) body(h textproto.MIMEHeader) pieces {
	if strings.EqualFold(h.Get("Content-Transfer-Encoding"), "quoted-printable") {
		return &filler{r: quotedprintable.NewReader(f)}
	}
	return f
}
