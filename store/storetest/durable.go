package storetest

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/store"
)

// Place says how to reach a store that outlives its process.
type Place struct {
	// New returns a store that is not open. The same place, a directory for
	// the test's own use, is the same record.
	New func(place string) store.Store
	// Check fails if what is kept at the place is damaged. No store is open.
	Check func(t *testing.T, place string)
}

// childVar tells the test binary, run anew, to write at the place until it is
// killed.
const childVar = "CAY_STORETEST_PLACE"

// RunDurable runs the part of the suite that opens a store more than once. It
// runs the test binary anew, so t must be a test of the top level that calls
// this first.
func RunDurable(t *testing.T, p Place) {
	if place := os.Getenv(childVar); place != "" {
		if err := writeUntilKilled(t.Context(), p.New(place), os.Stdout); err != nil {
			fmt.Println("failed:", err)
			t.Fatal(err)
		}
	}
	t.Run("reopen", func(t *testing.T) { reopen(t, p) })
	t.Run("close without open", func(t *testing.T) { closeUnopened(t, p) })
	t.Run("kill -9", func(t *testing.T) { kill(t, p) })
}

func (p Place) open(t *testing.T, place string) fixture {
	t.Helper()
	s := p.New(place)
	if err := s.Open(t.Context()); err != nil {
		t.Fatalf("opening: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	return fixture{t, s}
}

func reopen(t *testing.T, p Place) {
	place := t.TempDir()
	f := p.open(t, place)
	f.base(2)
	f.must(f.AddKey(f.Context(), newKey(1, 0)))
	sb := newSandbox(1, 0)
	sb.Metadata = map[string]string{"a": "b"}
	f.add(sb)
	f.add(newSandbox(2, 1))
	ended := f.set(sandboxID(2), end(noon))
	tpl := f.find(0, store.TemplateRef{Name: "base"})

	for range 3 {
		f.must(f.Close())
		p.Check(t, place)
		f = p.open(t, place)
		l, err := f.ListTeams(f.Context())
		f.must(err)
		same(f, "teams", []cay.Team{newTeam(0), newTeam(1)}, l)
		k, _, err := f.FindKey(f.Context(), hash(1))
		f.must(err)
		same(f, "key", newKey(1, 0), k)
		same(f, "template", tpl, f.find(1, store.TemplateRef{Name: "base"}))
		same(f, "live sandboxes", []store.Sandbox{sb}, f.list(store.SandboxFilter{}))
		got, err := f.FindSandbox(f.Context(), teamID(1), sandboxID(2))
		f.must(err)
		same(f, "ended sandbox", ended, got)
	}
	// One store opens and closes as often as one likes.
	s := p.New(place)
	for range 3 {
		f.must(s.Open(t.Context()))
		_, err := s.Team(t.Context(), teamID(0))
		f.must(err)
		f.must(s.Close())
	}
}

func closeUnopened(t *testing.T, p Place) {
	f := fixture{t, p.New(t.TempDir())}
	_, err := f.Team(f.Context(), teamID(0))
	f.code(err, cay.CodeStoreUnavailable)
	f.must(f.Close())
	ctx, cancel := context.WithCancel(f.Context())
	cancel()
	if err := f.Open(ctx); err == nil {
		f.Fatal("Open with a cancelled context succeeded")
	}
	f.must(f.Close())
	f.must(f.Close())
	f.must(f.Open(f.Context())) // a failed Open is no end
	f.teams(1)
	f.must(f.Close())
}

// The acknowledgements of the writing process, one line each: what the store
// had confirmed when the line was written. A sandbox's grow.
var acks = []string{"starting", "running", "ended"}

// writeUntilKilled works from several goroutines for ever.
func writeUntilKilled(ctx context.Context, s store.Store, out *os.File) error {
	if err := s.Open(ctx); err != nil {
		return err
	}
	if err := s.PutTeam(ctx, newTeam(0)); err != nil {
		return err
	}
	if _, err := s.PublishBuild(ctx, teamID(0), true, manifest(1, 1, "base")); err != nil {
		return err
	}
	base := rand.N(1 << 40)
	failed := make(chan error)
	for g := range 4 {
		go func() {
			say := func(what string, n int) error {
				_, err := out.WriteString(what + " " + strconv.Itoa(n) + "\n") // one write, no buffer
				return err
			}
			for n := base + g; ; n += 4 {
				failed <- func() error {
					if err := s.AddSandbox(ctx, newSandbox(n, 0), 1<<30); err != nil {
						return err
					}
					if err := say("starting", n); err != nil {
						return err
					}
					if _, err := s.UpdateSandbox(ctx, sandboxID(n), func(sb *store.Sandbox) error {
						sb.State = cay.StateRunning
						return nil
					}); err != nil {
						return err
					}
					if err := say("running", n); err != nil || n%2 == 0 {
						return err
					}
					if _, err := s.UpdateSandbox(ctx, sandboxID(n), func(sb *store.Sandbox) error { end(noon)(sb); return nil }); err != nil {
						return err
					}
					if err := say("ended", n); err != nil {
						return err
					}
					if err := s.AddKey(ctx, newKey(n, 0)); err != nil {
						return err
					}
					if err := say("key", n); err != nil || n%4 == 1 {
						return err
					}
					if err := s.DeleteKey(ctx, teamID(0), keyID(n)); err != nil {
						return err
					}
					return say("nokey", n)
				}()
			}
		}()
	}
	for err := range failed {
		if err != nil {
			return err
		}
	}
	return nil
}

func kill(t *testing.T, p Place) {
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	top, _, _ := strings.Cut(t.Name(), "/")
	place, acked := t.TempDir(), map[string]string{} // of one place, round after round
	for round := range rounds {
		cmd := exec.Command(exe, "-test.run=^"+top+"$", "-test.timeout=60s")
		cmd.Env = append(os.Environ(), childVar+"="+place)
		cmd.Stderr = os.Stderr
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Killed after so many lines: at a random instant of its work.
		after := 1 + rand.N(400)
		var once sync.Once
		end := func() { once.Do(func() { _ = cmd.Process.Kill() }) }
		slow := time.AfterFunc(30*time.Second, end)
		lines := 0
		for sc := bufio.NewScanner(stdout); sc.Scan(); {
			what, n, ok := strings.Cut(sc.Text(), " ")
			if !ok || what == "failed:" {
				end()
				t.Fatalf("the writing process said %q", sc.Text())
			}
			if strings.HasSuffix(what, "key") {
				n += " key"
			}
			acked[n] = what
			if lines++; lines == after {
				end()
			}
		}
		slow.Stop()
		end()
		_ = cmd.Wait()
		if lines < after {
			t.Fatalf("the writing process ended after %d lines", lines)
		}
		if round%2 == 0 { // every other time the next writer finds it as it was left
			verify(t, p, place, acked)
		}
	}
	verify(t, p, place, acked)
	t.Logf("%d acknowledgements over %d kills are there", len(acked), rounds)
}

func verify(t *testing.T, p Place, place string, acked map[string]string) {
	f := p.open(t, place)
	for n, what := range acked {
		n, key := strings.CutSuffix(n, " key")
		i, err := strconv.Atoi(n)
		f.must(err)
		if key {
			_, _, err := f.FindKey(f.Context(), hash(i))
			// The deletion may have been done and not told.
			if code := cay.CodeOf(err); code != cay.CodeKeyNotFound && (code != "" || what == "nokey") {
				t.Errorf("key %s: %v, acknowledged %q", n, err, what)
			}
			if i%4 == 1 && err != nil {
				t.Errorf("key %s is lost: %v", n, err)
			}
			continue
		}
		sb, err := f.FindSandbox(f.Context(), "", sandboxID(i))
		if err != nil || slices.Index(acks, string(sb.State)) < slices.Index(acks, what) {
			t.Errorf("sandbox %s is %q (%v), acknowledged %q", n, sb.State, err, what)
		}
	}
	f.must(f.Close())
	p.Check(t, place)
}
