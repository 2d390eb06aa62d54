package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/disk"
	"github.com/cayhq/cay/network"
)

// New returns a doctor for a data directory that asks this machine. stateDir
// and namespaceDir are those of the server's network pool. The functions that
// ask the product's own parts are for the caller to set.
func New(dataDir, namespaceDir, stateDir string) *Doctor {
	d := &Doctor{
		Root: os.DirFS("/"), PageSize: os.Getpagesize(),
		DataDir: dataDir, NamespaceDir: namespaceDir,
		Space: space, ClockSynced: clockSynced, Tables: tables,
		LookPath: exec.LookPath, LookupHost: net.DefaultResolver.LookupHost,
		TryDisks: tryDisks,
	}
	d.TrySlot = func(ctx context.Context) (string, error) { return d.trySlot(ctx, stateDir) }
	return d
}

func space(dir string) (Space, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return Space{}, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return Space{Free: int64(st.Bavail) * st.Bsize, Total: int64(st.Blocks) * st.Bsize,
		FreeInodes: int64(st.Ffree), TotalInodes: int64(st.Files)}, nil
}

func clockSynced() (bool, error) {
	var t unix.Timex
	if _, err := unix.Adjtimex(&t); err != nil {
		return false, fmt.Errorf("adjtimex: %w", err)
	}
	return t.Status&unix.STA_UNSYNC == 0, nil
}

// families are nftables' names of the address families (nft(8)).
var families = map[nftables.TableFamily]string{
	nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet",
	nftables.TableFamilyARP: "arp", nftables.TableFamilyBridge: "bridge", nftables.TableFamilyNetdev: "netdev",
}

func tables() ([]Table, error) {
	c := &nftables.Conn{}
	ts, err := c.ListTables()
	if err != nil {
		return nil, err
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, err
	}
	out := make([]Table, len(ts))
	for i, t := range ts {
		out[i] = Table{Family: families[t.Family], Name: t.Name}
		for _, ch := range chains {
			if ch.Table.Name == t.Name && ch.Table.Family == t.Family && dropsForwarded(t.Family, ch) {
				out[i].ForwardDrop = ch.Name
			}
		}
	}
	return out, nil
}

func dropsForwarded(f nftables.TableFamily, c *nftables.Chain) bool {
	return (f == nftables.TableFamilyIPv4 || f == nftables.TableFamilyINet) &&
		c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookForward &&
		c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop
}

// trialTag names the network objects of a trial. It is no tag of a data
// directory, for those are hexadecimal. It is always the same, so that a trial
// takes away what one that was killed has left.
const trialTag = "doctor"

// trySlot makes a slot, which proves by itself that packets go through it, and
// takes it away.
func (d *Doctor) trySlot(ctx context.Context, stateDir string) (evidence string, err error) {
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return "", fmt.Errorf("making the directory of network state: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(stateDir, "doctor.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return "", fmt.Errorf("opening the lock of network trials: %w", err)
	}
	defer lock.Close()
	if err := waitLock(ctx, int(lock.Fd())); err != nil {
		return "", fmt.Errorf("waiting for another doctor to end its trial of the network: %w", err)
	}
	p := &network.Pool{Tag: trialTag, NamespaceDir: d.NamespaceDir, StateDir: stateDir, CIDR: d.CIDR, Size: 1, Warm: -1}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), limitOfCleanup)
		defer cancel()
		err = errors.Join(err, p.Destroy(end))
	}()
	if err := p.Open(ctx); err != nil {
		return "", err
	}
	if err := p.Sweep(ctx); err != nil {
		return "", err
	}
	began := time.Now()
	if _, err := p.Acquire(ctx, cay.Egress{}); err != nil {
		return "", err
	}
	return fmt.Sprintf("made, walled in and reached in %s; taken away again", time.Since(began).Round(100*time.Microsecond)), nil
}

// waitLock takes a lock that others hold for a moment.
func waitLock(ctx context.Context, fd int) error {
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

// tryDisks opens disks in a directory of its own beside the server's, to see
// which design the host carries, and takes them away.
func tryDisks(ctx context.Context, dir string) (c disk.Capabilities, err error) {
	c = disk.Probe(dir)
	at, err := os.MkdirTemp(dir, ".doctor-disks-")
	if err != nil {
		return c, fmt.Errorf("making a directory for a trial of disks: %w", err)
	}
	d := &disk.Disks{Dir: at, Reserve: -1}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), limitOfCleanup)
		defer cancel()
		release := d.Release(end)
		if release == nil { // nothing is mounted there any more
			release = os.RemoveAll(at)
		}
		err = errors.Join(err, release)
	}()
	if err := d.Open(ctx); err != nil {
		return c, err
	}
	return d.Capabilities(), nil
}
