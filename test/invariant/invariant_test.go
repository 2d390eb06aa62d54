package invariant_test

import (
	"database/sql"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/test/invariant"
	"github.com/cayhq/cay/test/program"
)

func TestMain(m *testing.M) { program.Bare(m) }

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func take(t *testing.T, s invariant.Scope) invariant.Snapshot {
	t.Helper()
	snap, err := invariant.Take(s)
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

// Every kind of leak is seen, with its name, and nothing is seen once it is
// gone.
func TestSeesEachLeak(t *testing.T) {
	scope := invariant.Scope{DataDir: program.NewDir(), Cgroups: []string{fmt.Sprintf("cay-test-%d", time.Now().UnixNano())}, Dirs: []string{"/run/netns"}}
	dir := scope.DataDir
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o755); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", filepath.Join(dir, "cay.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	exec1 := func(q string) {
		t.Helper()
		if _, err := db.Exec(q); err != nil {
			t.Fatal(err)
		}
	}
	exec1(`CREATE TABLE sandboxes (id TEXT, state TEXT)`)
	exec1(`INSERT INTO sandboxes VALUES ('iaaaaaaaaaaaaaaaaaaaa', 'ended')`)

	for _, c := range []struct {
		name string
		kind invariant.Kind
		want string // in the line
		leak func(t *testing.T) (undo func())
	}{
		{"process", invariant.Process, "sleep N", func(t *testing.T) func() {
			cmd := exec.Command("sleep", "600")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			// Start returns when the kernel has closed the descriptors of the
			// old program, a moment before the new one has its arguments.
			program.Eventually(t, 5*time.Second, func() string {
				if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid)); err != nil || len(b) == 0 {
					return "it has no arguments yet"
				}
				return ""
			})
			return func() { cmd.Process.Kill(); cmd.Wait() }
		}},
		{"zombie", invariant.Zombie, "true", func(t *testing.T) func() {
			cmd := exec.Command("true")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			program.Eventually(t, 5*time.Second, func() string {
				b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
				if !strings.Contains(string(b), ") Z ") {
					return "it has not ended"
				}
				return ""
			})
			return func() { cmd.Wait() }
		}},
		{"namespace of a process", invariant.Namespace, "net", func(t *testing.T) func() {
			cmd := exec.Command("unshare", "-n", "sleep", "600")
			before := take(t, scope).Count(invariant.Namespace)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			program.Eventually(t, 5*time.Second, func() string {
				if take(t, scope).Count(invariant.Namespace) == before {
					return "no new namespace"
				}
				return ""
			})
			return func() { cmd.Process.Kill(); cmd.Wait() }
		}},
		{"pinned namespace", invariant.Namespace, "net", func(t *testing.T) func() {
			run(t, "ip", "netns", "add", "cay-abc-7r")
			return func() { run(t, "ip", "netns", "del", "cay-abc-7r") }
		}},
		{"name of a namespace", invariant.File, "/run/netns/cay-abc-Nr", func(t *testing.T) func() {
			path := "/run/netns/cay-abc-7r"
			if err := os.WriteFile(path, nil, 0o444); err != nil {
				t.Fatal(err)
			}
			return func() { os.Remove(path) }
		}},
		{"link", invariant.Link, "veth cyabcd-N: cyabcd-", func(t *testing.T) func() {
			v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "cyabcd-3"}, PeerName: "cyabcd-4"}
			if err := netlink.LinkAdd(v); err != nil {
				t.Fatal(err)
			}
			return func() { netlink.LinkDel(v) }
		}},
		{"firewall table", invariant.Firewall, "cay-x", func(t *testing.T) func() {
			run(t, "nft", "add table inet cay-x")
			return func() { run(t, "nft", "delete table inet cay-x") }
		}},
		{"firewall rule", invariant.Firewall, "chain c rule", func(t *testing.T) func() {
			run(t, "nft", "add table inet cay-x; add chain inet cay-x c; add rule inet cay-x c counter drop")
			return func() { run(t, "nft", "delete table inet cay-x") }
		}},
		{"firewall set element", invariant.Firewall, "element of internet: cyabcd-3", func(t *testing.T) func() {
			c := &nftables.Conn{}
			table := c.AddTable(&nftables.Table{Name: "cay-y", Family: nftables.TableFamilyINet})
			key := make([]byte, 16)
			copy(key, "cyabcd-3")
			if err := c.AddSet(&nftables.Set{Table: table, Name: "internet", KeyType: nftables.TypeIFName}, []nftables.SetElement{{Key: key}}); err != nil {
				t.Fatal(err)
			}
			if err := c.Flush(); err != nil {
				t.Fatal(err)
			}
			return func() { c.DelTable(table); c.Flush() }
		}},
		{"cgroup", invariant.Cgroup, "/x", func(t *testing.T) func() {
			root := "/sys/fs/cgroup/pids"
			if _, err := os.Stat(root); err != nil {
				root = "/sys/fs/cgroup"
			}
			parent := filepath.Join(root, scope.Cgroups[0])
			if err := os.MkdirAll(filepath.Join(parent, "x1"), 0o755); err != nil {
				t.Fatal(err)
			}
			return func() { os.Remove(filepath.Join(parent, "x1")); os.Remove(parent) }
		}},
		{"mount", invariant.Mount, "tmpfs on <data>/run", func(t *testing.T) func() {
			at := filepath.Join(dir, "run")
			if err := unix.Mount("tmpfs", at, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			return func() { unix.Unmount(at, 0) }
		}},
		{"loop device", invariant.Loop, "<data>/img", func(t *testing.T) func() {
			img := filepath.Join(dir, "img")
			if err := os.WriteFile(img, make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command("losetup", "--find", "--show", img).CombinedOutput()
			if err != nil {
				t.Fatalf("losetup: %v: %s", err, out)
			}
			return func() { run(t, "losetup", "-d", strings.TrimSpace(string(out))); os.Remove(img) }
		}},
		{"loop device over a removed file", invariant.Loop, "<data>/gone", func(t *testing.T) func() {
			img := filepath.Join(dir, "gone")
			if err := os.WriteFile(img, make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command("losetup", "--find", "--show", img).CombinedOutput()
			if err != nil {
				t.Fatalf("losetup: %v: %s", err, out)
			}
			os.Remove(img)
			return func() { run(t, "losetup", "-d", strings.TrimSpace(string(out))) }
		}},
		{"listening socket", invariant.Socket, "tcp listening", func(t *testing.T) func() {
			l, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			return func() { l.Close() }
		}},
		{"UDP socket", invariant.Socket, "udp bound", func(t *testing.T) func() {
			c, err := net.ListenPacket("udp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			return func() { c.Close() }
		}},
		{"unix socket", invariant.Socket, "unix <data>/run/s.sock", func(t *testing.T) func() {
			l, err := net.Listen("unix", filepath.Join(dir, "run", "s.sock"))
			if err != nil {
				t.Fatal(err)
			}
			return func() { l.Close() }
		}},
		{"file", invariant.File, "<data>/run/i/<execution>/spec", func(t *testing.T) func() {
			if err := os.MkdirAll(filepath.Join(dir, "run/i/x0123456789abcdef"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "run/i/x0123456789abcdef/spec"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return func() { os.RemoveAll(filepath.Join(dir, "run/i")) }
		}},
		{"row", invariant.Row, "sandbox running: ibbbbbbbbbbbbbbbbbbbb", func(t *testing.T) func() {
			exec1(`INSERT INTO sandboxes VALUES ('ibbbbbbbbbbbbbbbbbbbb', 'running')`)
			return func() { exec1(`UPDATE sandboxes SET state = 'ended'`) }
		}},
		{"setting", invariant.Setting, "ip_forward is 1", func(t *testing.T) func() {
			const path = "/proc/sys/net/ipv4/ip_forward"
			if err := os.WriteFile(path, []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
			return func() { os.WriteFile(path, []byte("0"), 0) }
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0); err != nil {
				t.Fatal(err)
			}
			before := take(t, scope)
			undo := c.leak(t)
			left := invariant.Diff(before, take(t, scope))
			undo()
			if text := strings.Join(left, "\n"); !strings.Contains(text, "more of "+string(c.kind)+" ") || !strings.Contains(text, c.want) {
				t.Errorf("a leaked %s shows as:\n%s\nwant a line of kind %s with %q", c.name, text, c.kind, c.want)
			}
			invariant.Settle(t, 5*time.Second, scope, before)
		})
	}
}

// What is replaced by another of its class is no leak; one more of it is.
func TestCountsClasses(t *testing.T) {
	scope := invariant.Scope{DataDir: program.NewDir()}
	disks := filepath.Join(scope.DataDir, "disk", "disks")
	mk := func(id string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(disks, id), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mk("ready-k3j4h5")
	before := take(t, scope)
	os.Remove(filepath.Join(disks, "ready-k3j4h5"))
	mk("ready-zz9")
	if left := invariant.Diff(before, take(t, scope)); len(left) != 0 {
		t.Errorf("another one of the class is left over: %v", left)
	}
	mk("ready-zz8")
	want := "1 more of file <data>/disk/disks/ready-<id>: " + filepath.Join(disks, "ready-zz8") + ", " + filepath.Join(disks, "ready-zz9")
	if left := invariant.Diff(before, take(t, scope)); len(left) != 1 || left[0] != want {
		t.Errorf("Diff = %q, want %q", left, want)
	}
}

// A descriptor that a server keeps is seen, by what it is of.
func TestSeesDescriptors(t *testing.T) {
	shell, err := os.ReadFile("/bin/bash")
	if err != nil {
		t.Fatal(err)
	}
	cay := filepath.Join(t.TempDir(), "cay")
	if err := os.WriteFile(cay, shell, 0o755); err != nil {
		t.Fatal(err)
	}
	serve := func(extra ...*os.File) (stop func()) {
		t.Helper()
		cmd := exec.Command(cay, "up") // a script of that name
		cmd.Dir = filepath.Dir(cay)
		cmd.ExtraFiles = extra
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return func() { in.Close(); cmd.Wait() }
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(cay), "up"), []byte("read\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	held, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	scope := invariant.Scope{}
	stop := serve()
	before := invariant.Steady(t, 10*time.Second, scope)
	stop()
	stop = serve(held)
	defer stop()
	program.Eventually(t, 10*time.Second, func() string {
		left := strings.Join(invariant.Diff(before, take(t, scope)), "\n")
		if !strings.Contains(left, "1 more of descriptor up: /dev/zero") {
			return "the descriptor is not among: " + left
		}
		return ""
	})
}
