package doctor

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cayhq/cay/network"
)

// Leftovers are objects of the host that carry the data directory's names and
// that no record owns.
var leftoverChecks = []check{
	{id: "leftovers.processes", title: "stray processes", run: leftover("engine processes", strayProcesses)},
	{id: "leftovers.cgroups", title: "stray cgroups", run: leftover("cgroups", strayCgroups)},
	{id: "leftovers.mounts", title: "stray mounts", run: leftover("mounts", strayMounts)},
	{id: "leftovers.network", title: "stray networks", run: leftover("namespaces and links", strayNetworks)},
	{id: "leftovers.firewall", title: "stray firewall rules", run: leftover("firewall tables", strayTables)},
	{id: "leftovers.files", title: "stray files", run: leftover("directories of ended sandboxes", strayFiles)},
}

// object is something of the host. owned says which record would own it.
type object struct {
	name  string
	owned func(Owned) bool
}

func byExecution(id string) func(Owned) bool {
	return func(o Owned) bool { return slices.Contains(o.Executions, id) }
}

func bySlot(index int) func(Owned) bool {
	return func(o Owned) bool { return slices.Contains(o.Slots, index) }
}

// leftover makes a check out of a look at the host. Records are read before
// and after: a sandbox that ends or begins meanwhile is no leftover.
func leftover(what string, look func(context.Context, *Doctor) ([]object, error)) func(context.Context, *Doctor) Finding {
	return needRoot(func(ctx context.Context, d *Doctor) Finding {
		if d.Owned == nil {
			return skip("the data directory was never used")
		}
		before, err := d.Owned(ctx)
		if err != nil {
			return failed(err, "a record of another version is left alone; use that version's `cay down`")
		}
		objects, err := look(ctx, d)
		if err != nil {
			return skip("%v", err)
		}
		after, err := d.Owned(ctx)
		if err != nil {
			return failed(err, "a record of another version is left alone; use that version's `cay down`")
		}
		var stray []string
		for _, o := range objects {
			if !o.owned(before) && !o.owned(after) {
				stray = append(stray, o.name)
			}
		}
		if stray == nil {
			if len(objects) == 0 {
				return ok("none")
			}
			return ok("none; %d belong to sandboxes or to the server", len(objects))
		}
		const shown = 4
		list := strings.Join(stray[:min(shown, len(stray))], ", ")
		if len(stray) > shown {
			list += fmt.Sprintf(" and %d more", len(stray)-shown)
		}
		repair := "`cay up` removes them, and so does `cay down`"
		if d.Server != nil {
			repair = "the server removes them within 10 s of an end; if they stay, restart it (sandboxes stay), and report this with `cay doctor --json`"
		}
		return warn(fmt.Sprintf("%d %s that no sandbox owns: %s", len(stray), what, list), repair)
	})
}

// strayProcesses are the engine's: each has its instance's directory in its
// command line.
func strayProcesses(_ context.Context, d *Doctor) ([]object, error) {
	proc, err := fs.Sub(d.Root, "proc")
	if err != nil || d.InstanceDir == "" {
		return nil, err
	}
	var out []object
	for _, pid := range processes(proc) {
		b, err := fs.ReadFile(proc, strconv.Itoa(pid)+"/cmdline")
		if err != nil {
			continue // it has ended
		}
		args := string(b)
		i := strings.Index(args, d.InstanceDir+"/")
		if i < 0 {
			continue
		}
		// Not a program that merely looks at the directory: the engine names
		// it in an option.
		if i == 0 || args[i-1] != '=' {
			continue
		}
		id := args[i+len(d.InstanceDir)+1:]
		if end := strings.IndexAny(id, "/\x00"); end >= 0 {
			id = id[:end]
		}
		if strings.HasPrefix(id, spareGroup) {
			continue // with or without a guest; its cgroup tells which
		}
		out = append(out, object{fmt.Sprintf("process %d of %s", pid, id), byExecution(id)})
	}
	return out, nil
}

