package gvisor

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/cayhq/cay/runtime"
)

func slogDiscard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// clientOf is an HTTP client of a supervisor.
func clientOf(h home) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", h.socket())
	}, DisableKeepAlives: true}}
}

func specJSON(t testing.TB, s runtime.Spec) []byte {
	t.Helper()
	body, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// children lists the children of all threads of a process.
func children(t testing.TB, pid int) []int {
	t.Helper()
	var out []int
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range files {
		data, _ := os.ReadFile(f)
		for _, s := range strings.Fields(string(data)) {
			n, _ := strconv.Atoi(s)
			out = append(out, n)
		}
	}
	return out
}
