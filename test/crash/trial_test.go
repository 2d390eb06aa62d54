package crash

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/killpoint"
	"github.com/cayhq/cay/test/program"
)

// server is what is killed: a server on a host of files, or the real program on
// gVisor.
type server interface {
	client() *program.Client
	// up starts the server and returns when it is ready.
	up(t *testing.T)
	// arm names the point at which the server dies, and one at which an
	// operation fails; empty is none.
	arm(t *testing.T, kill, fail string, errno syscall.Errno)
	// died waits for the server's death.
	died(t *testing.T, within time.Duration)
	// write and read are of a guest that runs.
	write(id, v string) error
	read(id string) (value, error)
	inventory(t *testing.T) inventory
}

// legalWithin is how soon a server is in a legal state after its start, and
// nothing is left over.
const legalWithin = 10 * time.Second

// trial is one operation, done while something goes wrong.
type trial struct {
	t   *testing.T
	srv server
	c   *program.Client

	box    string // the sandbox it is done with
	told   string // what that was told
	memory bool   // and shall remember in its memory, not on its disk alone
	snap   string // the snapshot it is done with
	forks  []string

	runs, paused string            // bystanders
	values       map[string]string // theirs
}

var serial atomic.Int64

// operation is what a trial does. before prepares it, act does it, and after
// checks what must hold when it was acknowledged, or not.
type operation struct {
	before func(*trial)
	act    func(*trial) error
	after  func(k *trial, acknowledged bool)
}

var operations = map[string]operation{
	"create": {
		before: func(*trial) {},
		act: func(k *trial) error {
			id, err := k.create("base")
			k.box = id
			return err
		},
		after: func(k *trial, ok bool) {
			if ok {
				k.mustRun(k.box)
			}
		},
	},
	"pause": {
		before: (*trial).makeBox,
		act: func(k *trial) error {
			return k.post("/sandboxes/"+k.box+"/pause", map[string]any{"memory": k.memory}, nil)
		},
		after: func(k *trial, ok bool) {
			k.oneOf(k.box, ok, "paused", "running")
			k.connect(k.box)
			k.remembers(k.box)
		},
	},
	"resume": {
		before: func(k *trial) {
			k.makeBox()
			k.must(k.post("/sandboxes/"+k.box+"/pause", nil, nil))
		},
		act: func(k *trial) error {
			return k.post("/sandboxes/"+k.box+"/connect", map[string]any{"timeout": 3000, "memory": true}, nil)
		},
		after: func(k *trial, ok bool) {
			k.oneOf(k.box, ok, "running", "paused")
			k.connect(k.box)
			k.remembers(k.box)
			// And it can be paused and resumed again.
			k.must(k.post("/sandboxes/"+k.box+"/pause", nil, nil))
			k.connect(k.box)
			k.remembers(k.box)
		},
	},
	"snapshot": {
		before: (*trial).makeBox,
		act:    (*trial).snapshot,
		after: func(k *trial, ok bool) {
			k.oneOf(k.box, true, "running")
			k.remembers(k.box)
			if ok {
				id, err := k.create(k.snap)
				k.must(err)
				k.remembers(id)
			}
		},
	},
	"fork": {
		before: (*trial).makeBox,
		act: func(k *trial) error {
			var out []struct {
				Sandbox *struct{ SandboxID string }
				Error   *struct{ Message string }
			}
			err := k.post("/sandboxes/"+k.box+"/fork", map[string]any{"count": 2, "timeout": 3000}, &out)
			for _, f := range out {
				if f.Sandbox != nil {
					k.forks = append(k.forks, f.Sandbox.SandboxID)
				}
			}
			return err
		},
		after: func(k *trial, _ bool) {
			k.oneOf(k.box, true, "running")
			k.remembers(k.box)
			for _, f := range k.forks {
				k.mustRun(f)
				k.remembers(f)
			}
		},
	},
	"kill": {
		before: (*trial).makeBox,
		act: func(k *trial) error {
			return k.c.Call(context.Background(), http.MethodDelete, "/sandboxes/"+k.box, nil, nil)
		},
		after: func(k *trial, ok bool) {
			st := k.state(k.box)
			if st != "" && st != "running" || ok && st != "" {
				k.t.Errorf("the sandbox is %q; its kill was acknowledged: %v", st, ok)
			}
		},
	},
	"upgrade": {
		before: (*trial).makeBox,
		act: func(k *trial) error {
			return k.c.Call(context.Background(), http.MethodPost, "/operator/v1/sandboxes/"+k.box+"/upgrade", nil, nil)
		},
		after: func(k *trial, _ bool) {
			// Whichever envd it has, it can be paused and resumed, and told again.
			k.oneOf(k.box, true, "running")
			k.must(k.post("/sandboxes/"+k.box+"/pause", nil, nil))
			k.connect(k.box)
			k.remembers(k.box)
			k.must(k.c.Call(context.Background(), http.MethodPost, "/operator/v1/sandboxes/"+k.box+"/upgrade", nil, nil))
			k.remembers(k.box)
		},
	},
	"drop": {
		before: func(k *trial) {
			k.makeBox()
			k.must(k.snapshot())
		},
		act: func(k *trial) error {
			return k.c.Call(context.Background(), http.MethodDelete, "/templates/"+k.snap, nil, nil)
		},
		after: func(k *trial, ok bool) {
			id, err := k.create(k.snap)
			var r *program.Refusal
			switch {
			case err == nil && !ok:
				k.remembers(id)
			case err == nil:
				k.t.Error("a snapshot that was deleted is there")
			case !errors.As(err, &r) || r.Status != http.StatusNotFound:
				k.t.Errorf("creating from a snapshot that was to be deleted: %v", err)
			}
		},
	},
}

