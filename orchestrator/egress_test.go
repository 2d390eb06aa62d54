package orchestrator_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/egress"
	"github.com/cayhq/cay/network"
	"github.com/cayhq/cay/orchestrator"
)

var (
	shut  = cay.Egress{Deny: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}
	named = cay.Egress{Deny: shut.Deny, AllowNames: []string{"example.com"}}
	proxy = cay.Egress{Proxy: &cay.EgressProxy{Address: "proxy.example:1080", Username: "u", Password: "hunter2"}}
)

func (s slots) SetPolicy(_ context.Context, i int, e cay.Egress) error {
	if err := s.err("policy"); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.slots[i] {
		return errors.New("no such slot")
	}
	s.policies[i] = e
	return nil
}

func (s slots) LimitTeam(_ context.Context, id cay.TeamID, l cay.NetworkLimits, slots ...int) error {
	if err := s.err("limit"); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limits[id] = l
	for _, i := range slots {
		if s.slots[i] && l != (cay.NetworkLimits{}) {
			s.members[i] = id
		}
	}
	return nil
}

// Divert gives sockets that are none.
func (s slots) Divert(context.Context, int) (network.Diverted, error) {
	return network.Diverted{}, s.err("divert")
}

func (s slots) Dial(context.Context, int, netip.AddrPort) (net.Conn, error) {
	return nil, errors.New("there is no network here")
}

func (s slots) Refusals(_ context.Context, i int, seq uint64) ([]cay.EgressRefusal, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.refusals[i]
	return slices.Clone(all[min(int(seq), len(all)):]), nil
}

func (s slots) NoteRefusal(i int, r cay.EgressRefusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.Seq, r.Count = uint64(len(s.refusals[i])+1), 1
	s.refusals[i] = append(s.refusals[i], r)
}

// slotOf returns the slot of a sandbox, which its address names.
func slotOf(t *testing.T, o *orchestrator.Orchestrator, id cay.SandboxID) int {
	t.Helper()
	s, err := o.Get(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return int(netip.MustParseAddr(s.Host.Address).As4()[3])
}

// policyOf is what the network has of a sandbox.
func (w *world) policyOf(t *testing.T, o *orchestrator.Orchestrator, id cay.SandboxID) cay.Egress {
	t.Helper()
	i := slotOf(t, o, id)
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.policies[i]
}

// names is a server of names that remembers what it serves.
type names struct {
	mu     sync.Mutex
	serves map[cay.ExecutionID]egress.Guest
	fail   error
}

func (n *names) Attach(g egress.Guest) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fail != nil {
		return n.fail
	}
	if _, twice := n.serves[g.Execution]; twice {
		return errors.New("attached twice")
	}
	n.serves[g.Execution] = g
	return nil
}

func (n *names) Update(e cay.ExecutionID, p cay.Egress) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	g, ok := n.serves[e]
	if !ok {
		return errors.New("not attached")
	}
	g.Policy = p
	n.serves[e] = g
	return nil
}

func (n *names) Detach(e cay.ExecutionID) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.serves, e)
	return nil
}

func (n *names) Bundle() (string, error) { return "the node's authority", nil }

func (n *names) all() []egress.Guest {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []egress.Guest
	for _, g := range n.serves {
		out = append(out, g)
	}
	return out
}

// openNamed is [reopen] with a server of names.
func openNamed(t *testing.T, w *world, dir string, pool int) (*orchestrator.Orchestrator, *names) {
	t.Helper()
	n := &names{serves: map[cay.ExecutionID]egress.Guest{}}
	o := node(w, dir, pool)
	o.Names = n
	if err := o.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	return o, n
}

