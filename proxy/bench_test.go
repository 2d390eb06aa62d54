package proxy

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/catalog"
	"github.com/cayhq/cay/catalog/catalogtest"
)

// BenchmarkAdded measures one request at a time, straight to the guest and
// through the proxy; the difference of the medians is what the proxy adds
// (goal: 0.15 ms).
func BenchmarkAdded(b *testing.B) {
	for _, port := range []uint16{49983, 8080} {
		b.Run(strconv.Itoa(int(port)), func(b *testing.B) { benchmarkAdded(b, port) })
	}
}

func benchmarkAdded(b *testing.B, port uint16) {
	r := catalog.Route{Sandbox: cay.NewSandboxID(), Execution: cay.NewExecutionID(), Addr: netip.MustParseAddr("127.3.3.3")}
	cat := &catalogtest.Table{}
	_ = cat.Put(b.Context(), r)
	l, err := net.Listen("tcp", netip.AddrPortFrom(r.Addr, port).String())
	if err != nil {
		b.Fatal(err)
	}
	guest := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })}}
	guest.Start()
	defer guest.Close()
	p := &Server{Catalog: cat}
	front := httptest.NewServer(p.Handler())
	defer p.Close()
	defer front.Close()
	measure := func(url string, keep bool) time.Duration {
		tr := &http.Transport{DisableKeepAlives: !keep}
		defer tr.CloseIdleConnections()
		var took []time.Duration
		for range b.N {
			req, _ := http.NewRequest("GET", url, nil)
			req.Header.Set(headerSandbox, string(r.Sandbox))
			req.Header.Set(headerPort, strconv.Itoa(int(port)))
			start := time.Now()
			res, err := tr.RoundTrip(req)
			if err != nil {
				b.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, res.Body)
			res.Body.Close()
			took = append(took, time.Since(start))
		}
		slices.Sort(took)
		return took[len(took)/2]
	}
	// A user's port gets a connection per request; so it does directly.
	direct := measure("http://"+l.Addr().String(), port == envdPort)
	proxied := measure(front.URL, true)
	b.ReportMetric(float64(direct.Microseconds()), "direct-µs")
	b.ReportMetric(float64(proxied.Microseconds()), "proxied-µs")
	b.ReportMetric(float64((proxied - direct).Microseconds()), "added-µs")
	b.ReportMetric(0, "ns/op")
}
