package api

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay"
)

// What a creator says about the way to the ports reaches the node, is told
// again, and stays over a pause.
func TestIngress(t *testing.T) {
	inBubble(t, testIngress)
}

func testIngress(t *testing.T, f *fixture) {
	defer f.run()()
	id := f.create(`{"templateID":"base","network":{"maskRequestHost":"localhost:${PORT}","httpsPorts":[8443,443,8443]}}`)
	want := cay.Ingress{MaskHost: "localhost:${PORT}", HTTPSPorts: []uint16{443, 8443}}
	if d := cmp.Diff(want, f.node.configs[id].Ingress); d != "" {
		t.Errorf("the node is told (-want +got):\n%s", d)
	}
	var got struct {
		Network struct {
			MaskRequestHost string
			HTTPSPorts      []int
		}
	}
	f.want(200, f.request("GET", "/sandboxes/"+string(id), "")).decode(t, &got)
	if got.Network.MaskRequestHost != "localhost:${PORT}" || len(got.Network.HTTPSPorts) != 3 {
		t.Errorf("the sandbox is told as %+v", got)
	}
	told := f.node.configs[id]
	told.Ingress = cay.Ingress{}
	f.node.configs[id] = told
	f.want(204, f.request("POST", "/sandboxes/"+string(id)+"/pause", ""))
	f.want(201, f.request("POST", "/sandboxes/"+string(id)+"/connect", `{"timeout":60}`))
	if d := cmp.Diff(want, f.node.configs[id].Ingress); d != "" {
		t.Errorf("after a pause (-want +got):\n%s", d)
	}
}

func TestIsMask(t *testing.T) {
	for _, m := range []string{"localhost", "localhost:3000", "localhost:${PORT}", "${PORT}-app.example.com", "A_b.example.", "127.0.0.1:${PORT}", "[::1]", "[::1]:${PORT}", "xn--bcher-kva.de"} {
		if !isMask(m) {
			t.Errorf("isMask(%q) = false", m)
		}
	}
	for _, m := range []string{"bücher.de", "a b", "a\nb", "a:b", "a:0", "a:65536", "a:080", "a:1:2", "::1", "[::1", "[a]", "[fe80::1%25e]", "a..b", ".a", ":80", "a/b", "http://a", "${port}", "user@a", "a:${PORT}${PORT}"} {
		if isMask(m) {
			t.Errorf("isMask(%q) = true", m)
		}
	}
}
