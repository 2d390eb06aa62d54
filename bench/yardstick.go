package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/blob/file"
	"github.com/cayhq/cay/disk"
	"github.com/cayhq/cay/network"
	"github.com/cayhq/cay/runtime"
	"github.com/cayhq/cay/runtime/gvisor"
	"github.com/cayhq/cay/template"
)

// yard runs guests with gVisor's own command line: of the image, the kind of
// disk, the network and the configuration that the server's sandboxes have.
type yard struct {
	dir      string
	exe      string // the server's engine, which `runsc` is
	disks    *disk.Disks
	nets     *network.Pool
	manifest cay.Manifest
	layers   []disk.Layer
	count    int
}

// newYard returns a yard with everything below dir. tag is its mark on the
// host's network objects.
func newYard(dir, tag string) *yard {
	return &yard{dir: dir, disks: &disk.Disks{Dir: filepath.Join(dir, "disk")},
		nets: &network.Pool{Tag: tag, NamespaceDir: "/run/netns", StateDir: "/run/cay", Warm: -1}}
}

// open takes the newest build of a server's data directory.
func (y *yard) open(ctx context.Context, serverDir string) error {
	store, err := file.Open(ctx, filepath.Join(serverDir, "blobs"))
	if err != nil {
		return err
	}
	defer store.Close()
	build, err := newestBuild(filepath.Join(serverDir, "blobs", "objects", "builds"))
	if err != nil {
		return err
	}
	if y.manifest, err = template.Load(ctx, store, build); err != nil {
		return err
	}
	files, err := template.Files(ctx, store, y.manifest)
	if err != nil {
		return err
	}
	if y.exe, err = largestFile(filepath.Join(serverDir, "engine")); err != nil {
		return fmt.Errorf("finding the server's engine: %w", err)
	}
	for _, f := range files {
		y.layers = append(y.layers, disk.Layer{Digest: f.Digest, File: f.Path})
	}
	return errors.Join(os.MkdirAll(y.dir, 0o711), y.disks.Open(ctx), y.nets.Open(ctx))
}

func newestBuild(dir string) (cay.BuildID, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	var newest cay.BuildID
	var at time.Time
	for _, e := range entries {
		st, err := os.Stat(filepath.Join(dir, e.Name(), "manifest.json"))
		if errors.Is(err, fs.ErrNotExist) {
			continue // never finished
		}
		if err != nil {
			return "", err
		}
		if st.ModTime().After(at) {
			newest, at = cay.BuildID(e.Name()), st.ModTime()
		}
	}
	if newest == "" {
		return "", fmt.Errorf("%s holds no finished build", dir)
	}
	return newest, nil
}

// guestPIDs is what the server allows a guest.
const guestPIDs = 2048

// measure runs one guest from its start to its removal. Disk and network are
// made before: the command line takes what it is given.
func (y *yard) measure(ctx context.Context, b book) (err error) {
	y.count++
	id := "bare" + strconv.Itoa(y.count)
	slot, err := y.nets.Acquire(ctx, cay.Egress{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, y.nets.Release(ctx, slot.Index)) }()
	root, err := y.disks.Create(ctx, disk.Spec{ID: id, Layers: y.layers, SizeMB: y.manifest.Resources.DiskMB})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, y.disks.Remove(ctx, id)) }()
	bare, err := gvisor.NewBare(y.engine(), runtime.Spec{
		ID: runtime.InstanceID(id), RootFS: root.Path, NetNS: slot.NetNS, Args: []string{y.manifest.Init},
		Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "CAY_CONTROL_TOKEN=bench",
			"CAY_BUILD=" + string(y.manifest.Build), "CAY_INSTANCE=" + id, "CAY_PIDS=" + strconv.Itoa(guestPIDs), "GOMAXPROCS=1"},
		Hostname: "sandbox",
		Limits:   runtime.Limits{CPUs: y.manifest.Resources.CPUs, MemoryBytes: int64(y.manifest.Resources.MemoryMB) << 20, PIDs: guestPIDs},
	})
	if err != nil {
		return err
	}
	bare.Exe = y.exe
	defer func() { err = errors.Join(err, bare.Close()) }()
	console, err := os.Create(filepath.Join(y.dir, id+".out"))
	if err != nil {
		return err
	}
	defer os.Remove(console.Name())
	defer console.Close()

	began := time.Now()
	err = bare.Run(ctx, console)
	b.took(bareRun, time.Since(began))
	if err == nil {
		err = answers(ctx, netip.AddrPortFrom(slot.Addr, 49983))
		b.took(bareReady, time.Since(began))
	}
	if err == nil {
		exec := time.Now()
		err = bare.Exec(ctx, "/bin/true")
		b.took(bareExec, time.Since(exec))
	}
	if err != nil {
		said, _ := os.ReadFile(console.Name()) // evidence, if there is any
		return errors.Join(fmt.Errorf("%w\nits console: %s", err, said), bare.Delete(ctx))
	}
	end := time.Now()
	err = bare.Delete(ctx)
	b.took(bareDelete, time.Since(end))
	return err
}

func (y *yard) engine() string { return filepath.Join(y.dir, "engine") }

// close removes everything of the yard from the host, also of one that an
// earlier, killed run left.
func (y *yard) close(ctx context.Context) error {
	instances, group := gvisor.HostNames(y.engine())
	err := endProcesses(ctx, instances)
	removeCgroups(group)
	if openErr := y.disks.Open(ctx); openErr != nil {
		err = errors.Join(err, openErr)
	} else {
		ids, listErr := y.disks.List(ctx)
		err = errors.Join(err, listErr)
		for _, id := range ids {
			err = errors.Join(err, y.disks.Remove(ctx, id))
		}
		err = errors.Join(err, y.disks.Release(ctx), y.disks.Close())
	}
	return errors.Join(err, y.nets.Destroy(ctx))
}

// endProcesses kills the engine processes that have dir in their command line,
// and waits until they are gone.
func endProcesses(ctx context.Context, dir string) error {
	for {
		pids, err := processesWith(dir)
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return os.NewSyscallError("kill", err)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for processes %v to end: %w", pids, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// processesWith returns the processes, but this one, that have text in their
// command line.
func processesWith(text string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err == nil && strings.Contains(string(b), text) { // one that has ended just now has none
			out = append(out, pid)
		}
	}
	return out, nil
}

// measureNative starts envd as a process of this machine.
func measureNative(ctx context.Context, envd string, b book) error {
	public, err := freeAddr()
	if err != nil {
		return err
	}
	control, err := freeAddr()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, envd, "-public", public.String(), "-control", control.String())
	cmd.Env = environ()
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting envd: %w", err)
	}
	err = answers(ctx, public)
	b.took(nativeReady, time.Since(began))
	_ = cmd.Process.Kill() // it has no other way to end
	_ = cmd.Wait()
	return err
}

func freeAddr() (netip.AddrPort, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer l.Close()
	return netip.ParseAddrPort(l.Addr().String())
}

// answerTime bounds the wait for an envd.
const answerTime = 20 * time.Second

// answers asks envd for its health until it answers, as often as the server
// does.
func answers(ctx context.Context, at netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: (&net.Dialer{Timeout: time.Second}).DialContext}}
	pause := time.Millisecond
	for n := 0; ; n++ {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at.String()+"/health", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusNoContent {
				return nil
			}
			err = errors.New("it answers " + resp.Status)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("envd at %s does not answer: %w", at, err)
		case <-time.After(pause):
			if n >= 30 {
				pause = min(pause+pause/4+time.Millisecond/2, 25*time.Millisecond)
			}
		}
	}
}
