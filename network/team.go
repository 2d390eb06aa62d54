package network

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	mdnetlink "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

// The host's table knows the slots of a team whose limits count by two maps,
// from the interface to a chain of the team: one for what its guests send, one
// for what they get. A chain's name says the team and the limits, so that the
// next process reads them there.
const (
	teamOut = "team-out"
	teamIn  = "team-in"
)

// team is what the host's table holds of one.
type team struct {
	limits cay.NetworkLimits
	slots  map[int]bool
}

// LimitTeam puts limits in force for all slots of a team together, and counts
// slots in use among them, beside those it had; others are ignored. Limits without
// a bound end that. Bounds of connections count those opened from now on when they
// change. Limits stay in force without this process, and with the next one.
func (p *Pool) LimitTeam(_ context.Context, id cay.TeamID, l cay.NetworkLimits, slots ...int) error {
	leave, err := p.enter()
	if err != nil {
		return err
	}
	defer leave()
	p.teamTurn.Lock()
	defer p.teamTurn.Unlock()
	had := p.teams[id]
	next := team{limits: l, slots: map[int]bool{}}
	maps.Copy(next.slots, had.slots)
	for _, i := range slots {
		if _, err := p.tenant(i); err == nil { // asked here, for forget comes after its end
			next.slots[i] = true
		}
	}
	if l == (cay.NetworkLimits{}) {
		next.slots = nil
	}
	if err := p.changeTeams(map[cay.TeamID]team{id: next}); err != nil {
		return fail("limiting a team's network", err)
	}
	return nil
}

// leaveTeams ends what the host's table knows of slots that are gone.
func (p *Pool) leaveTeams(gone []int) error {
	p.teamTurn.Lock()
	defer p.teamTurn.Unlock()
	next := map[cay.TeamID]team{}
	for id, t := range p.teams {
		left := maps.Clone(t.slots)
		maps.DeleteFunc(left, func(i int, _ bool) bool { return slices.Contains(gone, i) })
		if len(left) < len(t.slots) {
			next[id] = team{t.limits, left}
		}
	}
	return p.changeTeams(next)
}

// changeTeams makes teams what they should be, in one transaction. A team
// without slots has no chain. The caller holds teamTurn.
func (p *Pool) changeTeams(next map[cay.TeamID]team) error {
	c := &nftables.Conn{}
	t := &table{conn: c, table: &nftables.Table{Name: p.tableName(), Family: nftables.TableFamilyINet}}
	changed := false
	for id, want := range next {
		had := p.teams[id]
		if want.limits == had.limits && maps.Equal(want.slots, had.slots) {
			continue
		}
		changed = true
		keep := want.limits == had.limits && len(want.slots) > 0 && len(had.slots) > 0
		if !keep && len(want.slots) > 0 {
			t.teamChains(id, want.limits)
		}
		for _, way := range []string{teamOut, teamIn} {
			s := t.teamMap(way)
			var gone, come []nftables.SetElement
			for i := range had.slots {
				if !keep || !want.slots[i] {
					gone = append(gone, nftables.SetElement{Key: ifname(p.link(i))})
				}
			}
			for i := range want.slots {
				if !keep || !had.slots[i] {
					come = append(come, teamElement(p.link(i), way, id, want.limits))
				}
			}
			if len(gone) > 0 {
				t.err = errors.Join(t.err, c.SetDeleteElements(s, gone))
			}
			if len(come) > 0 {
				t.err = errors.Join(t.err, c.SetAddElements(s, come))
			}
			if !keep && len(had.slots) > 0 {
				c.DelChain(&nftables.Chain{Table: t.table, Name: teamChain(way, id, had.limits)})
			}
		}
	}
	if !changed {
		return nil
	}
	if err := t.commit(); err != nil {
		return err
	}
	if p.teams == nil {
		p.teams = map[cay.TeamID]team{}
	}
	for id, want := range next {
		if p.teams[id] = want; len(want.slots) == 0 {
			delete(p.teams, id)
		}
	}
	return nil
}

// teamChain is the name of a team's chain.
func teamChain(way string, id cay.TeamID, l cay.NetworkLimits) string {
	return fmt.Sprintf("%s-%d-%d-%d-%s", way, l.Connections, l.PerSecond, l.Mbit, id)
}