// opOf is the operation of a point.
func opOf(point string) string {
	op, _, _ := strings.Cut(point, ".")
	return op
}

// undone is where an operation fails so that it is undone.
var undone = map[string]string{
	"create":   "create.record.host.before-write",
	"resume":   "resume.record.host.before-write",
	"pause":    "pause.digest.before-read",
	"snapshot": "snapshot.digest.before-read",
}

func (k *trial) must(err error) {
	k.t.Helper()
	if err != nil {
		k.t.Fatal(err)
	}
}

func (k *trial) post(path string, in, out any) error {
	return k.c.Call(context.Background(), http.MethodPost, path, in, out)
}

func (k *trial) create(from string) (string, error) {
	var out struct{ SandboxID string }
	err := k.post("/sandboxes", map[string]any{"templateID": from, "timeout": 3000, "secure": true}, &out)
	return out.SandboxID, err
}

// make makes a sandbox and tells it something.
func (k *trial) make() (id, told string) {
	k.t.Helper()
	id, err := k.create("base")
	k.must(err)
	told = fmt.Sprint("value-", serial.Add(1))
	k.must(k.srv.write(id, told))
	return id, told
}

func (k *trial) makeBox() {
	k.t.Helper()
	k.box, k.told = k.make()
}

func (k *trial) snapshot() error {
	var out struct{ SnapshotID string }
	err := k.post("/sandboxes/"+k.box+"/snapshots", map[string]any{}, &out)
	k.snap = out.SnapshotID
	return err
}

func (k *trial) connect(id string) {
	k.t.Helper()
	if err := k.post("/sandboxes/"+id+"/connect", map[string]any{"timeout": 3000}, nil); err != nil {
		k.t.Fatalf("connecting to %s: %v", id, err)
	}
}

// state is the state of a sandbox as a client sees it; empty if it has none.
func (k *trial) state(id string) string {
	k.t.Helper()
	s, err := k.c.Get(context.Background(), id)
	var r *program.Refusal
	if errors.As(err, &r) && r.Status == http.StatusNotFound {
		return ""
	}
	k.must(err)
	return s.State
}

// oneOf checks that a sandbox is in one of the states, and in the first if the
// operation was acknowledged.
func (k *trial) oneOf(id string, acknowledged bool, states ...string) {
	k.t.Helper()
	st := k.state(id)
	if acknowledged {
		states = states[:1]
	}
	if !slices.Contains(states, st) {
		k.t.Fatalf("sandbox %s is %q; want one of %v", id, st, states)
	}
}

func (k *trial) mustRun(id string) {
	k.t.Helper()
	k.oneOf(id, true, "running")
	if _, err := k.srv.read(id); err != nil {
		k.t.Errorf("sandbox %s does not answer: %v", id, err)
	}
}

// remembers checks that a sandbox has what it was told.
func (k *trial) remembers(id string) {
	k.t.Helper()
	k.has(id, k.told, k.memory)
}

