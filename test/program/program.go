// Package program runs the real cay binary for whole-program tests.
//
// A test package calls [Main] from its TestMain. Its tests then run as on a
// machine of their own: in fresh process, network, mount and IPC namespaces,
// under an init that reaps, with an internet behind the machine's one uplink
// that answers for every address there is. So what a test finds on "the host"
// is the test's own, nothing of it touches the real one, and nothing of it
// outlives the test, whichever way it ends.
//
// [Start] runs a server with a data directory of its own there. [Client]
// speaks to it as a program would that has no SDK.
//
// The binary is what `make build` made, or $CAY_BIN. The system image of the
// base template is built once, by that binary, and kept in .cache.
package program

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// Nightly reports whether CAY_NIGHTLY=1 asks for the long variants.
func Nightly() bool { return os.Getenv("CAY_NIGHTLY") == "1" }

// Sized returns the nightly number, or the one of every other run.
func Sized(always, nightly int) int {
	if Nightly() {
		return nightly
	}
	return always
}

// Repo is the root of the repository.
var Repo = sync.OnceValue(func() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d
		}
		if d == filepath.Dir(d) {
			panic("no go.mod above " + dir)
		}
	}
})

// Cache returns a path in the repository's cache, which git ignores.
func Cache(elem ...string) string {
	return filepath.Join(append([]string{Repo(), ".cache"}, elem...)...)
}

// Binary is the path of the program under test.
func Binary() string {
	if b := os.Getenv("CAY_BIN"); filepath.IsAbs(b) {
		return b
	} else if b != "" {
		return filepath.Join(Repo(), b)
	}
	return filepath.Join(Repo(), "bin", "cay")
}

// patience is how long a test waits at least for what must come, so that it
// stands a machine that does other things.
const patience = time.Minute

// Eventually is for states that nobody announces: it polls until ok returns
// "", and else fails the test with what ok said last. A busy machine gets a
// minute whatever within is.
func Eventually(t testing.TB, within time.Duration, ok func() string) {
	t.Helper()
	Within(t, max(within, patience), ok)
}

// Within is Eventually where the time is the promise.
func Within(t testing.TB, limit time.Duration, ok func() string) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		said := ok()
		if said == "" {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", limit, said)
		}
	}
}
