package doctor

import (
	"context"
	"fmt"
	"time"
)

// trialCheck is in the table of a deep run only.
var trialCheck = check{id: "deep.sandbox", title: "a sandbox, used", run: checkTrial, alone: true, limit: 2 * time.Minute}

// limitOfKill is how long the end of the trial's sandbox may take.
const limitOfKill = 15 * time.Second

// checkTrial makes a sandbox, uses it and ends it, and times each stage. What
// it made is ended also when a stage fails or ctx ends.
func checkTrial(ctx context.Context, d *Doctor) Finding {
	if d.Trial == nil {
		return fail("no server runs for this data directory, so no sandbox can be tried", "start one with `cay up --detach`")
	}
	now := d.Now
	if now == nil {
		now = time.Now
	}
	var steps []Step
	var broken error
	var at string // the stage that broke
	stage := func(ctx context.Context, name string, run func(context.Context) error) {
		began := now()
		err := run(ctx)
		s := Step{Name: name, Took: now().Sub(began)}
		if err != nil {
			s.Error, _ = Explain(err)
			if broken == nil {
				broken, at = err, name
			}
		}
		steps = append(steps, s)
	}
	stage(ctx, "create", d.Trial.Create)
	if broken == nil {
		stage(ctx, "command", d.Trial.Command)
	}
	if broken == nil {
		stage(ctx, "file", d.Trial.File)
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), limitOfKill)
	defer cancel()
	stage(end, "kill", d.Trial.Kill)
	f := ok("created, ran a command, moved a file in and out, killed")
	if broken != nil {
		f = failed(broken, "see `cay sandbox inspect` and the server's log")
		f.Evidence = fmt.Sprintf("%s: %s", at, f.Evidence)
	}
	f.Steps = steps
	return f
}
