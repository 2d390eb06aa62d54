package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/api"
	"github.com/cayhq/cay/blob"
	"github.com/cayhq/cay/blob/file"
	"github.com/cayhq/cay/catalog/memory"
	"github.com/cayhq/cay/certificate"
	"github.com/cayhq/cay/disk"
	"github.com/cayhq/cay/doctor"
	"github.com/cayhq/cay/egress"
	"github.com/cayhq/cay/internal/keyring"
	"github.com/cayhq/cay/internal/meminfo"
	"github.com/cayhq/cay/internal/settings"
	"github.com/cayhq/cay/internal/wholefile"
	"github.com/cayhq/cay/network"
	"github.com/cayhq/cay/orchestrator"
	"github.com/cayhq/cay/proxy"
	"github.com/cayhq/cay/runtime/gvisor"
	"github.com/cayhq/cay/store/sqlite"
	"github.com/cayhq/cay/template"
)

// nodeID is the name of the only node of one machine.
const nodeID = cay.NodeID("local")

// baseTemplate is the template that a fresh data directory gets: the one the
// SDKs ask for when they are told none.
const baseTemplate = "base"

// host is what a data directory has on this machine: engine, networks, disks.
// `cay up` and `cay down` put it together in the same way.
type host struct {
	dir   dataDir
	log   *slog.Logger
	blobs *file.Store
	disks *disk.Disks
	nets  *network.Pool
	names *egress.Server
	rt    *gvisor.Runtime
	orch  *orchestrator.Orchestrator
}

// hostTag names this data directory in everything of the host that is not
// below it: namespaces, links, firewall tables, cgroups.
func hostTag(d dataDir) string {
	sum := sha256.Sum256([]byte(d))
	return hex.EncodeToString(sum[:])[:6]
}

func newHost(d dataDir, cfg settings.Settings, log *slog.Logger, streams orchestrator.Streams) *host {
	h := &host{dir: d, log: log}
	h.disks = &disk.Disks{Dir: d.path("disk"), Reserve: int64(cfg.DiskReserveMB) << 20, Ahead: 2, Log: log.With("part", "disk")}
	h.nets = &network.Pool{Tag: hostTag(d), NamespaceDir: "/run/netns", StateDir: "/run/cay", CIDR: cfg.SandboxCIDR,
		RefusalDir: d.path("run", "refused"), Refuse: cfg.RefusedRanges, Limits: network.Limits{Connections: cfg.Connections, PerSecond: cfg.NewConnections, Mbit: cfg.Mbit},
		Warm: 4, Log: log.With("part", "network")}
	h.names = newNames(d, cfg, h.nets, log)
	h.rt = gvisor.New(d.path("run", "gvisor"))
	h.rt.Args = []string{os.Args[0], "supervise", "--dir", d.path("run", "gvisor")}
	h.rt.Programs = d.path("engine")
	h.rt.Ahead = cfg.EnginesAhead
	h.rt.Log = log.With("part", "runtime")
	h.orch = &orchestrator.Orchestrator{
		Node: nodeID, Dir: d.path("run", "orchestrator"), PastDir: d.path("run", "past"), SnapshotDir: d.path("snapshots"),
		Runtime: h.rt, Engines: engineFiles{h.rt.Programs}, Slots: h.nets, Disks: h.disks,
		Catalog: memory.New(), Streams: streams, Names: h.names,
		PoolSize: cfg.PoolSize, MaxSandboxes: cfg.MaxSandboxes,
		MemoryAvailable: meminfo.Available,
		Log:             log.With("part", "orchestrator"),
		Fault:           killpoints(),
	}
	return h
}

// open brings up the parts, innermost first, and adopts what runs.
func (h *host) open(ctx context.Context) error {
	for _, dir := range []string{"run", "log", "work"} {
		if err := os.MkdirAll(h.dir.path(dir), 0o711); err != nil {
			return errDataDir(string(h.dir), err)
		}
	}
	blobs, err := file.Open(ctx, h.dir.path("blobs"))
	if err != nil {
		return err
	}
	h.blobs, h.orch.Builds = blobs, buildFiles{blobs}
	// Nothing here waits for the others, and the engine's supervisor and the
	// mounts take a moment each.
	var eg errgroup.Group
	undo := make([]func(context.Context) error, 3)
	for i, part := range []struct{ open, undo func(context.Context) error }{
		{h.openEngine, h.rt.Shutdown}, {h.nets.Open, h.nets.Destroy}, {h.disks.Open, h.disks.Release},
	} {
		eg.Go(func() error {
			err := part.open(ctx)
			if err == nil {
				undo[i] = part.undo
			}
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		if !h.hasGuests() {
			h.giveUp(ctx, undo...)
		}
		return err
	}
	if err := h.names.Open(ctx); err != nil {
		return err
	}
	return h.orch.Open(ctx)
}

// hasGuests reports whether a record of a guest is there, or may be: then what
// is on the machine may be in use.
func (h *host) hasGuests() bool {
	entries, err := os.ReadDir(h.orch.Dir)
	return err == nil && len(entries) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist)
}

// giveUpWithin bounds the cleaning after a start that failed.
const giveUpWithin = 20 * time.Second

// giveUp takes away what a start that failed has put on the machine.
func (h *host) giveUp(ctx context.Context, undo ...func(context.Context) error) {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), giveUpWithin)
	defer stop()
	for _, f := range undo {
		if f == nil {
			continue
		}
		if err := f(ctx); err != nil {
			h.log.Error("cleaning up after a start that failed", "error", err)
		}
	}
}

