// Package life tests what the whole program promises about lives and ends:
// that sandboxes outlive the server, that nothing of them is left over, that a
// guest at its limits hurts only itself, and what a user reads when something
// is wrong.
package life

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/cayhq/cay/test/program"
)

func TestMain(m *testing.M) { program.Main(m) }

// random returns a source whose seed is in the test's log, and that
// CAY_TEST_SEED repeats.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("CAY_TEST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	t.Logf("CAY_TEST_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// refusal returns the answer that was no success.
func refusal(t testing.TB, err error, status int) *program.Refusal {
	t.Helper()
	var r *program.Refusal
	if !errors.As(err, &r) || r.Status != status {
		t.Fatalf("got %v, want an answer with status %d", err, status)
	}
	return r
}

// gone says what is still there of a sandbox that has ended, for a client.
func gone(ctx context.Context, c *program.Client, s *program.Sandbox) string {
	var r *program.Refusal
	if err := s.Answers(ctx); !errors.As(err, &r) || r.Status != http.StatusBadGateway {
		return fmt.Sprintf("the proxy says %v of sandbox %s, want 502", err, s.ID)
	}
	if _, err := c.Get(ctx, s.ID); !errors.As(err, &r) || r.Status != http.StatusNotFound {
		return fmt.Sprintf("the API says %v of sandbox %s, want 404", err, s.ID)
	}
	return ""
}
