package envd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// settings is what the node told envd at init.
type settings struct {
	env        map[string]string // never changed in place
	token      string
	user       string
	workdir    string
	lifecycle  string
	generation string
	// control and instance are PID 1's at first; a restored memory is told
	// those of the guest it has become.
	control, instance string

	timestamp time.Time // the node's clock at the last init
	anchor    time.Time // the monotonic clock then
}

func (s *Server) settings() settings {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state
}

// initRequest is the body of POST /init: E2B's fields and those of Cay's.
type initRequest struct {
	EnvVars        map[string]string `json:"envVars"`
	AccessToken    string            `json:"accessToken"`
	Timestamp      *time.Time        `json:"timestamp"`
	DefaultUser    string            `json:"defaultUser"`
	DefaultWorkdir string            `json:"defaultWorkdir"`
	LifecycleID    string            `json:"lifecycleID"`
	Hostname       string            `json:"hostname"`
	Generation     string            `json:"generation"`
	Instance       string            `json:"instance"`
	ControlToken   string            `json:"controlToken"`
	CABundle       string            `json:"caBundle"`
	VolumeMounts   []json.RawMessage `json:"volumeMounts"`
}

// maxInit bounds the body of /init.
const maxInit = 4 << 20

// Control returns the handler of the control listener.
func (s *Server) Control() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if token := s.settings().control; token == "" || !sameSecret(r.Header.Get(headerControl), token) {
			writeError(w, http.StatusUnauthorized, "the control token is missing or wrong")
			return
		}
		switch r.URL.Path {
		case "/health":
			w.WriteHeader(http.StatusNoContent)
		case "/identity":
			if allow(w, r, http.MethodGet) {
				s.identity(w)
			}
		case "/init":
			if allow(w, r, http.MethodPost) {
				s.initialise(w, r)
			}
		case "/trust":
			if allow(w, r, http.MethodPost) {
				s.serveTrust(w, r)
			}
		case "/upgrade":
			if allow(w, r, http.MethodPost) {
				s.upgrade(w, r)
			}
		case "/freeze", "/fsfreeze":
			if allow(w, r, http.MethodPost) {
				s.freeze(w, true)
			}
		case "/unfreeze", "/fsthaw":
			if allow(w, r, http.MethodPost) {
				s.freeze(w, false)
			}
		case "/collapse":
			// Upstream gives memory back before a snapshot.
			if allow(w, r, http.MethodPost) {
				unix.Sync()
				w.WriteHeader(http.StatusNoContent)
			}
		default:
			writeError(w, http.StatusNotFound, "no such control route: "+r.URL.Path)
		}
	})
}

func (s *Server) identity(w http.ResponseWriter) {
	digest, err := s.envdDigest()
	if err != nil {
		writeFault(w, err)
		return
	}
	writeJSON(w, http.StatusOK, struct {
		Build       string `json:"build"`
		Instance    string `json:"instance"`
		EnvdVersion string `json:"envdVersion"`
		EnvdDigest  string `json:"envdDigest"`
		Generation  string `json:"generation"`
		// Which of the envds it is, and whether it makes room for another.
		PID       int  `json:"pid"`
		Replacing bool `json:"replacing"`
	}{s.cfg.Build, s.settings().instance, Version, digest, s.settings().generation, os.Getpid(), s.replacing.Load()})
}

func (s *Server) initialise(w http.ResponseWriter, r *http.Request) {
	var q initRequest
	if err := decodeInit(r, &q); err != nil {
		writeError(w, http.StatusBadRequest, "the body of /init is not valid: "+err.Error())
		return
	}
	if len(q.VolumeMounts) > 0 {
		writeError(w, http.StatusBadRequest, "volume mounts are not supported by this sandbox's runtime")
		return
	}
	if err := s.apply(r.Context(), q); err != nil {
		writeFault(w, err)
		return
	}
	w.Header().Set("X-Envd-Version", Version)
	w.WriteHeader(http.StatusNoContent)
}

