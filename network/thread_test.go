package network

import (
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The main thread survives a goroutine that ends locked to it: no goroutine
// runs there any more, what f did to it stays, and /proc shows the whole
// process in a slot's namespace.
func TestOnThreadNeverMainThread(t *testing.T) {
	isMain := func() bool { return unix.Gettid() == unix.Getpid() }
	var onMain, callers atomic.Int32
	for until := time.Now().Add(3 * time.Second); callers.Load() == 0 && time.Now().Before(until); {
		var all sync.WaitGroup
		for range 500 {
			all.Go(func() {
				// Calls into the kernel keep threads busy, so that idle ones
				// are woken, the main thread among them. What a goroutine on
				// it starts last is what it runs next.
				for range 20 {
					_ = unix.Nanosleep(&unix.Timespec{Nsec: 1e5}, nil)
					if !isMain() {
						continue
					}
					callers.Add(1)
					_ = onThread(func() error {
						if isMain() {
							onMain.Add(1)
						}
						return nil
					})
				}
			})
		}
		all.Wait()
	}
	process, err := os.Readlink("/proc/self/ns/net") // the main thread's
	if err != nil {
		t.Fatal(err)
	}
	thread, err := os.Readlink(threadNS)
	if err != nil {
		t.Fatal(err)
	}
	if process != thread {
		t.Errorf("the process is in %s and its threads in %s", process, thread)
	}
	if callers.Load() == 0 && !t.Failed() {
		t.Skip("no goroutine came to run on the main thread")
	}
	if n := onMain.Load(); n > 0 {
		t.Errorf("f ran on the main thread %d times of %d", n, callers.Load())
	}
}
