package crash

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/disk"
	"github.com/cayhq/cay/network"
	"github.com/cayhq/cay/orchestrator"
	"github.com/cayhq/cay/runtime"
	"github.com/cayhq/cay/runtime/runtimetest"
)

// host is a machine of files: engine, disks, networks and guests. Everything of
// it that matters is below dir, so that it outlives the process.
type host struct {
	dir    string
	engine *runtimetest.Fake
	faults *faults

	mu   sync.Mutex
	held map[int]bool // slots of this process
}

func newHost(dir string, f *faults) (*host, error) {
	h := &host{dir: dir, faults: f, held: map[int]bool{}}
	if err := os.RemoveAll(filepath.Join(dir, "clones")); err != nil { // halves, of which nobody knows
		return nil, err
	}
	for _, d := range []string{"engine", "disks", "clones", "saved", "slots"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, err
		}
	}
	h.engine = &runtimetest.Fake{Machine: &runtimetest.Machine{Dir: filepath.Join(dir, "engine")},
		OnCreate: func(context.Context, runtime.Spec) error { return f.typed("engine.create") },
		OnStart: func(_ context.Context, id runtime.InstanceID) error {
			g := h.engine.Guest(id)
			m := memory{Envd: buildEnvd, Life: 1}
			for _, kv := range g.Spec.Env {
				k, v, _ := strings.Cut(kv, "=")
				switch k {
				case "CAY_CONTROL_TOKEN":
					m.Token = v
				case "CAY_INSTANCE":
					m.Instance = v
				}
			}
			h.remember(g, m)
			return f.typed("engine.start")
		},
		OnFreeze:     func(context.Context, runtime.InstanceID) error { return f.typed("engine.freeze") },
		OnCheckpoint: func(context.Context, runtime.InstanceID, string) error { return f.typed("engine.checkpoint") },
		OnRestore:    func(context.Context, runtime.InstanceID, string) error { return f.typed("engine.restore") },
	}
	return h, h.engine.Open(context.Background())
}

// memory is what a guest has in its memory.
type memory struct {
	Token, Instance, Value string
	Envd                   cay.Digest
	Life                   int // of envds
}

// Digests of the envd of the build, and of the server's own.
const buildEnvd, serverEnvd = cay.Digest("sha256:e"), cay.Digest("sha256:f")

func (h *host) remember(g *runtimetest.Guest, m memory) {
	b, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	g.SetMemory(string(b))
}

func recall(g *runtimetest.Guest) (m memory) {
	_ = json.Unmarshal([]byte(g.Memory()), &m) // empty before its start
	return m
}

// guestAt finds the guest in a network slot.
func (h *host) guestAt(a netip.Addr) *runtimetest.Guest {
	all, err := h.engine.Instances(context.Background())
	if err != nil {
		panic(err)
	}
	for _, in := range all {
		if g := h.engine.Guest(in.ID); g != nil && g.Spec.NetNS == a.String() {
			return g
		}
	}
	return nil
}

// inside is the control channel of the guests.
type inside struct{ *host }

var errNoGuest = errors.New("no guest has this address, or the token")

func (g inside) find(a orchestrator.GuestAddr) (*runtimetest.Guest, memory, error) {
	in := g.guestAt(a.Addr)
	if in == nil {
		return nil, memory{}, errNoGuest
	}
	m := recall(in)
	if m.Token != a.Token.Reveal() {
		return nil, memory{}, errNoGuest
	}
	return in, m, nil
}

func (g inside) Identity(_ context.Context, a orchestrator.GuestAddr) (orchestrator.GuestIdentity, error) {
	_, m, err := g.find(a)
	return orchestrator.GuestIdentity{Build: theBuild, Instance: m.Instance, EnvdVersion: "0.6.13", EnvdDigest: m.Envd, PID: 10 + m.Life}, err
}

func (g inside) Init(_ context.Context, a orchestrator.GuestAddr, c orchestrator.GuestConfig) error {
	in, m, err := g.find(a)
	if err != nil {
		return err
	}
	m.Token, m.Instance = c.ControlToken, c.Instance
	g.remember(in, m)
	return nil
}

func (g inside) Trust(_ context.Context, a orchestrator.GuestAddr, _ string) error {
	_, _, err := g.find(a)
	return err
}

func (g inside) Upgrade(_ context.Context, a orchestrator.GuestAddr, _ []byte, digest cay.Digest) error {
	in, m, err := g.find(a)
	if err != nil {
		return err
	}
	m.Envd, m.Life = digest, m.Life+1
	g.remember(in, m)
	return nil
}

func (g inside) Sync(_ context.Context, a orchestrator.GuestAddr) error {
	_, _, err := g.find(a)
	return err
}

// disks are files of one word each.
type disks struct{ *host }

func (d disks) file(id string) string  { return filepath.Join(d.dir, "disks", id) }
func (d disks) saved(id string) string { return filepath.Join(d.dir, "saved", id) }

func replace(path string, b []byte) error {
	return errors.Join(os.WriteFile(path+".tmp", b, 0o600), os.Rename(path+".tmp", path))
}

