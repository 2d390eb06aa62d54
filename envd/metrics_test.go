package envd

import (
	"encoding/json"
	"maps"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestMetrics(t *testing.T) {
	g := newFileGuest(t)
	get := func() map[string]float64 {
		t.Helper()
		code, text, h := g.get(g.web.URL + "/metrics")
		if code != 200 || h.Get("Content-Type") != "application/json" || h.Get("Cache-Control") != "no-store" {
			t.Fatalf("%d %v %s", code, h, text)
		}
		var m map[string]float64
		must(t, json.Unmarshal([]byte(text), &m))
		return m
	}
	m := get()
	want := []string{"cpu_count", "cpu_used_pct", "disk_total", "disk_used", "mem_cache", "mem_total", "mem_total_mib", "mem_used", "mem_used_mib", "ts"}
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(m))); diff != "" {
		t.Error(diff)
	}
	if math.Abs(m["ts"]-float64(time.Now().Unix())) > 5 {
		t.Errorf("ts is %v", m["ts"])
	}
	for _, p := range [][2]string{{"mem_used", "mem_total"}, {"mem_cache", "mem_total"}, {"disk_used", "disk_total"}} {
		if m[p[0]] <= 0 || m[p[0]] > m[p[1]] {
			t.Errorf("%s is %v of %v", p[0], m[p[0]], m[p[1]])
		}
	}
	if m["mem_total_mib"] != math.Floor(m["mem_total"]/(1<<20)) || m["mem_used_mib"] != math.Floor(m["mem_used"]/(1<<20)) {
		t.Errorf("MiB and bytes differ: %v", m)
	}
	if m["cpu_count"] < 1 || m["cpu_used_pct"] < 0 || m["cpu_used_pct"] > 100 {
		t.Errorf("CPU: %v", m)
	}
}

func TestCPUMeter(t *testing.T) {
	var m cpuMeter
	for i, c := range []struct {
		now, busy time.Duration
		n         int
		want      float64
	}{
		{10 * time.Second, 2 * time.Second, 2, 10},    // since the start
		{11 * time.Second, 4 * time.Second, 2, 100},   // both busy
		{14 * time.Second, 5 * time.Second, 2, 16.67}, // one of six
		{14 * time.Second, 5 * time.Second, 2, 0},     // at once again
		{13 * time.Second, 4 * time.Second, 2, 0},     // backwards, after a restore
		{14 * time.Second, 9 * time.Second, 2, 100},   // ticks are coarse
		{15 * time.Second, 10 * time.Second, 0, 0},
	} {
		if got := m.used(c.now, c.busy, c.n); got != c.want {
			t.Errorf("%d: %v, want %v", i, got, c.want)
		}
	}
}

func TestParseCPU(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"cpu  100 20 30 4000 500 6 7 8 90 10\n": 1710 * time.Millisecond, // neither idle, waiting nor the guest's
		"cpu  25 0 11 6470 0 0 0 0 0 0\n":       360 * time.Millisecond,
		"cpu 1 2 3 4":                           60 * time.Millisecond,
		"cpu0 1 2 3 4":                          0,
		"cpu":                                   0,
		"":                                      0,
		"cpu x 1 1 9 9":                         20 * time.Millisecond,
	} {
		if got := parseCPU(text); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}

func TestParseMemory(t *testing.T) {
	const gvisor = "MemTotal:         524288 kB\nMemFree:          506440 kB\nMemAvailable:     506440 kB\nBuffers:               0 kB\nCached:            13748 kB\nShmem:              1000 kB\n"
	const linux = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\nBuffers:          50 kB\nCached:          450 kB\nSReclaimable:     20 kB\nShmem: 5 kB\n"
	for text, want := range map[string][3]uint64{
		gvisor:              {524288 << 10, (524288 - 506440 - 12748) << 10, 13748 << 10},
		linux:               {1000 << 10, 400 << 10, 520 << 10},
		"":                  {},
		"MemTotal: 10 kB\n": {10 << 10, 10 << 10, 0},
		"MemTotal: 10 kB\nMemFree: 20 kB\nCached: 99 kB": {10 << 10, 0, 10 << 10},
		"MemTotal: x kB\nnonsense\n:\n":                  {},
	} {
		total, used, cache := parseMemory(text)
		if got := [3]uint64{total, used, cache}; got != want {
			t.Errorf("%.30q: %v, want %v", text, got, want)
		}
	}
}

func FuzzMemory(f *testing.F) {
	f.Add("MemTotal: 10 kB\nMemFree: 20 kB\n", "cpu 1 2 3 4")
	f.Fuzz(func(t *testing.T, mem, cpu string) {
		total, used, cache := parseMemory(mem)
		if used > total || cache > total {
			t.Errorf("%d used, %d cache of %d", used, cache, total)
		}
		if d := parseCPU(cpu); d < 0 {
			t.Errorf("CPU time %v", d)
		}
	})
}
