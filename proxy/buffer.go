package proxy

import "sync"

// sizes are those of buffers. In a transfer it is the number of system calls,
// and of threads that they wake, that costs.
var sizes = [...]int{4 << 10, 32 << 10, 256 << 10}

const (
	smallest = 0
	largest  = len(sizes) - 1
	// maxLargest bounds the largest buffers in use: a slow client holds on to
	// its one. Others have to do with the size below.
	maxLargest = 64
)

var (
	pools      [len(sizes)]sync.Pool // of *[]byte
	largestUse = make(chan struct{}, maxLargest)
)

// buffer is what a copy reads into: small while little comes, so that thousands
// of quiet streams cost little, and large while much does.
type buffer struct {
	p    *[]byte
	size int // index in sizes
}

// bytes returns the place for the next read.
func (b *buffer) bytes() []byte {
	if b.p == nil {
		if p, ok := pools[b.size].Get().(*[]byte); ok {
			b.p = p
		} else {
			p := make([]byte, sizes[b.size])
			b.p = &p
		}
	}
	return *b.p
}

// grow is told how much a read brought, once that has been used.
func (b *buffer) grow(n int) {
	switch next := b.size + 1; {
	case n < sizes[smallest] && b.size > smallest:
		b.free()
	case n == sizes[b.size] && next < largest:
		b.free()
		b.size = next
	case n == sizes[b.size] && next == largest:
		select {
		case largestUse <- struct{}{}:
			b.free()
			b.size = next
		default:
		}
	}
}

// free gives everything back.
func (b *buffer) free() {
	if b.p != nil {
		pools[b.size].Put(b.p)
	}
	if b.size == largest {
		<-largestUse
	}
	*b = buffer{}
}
