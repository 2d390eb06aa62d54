package runtimetest

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"github.com/cayhq/cay/runtime"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestFake(t *testing.T) {
	var n atomic.Int64
	Run(t, func(*testing.T) *Fixture {
		m := &Machine{}
		first := &Fake{Machine: m, Body: Script}
		return &Fixture{
			Runtime: first,
			Spec: func(_ *testing.T, args ...string) runtime.Spec {
				return runtime.Spec{ID: runtime.InstanceID(fmt.Sprint("x", n.Add(1))), RootFS: "/rootfs", NetNS: "/netns",
					Args: append([]string{"/init"}, args...), Limits: runtime.Limits{CPUs: 1, MemoryBytes: 256 << 20, PIDs: 256}}
			},
			Again: func(*testing.T) runtime.Runtime { return &Fake{Machine: m, Body: Script} },
			Crash: func(*testing.T) {},
			Leftovers: func(*testing.T) []string {
				var out []string
				for id := range m.instances {
					out = append(out, string(id))
				}
				return out
			},
		}
	})
}

// A machine with a directory is the same one in the next process.
func TestKeptMachine(t *testing.T) {
	dir, memory := t.TempDir(), t.TempDir()
	spec := runtime.Spec{ID: "x1", RootFS: "/rootfs", NetNS: "/netns", Args: []string{"/init"}, Limits: runtime.Limits{CPUs: 1, MemoryBytes: 1, PIDs: 1}}
	f := &Fake{Machine: &Machine{Dir: dir}}
	if err := errors.Join(f.Open(t.Context()), f.Create(t.Context(), spec), f.Start(t.Context(), "x1")); err != nil {
		t.Fatal(err)
	}
	f.Guest("x1").SetMemory("something")
	if err := f.Freeze(t.Context(), "x1"); err != nil {
		t.Fatal(err)
	}
	next := &Fake{Machine: &Machine{Dir: dir}}
	if err := next.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	all, err := next.Instances(t.Context())
	if err != nil || len(all) != 1 || all[0].State != runtime.Frozen || next.Guest("x1").Memory() != "something" {
		t.Fatalf("the next process finds %+v, %v", all, err)
	}
	spec.ID = "x2"
	if err := errors.Join(next.Checkpoint(t.Context(), "x1", memory), next.Thaw(t.Context(), "x1"), next.Create(t.Context(), spec),
		next.Restore(t.Context(), "x2", memory), next.Kill(t.Context(), "x1")); err != nil {
		t.Fatal(err)
	}
	last := &Fake{Machine: &Machine{Dir: dir}}
	if last.Len() != 1 || last.Guest("x2").Memory() != "something" {
		t.Errorf("the last process finds %d instances", last.Len())
	}
}
