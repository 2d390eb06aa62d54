// Package envd is the daemon inside every sandbox: it runs processes, serves
// files, watches directories and makes services on the guest's loopback
// reachable, over the protocol that the E2B clients speak.
//
// It has two listeners. The public one carries the contract and is reachable
// by everybody whom the proxy lets through; when a token is set, requests need
// it. The control one belongs to the node alone: each request carries the
// guest's control token, and only there are the routes that configure the
// guest. DESIGN.md says how users, uploads, output and time are handled.
package envd

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Version is what envd reports: the newest upstream version whose clients'
// feature gates all hold here (docs/compatibility.md has the table).
const Version = "0.6.13"

// Ports of envd. Port is the E2B contract's; ControlPort is Cay's own.
const (
	Port        = 49983
	ControlPort = 49982
)

// idleTimeout is how long a connection may be silent between requests. It is
// longer than any proxy's in front of us, so that the proxy closes first.
const idleTimeout = 640 * time.Second

// releaseAfter is how long after the last request memory is given back.
const releaseAfter = 3 * time.Second

// Config is what a [Server] needs to know. The zero value of a field means
// what its comment says.
type Config struct {
	Log *slog.Logger     // nil: silent
	Now func() time.Time // nil: the guest's clock

	// ControlToken guards the control listener; empty closes it to everybody.
	ControlToken string
	// Build and Instance are the identity the node gave to PID 1.
	Build, Instance string

	PasswdFile string // empty: /etc/passwd
	GroupFile  string // empty: /etc/group
	// RunDir holds the generation file. Empty: /run/cay.
	RunDir string
	// Hook is run as root when the generation changes. Empty:
	// /etc/cay/hooks/generation.
	Hook string
	// Cgroup is the cgroup v2 directory that processes of users are started
	// in; missing or empty: that of envd.
	Cgroup string
	// State is an empty file that outlives the daemon and is handed to the next
	// one, which then goes on with the same configuration. It holds the access
	// token: only the system may be able to open it. nil: nothing is kept.
	State *os.File
	// Keeper is a socket to PID 1, which holds for the next envd what processes
	// are connected to. nil: nobody does.
	Keeper *os.File
	// System says that the machine is a guest, which envd may change: its host
	// name, its clock, and which of its loopback's ports others reach. On a
	// machine of somebody's own, and in tests, it is left out.
	System bool
}

// Server is the daemon. Its methods may be called at the same time.
type Server struct {
	cfg      Config
	log      *slog.Logger
	now      func() time.Time
	users    *users
	procs    *processes
	watchers *watchers
	cpu      cpuMeter

	mu    sync.RWMutex
	state settings

	inFlight  atomic.Int64
	transfers atomic.Int64 // of them, files on their way
	replace   context.CancelFunc
	replacing atomic.Bool // another program is in this one's place
	relMu     sync.Mutex
	release   *time.Timer

	digestOnce sync.Once
	digest     string
	digestErr  error
}

// New returns a server that has not touched anything yet.
func New(c Config) *Server {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.PasswdFile == "" {
		c.PasswdFile = "/etc/passwd"
	}
	if c.GroupFile == "" {
		c.GroupFile = "/etc/group"
	}
	if c.RunDir == "" {
		c.RunDir = "/run/cay"
	}
	if c.Hook == "" {
		c.Hook = "/etc/cay/hooks/generation"
	}
	s := &Server{
		cfg:   c,
		log:   c.Log,
		now:   c.Now,
		users: &users{passwdFile: c.PasswdFile, groupFile: c.GroupFile},
		state: settings{env: map[string]string{"E2B_SANDBOX": "true"}, user: "root", control: c.ControlToken, instance: c.Instance},
	}
	s.procs = newProcesses(c.Log)
	s.watchers = newWatchers()
	return s
}