func (k *trial) has(id, told string, memory bool) {
	k.t.Helper()
	got, err := k.srv.read(id)
	if err != nil || got.Disk != told || memory && got.Memory != told {
		k.t.Fatalf("sandbox %s has %+v, and was told %q; %v", id, got, told, err)
	}
}

// stand makes the bystanders: one that runs, and one that is paused.
func (k *trial) stand() {
	k.t.Helper()
	k.values = map[string]string{}
	for _, id := range []*string{&k.runs, &k.paused} {
		var told string
		*id, told = k.make()
		k.values[*id] = told
	}
	k.must(k.post("/sandboxes/"+k.paused+"/pause", nil, nil))
}

// dismiss ends the bystanders, too.
func (k *trial) dismiss() {
	k.t.Helper()
	k.runs, k.paused = "", ""
	k.sweep()
	k.settled()
}

// stillStand checks that nothing became of the bystanders.
func (k *trial) stillStand() {
	k.t.Helper()
	k.oneOf(k.runs, true, "running")
	k.has(k.runs, k.values[k.runs], true)
	k.oneOf(k.paused, true, "paused")
}

// settled waits until every sandbox is in a state of rest, and the host has
// what belongs to them and nothing else. It returns the snapshots that nobody
// owns: those are in quarantine.
func (k *trial) settled() (orphans []string) {
	k.t.Helper()
	program.Eventually(k.t, legalWithin, func() string {
		v := k.srv.inventory(k.t)
		for id, st := range v.States {
			if st != "running" && st != "paused" {
				return fmt.Sprintf("sandbox %s is %s", id, st)
			}
		}
		for what, have := range map[string][]string{"engine instances": v.Instances, "disks": v.Disks, "records": v.Records} {
			if !slices.Equal(have, v.Running) {
				return fmt.Sprintf("%s are %v; those of running sandboxes: %v", what, have, v.Running)
			}
		}
		if len(v.Slots) != len(v.Running) {
			return fmt.Sprintf("slots %v are taken, and %d sandboxes run", v.Slots, len(v.Running))
		}
		if len(v.HalfMade) > 0 || !slices.Equal(v.Saved, v.Snapshots) {
			return fmt.Sprintf("half-made snapshots %v; saved disks %v, snapshots %v", v.HalfMade, v.Saved, v.Snapshots)
		}
		orphans = slices.DeleteFunc(slices.Clone(v.Snapshots), func(s string) bool { return slices.Contains(v.Owned, s) })
		if len(v.Snapshots)-len(orphans) != len(v.Owned) {
			return fmt.Sprintf("snapshots %v are there, and %v are on record", v.Snapshots, v.Owned)
		}
		return ""
	})
	return orphans
}

// sweep ends every sandbox but the bystanders, as their clients would, and
// deletes every snapshot of a client.
func (k *trial) sweep() {
	k.t.Helper()
	for id := range k.srv.inventory(k.t).States {
		if id != k.runs && id != k.paused {
			if err := k.c.Call(context.Background(), http.MethodDelete, "/sandboxes/"+id, nil, nil); err != nil {
				k.t.Errorf("killing %s: %v", id, err)
			}
		}
	}
	var all []struct{ SnapshotID string }
	k.must(k.c.Call(context.Background(), http.MethodGet, "/snapshots", nil, &all))
	for _, s := range all {
		if err := k.c.Call(context.Background(), http.MethodDelete, "/templates/"+s.SnapshotID, nil, nil); err != nil {
			k.t.Errorf("deleting %s: %v", s.SnapshotID, err)
		}
	}
}

// killed does the operation of a point and kills the server there; then a next
// server must be in a legal state.
func (k *trial) killed(point string) {
	k.t.Helper()
	op := operations[opOf(point)]
	k.begin(point)
	op.before(k)
	fail := ""
	if killpoint.Undoes(point) {
		fail = undone[opOf(point)]
	}
	k.srv.arm(k.t, point, fail, syscall.EIO)
	err := op.act(k)
	var r *program.Refusal
	if errors.As(err, &r) && fail == "" {
		k.t.Fatalf("the operation was refused: %v", err)
	}
	k.srv.died(k.t, legalWithin)
	k.srv.up(k.t)
	k.c.Vanish()
	k.settled()
	op.after(k, err == nil)
	k.stillStand()
	k.sweep()
	k.settled()
}

// begin takes leave of the trial before.
func (k *trial) begin(point string) {
	k.box, k.told, k.snap, k.forks = "", "", "", nil
	k.memory = !strings.Contains(point, ".sync.")
}
