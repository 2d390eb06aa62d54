package ctxio

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
)

func TestReader(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	r := Reader(ctx, strings.NewReader("one two"))
	b := make([]byte, 3)
	if _, err := io.ReadFull(r, b); err != nil || string(b) != "one" {
		t.Fatalf("read %q, %v", b, err)
	}
	cancel()
	if n, err := r.Read(b); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %d, %v", n, err)
	}
	if _, ok := r.(io.WriterTo); ok {
		t.Error("a copy would go on without looking")
	}
}
