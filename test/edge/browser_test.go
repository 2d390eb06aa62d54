package edge

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/certificate"
)

// Debian's Chromium loads a page of a sandbox, over HTTPS with a certificate
// that it was told to trust and over plain HTTP, with events, a WebSocket and a
// request in it; and sees a page of Cay's own where there is no service.
func TestBrowser(t *testing.T) {
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("needs chromium")
	}
	if _, err := exec.LookPath("certutil"); err != nil {
		t.Skip("needs certutil (libnss3-tools)")
	}
	e := startEdge(t)
	e.box = e.inhabit(t, nil)
	home := t.TempDir()
	// The browser's store alone: the machine's is TestTrust's.
	trust := &certificate.Trust{Root: t.TempDir(), Home: "/h", Run: func(ctx context.Context, name string, args ...string) ([]byte, error) {
		if name != "certutil" {
			return nil, nil
		}
		return exec.CommandContext(ctx, name, args...).CombinedOutput()
	}}
	if err := os.MkdirAll(filepath.Join(trust.Root, "usr/local/share/ca-certificates"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := trust.Install(t.Context(), e.caFile); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(trust.Root, "h", ".pki"), filepath.Join(home, ".pki")); err != nil {
		t.Fatal(err)
	}
	load := func(url, until string) string {
		t.Helper()
		var out []byte
		for began := time.Now(); time.Since(began) < 2*patience; {
			cmd := exec.CommandContext(t.Context(), chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
				"--user-data-dir="+filepath.Join(home, "profile"), "--virtual-time-budget=20000", "--dump-dom", url)
			cmd.Env = append(os.Environ(), "HOME="+home)
			cmd.WaitDelay = time.Second
			stop := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() }) // tried again
			out, err = cmd.Output()
			stop.Stop()
			if strings.Contains(string(out), until) {
				return string(out)
			}
		}
		t.Errorf("the page of %s does not show %q: %v\n%s", url, until, err, out)
		return ""
	}
	for _, w := range ways {
		if len(w.head(e, 8080)) > 0 {
			continue // a browser asks for a page without headers of ours
		}
		dom := load(w.base(e, 8080)+"/", "<title>done")
		for _, want := range []string{`"sse":"event 2"`, `"ws":"echo ping"`, `"post":"body"`} {
			if !strings.Contains(dom, want) {
				t.Errorf("%s: the page lacks %s", w.name, want)
			}
		}
		load(w.base(e, 8099)+"/", "no service running on port 8099")
	}
}
