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
	m.CPUUsed = s.cpu.used(time.Now(), cpuTime("/proc"), m.CPUCount)
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

// cpuMeter turns a growing CPU time into a share since the last question.
type cpuMeter struct {
	mu   sync.Mutex
	at   time.Time
	busy time.Duration
}

// used returns the share of n CPUs that was busy since the last call, in
// percent with two decimals; 0 at the first.
func (m *cpuMeter) used(now time.Time, busy time.Duration, n int) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	was, before := m.at, m.busy
	m.at, m.busy = now, busy
	span := now.Sub(was)
	if was.IsZero() || span <= 0 || busy < before {
		return 0
	}
	pct := 100 * float64(busy-before) / (float64(span) * float64(n))
	return math.Round(100*min(pct, 100)) / 100
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

// memory reads /proc/meminfo: what programs hold is what they could not get.
func memory(path string) (total, used, cache uint64) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, 0, 0
	}
	v := map[string]uint64{}
	for l := range strings.Lines(string(b)) {
		k, rest, ok := strings.Cut(l, ":")
		if n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 54); ok && err == nil {
			v[k] = n << 10
		}
	}
	total = v["MemTotal"]
	used = total - min(total, v["MemAvailable"])
	return total, used, min(v["Cached"]+v["Buffers"]+v["SReclaimable"], total)
}
