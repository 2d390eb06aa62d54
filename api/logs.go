package api

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cayhq/cay"
	gen "github.com/cayhq/cay/internal/gen/api"
	"github.com/cayhq/cay/store"
)

// maxLogs is the length of a page of log records when the client doesn't say,
// and at most.
const maxLogs = 1000

// Where log records come from, as the field "source".
const (
	sourceLife    = "lifecycle"
	sourceConsole = "console"
)

// SandboxLogs implements the generated interface.
func (s sandboxHandlers) SandboxLogs(ctx context.Context, r gen.SandboxLogsRequestObject) (gen.SandboxLogsResponseObject, error) {
	all, err := s.logs(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	if r.Params.Start != nil {
		all = since(all, *r.Params.Start)
	}
	all = all[:min(len(all), logLimit(r.Params.Limit))]
	out := gen.SandboxLogs200JSONResponse{Logs: make([]gen.SandboxLog, len(all)), LogEntries: all}
	for i, e := range all {
		line, err := json.Marshal(logLine{Timestamp: e.Timestamp, Level: string(e.Level), Message: e.Message, Source: e.Fields["source"]})
		if err != nil {
			return nil, fmt.Errorf("encoding a log record: %w", err)
		}
		out.Logs[i] = gen.SandboxLog{Timestamp: e.Timestamp, Line: string(line)}
	}
	return out, nil
}

// logLine is the text form of a record; the CLI parses it.
type logLine struct {
	Timestamp time.Time `json:"timestamp"`
	Level     string    `json:"level"`
	Message   string    `json:"message"`
	Source    string    `json:"logger"`
}

// SandboxLogsV2 implements the generated interface.
func (s sandboxHandlers) SandboxLogsV2(ctx context.Context, r gen.SandboxLogsV2RequestObject) (gen.SandboxLogsV2ResponseObject, error) {
	all, err := s.logs(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	p := r.Params
	backward := p.Direction != nil && *p.Direction == gen.Backward
	all = slices.DeleteFunc(all, func(e gen.SandboxLogEntry) bool {
		return p.Level != nil && gravity[e.Level] < gravity[*p.Level] || p.Search != nil && !strings.Contains(e.Message, *p.Search)
	})
	switch {
	case p.Cursor != nil && backward:
		all = slices.DeleteFunc(all, func(e gen.SandboxLogEntry) bool { return e.Timestamp.UnixMilli() > *p.Cursor })
	case p.Cursor != nil:
		all = since(all, *p.Cursor)
	}
	if backward {
		slices.Reverse(all)
	}
	return gen.SandboxLogsV2200JSONResponse{Logs: all[:min(len(all), logLimit(p.Limit))]}, nil
}

var gravity = map[gen.LogLevel]int{gen.LogLevelDebug: 0, gen.LogLevelInfo: 1, gen.LogLevelWarn: 2, gen.LogLevelError: 3}

func logLimit(p *int32) int {
	if p == nil {
		return maxLogs
	}
	return min(int(*p), maxLogs)
}

func since(all []gen.SandboxLogEntry, ms int64) []gen.SandboxLogEntry {
	return slices.DeleteFunc(all, func(e gen.SandboxLogEntry) bool { return e.Timestamp.UnixMilli() < ms })
}

// logs returns what there is to say about a sandbox, oldest first: its life and
// its console. An ended one has a console for an hour, and its life as long as
// it is on record.
func (s sandboxHandlers) logs(ctx context.Context, ref string) ([]gen.SandboxLogEntry, error) {
	rec, err := s.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	lines, err := s.Node.Console(ctx, rec.ID)
	if err != nil && cay.CodeOf(err) != cay.CodeSandboxNotFound {
		return nil, err
	}
	all := lifeLog(rec)
	for _, l := range lines {
		all = append(all, gen.SandboxLogEntry{Timestamp: l.At.UTC(), Level: gen.LogLevelInfo, Message: strings.ToValidUTF8(l.Text, "\uFFFD"),
			Fields: map[string]string{"source": sourceConsole}})
	}
	slices.SortStableFunc(all, func(a, b gen.SandboxLogEntry) int { return a.Timestamp.Compare(b.Timestamp) })
	return all, nil
}

// lifeLog tells a record as log records.
func lifeLog(rec store.Sandbox) []gen.SandboxLogEntry {
	entry := func(at time.Time, level gen.LogLevel, message string) gen.SandboxLogEntry {
		return gen.SandboxLogEntry{Timestamp: at, Level: level, Message: message, Fields: map[string]string{"source": sourceLife}}
	}
	all := []gen.SandboxLogEntry{entry(rec.CreatedAt, gen.LogLevelInfo, "sandbox created from template "+cmp.Or(rec.Alias, string(rec.Template)))}
	started := func(h store.Happening) bool { return h.Type == cay.EventResumed && h.At.Equal(rec.StartedAt) }
	if !slices.ContainsFunc(rec.History, started) && (rec.State == cay.StateRunning || rec.StartedAt.After(rec.CreatedAt)) {
		all = append(all, entry(rec.StartedAt, gen.LogLevelInfo, "sandbox runs"))
	}
	for _, h := range rec.History {
		e := entry(h.At, gen.LogLevelInfo, h.Message)
		switch h.Type {
		case cay.EventPauseFailed, cay.EventResumeFailed, cay.EventDegraded:
			e.Level = gen.LogLevelWarn
		}
		e.Fields["event"] = string(h.Type)
		all = append(all, e)
	}
	if rec.State == cay.StateEnded {
		e := entry(rec.EndedAt, gen.LogLevelInfo, "sandbox ended: "+endText(rec.EndReason, rec.EndMessage))
		switch rec.EndReason {
		case cay.EndRequest, cay.EndTimeout, cay.EndShutdown:
		default:
			e.Level = gen.LogLevelError
		}
		e.Fields["reason"] = string(rec.EndReason)
		all = append(all, e)
	}
	return all
}
