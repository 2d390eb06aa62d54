package network

import (
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay"
)

// limited acquires slots that count for a team.
func limited(t *testing.T, p *Pool, id cay.TeamID, l cay.NetworkLimits, n int) []Slot {
	t.Helper()
	var out []Slot
	for range n {
		s := acquire(t, p, true)
		if err := p.LimitTeam(t.Context(), id, l, s.Index); err != nil {
			t.Fatal(err)
		}
		out = append(out, s)
	}
	return out
}

// flood sends a datagram to each of n ports from a slot and returns how many
// arrived, beside the marker from another slot.
func flood(t *testing.T, wan *tap, s, unlimited Slot, first, n uint16) int {
	t.Helper()
	in(t, s.NetNS, func() error {
		for port := range n {
			shoutUDP(netip.AddrPortFrom(publicAddr, first+port))
		}
		return nil
	})
	in(t, unlimited.NetNS, func() error { shoutUDP(netip.AddrPortFrom(markerAddr, first)); return nil })
	arrived := 0
	for _, seen := range wan.await(t, netip.AddrPortFrom(markerAddr, first)) {
		if seen.dst == publicAddr && seen.dport >= first && seen.dport < first+n {
			arrived++
		}
	}
	return arrived
}

func shoutUDP(to netip.AddrPort) {
	if c, err := net.Dial("udp4", to.String()); err == nil {
		c.Write([]byte("x"))
		c.Close()
	}
}

