// Package ctxio ends long reads with their context.
package ctxio

import (
	"context"
	"io"
)

// Reader returns r, which fails with ctx's error once ctx has ended. A read
// that is under way is not cut short. It hides r's WriterTo, which would not
// look.
func Reader(ctx context.Context, r io.Reader) io.Reader { return &reader{ctx, r} }

type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}
