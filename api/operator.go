package api

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/gen/operator"
	"github.com/cayhq/cay/store"
)

// operatorHandlers serves what only Cay has, for the operator.
type operatorHandlers struct{ *Server }

// inspector is a node that knows more about a sandbox than Get tells.
type inspector interface {
	Inspect(ctx context.Context, id cay.SandboxID) (cay.NodeSandbox, error)
}

// Status implements the generated interface.
func (s operatorHandlers) Status(ctx context.Context, _ operator.StatusRequestObject) (operator.StatusResponseObject, error) {
	info, err := s.Node.Info(ctx)
	if err != nil {
		return nil, err
	}
	teams, err := s.Store.ListTeams(ctx)
	if err != nil {
		return nil, err
	}
	rows, err := s.Store.ListSandboxes(ctx, store.SandboxFilter{})
	if err != nil {
		return nil, err
	}
	count := map[cay.SandboxState]int{}
	for _, r := range rows {
		count[r.State]++
	}
	return operator.Status200JSONResponse{Version: cay.Version, Commit: cay.Commit, StartedAt: s.life.began.UTC(), Teams: len(teams),
		CreateSuccesses: s.made.Load(), CreateFails: s.failed.Load(),
		Sandboxes: operator.SandboxCounts{Starting: count[cay.StateStarting], Running: count[cay.StateRunning], Pausing: count[cay.StatePausing],
			Paused: count[cay.StatePaused], Resuming: count[cay.StateResuming], Snapshotting: count[cay.StateSnapshotting], Killing: count[cay.StateKilling]},
		Node: operator.NodeInfo{Id: string(info.ID), Version: info.Version, Runtime: info.Runtime, RuntimeVersion: info.RuntimeVersion,
			Cpus: info.CPUs, MemoryBytes: info.MemoryBytes, Sandboxes: info.Sandboxes, PoolReady: info.PoolReady}}, nil
}

// ListSandboxes implements the generated interface.
func (s operatorHandlers) ListSandboxes(ctx context.Context, r operator.ListSandboxesRequestObject) (operator.ListSandboxesResponseObject, error) {
	var f store.SandboxFilter
	if r.Params.TeamID != nil {
		f.Team = cay.TeamID(*r.Params.TeamID)
	}
	for _, st := range r.Params.State {
		f.States = append(f.States, cay.SandboxState(st))
	}
	rows, err := s.Store.ListSandboxes(ctx, f)
	if err != nil {
		return nil, err
	}
	out := make(operator.ListSandboxes200JSONResponse, len(rows))
	for i, row := range rows {
		out[i] = record(row)
	}
	return out, nil
}

// InspectSandbox implements the generated interface.
func (s operatorHandlers) InspectSandbox(ctx context.Context, r operator.InspectSandboxRequestObject) (operator.InspectSandboxResponseObject, error) {
	rec, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	get := s.Node.Get
	if i, ok := s.Node.(inspector); ok {
		get = i.Inspect
	}
	out := operator.InspectSandbox200JSONResponse{Record: record(rec)}
	n, err := get(ctx, rec.ID)
	switch cay.CodeOf(err) {
	case "":
		out.Node = onNode(n)
	case cay.CodeSandboxNotFound:
	default:
		return nil, err
	}
	return out, nil
}

// KillSandbox implements the generated interface.
func (s operatorHandlers) KillSandbox(ctx context.Context, r operator.KillSandboxRequestObject) (operator.KillSandboxResponseObject, error) {
	id, err := cay.ParseSandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	if err := s.life.kill(ctx, "", id, cay.EndRequest, "an operator killed it"); err != nil {
		return nil, err
	}
	return operator.KillSandbox204Response{}, nil
}

// UpgradeSandbox implements the generated interface.
func (s operatorHandlers) UpgradeSandbox(ctx context.Context, r operator.UpgradeSandboxRequestObject) (operator.UpgradeSandboxResponseObject, error) {
	rec, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	node, ok := s.Node.(cay.EnvdUpgrader)
	switch {
	case !ok:
		return nil, absent("replacing envd", "use a node that can")
	case rec.State == cay.StatePaused:
		return nil, &cay.Error{Code: cay.CodeConflict, Layer: cay.LayerAPI,
			Message: "sandbox '" + string(rec.ID) + "' is paused, with the envd in its memory", Fix: "resume it, and try again"}
	}
	u, err := node.UpgradeEnvd(ctx, rec.ID)
	if err != nil {
		return nil, err
	}
	s.life.noteEnvd(ctx, rec.ID, u.Version)
	return operator.UpgradeSandbox200JSONResponse{SandboxID: string(rec.ID), Changed: u.Changed, FromVersion: u.FromVersion, FromDigest: string(u.FromDigest),
		Version: u.Version, Digest: string(u.Digest), TookMs: u.Took.Seconds() * 1000}, nil
}