// close lets go of everything; guests stay.
func (h *host) close() error {
	err := errors.Join(h.orch.Close(), h.names.Close(), h.rt.Close(), h.nets.Close(), h.disks.Close())
	if h.blobs != nil {
		err = errors.Join(err, h.blobs.Close())
	}
	return err
}

// buildFiles finds the layers of builds in the artefact store.
type buildFiles struct{ blobs blob.Store }

// Open implements [orchestrator.Builds]. A build that is being verified has a
// candidate manifest; only the builder knows its ID.
func (b buildFiles) Open(ctx context.Context, id cay.BuildID) (cay.Manifest, []disk.Layer, error) {
	m, err := template.LoadCandidate(ctx, b.blobs, id)
	if err != nil {
		return cay.Manifest{}, nil, err
	}
	files, err := template.Files(ctx, b.blobs, m)
	if err != nil {
		return cay.Manifest{}, nil, err
	}
	layers := make([]disk.Layer, len(files))
	for i, f := range files {
		layers[i] = disk.Layer{Digest: f.Digest, File: f.Path}
	}
	return m, layers, nil
}

// server is `cay up`.
type server struct {
	cfg    settings.Settings
	rep    *reporter
	log    *slog.Logger
	dir    dataDir
	unlock func()
	creds  credentials
	info   serverInfo

	host  *host
	store *sqlite.Store
	keys  *keyring.Ring // of secrets
	api   *api.Server
	proxy *proxy.Server

	apiListener, proxyListener, tlsListener net.Listener // the last may be nil

	certificates certificate.Source // nil without a domain of our own

	run    *errgroup.Group
	cancel context.CancelFunc

	opened, ready bool // how far open got with the host
}

func newServer(cfg settings.Settings, errw io.Writer, rep *reporter) (*server, error) {
	log, err := newLogger(cfg, errw)
	if err != nil {
		return nil, err
	}
	return &server{cfg: cfg, rep: rep, log: log}, nil
}

// open starts everything. When it returns nil the server is ready: adopted
// sandboxes answer, and the base template is there.
func (s *server) open(ctx context.Context) (err error) {
	if s.dir, s.unlock, err = openDataDir(s.cfg.DataDir); err != nil {
		return err
	}
	if err := wholefile.Write(s.dir.pidFile(), []byte(strconv.Itoa(os.Getpid())+"\n"), 0o600); err != nil {
		return errDataDir(string(s.dir), err)
	}
	// The ports before anything that takes time: a taken one is the most
	// frequent reason for a start that cannot work.
	if s.apiListener, err = listen("api", "--api-addr", s.cfg.APIAddr); err != nil {
		return err
	}
	if s.proxyListener, err = listen("proxy", "--proxy-addr", s.cfg.ProxyAddr); err != nil {
		return err
	}
	if s.cfg.Certificates != certificatesOff {
		if s.tlsListener, err = listen("HTTPS", "--tls-addr", s.cfg.TLSAddr); err != nil {
			return err
		}
	}
	if s.creds, err = s.dir.loadCredentials(); err != nil {
		return err
	}
	s.info = serverInfo{PID: os.Getpid(), Version: cay.Version, StartedAt: time.Now().UTC(),
		APIURL: "http://" + s.apiListener.Addr().String(), ProxyURL: "http://" + s.proxyListener.Addr().String()}

	s.proxy = &proxy.Server{Domain: s.cfg.Domain, MaxConns: s.cfg.MaxConns, MaxPerClient: s.cfg.MaxPerClient,
		Log: s.log.With("part", "proxy")}
	s.host = newHost(s.dir, s.cfg, s.log, s.proxy)
	if s.host.orch.Envd, err = envdForGuests(); err != nil {
		return err
	}
	s.proxy.Catalog = s.host.orch.Catalog
	s.proxy.ResolveSignature = signatures{seed: cay.Secret(s.creds.Seed), list: s.host.orch.List}.resolve
	if s.store, err = openStore(ctx, s.dir); err != nil {
		return err
	}
	// Adopted guests may need one at once.
	if s.keys, err = keyring.Open(s.dir.keysFile(), time.Now); err != nil {
		return err
	}
	s.host.names.Secret = api.Secrets{Store: s.store, Sealer: s.keys}.Value
	s.host.orch.TeamLimits = s.networkLimits
	if err := s.host.open(ctx); err != nil {
		return err
	}
	s.opened = true
	if err := ensureTeam(ctx, s.store, s.creds); err != nil {
		return err
	}
	s.api = newAPI(s)
	s.proxy.Wake = waker(s.api)
	if err := s.openEdge(ctx); err != nil {
		return err
	}

	// Background work ends with close, not with the start's context.
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.cancel = cancel
	s.run, run = errgroup.WithContext(run)
	s.run.Go(func() error { return s.proxy.Serve(run, s.proxyListener, s.tlsListener) })
	s.run.Go(func() error { return s.api.Run(run) })
	s.run.Go(func() error { return s.api.Serve(run, s.apiListener) })

	if err := s.ensureTemplate(ctx); err != nil {
		return err
	}
	if err := s.publishInfo(); err != nil {
		return err
	}
	s.ready = true
	return nil
}