// decodeInit reads a body, which may be empty.
func decodeInit(r *http.Request, into any) error {
	if err := json.NewDecoder(io.LimitReader(r.Body, maxInit)).Decode(into); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// apply takes over a configuration, unless a newer one is there.
func (s *Server) apply(ctx context.Context, q initRequest) error {
	for k, v := range q.EnvVars {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.IndexByte(v, 0) >= 0 {
			return invalid("environment variable %q has a name or value that no process can have", k)
		}
	}
	s.mu.Lock()
	// What is older than the last one is late, unless it is for the guest that
	// this memory has just become: a clock that was set back must not keep it
	// from learning that.
	sameGuest := q.Instance == "" || q.Instance == s.state.instance
	if sameGuest && q.Timestamp != nil && q.Timestamp.Before(s.state.timestamp) {
		s.mu.Unlock()
		return nil
	}
	st := s.state
	st.token = q.AccessToken
	st.env = maps.Clone(st.env)
	maps.Copy(st.env, q.EnvVars)
	if q.DefaultUser != "" {
		st.user = q.DefaultUser
	}
	if q.DefaultWorkdir != "" {
		st.workdir = q.DefaultWorkdir
	}
	if q.LifecycleID != "" {
		st.lifecycle = q.LifecycleID
	}
	if q.Instance != "" {
		st.instance = q.Instance
	}
	if q.ControlToken != "" {
		st.control = q.ControlToken
	}
	changed := q.Generation != "" && q.Generation != st.generation
	if changed {
		st.generation = q.Generation
	}
	if q.Timestamp != nil {
		st.timestamp, st.anchor = *q.Timestamp, time.Now()
	}
	s.state = st
	err := s.keep()
	s.mu.Unlock()
	if err != nil {
		return err
	}

	if s.cfg.System {
		s.setSystem(q)
	}
	if q.CABundle != "" {
		if err := s.trustAuthority(q.CABundle); err != nil {
			return err
		}
	}
	s.writeMarks(st)
	if changed {
		return s.newGeneration(ctx, st.generation)
	}
	return nil
}

// Limits by which the guest's clock may differ from the node's before it is
// set: E2B's own, wide forward because the call itself takes time.
const (
	clockBehind = 5 * time.Second
	clockAhead  = 50 * time.Millisecond
)

// setSystem gives the guest its name and the time. Both may be impossible
// (gVisor refuses to set clocks and keeps them right itself), so a refusal is
// only noted.
func (s *Server) setSystem(q initRequest) {
	if q.Timestamp != nil {
		if d := q.Timestamp.Sub(s.now()); d < -clockAhead || d > clockBehind {
			ts := unix.NsecToTimespec(q.Timestamp.UnixNano())
			if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
				s.log.Debug("the clock stays as it is", "off", d, "err", err)
			}
		}
	}
	if q.Hostname == "" || strings.ContainsAny(q.Hostname, "\x00\n /") || len(q.Hostname) > 64 {
		return
	}
	// The name on disk is that of the sandbox whose disk this was: it tells a
	// fork, which must not be taken for its source, from a sandbox that starts
	// again.
	if was, err := os.ReadFile("/etc/hostname"); err != nil || strings.TrimSpace(string(was)) != q.Hostname {
		if err := newMachineID("/etc/machine-id"); err != nil {
			s.log.Warn("the machine ID stays as it is", "err", err)
		}
	}
	if err := unix.Sethostname([]byte(q.Hostname)); err != nil {
		s.log.Debug("the host name stays as it is", "err", err)
		return
	}
	if err := os.WriteFile("/etc/hostname", []byte(q.Hostname+"\n"), 0o644); err != nil {
		s.log.Debug("writing /etc/hostname", "err", err)
	}
	// sudo and others look their own host up; without a line they wait for DNS.
	hosts, err := os.ReadFile("/etc/hosts")
	line := "127.0.1.1\t" + q.Hostname
	if (err == nil || os.IsNotExist(err)) && len(hosts) < 1<<20 && !strings.Contains(string(hosts)+"\n", line+"\n") {
		text := string(hosts)
		if text != "" && !strings.HasSuffix(text, "\n") {
			text += "\n"
		}
		if !strings.Contains(text, "localhost") {
			text += "127.0.0.1\tlocalhost\n::1\tlocalhost\n"
		}
		if err := os.WriteFile("/etc/hosts", []byte(text+line+"\n"), 0o644); err != nil {
			s.log.Debug("writing /etc/hosts", "err", err)
		}
	}
}

// newMachineID writes a fresh ID, as machine-id(5) has it. It is written in
// place: another file may be a link to it.
func newMachineID(path string) error {
	id := make([]byte, 16)
	rand.Read(id)
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // a UUID of version 4
	return os.WriteFile(path, []byte(hex.EncodeToString(id)+"\n"), 0o444)
}

// writeMarks leaves the sandbox's identity where programs without envd's
// environment look for it: one file per E2B_ variable, as upstream does.
func (s *Server) writeMarks(st settings) {
	dir := filepath.Join(filepath.Dir(s.cfg.RunDir), "e2b")
	for k, v := range st.env {
		if !strings.HasPrefix(k, "E2B_") || strings.Contains(k, "/") {
			continue
		}
		err := os.MkdirAll(dir, 0o755)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "."+k), []byte(v), 0o644)
		}
		if err != nil {
			s.log.Debug("marking the sandbox", "err", err)
			return
		}
	}
}

// hookTime is how long a generation's hook may hold up the first request.
const hookTime = 5 * time.Second

// newGeneration tells the guest that it is another one than before: its file
// is rewritten in place, so that a watch on the file itself sees it, and the
// hook runs. It returns before the node lets requests in.
func (s *Server) newGeneration(ctx context.Context, g string) error {
	if err := os.MkdirAll(s.cfg.RunDir, 0o755); err != nil {
		return fmt.Errorf("making the directory of the generation file: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(s.cfg.RunDir, "generation"), os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return fmt.Errorf("opening the generation file: %w", err)
	}
	_, err = f.WriteString(g + "\n")
	err = errors.Join(err, f.Truncate(int64(len(g)+1)), f.Close())
	if err != nil {
		return fmt.Errorf("writing the generation file: %w", err)
	}
	if st, err := os.Stat(s.cfg.Hook); err != nil || st.Mode()&0o111 == 0 || st.IsDir() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, hookTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.cfg.Hook, g)
	cmd.Env = []string{"PATH=" + daemonPath(), "HOME=/root", "USER=root", "LOGNAME=root", "CAY_GENERATION=" + g}
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		// A broken hook of the guest's owner must not make the sandbox useless.
		s.log.Warn("the generation hook failed", "err", err, "output", string(out[:min(len(out), 512)]))
	}
	return nil
}

// freeze stops or continues the processes of users around a snapshot, where
// the kernel can (cgroup v2). Under gVisor it cannot and need not: a
// checkpoint there stops every task at one instant.
func (s *Server) freeze(w http.ResponseWriter, on bool) {
	v := "0"
	if on {
		unix.Sync()
		v = "1"
	}
	done := false
	if s.cfg.Cgroup != "" {
		done = os.WriteFile(filepath.Join(s.cfg.Cgroup, "cgroup.freeze"), []byte(v), 0) == nil
	}
	w.Header().Set("X-Cay-Frozen", fmt.Sprint(done && on))
	w.WriteHeader(http.StatusNoContent)
}