// noteEnvd records the version of the envd that a sandbox got while it ran: its
// clients go by that. What cannot be recorded is known again after a resume.
func (l *life) noteEnvd(ctx context.Context, id cay.SandboxID, version string) {
	ctx, stop := detached(ctx, recordTimeout)
	defer stop()
	_, err := l.update(ctx, id, func(s *store.Sandbox) error {
		if s.State == cay.StateEnded || s.EnvdVersion == version {
			return errNotMoved
		}
		s.EnvdVersion = version
		return nil
	})
	if err != nil && !errors.Is(err, errNotMoved) {
		l.log.Error("recording the envd of a sandbox", "sandbox", id, "error", err)
	}
}

// TraceSandbox implements the generated interface.
func (s operatorHandlers) TraceSandbox(ctx context.Context, r operator.TraceSandboxRequestObject) (operator.TraceSandboxResponseObject, error) {
	rec, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	steps, err := s.Node.Trace(ctx, rec.ID)
	if err != nil && cay.CodeOf(err) != cay.CodeSandboxNotFound {
		return nil, err
	}
	out := make(operator.TraceSandbox200JSONResponse, len(steps))
	for i, st := range steps {
		out[i] = operator.StartStep{Operation: cmp.Or(st.Op, "start"), Name: st.Name, Layer: string(st.Layer), TookMs: st.Took.Seconds() * 1000, Error: st.Error}
	}
	return out, nil
}

// SandboxConsole implements the generated interface.
func (s operatorHandlers) SandboxConsole(ctx context.Context, r operator.SandboxConsoleRequestObject) (operator.SandboxConsoleResponseObject, error) {
	rec, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	lines, err := s.Node.Console(ctx, rec.ID)
	if err != nil && cay.CodeOf(err) != cay.CodeSandboxNotFound {
		return nil, err
	}
	out := make(operator.SandboxConsole200JSONResponse, len(lines))
	for i, l := range lines {
		out[i] = operator.ConsoleLine{Timestamp: l.At.UTC(), Text: strings.ToValidUTF8(l.Text, "\uFFFD")}
	}
	return out, nil
}