func (d disks) Create(_ context.Context, s disk.Spec) (disk.Root, error) {
	if err := d.faults.typed("disk.create"); err != nil {
		return disk.Root{}, err
	}
	var content []byte
	if s.From != "" {
		b, err := os.ReadFile(d.saved(s.From))
		if err != nil {
			return disk.Root{}, err
		}
		content = b
	}
	return disk.Root{Path: "/" + s.ID, Image: d.file(s.ID)}, replace(d.file(s.ID), content)
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func list(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out, err
}

func (d disks) Remove(_ context.Context, id string) error {
	return errors.Join(d.faults.typed("disk.remove"), remove(d.file(id)))
}
func (d disks) List(context.Context) ([]string, error) { return list(filepath.Join(d.dir, "disks")) }
func (d disks) Usage(string) (used, total int64, err error) {
	return 1, 2, nil
}
func (d disks) Flush(string) error       { return d.faults.typed("disk.flush") }
func (d disks) clone(name string) string { return filepath.Join(d.dir, "clones", name) }
func (d disks) Clone(_ context.Context, id, name string) error {
	if err := d.faults.typed("disk.save"); err != nil {
		return err
	}
	b, err := os.ReadFile(d.file(id))
	if err == nil {
		err = replace(d.clone(name), b)
	}
	return err
}
func (d disks) Keep(_ context.Context, name string, _ bool) (disk.Saved, error) {
	err := d.faults.typed("disk.keep")
	if err == nil {
		err = os.Rename(d.clone(name), d.saved(name))
	}
	if err != nil {
		return disk.Saved{}, err
	}
	return d.FindSaved(name)
}
func (d disks) Receive(context.Context, string, func(*os.File) error) (disk.Saved, error) {
	return disk.Saved{}, errors.ErrUnsupported // nothing is imported here
}
func (d disks) FindSaved(name string) (disk.Saved, error) {
	fi, err := os.Stat(d.saved(name))
	if err != nil {
		return disk.Saved{}, err
	}
	return disk.Saved{File: d.saved(name), SizeBytes: fi.Size()}, nil
}
func (d disks) RemoveSaved(_ context.Context, name string) error {
	return errors.Join(d.faults.typed("disk.remove-saved"), remove(d.clone(name)), remove(d.saved(name)))
}
func (d disks) ListSaved(context.Context) ([]string, error) {
	return list(filepath.Join(d.dir, "saved"))
}

// slots are empty files. The address of one names its guest.
type slots struct{ *host }

func (s slots) file(i int) string { return filepath.Join(s.dir, "slots", strconv.Itoa(i)) }

func slot(i int) network.Slot {
	a := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
	return network.Slot{Index: i, Addr: a, NetNS: a.String()}
}

func (slots) LimitTeam(context.Context, cay.TeamID, cay.NetworkLimits, ...int) error { return nil }

func (s slots) Acquire(context.Context, cay.Egress) (network.Slot, error) {
	if err := s.faults.typed("network.acquire"); err != nil {
		return network.Slot{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := 0; ; i++ {
		f, err := os.OpenFile(s.file(i), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return network.Slot{}, err
		}
		s.held[i] = true
		return slot(i), f.Close()
	}
}

func (s slots) Adopt(_ context.Context, i int) (network.Slot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := os.Stat(s.file(i)); err != nil {
		return network.Slot{}, err
	}
	s.held[i] = true
	return slot(i), nil
}

func (s slots) Release(_ context.Context, i int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.held, i)
	return remove(s.file(i))
}

func (s slots) Sweep(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	names, err := list(filepath.Join(s.dir, "slots"))
	for _, n := range names {
		if i, aerr := strconv.Atoi(n); aerr == nil && !s.held[i] {
			err = errors.Join(err, remove(s.file(i)))
		}
	}
	return err
}

func (s slots) SetPolicy(context.Context, int, cay.Egress) error { return nil }
func (s slots) Divert(context.Context, int) (network.Diverted, error) {
	return network.Diverted{}, errors.ErrUnsupported
}
func (s slots) Dial(context.Context, int, netip.AddrPort) (net.Conn, error) {
	return nil, errors.ErrUnsupported
}
func (s slots) Refusals(context.Context, int, uint64) ([]cay.EgressRefusal, error) { return nil, nil }
func (s slots) NoteRefusal(int, cay.EgressRefusal)                                 {}

// theBuild is the only build there is.
const theBuild = cay.BuildID("b1")

type builds struct{}

func (builds) Open(context.Context, cay.BuildID) (cay.Manifest, []disk.Layer, error) {
	return cay.Manifest{Build: theBuild, Init: "/init", Envd: "sha256:e", EnvdVersion: "0.6.13"}, nil, nil
}

// faults is where the process dies, and what fails.
type faults struct {
	known map[string]bool

	mu    sync.Mutex
	kill  string
	fails map[string]syscall.Errno
	hits  map[string]bool
}

// point is the hook of package killpoint.
func (f *faults) point(name string) error {
	if !f.known[name] {
		panic(fmt.Sprintf("the point %q is not in killpoint.Points", name))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hits[name] = true
	if f.kill == name {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // the signal is on its way
	}
	if e, ok := f.fails[name]; ok {
		return e
	}
	return nil
}

// typed is the error of an operation of the host, as its adapter would have it.
func (f *faults) typed(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hits[name] = true
	switch e := f.fails[name]; {
	case e == 0:
		return nil
	case e == syscall.ENOSPC:
		return &cay.Error{Code: cay.CodeDiskFull, Layer: cay.LayerStorage, Message: "no room is left", Fix: "free some", Err: e}
	case strings.HasPrefix(name, "engine."):
		return &cay.Error{Code: cay.CodeEngineFailed, Layer: cay.LayerRuntime, Message: "the engine met an error", Fix: "try again", Err: e}
	case strings.HasPrefix(name, "store."):
		return &cay.Error{Code: cay.CodeStoreUnavailable, Layer: cay.LayerStorage, Message: "the database met an error", Fix: "try again", Err: e}
	default:
		return &cay.Error{Code: cay.CodeDiskUnavailable, Layer: cay.LayerStorage, Message: "the disk met an error", Fix: "try again", Err: e}
	}
}