// parseTeamChain reads what teamChain wrote.
func parseTeamChain(way, name string) (cay.TeamID, cay.NetworkLimits, bool) {
	rest, ok := strings.CutPrefix(name, way+"-")
	w := strings.SplitN(rest, "-", 4)
	if !ok || len(w) < 4 {
		return "", cay.NetworkLimits{}, false
	}
	var n [3]int
	for i := range n {
		var err error
		if n[i], err = strconv.Atoi(w[i]); err != nil {
			return "", cay.NetworkLimits{}, false
		}
	}
	return cay.TeamID(w[3]), cay.NetworkLimits{Connections: n[0], PerSecond: n[1], Mbit: n[2]}, true
}

func (t *table) teamMap(way string) *nftables.Set {
	return &nftables.Set{Table: t.table, Name: way, IsMap: true, KeyType: nftables.TypeIFName, DataType: nftables.TypeVerdict}
}

func teamElement(link, way string, id cay.TeamID, l cay.NetworkLimits) nftables.SetElement {
	return nftables.SetElement{Key: ifname(link), VerdictData: &expr.Verdict{Kind: expr.VerdictJump, Chain: teamChain(way, id, l)}}
}

// teamChains adds the chains of a team's limits.
func (t *table) teamChains(id cay.TeamID, l cay.NetworkLimits) {
	out, in := t.chain(teamChain(teamOut, id, l)), t.chain(teamChain(teamIn, id, l))
	if l.Mbit > 0 {
		out(thicker(l.Mbit), drop())
		in(thicker(l.Mbit), drop())
	}
	if l.Connections > 0 {
		out(isNew(), over(uint32(l.Connections)), jump(refuseChain+"-"+byTeamConnections))
	}
	if l.PerSecond > 0 {
		out(isNew(), faster(uint64(l.PerSecond), uint32(2*l.PerSecond)), jump(refuseChain+"-"+byTeamRate))
	}
}

// limitTeams adds what the host's table has for limits of teams. Packets come
// there that nothing has refused.
func (t *table) limitTeams(p *Pool) {
	t.because(p.group, byTeamConnections)
	t.because(p.group, byTeamRate)
	for id, team := range p.teams {
		t.teamChains(id, team.limits)
	}
	ours := p.linkPrefix()
	for way, entry := range map[string]words{
		teamOut: rule(iifPrefix(ours), words{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}}),
		teamIn:  rule(oifPrefix(ours), words{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}}),
	} {
		var el []nftables.SetElement
		for id, team := range p.teams {
			for i := range team.slots {
				el = append(el, teamElement(p.link(i), way, id, team.limits))
			}
		}
		s := t.set(t.teamMap(way), el)
		hook, prio := nftables.ChainHookPrerouting, nftables.ChainPriority(beforeDNAT+1)
		if way == teamIn {
			hook, prio = nftables.ChainHookPostrouting, 0
		}
		t.base("limit-"+way, nftables.ChainTypeFilter, hook, prio)(entry,
			words{&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID, IsDestRegSet: true}})
	}
}

// readTeams returns what the table in force has of teams.
func readTeams(c *nftables.Conn, p *Pool) (map[cay.TeamID]team, error) {
	t := &nftables.Table{Name: p.tableName(), Family: nftables.TableFamilyINet}
	s, err := c.GetSetByName(t, teamOut)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	el, err := c.GetSetElements(s)
	if err != nil {
		return nil, err
	}
	out := map[cay.TeamID]team{}
	for _, e := range el {
		i, err := strconv.Atoi(strings.TrimPrefix(strings.TrimRight(string(e.Key), "\x00"), p.linkPrefix()))
		if err != nil {
			continue
		}
		id, l, ok := parseTeamChain(teamOut, verdictChain(e.Val))
		if !ok {
			continue
		}
		if out[id].slots == nil {
			out[id] = team{l, map[int]bool{}}
		}
		out[id].slots[i] = true
	}
	return out, nil
}

// verdictChain is the chain that a verdict of the kernel names.
func verdictChain(attrs []byte) string {
	d, err := mdnetlink.NewAttributeDecoder(attrs)
	if err != nil {
		return ""
	}
	for d.Next() {
		if d.Type() == unix.NFTA_VERDICT_CHAIN {
			return d.String()
		}
	}
	return ""
}
