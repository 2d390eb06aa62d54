package orchestrator_test

import (
	"errors"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay"
)

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, _ := open(t, w, 0)
		defer o.Close()
		mustCreate(t, o, "i1")
		ask := func(from, to time.Time) []cay.Metric {
			t.Helper()
			got, err := o.Metrics(t.Context(), "i1", from, to)
			if err != nil {
				t.Fatal(err)
			}
			return got
		}
		first := ask(time.Time{}, time.Time{}) // measured on demand: nobody waits for the first point
		if len(first) != 1 || first[0].CPUs != 2 || first[0].MemoryUsed != 5<<20 || first[0].MemoryTotal != 512<<20 ||
			first[0].MemoryCached != 1<<20 || first[0].DiskUsed != 3<<20 || first[0].DiskTotal != 1<<30 {
			t.Fatalf("the first point: %+v", first)
		}
		time.Sleep(21 * time.Second)
		synctest.Wait()
		all := ask(time.Time{}, time.Time{})
		if len(all) != 5 {
			t.Fatalf("%d points after 21 s, want 5", len(all))
		}
		for _, p := range all[2:] { // a second of CPU in five
			if math.Abs(p.CPUPercent-20) > 0.01 {
				t.Errorf("CPU %v %%, want 20", p.CPUPercent)
			}
		}
		if got, err := o.LastMetric(t.Context(), "i1"); err != nil || got != all[4] {
			t.Errorf("the last point: %+v, %v", got, err)
		}
		mustCreate(t, o, "i2")
		if got, err := o.LastMetric(t.Context(), "i2"); err != nil || got.CPUs != 2 {
			t.Errorf("the last point of a young one: %+v, %v", got, err)
		}
		if err := o.Kill(t.Context(), "i2", cay.EndRequest); err != nil {
			t.Fatal(err)
		}
		if _, err := o.LastMetric(t.Context(), "i2"); cay.CodeOf(err) != cay.CodeSandboxNotFound {
			t.Errorf("the last point of a killed one: %v", err)
		}
		if got := ask(all[1].At, all[2].At); len(got) != 2 || got[0] != all[1] || got[1] != all[2] {
			t.Errorf("between two instants: %+v", got)
		}
		w.setFail("stats", errors.New("the engine does not answer"))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := ask(time.Time{}, time.Time{}); len(got) != 5 {
			t.Errorf("%d points, though the engine does not answer", len(got))
		}
		w.setFail("stats", nil)
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if got := ask(time.Time{}, time.Time{}); len(got) != 720 {
			t.Errorf("%d points are kept, want 720", len(got))
		}
		if err := o.Kill(t.Context(), "i1", cay.EndRequest); err != nil {
			t.Fatal(err)
		}
		if _, err := o.Metrics(t.Context(), "i1", time.Time{}, time.Time{}); cay.CodeOf(err) != cay.CodeSandboxNotFound {
			t.Errorf("of a killed sandbox: %v", err)
		}
	})
}
