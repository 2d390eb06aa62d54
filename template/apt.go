package template

import (
	"context"
	"os/exec"
	"slices"
	"strings"
)

// aptSources returns sources.list lines for the recipe's suite: those the host
// itself uses for it, so that a company's mirror is used here too, or else the
// recipe's.
func aptSources(ctx context.Context, r Recipe) []string {
	// apt answers with the settings in force, wherever they are written.
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format",
		"$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)", "Created-By: Packages").Output()
	if err == nil {
		if lines := hostSources(string(out), r); lines != nil {
			return lines
		}
	}
	comps := strings.Join(r.Components, " ")
	var lines []string
	for _, m := range r.Mirrors {
		if strings.HasSuffix(strings.TrimRight(m, "/"), "-security") {
			lines = append(lines, "deb "+m+" "+r.Suite+"-security "+comps)
			continue
		}
		lines = append(lines, "deb "+m+" "+r.Suite+" "+comps, "deb "+m+" "+r.Suite+"-updates "+comps)
	}
	return lines
}

// hostSources picks Debian's own archives of the suite out of what apt lists.
// It returns nil when the main one is not among them.
func hostSources(targets string, r Recipe) []string {
	var lines []string
	main := false
	for line := range strings.Lines(targets) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) != 4 || !slices.Contains(r.Components, f[2]) {
			continue
		}
		uri, release, comp, origin := f[0], f[1], f[2], f[3]
		// The origin is in the archive's signed index, which a host that has
		// not run `apt-get update` lacks. Others use Debian's code names for
		// archives of their own.
		if origin != "Debian" && (!strings.HasPrefix(origin, "$(") || !strings.Contains(uri, "debian.org/")) {
			continue
		}
		if release != r.Suite && release != r.Suite+"-updates" && release != r.Suite+"-security" {
			continue
		}
		main = main || release == r.Suite
		if l := "deb " + uri + " " + release + " " + comp; !slices.Contains(lines, l) {
			lines = append(lines, l)
		}
	}
	if !main {
		return nil
	}
	return lines
}

// aptOptionPrefixes are the host's settings that a build needs to reach the
// archives as the host does.
var aptOptionPrefixes = []string{"Acquire::http::", "Acquire::https::", "Acquire::Check-Valid-Until", "Acquire::Check-Date",
	"Acquire::ForceIPv4", "Acquire::ForceIPv6"}

// hostAptOptions returns the host's settings, as lines of apt.conf.
func hostAptOptions(ctx context.Context) []string {
	out, err := exec.CommandContext(ctx, "apt-config", "dump", "--no-empty", "--format", `%F "%v";%n`).Output()
	if err != nil {
		return nil
	}
	return pickAptOptions(string(out))
}

func pickAptOptions(dump string) []string {
	var opts []string
	for line := range strings.Lines(dump) {
		line = strings.TrimSuffix(strings.TrimSpace(line), ";")
		if slices.ContainsFunc(aptOptionPrefixes, func(p string) bool { return strings.HasPrefix(line, p) }) {
			opts = append(opts, line)
		}
	}
	return opts
}
