package pause

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/test/program"
)

// What no two sandboxes may share, a line each: what the system says of itself,
// and what fresh processes take from its randomness.
const (
	identity = `cat /etc/machine-id /run/cay/generation /proc/sys/kernel/random/uuid
head -c 16 /dev/urandom | base64
head -c 16 /dev/random | base64
hostname
echo $RANDOM$RANDOM$RANDOM`
	generators = `python3 -c 'import random, uuid, os; print(random.random()); print(uuid.uuid4()); print(os.urandom(16).hex())'
node -e 'const c = require("crypto"); console.log(c.randomUUID()); console.log(c.randomBytes(16).toString("hex"))'
if command -v openssl >/dev/null; then openssl rand -hex 16; else cat /proc/sys/kernel/random/uuid; fi`
)

// live is a process that runs when the snapshot is taken: it answers with the
// generation, and with what the kernel gives it.
const live = `exec python3 -c '
import http.server, os, secrets, uuid
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = " ".join([open("/run/cay/generation").read().strip(), os.urandom(16).hex(), secrets.token_hex(16), str(uuid.uuid4()), str(secrets.SystemRandom().random())]).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(("0.0.0.0", 8000), H).serve_forever()'`

// Twenty forks of one sandbox have nothing of their identity in common: neither
// what a new process finds, nor what one that was forked with the sandbox gets
// from its kernel, from the first request on.
func TestTwentyForks(t *testing.T) {
	server := program.Start(t, program.Options{})
	c := server.Client()
	s := c.Make(t, 10*time.Minute, nil)
	p, err := s.Start(t.Context(), "", live)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Leave(); err != nil {
		t.Fatal(err)
	}
	ask := func(s *program.Sandbox) ([]string, error) {
		resp, err := s.Request(t.Context(), http.MethodGet, 8000, "/", "", nil)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return strings.Fields(string(b)), err
	}
	var before []string
	program.Eventually(t, 30*time.Second, func() string {
		if before, err = ask(s); err != nil {
			return err.Error()
		}
		return ""
	})
	const forks = 20
	var out []struct {
		Sandbox *program.Sandbox
		Error   json.RawMessage
	}
	began := time.Now()
	if err := c.Call(t.Context(), "POST", "/sandboxes/"+s.ID+"/fork", map[string]any{"count": forks, "timeout": 300}, &out); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d forks took %v", forks, time.Since(began))
	seen := map[string]string{}
	own := func(id string, what ...string) {
		for _, w := range what {
			if other, twice := seen[w]; twice {
				t.Errorf("%s and %s share %q", other, id, w)
			}
			seen[w] = id
		}
	}
	look := func(s *program.Sandbox, script string, want int) {
		lines := strings.Fields(s.Out(t, script))
		if len(lines) != want {
			t.Fatalf("sandbox %s says %q of itself", s.ID, lines)
		}
		own(s.ID, append(lines, s.Token+script)...)
	}
	own(s.ID, before[1:]...)
	look(s, identity, 7)
	look(s, generators, 6)
	for i, f := range out {
		if f.Sandbox == nil {
			t.Errorf("a fork failed: %s", f.Error)
			continue
		}
		fork := c.Own(f.Sandbox)
		// The very first request to it.
		said, err := ask(fork)
		if err != nil || len(said) != len(before) {
			t.Errorf("fork %s: %q, %v", fork.ID, said, err)
			continue
		}
		if said[0] == before[0] {
			t.Errorf("fork %s has the generation of its source at its first request", fork.ID)
		}
		own(fork.ID, said[1:]...)
		look(fork, identity, 7)
		if i < program.Sized(5, forks) { // a second each
			look(fork, generators, 6)
		}
	}
}
