package proxy

import "sync"

const (
	smallBuffer = 4 << 10
	largeBuffer = 32 << 10
)

var (
	small = sync.Pool{New: func() any { return new([smallBuffer]byte) }}
	large = sync.Pool{New: func() any { return new([largeBuffer]byte) }}
)

// buffer is what a copy reads into: small while little comes, so that thousands
// of quiet streams cost little, and large while much does.
type buffer struct {
	small *[smallBuffer]byte
	large *[largeBuffer]byte
}

// bytes returns the place for the next read.
func (b *buffer) bytes() []byte {
	if b.large != nil {
		return b.large[:]
	}
	if b.small == nil {
		b.small = small.Get().(*[smallBuffer]byte)
	}
	return b.small[:]
}

// grow is told how much a read brought, once that has been used.
func (b *buffer) grow(n int) {
	switch {
	case b.large == nil && n == smallBuffer:
		b.large = large.Get().(*[largeBuffer]byte)
	case b.large != nil && n < smallBuffer:
		large.Put(b.large)
		b.large = nil
	}
}

// free gives everything back.
func (b *buffer) free() {
	if b.large != nil {
		large.Put(b.large)
	}
	if b.small != nil {
		small.Put(b.small)
	}
	*b = buffer{}
}
