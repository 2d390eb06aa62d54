package envd

import (
	"bufio"
	"math"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// metricsBody is the answer of /metrics. Sizes are in bytes but for the two
// of the older clients, in MiB; the CPU's use is of all CPUs together, 0 to 100.
type metricsBody struct {
	Timestamp   int64   `json:"ts"`
	CPUCount    int     `json:"cpu_count"`
	CPUUsed     float64 `json:"cpu_used_pct"`
	MemTotal    uint64  `json:"mem_total"`
	MemUsed     uint64  `json:"mem_used"`
	MemCache    uint64  `json:"mem_cache"`
	MemTotalMiB uint64  `json:"mem_total_mib"`
	MemUsedMiB  uint64  `json:"mem_used_mib"`
	DiskUsed    uint64  `json:"disk_used"`
	DiskTotal   uint64  `json:"disk_total"`
}

func (s *Server) metrics(w http.ResponseWriter, _ *http.Request) {
	m := metricsBody{Timestamp: s.now().Unix(), CPUCount: runtime.NumCPU()}
	m.CPUUsed = s.cpu.used(sinceBoot(), cpuTime("/proc"), m.CPUCount)
	m.MemTotal, m.MemUsed, m.MemCache = memory("/proc/meminfo")
	m.MemTotalMiB, m.MemUsedMiB = m.MemTotal>>20, m.MemUsed>>20
	var st unix.Statfs_t
	if err := unix.Statfs("/", &st); err == nil {
		m.DiskTotal = st.Blocks * uint64(st.Bsize)
		m.DiskUsed = (st.Blocks - st.Bfree) * uint64(st.Bsize)
	}
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, http.StatusOK, m)
}

// cpuMeter turns a growing CPU time into a share since the last question, or
// since the guest's start at the first.
type cpuMeter struct {
	mu   sync.Mutex
	at   time.Duration
	busy time.Duration
}

// used returns the share of n CPUs that was busy, in percent with two decimals.
// now and busy count from the guest's start.
func (m *cpuMeter) used(now, busy time.Duration, n int) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	span, work := now-m.at, busy-m.busy
	m.at, m.busy = now, busy
	if span <= 0 || work <= 0 || n <= 0 {
		return 0
	}
	pct := 100 * float64(work) / (float64(span) * float64(n))
	return math.Round(100*min(pct, 100)) / 100
}

// sinceBoot is the age of the guest.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// tick is the unit of CPU time in /proc, USER_HZ.
const tick = time.Second / 100

// cpuTime is how long the guest's CPUs have worked.
func cpuTime(proc string) time.Duration {
	f, err := os.Open(proc + "/stat")
	if err != nil {
		return 0
	}
	defer f.Close()
	line, _ := bufio.NewReader(f).ReadString('\n')
	return parseCPU(line)
}

// parseCPU adds up the first line of /proc/stat but for idle and waiting
// (proc(5)); guest times are part of others.
func parseCPU(line string) time.Duration {
	f := strings.Fields(line)
	if len(f) < 5 || f[0] != "cpu" {
		return 0
	}
	var sum uint64
	for i, v := range f[1:min(len(f), 9)] {
		n, err := strconv.ParseUint(v, 10, 54)
		if err == nil && i != 3 && i != 4 {
			sum += n
		}
	}
	return time.Duration(sum) * tick
}

// memory reads /proc/meminfo. Used is what programs hold: what the kernel could
// take back for others, as it does its caches of files, is not.
func memory(path string) (total, used, cache uint64) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, 0, 0
	}
	return parseMemory(string(b))
}

func parseMemory(text string) (total, used, cache uint64) {
	v := map[string]uint64{}
	for l := range strings.Lines(text) {
		k, rest, ok := strings.Cut(l, ":")
		if n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 53); ok && err == nil {
			v[k] = n << 10
		}
	}
	total = v["MemTotal"]
	cache = min(v["Cached"]+v["Buffers"]+v["SReclaimable"], total)
	available := v["MemAvailable"]
	if available <= v["MemFree"] {
		// gVisor counts only what is free; files in memory (but those of
		// tmpfs, which live nowhere else) can be had too.
		available = v["MemFree"] + cache - min(v["Shmem"], cache)
	}
	return total, total - min(total, available), cache
}
