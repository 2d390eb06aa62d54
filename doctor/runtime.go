package doctor

import (
	"context"
	"fmt"
	"strings"
	"time"
)

var runtimeChecks = []check{
	{id: "runtime.server", title: "server", run: needRoot(checkServer)},
	{id: "runtime.engine", title: "engine", run: needRoot(checkEngine), alone: true, limit: 30 * time.Second},
	{id: "runtime.engines", title: "engines of snapshots", run: needRoot(checkEngines)},
	{id: "runtime.envd", title: "envd of sandboxes", run: needRoot(checkEnvd)},
}

func checkServer(ctx context.Context, d *Doctor) Finding {
	if d.Server == nil && d.Starting > 0 {
		return warn(fmt.Sprintf("process %d is starting", d.Starting), "wait until it is ready: the first start builds the base template, which takes minutes")
	}
	if d.Server == nil {
		return skip("not running; `cay up` starts it")
	}
	if err := d.Server.Health(ctx); err != nil {
		f := failed(err, "see the server's log")
		f.Evidence = fmt.Sprintf("process %d runs, but: %s", d.Server.PID, f.Evidence)
		return f
	}
	return ok("answers (pid %d)", d.Server.PID)
}

func checkEngine(ctx context.Context, d *Doctor) Finding {
	if d.Engine == nil {
		return skip("not tried")
	}
	info, err := d.Engine(ctx)
	if err != nil {
		return failed(err, "see the findings on the host above")
	}
	return ok("%s %s, platform %s", info.Name, info.Version, info.Platform)
}

// checkEngines says which snapshots hold which engine. Their memory is restored
// by the version that wrote it alone.
func checkEngines(ctx context.Context, d *Doctor) Finding {
	if d.Earlier == nil {
		return skip("the data directory was never used")
	}
	all, err := d.Earlier(ctx)
	if err != nil {
		return failed(err, "`cay snapshot verify` names the damaged part; while a snapshot cannot be read, every engine is kept")
	}
	var kept, gone []string
	for _, e := range all {
		who := e.holders()
		switch {
		case e.Kept && who == "":
			kept = append(kept, e.Program+" for nobody")
		case e.Kept:
			kept = append(kept, fmt.Sprintf("%s (%s) for %s", e.Program, e.Version, who))
		case len(e.Snapshots) > 0:
			gone = append(gone, fmt.Sprintf("%s of %s", e.Version, who))
		}
	}
	switch {
	case gone != nil:
		return warn("not there any more: "+strings.Join(gone, "; "),
			"the snapshots can be started without their memory (memory: false), or with the version of Cay that wrote them")
	case kept == nil:
		return ok("every snapshot with a memory is of the present engine")
	}
	return ok("kept: %s", strings.Join(kept, "; "))
}

// holders names who needs the engine.
func (e EarlierEngine) holders() string {
	var who []string
	for _, h := range []struct {
		what string
		ids  []string
	}{{"snapshots", e.Snapshots}, {"sandboxes", e.Guests}} {
		if len(h.ids) > 0 {
			who = append(who, h.what+" "+some(h.ids))
		}
	}
	return strings.Join(who, ", ")
}

// some names the first of many.
func some(ids []string) string {
	const shown = 8
	text := strings.Join(ids[:min(shown, len(ids))], ", ")
	if n := len(ids) - shown; n > 0 {
		text += fmt.Sprintf(" and %d more", n)
	}
	return text
}

// checkEnvd says which sandboxes have another envd than new ones, which does no
// harm: they were started by another version of Cay.
func checkEnvd(ctx context.Context, d *Doctor) Finding {
	if d.OtherEnvd == nil {
		return skip("the data directory was never used")
	}
	other, err := d.OtherEnvd(ctx)
	if err != nil {
		return failed(err, "the records below run/ in the data directory cannot be read; what they name runs on")
	}
	if len(other) == 0 {
		return ok("every sandbox that runs has the present one")
	}
	f := ok("another one in %s", some(other))
	f.Repair = "`cay sandbox upgrade --all` gives them the present one; their processes go on"
	return f
}
