package edge

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/cayhq/cay/test/program"
)

// What a creator says about the way to the ports holds by each way, also after a
// pause and after a restart of the server.
func TestIngress(t *testing.T) {
	secure := []string{"--tls-addr", "127.0.0.1:8443"}
	e := startEdge(t, secure...)
	e.secure = ":8443"
	var made struct{ SandboxID, TrafficAccessToken, Domain string }
	if err := e.client.Call(t.Context(), "POST", "/v2/sandboxes", map[string]any{"templateID": "base", "timeout": 60, "secure": true,
		"network": map[string]any{"allowPublicTraffic": false}}, &made); err != nil {
		t.Fatal(err)
	}
	if made.Domain != domain+":8443" || made.TrafficAccessToken == "" {
		t.Errorf("told %+v", made)
	}
	e.box = e.inhabit(t, map[string]any{"secure": true, "network": map[string]any{"allowPublicTraffic": false,
		"maskRequestHost": "app.internal:${PORT}", "httpsPorts": []int{8443}}})
	var told struct{ TrafficAccessToken string }
	if err := e.client.Call(t.Context(), "POST", "/sandboxes/"+e.box.ID+"/connect", map[string]any{"timeout": 1200}, &told); err != nil {
		t.Fatal(err)
	}
	hc := e.http(h2)
	defer hc.CloseIdleConnections()
	ask := func(w way, port int, token string) string {
		req := e.request(t, w, port, "GET", "/hello", nil)
		if token != "" {
			req.Header.Set("E2B-Traffic-Access-Token", token)
		}
		res, err := hc.Do(req)
		if err != nil {
			return err.Error()
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body) // what came is compared
		return fmt.Sprint(res.StatusCode, " ", string(b))
	}
	check := func(when string, by ...way) {
		t.Helper()
		for _, w := range by {
			_, host, _ := strings.Cut(w.base(e, 8080), "://")
			_, hostTLS, _ := strings.Cut(w.base(e, 8443), "://")
			for _, c := range []struct {
				port        int
				token, want string
			}{
				{8080, told.TrafficAccessToken, fmt.Sprintf(`200 hello app.internal:8080 [%q] tls=false`, host)},
				{8443, told.TrafficAccessToken, fmt.Sprintf(`200 hello app.internal:8443 [%q] tls=true`, hostTLS)},
				{8080, "", `403 {"sandboxId":"` + e.box.ID + `","message":"The traffic access token is missing`},
				{8080, made.TrafficAccessToken, `403 {"sandboxId":"` + e.box.ID + `","message":"The traffic access token is wrong`},
				{program.EnvdPort, "", "401 "}, // the daemon has its own token, and its Host is not masked
			} {
				if got := ask(w, c.port, c.token); !strings.HasPrefix(got, c.want) {
					t.Errorf("%s, %s: port %d says %q, want %q", when, w.name, c.port, got, c.want)
				}
			}
		}
	}
	check("at first", ways...)
	e.SetArgs(append(append(secure, "--redirect-http", "on"), localDomain...)...)
	e.Restart(t)
	check("after a restart", ways[:2]...)
	if err := e.client.Call(t.Context(), "POST", "/sandboxes/"+e.box.ID+"/pause", nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := e.client.Call(t.Context(), "POST", "/sandboxes/"+e.box.ID+"/connect", map[string]any{"timeout": 1200}, nil); err != nil {
		t.Fatal(err)
	}
	check("after a pause", ways[:2]...)

	plain := &http.Client{Transport: &http.Transport{DialContext: dialLocal}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	res, err := plain.Get("http://" + e.host(8080) + e.proxyPort() + "/hello?a=b")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 308 || res.Header.Get("Location") != "https://"+e.host(8080)+":8443/hello?a=b" {
		t.Errorf("plain: %d, %s", res.StatusCode, res.Header.Get("Location"))
	}
}
