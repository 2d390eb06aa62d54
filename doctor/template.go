package doctor

import (
	"context"
	"fmt"
	"strings"
	"time"
)

var templateChecks = []check{
	{id: "template.tools", title: "building templates", run: checkBuildTools},
	{id: "template.builds", title: "templates", run: needRoot(checkTemplates), alone: true, limit: 5 * time.Minute},
}

func checkBuildTools(_ context.Context, d *Doctor) Finding {
	if d.LookPath == nil {
		return skip("not asked")
	}
	path, err := d.LookPath("mmdebstrap")
	if err != nil {
		return warn("mmdebstrap is not installed; the base template cannot be built", "`apt-get install mmdebstrap`")
	}
	return ok("%s", path)
}

// checkTemplates loads every current build, and with Deep compares digests.
func checkTemplates(ctx context.Context, d *Doctor) Finding {
	if d.Templates == nil {
		return skip("none yet; the first `cay up` builds the base template")
	}
	ts, err := d.Templates(ctx, d.Deep)
	if err != nil {
		return failed(err, "see the finding on the database above")
	}
	if len(ts) == 0 {
		return warn("there is none, so no sandbox can be made", "start the server: `cay up` builds the base template")
	}
	var names, bad []string
	var repair string
	var sum int64
	for _, t := range ts {
		if t.Err == nil {
			names, sum = append(names, t.Name), sum+t.Bytes
			continue
		}
		message, fix := Explain(t.Err)
		bad = append(bad, fmt.Sprintf("%s (build %s): %s", t.Name, t.Build, message))
		if repair == "" {
			repair = fix
		}
	}
	if bad != nil {
		if repair == "" {
			repair = "build the template again: remove the build's objects, and `cay up` makes the base template anew"
		}
		return fail(strings.Join(bad, "; "), repair)
	}
	depth := "complete, with the right sizes; --deep compares the digests"
	if d.Deep {
		depth = "complete, every digest right"
	}
	return ok("%s: %s (%s)", strings.Join(names, ", "), depth, size(sum))
}