// A policy is in force from the first packet on, changes while the sandbox
// runs, and outlives the server, the secret in it too.
func TestEgressPolicy(t *testing.T) {
	for _, pool := range []int{0, 1} {
		t.Run(fmt.Sprintf("pool %d", pool), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, dir := newWorld(), t.TempDir()
				o, n := openNamed(t, w, dir, pool)
				defer o.Close()
				o.Warm("b1", config("x").Resources)
				time.Sleep(time.Second)
				synctest.Wait()
				c := config("i1")
				c.Egress = shut
				if _, err := o.Create(t.Context(), c); err != nil {
					t.Fatal(err)
				}
				is := func(want cay.Egress) {
					t.Helper()
					if got := w.policyOf(t, o, "i1"); !reflect.DeepEqual(got, want) {
						t.Errorf("the network has %+v, want %+v", got, want)
					}
					all := n.all()
					switch {
					case want.Named() && (len(all) != 1 || !reflect.DeepEqual(all[0].Policy, want) || all[0].Sandbox != "i1" || all[0].Team != "t"):
						t.Errorf("the server of names has %+v", all)
					case !want.Named() && len(all) != 0:
						t.Errorf("the server of names still has %+v", all)
					}
				}
				is(shut)
				for _, e := range []cay.Egress{named, proxy, {}, named, proxy} {
					if err := o.SetEgress(t.Context(), "i1", e); err != nil {
						t.Fatal(err)
					}
					is(e)
				}
				if err := o.Close(); err != nil {
					t.Fatal(err)
				}
				w.mu.Lock()
				clear(w.policies)
				w.mu.Unlock()
				o, n = openNamed(t, w, dir, pool)
				defer o.Close()
				is(proxy)
				if err := o.Kill(t.Context(), "i1", cay.EndRequest); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if all := n.all(); len(all) != 0 {
					t.Errorf("after the end the server of names has %+v", all)
				}
				if err := o.SetEgress(t.Context(), "i1", shut); cay.CodeOf(err) != cay.CodeSandboxNotFound {
					t.Errorf("changing an ended sandbox: %v", err)
				}
			})
		})
	}
}

// A guest trusts the node's authority if a rule needs that, and before the rule
// is in force; no other guest does.
func TestEgressTrust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, dir := newWorld(), t.TempDir()
		o, n := openNamed(t, w, dir, 0)
		defer o.Close()
		authority, err := n.Bundle()
		if err != nil {
			t.Fatal(err)
		}
		ruled := named
		ruled.Rules = []cay.EgressRule{{Name: "example.com", Headers: map[string]string{"X": "y"}}}
		for id, e := range map[cay.SandboxID]cay.Egress{"i1": named, "i2": ruled} {
			c := config(string(id))
			c.Egress = e
			if _, err := o.Create(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			want := ""
			if id == "i2" {
				want = authority
			}
			if got := w.inits[len(w.inits)-1].CABundle; got != want {
				t.Errorf("%s was told to trust %q, want %q", id, got, want)
			}
		}
		if err := o.SetEgress(t.Context(), "i1", shut); err != nil || len(w.trusted) != 0 {
			t.Errorf("without a rule a guest was told to trust %q (%v)", w.trusted, err)
		}
		w.setFail("trust", errors.New("no"))
		if err := o.SetEgress(t.Context(), "i1", ruled); cay.CodeOf(err) != cay.CodeEnvdInit {
			t.Errorf("a guest that does not take the authority: %v", err)
		}
		if got := w.policyOf(t, o, "i1"); !reflect.DeepEqual(got, shut) {
			t.Errorf("after that the network has %+v", got)
		}
		w.setFail("trust", nil)
		if err := o.SetEgress(t.Context(), "i1", ruled); err != nil || !slices.Equal(w.trusted, []string{authority}) {
			t.Errorf("with a rule a guest was told to trust %q (%v)", w.trusted, err)
		}
	})
}

