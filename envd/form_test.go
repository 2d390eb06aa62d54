package envd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime/multipart"
	"net/textproto"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

// formPart is a part of a form; one whose end was not found has no body.
type formPart struct {
	Header textproto.MIMEHeader
	Body   string
	Whole  bool
}

// ours and theirs read a form with this reader and with that of mime/multipart.
func ours(r io.Reader, boundary string) (parts []formPart, err error) {
	f := newFormReader(r, boundary)
	defer f.close()
	for {
		h, err := f.next()
		if err == io.EOF {
			return parts, nil
		}
		if err != nil {
			return parts, err
		}
		p := formPart{Header: h}
		body := f.body(h)
		if fl, ok := body.(*filler); ok {
			defer fl.close()
		}
		for {
			var b []byte
			b, err = body.piece()
			p.Body += string(b)
			if err != nil {
				p.Whole = err == io.EOF
				break
			}
		}
		p.Header.Del("Content-Transfer-Encoding")
		if !p.Whole {
			return append(parts, formPart{Header: p.Header}), err
		}
		parts = append(parts, p)
	}
}

func theirs(r io.Reader, boundary string) (parts []formPart, whole bool) {
	m := multipart.NewReader(r, boundary)
	for {
		part, err := m.NextPart()
		if err != nil {
			return parts, err == io.EOF
		}
		b, err := io.ReadAll(part)
		p := formPart{Header: part.Header, Body: string(b), Whole: err == nil}
		p.Header.Del("Content-Transfer-Encoding")
		if !p.Whole {
			return append(parts, formPart{Header: p.Header}), false
		}
		parts = append(parts, p)
	}
}

var formSeeds = []string{
	"--b\r\nA: 1\r\n\r\nx\r\n--b--\r\n",
	"preamble\r\n--b\r\n\r\nx\r\n--b\r\nB: 2\r\n\r\n\r\n--b--",
	"--b\n\nlf only\n--b\n\ntwo\n--b--\n",
	"--b\r\n\r\n--b\r\n\r\n--b--\r\n",
	"--b \t\r\n\r\nspace behind the boundary\r\n--b \r\n\r\nx\r\n--b-- ",
	"--b\r\n\r\nnot \r\n--bone\r\n--b-\r\n-b\r\n--\r\n--b--",
	"--b\r\n\r\ncut off",
	"--b\r\n\r\ncut off\r\n--b",
	"--b\r\n\r\nx\r\n--b\r\nno end of the head",
	"--b\r\n\r\nx\r\n--b rest of a line\r\n\r\ny\r\n--b--",
	"--b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\na=3Db=\r\nc\r\n--b--",
	"--b--", "", "\r\n", "--b", "--b\r\n", "--bb\r\n\r\nx\r\n--bb--",
	"--b\r\n\r\n\r\r\n\r\n--b--", "--b\r\nA: 1\r\n B: 2\r\n\r\nx\r\n--b--", "--b\r\n\r\r\n\r\nx\r\n--b--",
}

// This reader finds in a form what that of mime/multipart finds, whatever the
// form is and however it comes.
func FuzzForm(f *testing.F) {
	for _, s := range formSeeds {
		f.Add([]byte(s), "b")
	}
	f.Add([]byte("----x\r\n\r\n\r\n----\r\n----x--"), "--x")
	f.Fuzz(func(t *testing.T, form []byte, boundary string) {
		if boundary == "" || len(boundary) > 70 || len(form) > 3<<10 {
			return // theirs has a buffer of 4 KiB for what ours has 128 for
		}
		compareForm(t, form, boundary)
	})
}

// The same with forms that are made of what matters in one.
func TestFormAgrees(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	words := []string{"--b", "--b", "\r\n", "\r\n", "\n", "--", "-", " ", "x", "A: 1", "\r", "b", "\r\n--b", "\r\n\r\n", "--b\r\n\r\n"}
	for range 20_000 {
		var form []byte
		for range random.IntN(24) {
			form = append(form, words[random.IntN(len(words))]...)
		}
		if compareForm(t, form, "b"); t.Failed() {
			t.Fatalf("with %q", form)
		}
	}
}

