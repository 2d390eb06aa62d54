package envd

import (
	"io"
	"mime/multipart"
	"net/http"
	"testing"
)

// BenchmarkFiles moves 64 MiB at a time through a TCP connection.
func BenchmarkFiles(b *testing.B) {
	g := newFileGuest(b)
	const size = 64 << 20
	b.Run("upload", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			if code, body := g.put(g.url("path", "f"), io.LimitReader(pattern{}, size)); code != 200 {
				b.Fatal(code, body)
			}
		}
	})
	b.Run("multipart", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			pr, pw := io.Pipe()
			m := multipart.NewWriter(pw)
			go func() {
				w, _ := m.CreateFormFile("file", "m")
				io.Copy(w, io.LimitReader(pattern{}, size))
				m.Close()
				pw.Close()
			}()
			if code, body := g.put(g.url(), pr, "Content-Type", m.FormDataContentType()); code != 200 {
				b.Fatal(code, body)
			}
		}
	})
	for _, enc := range []string{"identity", "gzip"} {
		b.Run("download "+enc, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				r, err := http.NewRequestWithContext(b.Context(), http.MethodGet, g.url("path", "f"), nil)
				must(b, err)
				r.Header.Set("Accept-Encoding", enc)
				resp, err := g.web.Client().Do(r)
				must(b, err)
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
		})
	}
}