// Run serves both listeners until ctx ends, and closes them. Processes that
// were started go on.
func (s *Server) Run(ctx context.Context, public, control net.Listener) error {
	// Files are made with the modes the contract names, and nobody may look
	// into the memory of a daemon that holds tokens.
	syscall.Umask(0o022)
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		s.log.Warn("memory of envd stays readable for root's tools", "err", err)
	}
	s.recall()
	if s.cfg.Keeper != nil {
		if err := s.inherit(); err != nil {
			s.log.Error("processes of the envd before, and those of this one, are lost with it", "err", err)
		}
	}
	ctx, s.replace = context.WithCancel(ctx)
	defer s.replace()
	if s.cfg.Cgroup != "" {
		s.procs.openCgroup(s.cfg.Cgroup)
	}
	servers := []*http.Server{s.httpServer(s.Public()), s.httpServer(s.Control())}
	var wg sync.WaitGroup
	errs := make(chan error, len(servers))
	for i, l := range []net.Listener{public, control} {
		wg.Go(func() {
			if err := servers[i].Serve(l); !errors.Is(err, http.ErrServerClosed) {
				errs <- fmt.Errorf("serving %s: %w", l.Addr(), err)
			}
		})
	}
	s.procs.keeper.tell(isUp, 0, nil)
	fctx, stop := context.WithCancel(ctx)
	if s.cfg.System {
		fw := forwarder{log: s.log, procs: s.procs, proc: "/proc"}
		wg.Go(func() { fw.run(fctx) })
	}

	var err error
	select {
	case <-ctx.Done():
	case err = <-errs:
	}
	if err == nil && s.procs.keeper != nil {
		s.leave(servers)
	}
	stop()
	for _, h := range servers {
		h.Close()
	}
	s.Close()
	wg.Wait()
	return err
}

// inherit takes over the processes of the envd before this one.
func (s *Server) inherit() error {
	k, err := openKeeper(s.cfg.Keeper)
	if err != nil {
		return err
	}
	s.procs.keeper = k
	other := func(m packet) error { return s.watchers.takeOver(s, m) }
	if err := s.procs.takeOver(k, other); err != nil {
		s.procs.keeper = nil
		return err
	}
	return nil
}

// Close ends the watchers and forgets the processes, which live on. It may be
// called twice.
func (s *Server) Close() error {
	s.watchers.closeAll()
	s.procs.close()
	s.relMu.Lock()
	defer s.relMu.Unlock()
	if s.release != nil {
		s.release.Stop()
	}
	return nil
}

func (s *Server) httpServer(h http.Handler) *http.Server {
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler:           s.track(h),
		Protocols:         &p,
		IdleTimeout:       idleTimeout,
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}

// track gives memory back to the system once requests have ceased: an idle
// sandbox should cost what it cost before it worked.
func (s *Server) track(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.inFlight.Add(1)
		defer func() {
			if s.inFlight.Add(-1) > 0 {
				return
			}
			s.relMu.Lock()
			defer s.relMu.Unlock()
			if s.release == nil {
				s.release = time.AfterFunc(releaseAfter, func() {
					if s.inFlight.Load() == 0 {
						debug.FreeOSMemory()
					}
				})
			} else {
				s.release.Reset(releaseAfter)
			}
		}()
		h.ServeHTTP(w, r)
	})
}

// envdDigest is the SHA-256 of the running program, "sha256:…".
//
// The node asks for it before anything else, and to read all of the program
// takes tens of milliseconds. So the image that has the program has the sum
// beside it, and that is taken where both are as they were laid there.
func (s *Server) envdDigest() (string, error) {
	s.digestOnce.Do(func() {
		if path, err := os.Executable(); err == nil {
			if sum, ok := laidSum(path); ok {
				s.digest = digestPrefix + sum
				return
			}
		}
		f, err := os.Open("/proc/self/exe")
		if err != nil {
			s.digestErr = fmt.Errorf("opening envd's own binary: %w", err)
			return
		}
		defer f.Close()
		h := sha256.New()
		// Each read is a call out of the guest; the struct hides the file's own
		// way of copying, which reads 32 KiB at a time.
		if _, err := io.CopyBuffer(h, struct{ io.Reader }{f}, make([]byte, 128<<10)); err != nil {
			s.digestErr = fmt.Errorf("reading envd's own binary: %w", err)
			return
		}
		s.digest = digestPrefix + hex.EncodeToString(h.Sum(nil))
	})
	return s.digest, s.digestErr
}

const (
	digestPrefix = "sha256:"
	sumSuffix    = ".sha256"
)

// laidSum reads the sum that an image has beside a program, a line as of
// sha256sum(1). It stands for the program only while both have the time that
// the maker of the image gave to all of it: one that was changed since has
// another.
func laidSum(program string) (string, bool) {
	text, err := os.ReadFile(program + sumSuffix)
	if err != nil || len(text) > 512 {
		return "", false
	}
	sum, _, _ := strings.Cut(string(text), " ")
	if b, err := hex.DecodeString(sum); err != nil || len(b) != sha256.Size {
		return "", false
	}
	var is, laid syscall.Stat_t
	if syscall.Stat(program, &is) != nil || syscall.Stat(program+sumSuffix, &laid) != nil || is.Mtim != laid.Mtim {
		return "", false
	}
	return sum, true
}

// sameSecret compares without telling by its duration where two texts differ.
func sameSecret(got, want string) bool {
	return subtle.ConstantTimeCompare([]byte(got), []byte(want)) == 1
}