// TestTeamConnections proves that the slots of a team open so many connections
// together and no more, that another team's do not count, and that it stays so
// over a restart, with a policy that changes, and until it is changed.
func TestTeamConnections(t *testing.T) {
	p := testPool(t, "team")
	bound := cay.NetworkLimits{Connections: 30}
	ours := limited(t, p, "ours", bound, 2)
	theirs := limited(t, p, "theirs", cay.NetworkLimits{Connections: 7}, 1)[0]
	free := acquire(t, p, true)
	wan := newTap(t, world, "wan0")
	got := flood(t, wan, ours[0], free, 10_000, 20) + flood(t, wan, ours[1], free, 11_000, 20)
	if got != 30 {
		t.Errorf("two slots opened %d connections, want 30", got)
	}
	if got := flood(t, wan, theirs, free, 12_000, 20); got != 7 {
		t.Errorf("another team's opened %d, want 7", got)
	}
	if got := flood(t, wan, free, free, 13_000, 50); got != 50 {
		t.Errorf("a team without limits opened %d, want 50", got)
	}
	refusals(t, p, ours[1], func(all []cay.EgressRefusal) bool {
		return len(all) > 0 && all[0].Rule == "limit" && strings.Contains(all[0].Reason, "team")
	})

	// Another process finds them in force.
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, s := range append(ours, theirs, free) {
		if _, err := p.Adopt(t.Context(), s.Index); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.SetPolicy(t.Context(), ours[0].Index, onlyOne); err != nil {
		t.Fatal(err)
	}
	if err := p.SetPolicy(t.Context(), ours[0].Index, cay.Egress{}); err != nil {
		t.Fatal(err)
	}
	if got := flood(t, wan, ours[0], free, 20_000, 40); got != 30 {
		t.Errorf("after a restart a slot opened %d connections, want 30", got)
	}

	// Changed, then gone.
	if err := p.LimitTeam(t.Context(), "ours", cay.NetworkLimits{Connections: 5}); err != nil {
		t.Fatal(err)
	}
	if got := flood(t, wan, ours[1], free, 30_000, 40); got != 5 {
		t.Errorf("with a smaller bound a slot opened %d connections, want 5", got)
	}
	if err := p.LimitTeam(t.Context(), "ours", cay.NetworkLimits{}); err != nil {
		t.Fatal(err)
	}
	if got := flood(t, wan, ours[1], free, 40_000, 40); got != 40 {
		t.Errorf("without a bound a slot opened %d connections, want 40", got)
	}
	if got := flood(t, wan, theirs, free, 50_000, 40); got > 7 {
		t.Errorf("the other team's opened %d, want 7 at most", got)
	}
}

// TestTeamRate proves that the slots of a team open so many connections a
// second together.
func TestTeamRate(t *testing.T) {
	p := testPool(t, "trate")
	slots := limited(t, p, "ours", cay.NetworkLimits{PerSecond: 20}, 2)
	free := acquire(t, p, true)
	wan := newTap(t, world, "wan0")
	began := time.Now()
	arrived := flood(t, wan, slots[0], free, 10_000, 200) + flood(t, wan, slots[1], free, 20_000, 200)
	if most := 40 + int(20*time.Since(began).Seconds()) + 1; arrived < 40 || arrived > most {
		t.Errorf("%d of 400 arrived, want 40 to %d", arrived, most)
	}
}

// TestTeamIndexReused proves that a slot of a team that is gone counts for
// nobody when its index serves again.
func TestTeamIndexReused(t *testing.T) {
	p := testPool(t, "treuse", func(p *Pool) { p.Size = 1 })
	bound := cay.NetworkLimits{Connections: 1}
	for i := range 3 {
		s := limited(t, p, cay.TeamID([]string{"a", "b", "a"}[i]), bound, 1)[0]
		if err := p.Release(t.Context(), s.Index); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.LimitTeam(t.Context(), "a", bound, 0, 12345); err != nil {
		t.Errorf("limits for slots that are gone: %v", err)
	}
	eventually(t, "teams without slots are forgotten", func() bool {
		p.teamTurn.Lock()
		defer p.teamTurn.Unlock()
		return len(p.teams) == 0
	})
}

// TestTeamBandwidth proves that the slots of a team together carry no more than
// its limit, in either direction.
func TestTeamBandwidth(t *testing.T) {
	const mbit, size = 16, 3 << 20
	p := testPool(t, "tband")
	slots := limited(t, p, "ours", cay.NetworkLimits{Mbit: mbit}, 2)
	at := netip.AddrPortFrom(publicAddr, 82)
	var l net.Listener
	if err := inFile(world, func() (err error) { l, err = net.Listen("tcp4", at.String()); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, direction := range []string{"out", "in"} {
		t.Run(direction, func(t *testing.T) {
			began := time.Now()
			done := make(chan error, 2*len(slots))
			for _, s := range slots {
				go func() {
					c, err := l.Accept()
					if err == nil {
						defer c.Close()
						if direction == "in" {
							_, err = c.Write(make([]byte, size))
						} else {
							_, err = io.CopyN(io.Discard, c, size)
						}
					}
					done <- err
				}()
				go func() {
					var c net.Conn
					err := in(t, s.NetNS, func() (err error) { c, err = net.Dial("tcp4", at.String()); return err })
					if err == nil {
						defer c.Close()
						if direction == "in" {
							_, err = io.CopyN(io.Discard, c, size)
						} else {
							_, err = c.Write(make([]byte, size))
						}
					}
					done <- err
				}()
			}
			for range 2 * len(slots) {
				if err := <-done; err != nil {
					t.Fatal(err)
				}
			}
			rate := mbit * 1e6 / 8
			least := time.Duration((float64(len(slots)*size)-rate-leastBurst)/rate*0.9*1000) * time.Millisecond
			if took := time.Since(began); took < least {
				t.Errorf("6 MiB took %s over %d Mbit/s together, want at least %s", took, mbit, least)
			} else {
				t.Logf("6 MiB took %s, the bound allows %s", took.Round(time.Millisecond), least)
			}
		})
	}
}

func TestTeamChain(t *testing.T) {
	for _, l := range []cay.NetworkLimits{{}, {Connections: 1, PerSecond: 2, Mbit: 3}} {
		id := cay.TeamID("11111111-1111-4111-8111-111111111111")
		if got, limits, ok := parseTeamChain(teamOut, teamChain(teamOut, id, l)); !ok || got != id || limits != l {
			t.Errorf("%v becomes %s, %v, %v", l, got, limits, ok)
		}
	}
	for _, bad := range []string{"", "team-out", "team-out-1-2-x", "team-in-1-2-3-x", "team-out-a-2-3-x"} {
		if id, l, ok := parseTeamChain(teamOut, bad); ok {
			t.Errorf("%q is %s, %v", bad, id, l)
		}
	}
}