// SandboxEgress implements the generated interface.
func (s operatorHandlers) SandboxEgress(ctx context.Context, r operator.SandboxEgressRequestObject) (operator.SandboxEgressResponseObject, error) {
	rec, err := s.find(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	seq := uint64(0)
	if r.Params.After != nil {
		seq = uint64(max(*r.Params.After, 0))
	}
	all, err := s.Node.EgressLog(ctx, rec.ID, seq)
	if err != nil && cay.CodeOf(err) != cay.CodeSandboxNotFound {
		return nil, err
	}
	out := make(operator.SandboxEgress200JSONResponse, len(all))
	for i, e := range all {
		out[i] = operator.EgressRefusal{Seq: int64(e.Seq), First: e.First.UTC(), Last: e.Last.UTC(), Count: e.Count, Protocol: e.Protocol,
			Destination: destination(e.Destination), Name: strings.ToValidUTF8(e.Name, "\uFFFD"), Rule: e.Rule, Reason: strings.ToValidUTF8(e.Reason, "\uFFFD")}
	}
	return out, nil
}

// destination is an address with its port, if it has one.
func destination(to netip.AddrPort) string {
	switch {
	case !to.IsValid():
		return ""
	case to.Port() == 0:
		return to.Addr().String()
	}
	return to.String()
}

// find returns the record of a sandbox of any team.
func (s operatorHandlers) find(ctx context.Context, ref string) (store.Sandbox, error) {
	id, err := cay.ParseSandboxID(ref)
	if err != nil {
		return store.Sandbox{}, err
	}
	rec, err := s.Store.FindSandbox(ctx, "", id)
	if cay.CodeOf(err) == cay.CodeSandboxNotFound {
		return rec, &cay.Error{Code: cay.CodeSandboxNotFound, Layer: cay.LayerAPI,
			Message: "there is no record of sandbox '" + string(id) + "': it never was, or it ended more than seven days ago",
			Fix:     "see `cay sandbox list` for those that run"}
	}
	return rec, err
}

func record(r store.Sandbox) operator.SandboxRecord {
	meta := r.Metadata
	if meta == nil {
		meta = map[string]string{}
	}
	return operator.SandboxRecord{SandboxID: string(r.ID), TeamID: string(r.Team), TemplateID: string(r.Template), Alias: r.Alias,
		BuildID: string(r.Build), NodeID: string(r.Node), State: operator.SandboxState(r.State),
		Resources:   operator.Resources{Cpus: r.Resources.CPUs, MemoryMB: r.Resources.MemoryMB, DiskMB: r.Resources.DiskMB},
		EnvdVersion: r.EnvdVersion, Metadata: meta, Secure: r.Secure,
		CreatedAt: r.CreatedAt, StartedAt: r.StartedAt, EndAt: r.Deadline, MaxEndAt: r.MaxDeadline,
		EndedAt: instant(r.EndedAt), EndReason: string(r.EndReason), EndMessage: endText(r.EndReason, r.EndMessage),
		ExecutionID: string(r.Execution), SnapshotID: string(r.Snapshot), PausedAt: instant(r.PausedAt),
		Origin: string(r.Origin), Parent: string(r.Parent), History: history(r.History)}
}

func history(all []store.Happening) []operator.Happening {
	out := make([]operator.Happening, len(all))
	for i, h := range all {
		out[i] = operator.Happening{Timestamp: h.At, Type: string(h.Type), Message: h.Message}
	}
	return out
}

// ListSnapshots implements the generated interface.
func (s operatorHandlers) ListSnapshots(ctx context.Context, _ operator.ListSnapshotsRequestObject) (operator.ListSnapshotsResponseObject, error) {
	out := operator.ListSnapshots200JSONResponse{}
	if s.Snapshots == nil {
		return out, nil
	}
	there, err := s.Snapshots.Snapshots(ctx)
	if err != nil {
		return nil, err
	}
	rows, err := s.Store.ListSandboxes(ctx, store.SandboxFilter{})
	if err != nil {
		return nil, err
	}
	owner, names := map[cay.SnapshotID]string{}, map[cay.SnapshotID][]string{}
	for _, r := range rows {
		owner[r.Snapshot] = "sandbox"
	}
	kept, err := s.Store.ListSnapshots(ctx, store.SnapshotFilter{})
	if err != nil {
		return nil, err
	}
	team := map[cay.SnapshotID]cay.TeamID{} // of one that was imported, it is not that of the manifest
	for _, k := range kept {
		owner[k.ID], team[k.ID] = "client", k.Team
		if k.Name != "" {
			names[k.ID] = []string{k.Name + ":" + k.Tag}
		}
	}
	slices.SortFunc(there, func(a, b cay.Snapshot) int { return b.CreatedAt.Compare(a.CreatedAt) })
	for _, n := range there {
		n.Team = cmp.Or(team[n.ID], n.Team)
		out = append(out, snapshotRow(n, cmp.Or(owner[n.ID], "none"), names[n.ID]))
	}
	return out, nil
}

func snapshotRow(n cay.Snapshot, owner string, names []string) operator.Snapshot {
	row := operator.Snapshot{SnapshotID: string(n.ID), SandboxID: string(n.Sandbox), TeamID: string(n.Team), TemplateID: string(n.Template),
		BuildID: string(n.Build), Names: append([]string{}, names...), Owner: owner, CreatedAt: n.CreatedAt,
		Runtime: n.Runtime, RuntimeVersion: n.RuntimeVersion, DiskBytes: n.Disk.SizeBytes}
	for _, p := range n.Memory {
		row.MemoryBytes += p.SizeBytes
	}
	return row
}

// VerifySnapshot implements the generated interface.
func (s operatorHandlers) VerifySnapshot(ctx context.Context, r operator.VerifySnapshotRequestObject) (operator.VerifySnapshotResponseObject, error) {
	if s.Snapshots == nil {
		return nil, absent("snapshots", "use a node that keeps them")
	}
	if err := s.Snapshots.VerifySnapshot(ctx, cay.SnapshotID(r.SnapshotID)); err != nil {
		return nil, err
	}
	return operator.VerifySnapshot204Response{}, nil
}

func onNode(n cay.NodeSandbox) *operator.NodeSandbox {
	h := n.Host
	return &operator.NodeSandbox{ExecutionID: string(n.ExecutionID), State: operator.SandboxState(n.State), StartedAt: n.StartedAt,
		EndAt: n.Deadline, EnvdVersion: n.EnvdVersion, EnvdDigest: string(n.Envd), EnvdOutdated: n.EnvdOutdated, Adopted: n.Adopted, Restored: n.Restored, Degraded: n.Degraded,
		Host: operator.SandboxOnHost{Runtime: h.Runtime, RuntimeVersion: h.RuntimeVersion, Container: h.Container, Pid: h.PID,
			Address: h.Address, Netns: h.NetNS, Rootfs: h.RootFS, DiskImage: h.DiskImage}}
}
