package runtimetest

import (
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
