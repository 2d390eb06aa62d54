package network

import (
	"context"
	"net"
	"os"
	"testing"
)

const victimDir = "CAY_NETWORK_TEST_VICTIM"

func victim(string) {}

func netParse(s string) (net.IP, *net.IPNet, error) { return net.ParseCIDR(s) }

func TestLife(t *testing.T) {
	p := testPool(t, "life")
	s := acquire(t, p, true)
	t.Log(s)
	if os.Getenv("SHOW") != "" {
		select {}
	}
	if err := p.Release(context.Background(), s.Index); err != nil {
		t.Fatal(err)
	}
}
