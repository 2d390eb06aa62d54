package doctor

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The host of these cases holds objects of sandboxes x1 (slot 1) and x2 (slot
// 2), of other programs, and what the server keeps ready.
func crowdedHost(d *Doctor) tree {
	engine := func(id string) string {
		return "cay-sandbox\x00--root=" + d.InstanceDir + "/" + id + "/r\x00boot\x00"
	}
	return goodMachine().with(tree{
		"proc/101/cmdline":                   engine("x1"),
		"proc/102/cmdline":                   engine("x2"),
		"proc/103/cmdline":                   "vi\x00" + d.InstanceDir + "/x9/log", // looks at it, is not of it
		"proc/104/cmdline":                   engine("spare-e1"),                   // made ahead
		"sys/fs/cgroup/cay-0a0b0c0d/x1":      "dir",
		"sys/fs/cgroup/cay-0a0b0c0d/x2":      "dir",
		"sys/fs/cgroup/cay-ffffffff/x3":      "dir", // another data directory
		"sys/fs/cgroup/cay-0a0b0c0d/spare-0": "dir", // made ahead
		"sys/fs/cgroup/cay-0a0b0c0d/cpu.max": "max",
		"run/netns/cay-abc123-1r":            "",
		"run/netns/cay-abc123-1i":            "",
		"run/netns/cay-abc123-2i":            "",
		"run/netns/cay-ffffff-7i":            "",
		"run/netns/mine":                     "",
		"sys/class/net/cyabc123-1":           "link:x",
		"sys/class/net/cyabc123-2":           "link:x",
		"sys/class/net/cyffffff-7":           "link:x",
		"proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" +
			"40 22 7:1 / " + d.DataDir + "/disk/disks/x1/root rw - overlay overlay rw\n" +
			"41 22 7:1 / " + d.DataDir + "/disk/disks/x2/root rw - overlay overlay rw\n" +
			"42 22 7:2 / " + d.DataDir + "/disk/disks/ready-1/fs rw - ext4 /dev/loop3 rw\n" +
			"43 22 7:3 / " + d.DataDir + "/disk/images/00ff ro - erofs /dev/loop4 ro",
	})
}

func TestLeftovers(t *testing.T) {
	const all = "x1 x2"
	tests := []struct {
		name   string
		owned  string // executions
		slots  []int
		server bool
		// stray is what each check reports; absent is nothing.
		stray map[string]string
	}{
		{name: "all owned, server running", owned: all, slots: []int{1, 2}, server: true},
		{name: "all owned, no server: what it held ready is stray", owned: all, slots: []int{1, 2},
			stray: map[string]string{"leftovers.mounts": "1 mounts that no sandbox owns: DATA/disk/disks/ready-1/fs", "leftovers.files": "ready-1"}},
		{name: "a sandbox without a record", owned: "x1", slots: []int{1}, server: true, stray: map[string]string{
			"leftovers.processes": "1 engine processes that no sandbox owns: process 102 of x2",
			"leftovers.cgroups":   "1 cgroups that no sandbox owns: /cay-0a0b0c0d/x2",
			"leftovers.mounts":    "DATA/disk/disks/x2/root",
			"leftovers.files":     "DATA/run/gvisor/i/x2",
		}},
		{name: "after a bad end", stray: map[string]string{
			"leftovers.processes": "process 101 of x1, process 102 of x2",
			"leftovers.cgroups":   "2 cgroups",
			"leftovers.mounts":    "3 mounts",
			"leftovers.network":   "5 namespaces and links that no sandbox owns: namespace cay-abc123-1i, namespace cay-abc123-1r, namespace cay-abc123-2i, link cyabc123-1 and 1 more",
			"leftovers.firewall":  "1 firewall tables that no sandbox owns: cay-abc123",
			"leftovers.files":     "x1",
		}},
		{name: "a slot without a record", owned: all, slots: []int{1}, stray: map[string]string{
			"leftovers.network": "2 namespaces and links that no sandbox owns: namespace cay-abc123-2i, link cyabc123-2",
			"leftovers.mounts":  "ready-1", "leftovers.files": "ready-1",
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := goodDoctor(t, nil)
			d.Root = crowdedHost(d).FS()
			for _, dir := range []string{d.InstanceDir + "/spare-e1", d.InstanceDir + "/x1", d.InstanceDir + "/x2", d.DataDir + "/disk/disks/ready-1"} {
				if err := os.MkdirAll(dir, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			d.Tables = func() ([]Table, error) {
				return []Table{{Family: "inet", Name: "cay-abc123"}, {Family: "inet", Name: "cay-ffffff"}}, nil
			}
			d.Owned = func(context.Context) (Owned, error) {
				return Owned{Executions: strings.Fields(tt.owned), Slots: tt.slots}, nil
			}
			if tt.server {
				running(1)(d)
			}
			r := d.Run(t.Context())
			for _, c := range leftoverChecks {
				res := find(t, r, c.id)
				want, stray := tt.stray[c.id]
				want = strings.ReplaceAll(want, "DATA", d.DataDir)
				if stray && (res.Verdict != Warn || !strings.Contains(res.Evidence, want) || res.Repair == "") {
					t.Errorf("%s: %s %s; want a warning with %q", c.id, res.Verdict, res.Evidence, want)
				}
				if !stray && res.Verdict != OK {
					t.Errorf("%s: %s %s; want ok", c.id, res.Verdict, res.Evidence)
				}
			}
		})
	}
}

// A sandbox that begins or ends while the host is looked at is no leftover.
func TestLeftoversUnderWay(t *testing.T) {
	for _, when := range []string{"before", "after"} {
		d := goodDoctor(t, nil)
		d.Root = goodMachine().with(tree{"sys/fs/cgroup/cay-0a0b0c0d/x1": "dir"}).FS()
		calls := 0
		d.Owned = func(context.Context) (Owned, error) {
			calls++
			if (when == "before") == (calls == 1) {
				return Owned{Executions: []string{"x1"}}, nil
			}
			return Owned{}, nil
		}
		for _, c := range leftoverChecks {
			if c.id == "leftovers.cgroups" {
				if f := c.run(t.Context(), d); f.Verdict != OK {
					t.Errorf("record only %s the look: %+v", when, f)
				}
			}
		}
	}
}

// What cannot be read is not taken for nothing.
func TestLeftoversUnreadable(t *testing.T) {
	d := goodDoctor(t, goodMachine())
	d.Owned = func(context.Context) (Owned, error) { return Owned{}, errPlain }
	if f := find(t, d.Run(t.Context()), "leftovers.files"); f.Verdict != Fail || !strings.Contains(f.Evidence, "broken") {
		t.Errorf("%+v", f)
	}
	d.Owned = nil
	if f := find(t, d.Run(t.Context()), "leftovers.files"); f.Verdict != Skip {
		t.Errorf("%+v", f)
	}
	d = goodDoctor(t, goodMachine().without("proc/self/mountinfo"))
	if f := find(t, d.Run(t.Context()), "leftovers.mounts"); f.Verdict != Skip {
		t.Errorf("%+v", f)
	}
	if _, err := os.Stat(filepath.Join(d.DataDir, "run")); err == nil {
		t.Error("looking made a directory")
	}
}
