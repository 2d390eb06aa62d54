package gvisor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/runtime"
)

// figures collects the durations of one step.
type figures map[string][]time.Duration

func (f figures) add(name string, d time.Duration) { f[name] = append(f[name], d) }

func (f figures) report(b *testing.B) {
	for name, ds := range f {
		slices.Sort(ds)
		b.ReportMetric(float64(ds[len(ds)/2].Microseconds())/1000, name+"-p50-ms")
		b.ReportMetric(float64(ds[0].Microseconds())/1000, name+"-min-ms")
	}
	b.ReportMetric(0, "ns/op")
}

// stamped returns when the guest's main began, by the guest's clock.
func stamped(b *testing.B, text string) time.Time {
	b.Helper()
	n, err := strconv.ParseInt(strings.TrimPrefix(strings.TrimSpace(text), "stamp "), 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return time.Unix(0, n)
}

// BenchmarkLifecycle times the steps of one instance.
func BenchmarkLifecycle(b *testing.B) {
	m, r := open(b)
	f := figures{}
	for range b.N {
		b.StopTimer()
		s := m.spec(b, "stamp")
		b.StartTimer()
		t0 := time.Now()
		if err := r.Create(b.Context(), s); err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		if err := r.Start(b.Context(), s.ID); err != nil {
			b.Fatal(err)
		}
		t2 := time.Now()
		line, _ := says(b, r, s.ID, "stamp")
		first := stamped(b, line)
		t3 := time.Now()
		if err := r.Kill(b.Context(), s.ID); err != nil {
			b.Fatal(err)
		}
		f.add("create", t1.Sub(t0))
		f.add("start", t2.Sub(t1))
		f.add("start-to-main", first.Sub(t1))
		f.add("cold-to-main", first.Sub(t0))
		f.add("kill", time.Since(t3))
	}
	f.report(b)
}

// BenchmarkBareRunsc times `runsc run --detach` and `runsc delete --force` with
// the same flags, spec and binary: the yardstick.
func BenchmarkBareRunsc(b *testing.B) {
	m := newMachine(b)
	f := figures{}
	for range b.N {
		b.StopTimer()
		s := m.spec(b, "stamp")
		bare, err := NewBare(filepath.Join(m.dir, "bare"), s)
		if err != nil {
			b.Fatal(err)
		}
		out, err := os.Create(filepath.Join(bare.l.dir, "out"))
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		t0 := time.Now()
		if err := bare.Run(b.Context(), out); err != nil {
			data, _ := os.ReadFile(out.Name())
			b.Fatalf("%v: %s", err, data)
		}
		t1 := time.Now()
		var line string
		until(b, "the guest says its stamp", func() bool {
			data, _ := os.ReadFile(out.Name())
			line = string(data)
			return strings.HasPrefix(line, "stamp") && strings.HasSuffix(line, "\n")
		})
		first := stamped(b, line)
		t2 := time.Now()
		if err := bare.Delete(b.Context()); err != nil {
			b.Fatal(err)
		}
		f.add("run", t1.Sub(t0))
		f.add("cold-to-main", first.Sub(t0))
		f.add("delete", time.Since(t2))
		out.Close()
		if err := bare.Close(); err != nil {
			b.Error(err)
		}
	}
	f.report(b)
}

// BenchmarkParallel creates, starts and kills several at once, and reports how
// many a second.
func BenchmarkParallel(b *testing.B) {
	for _, c := range []int{1, 2, 4, 8} {
		b.Run(strconv.Itoa(c), func(b *testing.B) {
			m, r := open(b)
			var specs []runtime.Spec
			for range b.N * c {
				specs = append(specs, m.spec(b, "run"))
			}
			b.ResetTimer()
			next := make(chan runtime.Spec)
			done := make(chan error)
			for range c {
				go func() {
					var err error
					for s := range next {
						if e := r.Create(b.Context(), s); e != nil {
							err = e
						} else if e := r.Start(b.Context(), s.ID); e != nil {
							err = e
						} else if e := r.Kill(b.Context(), s.ID); e != nil {
							err = e
						}
					}
					done <- err
				}()
			}
			for _, s := range specs {
				next <- s
			}
			close(next)
			for range c {
				if err := <-done; err != nil {
					b.Error(err)
				}
			}
			b.ReportMetric(float64(len(specs))/b.Elapsed().Seconds(), "guests/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkIdleMemory reports what idle guests cost, by the kernel's
// proportional count.
func BenchmarkIdleMemory(b *testing.B) {
	m, r := open(b)
	const n = 10
	var pids []int
	base := pss(b, r.info.PID)
	for range n {
		s := m.spec(b, "print", "up")
		begin(b, r, s)
		says(b, r, s.ID, "up")
		pids = append(pids, cgroup(home(r.Dir).instance(s.ID).cgroup).members()...)
	}
	time.Sleep(5 * time.Second) // let the engines come to rest: this is no test
	var sum int64
	kinds := map[string]int64{}
	var seen []int
	for _, p := range pids {
		// The kernel reports memory that processes share, as those do that run
		// guest code, for each of them.
		if slices.ContainsFunc(seen, func(o int) bool {
			r, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(o), uintptr(p), 1 /* KCMP_VM */, 0, 0, 0)
			return errno == 0 && r == 0
		}) {
			continue
		}
		seen = append(seen, p)
		args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p))
		kind, _, _ := strings.Cut(string(args), "\x00")
		if kind == "" {
			kind = "stub"
		}
		kinds[kind] += pss(b, p)
		sum += pss(b, p)
	}
	for kind, kib := range kinds {
		b.ReportMetric(float64(kib)/n/1024, kind+"-MiB")
	}
	if st, err := r.Stats(b.Context(), runtime.InstanceID("x1t"+strconv.Itoa(os.Getpid()))); err == nil {
		b.ReportMetric(float64(st.MemoryBytes)/(1<<20), "cgroup-MiB")
	}
	b.ReportMetric(float64(sum)/n/1024, "PSS-MiB/guest")
	b.ReportMetric(float64(len(pids))/n, "processes/guest")
	b.ReportMetric(float64(pss(b, r.info.PID))/1024, "supervisor-PSS-MiB")
	b.ReportMetric(float64(pss(b, r.info.PID)-base)/n, "supervisor-KiB/guest")
	b.ReportMetric(0, "ns/op")
}

// pss is the proportional set size of a process in KiB.
func pss(b *testing.B, pid int) int64 {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "Pss:" {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n
		}
	}
	return 0
}
