package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

// Design is one way to hold the image files of disks.
type Design string

// The designs, best first. In every one a guest's writes go to a file of
// bounded size; they differ in what a clone of that file costs.
const (
	// DesignReflink keeps image files on the data directory's own file
	// system, which clones them.
	DesignReflink Design = "reflink"
	// DesignPool keeps image files on an XFS in one sparse file of the data
	// directory, which clones them.
	DesignPool Design = "xfs-pool"
	// DesignCopy keeps image files on the data directory's own file system;
	// a clone copies what the file holds.
	DesignCopy Design = "copy"
)

// Feature is one thing of the host that disks need or can use.
type Feature struct {
	Name   string
	Needed bool // without it there are no disks at all
	OK     bool
	Detail string // what was found
	Fix    string // what to do when it is not OK
}

// Capabilities says what the host offers, for people: the design in use, and
// for every better one why it is not.
type Capabilities struct {
	Dir      string
	Design   Design
	Why      string
	Refused  map[Design]string
	Features []Feature
	// FreeBytes and ReserveBytes are what admission compares.
	FreeBytes, TotalBytes, ReserveBytes int64
}

// Capabilities returns what Open found, with fresh figures of free space.
func (d *Disks) Capabilities() Capabilities {
	d.mu.Lock()
	c := d.caps
	d.mu.Unlock()
	c.FreeBytes, c.TotalBytes, _ = freeSpace(d.Dir)
	if c.ReserveBytes = d.Reserve; c.ReserveBytes == 0 {
		c.ReserveBytes = DefaultReserve
	}
	return c
}

// Probe says what the host offers to disks under dir, without making any.
// Design is empty: only Open chooses. dir must exist.
func Probe(dir string) Capabilities { return probeHost(dir) }

func probeHost(dir string) Capabilities {
	c := Capabilities{Dir: dir, Refused: map[Design]string{}}
	add := func(name string, needed bool, detail string, err error, fix string) {
		f := Feature{Name: name, Needed: needed, OK: err == nil, Detail: detail, Fix: fix}
		if err != nil {
			f.Detail = err.Error()
		}
		c.Features = append(c.Features, f)
	}
	add("privilege", true, "CAP_SYS_ADMIN", haveAdmin(), "run Cay as root")
	for _, name := range []string{"erofs", "ext4", "overlay"} {
		add("file system "+name, true, "in the kernel", haveFS(name), "use a kernel with "+name+" (Debian's has it; a container may need the host to run `modprobe "+name+"`)")
	}
	add("file system xfs", false, "in the kernel", haveFS("xfs"), "use a kernel with xfs")
	add("loop devices", true, "/dev/loop-control", haveLoop(), "run `modprobe loop`; in a container, allow /dev/loop-control and /dev/loop*")
	for _, tool := range []struct {
		name, pkg string
		needed    bool
	}{{"mkfs.ext4", "e2fsprogs", true}, {"mkfs.xfs", "xfsprogs", false}} {
		path, err := exec.LookPath(tool.name)
		add("program "+tool.name, tool.needed, path, err, "install it: apt-get install "+tool.pkg)
	}
	err := cloneWorks(dir)
	add("reflink", false, "the file system of "+dir+" clones files", err, "not needed; XFS (reflink=1) or Btrfs have it")
	return c
}

func (c *Capabilities) feature(name string) Feature {
	for _, f := range c.Features {
		if f.Name == name {
			return f
		}
	}
	return Feature{Name: name, Detail: "not probed"}
}

// usable returns an error that names everything needed that is missing.
func (c *Capabilities) usable() error {
	var missing, fixes []string
	code := cay.CodeHostUnsupported
	for _, f := range c.Features {
		if f.Needed && !f.OK {
			missing = append(missing, f.Name+" ("+f.Detail+")")
			fixes = append(fixes, f.Fix)
			if f.Name == "privilege" {
				code = cay.CodePrivilege
			}
		}
	}
	if missing == nil {
		return nil
	}
	return &cay.Error{Code: code, Layer: cay.LayerStorage,
		Message: "this host cannot hold disks for sandboxes; missing: " + strings.Join(missing, "; "),
		Fix:     strings.Join(fixes, "; ")}
}

// haveFS reports whether the kernel knows the file system; asking loads its
// module where there is one.
func haveFS(name string) error {
	fd, err := unix.Fsopen(name, unix.FSOPEN_CLOEXEC)
	if err == nil {
		unix.Close(fd)
		return nil
	}
	if errors.Is(err, unix.ENODEV) {
		return errors.New("the kernel does not know it")
	}
	return fmt.Errorf("fsopen: %w", err)
}

func haveLoop() error {
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func haveAdmin() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	if data[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return fmt.Errorf("user %d has no CAP_SYS_ADMIN", os.Geteuid())
	}
	return nil
}

// cloneWorks tries a clone in dir.
func cloneWorks(dir string) error {
	a, err := os.CreateTemp(dir, ".clone-*")
	if err != nil {
		return err
	}
	defer os.Remove(a.Name())
	defer a.Close()
	if _, err := a.Write(make([]byte, 4096)); err != nil {
		return err
	}
	b, err := os.CreateTemp(dir, ".clone-*")
	if err != nil {
		return err
	}
	defer os.Remove(b.Name())
	defer b.Close()
	if err := unix.IoctlFileClone(int(b.Fd()), int(a.Fd())); err != nil {
		return fmt.Errorf("cloning a file in %s: %w", dir, err)
	}
	return nil
}

// runTool runs a program of the host and puts what it said into the error.
func runTool(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}