// What does not work changes nothing, and a policy that this node cannot
// enforce starts nothing.
func TestEgressPolicyFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, dir := newWorld(), t.TempDir()
		o, n := openNamed(t, w, dir, 0)
		defer o.Close()
		c := config("i1")
		c.Egress = shut
		if _, err := o.Create(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		w.setFail("policy", errors.New("no"))
		if err := o.SetEgress(t.Context(), "i1", cay.Egress{}); err == nil {
			t.Error("no error")
		}
		w.setFail("policy", nil)
		n.fail = errors.New("no")
		if err := o.SetEgress(t.Context(), "i1", named); err == nil {
			t.Error("no error")
		}
		if got := w.policyOf(t, o, "i1"); !reflect.DeepEqual(got, shut) {
			t.Errorf("the network has %+v", got)
		}
		c = config("i2")
		c.Egress = named
		if _, err := o.Create(t.Context(), c); err == nil {
			t.Error("a sandbox was made without its policy")
		}
		o.Close()
		o = reopen(t, w, dir, 0)
		defer o.Close()
		if got := w.policyOf(t, o, "i1"); !reflect.DeepEqual(got, shut) {
			t.Errorf("after a restart the network has %+v", got)
		}
		c.ID = "i3"
		if _, err := o.Create(t.Context(), c); cay.CodeOf(err) != cay.CodeNotImplemented {
			t.Errorf("a policy with names without a server of names: %v", err)
		}
		if err := o.SetEgress(t.Context(), "i1", named); cay.CodeOf(err) != cay.CodeNotImplemented {
			t.Errorf("a policy with names without a server of names: %v", err)
		}
	})
}

// A record of a version without policies leaves the network as it is.
func TestEgressOldRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, dir := open(t, w, 0)
		mustCreate(t, o, "i1")
		o.Close()
		files, err := filepath.Glob(filepath.Join(dir, "*.json"))
		if err != nil || len(files) != 1 {
			t.Fatalf("%v, %v", files, err)
		}
		b, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		old := strings.Replace(string(b), `,"egress":{}`, "", 1)
		if old == string(b) {
			t.Fatalf("the record is not as expected: %s", b)
		}
		if err := os.WriteFile(files[0], []byte(old), 0o600); err != nil {
			t.Fatal(err)
		}
		w.mu.Lock()
		w.policies[0] = shut
		w.mu.Unlock()
		o = reopen(t, w, dir, 0)
		defer o.Close()
		if got := w.policyOf(t, o, "i1"); !reflect.DeepEqual(got, shut) {
			t.Errorf("the network has %+v", got)
		}
	})
}

// Refusals of both enforcers are in one log, which outlives the sandbox.
func TestEgressLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		o, n := openNamed(t, w, t.TempDir(), 0)
		defer o.Close()
		mustCreate(t, o, "i1")
		if err := o.SetEgress(t.Context(), "i1", named); err != nil {
			t.Fatal(err)
		}
		slots{w}.NoteRefusal(slotOf(t, o, "i1"), cay.EgressRefusal{Protocol: "udp", Rule: "0.0.0.0/0"})
		n.all()[0].Report(cay.EgressRefusal{Protocol: "tls", Name: "evil.example", Rule: "names", Reason: "because"})
		want := []cay.EgressRefusal{{Seq: 1, Count: 1, Protocol: "udp", Rule: "0.0.0.0/0"},
			{Seq: 2, Count: 1, Protocol: "tls", Name: "evil.example", Rule: "names", Reason: "because"}}
		check := func() {
			t.Helper()
			for seq := range uint64(3) {
				got, err := o.EgressLog(t.Context(), "i1", seq)
				if d := cmp.Diff(want[seq:], got, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.AddrPort{})); err != nil || d != "" {
					t.Errorf("after %d: %v\n%s", seq, err, d)
				}
			}
		}
		check()
		if err := o.Kill(t.Context(), "i1", cay.EndRequest); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		check()
		if _, err := o.EgressLog(t.Context(), "i2", 0); cay.CodeOf(err) != cay.CodeSandboxNotFound {
			t.Errorf("of a sandbox that never was: %v", err)
		}
	})
}

