package sqlite

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// flusher makes commits last over a loss of power. Everyone who comes while the
// disk is busy with a flush shares the next one: fifty commits at a time cost
// two flushes, not fifty.
type flusher struct {
	file *os.File
	sync func() error // replaces the flush of file in tests

	turn chan struct{} // of one: a flush at a time
	mu   sync.Mutex
	next *flush // the one that has not begun, if somebody waits for it
}

func newFlusher() *flusher { return &flusher{turn: make(chan struct{}, 1)} }

type flush struct {
	done chan struct{}
	err  error
}

// flush returns when all that was written before the call is on the disk.
func (f *flusher) flush() error {
	f.mu.Lock()
	mine, leads := f.next, f.next == nil
	if leads {
		mine = &flush{done: make(chan struct{})}
		f.next = mine
	}
	f.mu.Unlock()
	if !leads {
		<-mine.done
		return mine.err
	}
	f.turn <- struct{}{}
	f.mu.Lock()
	f.next = nil // whoever comes from now on wrote too late for this one
	f.mu.Unlock()
	mine.err = f.now()
	<-f.turn
	close(mine.done)
	return mine.err
}

func (f *flusher) now() error {
	if f.sync != nil {
		return f.sync()
	}
	for {
		if err := unix.Fdatasync(int(f.file.Fd())); err != unix.EINTR {
			return err
		}
	}
}

func (f *flusher) close() error {
	if f.file == nil {
		return nil
	}
	return f.file.Close()
}
