package doctor

import (
	"context"
	"fmt"
	"time"
)

var runtimeChecks = []check{
	{id: "runtime.server", title: "server", run: needRoot(checkServer)},
	{id: "runtime.engine", title: "engine", run: needRoot(checkEngine), alone: true, limit: 30 * time.Second},
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