// TestTeamLimits proves that a sandbox counts for its team's network limits
// however it was made, that a change reaches those that run, and that a node
// which adopts them puts in force what holds by then.
func TestTeamLimits(t *testing.T) {
	for _, pool := range []int{0, 1} {
		t.Run(fmt.Sprintf("pool %d", pool), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, dir := newWorld(), t.TempDir()
				limits := cay.NetworkLimits{Connections: 10}
				begin := func() *orchestrator.Orchestrator {
					o := node(w, dir, pool)
					o.TeamLimits = func(_ context.Context, id cay.TeamID) (cay.NetworkLimits, error) {
						if id != "t" {
							return cay.NetworkLimits{}, errors.New("unknown team")
						}
						return limits, w.err("look")
					}
					if err := o.Open(t.Context()); err != nil {
						t.Fatal(err)
					}
					return o
				}
				o := begin()
				defer func() { o.Close() }()
				o.Warm("b1", config("x").Resources)
				time.Sleep(time.Second)
				synctest.Wait()
				in := func(want ...cay.SandboxID) {
					t.Helper()
					w.mu.Lock()
					got := maps.Clone(w.members)
					now := w.limits["t"]
					w.mu.Unlock()
					for _, id := range want {
						i := slotOf(t, o, id)
						if got[i] != "t" {
							t.Errorf("%s counts for %q", id, got[i])
						}
						delete(got, i)
					}
					if len(got) != 0 || now != limits {
						t.Errorf("beside them count %v, with %+v", got, now)
					}
				}
				for _, id := range []string{"i1", "i2"} {
					if _, err := o.Create(t.Context(), config(id)); err != nil {
						t.Fatal(err)
					}
				}
				in("i1", "i2")
				limits = cay.NetworkLimits{Mbit: 7}
				if err := o.RefreshTeam(t.Context(), "t"); err != nil {
					t.Fatal(err)
				}
				in("i1", "i2")
				if err := o.Kill(t.Context(), "i2", cay.EndRequest); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				in("i1")

				// A change that no node heard of.
				if err := o.Close(); err != nil {
					t.Fatal(err)
				}
				limits = cay.NetworkLimits{PerSecond: 3}
				w.mu.Lock()
				clear(w.members)
				w.mu.Unlock()
				o = begin()
				in("i1")

				// Without its limits no sandbox starts.
				w.setFail("look", errors.New("no answer"))
				if _, err := o.Create(t.Context(), config("i3")); err == nil {
					t.Error("a sandbox was made whose team's limits nobody knows")
				}
				if err := o.RefreshTeam(t.Context(), "t"); err == nil {
					t.Error("limits that nobody knows were put in force")
				}
			})
		})
	}
}

// TestEgressLogKept proves that what was refused to a sandbox which has ended
// survives a restart of the node, for an hour after its end.
func TestEgressLogKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, dir, past := newWorld(), t.TempDir(), t.TempDir()
		begin := func() *orchestrator.Orchestrator {
			o := node(w, dir, 0)
			o.PastDir = past
			if err := o.Open(t.Context()); err != nil {
				t.Fatal(err)
			}
			return o
		}
		o := begin()
		for _, id := range []cay.SandboxID{"i1", "i2"} {
			mustCreate(t, o, string(id))
		}
		refused := cay.EgressRefusal{Protocol: "udp", Rule: "0.0.0.0/0", Destination: netip.MustParseAddrPort("8.8.8.8:53")}
		slots{w}.NoteRefusal(slotOf(t, o, "i1"), refused)
		for _, id := range []cay.SandboxID{"i1", "i2"} { // to the second, nothing was
			if err := o.Kill(t.Context(), id, cay.EndRequest); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if err := os.WriteFile(filepath.Join(past, "i9.json"), []byte(`{"at"`), 0o600); err != nil { // half a file
			t.Fatal(err)
		}
		for _, after := range []time.Duration{0, 59 * time.Minute, 2 * time.Minute} {
			if err := o.Close(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(after)
			o = begin()
			got, err := o.EgressLog(t.Context(), "i1", 0)
			entries, _ := os.ReadDir(past)
			if after == 2*time.Minute {
				if cay.CodeOf(err) != cay.CodeSandboxNotFound || len(entries) != 0 {
					t.Errorf("after more than an hour: %+v, %v; %d files", got, err, len(entries))
				}
				continue
			}
			refused.Seq, refused.Count = 1, 1
			if d := cmp.Diff([]cay.EgressRefusal{refused}, got, cmpopts.EquateComparable(netip.AddrPort{})); err != nil || d != "" {
				t.Errorf("after a restart: %v\n%s", err, d)
			}
			if len(entries) != 1 {
				t.Errorf("there are %d files, want one", len(entries))
			}
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