// networkLimits returns what a team's sandboxes may do together; one of a team
// that is gone may do what each may.
func (s *server) networkLimits(ctx context.Context, id cay.TeamID) (cay.NetworkLimits, error) {
	t, err := s.store.Team(ctx, id)
	if cay.CodeOf(err) == cay.CodeNotFound {
		return cay.NetworkLimits{}, nil
	}
	return t.Limits.Network, err
}

// wait returns when ctx ends or a part of the server fails.
func (s *server) wait(ctx context.Context) error {
	failed := make(chan error, 1)
	go func() { failed <- s.run.Wait() }()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-failed:
		return err
	}
}

// close stops serving and lets go of the sandboxes, which stay. It may be
// called after a failed open.
func (s *server) close() {
	if s.cancel != nil {
		s.cancel()
		if err := s.run.Wait(); err != nil && !errors.Is(err, context.Canceled) {
			s.log.Error("a part of the server ended with an error", "error", err)
		}
	}
	if s.host != nil {
		if s.opened && !s.ready {
			s.abandon()
		}
		if err := s.host.close(); err != nil {
			s.log.Error("letting go of the host", "error", err)
		}
	}
	if s.store != nil {
		if err := s.store.Close(); err != nil {
			s.log.Error("closing the store", "error", err)
		}
	}
	if s.certificates != nil {
		if err := s.certificates.Close(); err != nil {
			s.log.Error("closing the certificates", "error", err)
		}
	}
	for _, l := range []net.Listener{s.apiListener, s.proxyListener, s.tlsListener} {
		if l != nil {
			_ = l.Close() // closed already when it was served
		}
	}
	if s.unlock != nil {
		_ = os.Remove(s.dir.serverFile()) // stale information is worse than none, and a missing file is fine
		_ = os.Remove(s.dir.pidFile())
		s.unlock()
	}
}

// abandon takes everything off the machine after a start that failed, unless
// sandboxes of an earlier run are there.
func (s *server) abandon() {
	if boxes, err := s.host.orch.List(context.Background()); err != nil || len(boxes) > 0 {
		return
	}
	s.host.giveUp(context.Background(), func(ctx context.Context) error {
		_, err := s.host.shutdown(ctx)
		return err
	})
}

// listen opens a port, or says who has it.
func listen(what, flag, addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err == nil {
		return l, nil
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		who := "another process"
		detail := map[string]string{"address": addr}
		if pid, cmd, ok := doctor.PortHolder(addr); ok {
			who = fmt.Sprintf("process %d (%s)", pid, cmd)
			detail["pid"] = strconv.Itoa(pid)
		}
		return nil, &cay.Error{Code: cay.CodePortTaken, Layer: cay.LayerHost,
			Message: fmt.Sprintf("the address %s for the %s is taken by %s", addr, what, who),
			Fix:     fmt.Sprintf("stop that process, or choose another address with %s (port 0 picks a free one)", flag),
			Detail:  detail, Err: err}
	}
	return nil, &cay.Error{Code: cay.CodeConfigInvalid, Layer: cay.LayerHost,
		Message: fmt.Sprintf("cannot listen on %s for the %s: %v", addr, what, err),
		Fix:     "give " + flag + " an address of this machine, such as 127.0.0.1:3000", Err: err}
}