func compareForm(t *testing.T, form []byte, boundary string) {
	want, wantWhole := theirs(bytes.NewReader(form), boundary)
	for name, r := range map[string]io.Reader{"at once": bytes.NewReader(form), "byte by byte": iotest.OneByteReader(bytes.NewReader(form)),
		"the end with the data": iotest.DataErrReader(bytes.NewReader(form))} {
		got, err := ours(r, boundary)
		if err != nil && strings.HasPrefix(err.Error(), "in the head of a part") {
			err, wantWhole = nil, true // theirs takes a form that is cut off there for whole
		}
		if d := cmp.Diff(want, got); d != "" || (err == nil) != wantWhole {
			t.Errorf("%s: %v, whole to theirs: %v (-want +got):\n%s", name, err, wantWhole, d)
		}
	}
}

// Content of all lengths around the buffers' is whole, with boundaries and
// things like it at every place in them.
func TestFormAcrossBuffers(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	const boundary = "----formdata-undici-012345678901"
	like := []string{"\r\n--" + boundary + "x", "\r\n--" + boundary[:9], "\r", "\r\n", "\r\n--", "-"}
	for _, size := range []int{copyBuffer - 100, copyBuffer, 2*copyBuffer + 7, 1<<20 + copyBuffer, 3 << 20} {
		var want []formPart
		var b bytes.Buffer
		w := multipart.NewWriter(&b)
		if err := w.SetBoundary(boundary); err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			body := make([]byte, size+i)
			for j := range body {
				body[j] = byte(random.Uint32())
			}
			for range 200 {
				at := random.IntN(len(body))
				copy(body[at:], like[random.IntN(len(like))])
			}
			copy(body[max(0, copyBuffer-150+i):], strings.Repeat(like[0], 5))
			part, err := w.CreateFormFile("file", fmt.Sprint(i))
			if err != nil {
				t.Fatal(err)
			}
			_, _ = part.Write(body) // a buffer takes everything
			want = append(want, formPart{Body: string(body), Whole: true})
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		got, err := ours(&b, boundary)
		if err != nil || len(got) != len(want) {
			t.Fatalf("%d parts of %d bytes: %v", len(got), size, err)
		}
		for i := range got {
			if got[i].Body != want[i].Body || !got[i].Whole {
				t.Errorf("part %d of %d bytes differs: %d bytes", i, size, len(got[i].Body))
			}
		}
	}
}

// A line without an end is refused, and a read that fails is not taken for the
// end of a part.
func TestFormRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		in   io.Reader
		want error
	}{
		"endless line":   {io.MultiReader(strings.NewReader("--b\r\n"), &repeated{'x', 4 * copyBuffer}), errForm},
		"endless header": {io.MultiReader(strings.NewReader("--b\r\n"), strings.NewReader(strings.Repeat("A: b\r\n", copyBuffer))), errForm},
		"broken read":    {io.MultiReader(strings.NewReader("--b\r\n\r\nx"), iotest.ErrReader(iotest.ErrTimeout)), iotest.ErrTimeout},
		"cut off":        {strings.NewReader("--b\r\n\r\nx"), io.ErrUnexpectedEOF},
	} {
		f := newFormReader(tt.in, "b")
		_, err := f.next()
		for err == nil {
			_, err = f.piece()
		}
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
		f.close()
	}
}

// repeated is a byte, n times.
type repeated struct {
	b byte
	n int
}

func (r *repeated) Read(p []byte) (int, error) {
	if r.n == 0 {
		return 0, io.EOF
	}
	p = p[:min(len(p), r.n)]
	for i := range p {
		p[i] = r.b
	}
	r.n -= len(p)
	return len(p), nil
}