func strayCgroups(_ context.Context, d *Doctor) ([]object, error) {
	if d.CgroupParent == "" {
		return nil, nil
	}
	rel := strings.Trim(d.CgroupParent, "/")
	dirs := []string{"sys/fs/cgroup/" + rel}
	if entries, err := fs.ReadDir(d.Root, "sys/fs/cgroup"); err == nil {
		for _, e := range entries {
			dirs = append(dirs, "sys/fs/cgroup/"+e.Name()+"/"+rel)
		}
	}
	seen := map[string]bool{}
	var out []object
	for _, dir := range dirs {
		entries, err := fs.ReadDir(d.Root, dir)
		if err != nil {
			continue // not of this hierarchy
		}
		for _, e := range entries {
			if id := e.Name(); e.IsDir() && !seen[id] && !strings.HasPrefix(id, spareGroup) {
				seen[id] = true
				out = append(out, object{d.CgroupParent + "/" + id, byExecution(id)})
			}
		}
	}
	return out, nil
}

// spareGroup begins the names of cgroups and engines made ahead. The engine's
// supervisor owns them, and removes those of one that died.
const spareGroup = "spare-"

// readyDisk begins the names of disks made ahead. The running server owns
// them, and the next one takes them away.
const readyDisk = "ready-"

func strayMounts(_ context.Context, d *Doctor) ([]object, error) {
	ms, err := d.mounts()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(d.DataDir, "disk", "disks") + "/"
	var out []object
	for _, m := range ms {
		rest, found := strings.CutPrefix(m.point, dir)
		if !found {
			continue
		}
		id, _, _ := strings.Cut(rest, "/")
		owned := byExecution(id)
		if d.Server != nil && strings.HasPrefix(id, readyDisk) {
			owned = func(Owned) bool { return true }
		}
		out = append(out, object{m.point, owned})
	}
	return out, nil
}

func strayNetworks(_ context.Context, d *Doctor) ([]object, error) {
	names := network.NamesOf(d.Tag)
	var out []object
	add := func(dir, prefix, kind string, ends string) {
		entries, err := fs.ReadDir(d.Root, strings.Trim(dir, "/"))
		if err != nil {
			return // there is no such directory before the first namespace
		}
		for _, e := range entries {
			rest, found := strings.CutPrefix(e.Name(), prefix)
			index, err := strconv.Atoi(strings.TrimRight(rest, ends))
			if !found || err != nil {
				continue
			}
			owned := bySlot(index)
			if d.Server != nil {
				owned = func(Owned) bool { return true } // made ahead; the server sweeps at its start
			}
			out = append(out, object{kind + " " + e.Name(), owned})
		}
	}
	add(d.NamespaceDir, names.NamespacePrefix, "namespace", "ri")
	add("sys/class/net", names.LinkPrefix, "link", "")
	return out, nil
}

func strayTables(_ context.Context, d *Doctor) ([]object, error) {
	if d.Tables == nil || !d.capable(capNetAdmin) {
		return nil, fmt.Errorf("needs root")
	}
	tables, err := d.Tables()
	if err != nil {
		return nil, fmt.Errorf("nftables does not answer: %w", err)
	}
	var out []object
	for _, t := range tables {
		if t.Name == network.NamesOf(d.Tag).Table {
			// It guards every sandbox there is, and the server's slots.
			out = append(out, object{t.Name, func(o Owned) bool { return d.Server != nil || len(o.Executions) > 0 }})
		}
	}
	return out, nil
}

func strayFiles(_ context.Context, d *Doctor) ([]object, error) {
	var out []object
	for _, dir := range []string{d.InstanceDir, filepath.Join(d.DataDir, "disk", "disks")} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // nothing was ever made
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), spareGroup) {
				continue
			}
			owned := byExecution(e.Name())
			if d.Server != nil && strings.HasPrefix(e.Name(), readyDisk) {
				owned = func(Owned) bool { return true }
			}
			out = append(out, object{filepath.Join(dir, e.Name()), owned})
		}
	}
	return out, nil
}
